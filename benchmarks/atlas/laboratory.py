"""A method's real code on an analytic world: its updates, its samples, what they cost.

Everything is 1-D or 2-D, with the exact network of the data and, for methods that train, a small
network added to its output. The reward of a world is `scale R(x)`: the scale is an argument of the
compiled programs and stands for the strength of the tilt, so that a program serves all strengths.
"""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import methods
from jaxalign.config import registry
from jaxalign.config.schema import OptimConfig
from jaxalign.methods import Models
from jaxalign.methods.shared.noise import generate
from jaxalign.testing import analytic

STEPS = 20
POOL = 65_536                 # samples of a base model's chain
PATHS = {"vp": analytic.SD_SCHEDULE, "flow": analytic.FLOW_SCHEDULE}
# Chains on a path: with noise at every step and none left of the start; Flow-GRPO's; without noise.
CHAINS = {"noisy": dict(kind="ddim", eta=1.0, final="noisy"),
          "sde": dict(kind="flow_sde", eta=0.7, final="clean"),
          "ode": dict(kind="dpm2")}
PARTS = (1, 1, 2)              # of a run's updates, between looks: a quarter, half, all


@dataclasses.dataclass(frozen=True)
class Entry:
  """A method as it enters the atlas.

  Attributes:
    method: its name. options: keys of its config that differ from the defaults.
    limit: what it converges to: "tilt", "tilt given the noise", "first-order tilt", "mode",
      "another law" or "nothing". sentence: the same with its reasons, for the page.
    strength: what the three strengths are: "scale" of the reward, or for what has no target the
      "length" of training (a quarter, half, all) or the number of "candidates".
    chain: a key of `CHAINS`; "sde" means "noisy" on paths that have none.
    updates, batch, lr: of training; at inference all images are one batch.
    label: on the page, where a method has several entries.
    line_scale, line_lr: the strength on the line, and the learning rate of its affine networks.
  """
  method: str
  options: dict[str, Any]
  limit: str
  sentence: str
  strength: str = "scale"
  chain: str = "noisy"
  updates: int = 240
  batch: int = 64
  lr: float = 5e-3
  label: str = ""
  line_scale: float = 1.0
  line_lr: float = 0.02

  @property
  def name(self) -> str:
    return self.label or self.method

  @property
  def at_inference(self) -> bool:
    return registry.need(registry.load_method(self.method).Config, "at_inference")


@dataclasses.dataclass(frozen=True, eq=False)
class World:
  """Data, a reward `(x [B, D]) -> [B]`, and what is trained beside the exact network.

  `policy`: `(schedule, sampler) -> FlowNet`.
  """
  name: str
  mixture: analytic.Mixture
  reward: Any
  policy: Any

  @functools.cache                       # noqa: B019  (worlds are few, and live as long)
  def models(self, path: str, chain: str) -> Models:
    schedule = PATHS[path]
    options = CHAINS["noisy" if chain == "sde" and path == "vp" else chain]
    if options["kind"] == "dpm2" and path == "flow":
      options = options | {"final": "clean"}
    sampler = analytic.make_sampler(schedule, STEPS, **options)
    score = lambda params, x, _: params["scale"] * self.reward(x)
    return analytic.make_models(
        self.mixture, ({"scale": jnp.ones(())}, score), steps=STEPS, schedule=schedule,
        policy=self.policy(schedule, sampler), **options)


  @functools.cache                       # noqa: B019
  def base(self, path: str, chain: str):
    """Outputs `[POOL, D]` of the base model's chain."""
    models = self.models(path, chain)
    run = jax.jit(lambda key: walk(models, None, key, POOL).final)
    return run(jax.random.key(7))


def walk(models: Models, policy, key, count: int):
  """Trajectories with noise that is drawn at once: by sample it would take longer than the rest."""
  noise = jax.random.normal(key, (models.sampler.steps + 1, count) + models.latent_shape)
  return models.rollout(policy, models.frozen, analytic.make_batch(count), key, x_init=noise[0],
                        noise=noise[1:])


def scaled(frozen, scale):
  """`frozen` with the reward of this scale."""
  return {**frozen, "reward": {"scale": jnp.asarray(scale, jnp.float32)}}


def _pairs(models, frozen, pool, key, size: int):
  """Pairs of base samples, the preferred one first, by Bradley-Terry of the reward."""
  draw, vote = jax.random.split(key)
  latents = pool[jax.random.randint(draw, (size, 2), 0, pool.shape[0])]
  score = lambda x: models.score(frozen["reward"], x, {})
  first = jax.random.uniform(vote, (size,)) < jax.nn.sigmoid(
      score(latents[:, 0]) - score(latents[:, 1]))
  latents = jnp.where(first[:, None, None], latents, latents[:, ::-1])
  return {"latents": latents, "label": jnp.ones(size), "origin": jnp.zeros((size, 2, 4), jnp.int32)}


def build(entry: Entry, models: Models):
  """The method itself."""
  config = registry.load_method(entry.method).Config(**entry.options)
  # `eps` of an optimiser that is plain descent, where an entry asks for one.
  plain = dict(eps=1e6, b1=0.0) if entry.lr >= 1e3 else dict(decay_steps=entry.updates, ema=0.98)
  optim = OptimConfig(lr=entry.lr, clip_norm=0.0 if entry.lr >= 1e3 else 1.0, b2=0.99,
                      **plain if not entry.at_inference or entry.lr >= 1e3 else {})
  return methods.make(entry.method, models, config, optim), config


def _experience(method, models, state, frozen, batch, key):
  """What `update` is given, as the loop makes it."""
  experience, rewards = dict(method.collect(state, frozen, batch, key)), None
  images = experience.get("final", experience.pop("images", None))
  if images is not None:
    rewards = models.score(frozen["reward"], images, {})
  return experience, rewards


def trained(entry: Entry, world: World, path: str, chain: str, scales, seeds) -> list:
  """Policies `[lanes]` after a quarter, half and all updates, a lane for each scale and seed."""
  models = world.models(path, chain)
  method, config = build(entry, models)
  rows = analytic.make_batch(entry.batch)
  pool = world.base(path, chain) if registry.need(config, "reads_pairs") else None

  def step(frozen, state, key):
    batch_key, collect_key, update_key = jax.random.split(key, 3)
    batch = rows
    if pool is not None:
      batch = {**rows, "pairs": _pairs(models, frozen, pool, batch_key, entry.batch)}
    experience, rewards = _experience(method, models, state, frozen, batch, collect_key)
    return method.update(state, frozen, experience, rewards, update_key)[0]

  def init(scale, seed):
    batch = rows if pool is None else {
        **rows, "pairs": _pairs(models, models.frozen, pool, seed, entry.batch)}
    return method.init(seed, scaled(models.frozen, scale), batch)

  def part(scale, seed, state, first):
    frozen = scaled(models.frozen, scale)
    keys = jax.vmap(lambda i: jax.random.fold_in(seed, first + i))(
        jnp.arange(entry.updates // sum(PARTS)))
    return jax.lax.scan(lambda s, k: (step(frozen, s, k), None), state, keys)[0]
  scales, keys = jnp.asarray(scales, jnp.float32), jax.vmap(jax.random.key)(jnp.asarray(seeds))
  state = jax.jit(jax.vmap(init))(scales, keys)
  part = jax.jit(jax.vmap(part, in_axes=(0, 0, 0, None)))
  products, done = [], 0
  for count in PARTS:
    for _ in range(count):
      state = part(scales, keys, state, 1000 + done)
      done += entry.updates // sum(PARTS)
    products.append(jax.vmap(method.product)(state))
  return products


def searched(entry: Entry, models: Models, scale: float, seed: int, count: int):
  """Images `[count, D]` of a method at inference, made by the plain sampler from its noise."""
  method, config = build(entry, models)
  batch = analytic.make_batch(count)
  updates = entry.updates or models.sampler.steps + 1

  @jax.jit
  def run(scale, seed):
    frozen = scaled(models.frozen, scale)

    def step(state, key):
      collect_key, update_key = jax.random.split(key)
      experience, rewards = _experience(method, models, state, frozen, batch, collect_key)
      return method.update(state, frozen, experience, rewards, update_key)[0], None
    first, rest = jax.random.split(jax.random.key(seed))
    state, _ = jax.lax.scan(step, method.init(first, frozen, batch),
                            jax.random.split(rest, updates))
    return generate(models, frozen, method.product(state), batch["conditioning"], remat="none")
  return run(jnp.float32(scale), seed)


@functools.cache
def _sampling(world: World, path: str, chain: str, count: int):
  """The program of `sample`."""
  models = world.models(path, chain)
  noisy = world.models(path, "noisy") if chain == "ode" else models
  sampler = noisy.sampler

  def one(policy, key):
    seen = walk(noisy, policy, jax.random.fold_in(key, 1), count // 4)

    def gap(total, k):
      base = noisy.output(None, noisy.frozen, seen.latents[k], sampler.at("timesteps", k),
                          analytic.make_batch(count // 4)["conditioning"])
      return total + 0.5 * jnp.square(sampler.at("rate", k) * (seen.out[k] - base)).sum(1), None
    kl, _ = jax.lax.scan(gap, jnp.zeros(count // 4), jnp.arange(sampler.steps))
    return walk(models, policy, key, count).final, kl
  return jax.jit(jax.vmap(one, in_axes=(0, None)))


def sample(world: World, path: str, chain: str, policies, count: int, seed: int = 11):
  """Outputs `[lanes, count, D]` of policies, and the KL of their paths `[lanes, count / 4]`, nats.

  The latter is that of the noisy chain with the same network, where their own has no noise.
  """
  final, kl = _sampling(world, path, chain, count)(policies, jax.random.key(seed))
  return np.asarray(final), np.asarray(kl)


def queries(entry: Entry, models: Models, share: float = 1.0) -> dict[str, float]:
  """Network evaluations and rewards asked for: of the training, or of an image at inference.

  A backward pass counts as two evaluations, as in `best_of_n.equal_candidates`.
  """
  method, config = build(entry, models)
  size = 1 if entry.at_inference else entry.batch
  cost = method.cost(size)
  updates = share * (entry.updates or models.sampler.steps)
  rewards = cost["reward_queries"]
  if not entry.at_inference and not registry.need(config, "reads_pairs"):
    rewards += entry.batch * (not registry.need(config, "reward_gradients"))
  return {"rewards": updates * rewards,
          "network": updates * (cost["denoiser_forward"] + 2 * cost["denoiser_backward"])}
