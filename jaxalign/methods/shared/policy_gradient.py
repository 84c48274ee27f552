"""Policy gradients: denoising as a decision process whose reward comes with the last step.

Every sampler step `x_{k+1} ~ N(a_k x_k - b_k o_theta, s_k^2 I)`, o the network's output, is an
action, so a reward of the sampler's output trains the policy without a gradient of its own: it may
be a black box or a yes/no rule. `ddpo.py` is this file with its default options (Black et al. 2023,
"Training Diffusion Models with Reinforcement Learning"); `b2_diffurl.py`, `dpok.py` and
`flow_grpo.py` set others. Implemented from the equations.

One update:

  [start, stop): steps to train, from the interval schedule
  roots x_0..x_start, then `group` branches of each, x_start..x_T       (collect; `branch`)
  A: reward of each output against its prompt, batch or group           (advantages)
  keep the samples worth training on                                    (select)
  repeat inner_epochs x minibatches times, for the steps start..stop-1 of the kept samples:
    rho = [p_theta(x_{k+1} | x_k) / p_sampling(x_{k+1} | x_k)]^(1/D)    (log_ratio)
    theta <- AdamW on max(-A rho, -A clip(rho, 1 - c, 1 + c)) + kl KL_k / D             (loss)
      KL_k = KL(p_theta(. | x_k) || p_ref(. | x_k)) = r_k^2 |o_theta - o_ref|^2 / 2

With `x_{k+1} = mu_sampling + s z` the log-ratio of one element is, in r = `Sampler.rate`,
`-r z (o_theta - o_sampling) - r^2 (o_theta - o_sampling)^2 / 2`. It is computed in this form from
the recorded noise: a difference of two log-densities would lose the digits that a clip range of
1e-4 needs.

With raw rewards and the exact KL of all steps the optimum is the reference's path tilted by
`exp(R / kl)` given its noise. The gradient of the KL has two parts, of which DPOK takes the first:
through the outputs at the states visited, and through the states, as a cost to go in A.
"""
import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.config.fields import MOST, Count, NonNegative, Range, Whole, check
from jaxalign.config.schema import OptimConfig
from jaxalign.errors import UserError
from jaxalign.methods import Method, Models
from jaxalign.methods.shared.advantages import (
  RAW,
  Advantage,
  Selection,
  advantages,
  centred_as,
  select,
)
from jaxalign.methods.shared.optimizer import Learner, accumulated_gradients
from jaxalign.sampling import guided, noisy_within

Gradient = Literal["local", "full"]
Form = Literal["nats", "flow_grpo", "dpok"]


@dataclasses.dataclass(frozen=True)
class Config:
  """Keys of the `method` group.

  Attributes:
    objective: "clip" (importance sampling, as above) or "score" (`-A log p_theta`, the score
      function estimator; right for one optimiser step per batch only, so it allows no more).
    clip_range: c >= 0, per latent element: rho is the D-th root of the probability ratio of a
      step, whose logarithm is then kept within about c D. Scale c by 1/D for other latent sizes:
      1e-4 for 64x64x4 (1.6 nats a step) is 6.4e-3 for 8x8x4.
    inner_epochs: passes over each batch. minibatches: optimiser steps per pass.
    group: trajectories of each prompt in a batch, side by side.
    branch: whether a group shares its initial noise and its steps before `start`; else its
      trajectories are independent.
    interval: which steps are trained, a name in `INTERVALS`: "full"; "early", the first steps;
      "grow", the last steps, ever more of them; "slide", a window that moves from noise to output;
      "random", a window anywhere. A last step without noise is none of them.
    interval_first, interval_last: length of the interval as a share of all steps, in (0, 1]: "grow"
      goes from first to last; "early" and windows have the first one.
    interval_within: in (0, 1], windows lie in this share of the steps, the first ones.
    noise: "all" steps have the sampler's noise, or those of the "interval" only: the others are
      Euler's (DDIM's without eta), from the same levels to the same.
    interval_stages: updates that a schedule takes; then it stays where it ends.
    step_weights: of the steps in the loss, with mean 1: "uniform", or "even", proportional to
      `1 / rate_k`, so that no step's log-density is more sensitive to the network's output than
      another's.
    advantage: "prompt" ((R - mean) / std of the prompt's rewards in this batch and in `history`),
      "batch" (the same over the whole batch); or within a group: "group_z" ((R - mean) / std),
      "group_batch" ((R - mean) / std of the batch), "group_center" (R - mean), "group_loo" (R -
      mean of the others; unbiased). A pool without spread gives 0.
    history: updates before this one whose rewards count for "prompt".
    min_count: fewer rewards of a prompt than this, and "prompt" takes the statistics of the batch.
    advantage_clip: A is clipped to +- this, in its own unit.
    select: "all"; "extremes" (best of a group if A >= `keep_above`, worst if A < `keep_below`,
      each for itself); "pairs" (the `pairs` best and as many worst of every group that has any
      spread, A centred on the mean of those kept: half the difference for one pair).
    keep_above, keep_below: in units of the advantage. pairs: at most half a group.
    ratio: "density", as above; "cps", times `2 std^2` (Flow-CPS' squared distances); or "guard",
      times `std` and without its quadratic part (GRPO-Guard). All are 0 together.
    kl: >= 0, weight of the KL to the reference, per unit of the advantage.
    kl_unit: with advantages in raw units ("group_center", "group_loo"): kl per standard deviation
      of the reward on the base model ("sigma"), or "raw". The other advantages are standardised.
    kl_gradient: "local", of the KL at the states visited; "full", with what is still to come of it
      taken off the advantages, which is the true gradient.
    kl_form: "nats", the KL; or what published code has in its place: "flow_grpo" (times
      `sigma_k - sigma_{k+1}`), "dpok" (`mean (o_theta - o_ref)^2`, no step's own factor).
    detach_uncond: whether the unconditional branch of guidance is left out of gradients.
  """
  objective: Literal["clip", "score"] = "clip"
  clip_range: NonNegative = 1e-4
  inner_epochs: Count = 1
  minibatches: Count = 1
  group: Count = 1
  branch: bool = False
  interval: str = "full"
  interval_first: float = 1.0
  interval_last: float = 1.0
  interval_within: float = 1.0
  interval_stages: Count = 100
  noise: Literal["all", "interval"] = "all"
  step_weights: Literal["uniform", "even"] = "uniform"
  advantage: Advantage = "prompt"
  history: Whole = 16
  min_count: Annotated[int, Range(2, MOST)] = 16     # one reward has no spread
  advantage_clip: NonNegative = 5.0
  select: Selection = "all"
  keep_above: float = 0.5
  keep_below: float = -0.5
  pairs: Count = 1
  ratio: Literal["density", "cps", "guard"] = "density"
  kl: NonNegative = 0.0
  kl_unit: Literal["sigma", "raw"] = "sigma"
  kl_gradient: Gradient = "local"
  kl_form: Form = "nats"
  detach_uncond: bool = False

  noise_at_every_step = True

  def __post_init__(self):
    check("method", self)
    if self.interval not in INTERVALS:
      raise UserError(f"method.interval={self.interval!r} is not one of {tuple(INTERVALS)}")
    if not 0 < self.interval_first <= self.interval_last <= 1:
      raise UserError(f"method.interval_first={self.interval_first} and method.interval_last="
                      f"{self.interval_last} must be in (0, 1], the first not above the last")
    if not 0 < self.interval_within <= 1:
      raise UserError(f"method.interval_within={self.interval_within} is outside (0, 1]")
    if self.interval_within < self.interval_first and self.interval in ("slide", "random"):
      raise UserError(f"method.interval_within={self.interval_within} has no room for windows of "
                      f"method.interval_first={self.interval_first}")
    if self.kl and self.kl_gradient == "full" and self.select != "all":
      raise UserError(f"method.kl_gradient='full' takes means over all samples: set method.select="
                      f"'all', not {self.select!r}, or method.kl_gradient='local'")
    if self.objective == "score" and self.inner_epochs * self.minibatches > 1:
      raise UserError("method.objective='score' allows one optimiser step per batch: set "
                      "method.inner_epochs=1 and method.minibatches=1, or method.objective='clip'")
    if self.keep_below > self.keep_above:
      raise UserError(f"method.keep_below={self.keep_below} exceeds method.keep_above="
                      f"{self.keep_above}")
    for key in ("advantage", "select"):
      if getattr(self, key).startswith(("group", "extremes", "pairs")) and self.group < 2:
        raise UserError(f"method.{key}={getattr(self, key)!r} compares trajectories of a prompt: "
                        "set method.group to 2 or more")
    if self.select == "pairs" and 2 * self.pairs > self.group:
      raise UserError(f"method.pairs={self.pairs} exceeds half of method.group={self.group}")


# ---- which steps are trained: (cfg, steps T, stage, key) -> (start, stop) ------------------------


def _length(share: float, steps: int) -> int:
  return max(1, round(share * steps))


def _full(cfg, steps, stage, key):
  return 0, steps


def _early(cfg, steps, stage, key):
  return 0, _length(cfg.interval_first, steps)


def _grow(cfg, steps, stage, key):
  """The last steps: `first + floor(stage (last - first + 1) / stages)` of them."""
  first, last = _length(cfg.interval_first, steps), _length(cfg.interval_last, steps)
  length = jnp.minimum(first + stage * (last - first + 1) // cfg.interval_stages, last)
  return steps - length, steps


def _window(cfg, steps):
  """Length of a window, and the last step that it may start at."""
  length = _length(cfg.interval_first, steps)
  return length, max(0, _length(cfg.interval_within, steps) - length)


def _slide(cfg, steps, stage, key):
  length, last = _window(cfg, steps)
  start = jnp.minimum(stage * (last + 1) // cfg.interval_stages, last)
  return start, start + length


def _random(cfg, steps, stage, key):
  length, last = _window(cfg, steps)
  start = jax.random.randint(key, (), 0, last + 1)
  return start, start + length


INTERVALS = {"full": _full, "early": _early, "grow": _grow, "slide": _slide, "random": _random}


def interval(cfg: Config, steps: int, stage, key):
  """The trained steps `[start, stop)` of update `stage`, as `[2]` int32; `stage` may be traced."""
  return jnp.stack([jnp.asarray(bound, jnp.int32)
                    for bound in INTERVALS[cfg.interval](cfg, steps, stage, key)])


def step_weights(cfg: Config, sampler, start, stop):
  """`[T]` f32 weights of the steps in the loss, with mean 1 over `[start, stop)`."""
  k = jnp.arange(sampler.steps)
  if cfg.step_weights == "uniform":
    return jnp.ones(sampler.steps)
  inside = (k >= start) & (k < stop)
  weights = jnp.where(inside, 1 / sampler.at("rate", k), 0.0)
  return weights * (stop - start) / weights.sum()


# ---- the loss ------------------------------------------------------------------------------------


def noisy_steps(sampler) -> int:
  """Steps that can be trained: all, or all but the last one where that has no noise.

  Raises:
    UserError: others have none either.
  """
  noisy = sampler.std > 0
  if not np.all(noisy[:-1]) or not noisy[0]:
    raise UserError("method.name: policy gradients need noise at every step but the last: set "
                    "sample.eta > 0 and a sample.kind that has noise")
  return int(noisy.sum())


def log_ratio(sampler, k, out, out_old, noise, form: str = "density"):
  """`log p_theta / p_sampling` of transitions, averaged over the latent elements, `[R]` f32.

  Args:
    k: `[R]` step indices. out, out_old: `[R, ...]` outputs of the network now and at sampling.
    noise: `[R, ...]` the injected noise z, `x_{k+1} = mu_sampling + s_k z`.
  Returns:
    0 where the outputs agree. Times D it is the log-ratio of the transition's density; its
    gradient at `out = out_old` is that of the mean log-density, `-rate_k mean(z d out)`. Other
    forms, see `Config.ratio`, are in the unit of their own clip range.
  """
  axes = tuple(range(1, out.ndim))
  rate, std = sampler.at("rate", k), sampler.at("std", k)
  delta = out - out_old
  linear = -rate * (noise * delta).mean(axes)
  if form == "guard":
    return std * linear
  exact = linear - 0.5 * jnp.square(rate) * jnp.square(delta).mean(axes)
  return exact if form == "density" else 2 * jnp.square(std) * exact


def step_kl(sampler, k, out, out_ref, form: str = "nats"):
  """KL of the policy's transition to the reference's, per latent element, `[R]` f32 >= 0.

  Other forms than "nats" are those of `Config.kl_form`.
  """
  square = jnp.square(out - out_ref).mean(tuple(range(1, out.ndim)))
  if form == "dpok":
    return square
  exact = 0.5 * jnp.square(sampler.at("rate", k)) * square
  if form == "flow_grpo":
    return (sampler.at("sigma", k) - sampler.at("sigma_next", k)) * exact
  return exact


def surrogate(objective: str, log_rho, adv, clip_range):
  """Loss of each transition, `[R]`: the clipped surrogate, or `-A log rho` for "score".

  Outside the clip range the gradient is zero where A pushes further out, and alive where it pulls
  back. At `log_rho = 0` the values are `-A` and 0, and both gradients `-A d log_rho`.
  Reference: Schulman et al. 2017, equation 7; Black et al. 2023, equations 3 and 4.
  """
  if objective == "score":
    return -adv * log_rho
  rho = jnp.exp(log_rho)
  return jnp.maximum(-adv * rho, -adv * jnp.clip(rho, 1 - clip_range, 1 + clip_range))


def loss(models: Models, cfg: Config, policy, frozen, rows, kl: float = 0.0):
  """The policy gradient loss of transitions.

  Args:
    policy: the trained tree; gradients go here only.
    rows: `k [R]`, `x_k [R, ...]`, `noise`, `out_old` (see `log_ratio`), `conditioning`, and `[R]`
      each: `adv`, clipped advantages; `weight`, >= 0 with mean 1, 0 for rows that do not count;
      `step_weight`, see `step_weights`. With a KL also `out_ref`, the reference's outputs.
    kl: its weight in the unit of `adv`.
  Returns:
    Scalar f32, the weighted mean of `surrogate` and KL; on the first optimiser step of a batch
    -mean(A) for "clip" and 0 for "score", where the policy is the reference. Metrics, means over
    the rows that count: `train/clip_fraction` in [0, 1], and in nats `train/update_kl`, the
    transition's `KL(p_sampling || p_theta)`, both 0 then, and `train/path_kl` to the reference.
  """
  sampler, k = models.sampler, rows["k"]
  t, conditioning = sampler.at("timesteps", k), rows["conditioning"]
  if cfg.detach_uncond and models.branches == 2:
    parts = guided(models.denoise, models.guidance)(
        models.combine(policy, frozen["base"]), rows["x_k"], t, conditioning)
    cond, uncond = (part.astype(jnp.float32) for part in parts[:2])
    uncond = jax.lax.stop_gradient(uncond)
    out = uncond + models.guidance * (cond - uncond)
  else:
    out = models.output(policy, frozen, rows["x_k"], t, conditioning)
  size = out[0].size
  log_rho = log_ratio(sampler, k, out, rows["out_old"], rows["noise"], cfg.ratio)
  each = surrogate(cfg.objective, log_rho, rows["adv"], cfg.clip_range)
  outside = (jnp.abs(jnp.exp(log_rho) - 1) > cfg.clip_range).astype(jnp.float32)
  metrics = {"train/clip_fraction": outside,
             "train/update_kl": size * step_kl(sampler, k, out, rows["out_old"])}
  if cfg.kl:
    each = each + kl * step_kl(sampler, k, out, rows["out_ref"], cfg.kl_form)
    metrics["train/path_kl"] = size * step_kl(sampler, k, out, rows["out_ref"])
  of_rows = lambda values: (rows["weight"] * values).mean()
  total = of_rows(rows["step_weight"] * each)
  return total, {"loss/total": total, **{name: of_rows(value) for name, value in metrics.items()}}


# ---- the method ----------------------------------------------------------------------------------


def deal(key, groups: int, minibatches: int, epochs: int):
  """Which groups each optimiser step takes, `[epochs * minibatches, groups / minibatches]` int32.

  Entry j is an index into the j-th block of `minibatches` neighbours. Each pass deals every block
  out at random: each group once a pass, and no group leaves its device.
  """
  order = jnp.broadcast_to(jnp.arange(minibatches), (epochs, groups // minibatches, minibatches))
  order = jax.random.permutation(key, order, axis=2, independent=True)
  return order.swapaxes(1, 2).reshape(epochs * minibatches, groups // minibatches)


def make(models: Models, cfg: Config, optim: OptimConfig) -> Method:
  """Policy gradients as a Method.

  Raises:
    UserError: a step without noise, the last one aside.
  """
  sampler = models.sampler
  steps, learner = noisy_steps(sampler), Learner(optim)
  kl = cfg.kl * (models.reward_std if cfg.advantage in RAW and cfg.kl_unit == "sigma" else 1.0)
  grouped = lambda a: a.reshape((-1, cfg.group) + a.shape[1:])

  def init(key, frozen, batch):
    key_policy, key_interval = jax.random.split(key)
    size, stage = batch["prompt_ids"].shape[0], jnp.zeros((), jnp.int32)
    state = {**learner.init(models.init_policy(key_policy, frozen)), "stage": stage,
             "interval": interval(cfg, steps, stage, key_interval)}
    if cfg.advantage == "prompt" and cfg.history:
      state["history"] = {"rewards": jnp.zeros((cfg.history, size)),
                          "prompt_ids": jnp.full((cfg.history, size), -1, jnp.int32)}
    return state

  def collect(state, frozen, batch, key):
    start, stop = state["interval"]
    drawn = models
    if cfg.noise == "interval":
      drawn = dataclasses.replace(
          models, sampler=noisy_within(models.schedule, sampler, start, stop))
    sample = lambda rows, **bounds: drawn.rollout(state["policy"], frozen, rows, key, **bounds)
    if cfg.branch:
      roots = sample(jax.tree.map(lambda a: grouped(a)[:, 0], batch), stop=start)
      # From here on each branch draws the noise of its own id.
      trajectory = sample(batch, start=start,
                          x_init=jnp.repeat(roots.latents[start], cfg.group, axis=0))
    else:
      trajectory = sample(batch)
    batch_first = lambda a: jnp.moveaxis(a, 0, 1)
    return {"final": trajectory.final, "latents": batch_first(trajectory.latents[:-1]),
            "out": batch_first(trajectory.out), "noise": batch_first(trajectory.noise),
            "batch": batch}

  def gradient_of(policy, frozen, rows, start, stop):
    """Gradient and metrics of some trajectories, rows `[n, T, ...]`: mean over steps and rows."""
    weights = step_weights(cfg, sampler, start, stop)
    every_row = lambda value: jnp.broadcast_to(value, rows["adv"].shape)

    def grads_of(policy, rows, key):
      (_, metrics), gradient = jax.value_and_grad(
          lambda p: loss(models, cfg, p, frozen, rows, kl), has_aux=True)(policy)
      return gradient, metrics

    def at_step(k):
      pick = lambda a: jax.lax.dynamic_index_in_dim(a, k, 1, keepdims=False)
      here = {"k": every_row(k), "x_k": pick(rows["latents"]), "noise": pick(rows["noise"]),
              "out_old": pick(rows["out"]), "step_weight": every_row(weights[k]),
              **{name: rows[name] for name in ("adv", "weight", "conditioning")}}
      if cfg.kl:
        here["out_ref"] = pick(rows["out_ref"])
      if "to_come" in rows:
        here["adv"] = here["adv"] - pick(rows["to_come"])
      return accumulated_gradients(grads_of, policy, here, jax.random.key(0), optim.accumulate)

    # The bounds are traced: one program serves every interval, and costs what the interval costs.
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(at_step, 0))
    total = jax.lax.fori_loop(
        start, stop, lambda k, total: jax.tree.map(jnp.add, total, at_step(k)), zeros)
    gradient, metrics = jax.tree.map(lambda a: a / (stop - start), total)
    for name in {"train/update_kl", "train/path_kl"} & metrics.keys():
      metrics[name] = metrics[name] * (stop - start)
    return gradient, metrics

  def referred(rows, frozen, start, stop):
    """`rows [R, S, T, ...]` with what the reference outputs there, and the KL that is to come."""
    latents = rows["latents"]
    flat = lambda a: a.reshape((-1,) + a.shape[2:])
    every = jax.tree.map(flat, rows["conditioning"])

    def at_step(k, out):
      x_k = flat(latents)[:, k]
      here = models.output(None, frozen, x_k, sampler.at("timesteps", k), every)
      return out.at[:, k].set(here)
    out_ref = jax.lax.fori_loop(start, stop, at_step, jnp.zeros_like(flat(latents)))
    rows = dict(rows, out_ref=out_ref.reshape(latents.shape))
    if cfg.kl_gradient == "full":
      each = jax.vmap(lambda k, out, ref: step_kl(sampler, k, out, ref, cfg.kl_form), (0, 1, 1), 1)
      ks = jnp.arange(sampler.steps)
      inside = (ks >= start) & (ks < stop)
      spent = jnp.where(inside[None], each(jnp.minimum(ks, steps - 1), flat(rows["out"]), out_ref),
                        0.0)
      left = jnp.cumsum(spent[:, ::-1], 1)[:, ::-1] - spent                         # j > k
      # The advantage of a step is worth 1 / D of its log-density, as the KL is a mean over D.
      cost = kl * latents[0, 0, 0].size * left
      rows["to_come"] = jax.vmap(
          lambda values: centred_as(cfg, values), 1, 1)(cost).reshape(latents.shape[:3])
    return rows

  def update(state, frozen, experience, rewards, key):
    key_deal, key_interval = jax.random.split(key)
    start, stop = state["interval"]
    prompt_ids = experience["batch"]["prompt_ids"]
    adv = advantages(cfg, rewards, prompt_ids, state.get("history"))
    index, adv, kept = select(cfg, adv)
    choose = lambda a: jnp.take_along_axis(
        grouped(a), index.reshape(index.shape + (1,) * (a.ndim - 1)), axis=1)
    rows = {name: choose(experience[name]) for name in ("latents", "out", "noise")}
    rows.update(conditioning=jax.tree.map(choose, experience["batch"]["conditioning"]), kept=kept,
                adv=jnp.clip(adv, -cfg.advantage_clip, cfg.advantage_clip))     # all [R, S, ...]
    if cfg.kl:
      rows = referred(rows, frozen, start, stop)

    def step(before, dealt):
      """One optimiser step on some of the groups."""
      def take(a):
        blocks = a.reshape((-1, cfg.minibatches) + a.shape[1:])
        chosen = jnp.take_along_axis(blocks, dealt.reshape((-1,) + (1,) * a.ndim), axis=1)
        return chosen.reshape((-1,) + a.shape[2:])
      part = jax.tree.map(take, rows)
      count = part["kept"].sum()
      part["weight"] = part["kept"] * (part["kept"].size / jnp.maximum(count, 1))
      gradient, metrics = gradient_of(before["policy"], frozen, part, start, stop)
      metrics["train/grad_norm"] = optax.tree.norm(gradient)
      after = learner.step(before, gradient)
      # With nothing selected there is nothing to learn from, and no stale momentum to follow.
      return jax.tree.map(lambda a, b: jnp.where(count > 0, a, b), after, before), metrics

    learned, metrics = jax.lax.scan(
        step, learner.own(state), deal(key_deal, index.shape[0], cfg.minibatches, cfg.inner_epochs))
    metrics = jax.tree.map(lambda a: a.mean(), metrics)
    metrics["train/kept"] = kept.sum() / rewards.shape[0]
    if cfg.group > 1:
      metrics["train/mixed_groups"] = (jnp.ptp(grouped(rewards), axis=1) > 0).mean()
    metrics["train/interval"] = (stop - start).astype(jnp.float32)
    stage = state["stage"] + 1
    state = dict(state, **learned, stage=stage,
                 interval=interval(cfg, steps, stage, key_interval))
    if "history" in state:
      append = lambda old, new: jnp.concatenate([old[1:], new[None]])
      state["history"] = jax.tree.map(
          append, state["history"], {"rewards": rewards, "prompt_ids": prompt_ids})
    return state, metrics

  # Only raw rewards, the exact KL and all of the chain have a target to name.
  named = (cfg.kl and cfg.advantage == "group_loo" and cfg.kl_form == "nats" and cfg.select == "all"
           and cfg.interval == "full" and steps == sampler.steps)
  return Method(init=init, collect=collect, update=update, product=learner.product,
                cost=lambda batch: cost(models, cfg, batch),
                tilt=(lambda state: 1 / kl) if named else None)


def cost(models: Models, cfg: Config, batch: int) -> dict[str, int]:
  """Evaluations per update of one sample and one guidance branch, for `batch` trajectories.

  Averaged over the interval schedule; the slots of `select`, kept or not, are all computed.
  """
  steps = models.sampler.steps
  stages = jnp.arange(cfg.interval_stages)
  keys = jax.random.split(jax.random.key(0), cfg.interval_stages)
  noisy = noisy_steps(models.sampler)
  start, stop = np.asarray(
      jax.vmap(lambda stage, key: interval(cfg, noisy, stage, key))(stages, keys)).mean(0)
  groups = batch // cfg.group
  sampled = groups * start + batch * (steps - start) if cfg.branch else batch * steps
  slots = {"all": cfg.group, "extremes": 2, "pairs": 2 * cfg.pairs}[cfg.select]
  once = groups * slots * (stop - start)
  trained = once * cfg.inner_epochs
  if cfg.kl:                                                   # the reference, once a batch
    sampled = sampled + once
  return {"denoiser_forward": round((sampled + trained) * models.branches),
          "denoiser_backward": round(trained * models.branches),
          "decodes": 0, "reward_queries": 0, "reward_gradients": 0}
