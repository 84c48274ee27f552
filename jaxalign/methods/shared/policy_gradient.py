"""Policy gradients: denoising as a decision process whose reward comes with the last step.

Every sampler step `x_{k+1} ~ N(a_k x_k - b_k o_theta, s_k^2 I)`, o the network's output, is an
action, so a reward of the sampler's output trains the policy without a gradient of its own: it may
be a black box or a yes/no rule. `ddpo.py` is this file with its default options (Black et al. 2023,
"Training Diffusion Models with Reinforcement Learning"); `b2_diffurl.py` sets others. Implemented
from the equations.

One update:

  [start, stop): steps to train, from the interval schedule
  roots x_0..x_start, then `group` branches of each, x_start..x_T       (collect; `branch`)
  A: reward of each output against its prompt, batch or group           (advantages)
  keep the samples worth training on                                    (select)
  repeat inner_epochs x minibatches times, for the steps start..stop-1 of the kept samples:
    rho = [p_theta(x_{k+1} | x_k) / p_sampling(x_{k+1} | x_k)]^(1/D)    (log_ratio)
    theta <- AdamW on max(-A rho, -A clip(rho, 1 - c, 1 + c))           (loss)

With `x_{k+1} = mu_sampling + s z` the log-ratio of one element is, in r = `Sampler.rate`,
`-r z (o_theta - o_sampling) - r^2 (o_theta - o_sampling)^2 / 2`. It is computed in this form from
the recorded noise: a difference of two log-densities would lose the digits that a clip range of
1e-4 needs.
"""
import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.config.fields import MOST, Count, NonNegative, Range, Whole, check
from jaxalign.config.schema import OptimConfig
from jaxalign.errors import UserError
from jaxalign.methods import Method, Models
from jaxalign.methods.shared.optimizer import Learner, accumulated_gradients

Advantage = Literal["prompt", "batch", "group_z", "group_center", "group_loo"]
Selection = Literal["all", "extremes", "pairs"]


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
    interval: which steps are trained, a name in `INTERVALS`: "full"; "grow", the last steps, ever
      more of them; "slide", a window that moves from noise to output; "random", a window anywhere.
    interval_first, interval_last: length of the interval as a share of all steps, in (0, 1]: "grow"
      goes from first to last; windows have the first one.
    interval_stages: updates that a schedule takes; then it stays where it ends.
    step_weights: of the steps in the loss, with mean 1: "uniform", or "even", proportional to
      `1 / rate_k`, so that no step's log-density is more sensitive to the network's output than
      another's.
    advantage: "prompt" ((R - mean) / std of the prompt's rewards in this batch and in `history`),
      "batch" (the same over the whole batch); or within a group: "group_z" ((R - mean) / std),
      "group_center" (R - mean), "group_loo" (R - mean of the others; unbiased). A pool without
      spread gives 0.
    history: updates before this one whose rewards count for "prompt".
    min_count: fewer rewards of a prompt than this, and "prompt" takes the statistics of the batch.
    advantage_clip: A is clipped to +- this, in its own unit.
    select: "all"; "extremes" (best of a group if A >= `keep_above`, worst if A < `keep_below`,
      each for itself); "pairs" (the `pairs` best and as many worst of every group that has any
      spread, A centred on the mean of those kept: half the difference for one pair).
    keep_above, keep_below: in units of the advantage. pairs: at most half a group.
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
  interval_stages: Count = 100
  step_weights: Literal["uniform", "even"] = "uniform"
  advantage: Advantage = "prompt"
  history: Whole = 16
  min_count: Annotated[int, Range(2, MOST)] = 16     # one reward has no spread
  advantage_clip: NonNegative = 5.0
  select: Selection = "all"
  keep_above: float = 0.5
  keep_below: float = -0.5
  pairs: Count = 1

  noise_at_every_step = True

  def __post_init__(self):
    check("method", self)
    if self.interval not in INTERVALS:
      raise UserError(f"method.interval={self.interval!r} is not one of {tuple(INTERVALS)}")
    if not 0 < self.interval_first <= self.interval_last <= 1:
      raise UserError(f"method.interval_first={self.interval_first} and method.interval_last="
                      f"{self.interval_last} must be in (0, 1], the first not above the last")
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


def _grow(cfg, steps, stage, key):
  """The last steps: `first + floor(stage (last - first + 1) / stages)` of them."""
  first, last = _length(cfg.interval_first, steps), _length(cfg.interval_last, steps)
  length = jnp.minimum(first + stage * (last - first + 1) // cfg.interval_stages, last)
  return steps - length, steps


def _slide(cfg, steps, stage, key):
  length = _length(cfg.interval_first, steps)
  last = steps - length
  start = jnp.minimum(stage * (last + 1) // cfg.interval_stages, last)
  return start, start + length


def _random(cfg, steps, stage, key):
  length = _length(cfg.interval_first, steps)
  start = jax.random.randint(key, (), 0, steps - length + 1)
  return start, start + length


INTERVALS = {"full": _full, "grow": _grow, "slide": _slide, "random": _random}


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


# ---- what a reward is worth ----------------------------------------------------------------------


def standardize(rewards, mean, std, largest):
  """`(R - mean) / std`, and 0 where the pool's spread is rounding: below 1e-5 of its `largest`."""
  spread = std > 1e-5 * largest
  return jnp.where(spread, (rewards - mean) / jnp.where(spread, std, 1.0), 0.0)


def advantages(cfg: Config, rewards, prompt_ids, history=None):
  """Advantages before clipping and selection, `[B]` f32, without gradient.

  Args:
    rewards: `[B]` f32, raw units; groups side by side.
    prompt_ids: `[B]` int32 >= 0.
    history: `{"rewards" [n, B], "prompt_ids" [n, B]}` of updates before, ids -1 where there was
      none; or None.
  Returns:
    In standard deviations (ddof 1), or in raw units for "group_center" and "group_loo". Sums to 0
    over every group in group modes, over the batch in mode "batch", and over the samples of a
    prompt in mode "prompt" without history.
  Reference: Black et al. 2023, section 4.3 (per-prompt statistics).
  """
  if cfg.advantage.startswith("group"):
    pool = rewards.reshape(-1, cfg.group)
    centred = pool - pool.mean(1, keepdims=True)
    if cfg.advantage == "group_loo":
      centred = centred * cfg.group / (cfg.group - 1)
    elif cfg.advantage == "group_z":
      centred = standardize(centred, 0.0, pool.std(1, ddof=1, keepdims=True),
                            jnp.abs(pool).max(1, keepdims=True))
    return centred.reshape(-1)
  of_batch = standardize(rewards, rewards.mean(), rewards.std(ddof=1), jnp.abs(rewards).max())
  if cfg.advantage == "batch":
    return of_batch
  pool, ids = rewards, prompt_ids
  if history is not None:
    pool = jnp.concatenate([pool, history["rewards"].reshape(-1)])
    ids = jnp.concatenate([ids, history["prompt_ids"].reshape(-1)])
  same = prompt_ids[:, None] == ids[None]                                       # [B, pool]
  count = same.sum(1)
  mean = jnp.where(same, pool[None], 0.0).sum(1) / count
  deviation = jnp.where(same, pool[None] - mean[:, None], 0.0)
  std = jnp.sqrt(jnp.square(deviation).sum(1) / jnp.maximum(count - 1, 1))
  largest = jnp.where(same, jnp.abs(pool)[None], 0.0).max(1)
  return jnp.where(count >= cfg.min_count, standardize(rewards, mean, std, largest), of_batch)


def select(cfg: Config, adv):
  """Chooses the samples to train on; always as many slots, so that shapes are static.

  Args:
    adv: `[B]` advantages, groups side by side.
  Returns:
    `index [R, S]` of the chosen samples within their groups, `adv [R, S]` and `kept [R, S]` bool:
    slots that are not kept have no weight. S is the group's size for "all", 2 for "extremes", twice
    `pairs` for "pairs".
  """
  adv = adv.reshape(-1, cfg.group)
  if cfg.select == "all":
    return (jnp.broadcast_to(jnp.arange(cfg.group), adv.shape), adv,
            jnp.ones(adv.shape, bool))
  m = 1 if cfg.select == "extremes" else cfg.pairs
  order = jnp.argsort(adv, axis=1, descending=True)
  index = jnp.concatenate([order[:, :m], order[:, cfg.group - m:]], 1)
  chosen = jnp.take_along_axis(adv, index, 1)
  if cfg.select == "extremes":
    return index, chosen, jnp.stack(
        [chosen[:, 0] >= cfg.keep_above, chosen[:, 1] < cfg.keep_below], 1)
  spread = chosen[:, :1] > chosen[:, -1:]
  return index, chosen - chosen.mean(1, keepdims=True), jnp.broadcast_to(spread, chosen.shape)


# ---- the loss ------------------------------------------------------------------------------------


def log_ratio(sampler, k, out, out_old, noise):
  """`log p_theta / p_sampling` of transitions, averaged over the latent elements, `[R]` f32.

  Args:
    k: `[R]` step indices. out, out_old: `[R, ...]` outputs of the network now and at sampling.
    noise: `[R, ...]` the injected noise z, `x_{k+1} = mu_sampling + s_k z`.
  Returns:
    0 where the outputs agree. Times D it is the log-ratio of the transition's density; its
    gradient at `out = out_old` is that of the mean log-density, `-rate_k mean(z d out)`.
  """
  axes = tuple(range(1, out.ndim))
  rate = sampler.at("rate", k)
  delta = out - out_old
  return -rate * (noise * delta).mean(axes) - 0.5 * jnp.square(rate) * jnp.square(delta).mean(axes)


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


class Extra(NamedTuple):
  """What a variant of the method adds to the loss of each transition.

  Attributes:
    term: `(policy, frozen, rows, out) -> ([R] loss, {metric: [R]})`, differentiated; `rows` as in
      `loss`, `out` the policy's outputs there.
    data: `(state, frozen, experience, rewards) -> {name: [B, T, ...]}`, what it needs beside: more
      entries of `rows`, constant for the policy.
    forwards: evaluations of the guided network that `term` takes for a transition.
  """
  term: Callable
  forwards: int = 0
  data: Callable = lambda state, frozen, experience, rewards: {}


def loss(models: Models, cfg: Config, policy, frozen, rows, extra: Extra | None = None):
  """The policy gradient loss of transitions.

  Args:
    policy: the trained tree; gradients go here only.
    rows: `k [R]`, `x_k [R, ...]`, `noise`, `out_old` (see `log_ratio`), `conditioning`, and `[R]`
      each: `adv`, clipped advantages; `weight`, >= 0 with mean 1, 0 for rows that do not count;
      `step_weight`, see `step_weights`.
  Returns:
    Scalar f32, the weighted mean of `surrogate` and the extra term; on the first optimiser step of
    a batch -mean(A) for "clip" and 0 for "score". Metrics, means over the rows that count:
    `train/clip_fraction` in [0, 1], and `train/update_kl`, the transition's
    `KL(p_sampling || p_theta)` in nats, both 0 then.
  """
  sampler, k = models.sampler, rows["k"]
  out = models.output(policy, frozen, rows["x_k"], sampler.at("timesteps", k), rows["conditioning"])
  log_rho = log_ratio(sampler, k, out, rows["out_old"], rows["noise"])
  each = surrogate(cfg.objective, log_rho, rows["adv"], cfg.clip_range)
  outside = (jnp.abs(jnp.exp(log_rho) - 1) > cfg.clip_range).astype(jnp.float32)
  kl = 0.5 * jnp.square(sampler.at("rate", k)) * jnp.square(
      out - rows["out_old"]).sum(tuple(range(1, out.ndim)))
  metrics = {"train/clip_fraction": outside, "train/update_kl": kl}
  total = rows["step_weight"] * each
  if extra is not None:
    added, more = extra.term(policy, frozen, rows, out)
    total, metrics = total + added, {**metrics, **more}
  of_rows = lambda values: (rows["weight"] * values).mean()
  total = of_rows(total)
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


def make(models: Models, cfg: Config, optim: OptimConfig, extra: Extra | None = None) -> Method:
  """Policy gradients as a Method, with a further term in the loss if there is one."""
  sampler = models.sampler
  learner = Learner(optim)
  grouped = lambda a: a.reshape((-1, cfg.group) + a.shape[1:])

  def init(key, frozen, batch):
    key_policy, key_interval = jax.random.split(key)
    size, stage = batch["prompt_ids"].shape[0], jnp.zeros((), jnp.int32)
    state = {**learner.init(models.init_policy(key_policy, frozen)), "stage": stage,
             "interval": interval(cfg, sampler.steps, stage, key_interval)}
    if cfg.advantage == "prompt" and cfg.history:
      state["history"] = {"rewards": jnp.zeros((cfg.history, size)),
                          "prompt_ids": jnp.full((cfg.history, size), -1, jnp.int32)}
    return state

  def collect(state, frozen, batch, key):
    sample = lambda rows, **bounds: models.rollout(state["policy"], frozen, rows, key, **bounds)
    if cfg.branch:
      start = state["interval"][0]
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
          lambda p: loss(models, cfg, p, frozen, rows, extra), has_aux=True)(policy)
      return gradient, metrics

    def at_step(k):
      pick = lambda a: jax.lax.dynamic_index_in_dim(a, k, 1, keepdims=False)
      here = {"k": every_row(k), "x_k": pick(rows["latents"]), "noise": pick(rows["noise"]),
              "out_old": pick(rows["out"]), "step_weight": every_row(weights[k]),
              **{name: rows[name] for name in ("adv", "weight", "conditioning")},
              **jax.tree.map(pick, rows["extra"])}
      return accumulated_gradients(grads_of, policy, here, jax.random.key(0), optim.accumulate)

    # The bounds are traced: one program serves every interval, and costs what the interval costs.
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(at_step, 0))
    total = jax.lax.fori_loop(
        start, stop, lambda k, total: jax.tree.map(jnp.add, total, at_step(k)), zeros)
    gradient, metrics = jax.tree.map(lambda a: a / (stop - start), total)
    metrics["train/update_kl"] = metrics["train/update_kl"] * (stop - start)
    return gradient, metrics

  def update(state, frozen, experience, rewards, key):
    key_deal, key_interval = jax.random.split(key)
    start, stop = state["interval"]
    prompt_ids = experience["batch"]["prompt_ids"]
    adv = advantages(cfg, rewards, prompt_ids, state.get("history"))
    index, adv, kept = select(cfg, adv)
    choose = lambda a: jnp.take_along_axis(
        grouped(a), index.reshape(index.shape + (1,) * (a.ndim - 1)), axis=1)
    rows = {name: choose(experience[name]) for name in ("latents", "out", "noise")}
    rows["extra"] = {}
    if extra is not None:
      rows["extra"] = jax.lax.stop_gradient(
          jax.tree.map(choose, extra.data(state, frozen, experience, rewards)))
    rows.update(conditioning=jax.tree.map(choose, experience["batch"]["conditioning"]), kept=kept,
                adv=jnp.clip(adv, -cfg.advantage_clip, cfg.advantage_clip))     # all [R, S, ...]

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
                 interval=interval(cfg, sampler.steps, stage, key_interval))
    if "history" in state:
      append = lambda old, new: jnp.concatenate([old[1:], new[None]])
      state["history"] = jax.tree.map(
          append, state["history"], {"rewards": rewards, "prompt_ids": prompt_ids})
    return state, metrics

  return Method(init=init, collect=collect, update=update, product=learner.product,
                cost=lambda batch: cost(models, cfg, batch, extra))


def cost(models: Models, cfg: Config, batch: int, extra: Extra | None = None) -> dict[str, int]:
  """Evaluations per update of one sample and one guidance branch, for `batch` trajectories.

  Averaged over the interval schedule; the slots of `select`, kept or not, are all computed.
  """
  steps = models.sampler.steps
  stages = jnp.arange(cfg.interval_stages)
  keys = jax.random.split(jax.random.key(0), cfg.interval_stages)
  start, stop = np.asarray(
      jax.vmap(lambda stage, key: interval(cfg, steps, stage, key))(stages, keys)).mean(0)
  groups = batch // cfg.group
  sampled = groups * start + batch * (steps - start) if cfg.branch else batch * steps
  slots = {"all": cfg.group, "extremes": 2, "pairs": 2 * cfg.pairs}[cfg.select]
  trained = groups * slots * (stop - start) * cfg.inner_epochs
  forwards = 1 + (extra.forwards if extra else 0)
  return {"denoiser_forward": round((sampled + trained * forwards) * models.branches),
          "denoiser_backward": round(trained * models.branches),
          "decodes": 0, "reward_queries": 0, "reward_gradients": 0}
