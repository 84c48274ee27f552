"""FK steering: particles of each image, weighted by what they promise, resampled as they denoise.

No weight is trained, and the reward may be a black box. With K particles of each image and r_k the
reward of the clean estimate at step k, of the output itself at the end:

  advance all particles to the next point; r <- R(decode(x0_hat))                    (collect)
  log w <- log w + increment of the potential, which add up to beta R(x_N)
  if the effective number of particles is low: resample, log w <- 0                  (update)
  at the end: one particle, drawn by its weight

Whatever the potentials, weighted averages tend to those of the tilt `p exp(beta R)` of the
sampler's own law, with a bias of order 1 / K: the initial noise is weighted too. What they decide
is the variance. Copies diverge, as each place has its own noise from there on; the result is the
noise of one lineage, from which the sampler makes the very image that was scored.

Singhal et al. 2025, "A General Framework for Inference-time Scaling and Steering of Diffusion
Models". Implemented from the equations: weights of points without resampling are carried on, and
those of the output count.
"""
import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.config.fields import Count, NonNegative, Range, check
from jaxalign.config.schema import OptimConfig
from jaxalign.devices import rng
from jaxalign.errors import UserError
from jaxalign.methods import Method, Models
from jaxalign.methods.shared.noise import draw


@dataclasses.dataclass(frozen=True)
class Config:
  """Keys of the `method` group.

  Attributes:
    particles: K of each image; 1 is the base model.
    beta: strength of the tilt. beta_unit: "sigma" (beta is divided by the reward's within-prompt
      standard deviation on the base model) or "raw".
    potential: what a point adds to log w: "diff" (`beta (r - r before)`), or "max", "sum" (beta
      times the highest r so far, their sum) or "plain" (`beta r`), after which the output's part
      is what is left of `beta R`.
    points, first, last: how many points, evenly from the step `first T` to the step `last T`. The
      output is one more; `train.steps` is `points + 1`.
    ess: resample where the effective share of particles is below this; above 1 at every point.
    output: the particle that is the result: "draw" (by weight, which has the tilt's law) or
      "argmax_reward" (best of what is left).
  """
  particles: Count = 4
  beta: NonNegative = 2.0
  beta_unit: Literal["sigma", "raw"] = "sigma"
  potential: Literal["diff", "max", "sum", "plain"] = "diff"
  points: Count = 4
  first: Annotated[float, Range(0, 1)] = 0.2
  last: Annotated[float, Range(0, 1)] = 0.8
  ess: NonNegative = 2.0
  output: Literal["draw", "argmax_reward"] = "draw"

  at_inference = True
  noise_at_every_step = True

  def __post_init__(self):
    check("method", self)
    if self.first > self.last:
      raise UserError(f"method.first={self.first} is above method.last={self.last}")

  @property
  def interval_stages(self) -> int:
    """Updates of a whole run, over which its costs are averaged."""
    return self.points + 1


# The published script's, but for carried weights and the output's: argument of the recipe.
PRESETS: dict[str, dict[str, Any]] = {
    "release": dict(potential="max", beta=10.0, beta_unit="raw", points=4, first=0.2, last=0.8,
                    output="argmax_reward"),
}


def bounds(cfg: Config, steps: int) -> np.ndarray:
  """Steps at which updates begin, `[points + 2]` int32, with the end."""
  points = np.linspace(cfg.first * steps, cfg.last * steps, cfg.points).round().astype(np.int32)
  if len(set(points)) < len(points):
    raise UserError(f"method.points={cfg.points} do not fit between method.first={cfg.first} and "
                    f"method.last={cfg.last} of sample.steps={steps}")
  return np.concatenate([[0], points, [steps]]).astype(np.int32)


def systematic(log_weight, u):
  """Indices `[B, K]` of systematic resampling: each particle K W times, rounded up or down.

  Args:
    log_weight: `[B, K]`, not normalised. u: `[B]` uniform in [0, 1).
  """
  count = log_weight.shape[1]
  total = jnp.cumsum(jax.nn.softmax(log_weight, 1), 1).at[:, -1].set(1.0)
  places = (u[:, None] + jnp.arange(count)[None]) / count
  index = jax.vmap(lambda t, p: jnp.searchsorted(t, p, side="right"))(total, places)
  return jnp.minimum(index, count - 1)


def increment(cfg: Config, gain, carry, spent, at_end):
  """What a point adds to log w, and the potential's new `carry`; all `[B, K]`.

  Args:
    gain: `beta r`. carry: of the points before: `beta r` (diff), its maximum or its sum.
    spent: all increments of the lineage so far. at_end: whether the rewards are the outputs'.
  """
  carry = {"diff": gain, "plain": gain, "max": jnp.maximum(carry, gain),
           "sum": carry + gain}[cfg.potential]
  if cfg.potential == "diff":
    return gain - spent, carry
  return jnp.where(at_end, gain - spent, carry), carry


def make(models: Models, cfg: Config, optim: OptimConfig) -> Method:
  """FK steering as a Method at inference: a point of each image per update."""
  steps, count = models.sampler.steps, cfg.particles
  edges = jnp.asarray(bounds(cfg, steps))
  beta = cfg.beta / models.reward_std if cfg.beta_unit == "sigma" else cfg.beta
  flat = lambda a: a.reshape((-1,) + a.shape[2:])
  apart = lambda a: a.reshape((-1, count) + a.shape[1:])
  pick = lambda a, index: jnp.take_along_axis(
      a, index.reshape(index.shape + (1,) * (a.ndim - 2)), axis=1)

  def segment(state):
    stage = jnp.minimum(state["updates"], cfg.points)
    done = state["updates"] > cfg.points
    return jnp.where(done, steps, edges[stage]), edges[stage + 1], done

  def init(key, frozen, batch):
    noise = jnp.stack([draw(models, jax.random.fold_in(key, i) if i else key, batch["sample_ids"])
                       for i in range(count)], 1)                          # [B, K, 1+T, ...]
    size = noise.shape[0]
    each = jnp.zeros((size, count))
    start = jnp.full_like(each, -jnp.inf) if cfg.potential == "max" else each
    return {"noise": noise, "x": models.sampler.input_scale * noise[:, :, 0], "log_w": each,
            "carry": start, "spent": each, "log_z": jnp.zeros(size), "best": noise[:, 0],
            "best_reward": jnp.full(size, -jnp.inf, jnp.float32),
            "best_step": jnp.zeros(size, jnp.int32),
            "updates": jnp.asarray(0, jnp.int32)}

  def collect(state, frozen, batch, key):
    start, stop, _ = segment(state)
    rows = jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), batch)
    x = models.rollout(None, frozen, rows, key, x_init=flat(state["x"]), start=start, stop=stop,
                       noise=jnp.moveaxis(flat(state["noise"])[:, 1:], 1, 0)).latents[stop]

    def clean(x):
      t = models.sampler.at("timesteps", jnp.minimum(stop, steps - 1))
      return models.schedule.to_x0(models.output(None, frozen, x, t, rows["conditioning"]), x, t)
    images = models.decode(frozen["decoder"], jax.lax.cond(stop < steps, clean, lambda x: x, x))
    return {"batch": batch, "images": images, "x": apart(x)}

  def update(state, frozen, experience, rewards, key):
    _, stop, done = segment(state)
    at_end = stop == steps
    rewards = apart(rewards)
    rewards = jnp.where(jnp.isnan(rewards), -jnp.inf, rewards)
    added, carry = increment(cfg, beta * rewards, state["carry"], state["spent"], at_end)
    added = jnp.where(jnp.isnan(added), -jnp.inf, added)             # of a particle dead before
    log_w = state["log_w"] + added
    dead = jnp.all(jnp.isneginf(log_w), 1, keepdims=True)            # none left: go on as it was
    log_w = jnp.where(dead, 0.0, log_w)
    share = jax.nn.softmax(log_w, 1)
    ess = 1 / (count * jnp.square(share).sum(1))

    keys = rng.per_sample(key, experience["batch"]["sample_ids"])
    u = jax.vmap(lambda k: jax.random.uniform(k))(keys)
    resampled = ~at_end & (ess < cfg.ess)
    index = jnp.where(resampled[:, None], systematic(log_w, u), jnp.arange(count)[None])
    # What was drawn up to here is the lineage's; from here on each place has its own noise.
    past = (jnp.arange(steps + 1) <= stop).reshape((1, 1, -1) + (1,) * (state["noise"].ndim - 3))
    noise = jnp.where(past, pick(state["noise"], index), state["noise"])
    log_z = state["log_z"] + jnp.where(
        resampled | at_end, jax.nn.logsumexp(log_w, 1) - jnp.log(count), 0.0)
    at = {"x": experience["x"], "carry": carry, "spent": state["spent"] + added, "reward": rewards}
    at = {name: pick(value, index) for name, value in at.items()}
    log_w = jnp.where(resampled[:, None], 0.0, log_w)

    # By weight at the end; before it, the best so far, whose later noise is yet to be seen.
    drawn = jax.vmap(lambda k, w: jax.random.categorical(jax.random.fold_in(k, 1), w))(keys, log_w)
    best = at["reward"].argmax(1)
    chosen = jnp.where(at_end, drawn, best) if cfg.output == "draw" else best
    one = lambda a: pick(a, chosen[:, None])[:, 0]
    new = {"noise": noise, "x": at["x"], "log_w": log_w, "carry": at["carry"],
           "spent": at["spent"], "log_z": log_z, "best": one(noise),
           "best_reward": one(at["reward"]),
           "best_step": jnp.full(chosen.shape, state["updates"], jnp.int32)}
    kept = {name: jnp.where(done, state[name], value) for name, value in new.items()}
    return {**kept, "updates": state["updates"] + 1}, {
        "train/reward": jnp.where(share > 0, share * rewards, 0.0).sum(1),
        "train/best_reward": kept["best_reward"],
        "train/ess": ess, "train/log_z": kept["log_z"]}

  return Method(init=init, collect=collect, update=update, product=lambda state: state["best"],
                cost=lambda batch: cost(models, cfg, batch))


def cost(models: Models, cfg: Config, batch: int) -> dict[str, int]:
  """Evaluations per update of one sample and one guidance branch, mean over a run's updates."""
  rows, updates = batch * cfg.particles, cfg.points + 1
  calls = rows * (models.sampler.steps + cfg.points) / updates
  return {"denoiser_forward": round(calls * models.branches), "denoiser_backward": 0,
          "decodes": rows, "reward_queries": rows, "reward_gradients": 0}
