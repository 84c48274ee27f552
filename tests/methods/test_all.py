"""What holds of every method on both paths, where exact mixtures stand in for networks."""
import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import DESCENT, KEYS, METHODS, config_of, every_method, pairs_of, update_of

from jaxalign import methods
from jaxalign.config import registry
from jaxalign.devices import sharding
from jaxalign.testing import analytic

pytestmark = pytest.mark.usefixtures("compile_quickly")
SIZE = 8                      # dimensions
UNCOMPILED = {"nabla_gfn", "mapo", "nft", "ddpo", "draft"}   # run so by default, one of each kind
MIXTURE = analytic.Mixture(np.array([0.3, 0.7]), np.stack([np.linspace(-1, 1, SIZE)] * 2) * [[1],
                                                                                            [-1]],
                           np.array([0.5, 1.0]))


def world(name: str, path: str, replace=lambda models: models, **options):
  """Models, method, update, initial state and batch on a path of exact mixtures."""
  cfg = config_of(name, **options)
  chain = dict(analytic.PATHS[path])
  if cfg.sample.kind == "one_step":                  # one step has no noise of a chain
    chain = {"schedule": chain["schedule"]}
  elif getattr(cfg.method, "require_memoryless", False):
    chain |= dict(kind="ddim", eta=1.0, final="noisy")
  transitions = {**cfg.sample.transitions, "spacing": "", "final": "", **chain}
  models = analytic.make_models(
      MIXTURE, analytic.quadratic_reward(np.ones(SIZE)), **transitions)
  models = replace(dataclasses.replace(models, reward_std=0.5))
  method = methods.make(name, models, cfg.method, cfg.optim)
  size = 4 * cfg.group * cfg.parts
  batch = {**analytic.make_batch(size), "prompt_ids": jnp.arange(size) // cfg.group}
  if cfg.reads_pairs:
    batch["pairs"] = pairs_of(size, models.latent_shape)
  state = method.init(KEYS[0], models.frozen, batch)
  return models, method, update_of(method, models), state, batch


on_both_paths = pytest.mark.parametrize("path", list(analytic.PATHS))


def assert_close(tree, other, tolerance):
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(other)):
    if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance,
                                 err_msg=sharding.path_of(path))


@functools.cache
def program(name: str, path: str):
  """A world and its compiled update."""
  models, method, step, state, batch = world(name, path)
  return models, method, step, state, batch, jax.jit(step)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in UNCOMPILED)) for name in METHODS])
def test_compiled_equals_uncompiled(name):
  """From the second update on: at the first, what policy and reference differ by is rounding."""
  models, _, step, state, batch, run = program(name, "vp")
  state, _ = run(state, models.frozen, batch, KEYS[2])
  compiled = run(state, models.frozen, batch, KEYS[1])
  plain = step(state, models.frozen, batch, KEYS[1])
  assert jax.tree.structure(compiled) == jax.tree.structure(plain)
  assert_close(compiled, plain, 1e-5)


@on_both_paths
@every_method
def test_rate_zero_changes_nothing(name, path):
  """And another rate changes something, of which the noise of images shows an update late."""
  still_world = world(name, path, optim=dataclasses.replace(DESCENT, lr=0.0))
  for still, (models, method, _, state, batch, step) in (
      (True, (*still_world, jax.jit(still_world[2]))), (False, program(name, path))):
    after = state
    for key in KEYS[:3]:
      after, _ = step(after, models.frozen, batch, key)
    same = jax.tree.map(np.array_equal, method.product(state), method.product(after))
    assert all(jax.tree.leaves(same)) is (still and "optimizer" in state)


@on_both_paths
@pytest.mark.parametrize("name", [
    name for name in METHODS if registry.need(registry.load_method(name).Config, "strength")])
def test_strength_zero_stays_at_the_reference(name, path):
  key = registry.need(registry.load_method(name).Config, "strength")
  models, method, step, state, batch = world(name, path, **{key: 0.0})
  step = jax.jit(step)
  for i in range(3):
    after, _ = step(state, models.frozen, batch, KEYS[i])
    x, t = jax.random.normal(KEYS[i], (4, SIZE)), models.sampler.at("timesteps", 0)
    ours, base = (models.output(policy, models.frozen, x, t, batch["conditioning"])
                  for policy in (method.product(after), None))
    np.testing.assert_allclose(ours, base, atol=1e-6)


class Counts(collections.Counter):
  """Counts rows of calls, and of their backward passes, as a program runs."""

  def of(self, name: str, function):
    """`function(_, rows, ...)`, its calls counted as NAME_forward, gradients as NAME_backward."""
    def note(kind, rows):
      # It takes a number that changes, or it would be moved out of loops.
      jax.debug.callback(functools.partial(self._add, f"{name}_{kind}", rows.shape[0]),
                         rows.reshape(-1)[0])

    @jax.custom_vjp
    def counted(*args):
      note("forward", args[1])
      return function(*args)

    def forward(*args):
      note("forward", args[1])
      out, pull = jax.vjp(function, *args)
      return out, pull

    def backward(pull, cotangent):
      note("backward", cotangent)
      return pull(cotangent)
    counted.defvjp(forward, backward)
    return counted

  def _add(self, name, rows, _):
    self[name] += rows

  def on(self, models):
    """`models` with guidance, and with all calls counted."""
    return dataclasses.replace(
        models, guidance=3.0 if models.sampler.steps > 1 else 1.0,
        denoise=self.of("denoiser", models.denoise), decode=self.of("decode", models.decode),
        decode_unclamped=self.of("decode", models.decode_unclamped),
        score=self.of("reward", models.score))


@on_both_paths
@every_method
def test_cost_equals_counted_calls(name, path):
  """Where a cost is an average, over a schedule or random choices, so are the counts."""
  stages = getattr(config_of(name).method, "interval_stages", 0)
  counts, plain = Counts(), world(name, path)[0]
  models, method, _, state, batch = world(name, path, counts.on)
  step = jax.jit(update_of(method, models, plain))
  wanted = method.cost(batch["sample_ids"].shape[0])
  names = {"denoiser_forward": "denoiser_forward", "denoiser_backward": "denoiser_backward",
           "decodes": "decode_forward", "reward_queries": "reward_forward",
           "reward_gradients": "reward_backward"}
  seen = []
  for i in range(stages or 100):
    counts.clear()
    state, _ = step(state, models.frozen, batch, jax.random.key(i))
    jax.effects_barrier()
    seen.append([counts[counted] for counted in names.values()])
    if i == 2 and not stages and (seen == [[wanted[key] for key in names]] * 3):
      break
  for key, column in zip(names, np.array(seen).T):
    error = 0 if stages else 3 * column.std() / np.sqrt(len(column))
    assert error <= 0.1 * wanted[key] and abs(column.mean() - wanted[key]) <= error + 0.5, (
        key, column.mean(), wanted[key])
