"""ReFL, DRaFT and AlignProp: fine-tuning by the reward's gradient through the sampler.

All three sample with the policy and follow `grad_theta R(decode(x))` of what came out. They differ
in where the gradient stops, because through all steps it is dear and noisy. With
`x_{k+1} = a_k x_k - b_k eps_theta(x_k) + std_k z_k`, k = 0..N-1:

  sample trajectories x_0..x_N with the policy, without gradients                  (collect)
  ReFL      : m ~ one of the last steps;       x = x0_hat(x_m), through eps_theta(x_m)
  DRaFT     : x = x_N, through all steps
  DRaFT-K   : x = x_N, through the last K steps;  x_{N-K} is constant
  DRaFT-LV  : x = the last step applied to x_N noised again, n times
  AlignProp : x = x_N, through a random set of steps; at the others eps_theta is constant
  theta <- AdamW on E[ shape(R(decode(x))) ]                                       (update)

The trajectories are those that were sampled: only Jacobians are computed in `update`, at the stored
latents (`sampling.replay`), so memory does not grow with the steps beyond the latents.

None of these has a target distribution: a linear reward rises without bound, a curved one ends in
its maximum, and diversity goes. Stop early, and watch the judge.

Xu et al. 2023 (ImageReward, ReFL, algorithm 1); Clark et al. 2023 (DRaFT, algorithm 1); Prabhudesai
et al. 2023 (AlignProp). Implemented from the papers.
"""
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.config.fields import Count, NonNegative, Whole, check
from jaxalign.config.schema import OptimConfig
from jaxalign.devices import rng
from jaxalign.errors import UserError
from jaxalign.methods import Method, Models
from jaxalign.methods.optimizer import Learner, accumulated_gradients
from jaxalign.sampling import guided_eps, replay, rollout


@dataclasses.dataclass(frozen=True)
class Config:
  """Keys of the `method` group that all three share.

  Attributes:
    objective: what is minimised for a reward r: "linear" (`-r`), "hinge" (`max(target - r, 0)`,
      which leaves samples alone that reach the target) or "absolute" (`|target - r|`).
    target: of "hinge" and "absolute", in units of the reward.
    weight: > 0, factor of the objective. AdamW divides it out again, but for its `eps` and
      `optim.clip_norm`.
  """
  objective: Literal["linear", "hinge", "absolute"] = "linear"
  target: float = 0.0
  weight: NonNegative = 1.0

  def __post_init__(self):
    check("method", self)
    if self.weight == 0:
      raise UserError("method.weight=0.0 leaves nothing to train on; it is above 0")

  @property
  def copies(self) -> int:
    """Images scored per trajectory."""
    return 1

  def kept(self, steps: int) -> int:
    """Last steps, of `steps` in all, that a gradient may visit; UserError if there are not as many.
    """
    raise NotImplementedError

  def visited(self, steps: int) -> float:
    """Expected number of steps that the gradient of one trajectory does visit."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ReFLConfig(Config):
  """Keys of the `method` group for ReFL.

  Attributes:
    window: the step whose clean estimate is scored is uniform over this many last ones.
  """
  window: Count = 5

  def kept(self, steps):
    return _at_most("window", self.window, steps)

  def visited(self, steps):
    return 1.0


@dataclasses.dataclass(frozen=True)
class DRaFTConfig(Config):
  """Keys of the `method` group for DRaFT.

  Attributes:
    backprop_steps: K, the number of last steps that gradients run through; 0 is all of them.
    renoise: n, copies of the output that are noised and denoised again (DRaFT-LV, K = 1); 0 is off.
  """
  backprop_steps: Whole = 1
  renoise: Whole = 0

  def __post_init__(self):
    super().__post_init__()
    if self.renoise and self.backprop_steps != 1:
      raise UserError(f"method.renoise={self.renoise} noises to the last step only: set "
                      f"method.backprop_steps=1, not {self.backprop_steps}")

  @property
  def copies(self):
    return self.renoise or 1

  def kept(self, steps):
    return 0 if self.renoise else _at_most("backprop_steps", self.backprop_steps, steps) or steps

  def visited(self, steps):
    return float(self.renoise or self.kept(steps))


@dataclasses.dataclass(frozen=True)
class AlignPropConfig(Config):
  """Keys of the `method` group for AlignProp.

  Attributes:
    truncation: which steps gradients run through. "normal": the last K, N - K drawn from a normal
      distribution around 0.84 N with standard deviation 0.1 N; "uniform": the last K, K uniform in
      1..N; "per_step": step k with probability `(k + 1) / (N + 1)`, each on its own.
  """
  truncation: Literal["normal", "uniform", "per_step"] = "normal"

  def kept(self, steps):
    return steps

  def visited(self, steps):
    if self.truncation == "per_step":
      return steps / 2
    return steps - np.exp(truncation_log_prob(self.truncation, steps)) @ np.arange(steps)


def _at_most(key: str, value: int, steps: int) -> int:
  if value > steps:
    raise UserError(f"method.{key}={value} exceeds sample.steps={steps}")
  return value


# Named forms of DRaFT, arguments of its recipe.
PRESETS: dict[str, dict[str, Any]] = {
    "full": dict(backprop_steps=0),
    "one": dict(backprop_steps=1),
    "lv": dict(backprop_steps=1, renoise=2),
}


def truncation_log_prob(kind: str, steps: int) -> np.ndarray:
  """Log-probabilities `[N]` of N - K = 0..N-1, the number of first steps without gradient."""
  if kind == "uniform" or steps == 1:
    return np.full(steps, -math.log(steps))
  below = lambda x: 0.5 * (1 + math.erf((x - 0.84 * steps) / (0.1 * steps * math.sqrt(2))))
  mass = np.asarray([below(i + 1) - below(i) for i in range(steps)])
  mass[0] = 0.0                                   # draws outside [1, N) are made anew
  with np.errstate(divide="ignore"):
    return np.log(mass / mass.sum())


def draw_active(kind: str, key, steps: int):
  """The steps that gradients run through in one update: `[N]` bool."""
  k = jnp.arange(steps)
  if kind == "per_step":
    return jax.random.randint(key, (steps,), 0, steps + 1) <= k
  log_prob = jnp.asarray(truncation_log_prob(kind, steps), jnp.float32)
  return k >= jax.random.categorical(key, log_prob)


def policy_eps(models: Models):
  """The guided noise estimate as `(policy, x, t, (base, conditioning)) -> eps`."""
  eps_fn = guided_eps(models.denoise, models.schedule, models.guidance)
  return lambda policy, x, t, fixed: eps_fn(models.combine(policy, fixed[0]), x, t, fixed[1])


def refl_output(models: Models, cfg: ReFLConfig, policy, fixed, rows, key):
  """Clean estimates at a late step m of each row, drawn on its own."""
  sampler, latents = models.sampler, rows["latents"]
  m = jax.random.randint(key, (latents.shape[0],), 0, cfg.window)
  x = jnp.take_along_axis(latents, m.reshape((-1,) + (1,) * (latents.ndim - 1)), 1)[:, 0]
  t = sampler.at("timesteps", sampler.steps - cfg.window + m)
  return models.schedule.to_x0(policy_eps(models)(policy, x, t, fixed), x, t)


def draft_output(models: Models, cfg: DRaFTConfig, policy, fixed, rows, key):
  """Outputs through the last K steps, or (LV) through the last one from the output noised again."""
  sampler, latents = models.sampler, jnp.moveaxis(rows["latents"], 1, 0)
  if not cfg.renoise:
    return replay(policy_eps(models), sampler, policy, fixed, latents,
                  jnp.ones(latents.shape[0] - 1, bool))
  k = sampler.steps - 1
  t = sampler.at("timesteps", k)
  ids = jnp.arange(latents.shape[1])
  noise, step_noise = (rng.normal_per_sample(rng.per_sample(key, ids), models.latent_shape, i)
                       for i in range(2))
  x = models.schedule.add_noise(latents[-1], noise, t)
  return (sampler.mean(k, x, policy_eps(models)(policy, x, t, fixed))
          + sampler.at("std", k) * step_noise)


def alignprop_output(models: Models, cfg: AlignPropConfig, policy, fixed, rows, key):
  """Outputs through a random set of steps, one draw for all rows."""
  latents = jnp.moveaxis(rows["latents"], 1, 0)
  active = draw_active(cfg.truncation, key, models.sampler.steps)
  return replay(policy_eps(models), models.sampler, policy, fixed, latents, active)


OUTPUT: dict[type, Callable] = {
    ReFLConfig: refl_output, DRaFTConfig: draft_output, AlignPropConfig: alignprop_output}


def penalty(cfg: Config, reward):
  """What is minimised, of the shape of `reward`."""
  short = cfg.target - reward
  return cfg.weight * {"linear": -reward, "hinge": jnp.maximum(short, 0.0),
                       "absolute": jnp.abs(short)}[cfg.objective]


def loss(models: Models, cfg: Config, policy, frozen, rows, key):
  """Mean penalty of the reward, with gradients to the policy where the method lets them through.

  Args:
    policy: the one that sampled the rows.
    rows: `latents [R, S+1, ...]`, the last `S = cfg.kept(N)` transitions of each trajectory, and
      `conditioning`, `prepared` of its prompt.
    key: draws exit steps, noise or truncation.
  Returns:
    Scalar loss; `{"train/reward_scored": mean reward of what was scored}`.
  """
  if cfg.copies > 1:
    rows = jax.tree.map(lambda a: jnp.repeat(a, cfg.copies, axis=0), rows)
  fixed = frozen["base"], rows["conditioning"]
  x = OUTPUT[type(cfg)](models, cfg, policy, fixed, rows, key)
  images = models.decode(frozen["decoder"], x)
  reward = models.score(frozen["reward"], images, rows["prepared"])
  return penalty(cfg, reward).mean(), {"train/reward_scored": reward.mean()}


def make(models: Models, cfg: Config, optim: OptimConfig) -> Method:
  """ReFL, DRaFT or AlignProp, by the type of `cfg`, as a Method.

  Raises:
    UserError: a black-box reward, or more steps with gradients than the sampler has.
  """
  sampler = models.sampler
  if models.score is None:
    raise UserError("method.name: refl, draft and alignprop need reward gradients, and "
                    "reward.names holds a black-box reward; choose differentiable rewards")
  kept = cfg.kept(sampler.steps)
  eps_fn = guided_eps(models.denoise, models.schedule, models.guidance)
  learner = Learner(optim)

  def init(key, frozen, batch):
    return learner.init(models.init_policy(key, frozen))

  def collect(state, frozen, batch, key):
    variables = models.combine(state["policy"], frozen["base"])
    trajectory = rollout(eps_fn, variables, sampler, batch["conditioning"], key,
                         batch["sample_ids"], models.latent_shape)
    # The batch leads every array, so that an experience is sharded as one.
    latents = jnp.moveaxis(trajectory.latents[sampler.steps - kept:], 0, 1)
    return {"final": trajectory.final, "latents": latents, "batch": batch}

  def update(state, frozen, experience, rewards, key):
    batch = experience["batch"]
    rows = {"latents": experience["latents"], "conditioning": batch["conditioning"],
            "prepared": batch["prepared"]}

    def grads_of(policy, rows, key):
      (total, metrics), gradient = jax.value_and_grad(
          lambda policy: loss(models, cfg, policy, frozen, rows, key), has_aux=True)(policy)
      return gradient, {"loss/total": total, **metrics}

    gradient, metrics = accumulated_gradients(
        grads_of, state["policy"], rows, key, optim.accumulate)
    metrics["train/grad_norm"] = optax.tree.norm(gradient)
    return learner.step(state, gradient), metrics

  return Method(init=init, collect=collect, update=update, product=learner.product,
                cost=lambda batch: cost(models, cfg, batch))


def cost(models: Models, cfg: Config, batch: int) -> dict[str, int]:
  """Evaluations per update of one sample and one guidance branch; expected ones for AlignProp."""
  branches = 1 if models.guidance == 1.0 else 2
  steps, images = models.sampler.steps, batch * cfg.copies
  visited = round(batch * cfg.visited(steps))
  return {"denoiser_forward": (batch * steps + visited) * branches,
          "denoiser_backward": visited * branches, "decodes": images, "reward_queries": images,
          "reward_gradients": images}


class Kind(NamedTuple):
  """What the registry needs of a method in this file."""
  Config: type
  make: Callable


refl, draft, alignprop = (Kind(config, make)
                          for config in (ReFLConfig, DRaFTConfig, AlignPropConfig))
