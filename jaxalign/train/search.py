"""The state of a method at inference: one row an image, in batches, and its compiled update."""
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxalign import methods
from jaxalign.devices import callbacks, memory, processes, rng, sharding
from jaxalign.errors import UserError
from jaxalign.methods.shared.noise import draw
from jaxalign.rewards import HostReward, weighted_sum
from jaxalign.train.experiment import Experiment, gather
from jaxalign.train.programs import needed_bytes, operations


class Search:
  """All images of a run, in batches of `sample.batch`: their state and the compiled update.

  `state` is one tree for each batch, by name. The last batch is filled up with its last image.
  """

  def __init__(self, exp: Experiment, method: methods.Method, prompts: list[str]):
    self._exp, self._method = exp, method
    self._root = jax.random.key(exp.config.seed)
    size, samples = exp.config.sample.batch, exp.config.eval.samples
    self.total = len(prompts) * samples
    latents = (1 + exp.config.sample.steps, *exp.models.latent_shape)
    memory.check_fits(f"eval.samples={samples} of {len(prompts)} prompts", self.total, latents)
    ids = np.minimum(np.arange(-(-self.total // size) * size), self.total - 1).astype(np.int32)
    table = exp.prompt_table(prompts)
    self._prompts, self._batches = {}, {}
    for i in range(0, len(ids), size):
      name, rows = f"{i // size:05d}", ids[i:i + size]
      self._prompts[name] = [prompts[j // samples] for j in rows]
      self._batches[name] = exp.put_batch(gather(table, rows // samples, rows))
    self._draw = jax.jit(lambda key, ids: draw(exp.models, key, ids))
    self._product = jax.jit(method.product)
    self.state = self._init()
    self._step = self._collect = self._update = None
    self.operations = 0.0                          # of a step, once it is compiled

  def adopt(self, exp: Experiment, method: methods.Method) -> None:
    """Goes on with a method that knows the reward's spread, before anything is compiled."""
    self._exp, self._method = exp, method

  def _init(self):
    key = rng.stream(self._root, rng.EVAL)
    make = lambda frozen, batch: self._method.init(key, frozen, batch)
    first = next(iter(self._batches.values()))
    init = jax.jit(make, out_shardings=self._shardings(
        jax.eval_shape(make, self._exp.frozen, first)))
    return {name: init(self._exp.frozen, batch) for name, batch in self._batches.items()}

  def _shardings(self, tree):
    mesh = self._exp.mesh
    rows, single = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    return jax.tree.map(lambda a: rows if a.ndim else single, tree)

  def compile(self) -> str:
    """Compiles the update ahead of time; returns a line about it."""
    begun, exp, method = time.monotonic(), self._exp, self._method
    name, batch = next(iter(self._batches.items()))
    state = self.state[name]
    key = rng.stream(self._root, rng.ROLLOUT)

    def collect(state, frozen, batch, key):
      experience = dict(method.collect(state, frozen, batch, key))
      images = experience.pop("images", None)
      if images is None or not isinstance(exp.reward, HostReward):
        return experience, images
      return experience, (images * 255).round().astype(jnp.uint8)

    def step(state, frozen, batch, collect_key, key):
      experience, images = collect(state, frozen, batch, collect_key)
      rewards = None
      if images is not None:
        count = images.shape[0] // batch["sample_ids"].shape[0]
        prepared = jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), batch["prepared"])
        rewards = exp.reward.score(frozen["reward"], images, prepared)
      return method.update(state, frozen, experience, rewards, key)

    placed = lambda tree: jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(
            exp.mesh, sharding.BATCH if s.ndim else sharding.P())), tree)

    def lower(f, donate, *args):
      traced = jax.jit(f, donate_argnums=donate, out_shardings=(
          self._shardings(jax.eval_shape(f, *args)))).trace(*args)
      self.operations += len(self._batches) * operations(traced.jaxpr.jaxpr, math.nan)
      return traced.lower()
    with processes.progress(total=1, desc="compiling", unit="program", leave=False):
      if isinstance(exp.reward, HostReward):
        experience, images = placed(jax.eval_shape(collect, state, exp.frozen, batch, key))
        self._collect = lower(collect, (), state, exp.frozen, batch, key).compile()
        rewards = placed(jax.ShapeDtypeStruct(images.shape[:1], np.float32))
        self._update = lower(method.update, 0, state, exp.frozen, experience, rewards,
                             key).compile()
      else:
        with callbacks.lowering(exp.config.method_name):
          self._step = lower(step, 0, state, exp.frozen, batch, key, key).compile()
    processes.barrier("compiled")
    self.update_bytes = needed_bytes(self._step or self._update)
    return (f"compiled in {time.monotonic() - begun:.0f} s, update needs "
            f"{self.update_bytes / 2**20:.0f} MiB")

  def step(self, step: int) -> list[dict]:
    """One update of every image; returns the metrics `{name: [B]}` of each batch, not awaited."""
    keys = [rng.stream(self._root, name, step) for name in (rng.ROLLOUT, rng.UPDATE)]
    names, frozen, metrics = list(self._batches), self._exp.frozen, []
    collect = lambda name: self._collect(self.state[name], frozen, self._batches[name], keys[0])
    ahead = collect(names[0]) if self._collect else None
    for name, following in zip(names, [*names[1:], None]):
      if self._collect:
        (experience, images), ahead = ahead, collect(following) if following else None
        rewards = self._host_rewards(images, self._prompts[name])
        self.state[name], values = self._update(self.state[name], frozen, experience, rewards,
                                                keys[1])
      else:
        self.state[name], values = self._step(self.state[name], frozen, self._batches[name], *keys)
      metrics.append(values)
    return metrics

  def _host_rewards(self, images, prompts):
    reward, images = self._exp.reward, processes.fetch(images)
    rows = [prompt for prompt in prompts for _ in range(len(images) // len(prompts))]
    return self._exp.put_batch(weighted_sum(
        reward.weights, processes.by_rows(reward.terms, images, rows)))

  def _gathered(self, of) -> np.ndarray:
    """Rows of all images on the host, in order."""
    return np.concatenate([processes.fetch(of(name)) for name in self._batches])[:self.total]

  def product(self) -> np.ndarray:
    """The noise of every image, `[P * K, 1+T, h, w, c]` f32."""
    return self._gathered(lambda name: self._product(self.state[name]))

  def best_step(self) -> np.ndarray:
    """The update before which each image scored best, `[P * K]`."""
    return self._gathered(lambda name: self.state[name]["best_step"])

  def fresh(self, stream: str) -> np.ndarray:
    """Noise of every image from another stream."""
    key = rng.stream(self._root, stream)
    return self._gathered(lambda name: self._draw(key, self._batches[name]["sample_ids"]))


def means(metrics: list[dict], total: int, step: int) -> dict[str, float]:
  """Fetches per-image metrics and averages what is finite.

  Raises:
    UserError: no image has a finite reward.
  """
  metrics = processes.fetch(metrics)
  callbacks.check()
  rows = {name: np.concatenate([part[name] for part in metrics])[:total]
          for name in metrics[0]}
  finite = {name: value[np.isfinite(value)] for name, value in rows.items()}
  if not finite["train/reward"].size:
    raise UserError(f"step {step}: the reward of every image is not a finite number; lower "
                    "optim.lr in another --workdir")
  return {**{name: float(value.mean()) for name, value in finite.items() if value.size},
          **callbacks.numbers()}
