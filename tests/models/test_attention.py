"""The fused attention of TPUs: its numbers by interpretation, its memory by compiling for one."""
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxalign import sharding
from jaxalign.models import attention
from jaxalign.train import plan

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
    (1000, 1000, None), (1025, 1025, None), (4096, 77, None)])
def test_which_lengths_the_kernel_takes(queries, keys, block):
  assert attention.flash_block(queries, keys) == block


def test_operations_of_the_kernel_are_those_of_attention():
  q, k, v = (jax.ShapeDtypeStruct((2, 1024, 4, 64), jnp.bfloat16),) * 3
  jaxpr = jax.make_jaxpr(attention.tpu_flash)(q, k, v).jaxpr
  assert plan.operations(jaxpr) == 4 * 2 * 4 * 1024 ** 2 * 64


def test_the_platform_is_that_of_the_mesh():
  cpu = sharding.make_mesh(1, 1, 1)
  assert attention.platform() == jax.default_backend()
  assert sharding.on_mesh(attention.platform, cpu)() == "cpu"


@needs_libtpu
@pytest.mark.parametrize("mesh, batch", [((4, 1, 1), 4), ((2, 1, 2), 4), ((4, 1, 1), 6)])
def test_no_matrix_of_scores_on_a_slice(mesh, batch):
  """Forward and backward for v5e:2x2, 4096 tokens: less than one f32 matrix of scores, no
  collectives but where the batch does not divide."""
  _, devices = plan.find_chips("v5e:2x2")
  mesh = sharding.make_mesh(*mesh, devices)
  heads, tokens, size = 4, 4096, 40
  spec = sharding.batch_sharding(mesh) if batch == 4 else sharding.replicated(mesh)
  shape = jax.ShapeDtypeStruct((batch, tokens, heads * size), jnp.bfloat16, sharding=spec)
  assert sharding.on_mesh(attention.platform, mesh)() == "tpu"

  def loss(q, k, v):
    out = sharding.on_mesh(attention.attend, mesh)(q, k, v, heads)
    return jnp.square(out.astype(jnp.float32)).sum()
  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).trace(shape, shape, shape).lower().compile()
  rows = -(-batch // 4) if batch == 4 else batch
  assert compiled.memory_analysis().temp_size_in_bytes < rows * heads * tokens ** 2 * 4
  if mesh.shape["tensor"] == 1 and batch == 4:
    assert plan.collective_bytes(compiled.as_text()) == 0
