"""Replay of stored trajectories: its gradient is that of sampling again, and costs no more memory.
"""
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.sampling import (
    Conditioning,
    differentiable_rollout,
    guided_output,
    replay,
    rollout,
    transition,
)
from jaxalign.testing import analytic

pytestmark = pytest.mark.usefixtures("compile_quickly")

STEPS, ROWS = 8, 4
MIXTURE = analytic.Mixture(
    np.asarray([0.6, 0.4]), np.asarray([[-1.0, 0.0], [1.0, 0.5]]), np.asarray([0.2, 0.3]))
MODELS = analytic.make_models(MIXTURE, analytic.linear_reward([1.0, 0.0]), steps=STEPS)
SAMPLER, BASE = MODELS.sampler, MODELS.frozen["base"]
OUTPUT = guided_output(MODELS.denoise, 1.0)
LEVELS = jnp.linspace(0.5, 1.5, STEPS + 1)[:, None] * jnp.ones((1, 2))
POLICY = {"bias": 0.1 * LEVELS, "slope": 0.05 * LEVELS}
NOTHING = Conditioning({}, {})
WHOLE = rollout(OUTPUT, MODELS.combine(POLICY, BASE), SAMPLER, NOTHING, jax.random.key(11),
                jnp.arange(ROWS), (2,))


def policy_output(policy, x, t, base):
  return OUTPUT(MODELS.combine(policy, base), x, t, NOTHING)


def replayed(policy, latents, active):
  return replay(policy_output, SAMPLER, policy, BASE, latents, active)


def sampled_again(policy, active):
  """A plain loop: outputs of the network are constants where they are not active."""
  x = WHOLE.latents[STEPS - len(active)]
  for k, on in zip(range(STEPS - len(active), STEPS), active):
    output_fn = lambda *args: OUTPUT(*args) if on else jax.lax.stop_gradient(OUTPUT(*args))
    x, _, _ = transition(output_fn, MODELS.combine(policy, BASE), SAMPLER, k, x, WHOLE.noise[k],
                         NOTHING)
  return x


def gradient(output):
  return jax.grad(lambda policy: jnp.sin(output(policy)).sum())(POLICY)


def test_value_is_what_was_sampled():
  out = replayed(POLICY, WHOLE.latents, jnp.ones(STEPS, bool))
  np.testing.assert_array_equal(out, WHOLE.final)


@pytest.mark.parametrize("last", [1, 3, STEPS])
def test_gradient_is_that_of_a_differentiated_rollout(last):
  start = STEPS - last
  plain = gradient(lambda policy: differentiable_rollout(
      OUTPUT, MODELS.combine(policy, BASE), SAMPLER, NOTHING, WHOLE.latents[start],
      WHOLE.noise[start:], start=start, remat="none")[0])
  found = gradient(lambda policy: replayed(policy, WHOLE.latents[start:], jnp.ones(last, bool)))
  chex.assert_trees_all_close(found, plain, rtol=1e-4, atol=1e-6)
  assert np.all(np.asarray(found["bias"][start:STEPS]) != 0)
  assert not np.any(np.asarray(found["bias"][:start]))


def test_gradient_of_any_set_of_steps_in_one_program():
  """The set is traced; the oracle stops gradients at the outputs that are not in it."""
  @jax.jit
  @chex.assert_max_traces(n=1)
  def found(active):
    return gradient(lambda policy: replayed(policy, WHOLE.latents, active))

  for seed in range(2):
    active = np.random.default_rng(seed).random(STEPS) < 0.5
    expected = jax.jit(lambda: gradient(lambda policy: sampled_again(policy, active)))()
    chex.assert_trees_all_close(found(jnp.asarray(active)), expected, rtol=1e-4, atol=1e-6)
  chex.assert_trees_all_equal(found(jnp.zeros(STEPS, bool)), jax.tree.map(jnp.zeros_like, POLICY))


def test_deterministic_sampler():
  models = analytic.make_models(
      MIXTURE, analytic.linear_reward([1.0, 0.0]), steps=STEPS, eta=0.0, final="clean")
  variables = lambda policy: models.combine(policy, BASE)
  whole = rollout(OUTPUT, variables(POLICY), models.sampler, NOTHING, jax.random.key(1),
                  jnp.arange(ROWS), (2,))
  plain = jax.jit(lambda: gradient(lambda policy: differentiable_rollout(
      OUTPUT, variables(policy), models.sampler, NOTHING, whole.latents[0], whole.noise)[0]))()
  found = jax.jit(lambda: gradient(lambda policy: replay(
      policy_output, models.sampler, policy, BASE, whole.latents, jnp.ones(STEPS, bool))))()
  chex.assert_trees_all_close(found, plain, rtol=1e-4, atol=1e-6)
