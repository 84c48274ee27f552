"""What holds of every method in a model family, shown on random tiny pipelines.

Of each method a program is compiled: an update on one device, that of the resumed run too.
Left to slow runs are one on eight devices, and one in bfloat16.
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
from battery import FAMILIES, KEYS, config_of, pairs_of, update_of

import runs
from jaxalign import methods
from jaxalign.config import registry
from jaxalign.devices import rng, sharding
from jaxalign.storage.checkpoint import Checkpointer
from jaxalign.train.experiment import build, gather
from jaxalign.train.opening import open_pipeline

DOCS = "".join(file.read_text() for file in (runs.ROOT / "docs").rglob("*.md"))


@functools.cache
def opened(path: str, dtype: str):
  """The fixture that all methods of a family share."""
  return open_pipeline(path, dtype=dtype)


@functools.cache
def experiment(name: str, family: str, count: int, dtype: str = "float32"):
  """An experiment on so many devices, its method, state and batch."""
  cfg = config_of(name, FAMILIES[family])
  cfg = dataclasses.replace(
      cfg, sample=dataclasses.replace(cfg.sample, batch=8 * cfg.group * cfg.parts),
      mesh=dataclasses.replace(cfg.mesh, data=count),
      model=dataclasses.replace(cfg.model, dtype=dtype))
  exp = build(cfg, jax.devices()[:count], opened(cfg.model.path, dtype))
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
  place = jax.tree.map(lambda a: rows if at_inference and a.ndim else everywhere, state)
  if "replay" in state:
    place["replay"] = jax.tree.map(lambda a: rows, state["replay"])
  return jax.jit(update, out_shardings=(place, None, None)), traces, jax.device_put(state, place)


@functools.cache
def trained(name: str, family: str, count: int):
  """States and products on the host after 0, 1, 2 updates; metrics; reference outputs; traces."""
  exp, _, method, _, batch = experiment(name, family, count)
  step, traces, state = program(name, family, count)
  states, logged, references = [jax.device_get(state)], [], []
  products = [jax.device_get(method.product(state))]
  for key in KEYS[1:3]:
    state, values, reference = step(state, exp.frozen, batch, key)
    states.append(jax.device_get(state))
    products.append(jax.device_get(method.product(state)))
    logged.append(jax.device_get(values))
    references.append(jax.device_get(reference))
  return states, products, logged, references, traces["update"]


def one_by_one(names):
  """A fixture `name` that takes each of the parameters `names` through all tests of a file, then
  lets go of its programs: those of all methods together are more than a process may map."""
  @pytest.fixture(scope="module", params=names)
  def name(request):
    yield request.param
    for cached in (trained, program, experiment):
      cached.cache_clear()
    jax.clear_caches()
  return name


class Battery:
  """To be derived from with a `family`, a key of `FAMILIES`, beside a fixture `name`: a method."""
  family: str

  def test_an_update(self, name):
    """Structure and dtypes stay, nothing is compiled twice, the reference stays, all is finite."""
    states, products, logged, references, traces = trained(name, self.family, 1)
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), state) for state in states]
    assert shapes[0] == shapes[1] == shapes[2] and traces == 1
    assert references[0].tobytes() == references[1].tobytes() and np.isfinite(references[0]).all()
    exp = experiment(name, self.family, 1)[0]
    before, after = (jax.tree.leaves(product) for product in products[::2])
    assert any((a != b).any() for a, b in zip(before, after))
    for a in after:
      assert np.isfinite(a).all()
    for key, value in logged[-1].items():
      assert np.isfinite(value).all(), key
      assert value.shape == (np.shape(states[0]["best_reward"])
                             if registry.need(exp.config.method, "at_inference") else ())
      assert re.sub(r"_vector$", "", key) + "`" in DOCS, key

  def test_a_resumed_run_equals_an_unbroken_one(self, name, tmp_path):
    states, _, logged, _, _ = trained(name, self.family, 1)
    exp, _, _, _, batch = experiment(name, self.family, 1)
    step, traces, start = program(name, self.family, 1)
    with contextlib.closing(Checkpointer(tmp_path / "checkpoints")) as checkpoints:
      checkpoints.save(1, jax.device_put(states[1], jax.tree.map(lambda a: a.sharding, start)), {})
      checkpoints.wait()
      saved, _ = checkpoints.restore(start)
    state, values, _ = step(saved, exp.frozen, batch, KEYS[2])
    assert traces["update"] == 1
    for tree, other in ((state, states[2]), (values, logged[1])):
      for a, b in zip(jax.tree.leaves(jax.device_get(tree)), jax.tree.leaves(other)):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

  @pytest.mark.slow                      # the second program of each method takes minutes in all
  def test_one_device_equals_eight(self, name):
    _, ours, logged, _, _ = trained(name, self.family, 1)
    _, theirs, logged_by_eight, _, _ = trained(name, self.family, 8)
    ours, theirs = (jax.tree.map(np.subtract, *products[2::-2]) for products in (ours, theirs))
    # After two updates: at the first, margins are rounding, and the best noise is the first one.
    # Advantages and margins are differences that nearly cancel, which magnifies rounding (6e-4 was
    # seen); a row on the wrong device is an error of order 1.
    error, size = optax.tree.norm(jax.tree.map(jnp.subtract, ours, theirs)), optax.tree.norm(ours)
    assert error <= 2e-3 * size, error / size
    for key, value in logged[1].items():
      # A divergence is quadratic in the update, and has twice its relative error.
      np.testing.assert_allclose(logged_by_eight[1][key], value, rtol=4e-3, atol=1e-5, err_msg=key)

  @pytest.mark.slow
  def test_bfloat16_is_finite(self, name):
    exp, _, method, _, batch = experiment(name, self.family, 1, "bfloat16")
    step, _, state = program(name, self.family, 1, "bfloat16")
    for key in KEYS[1:3]:
      state, values, reference = step(state, exp.frozen, batch, key)
    for value in jax.tree.leaves((method.product(state), values, reference)):
      assert np.isfinite(value).all()
