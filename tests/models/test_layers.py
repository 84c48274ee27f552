"""Layers that are written otherwise than Flax's, for speed: the same values and gradients."""
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import layers

normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)


def both(f, *args):
  """Value and gradients to all arguments, of a sum with uneven weights."""
  def total(*args):
    out = f(*args)
    return (out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)).sum(), out
  (_, value), gradients = jax.jit(
      jax.value_and_grad(total, tuple(range(len(args))), has_aux=True))(*args)
  return value, gradients


def same(a, b, tolerance=1e-5):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * float(jnp.abs(y).max()))


def test_gelu_is_exact():
  x = jnp.linspace(-12, 12, 4001)
  exact = both(lambda x: nn.gelu(x, approximate=False), x)
  same(both(layers.gelu, x), exact, 1e-6)
  erf = np.vectorize(math.erf)
  wide = np.asarray(x, np.float64)
  error = layers.gelu(x) - wide * (1 + erf(wide / 2 ** 0.5)) / 2
  assert np.all(np.abs(error) <= 2e-7 * np.abs(wide))          # erf to a rounding or two
  assert layers.gelu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("shape, groups", [((3, 4, 5, 64), 32), ((2, 9, 24), 8), ((2, 3, 3, 8), 8)])
def test_group_norm_is_flax(shape, groups):
  x, C = 3 * normal(0, *shape) + 7, shape[-1]            # a mean that one pass would suffer from
  params = {"scale": 1 + normal(1, C) / 4, "bias": normal(2, C)}
  ours = layers.group_norm(groups, 1e-5, jnp.float32, "")
  flax = nn.GroupNorm(groups, epsilon=1e-5, use_fast_variance=False)
  run = lambda module: lambda params, x: module.apply({"params": params}, x)
  same(both(run(ours), params, x), both(run(flax), params, x))
  shapes = lambda module: jax.tree.map(jnp.shape, module.init(jax.random.key(0), x))
  assert shapes(ours) == shapes(flax)
  half = ours.clone(dtype=jnp.bfloat16).apply({"params": params}, x.astype(jnp.bfloat16))
  assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("adapted", [False, True])
def test_parts_of_dense_are_its_output_split(adapted):
  x = normal(0, 3, 5, 8)
  whole, parts = layers.Dense(12), layers.Dense(12, parts=2)
  variables = whole.init(jax.random.key(0), x)
  variables["params"]["bias"] = normal(3, 12)
  assert jax.tree.map(jnp.shape, parts.init(jax.random.key(0), x)) == jax.tree.map(
      jnp.shape, variables)
  if adapted:
    variables["lora"] = {"a": normal(1, 8, 2), "b": normal(2, 2, 12)}
  join = lambda variables, x: jnp.concatenate(parts.apply(variables, x), -1)
  same(both(join, variables, x), both(whole.apply, variables, x))
