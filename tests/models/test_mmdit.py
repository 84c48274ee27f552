"""Transformer of Stable Diffusion 3: goldens, parity with diffusers, names, sizes, remat."""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import waves
from jaxalign.convert import names
from jaxalign.errors import UserError
from jaxalign.models import lora, mmdit
from jaxalign.models.architectures import ARCHITECTURES
from jaxalign.models.mmdit import SD3Transformer2DModel
from jaxalign.models.pipeline import random_params
from jaxalign.models.stable_diffusion_3 import StableDiffusion3Pipeline

pytestmark = pytest.mark.usefixtures("compile_quickly")

SMALL = dict(sample_size=6, patch_size=2, in_channels=4, out_channels=4, num_layers=3,
             attention_head_dim=8, num_attention_heads=3, joint_attention_dim=20,
             caption_projection_dim=24, pooled_projection_dim=14, pos_embed_max_size=5)
KINDS = {
    "plain": SMALL,
    "qk_norm": dict(SMALL, qk_norm="rms_norm"),
    "dual": dict(SMALL, qk_norm="rms_norm", dual_attention_layers=[0, 1]),
    "patch1": dict(SMALL, sample_size=4, patch_size=1, pos_embed_max_size=8, qk_norm="rms_norm"),
}
FULLS = {name: ARCHITECTURES[name]["transformer"]
         for name in ("sd3_medium", "sd35_medium", "sd35_large")}
TABLE = "pos_embed.pos_embed"


@functools.cache
def shapes_of(model):
  return jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]


def new(kind, **kwargs):
  """Model and random variables, the position table too, for latents of 6x8."""
  model = SD3Transformer2DModel.from_config(KINDS[kind], **kwargs)
  c = model.config
  table = np.random.default_rng(3).standard_normal((1, c.pos_embed_max_size ** 2, c.width))
  return model, table, {"params": random_params(shapes_of(model), 1),
                        "constants": mmdit.constants(table, c, 6, 8)}


def inputs(batch=2, seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  return (normal(batch, 6, 8, 4), np.array([1000.0, 257.5], np.float32)[:batch],
          normal(batch, 5, 20), normal(batch, 14))


def adapter(params, seed=0):
  """An adapter on every linear layer and the patches, both factors random."""
  rng = np.random.default_rng(seed)
  flat = traverse_util.flatten_dict(params, sep="/")
  tree = {}
  for path, x in flat.items():
    if path.endswith("/kernel"):
      path = path.removesuffix("/kernel")
      tree[f"{path}/a"] = rng.standard_normal((*x.shape[:-1], 2)).astype(np.float32) / 4
      tree[f"{path}/b"] = rng.standard_normal((2, x.shape[-1])).astype(np.float32) / 4
  return traverse_util.unflatten_dict(tree, sep="/")


def torch_model(kind, params, table):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  model = diffusers.SD3Transformer2DModel(**KINDS[kind]).eval()
  flat = traverse_util.flatten_dict(params, sep="/")
  state = {names.torch_name(p): torch.from_numpy(names.to_torch(p, x)) for p, x in flat.items()}
  model.load_state_dict({**state, TABLE: torch.tensor(table, dtype=torch.float32)}, strict=True)
  return model


def run_torch(model, x, t, states, pooled):
  import torch
  out = model(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(states),
              torch.from_numpy(pooled), torch.from_numpy(t)).sample
  return out.permute(0, 2, 3, 1)


def assert_close(got, want, tolerance):
  """To `tolerance` of the largest value."""
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def run_golden(key, zeros=0, key_bias=None):
  entry = waves.goldens()[key]
  model = SD3Transformer2DModel.from_config(entry["config"])
  c = model.config
  (want,) = waves.golden(key)
  table = (mmdit.position_table(c) if entry["table"] == "sincos" else
           waves.weight(TABLE, (1, c.pos_embed_max_size ** 2, c.width)))
  states = np.pad(waves.inputs("states", 2, 5, 20), ((0, 0), (0, zeros), (0, 0)))
  variables = {"params": waves.parameters(shapes_of(model)),
               "constants": mmdit.constants(table, c, *want.shape[1:3])}
  x = waves.inputs("latents", 2, 4, *want.shape[1:3])
  t = np.array(entry["times"], np.float32)
  pooled = waves.inputs("pooled", 2, 14)
  return jax.jit(model.apply)(variables, x, t, states, pooled, key_bias), want


@pytest.mark.parametrize("kind", ["plain", "qk_norm", "dual", "patch1"])
def test_golden(kind):
  got, want = run_golden(f"transformer_{kind}")
  assert got.dtype == jnp.float32
  assert_close(got, want, 1e-5)


def test_repeated_tokens_are_one_with_a_bias():
  """The golden has seven zero tokens: as they are, as one of weight seven, beside one of none."""
  got, want = run_golden("transformer_zeros", zeros=7)
  assert_close(got, want, 1e-5)
  weights = jnp.log(jnp.array([[1.0] * 5 + [7.0]] * 2))
  assert_close(run_golden("transformer_zeros", 1, weights)[0], want, 1e-5)
  weights = jnp.log(jnp.array([[1.0] * 5 + [7.0, 0.0]] * 2))
  assert_close(run_golden("transformer_zeros", 2, weights)[0], want, 1e-5)
  none = jnp.log(jnp.array([[1.0] * 5 + [0.0]] * 2))
  assert_close(run_golden("transformer_plain", 1, none)[0], run_golden("transformer_plain")[1],
               1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_pytorch_and_its_gradient_to_an_adapter(kind):
  torch = pytest.importorskip("torch")
  model, table, variables = new(kind)
  params, args = variables["params"], inputs()
  theirs = torch_model(kind, params, table)
  with torch.no_grad():
    assert_close(jax.jit(model.apply)(variables, *args), run_torch(theirs, *args).numpy(), 1e-5)

  factors = traverse_util.flatten_dict(adapter(params), sep="/")
  loss = lambda tree: jnp.square(model.apply(
      {**variables, "lora": traverse_util.unflatten_dict(tree, sep="/")}, *args)).sum()
  value, gradient = jax.jit(jax.value_and_grad(loss))(factors)
  leaves = {path: torch.tensor(x, requires_grad=True) for path, x in factors.items()}
  state = dict(theirs.named_parameters())
  for path in {name.rpartition("/")[0] for name in leaves}:
    product = leaves[f"{path}/a"] @ leaves[f"{path}/b"]
    product = product.T if product.ndim == 2 else product.permute(3, 2, 0, 1)
    name = names.torch_name(f"{path}/kernel")
    state[name] = state[name] + product
  call = functools.partial(torch.func.functional_call, theirs, state)
  x, t, states, pooled = map(torch.from_numpy, args)
  out = call((x.permute(0, 3, 1, 2), states, pooled, t)).sample
  assert_close(value, out.square().sum().item(), 1e-5)
  slopes = torch.autograd.grad(out.square().sum(), list(leaves.values()), allow_unused=True)
  unread = 0
  for path, slope in zip(leaves, slopes, strict=True):
    if slope is None:
      unread += 1
      assert not np.any(gradient[path])
    else:
      np.testing.assert_allclose(gradient[path], slope, rtol=0, err_msg=path,
                                 atol=1e-4 * np.abs(slope.numpy()).max())
  assert unread <= 2                                       # the last block's queries of the text


@pytest.mark.parametrize("kind", FULLS)
def test_names_and_shapes_of_full_sizes(kind):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  with torch.device("meta"):
    theirs = diffusers.SD3Transformer2DModel(**FULLS[kind])
  flat = traverse_util.flatten_dict(
      shapes_of(SD3Transformer2DModel.from_config(FULLS[kind])), sep="/")
  ours = {names.torch_name(p): names.torch_shape(p, x.shape) for p, x in flat.items()}
  assert ours == {name: tuple(x.shape) for name, x in theirs.named_parameters()}
  assert {name for name in theirs.state_dict()} - set(ours) == {TABLE}


@pytest.mark.parametrize("kind, count, tensors", [("sd3_medium", 2_028_328_000, 683),
                                                  ("sd35_medium", 2_243_171_520, 909),
                                                  ("sd35_large", 8_056_627_520, 1227)])
def test_full_size(kind, count, tensors):
  leaves = jax.tree.leaves(shapes_of(SD3Transformer2DModel.from_config(FULLS[kind])))
  assert sum(leaf.size for leaf in leaves) == count
  assert len(leaves) + 1 == tensors                        # and the position table


def test_position_table():
  rows = waves.goldens()["sincos"]["dim 8, size 5, base 3: rows 0, 1, 5, 24"]
  config = mmdit.SD3Config(sample_size=6, patch_size=2, pos_embed_max_size=5, attention_head_dim=8,
                           num_attention_heads=1, caption_projection_dim=8)
  table = mmdit.position_table(config)
  assert table.shape == (1, 25, 8) and table.dtype == np.float32
  np.testing.assert_allclose(table[0, [0, 1, 5, 24]].reshape(-1), rows, atol=1e-7)
  crop = mmdit.constants(table, config, 4, 8)["pos_embed"]["pos_embed"]
  np.testing.assert_array_equal(crop, table.reshape(5, 5, 8)[1:3, 0:4])
  np.testing.assert_array_equal(crop, mmdit.positions(config, 2, 4))
  with pytest.raises(UserError, match="2x6 patches.*5x5.*pos_embed_max_size"):
    mmdit.constants(table, config, 4, 12)
  with pytest.raises(UserError, match=r"pos_embed.pos_embed has shape \[1, 24, 8\]"):
    mmdit.constants(table[:, 1:], config, 4, 8)


def test_positions_are_an_input_and_no_parameter():
  model, _, variables = new("dual")
  x, t, states, pooled = inputs()
  jaxpr = jax.make_jaxpr(model.apply)(variables, x, t, states, pooled)
  assert sum(np.size(c) for c in jaxpr.consts) == 0
  assert not [p for p in traverse_util.flatten_dict(variables["params"]) if p[-1] == "pos_embed"]
  with pytest.raises(ValueError, match=r"positions \(3, 4, 24\).*\(2, 4, 24\) tokens"):
    model.apply(variables, x[:, :4], t, states, pooled)
  with pytest.raises(ValueError, match="5x8"):
    model.apply(variables, x[:, :5], t, states, pooled)
  with pytest.raises(Exception, match="constants"):
    model.apply({"params": variables["params"]}, x, t, states, pooled)
  # New networks have the table of the formula.
  own = jax.jit(model.init)(jax.random.key(0), x, t, states, pooled)["constants"]
  np.testing.assert_array_equal(own["pos_embed"]["pos_embed"],
                                mmdit.positions(model.config, 3, 4))


def test_a_scalar_time_is_one_for_all_and_times_are_not_rounded():
  model, _, variables = new("plain")
  x, _, states, pooled = inputs()
  apply = jax.jit(model.apply)
  one = apply(variables, x, jnp.float32(8.9285717), states, pooled)
  np.testing.assert_array_equal(one, apply(variables, x, jnp.full(2, 8.9285717), states, pooled))
  assert np.abs(one - apply(variables, x, jnp.float32(9.0), states, pooled)).max() > 1e-4


def test_new_networks_start_at_the_identity():
  model, _, variables = new("dual")
  zero, flat = StableDiffusion3Pipeline.starts_at_zero, traverse_util.flatten_dict(
      variables["params"], sep="/")
  params = traverse_util.unflatten_dict({
      path: np.zeros_like(leaf) if re.search(zero, path) else leaf for path, leaf in flat.items()},
      sep="/")
  assert jax.tree.structure(params) == jax.tree.structure(variables["params"])
  apply = jax.jit(model.apply)
  assert not np.any(apply({**variables, "params": params}, *inputs()))
  # With an output layer: what the blocks add is gated by zero, whatever is inside.
  params["proj_out"] = variables["params"]["proj_out"]
  out = apply({**variables, "params": params}, *inputs())
  params["transformer_blocks_1"]["ff"] = jax.tree.map(
      lambda x: 2 * x, params["transformer_blocks_1"]["ff"])
  np.testing.assert_array_equal(apply({**variables, "params": params}, *inputs()), out)


@pytest.mark.slow
def test_bf16_is_close_finite_and_returns_f32():
  model, _, variables = new("dual")
  half, _, _ = new("dual", dtype="bfloat16")
  exact, out = (jax.jit(m.apply)(variables, *inputs()) for m in (model, half))
  assert out.dtype == jnp.float32 and np.isfinite(out).all()
  assert_close(out, exact, 0.05)
  loss = lambda p: jnp.square(half.apply({**variables, "params": p}, *inputs())).sum()
  gradient = jax.jit(jax.grad(loss))(variables["params"])
  assert all(np.isfinite(g).all() and g.dtype == jnp.float32 for g in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_remat_changes_neither_output_nor_tree_nor_gradient():
  model, _, variables = new("dual")
  rematted, _, _ = new("dual", remat="block")
  assert jax.tree.structure(shapes_of(rematted)) == jax.tree.structure(shapes_of(model))
  factors = adapter(variables["params"])
  loss = lambda m: lambda f: jnp.square(m.apply({**variables, "lora": f}, *inputs())).sum()
  (value, gradient), (again, gradient_again) = (
      jax.jit(jax.value_and_grad(loss(m)))(factors) for m in (model, rematted))
  np.testing.assert_allclose(again, value, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(gradient_again), jax.tree.leaves(gradient), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max() + 1e-12)
  assert str(jax.make_jaxpr(jax.grad(loss(rematted)))(factors)).count("remat") >= 3


def test_an_adapter_equals_its_merge():
  model, _, variables = new("dual")
  factors = adapter(variables["params"])
  merged = {**variables, "params": lora.merge(variables["params"], factors)}
  apply = jax.jit(model.apply)
  assert_close(apply({**variables, "lora": factors}, *inputs()), apply(merged, *inputs()), 1e-5)


@pytest.mark.parametrize("key, value", [
    ("caption_projection_dim", 32), ("out_channels", 8), ("pos_embed_max_size", None),
    ("pos_embed_max_size", 0), ("pos_embed_max_size", 2), ("qk_norm", "layer_norm"),
    ("dual_attention_layers", [0, 3]), ("dual_attention_layers", [1, 1]),
    ("dual_attention_layers", None), ("patch_size", 4), ("sample_size", None), ("num_layers", 0),
    ("in_channels", True), ("attention_head_dim", 7), ("joint_attention_dim", -1),
    ("_class_name", "FluxTransformer2DModel"), ("guidance_embeds", True)])
def test_unsupported_config_names_key(key, value):
  with pytest.raises(UserError, match=f"SD3Transformer2DModel config: .*{key}"):
    SD3Transformer2DModel.from_config({**SMALL, key: value})


def test_config_defaults():
  config = SD3Transformer2DModel.from_config(
      {**SMALL, "out_channels": None, "_diffusers_version": "0.39", "_name_or_path": "x"}).config
  assert config.out_channels == 4 and config.dual_attention_layers == () and config.width == 24
  assert config.qk_norm is None
