"""Rollouts: bounds, noise that belongs to samples, gradients, log-densities, chain moments."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.sampling import (
  Conditioning,
  differentiable_rollout,
  guided_output,
  initial_noise,
  rollout,
  step_noise,
)
from jaxalign.testing import analytic

STEPS, ROWS = 8, 4
MIXTURE = analytic.Mixture(
  np.asarray([0.6, 0.4]), np.asarray([[-1.0, 0.0], [1.0, 0.5]]), np.asarray([0.2, 0.3])
)
MODELS = analytic.make_models(MIXTURE, analytic.linear_reward([1.0, 0.0]), steps=STEPS)
OUTPUT = guided_output(MODELS.denoise, 1.0)
REFERENCE = MODELS.combine(None, MODELS.frozen["base"])
NOTHING = Conditioning({}, {})
KEY = jax.random.key(11)


def policy(bias=0.1, slope=0.05):
  """A policy that differs from the reference at every step."""
  params = MODELS.init_policy(None, None)
  levels = jnp.linspace(0.5, 1.5, STEPS + 1)[:, None]
  return {"bias": params["bias"] + bias * levels, "slope": params["slope"] + slope * levels}


def run(ids=None, variables=REFERENCE, **options):
  ids = jnp.arange(ROWS) if ids is None else jnp.asarray(ids)
  return rollout(OUTPUT, variables, MODELS.sampler, NOTHING, KEY, ids, (2,), **options)


def test_shapes_and_contents():
  whole = run()
  chex.assert_shape(whole.latents, (STEPS + 1, ROWS, 2))
  chex.assert_shape((whole.noise, whole.out), (STEPS, ROWS, 2))
  chex.assert_shape(whole.log_prob, (STEPS, ROWS))
  chex.assert_tree_all_finite(whole._replace(sample_ids=None, timesteps=None))
  np.testing.assert_array_equal(whole.timesteps, MODELS.sampler.timesteps)
  np.testing.assert_array_equal(whole.final, whole.latents[-1])
  np.testing.assert_array_equal(whole.latents[0], initial_noise(KEY, jnp.arange(ROWS), (2,)))
  for k in range(STEPS):
    s = MODELS.sampler
    np.testing.assert_array_equal(whole.noise[k], step_noise(KEY, jnp.arange(ROWS), (2,), k))
    np.testing.assert_allclose(
      whole.latents[k + 1],
      s.x_coef[k] * whole.latents[k] - s.out_coef[k] * whole.out[k] + s.std[k] * whole.noise[k],
      atol=2e-6,
    )
    np.testing.assert_allclose(
      whole.out[k], OUTPUT(REFERENCE, whole.latents[k], int(s.timesteps[k]), NOTHING), atol=1e-6
    )


def test_one_program_serves_every_interval_bit_for_bit():
  @jax.jit
  @chex.assert_max_traces(n=1)
  def part(x_init, start, stop):
    return run(x_init=x_init, start=start, stop=stop)

  whole = part(run().latents[0], 0, STEPS)
  for cut in (0, 1, 5, STEPS):
    prefix = part(whole.latents[0], 0, cut)
    suffix = part(prefix.latents[cut], cut, STEPS)
    np.testing.assert_array_equal(prefix.latents[: cut + 1], whole.latents[: cut + 1])
    np.testing.assert_array_equal(suffix.latents[cut:], whole.latents[cut:])
    assert np.all(np.asarray(prefix.latents[cut + 1 :]) == 0)
    assert np.all(np.asarray(suffix.latents[:cut]) == np.asarray(whole.latents[cut])[None])
    for name in ("noise", "out", "log_prob"):
      a, b, c = (np.asarray(getattr(t, name)) for t in (prefix, suffix, whole))
      np.testing.assert_array_equal(np.concatenate([a[:cut], b[cut:]]), c)


def test_traced_bounds_equal_static_ones():
  traced = jax.jit(lambda a, b: run(start=a, stop=b))(0, STEPS)
  static = jax.jit(lambda: run(start=0, stop=STEPS))()
  chex.assert_trees_all_close(traced, static, atol=1e-5)


def test_noise_does_not_depend_on_batch_or_order():
  whole = run([0, 1, 2, 3])
  other = run([3, 77, 1])
  for mine, theirs in ((0, 3), (2, 1)):
    np.testing.assert_array_equal(other.latents[0, mine], whole.latents[0, theirs])
    np.testing.assert_array_equal(other.noise[:, mine], whole.noise[:, theirs])
    np.testing.assert_allclose(other.latents[:, mine], whole.latents[:, theirs], atol=1e-5)


def test_given_noise_is_used():
  whole = run()
  again = run(noise=whole.noise, x_init=whole.latents[0])
  chex.assert_trees_all_close(again, whole, atol=1e-5)
  quiet = run(noise=jnp.zeros_like(whole.noise), x_init=whole.latents[0])
  assert np.abs(np.asarray(quiet.final - whole.final)).max() > 0.1


def test_log_prob_is_that_of_the_sampler():
  """Tolerance: (x' - mu) / s rounds at 6e-8 / s = 3e-6 relative to noise of size one."""
  variables = MODELS.combine(policy(), MODELS.frozen["base"])
  whole = run(variables=variables)
  for k in range(STEPS):
    mean = MODELS.sampler.mean(k, whole.latents[k], whole.out[k])
    np.testing.assert_allclose(
      whole.log_prob[k], MODELS.sampler.log_prob(k, whole.latents[k + 1], mean), atol=1e-4
    )


def test_deterministic_sampler_ignores_noise_and_has_log_prob_zero():
  models = analytic.make_models(MIXTURE, analytic.linear_reward([1.0, 0.0]), steps=STEPS, eta=0.0)
  go = lambda noise: rollout(
    OUTPUT, REFERENCE, models.sampler, NOTHING, KEY, jnp.arange(ROWS), (2,), noise=noise
  )
  a, b = go(jnp.zeros((STEPS, ROWS, 2))), go(jnp.ones((STEPS, ROWS, 2)))
  np.testing.assert_array_equal(a.final, b.final)
  assert np.all(np.asarray(a.log_prob) == 0)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_differentiable_rollout_equals_rollout(remat):
  whole = run()
  final, after = differentiable_rollout(
    OUTPUT, REFERENCE, MODELS.sampler, NOTHING, whole.latents[0], whole.noise, remat=remat
  )
  np.testing.assert_allclose(after, whole.latents[1:], atol=1e-5)
  np.testing.assert_array_equal(final, after[-1])
  part, _ = differentiable_rollout(
    OUTPUT,
    REFERENCE,
    MODELS.sampler,
    NOTHING,
    whole.latents[2],
    whole.noise[2:5],
    start=2,
    stop=5,
    remat=remat,
  )
  np.testing.assert_allclose(part, whole.latents[5], atol=1e-5)


def objective(inputs, remat):
  variables = MODELS.combine(inputs["policy"], MODELS.frozen["base"])
  final, _ = differentiable_rollout(
    OUTPUT, variables, MODELS.sampler, NOTHING, inputs["x"], inputs["noise"], remat=remat
  )
  return jnp.sin(final).sum()


def test_remat_policies_agree():
  whole = run()
  inputs = {"policy": policy(), "x": whole.latents[0], "noise": whole.noise}
  gradients = [jax.grad(objective)(inputs, remat) for remat in ("none", "dots", "full")]
  chex.assert_trees_all_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ["policy", "x", "noise"])
def test_gradient_matches_finite_differences(which):
  """Central differences of step 1e-2 along random directions: truncation ~1e-4, rounding ~1e-5."""
  whole = run()
  inputs = {"policy": policy(), "x": whole.latents[0], "noise": whole.noise}
  gradient = jax.grad(objective)(inputs, "full")[which]
  value = jax.jit(lambda tree: objective(dict(inputs, **{which: tree}), "none"))
  for seed in range(3):
    leaves, treedef = jax.tree.flatten(inputs[which])
    direction = treedef.unflatten(
      [
        jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), leaf.shape)
        / np.sqrt(leaf.size)
        for i, leaf in enumerate(leaves)
      ]
    )
    step = lambda h: jax.tree.map(lambda a, d: a + h * d, inputs[which], direction)
    numeric = float(value(step(1e-2)) - value(step(-1e-2))) / 2e-2
    exact = sum(
      float((a * b).sum()) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction))
    )
    assert exact == pytest.approx(numeric, rel=2e-3, abs=1e-3)


def test_moments_of_the_fifty_step_chain():
  """N(0.7, 0.5) under 50 steps ends at N(0.69767, 0.43281); 20000 samples, 4 standard errors."""
  models = analytic.make_models(
    analytic.Mixture(np.ones(1), np.asarray([[0.7]]), np.asarray([0.5])),
    analytic.linear_reward([1.0]),
  )
  n = 20000
  x = jax.jit(
    lambda: (
      rollout(
        guided_output(models.denoise, 1.0),
        models.combine(None, models.frozen["base"]),
        models.sampler,
        NOTHING,
        KEY,
        jnp.arange(n),
        (1,),
      ).final
    )
  )()
  x = np.asarray(x, np.float64)
  assert abs(x.mean() - 0.69767) < 4 * np.sqrt(0.43281 / n)
  assert abs(x.var() - 0.43281) < 4 * 0.43281 * np.sqrt(2 / n)
