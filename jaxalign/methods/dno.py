"""Direct noise optimisation: no weight is trained, each image's own noise climbs the reward.

`z` is the noise that the sampler consumes, `M(z)` the image it makes, `N(0, I)` the prior:

  z_0 ~ N(0, I), one for each image asked for
  repeat
    r = R(M(z))
    g = J^T grad R       first_order: through all sampler steps; otherwise estimated   (collect)
    g = g + sum_i gamma_i grad S_i(z)      S_i says how far z is from noise
    keep z if its r is the best so far and z is still noise
    z <- Adam on g, each image's g clipped on its own                                  (update)

Without a regulariser and with plain steps of size l, n of them reach the KL-tilted optimum
`p exp(n l R)` for a linear reward and a linear sampler; a curved one is over-optimised if the climb
goes on. What `S_i` sees is in `shared/noise.py`.

Tang et al. 2024, "Inference-Time Alignment of Diffusion Models with Direct Noise Optimization",
algorithm 1 and section 5 (estimators). Implemented from the paper.
"""
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxalign.config.fields import Count, Fraction, NonNegative, Whole, check
from jaxalign.config.schema import OptimConfig
from jaxalign.devices import rng
from jaxalign.errors import UserError
from jaxalign.methods import Method, Models
from jaxalign.methods.shared.noise import (
  draw,
  generate,
  kl_from_start,
  live_vectors,
  norm_score,
  permutations,
  prno,
  prno_per_vector,
  spectrum_score,
)
from jaxalign.methods.shared.optimizer import learning_rate


@dataclasses.dataclass(frozen=True)
class Config:
  """Keys of the `method` group.

  Attributes:
    noise: "all" vectors that the sampler consumes are optimised, or the "first" (x_0) only.
    gradient: "first_order" for a differentiable reward; for a black box "hybrid2" (probes in
      noise, differences in images), "hybrid1" (probes in images) or "zo" (no backward pass).
    probes: q, perturbed images per image and step, of the three estimators.
    mu: their perturbation, in standard deviations of the noise (hybrid1: in [0, 1] pixel units).
    prno: weight of the regulariser of all noise as one vector, reward units per nat; prno_vector:
      of each vector on its own. norm, drift, spectrum: weights of `norm_score`, of minus
      `kl_from_start` and of `spectrum_score`. 0 is off.
    block, permutations: k, at most the size of one vector, and b of prno.
    clamp: score images in [0, 1]. False is the paper's form and lets pixels leave that range.
    keep_best: the result is the best-scored noise of the run, otherwise the last that was scored.
    min_p: noise whose `Prno.p` is below this is never kept as the best; 0 keeps any.
    rival: also take the best of N samples of each image at the same number of denoiser calls, and
      report them beside.
    patience: an image rests after this many steps without a new best; 0 is never.
    remat: what the backward pass recomputes: "full" (every step), "dots" or "none".
  """
  noise: Literal["all", "first"] = "all"
  gradient: Literal["first_order", "hybrid2", "hybrid1", "zo"] = "first_order"
  probes: Count = 8
  mu: NonNegative = 0.01
  prno: NonNegative = 1.0
  prno_vector: NonNegative = 1.0
  norm: NonNegative = 0.0
  drift: NonNegative = 0.0
  spectrum: NonNegative = 0.0
  block: Count = 4
  permutations: Count = 8
  clamp: bool = True
  keep_best: bool = True
  min_p: Fraction = 1e-4
  rival: bool = False
  patience: Whole = 0
  remat: Literal["full", "dots", "none"] = "full"

  at_inference = True
  without_gradients = ("choose method.gradient='hybrid2', 'hybrid1' or 'zo', or "
                       "configs/best_of_n.py")

  @property
  def reward_gradients(self) -> bool:
    return self.gradient == "first_order"

  def __post_init__(self):
    check("method", self)
    if self.mu == 0:
      raise UserError("method.mu=0.0 perturbs nothing; it is above 0")
    if not self.clamp and self.gradient != "first_order":
      raise UserError(f"method.clamp=False needs method.gradient='first_order', not "
                      f"{self.gradient!r}: a black box scores 8-bit images")


# What the published scripts compute, argument of the recipe; it also sets optim.weight_decay.
PRESETS: dict[str, dict[str, Any]] = {
    "release": dict(prno=1.0, prno_vector=0.0, permutations=100, clamp=False, keep_best=False,
                    min_p=0.0),
}


# ------------------------------------------------------------------ estimators


def reward_direction(rewards, directions, mu: float):
  """`1/q sum_i (r_i - r_0) / mu * directions_i`: a gradient from differences of rewards.

  Args:
    rewards: `[B, 1+q]`, first of the image itself, then of its probes.
    directions: `[B, q, ...]`: the unit normal probe (zo, hybrid1), or what an image moves by, over
      mu (hybrid2).
  Returns:
    `[B, ...]`. Expectation for a quadratic reward: zo `J^T grad R`, hybrid1 `grad R`, hybrid2
    `J J^T grad R`, J that of M. Tied rewards give 0.
  Reference: Tang et al. 2024, section 5, with the 1/mu that makes it a gradient.
  """
  slope = (rewards[:, 1:] - rewards[:, :1]) / mu
  return jnp.einsum("bq,bq...->b...", slope, directions) / directions.shape[1]


def probe(cfg: Config, image_of: Callable, z, keys):
  """The images `[B, 1+q, H, W, 3]` that an estimator scores, and their `directions [B, q, ...]`.

  Args:
    image_of: `[B, n, ...]` noise -> `[B, n, H, W, 3]` images.
    z: `[B, V, ...]`. keys: `[B]`, one a row, so that a row does not depend on its neighbours.
  """
  if cfg.gradient == "hybrid1":
    image = image_of(z[:, None])
    xi = rng.normal_per_sample(keys, (cfg.probes,) + image.shape[2:])
    return jnp.concatenate([image, jnp.clip(image + cfg.mu * xi, 0.0, 1.0)], 1), xi
  xi = rng.normal_per_sample(keys, (cfg.probes,) + z.shape[1:])
  images = image_of(jnp.concatenate([z[:, None], z[:, None] + cfg.mu * xi], 1))
  if cfg.gradient == "zo":
    return images, xi
  return images, (images[:, 1:] - images[:, :1]) / cfg.mu


# ------------------------------------------------------------------ regularisation


def regularization(cfg: Config, z, start, key):
  """`sum_i gamma_i S_i(z)` of each row, and what to log about it.

  Args:
    z, start: `[B, V, h, w, c]` noise now and at the beginning.
    key: draws the permutations, the same ones for all rows.
  Returns:
    `[B]` reward units, at most 0; `{name: [B]}`.
  """
  # Channel by channel, as the published code numbers them: blocks of the natural order are then
  # neighbours in a row, and smooth rows are seen.
  flat = jnp.moveaxis(z, -1, 2).reshape(z.shape[:2] + (-1,))
  all_key, vector_key = jax.random.split(key)
  joint = prno(flat.reshape(z.shape[0], -1),
               permutations(all_key, cfg.permutations, flat[0].size), cfg.block)
  vector = prno_per_vector(
      flat, permutations(vector_key, cfg.permutations, flat.shape[2]), cfg.block)
  drift = kl_from_start(z, start)
  total = cfg.prno * joint.score + cfg.prno_vector * vector.score - cfg.drift * drift
  logs = {"noise/prno": joint.score, "noise/prno_vector": vector.score,
          "noise/p": joint.p, "noise/p_min": joint.p_min, "noise/p_vector": vector.p,
          "noise/mean_hinge": joint.mean_hinge, "noise/second_hinge": joint.second_hinge,
          "noise/mean_hinge_vector": vector.mean_hinge,
          "noise/second_hinge_vector": vector.second_hinge,
          "noise/drift": drift, "noise/mean_square": jnp.square(flat).mean((1, 2))}
  if cfg.norm:
    logs["noise/norm"] = norm_score(flat)
    total += cfg.norm * logs["noise/norm"]
  if cfg.spectrum:
    logs["noise/spectrum"] = spectrum_score(z)
    total += cfg.spectrum * logs["noise/spectrum"]
  return total, logs


def clip_rows(gradient, most: float):
  """Each row of `[B, ...]` scaled to a norm of at most `most` (0: as it is), and the norms `[B]`.

  A row whose norm is not finite becomes 0, as that is what it can teach.
  """
  size = jnp.sqrt(jnp.square(gradient).sum(tuple(range(1, gradient.ndim))))
  factor = jnp.minimum(1.0, most / jnp.maximum(size, 1e-30)) if most else jnp.ones_like(size)
  per_row = lambda a: a.reshape((-1,) + (1,) * (gradient.ndim - 1))
  return jnp.where(per_row(jnp.isfinite(size)), gradient * per_row(factor), 0.0), size


def make(models: Models, cfg: Config, optim: OptimConfig) -> Method:
  """DNO as a Method at inference.

  Raises:
    UserError: blocks larger than a vector of noise, or optimiser keys that mean nothing here.
  """
  if optim.ema or optim.accumulate > 1:
    raise UserError("optim.ema and optim.accumulate are for weights; noise has neither an average "
                    "nor micro-batches (sample.batch is the number of images at a time)")
  size = math.prod(models.latent_shape)
  if cfg.block > size:
    raise UserError(f"method.block={cfg.block} exceeds the {size} numbers of a vector of noise")
  live = live_vectors(models.sampler, cfg.noise)
  optimizer = optax.adamw(learning_rate(optim), optim.b1, optim.b2, optim.eps,
                          weight_decay=optim.weight_decay)

  def complete(state, z):
    """All noise of the sampler `[B, 1+T, ...]` with `z [B, V, ...]` in its place."""
    return state["start"].at[:, live].set(z)

  def init(key, frozen, batch):
    start = draw(models, key, batch["sample_ids"])
    z = start[:, live]
    rows = lambda value, dtype: jnp.full(z.shape[:1], value, dtype)
    return {"start": start, "z": z, "optimizer": optimizer.init(z), "best": z,
            "best_reward": rows(-jnp.inf, jnp.float32), "best_step": rows(0, jnp.int32),
            "stale": rows(0, jnp.int32), "updates": jnp.asarray(0, jnp.int32)}

  def collect(state, frozen, batch, key):
    if cfg.gradient == "first_order":
      return {"batch": batch}                       # scored where it is differentiated

    def image_of(z):
      many = jnp.repeat(state["start"][:, None], z.shape[1], 1).at[:, :, live].set(z)
      conditioning = jax.tree.map(lambda a: jnp.repeat(a, z.shape[1], axis=0),
                                  batch["conditioning"])
      images = generate(models, frozen, many.reshape((-1,) + many.shape[2:]), conditioning)
      return images.reshape(z.shape[:2] + images.shape[1:])
    images, directions = probe(cfg, image_of, state["z"],
                               rng.per_sample(key, batch["sample_ids"]))
    return {"batch": batch, "images": images.reshape((-1,) + images.shape[2:]),
            "directions": directions}

  def ascent(state, frozen, experience, rewards):
    """Reward `[B]` and its gradient `[B, V, ...]`, exact or estimated."""
    z, batch = state["z"], experience["batch"]
    image_of = lambda z: generate(models, frozen, complete(state, z), batch["conditioning"],
                                  remat=cfg.remat, clamp=cfg.clamp)
    if cfg.gradient == "first_order":
      def score(z):
        reward = models.score(frozen["reward"], image_of(z), batch["prepared"])
        return reward.sum(), reward
      (_, reward), gradient = jax.value_and_grad(score, has_aux=True)(z)
      return reward, gradient
    rewards = rewards.reshape(z.shape[0], -1)
    direction = reward_direction(rewards, experience["directions"], cfg.mu)
    if cfg.gradient == "zo":
      return rewards[:, 0], direction
    return rewards[:, 0], jax.vjp(image_of, z)[1](direction)[0]

  def update(state, frozen, experience, rewards, key):
    z, updates = state["z"], state["updates"]
    per_row = lambda a: a.reshape((-1,) + (1,) * (z.ndim - 1))
    reward, gradient = ascent(state, frozen, experience, rewards)

    def penalty(z):
      score, logs = regularization(cfg, z, state["start"][:, live], key)
      return score.sum(), (score, logs)
    (_, (score, logs)), away = jax.value_and_grad(penalty, has_aux=True)(z)
    gradient, size = clip_rows(gradient + away, optim.clip_norm)

    resting = (state["stale"] >= cfg.patience) & (cfg.patience > 0)
    better = (reward > state["best_reward"]) & (logs["noise/p"] >= cfg.min_p) & ~resting
    kept = better if cfg.keep_best else jnp.isfinite(reward) & ~resting
    best = jnp.where(per_row(kept), z, state["best"])
    best_reward = jnp.where(better, reward, state["best_reward"])

    step, opt_state = optimizer.update(-gradient, state["optimizer"], z)
    moves = jnp.isfinite(size) & jnp.isfinite(reward) & ~resting
    state = dict(
        state, z=jnp.where(per_row(moves), z + step, z), optimizer=opt_state, best=best,
        best_reward=best_reward, best_step=jnp.where(kept, updates, state["best_step"]),
        stale=jnp.where(better, 0, state["stale"] + 1), updates=updates + 1)
    return state, {"loss/total": -(reward + score), "train/reward": reward,
                   "train/best_reward": best_reward, "train/grad_norm": size,
                   "train/active": moves.astype(jnp.float32), **logs}

  return Method(init=init, collect=collect, update=update,
                product=lambda state: complete(state, state["best"]),
                cost=lambda batch: cost(models, cfg, batch))


def cost(models: Models, cfg: Config, batch: int) -> dict[str, int]:
  """Evaluations per update of one sample and one guidance branch."""
  calls = batch * models.sampler.steps * models.branches
  first_order = cfg.gradient == "first_order"
  backward = int(cfg.gradient != "zo")
  samples = backward                                  # what is differentiated is sampled anew
  if not first_order:
    samples += 1 if cfg.gradient == "hybrid1" else 1 + cfg.probes
  return {"denoiser_forward": calls * samples, "denoiser_backward": calls * backward,
          "decodes": batch * samples,
          "reward_queries": batch * (1 if first_order else 1 + cfg.probes),
          "reward_gradients": batch * first_order}
