"""What holds of every method, on every path and in every model family.

A method joins by being in the folder, with a recipe of its name that has the arguments of
`FAMILIES`. Exact mixtures stand in for networks where many updates, or slow ones, are taken; the
random tiny pipelines of the recipes show the rest. Of each method and family two programs are
compiled: an update on one device, which is also that of the resumed run, and one on eight.
"""
import collections
import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs

from jaxalign import methods
from jaxalign.config import registry
from jaxalign.config.schema import OptimConfig
from jaxalign.devices import rng, sharding
from jaxalign.storage.checkpoint import Checkpointer
from jaxalign.testing import analytic
from jaxalign.train.experiment import build, gather

METHODS = registry.own_methods()
FAMILIES = {"unet": "smoke", "transformer": "smoke_sd3"}
KEYS = [jax.random.key(i) for i in range(4)]
# Adam with so large an epsilon is plain descent: a change of the state is a gradient, and rounding
# in a gradient near zero stays small.
DESCENT = OptimConfig(lr=1e2, eps=1e3, b1=0.0, clip_norm=0.0)
DOCS = "".join(file.read_text() for file in (runs.ROOT / "docs").rglob("*.md"))


def update_of(method, models, loops_own=None):
  """One update as the loop takes it: `(state, frozen, batch, key) -> (state, metrics)`.

  `loops_own`: models that decode and score what `collect` ends with, in place of `models`.
  """
  own = loops_own or models

  def step(state, frozen, batch, key):
    collect_key, update_key = jax.random.split(key)
    experience = dict(method.collect(state, frozen, batch, collect_key))
    rewards = None
    if "final" in experience:
      images = own.decode(frozen["decoder"], experience["final"])
      rewards = own.score(frozen["reward"], images, experience["batch"]["prepared"])
    elif "images" in experience:                     # at inference, n of each row side by side
      images = experience.pop("images")
      count = images.shape[0] // batch["sample_ids"].shape[0]
      rewards = models.score(frozen["reward"], images, jax.tree.map(
          lambda a: jnp.repeat(a, count, axis=0), batch["prepared"]))
    return method.update(state, frozen, experience, rewards, update_key)
  return step


def pairs_of(size: int, latent_shape) -> dict:
  """Clean latents of so many pairs, the last one a tie."""
  latents = np.random.default_rng(0).normal(size=(size, 2, *latent_shape)).astype(np.float32)
  label = np.ones(size, np.float32)
  label[-1] = 0.5
  return {"latents": latents, "label": label, "origin": np.full((size, 2, 4), 8, np.int32)}


def config_of(name: str, argument: str = "smoke", *, optim=DESCENT, **method_keys):
  """The recipe's config with nothing recomputed, which no cost counts, and an optimiser of ours."""
  recipe = runs.recipe(argument, name)
  if "remat" in recipe.method:
    method_keys["remat"] = "none"
  cfg = runs.smoke(name, argument, **{f"method__{key}": v for key, v in method_keys.items()})
  return dataclasses.replace(cfg, optim=optim)


# ---- on exact mixtures ---------------------------------------------------------------------------

SIZE = 8                      # dimensions
MIXTURE = analytic.Mixture(np.array([0.3, 0.7]), np.stack([np.linspace(-1, 1, SIZE)] * 2) * [[1],
                                                                                            [-1]],
                           np.array([0.5, 1.0]))


def world(name: str, path: str, replace=lambda models: models, **options):
  """Models, method, update, initial state and batch on a path of exact mixtures."""
  cfg = config_of(name, **options)
  transitions = {**cfg.sample.transitions, "spacing": "", "final": ""}
  models = analytic.make_models(MIXTURE, analytic.quadratic_reward(np.ones(SIZE)),
                                schedule=analytic.PATHS[path], **transitions)
  models = replace(dataclasses.replace(models, reward_std=0.5))
  method = methods.make(name, models, cfg.method, cfg.optim)
  size = 4 * cfg.group * cfg.parts
  batch = {**analytic.make_batch(size), "prompt_ids": jnp.arange(size) // cfg.group}
  if cfg.reads_pairs:
    batch["pairs"] = pairs_of(size, models.latent_shape)
  state = method.init(KEYS[0], models.frozen, batch)
  return models, method, update_of(method, models), state, batch


on_both_paths = pytest.mark.parametrize("path", list(analytic.PATHS))
every_method = pytest.mark.parametrize("name", METHODS)


def assert_close(tree, other, tolerance):
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(other)):
    if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance,
                                 err_msg=sharding.path_of(path))


@on_both_paths
@every_method
def test_compiled_equals_uncompiled(name, path):
  models, _, step, state, batch = world(name, path)
  compiled = jax.jit(step)(state, models.frozen, batch, KEYS[1])
  plain = step(state, models.frozen, batch, KEYS[1])
  assert jax.tree.structure(compiled) == jax.tree.structure(plain)
  assert_close(compiled, plain, 1e-5)


@on_both_paths
@every_method
def test_rate_zero_changes_nothing(name, path):
  """And another rate changes something, of which the noise of images shows an update late."""
  for rate, still in ((0.0, True), (DESCENT.lr, False)):
    models, method, step, state, batch = world(
        name, path, optim=dataclasses.replace(DESCENT, lr=rate))
    step, after = jax.jit(step), state
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


# ---- on networks ---------------------------------------------------------------------------------


@functools.cache
def experiment(name: str, family: str, count: int, dtype: str = "float32"):
  """An experiment on so many devices, its method, state and batch."""
  cfg = config_of(name, FAMILIES[family])
  cfg = dataclasses.replace(
      cfg, sample=dataclasses.replace(cfg.sample, batch=8 * cfg.group * cfg.parts),
      mesh=dataclasses.replace(cfg.mesh, data=count),
      model=dataclasses.replace(cfg.model, dtype=dtype))
  exp = build(cfg, jax.devices()[:count])
  # About what the reward spreads by on these models.
  models = dataclasses.replace(exp.models, reward_std=0.006)
  method = methods.make(name, models, cfg.method, cfg.optim)
  prompts, ids = runs.TRAIN.read_text().splitlines(), np.arange(cfg.sample.batch, dtype=np.int32)
  batch = gather(exp.prompt_table(prompts), ids // cfg.group % len(prompts), ids)
  if cfg.reads_pairs:
    batch["pairs"] = pairs_of(len(ids), models.latent_shape)
  batch = exp.put_batch(batch)
  init = lambda frozen, batch: method.init(rng.stream(KEYS[0], rng.INIT), frozen, batch)
  state = jax.tree.map(jnp.copy, init(exp.frozen, batch))
  return exp, models, method, state, batch


@functools.cache
def program(name: str, family: str, count: int, dtype: str = "float32"):
  """The compiled update, which counts its traces, and says what the reference outputs."""
  exp, models, method, state, batch = experiment(name, family, count, dtype)
  traces, step = collections.Counter(), update_of(method, models)

  def update(state, frozen, batch, key):
    traces["update"] += 1
    x = jax.random.normal(KEYS[3], (8, *models.latent_shape))
    few = jax.tree.map(lambda a: a[:8], batch["conditioning"])
    reference = models.output(None, frozen, x, models.sampler.at("timesteps", 0), few)
    return *step(state, frozen, batch, key), reference
  rows, everywhere = sharding.batch_sharding(exp.mesh), sharding.replicated(exp.mesh)
  at_inference = registry.need(exp.config.method, "at_inference")
  place = jax.tree.map(
      lambda a: rows if at_inference and a.ndim else everywhere,
      jax.eval_shape(lambda *args: step(*args)[0], state, exp.frozen, batch, KEYS[1]))
  if "replay" in state:
    place["replay"] = jax.tree.map(lambda a: rows, state["replay"])
  return jax.jit(update, out_shardings=(place, None, None)), traces, jax.device_put(state, place)


@functools.cache
def trained(name: str, family: str, count: int):
  """States on the host after 0, 1, 2 updates, metrics, reference outputs."""
  exp, _, _, _, batch = experiment(name, family, count)
  step, traces, state = program(name, family, count)
  states, logged, references = [jax.device_get(state)], [], []
  for key in KEYS[1:3 if count == 1 else 2]:
    state, values, reference = step(state, exp.frozen, batch, key)
    states.append(jax.device_get(state))
    logged.append(jax.device_get(values))
    references.append(jax.device_get(reference))
  return states, logged, references, traces["update"]


in_every_family = pytest.mark.parametrize("family", list(FAMILIES))


@in_every_family
@every_method
def test_an_update(name, family):
  """Structure and dtypes stay, nothing is compiled twice, the reference stays, all is finite."""
  states, logged, references, traces = trained(name, family, 1)
  shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), state) for state in states]
  assert shapes[0] == shapes[1] == shapes[2] and traces == 1
  assert references[0].tobytes() == references[1].tobytes() and np.isfinite(references[0]).all()
  exp, _, method, _, _ = experiment(name, family, 1)
  before, after = (jax.tree.leaves(method.product(state)) for state in states[::2])
  assert any((a != b).any() for a, b in zip(before, after))
  for a in after:
    assert np.isfinite(a).all()
  for key, value in logged[-1].items():
    assert np.isfinite(value).all(), key
    assert value.shape == (np.shape(states[0]["best_reward"])
                           if registry.need(exp.config.method, "at_inference") else ())
    assert re.sub(r"_vector$", "", key) + "`" in DOCS, key


@in_every_family
@every_method
def test_a_resumed_run_equals_an_unbroken_one(name, family, tmp_path):
  states, logged, _, _ = trained(name, family, 1)
  exp, _, _, _, batch = experiment(name, family, 1)
  step, traces, start = program(name, family, 1)
  with contextlib.closing(Checkpointer(tmp_path / "checkpoints")) as checkpoints:
    checkpoints.save(1, jax.device_put(states[1], jax.tree.map(lambda a: a.sharding, start)), {})
    checkpoints.wait()
    saved, _ = checkpoints.restore(start)
  state, values, _ = step(saved, exp.frozen, batch, KEYS[2])
  assert traces["update"] == 1
  for tree, other in ((state, states[2]), (values, logged[1])):
    for a, b in zip(jax.tree.leaves(jax.device_get(tree)), jax.tree.leaves(other)):
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@in_every_family
@every_method
def test_one_device_equals_eight(name, family):
  one, eight = (trained(name, family, count) for count in (1, 8))
  _, _, method, _, _ = experiment(name, family, 1)
  change = lambda states: jax.tree.map(
      jnp.subtract, method.product(states[1]), method.product(states[0]))
  ours, theirs = change(one[0]), change(eight[0])
  error = optax.tree.norm(jax.tree.map(jnp.subtract, ours, theirs)) / optax.tree.norm(ours)
  assert error < 1e-4, error
  for key, value in one[1][0].items():
    np.testing.assert_allclose(eight[1][0][key], value, rtol=1e-3, atol=1e-5, err_msg=key)
