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
from jaxalign.errors import UserError
from jaxalign.methods import Method, Models
from jaxalign.methods.shared import particles


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
  beta = particles.strength(models, cfg)

  def segment(state):
    stage = jnp.minimum(state["updates"], cfg.points)
    done = state["updates"] > cfg.points
    return jnp.where(done, steps, edges[stage]), edges[stage + 1], done

  def init(key, frozen, batch):
    state = particles.begin(models, key, batch, count)
    each = jnp.zeros_like(state["log_w"])
    start = jnp.full_like(each, -jnp.inf) if cfg.potential == "max" else each
    return {**state, "carry": start, "spent": each}

  def collect(state, frozen, batch, key):
    start, stop, _ = segment(state)
    rows = particles.repeated(batch, count)
    noise = jnp.moveaxis(particles.together(state["noise"])[:, 1:], 1, 0)
    x = models.rollout(None, frozen, rows, key, x_init=particles.together(state["x"]), start=start,
                       stop=stop, noise=noise).latents[stop]

    def clean(x):
      t = models.sampler.at("timesteps", jnp.minimum(stop, steps - 1))
      return models.schedule.to_x0(models.output(None, frozen, x, t, rows["conditioning"]), x, t)
    images = models.decode(frozen["decoder"], jax.lax.cond(stop < steps, clean, lambda x: x, x))
    return {"batch": batch, "images": images, "x": particles.apart(x, count)}

  def update(state, frozen, experience, rewards, key):
    _, stop, done = segment(state)
    at_end = stop == steps
    keys = particles.keys_of(key, experience["batch"])
    rewards = particles.numbers(rewards, count)
    added, carry = increment(cfg, beta * rewards, state["carry"], state["spent"], at_end)
    added = jnp.where(jnp.isnan(added), -jnp.inf, added)             # of a particle dead before
    found = particles.weigh(state["log_w"] + added, cfg.ess, at_end, keys)
    # Dead ones have spent nothing: where a whole group was, it goes on.
    spent = state["spent"] + jnp.where(jnp.isneginf(added), 0.0, added)
    at = {"x": experience["x"], "carry": carry, "spent": spent, "reward": rewards}
    at = {name: particles.pick(value, found.index) for name, value in at.items()}
    reward = at.pop("reward")
    chosen = particles.winner(cfg.output, found.log_w, reward, at_end, keys)
    state = particles.advance(state, done, chosen, reward, {
        **at, "log_w": found.log_w, "log_z": state["log_z"] + found.log_z,
        "noise": particles.inherit(state["noise"], found.index, stop)})
    return state, {"train/reward": particles.mean_reward(found.share, rewards),
                   "train/best_reward": state["best_reward"],
                   "train/ess": found.ess, "train/log_z": state["log_z"]}

  return Method(init=init, collect=collect, update=update, product=lambda state: state["best"],
                cost=lambda batch: cost(models, cfg, batch))


def cost(models: Models, cfg: Config, batch: int) -> dict[str, int]:
  """Evaluations per update of one sample and one guidance branch, mean over a run's updates."""
  rows, updates = batch * cfg.particles, cfg.points + 1
  calls = rows * (models.sampler.steps + cfg.points) / updates
  return {"denoiser_forward": round(calls * models.branches), "denoiser_backward": 0,
          "decodes": rows, "reward_queries": rows, "reward_gradients": 0}
