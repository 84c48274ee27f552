"""Samplers as tables: one Gaussian transition per step, written in the network's own output.

`k` is the sampler index, 0 (pure noise) .. T-1 (the transition that produces the output), from
level `(alpha, sigma)` to `(alpha', sigma')`:

  x_{k+1} ~ N(a_k x_k - b_k o_k, std_k^2 I)

Kinds that keep the path's coefficients ("ddim", "ddpm", "cps") have the mean
`alpha' x0_hat + sqrt(sigma'^2 - std^2) eps_hat`; the SDE kinds are Euler-Maruyama steps.
"""
import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from jaxalign.errors import UserError
from jaxalign.sampling.schedule import Schedule, expand, shifted

KINDS = ("ddim", "ddpm", "one_step", "flow_sde", "dance_sde", "cps", "dpm2")
_FLOW_KINDS = ("flow_sde", "dance_sde", "cps")
_SPACINGS = {False: ("leading", "trailing", "linspace"), True: ("linspace", "shifted_twice")}
FINALS = ("noisy", "clean", "ode")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Sampler:
  """The transitions of a sampler; all arrays are `[T]`, computed in f64 and used in f32.

  Attributes:
    timesteps: time at which the network sees `x_k`, decreasing.
    next_timesteps: that of `x_{k+1}`; of the output the time nearest to its level.
    alpha, sigma, alpha_next, sigma_next: levels of `x_k` and `x_{k+1}`.
    x_coef, out_coef, std: `a_k`, `b_k` and the standard deviation (0 where deterministic).
    clean_x_coef, clean_out_coef: of the clean estimate, `x0_hat = p_k x_k - q_k o_k`.
    correction: of second-order steps: what of `x0_hat_k - x0_hat_{k-1}` is added to the mean.
    input_scale: standard deviation of `x_0`, where sampling starts.
  """
  timesteps: np.ndarray
  next_timesteps: np.ndarray
  alpha: np.ndarray
  sigma: np.ndarray
  alpha_next: np.ndarray
  sigma_next: np.ndarray
  x_coef: np.ndarray
  out_coef: np.ndarray
  std: np.ndarray
  clean_x_coef: np.ndarray
  clean_out_coef: np.ndarray
  correction: np.ndarray
  input_scale: float = 1.0

  @property
  def steps(self) -> int:
    return len(self.timesteps)

  @functools.cached_property
  def lam(self) -> np.ndarray:
    """`b_k / std_k^2`: `grad log(P_theta / P_ref) = -lam_k (o_theta - o_ref)`; inf without noise.
    """
    return self._over_std(2)

  @functools.cached_property
  def rate(self) -> np.ndarray:
    """`lam_k std_k`: the KL of a step is `rate_k^2 |o_theta - o_ref|^2 / 2`; inf without noise."""
    return self._over_std(1)

  def _over_std(self, power):
    infinite = np.full(self.steps, np.inf)
    return np.divide(self.out_coef, self.std ** power, out=infinite, where=self.std > 0)

  @property
  def memoryless(self) -> bool:
    """Whether every step forgets `x_k` as far as the path allows: has eta's noise at 1, or more."""
    kept = self.alpha * self.sigma_next / (self.alpha_next * self.sigma)
    ancestral = self.sigma_next * np.sqrt(np.maximum(1 - kept ** 2, 0))
    return bool(np.any(self.std > 0) and np.all(self.std >= (1 - 1e-6) * ancestral))

  @property
  def second_order(self) -> bool:
    """Whether steps need the clean estimate of the step before."""
    return bool(np.any(self.correction))

  def at(self, name: str, k):
    """Attribute `name` at step index `k` (int or traced, any shape), f32."""
    return jnp.asarray(getattr(self, name), jnp.float32)[k]

  def mean(self, k, x_k, output):
    """Transition mean without `correction`, shape of `x_k`; `k` is a scalar or `[B]`."""
    return expand(self.at("x_coef", k), x_k) * x_k - expand(self.at("out_coef", k), x_k) * output

  def clean(self, k, x_k, output):
    """Clean estimate `x0_hat` at step `k`."""
    p, q = self.at("clean_x_coef", k), self.at("clean_out_coef", k)
    return expand(p, x_k) * x_k - expand(q, x_k) * output

  def log_prob(self, k, x_next, mean):
    """Log-density `[B]` f32 of a transition, summed over latent elements; 0 where deterministic.

    Subtracting two of these loses digits (each is about `D/2` nats); use `rate` and the difference
    of outputs where a ratio is wanted at the last steps.
    """
    std = self.at("std", k)
    safe = jnp.where(std > 0, std, 1.0)
    z = (x_next - mean) / expand(safe, x_next)
    axes = tuple(range(1, x_next.ndim))
    size = x_next[0].size
    return jnp.where(std > 0, gaussian_log_prob(z, axes) - size * jnp.log(safe), 0.0)


def gaussian_log_prob(z, axes):
  """Log-density of standard normal `z` summed over `axes`."""
  size = np.prod([z.shape[a] for a in axes])
  return -0.5 * (jnp.square(z).sum(axes) + size * np.float32(np.log(2 * np.pi)))


def make_sampler(schedule: Schedule, steps: int, *, kind: str = "ddim", eta: float = 1.0,
                 spacing: str = "", final: str = "", variance: str = "small",
                 timestep: int = 0, shift: float = 0.0) -> Sampler:
  """Builds the transition table.

  Args:
    steps: number of transitions T, 1..1000.
    kind: "ddim" (variance scaled by `eta`), "dpm2" (deterministic, second-order multistep) or
      "one_step" (one evaluation gives the output; only `timestep` matters) on any path; "ddpm"
      (ancestral; equals ddim with eta 1 but for `variance`) on variance-preserving ones;
      "flow_sde" (Flow-GRPO's), "dance_sde" (DanceGRPO's) and "cps" (Flow-CPS') on flows.
    eta: strength of the noise, 0 is deterministic. ddim: in [0, 1], 1 has the ancestral variance;
      cps: in [0, 1], `std = sigma' sin(eta pi / 2)`; flow_sde, dance_sde: >= 0, factor of the
      diffusion. Ignored by ddpm and dpm2.
    spacing: "leading", "trailing" or "linspace" times; on a flow "linspace" (even levels from 1 to
      0, shifted) or "shifted_twice" (SD3's scheduler: its small end is shifted twice). Empty takes
      the checkpoint's.
    final: what level the output has: "noisy" (the schedule's smallest positive one, so that the
      last transition is stochastic and has a score; on a flow the shifted level of 0.001), "clean"
      (0, with the kind's own noise there: none, but of the SDE kinds and of ddpm's large variance)
      or "ode" (0, and the last transition without noise, whatever the kind). Empty takes the
      checkpoint's.
    variance: for "ddpm": "small" (posterior variance) or "large" (beta).
    timestep: for "one_step": where the network is told that the noise lies; 0 takes the
      checkpoint's.
    shift: of a flow's levels; 0 takes the checkpoint's.
  Raises:
    UserError: unknown name or a number out of range, naming the `sample.*` key.
  Reference: Song et al. 2021 (DDIM), equations 12 and 16; Ho et al. 2020 (DDPM), equation 7; Lu et
    al. 2022 (DPM-Solver++), algorithm 2; Liu et al. 2025 (Flow-GRPO), equation 9; Xue et al. 2025
    (DanceGRPO); the SDEs as in the published code.
  """
  if kind == "one_step":
    return _one_step(schedule, steps, timestep)
  if schedule.one_step is not None:
    raise UserError(f"sample.kind={kind!r}: this checkpoint is a one-step generator, for which "
                    "sample.kind is 'one_step'")
  spacing, final = spacing or schedule.spacing, final or schedule.final
  for key, value, choices in (("kind", kind, KINDS), ("spacing", spacing,
                                                      _SPACINGS[schedule.is_flow]),
                              ("final", final, FINALS), ("variance", variance, ("small", "large"))):
    if value not in choices:
      raise UserError(f"sample.{key}={value!r} is not one of {choices}")
  if not 1 <= steps <= 1000:
    raise UserError(f"sample.steps={steps} is outside 1..1000")
  if eta < 0 or eta > 1 and kind not in ("flow_sde", "dance_sde"):
    raise UserError(f"sample.eta={eta} is outside [0, 1]")
  if kind in _FLOW_KINDS and not schedule.is_flow:
    raise UserError(f"sample.kind={kind!r} is for flow-matching models; 'ddim' with sample.eta > 0 "
                    "has noise on this one")
  if kind == "ddpm" and schedule.is_flow:
    raise UserError("sample.kind='ddpm' is for variance-preserving models; on a flow 'ddim' with "
                    "sample.eta=1 is its like")
  if shift and not schedule.is_flow:
    raise UserError(f"sample.shift={shift} is for flow-matching models")

  grid = _flow_grid if schedule.is_flow else _trained_grid
  times, levels = grid(schedule, steps, spacing, final, shift or schedule.shift)
  now, after = levels[:, :-1], levels[:, 1:]
  x_coef, out_coef, std = _row(schedule, kind, eta, variance, times[:-1], now, after)
  if final == "ode":
    last = _keeping(schedule, now[:, -1:], after[:, -1:], np.zeros(1))
    x_coef[-1:], out_coef[-1:], std[-1] = *last, 0.0
  (p, q), _ = _estimates(schedule, now)
  correction = _correction(now, after) if kind == "dpm2" else np.zeros(steps)
  return Sampler(timesteps=times[:-1], next_timesteps=times[1:], alpha=now[0], sigma=now[1],
                 alpha_next=after[0], sigma_next=after[1], x_coef=x_coef, out_coef=out_coef,
                 std=std, clean_x_coef=p, clean_out_coef=q, correction=correction)


def noisy_within(schedule: Schedule, sampler: Sampler, start, stop) -> Sampler:
  """`sampler` with no noise outside the steps `[start, stop)`, whose bounds may be traced.

  The steps outside are Euler's (DDIM's with eta 0), between the same levels, so that one compiled
  program samples every window. `lam` and `rate` of the result are not defined: take the sampler's.
  """
  a, b = _keeping(schedule, np.stack([sampler.alpha, sampler.sigma]),
                  np.stack([sampler.alpha_next, sampler.sigma_next]), np.zeros(sampler.steps))
  k = np.arange(sampler.steps)
  inside = (k >= start) & (k < stop)
  f32 = lambda values: jnp.asarray(values, jnp.float32)
  rows = {name: jnp.where(inside, f32(getattr(sampler, name)), f32(still))
          for name, still in (("x_coef", a), ("out_coef", b), ("std", 0.0 * k))}
  return dataclasses.replace(sampler, **rows)


# ---- where a sampler stops: times [T+1] and levels [2, T+1] -------------------------------------


def _trained_grid(schedule, steps, spacing, final, shift):
  del shift
  total = len(schedule.alphas)
  if steps > total:
    raise UserError(f"sample.steps={steps} is outside 1..{total}")
  if spacing == "leading":
    times = (np.arange(steps) * (total // steps))[::-1] + schedule.steps_offset
  elif spacing == "trailing":
    times = np.round(total - np.arange(steps) * total / steps) - 1
  else:
    times = np.round(np.linspace(0, total - 1, steps))[::-1]
  times = np.clip(times, 0, total - 1).astype(np.int32)
  levels = np.stack([schedule.alphas, schedule.sigmas])
  last = levels[:, :1] if final == "noisy" else np.asarray([[1.0], [0.0]])
  return np.append(times, 0).astype(np.float64), np.append(levels[:, times], last, 1)


def _flow_grid(schedule, steps, spacing, final, shift):
  smallest = shifted(1e-3, shift)
  if spacing == "linspace":
    even = 1 - np.arange(steps) / steps
  else:
    even = np.linspace(1.0, smallest, steps)
  sigma = np.append(shifted(even, shift), smallest if final == "noisy" else 0.0)
  if sigma[-2] <= sigma[-1]:
    raise UserError(f"sample.final='noisy' ends at level {smallest:g}, where the grid of "
                    f"sample.spacing={spacing!r} is already: set sample.spacing='linspace' or "
                    "sample.final='clean'")
  return 1000 * sigma, np.stack([1 - sigma, sigma])


# ---- one row a kind ------------------------------------------------------------------------------


def _estimates(schedule, levels):
  with np.errstate(divide="ignore", invalid="ignore"):
    return schedule.coefficients(*levels)


def _keeping(schedule, now, after, std):
  """`a, b` of the transition that keeps the path's coefficients at this standard deviation."""
  (p, q), (r, w) = _estimates(schedule, now)
  c = np.sqrt(np.maximum(after[1] ** 2 - std ** 2, 0))
  return after[0] * p + c * r, after[0] * q - c * w


def _row(schedule, kind, eta, variance, times, now, after):
  """`a, b, std` of all steps."""
  (alpha, sigma), (alpha_next, sigma_next) = now, after
  if kind in ("flow_sde", "dance_sde"):
    d = sigma_next - sigma
    # At pure noise Flow-GRPO's diffusion is infinite; the next level's stands in, as published.
    clean_share = np.where(sigma == 1, alpha_next, alpha)
    s2 = eta ** 2 * (sigma / clean_share if kind == "flow_sde" else np.ones_like(sigma))
    return (1 + s2 * d / (2 * sigma), -d * (1 + s2 * alpha / (2 * sigma)), np.sqrt(-s2 * d))
  if kind == "cps":
    std = sigma_next * np.sin(eta * np.pi / 2)
    return *_keeping(schedule, now, after, std), std
  eta = {"ddpm": 1.0, "dpm2": 0.0}.get(kind, eta)
  std = eta * sigma_next * np.sqrt(np.maximum(1 - (alpha * sigma_next / (alpha_next * sigma)) ** 2,
                                              0))
  a, b = _keeping(schedule, now, after, std)
  if kind == "ddpm" and variance == "large":
    # As in the PyTorch scheduler, no noise is added at timestep 0.
    std = np.where(times > 0, np.sqrt(1 - (alpha / alpha_next) ** 2), std)
  return a, b, std


def _correction(now, after):
  """Of DPM-Solver++(2M): `alpha' (1 - exp(-h)) h / (2 h_before)`, h steps of log(alpha / sigma).

  0 at the first step, where there is none before; after pure noise and into a clean output, where h
  is infinite, steps are of first order.
  """
  with np.errstate(divide="ignore", invalid="ignore"):
    log_snr = np.log(np.append(now[0], after[0, -1])) - np.log(np.append(now[1], after[1, -1]))
    h = np.diff(log_snr)
    of_step = 0.5 * after[0] * -np.expm1(-h) * h / np.append(np.inf, h[:-1])
  return np.where(np.isfinite(of_step) & np.isfinite(h), of_step, 0.0)


def _one_step(schedule: Schedule, steps: int, timestep: int) -> Sampler:
  """`x_1 = x0_hat(x_0, t)` from `x_0`, noise times its scale."""
  last, timestep = len(schedule.alphas) - 1, timestep or schedule.one_step or 0
  if not 0 < timestep <= last:
    raise UserError(f"sample.timestep={timestep} is outside 1..{last}, and the checkpoint "
                    "names none for sample.kind='one_step'")
  if steps != 1:
    raise UserError(f"sample.steps={steps} is 1 for sample.kind='one_step'")
  one = lambda value: np.asarray([value], np.float64)
  now = np.stack([one(schedule.alphas[timestep]), one(schedule.sigmas[timestep])])
  (p, q), _ = _estimates(schedule, now)
  return Sampler(timesteps=one(timestep), next_timesteps=one(0), alpha=now[0], sigma=now[1],
                 alpha_next=one(1), sigma_next=one(0), x_coef=p, out_coef=q, std=one(0),
                 clean_x_coef=p, clean_out_coef=q, correction=one(0),
                 input_scale=schedule.one_step_scale)
