"""UNet: parity with PyTorch diffusers, tree paths of its Flax class, sizes, precision, remat."""
import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from jaxalign.convert import names
from jaxalign.errors import UserError
from jaxalign.models.pipeline import random_params
from jaxalign.models.unet import UNet2DConditionModel

pytestmark = pytest.mark.usefixtures("compile_quickly")

# Stable Diffusion 1.x in small: blocks with and without attention, several widths.
SD1 = dict(sample_size=8, block_out_channels=[32, 64], layers_per_block=1, cross_attention_dim=24,
           down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
           up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"], attention_head_dim=4)
# SDXL in small: linear projections, depth and heads per block, extra conditions.
SDXL = dict(sample_size=8, block_out_channels=[32, 64], layers_per_block=1, cross_attention_dim=24,
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], attention_head_dim=[2, 4],
            transformer_layers_per_block=[1, 2], use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=20 + 6 * 8)
FULL_SD15 = dict(cross_attention_dim=768)
FULL_SDXL = dict(
    sample_size=128, block_out_channels=[320, 640, 1280], cross_attention_dim=2048,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    attention_head_dim=[5, 10, 20], transformer_layers_per_block=[1, 2, 10],
    use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816)


@functools.cache
def shapes_of(unet):
  return jax.eval_shape(unet.init, jax.random.key(0), *unet.example_inputs())["params"]


def inputs(unet, batch=2, size=8, seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  added = None
  if unet.config.addition_embed_type:
    ids = rng.integers(0, 64, (batch, 6)).astype(np.float32)
    added = {"text_embeds": normal(batch, 20), "time_ids": ids}
  return normal(batch, size, size, 4), np.array([7, 901][:batch]), normal(batch, 5, 24), added


def torch_unet(config, params):
  """The PyTorch model with our parameters."""
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  model = diffusers.UNet2DConditionModel(**config).eval()
  flat = traverse_util.flatten_dict(params, sep="/")
  state = {names.torch_name(p): torch.from_numpy(names.to_torch(p, x)) for p, x in flat.items()}
  model.load_state_dict(state, strict=True)
  return model


def run_torch(model, x, t, text, added):
  torch = pytest.importorskip("torch")
  added = added and {k: torch.from_numpy(v) for k, v in added.items()}
  with torch.no_grad():
    out = model(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t),
                torch.from_numpy(text), added_cond_kwargs=added).sample
  return out.permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def sd1():
  unet = UNet2DConditionModel.from_config(SD1)
  return unet, random_params(shapes_of(unet), 0)


@pytest.mark.parametrize("config, size", [(SD1, 8), (SDXL, 8), (SD1, 7)],
                         ids=["sd1", "sdxl", "odd_size"])
def test_equals_pytorch(config, size):
  unet = UNet2DConditionModel.from_config(config)
  params = random_params(shapes_of(unet), 1)
  args = inputs(unet, size=size)
  ours = jax.jit(unet.apply)({"params": params}, *args)
  np.testing.assert_allclose(ours, run_torch(torch_unet(config, params), *args), atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [SD1, SDXL, FULL_SD15, FULL_SDXL],
                         ids=["sd1", "sdxl", "full_sd15", "full_sdxl"])
def test_tree_equals_that_of_the_flax_class(config):
  diffusers = pytest.importorskip("diffusers")
  if not hasattr(diffusers, "FlaxUNet2DConditionModel"):
    pytest.skip("this version of diffusers has no Flax classes")
  tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = diffusers.FlaxUNet2DConditionModel(**tuples)
    theirs = jax.eval_shape(theirs.init_weights, jax.random.key(0))
  flatten = lambda tree: {k: v.shape for k, v in traverse_util.flatten_dict(tree, sep="/").items()}
  assert flatten(shapes_of(UNet2DConditionModel.from_config(config))) == flatten(theirs)


@pytest.mark.parametrize("config, count", [(FULL_SD15, 859_520_964), (FULL_SDXL, 2_567_463_684)],
                         ids=["sd15", "sdxl"])
def test_full_size(config, count):
  shapes = jax.tree.leaves(shapes_of(UNet2DConditionModel.from_config(config)))
  assert sum(leaf.size for leaf in shapes) == count


def test_scalar_timestep_is_one_for_all(sd1):
  unet, params = sd1
  x, _, text, _ = inputs(unet)
  apply = jax.jit(unet.apply)
  np.testing.assert_array_equal(apply({"params": params}, x, jnp.array(33), text),
                                apply({"params": params}, x, jnp.array([33, 33]), text))


def test_bf16_is_close_and_returns_f32(sd1):
  unet, params = sd1
  args = inputs(unet)
  half = UNet2DConditionModel.from_config(SD1, dtype="bfloat16")
  exact = jax.jit(unet.apply)({"params": params}, *args)
  out = jax.jit(half.apply)({"params": params}, *args)
  assert out.dtype == jnp.float32
  assert np.abs(out - exact).max() < 0.05 * np.abs(exact).max()


def test_remat_changes_neither_output_nor_tree_nor_gradient():
  config = {**SD1, "block_out_channels": [32], "down_block_types": ["CrossAttnDownBlock2D"],
            "up_block_types": ["UpBlock2D"]}
  unet = UNet2DConditionModel.from_config(config)
  params = random_params(shapes_of(unet), 0)
  rematted = UNet2DConditionModel.from_config(config, remat="block")
  assert jax.tree.structure(shapes_of(rematted)) == jax.tree.structure(params)
  x, *rest = inputs(unet)

  def value_and_grad(model):
    loss = lambda x: jnp.square(model.apply({"params": params}, x, *rest)).mean()
    return jax.jit(jax.value_and_grad(loss))

  value, grad = value_and_grad(unet)(x)
  value_r, grad_r = value_and_grad(rematted)(x)
  np.testing.assert_allclose(value, value_r, rtol=1e-6)
  np.testing.assert_allclose(grad, grad_r, atol=1e-6)
  assert "remat" in str(jax.make_jaxpr(value_and_grad(rematted))(x))


def test_a_list_of_nothing_but_false_is_false():
  listed = UNet2DConditionModel.from_config({**SD1, "only_cross_attention": [False, False]})
  assert listed == UNet2DConditionModel.from_config(SD1)


@pytest.mark.parametrize("key, value", [
    ("_class_name", "UNet3DConditionModel"), ("act_fn", "gelu"), ("class_embed_type", "timestep"),
    ("num_attention_heads", 8), ("addition_embed_type", "image"), ("conv_in_kernel", 1),
    ("mid_block_type", None), ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
    ("block_out_channels", [33, 64]), ("attention_head_dim", 7), ("a_new_feature", "on"),
    ("up_block_types", ["UpBlock2D"]), ("attention_head_dim", None), ("norm_num_groups", 0),
    ("transformer_layers_per_block", [[1], [1]]), ("only_cross_attention", [True, False]),
])
def test_unsupported_config_names_key_and_value(key, value):
  with pytest.raises(UserError) as error:
    UNet2DConditionModel.from_config({**SD1, key: value})
  key = "norm_num_groups" if key == "block_out_channels" else key
  assert "\n" not in str(error.value)
  assert re.search(rf"config: {key} = .* is not supported|config: unknown key {key} ",
                   str(error.value))


def test_missing_extra_conditions_are_an_error():
  unet = UNet2DConditionModel.from_config(SDXL)
  x, t, text, _ = inputs(unet)
  with pytest.raises(ValueError, match="added"):
    jax.eval_shape(unet.init, jax.random.key(0), x, t, text)
