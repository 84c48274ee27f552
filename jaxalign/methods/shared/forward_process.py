"""What NFT, AWM and RAM share: reinforcement on the forward process, from outputs alone.

Only the sampler's output and its reward are kept. It is noised again, in closed form, and the
network regresses. With y the target of `x_t = alpha x_0 + sigma eps` in the network's own output:

  sample x_0 with the policy, or its lagged copy "old", by any sampler              (collect)
  A = (R - baseline of the prompt's group) / scale                                  (advantages)
  levels t, one a stratum of the sampler's; eps; x_t and y for each                 (draw)
  theta <- AdamW on the mean of the method's own `row_loss`, a few times            (update)
  old   <- d_n old + (1 - d_n) theta, n optimiser steps so far                      (old_decay)

All three push the output along `E_old[A (y - o_old) | x_t]`, the tangent of the exponential tilt
(`d/d lam E_lam[y | x] = Cov_lam(R, y | x)` for `p_lam ~ p exp(lam R)`) where the network's output
is the mean target of its own samples. They differ in step length, anchor and weight of the levels.
No likelihood and no noise of a sampler is needed, and no gradient of the reward.
"""
import dataclasses
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.config.fields import Count, Fraction, NonNegative, Range, Whole, check
from jaxalign.config.schema import OptimConfig
from jaxalign.devices import rng
from jaxalign.errors import UserError
from jaxalign.methods import Method, Models
from jaxalign.methods.shared.optimizer import Learner, accumulated_gradients

LEAST_SIGMA = 0.02         # below it a level says nothing of the image that eps would not drown


class Row(NamedTuple):
  """What `row_loss` sees of R noised outputs beside the policy's output; constants.

  Attributes:
    target: y, `[R, ...]`. adv: `[R]`, clipped. sigma: `[R]`, the level.
    unit: `[R]`, what an error of the output is multiplied by to be one of the clean estimate, at
      most 1: sigma for flow and v, `min(sigma / alpha, 1)` for eps, 1 for x0.
    old, ref, start: outputs `[R, ...]` of the lagged policy, of the reference and of the policy
      before this batch, or None where the config does not read them.
  """
  target: Any
  adv: Any
  sigma: Any
  unit: Any
  old: Any = None
  ref: Any = None
  start: Any = None


@dataclasses.dataclass(frozen=True)
class Config:
  """Keys of the `method` group that all three share.

  Attributes:
    group: images of each prompt in a batch, side by side.
    baseline: of a group: "mean", "loo" (mean of the others, which does not shrink the signal by
      `1 / group`), or "min" (no advantage is negative).
    advantage_scale: what `R - baseline` is divided by: "fixed" (the reward's standard deviation
      within prompts of the base model: the only scale that leaves a tilt to name), "batch_std" or
      "prompt_std" (of this batch, of this group; their pull does not fade as the policy narrows).
    advantage_clip: c > 0, A is clipped to +- this.
    levels: noised copies of each output, one in each of so many equal ranges of the sampler's
      levels with sigma of at least 0.02.
    minibatches: optimiser steps per batch.
    old_rate, old_cap, old_flat: decay of the lagged policy after n optimiser steps, once a batch:
      `min(old_rate (n - old_flat), old_cap)`, and 0 before `old_flat`.
    kl: weight >= 0 of `mean |o - o_ref|^2`, in the network's own output, alike at all levels.
  """
  group: Annotated[int, Range(2)] = 8
  baseline: Literal["mean", "loo", "min"] = "mean"
  advantage_scale: Literal["fixed", "batch_std", "prompt_std"] = "fixed"
  advantage_clip: NonNegative = 5.0
  levels: Count = 4
  minibatches: Count = 1
  old_rate: NonNegative = 0.001
  old_cap: Fraction = 0.5
  old_flat: Whole = 0
  kl: NonNegative = 0.0

  samples_with = "old"      # or "policy"
  reads_old = True
  reads_start = False
  delta = None              # what an update adds to the tilt at most, where there is such a number
  tilt_budget = 0.0         # where it ends, 0 for nowhere
  has_target = False        # whether `tilt` says of a `p_ref exp(beta R)` that is approached

  def __post_init__(self):
    check("method", self)
    if self.advantage_clip == 0:
      raise UserError("method.advantage_clip=0.0 leaves no advantage; it is above 0")

  @property
  def reads_ref(self) -> bool:
    return self.kl > 0

  def row_loss(self, out, row: Row):
    """The loss of each row without the KL, `[R]`, and metrics `{name: [R]}`.

    `out` are the policy's outputs; gradients go through them only.
    """
    raise NotImplementedError

  def tilt(self, state):
    """The tilt that is approached, in standard deviations of the reward on the base model."""
    raise NotImplementedError


def mean_square(x):
  """Mean over all but the first axis, `[R]`."""
  return jnp.square(x).mean(tuple(range(1, x.ndim)))


def advantages(cfg: Config, rewards, reward_std: float):
  """Advantages `[B]` f32 before clipping, groups side by side; 0 where the pool has no spread.

  Standard deviations are the population's. A reward plus a constant changes nothing.
  """
  pool = rewards.reshape(-1, cfg.group)
  base = {"mean": pool.mean(1, keepdims=True), "min": pool.min(1, keepdims=True),
          "loo": (pool.sum(1, keepdims=True) - pool) / (cfg.group - 1)}[cfg.baseline]
  scale = {"fixed": jnp.full((1, 1), reward_std), "batch_std": pool.std(keepdims=True),
           "prompt_std": pool.std(1, keepdims=True)}[cfg.advantage_scale]
  spread = scale > 1e-5 * jnp.abs(pool).max()                # less of it is rounding
  return jnp.where(spread, (pool - base) / jnp.where(spread, scale, 1.0), 0.0).reshape(-1)


def old_decay(cfg: Config, updates):
  """Share of the lagged policy that stays, after so many optimiser steps."""
  return jnp.clip(cfg.old_rate * (updates - cfg.old_flat), 0.0, cfg.old_cap)


def usable_levels(sampler) -> np.ndarray:
  """Indices of the sampler's levels that are trained on."""
  return np.flatnonzero(sampler.sigma >= LEAST_SIGMA)


def draw(models: Models, cfg: Config, x_0, batch, key):
  """Noised outputs: `x_0, noise [B, L, ...]`, `t [B, L]` and `conditioning` of L levels each."""
  usable = usable_levels(models.sampler)
  keys = rng.per_sample(key, batch["sample_ids"])
  edges = np.linspace(0, len(usable), cfg.levels + 1).round().astype(np.int32)
  index = jax.vmap(lambda k: jax.random.randint(
      jax.random.fold_in(k, cfg.levels), (cfg.levels,), edges[:-1], edges[1:]))(keys)
  noise = jnp.stack([rng.normal_per_sample(keys, models.latent_shape, i)
                     for i in range(cfg.levels)], 1)
  each = lambda a: jnp.broadcast_to(a[:, None], a.shape[:1] + (cfg.levels,) + a.shape[1:])
  return {"x_0": each(x_0), "noise": noise,
          "t": models.sampler.at("timesteps", jnp.asarray(usable)[index]),
          "conditioning": jax.tree.map(each, batch["conditioning"])}


def loss(models: Models, cfg: Config, policy, others, frozen, rows):
  """The loss of R noised outputs, a scalar, and metrics.

  Args:
    policy: what is trained. others: `{"old", "start"}`, policies that are constant here.
    rows: `x_0`, `noise [R, ...]`, `t`, `adv [R]`, `conditioning`.
  """
  schedule, t = models.schedule, rows["t"]
  alpha, sigma = schedule.levels(t)
  (_, to_clean), _ = schedule.coefficients(jnp.maximum(alpha, 1e-6), sigma)
  x_t = schedule.add_noise(rows["x_0"], rows["noise"], t)
  run = lambda policy: models.output(policy, frozen, x_t, t, rows["conditioning"])
  constant = lambda policy: jax.lax.stop_gradient(run(policy))
  out = run(policy)
  row = Row(target=schedule.target(rows["x_0"], rows["noise"], t), adv=rows["adv"], sigma=sigma,
            unit=jnp.minimum(jnp.abs(to_clean), 1.0),
            old=constant(others["old"]) if cfg.reads_old else None,
            ref=constant(None) if cfg.reads_ref else None,
            start=constant(others["start"]) if cfg.reads_start else None)
  each, metrics = cfg.row_loss(out, row)
  parts = {"policy": each.mean()}
  if cfg.kl:
    parts["kl"] = cfg.kl * mean_square(out - row.ref).mean()
  metrics = {name: value.mean() for name, value in metrics.items()}
  sampled = out if row.old is None else row.old
  metrics["train/defect"] = jnp.abs((row.target - sampled).mean(0)).mean()
  if row.old is not None:
    metrics["train/old_gap"] = mean_square(out - row.old).mean()
  if row.ref is not None:
    metrics["train/ref_gap"] = mean_square(out - row.ref).mean()
  total = sum(parts.values())
  return total, {"loss/total": total, **{f"loss/{k}": v for k, v in parts.items()}, **metrics}


def make(models: Models, cfg: Config, optim: OptimConfig) -> Method:
  """The method whose config `cfg` is.

  Raises:
    UserError: more levels than the sampler has.
  """
  usable = len(usable_levels(models.sampler))
  if cfg.levels > usable:
    raise UserError(f"method.levels={cfg.levels} exceeds the {usable} levels of the sampler with "
                    f"sigma >= {LEAST_SIGMA}: set sample.steps higher")
  learner = Learner(optim)

  def init(key, frozen, batch):
    policy = models.init_policy(key, frozen)
    state = {**learner.init(policy), "old": jax.tree.map(jnp.copy, policy)}
    return {**state, "tilt": jnp.zeros(())} if cfg.delta is not None else state

  def collect(state, frozen, batch, key):
    sampled = models.rollout(state[cfg.samples_with], frozen, batch, key)
    return {"final": sampled.final, "batch": batch}

  def update(state, frozen, experience, rewards, key):
    raw = advantages(cfg, rewards, models.reward_std)
    adv = jnp.clip(raw, -cfg.advantage_clip, cfg.advantage_clip)
    pool = rewards.reshape(-1, cfg.group)
    metrics = {"train/mixed_groups": (jnp.ptp(pool, axis=1) > 0).mean(),
               "train/advantage_clipped": (jnp.abs(raw) > cfg.advantage_clip).mean()}
    keep = old_decay(cfg, state["updates"] + cfg.minibatches)
    share, tilt = jnp.ones(()), {}
    if cfg.delta is not None:
      most = cfg.delta * (1 - keep)
      if cfg.tilt_budget:
        share = jnp.clip((cfg.tilt_budget - state["tilt"]) / most, 0.0, 1.0)
      tilt["tilt"] = metrics["train/tilt"] = state["tilt"] + share * most
    rows = draw(models, cfg, experience["final"], experience["batch"], key)
    rows["adv"] = jnp.broadcast_to((share * adv)[:, None], rows["t"].shape)
    others = {"old": state["old"], "start": state["policy"]}

    def grads_of(policy, rows, key):
      flat = jax.tree.map(lambda a: a.reshape((-1,) + a.shape[2:]), rows)
      (_, metrics), gradient = jax.value_and_grad(
          lambda p: loss(models, cfg, p, others, frozen, flat), has_aux=True)(policy)
      return gradient, metrics

    def step(before, rows):
      gradient, metrics = accumulated_gradients(
          grads_of, before["policy"], rows, key, optim.accumulate)
      metrics["train/grad_norm"] = optax.tree.norm(gradient)
      return learner.step(before, gradient), metrics
    # Interleaved, so that each device keeps rows of its own shard in every minibatch.
    split = jax.tree.map(
        lambda a: a.reshape((-1, cfg.minibatches) + a.shape[1:]).swapaxes(0, 1), rows)
    learned, logged = jax.lax.scan(step, learner.own(state), split)
    old = jax.tree.map(lambda a, b: keep * a + (1 - keep) * b, state["old"], learned["policy"])
    # With the budget spent there is nothing to learn, and no stale momentum to follow.
    new = jax.tree.map(lambda a, b: jnp.where(share > 0, a, b), {**learned, "old": old},
                       {**learner.own(state), "old": state["old"]})
    return {**state, **new, **tilt}, {**jax.tree.map(lambda a: a.mean(), logged), **metrics}

  tilt = lambda state: cfg.tilt(state) / models.reward_std
  return Method(init=init, collect=collect, update=update, product=learner.product,
                cost=lambda batch: cost(models, cfg, batch),
                tilt=tilt if cfg.has_target else None)


def cost(models: Models, cfg: Config, batch: int) -> dict[str, int]:
  """Evaluations per update of one sample and one guidance branch."""
  trained = batch * cfg.levels * models.branches
  sampled = batch * models.sampler.steps * models.branches
  forwards = 1 + cfg.reads_old + cfg.reads_ref + cfg.reads_start
  return {"denoiser_forward": sampled + trained * forwards, "denoiser_backward": trained,
          "decodes": 0, "reward_queries": 0, "reward_gradients": 0}
