"""Adapters: zero at the start, equal to the merged kernels, the only ones to get gradients."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from jaxalign.errors import UserError
from jaxalign.models import lora
from jaxalign.models.mmdit import SD3Transformer2DModel
from jaxalign.models.pipeline import random_params
from jaxalign.models.stable_diffusion import StableDiffusionPipeline
from jaxalign.models.stable_diffusion_3 import StableDiffusion3Pipeline
from jaxalign.models.unet import UNet2DConditionModel

CONFIG = dict(sample_size=4, block_out_channels=[32, 32], layers_per_block=1,
              cross_attention_dim=16, attention_head_dim=2,
              down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
              up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"])
ALL = StableDiffusionPipeline.lora_targets
ATTENTION = {"attention": ALL["attention"]}


@pytest.fixture(scope="module")
def setting():
  # With rematerialisation, since that lifts the variable collections.
  unet = UNet2DConditionModel.from_config(CONFIG, remat="block")
  shapes = jax.eval_shape(unet.init, jax.random.key(0), *unet.example_inputs())["params"]
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 4, 4, 4)).astype(np.float32)
  text = rng.standard_normal((2, 3, 16)).astype(np.float32)
  apply = jax.jit(lambda variables: unet.apply(variables, x, jnp.array(500), text))
  return apply, random_params(shapes, 0)


def moved(tree, scale=0.1):
  """The adapter after some training: every factor away from its start."""
  leaves, structure = jax.tree.flatten(tree)
  rng = np.random.default_rng(1)
  return structure.unflatten([x + scale * rng.standard_normal(x.shape).astype(np.float32)
                              for x in leaves])


def test_new_adapter_changes_nothing(setting):
  apply, params = setting
  adapter = lora.init(jax.random.key(0), params, 4, ALL)
  # Not bit for bit: the compiler fuses the two programs differently.
  np.testing.assert_allclose(apply({"params": params, "lora": adapter}),
                             apply({"params": params}), atol=1e-5, rtol=0)


def test_merged_equals_adapter(setting):
  apply, params = setting
  adapter = moved(lora.init(jax.random.key(0), params, 4, ALL))
  with_adapter = apply({"params": params, "lora": adapter})
  merged = apply({"params": lora.merge(params, adapter)})
  assert np.abs(with_adapter - apply({"params": params})).max() > 0.1
  np.testing.assert_allclose(with_adapter, merged, atol=1e-5, rtol=1e-5)


def test_distance_is_that_of_the_merged_kernels(setting):
  _, params = setting
  start = moved(lora.init(jax.random.key(0), params, 2, {**ATTENTION, "conv": ALL["conv"]}), 0.2)
  end = moved(start)
  ends = [traverse_util.flatten_dict(lora.merge(params, tree)) for tree in (start, end)]
  apart = sum(np.square(np.float64(ends[1][name]) - ends[0][name]).sum() for name in ends[0])
  assert lora.distance(end, start) == pytest.approx(np.sqrt(apart), rel=1e-4) and apart > 0.01
  assert lora.distance(start, start) < 1e-6


def test_gradient_reaches_every_factor(setting):
  apply, params = setting
  adapter = moved(lora.init(jax.random.key(0), params, 2, ATTENTION))
  loss = lambda adapter: jnp.square(apply({"params": params, "lora": adapter})).mean()
  grad = jax.jit(jax.grad(loss))
  grads = grad(adapter)
  assert jax.tree.structure(grads) == jax.tree.structure(adapter)
  for path, g in traverse_util.flatten_dict(grads, sep="/").items():
    assert np.abs(g).max() > 0, path
  # At the start only b moves, since b = 0 shields a.
  start = grad(lora.init(jax.random.key(0), params, 2, ATTENTION))
  for path, g in traverse_util.flatten_dict(start, sep="/").items():
    assert (np.abs(g).max() > 0) == path.endswith("/b"), path


def test_shapes_start_and_targets(setting):
  _, params = setting
  adapter = lora.init(jax.random.key(0), params, 8, ATTENTION)
  flat = traverse_util.flatten_dict(adapter, sep="/")
  kernels = traverse_util.flatten_dict(params, sep="/")
  # Down, mid and two up transformers, two attentions each, four kernels each.
  assert len(flat) == 2 * 4 * 2 * 4
  for path, x in flat.items():
    kernel = kernels[path.rsplit("/", 1)[0] + "/kernel"]
    assert x.shape == ((kernel.shape[0], 8) if path.endswith("/a") else (8, kernel.shape[1]))
  a = np.concatenate([x.ravel() for path, x in flat.items() if path.endswith("/a")])
  assert abs(a.std() * 8 - 1) < 0.03
  convs = traverse_util.flatten_dict(
      lora.init(jax.random.key(0), params, 8, {"conv": ALL["conv"]}), sep="/")
  assert convs["down_blocks_0/resnets_0/conv1/a"].shape == (3, 3, 32, 8)


def test_targets_of_a_transformer():
  """Image and text, both attentions; the last block has no output of the text."""
  config = dict(sample_size=2, patch_size=1, in_channels=4, out_channels=4, num_layers=2,
                attention_head_dim=8, num_attention_heads=1, joint_attention_dim=8,
                caption_projection_dim=8, pooled_projection_dim=8, dual_attention_layers=[0])
  model = SD3Transformer2DModel.from_config(config)
  params = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]

  def layers(target):
    targets = {target: StableDiffusion3Pipeline.lora_targets[target]}
    tree = traverse_util.flatten_dict(lora.init(jax.random.key(0), params, 2, targets), sep="/")
    return {path.rpartition("/")[0] for path in tree}
  attention, ff = layers("attention"), layers("ff")
  own = {"to_q", "to_k", "to_v", "to_out_0"}
  both = {*own, "add_q_proj", "add_k_proj", "add_v_proj"}
  block = "transformer_blocks_{}/{}/{}".format
  assert attention == {block(0, "attn", name) for name in {*both, "to_add_out"}} | {
      block(0, "attn2", name) for name in own} | {block(1, "attn", name) for name in both}
  assert ff == {block(i, kind, name) for i, kind in ((0, "ff"), (0, "ff_context"), (1, "ff"))
                for name in ("net_0/proj", "net_2")}


def test_bad_arguments_are_errors(setting):
  _, params = setting
  with pytest.raises(UserError, match="model.lora_targets: 'attention' matches no layer"):
    lora.init(jax.random.key(0), {"text_model": {}}, 4, ATTENTION)
  with pytest.raises(ValueError, match="not a layer"):
    lora.merge(params, {"nowhere": {"a": np.zeros((2, 1)), "b": np.zeros((1, 2))}})
