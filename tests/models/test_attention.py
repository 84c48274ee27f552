"""The fused attention of TPUs: its numbers by interpretation, its memory by compiling for one."""
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxalign.config import recipes
from jaxalign.devices import sharding
from jaxalign.models import attention
from jaxalign.train import plan
from jaxalign.train.experiment import build
from jaxalign.train.opening import open_pipeline
from jaxalign.train.pairs import image_encoder

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                  reason="compiling for TPUs needs libtpu")


def qkv(batch, tokens, heads, size, seed=0):
  return jax.random.normal(jax.random.key(seed), (3, batch, tokens, heads, size))


@pytest.mark.parametrize("size", [40, 64])
def test_flash_equals_plain_attention_and_its_gradient(size, monkeypatch):
  monkeypatch.setattr(attention, "LONG", 128)
  inputs = qkv(2, 256, 2, size)
  plain = lambda q, k, v: jax.nn.dot_product_attention(q, k, v)
  loss = lambda f: lambda x: jnp.square(f(*x)).sum()
  with pltpu.force_tpu_interpret_mode():
    value, gradient = jax.jit(jax.value_and_grad(loss(attention.tpu_flash)))(inputs)
  expected, slope = jax.jit(jax.value_and_grad(loss(plain)))(inputs)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(gradient, slope, atol=2e-4)


@pytest.mark.parametrize("queries, keys, block", [
    (4096, 4096, 512), (6144, 6144, 512), (3840, 3840, 256), (1152, 1152, 128),
    (1000, 1000, None), (1025, 1025, 128), (4096, 77, None), (4429, 4429, 512), (4096, 4429, 512),
    (1357, 1357, 128), (1024, 1250, 256)])
def test_which_blocks_the_kernel_takes(queries, keys, block):
  assert attention.flash_block(queries, keys) == block


@pytest.mark.parametrize("keys, biased", [(7, False), (4, True)])
def test_heads_first_is_attention_and_its_gradient(keys, biased):
  q, k, v = qkv(2, 7, 3, 8)
  inputs = q, k[:, :keys], v[:, :keys]
  bias = jnp.log(jnp.asarray([[1.0, 3, 0, 256]] * 2))[:, None, None] if biased else None
  loss = lambda f: lambda inputs: (f(*inputs, bias) * jnp.cos(q)).sum()
  of = lambda f: jax.jit(jax.value_and_grad(loss(f)))(inputs)
  expected = of(lambda *args: jax.nn.dot_product_attention(*args, implementation="xla"))
  for got, want in zip(jax.tree.leaves(of(attention.heads_first)), jax.tree.leaves(expected)):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def weighted(q, k, v, counts):
  """Plain attention in float64 in which key m counts `counts [B, M]` times."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  scores = np.einsum("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5
  e = np.exp(scores - scores.max(-1, keepdims=True)) * np.asarray(counts)[:, None, None]
  return np.einsum("bhlm,bmhd->blhd", e / e.sum(-1, keepdims=True), v)


def test_a_bias_counts_keys():
  q, k, v = qkv(2, 9, 2, 8)
  counts = np.ones((2, 9))
  counts[0, 3], counts[1, 5], counts[1, 8] = 256, 24, 0
  flat = [x.reshape(2, 9, 16) for x in (q, k, v)]
  got = attention.attend(*flat, 2, jnp.log(jnp.asarray(counts)))
  np.testing.assert_allclose(got.reshape(2, 9, 2, 8), weighted(q, k, v, counts), atol=1e-6)
  gradient = jax.grad(lambda b: attention.attend(*flat, 2, b).sum())(jnp.zeros((2, 9)))
  assert not np.any(gradient)


@pytest.mark.parametrize("size, width", [(40, 48), (64, 72), (120, 128), (160, 256)])
def test_a_bias_as_features_is_exact_in_bf16(size, width):
  """What the fused kernels are given. The bias log 256 itself, in bf16, would be off by 1 %."""
  q, k, v = (x.astype(jnp.bfloat16) for x in qkv(2, 9, 2, size))
  counts = np.ones((2, 9))
  counts[0, 3], counts[1, 8] = 256, 0
  inside = jax.jit(attention.with_bias)(q, k, v, jnp.log(jnp.asarray(counts, jnp.float32)))
  assert all(x.shape == (2, 9, 2, width) and x.dtype == jnp.bfloat16 for x in inside)
  q2, k2, v2 = (x.astype(jnp.float32) for x in inside)
  got = jax.nn.dot_product_attention(q2, k2, v2, scale=size ** -0.5)
  assert not np.any(got[..., size:])
  np.testing.assert_allclose(got[..., :size], weighted(q, k, v, counts), atol=1e-5)


def test_flash_pads_lengths_and_takes_a_bias(monkeypatch):
  """150 queries and 200 keys in blocks of 128, each key with its own weight, one without any."""
  monkeypatch.setattr(attention, "LONG", 128)
  q, k, v = qkv(2, 200, 2, 24)
  q = q[:, :150]
  bias = jax.random.normal(jax.random.key(1), (2, 200)).at[1, 7].set(-jnp.inf)
  plain = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, bias[:, None, None])
  loss = lambda f: lambda *x: jnp.square(f(*x)).sum()
  with pltpu.force_tpu_interpret_mode():
    out = attention.tpu_flash(q, k, v)
    value, gradient = jax.jit(jax.value_and_grad(loss(
        lambda *x: attention.tpu_flash(*x, bias)), (0, 1, 2)))(q, k, v)
  np.testing.assert_allclose(out, jax.nn.dot_product_attention(q, k, v), atol=1e-5)
  expected, slope = jax.jit(jax.value_and_grad(loss(plain), (0, 1, 2)))(q, k, v)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for got, want in zip(gradient, slope, strict=True):
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_operations_of_the_kernel_are_those_of_attention():
  q, k, v = (jax.ShapeDtypeStruct((2, 1024, 4, 64), jnp.bfloat16),) * 3
  jaxpr = jax.make_jaxpr(attention.tpu_flash)(q, k, v).jaxpr
  assert plan.operations(jaxpr) == 4 * 2 * 4 * 1024 ** 2 * 64


def test_the_platform_is_that_of_the_mesh(monkeypatch):
  cpu = sharding.make_mesh(1, 1, 1, jax.devices("cpu"))
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert attention.platform() == "tpu"
  assert sharding.on_mesh(attention.platform, cpu)() == "cpu"


def test_several_tpus_without_a_mesh_take_the_plain_form(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  x = jax.ShapeDtypeStruct((2, 1024, 64), jnp.float32)
  kernel = lambda: "pallas_call" in str(jax.make_jaxpr(
      lambda q: attention.attend(q, q, q, 1))(x))
  assert jax.device_count() > 1 and not kernel()
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  assert kernel()


@needs_libtpu
def test_pairs_are_encoded_and_flow_nets_run_on_a_slice():
  """Every network of a run that has long attention lowers for several chips."""
  _, devices = plan.find_chips("v5e:2x2")
  pipeline = open_pipeline("jaxalign:sd15", "bfloat16", "block", shapes_only=True)
  cfg = recipes.default("mapo")
  cfg.model.path, cfg.data.pairs, cfg.eval.batch = "jaxalign:sd15", "jaxalign:emoji", 4
  exp = build(recipes.parse(cfg), devices, pipeline)
  images = exp.put_batch(np.zeros((4, 512, 512, 3), np.float32))
  vae = exp.put(pipeline.params["vae"], sharding.replicated(exp.mesh))
  assert "tpu_custom_call" in image_encoder(exp).trace(vae, images).lower().as_text()

  flow, (x, t, text) = exp.models.flow, jax.eval_shape(
      lambda: (jnp.zeros((4, 64, 64, 4)), jnp.zeros(4, jnp.int32), jnp.zeros((4, 77, 768))))
  params = exp.put(jax.eval_shape(flow.init, jax.random.key(0)), sharding.replicated(exp.mesh))
  x, t, text = (exp.put_batch(a) for a in (x, t, text))
  lowered = jax.jit(flow.apply).trace(params, x, t, {"text": text}).lower()
  assert "tpu_custom_call" in lowered.as_text()


@needs_libtpu
@pytest.mark.parametrize("mesh, batch, tokens, size", [
    ((4, 1, 1), 4, 4096, 40), ((2, 1, 2), 4, 4096, 40), ((4, 1, 1), 6, 4096, 40),
    ((2, 1, 2), 4, 4174, 64)])
def test_no_matrix_of_scores_on_a_slice(mesh, batch, tokens, size):
  """Forward and backward for v5e:2x2: less than one f32 matrix of scores, no collectives but where
  the batch does not divide. 4174 tokens are image and text of Stable Diffusion 3 with a bias."""
  _, devices = plan.find_chips("v5e:2x2")
  mesh = sharding.make_mesh(*mesh, devices)
  heads = 4
  spec = sharding.batch_sharding(mesh) if batch == 4 else sharding.replicated(mesh)
  shape = jax.ShapeDtypeStruct((batch, tokens, heads * size), jnp.bfloat16, sharding=spec)
  assert sharding.on_mesh(attention.platform, mesh)() == "tpu"

  bias = jax.ShapeDtypeStruct((batch, tokens), jnp.float32, sharding=spec)

  def loss(q, k, v, bias):
    out = sharding.on_mesh(attention.attend, mesh)(q, k, v, heads, None if size == 40 else bias)
    return jnp.square(out.astype(jnp.float32)).sum()
  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).trace(shape, shape, shape, bias).lower().compile()
  rows = -(-batch // 4) if batch == 4 else batch
  assert compiled.memory_analysis().temp_size_in_bytes < rows * heads * tokens ** 2 * 4
  if mesh.shape["tensor"] == 1 and batch == 4:
    assert plan.collective_bytes(compiled.as_text()) == 0
