"""Noise schedules and the transitions of stochastic samplers, as arrays and pure functions.

Indices: `t` is the integer training timestep (0..999, 999 noisiest); `k` is the sampler index,
0 (pure noise) .. T-1 (the transition that produces the output). `abar` is the cumulative product
`alpha_bar_t`, so `x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps`.
"""
import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxalign.errors import UserError

PREDICTIONS = ("epsilon", "sample", "v_prediction")
KINDS = ("ddim", "ddpm", "one_step")
SPACINGS = ("leading", "trailing", "linspace")
FINALS = ("alpha0", "one")
# In scheduler_config.json, of one-step generators: `Schedule.one_step` and `one_step_scale`.
ONE_STEP_KEY, ONE_STEP_SCALE_KEY = "one_step_timestep", "one_step_input_scale"


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
  """A discrete noise schedule and what the network predicts under it.

  Attributes:
    alphas_cumprod: `[T_train]` f64, decreasing, in (0, 1).
    prediction: "epsilon", "sample" (x_0) or "v_prediction".
    steps_offset, spacing, final: the checkpoint's own sampling conventions, see `make_sampler`.
    one_step: training timestep at which a one-step generator is told that its input lies; None for
      multi-step models.
    one_step_scale: standard deviation of that input: 1 for DMD2, `sqrt(1 - abar)` for SiD-LSG.
  """
  alphas_cumprod: np.ndarray
  prediction: str = "epsilon"
  steps_offset: int = 1
  spacing: str = "leading"
  final: str = "alpha0"
  one_step: int | None = None
  one_step_scale: float = 1.0

  @classmethod
  def from_config(cls, config: dict) -> "Schedule":
    """Reads a diffusers `scheduler_config.json`; raises UserError on a key it cannot honour."""
    steps, start, end = (config.get(k, d) for k, d in (
        ("num_train_timesteps", 1000), ("beta_start", 1e-4), ("beta_end", 0.02)))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
      betas = np.asarray(config["trained_betas"], np.float64)
    elif kind == "scaled_linear":
      betas = np.linspace(start ** 0.5, end ** 0.5, steps, dtype=np.float64) ** 2
    elif kind == "linear":
      betas = np.linspace(start, end, steps, dtype=np.float64)
    else:
      raise UserError(f"scheduler_config.json: beta_schedule={kind!r} is not supported "
                      "(scaled_linear, linear or trained_betas)")
    for key in ("rescale_betas_zero_snr", "thresholding", "clip_sample"):
      # PyTorch schedulers clip by default; a config written by them always states the key.
      if config.get(key, False):
        raise UserError(f"scheduler_config.json: {key}=true is not supported")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
      raise UserError(f"scheduler_config.json: prediction_type={prediction!r} is not one of "
                      f"{PREDICTIONS}")
    scale = config.get(ONE_STEP_SCALE_KEY, 1.0)
    if type(scale) not in (int, float) or not 0 < scale < np.inf:
      raise UserError(f"scheduler_config.json: {ONE_STEP_SCALE_KEY}={scale!r} is not a number "
                      "above 0")
    return cls(np.cumprod(1 - betas), prediction, int(config.get("steps_offset", 0)),
               config.get("timestep_spacing", "leading"),
               "one" if config.get("set_alpha_to_one", True) else "alpha0",
               config.get(ONE_STEP_KEY), float(scale))

  def abar(self, t):
    """`alpha_bar_t` f32 for integer timesteps `t` of any shape."""
    return jnp.asarray(self.alphas_cumprod, jnp.float32)[t]

  def to_eps(self, prediction, x_t, t):
    """Network output -> noise estimate; `t` is a scalar or `[B]`."""
    abar = expand(self.abar(t), x_t)
    if self.prediction == "epsilon":
      return prediction
    if self.prediction == "sample":
      return (x_t - jnp.sqrt(abar) * prediction) / jnp.sqrt(1 - abar)
    return jnp.sqrt(abar) * prediction + jnp.sqrt(1 - abar) * x_t

  def from_eps(self, eps, x_t, t):
    """Noise estimate -> what the network would have output (inverse of `to_eps`)."""
    abar = expand(self.abar(t), x_t)
    if self.prediction == "epsilon":
      return eps
    if self.prediction == "sample":
      return (x_t - jnp.sqrt(1 - abar) * eps) / jnp.sqrt(abar)
    return (eps - jnp.sqrt(1 - abar) * x_t) / jnp.sqrt(abar)

  def to_x0(self, eps, x_t, t):
    """Clean estimate `x0_hat` from a noise estimate."""
    abar = expand(self.abar(t), x_t)
    return (x_t - jnp.sqrt(1 - abar) * eps) / jnp.sqrt(abar)

  def add_noise(self, x_0, noise, t):
    """Forward process sample `x_t`; also the target network's input in denoising losses."""
    abar = expand(self.abar(t), x_0)
    return jnp.sqrt(abar) * x_0 + jnp.sqrt(1 - abar) * noise


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
  """One Gaussian transition per step: `x_{k+1} ~ N(a_k x_k - b_k eps_k, std_k^2 I)`.

  Every first-order sampler of a variance-preserving schedule has this form, so methods need no
  other. All arrays are `[T]`, computed in f64 and used in f32.

  Attributes:
    timesteps: int32, training timestep at which the network sees `x_k`, decreasing.
    next_timesteps: int32, noise-level label of `x_{k+1}`; 0 after the last transition.
    abar, abar_next: `alpha_bar` of `x_k` and `x_{k+1}`.
    x_coef, eps_coef, std: `a_k`, `b_k` and the standard deviation (0 where deterministic).
    lam: `b_k / std_k^2`, so that `grad log(P_theta / P_ref) = -lam_k (eps_theta - eps_ref)`
      (infinite where deterministic).
    input_scale: standard deviation of `x_0`, where sampling starts.
  """
  timesteps: np.ndarray
  next_timesteps: np.ndarray
  abar: np.ndarray
  abar_next: np.ndarray
  x_coef: np.ndarray
  eps_coef: np.ndarray
  std: np.ndarray
  lam: np.ndarray
  input_scale: float = 1.0

  @property
  def steps(self) -> int:
    return len(self.timesteps)

  def at(self, name: str, k):
    """Attribute `name` at step index `k` (int or traced, any shape), f32 or int32."""
    value = getattr(self, name)
    return jnp.asarray(value, jnp.int32 if value.dtype.kind == "i" else jnp.float32)[k]

  def mean(self, k, x_k, eps):
    """Transition mean, shape of `x_k`; `k` is a scalar or `[B]`."""
    return expand(self.at("x_coef", k), x_k) * x_k - expand(self.at("eps_coef", k), x_k) * eps

  def log_prob(self, k, x_next, mean):
    """Log-density `[B]` f32 of a transition, summed over latent elements; 0 where deterministic.

    Subtracting two of these loses digits (each is about `D/2` nats); use `lam` and the difference
    of noise estimates where a ratio is wanted at the last steps.
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
                 timestep: int = 0) -> Sampler:
  """Builds the transition table.

  Args:
    steps: number of transitions T, 1..T_train.
    kind: "ddim" (variance scaled by `eta`), "ddpm" (ancestral; equals ddim with eta 1 but for
      `variance`) or "one_step" (one evaluation gives the output; only `timestep` matters).
    eta: in [0, 1]; 0 is deterministic, 1 has the ancestral variance. Ignored by "ddpm".
    spacing: "leading", "trailing" or "linspace"; empty takes the checkpoint's.
    final: what `alpha_bar` the output has: "alpha0" (the schedule's smallest noise, so that the
      last transition is stochastic and has a score) or "one" (clean, deterministic last
      transition); empty takes the checkpoint's.
    variance: for "ddpm": "small" (posterior variance) or "large" (beta).
    timestep: for "one_step": where the network is told that the noise lies; 0 takes the
      checkpoint's.
  Raises:
    UserError: unknown name or a number out of range, naming the `sample.*` key.
  Reference: Song et al. 2021 (DDIM), equations 12 and 16; Ho et al. 2020 (DDPM), equation 7.
  """
  total = len(schedule.alphas_cumprod)
  if kind == "one_step":
    return _one_step(schedule, steps, timestep)
  if schedule.one_step is not None:
    raise UserError(f"sample.kind={kind!r}: this checkpoint is a one-step generator, for which "
                    "sample.kind is 'one_step'")
  spacing, final = spacing or schedule.spacing, final or schedule.final
  for key, value, choices in (("kind", kind, KINDS), ("spacing", spacing, SPACINGS),
                              ("final", final, FINALS), ("variance", variance, ("small", "large"))):
    if value not in choices:
      raise UserError(f"sample.{key}={value!r} is not one of {choices}")
  if not 1 <= steps <= total:
    raise UserError(f"sample.steps={steps} is outside 1..{total}")
  if not 0 <= eta <= 1:
    raise UserError(f"sample.eta={eta} is outside [0, 1]")
  if spacing == "leading":
    timesteps = (np.arange(steps) * (total // steps))[::-1] + schedule.steps_offset
  elif spacing == "trailing":
    timesteps = np.round(total - np.arange(steps) * total / steps) - 1
  else:
    timesteps = np.round(np.linspace(0, total - 1, steps))[::-1]
  timesteps = np.clip(timesteps, 0, total - 1).astype(np.int32)

  abar = schedule.alphas_cumprod[timesteps]
  last = 1.0 if final == "one" else schedule.alphas_cumprod[0]
  abar_next = np.append(abar[1:], last)
  alpha = abar / abar_next
  posterior = (1 - abar_next) / (1 - abar) * (1 - alpha)
  in_mean = posterior * (1.0 if kind == "ddpm" else eta ** 2)
  # As in the PyTorch scheduler, no noise is added at timestep 0.
  large = kind == "ddpm" and variance == "large"
  var = np.where(timesteps > 0, 1 - alpha, in_mean) if large else in_mean
  x_coef = np.sqrt(abar_next / abar)
  eps_coef = x_coef * np.sqrt(1 - abar) - np.sqrt(np.maximum(1 - abar_next - in_mean, 0))
  lam = np.divide(eps_coef, var, out=np.full(steps, np.inf), where=var > 0)
  return Sampler(timesteps, np.append(timesteps[1:], 0).astype(np.int32), abar, abar_next,
                 x_coef, eps_coef, np.sqrt(var), lam)


def _one_step(schedule: Schedule, steps: int, timestep: int) -> Sampler:
  """`x_1 = (x_0 - sqrt(1 - abar) eps(x_0, t)) / sqrt(abar)` from `x_0`, noise times its scale."""
  total, timestep = len(schedule.alphas_cumprod), timestep or schedule.one_step or 0
  if not 0 < timestep < total:
    raise UserError(f"sample.timestep={timestep} is outside 1..{total - 1}, and the checkpoint "
                    "names none for sample.kind='one_step'")
  if steps != 1:
    raise UserError(f"sample.steps={steps} is 1 for sample.kind='one_step'")
  one = lambda value: np.asarray([value], np.float64)
  abar = schedule.alphas_cumprod[timestep]
  return Sampler(np.asarray([timestep], np.int32), np.zeros(1, np.int32), one(abar), one(1.0),
                 one(abar ** -0.5), one(np.sqrt((1 - abar) / abar)), one(0.0), one(np.inf),
                 schedule.one_step_scale)


def expand(values, like):
  """Scalar or `[B]` values -> shape that broadcasts against `[B, ...]`."""
  values = jnp.asarray(values)
  return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))
