"""Noise schedules of all models: linear paths `x_t = alpha_t x_0 + sigma_t eps`.

`t` is the time that the network sees, a float: the training step 0..999 of a variance-preserving
schedule (999 noisiest, `alpha^2 + sigma^2 = 1`), `1000 sigma` on a rectified flow, whose
`alpha = 1 - sigma`. Between whole times both levels are linear in t.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import UserError

# What a network's output o says of x at level (alpha, sigma): coefficients (p, q) of the clean
# estimate `p x - q o`, and (r, w) of the noise estimate `r x + w o`.
_ESTIMATES = {
    "epsilon": lambda a, s: ((1 / a, s / a), (0 * a, 1 + 0 * a)),
    "sample": lambda a, s: ((0 * a, -1 + 0 * a), (1 / s, -a / s)),
    "v_prediction": lambda a, s: ((a, s), (s, a)),
    "flow": lambda a, s: ((1 + 0 * a, s), (1 + 0 * a, a)),
}
PREDICTIONS = tuple(_ESTIMATES)
# diffusers' classes on a variance-preserving schedule that their betas define; which of them it is
# does not matter to us.
_TRAINED = ("DDIM", "DDIMParallel", "DDPM", "DDPMParallel",
            "DEISMultistep", "DPMSolverMultistep", "DPMSolverSDE", "DPMSolverSinglestep",
            "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete",
            "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD", "UniPCMultistep")
# In scheduler_config.json, of one-step generators: `Schedule.one_step` and `one_step_scale`.
ONE_STEP_KEY, ONE_STEP_SCALE_KEY = "one_step_timestep", "one_step_input_scale"


def shifted(sigma, shift: float):
  """Flow levels moved toward noise: `shift sigma / (1 + (shift - 1) sigma)`; fixes 0 and 1.

  Reference: Esser et al. 2024, equation 23.
  """
  return shift * sigma / (1 + (shift - 1) * sigma)


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
  """A linear path from data to noise, and what the network predicts on it.

  Attributes:
    alphas, sigmas: `[N]` f64, the levels at times 0..N-1: 1000 of a trained schedule, 1001 on a
      flow.
    prediction: what the network outputs: "epsilon", "sample" (x_0), "v_prediction"
      (`alpha eps - sigma x_0`) or "flow" (`eps - x_0`).
    shift: of the levels that a flow is trained and sampled on; 1 is none.
    steps_offset, spacing, final: the checkpoint's own sampling conventions, see `make_sampler`.
    one_step: time at which a one-step generator is told that its input lies; None for multi-step
      models.
    one_step_scale: standard deviation of that input: 1 for DMD2, `sqrt(1 - abar)` for SiD-LSG.
  """
  alphas: np.ndarray
  sigmas: np.ndarray
  prediction: str = "epsilon"
  shift: float = 1.0
  steps_offset: int = 1
  spacing: str = "leading"
  final: str = "noisy"
  one_step: int | None = None
  one_step_scale: float = 1.0

  @classmethod
  def variance_preserving(cls, abar, prediction: str = "epsilon", **conventions) -> "Schedule":
    """From `alpha_bar_t`, `[N]` decreasing in [0, 1)."""
    abar = np.asarray(abar, np.float64)
    return cls(np.sqrt(abar), np.sqrt(1 - abar), prediction, **conventions)

  @classmethod
  def flow(cls, shift: float = 1.0, spacing: str = "linspace", **conventions) -> "Schedule":
    """Rectified flow; `spacing="shifted_twice"` is the grid of SD3's scheduler."""
    sigmas = np.arange(1001) / 1000
    return cls(1 - sigmas, sigmas, "flow", shift, spacing=spacing,
               **{"final": "clean", **conventions})

  @classmethod
  def from_config(cls, config: dict) -> "Schedule":
    """Reads a diffusers `scheduler_config.json`; raises UserError on a key it cannot honour."""
    scale = config.get(ONE_STEP_SCALE_KEY, 1.0)
    if type(scale) not in (int, float) or not 0 < scale < np.inf:
      raise UserError(f"scheduler_config.json: {ONE_STEP_SCALE_KEY}={scale!r} is not a number "
                      "above 0")
    own = {"one_step": config.get(ONE_STEP_KEY), "one_step_scale": float(scale)}
    name = str(config.get("_class_name"))
    if name == "FlowMatchEulerDiscreteScheduler":
      return cls._flow_from_config(config, own)
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas", False):
      raise UserError(f"scheduler_config.json: {name} on a flow is not supported; "
                      "FlowMatchEulerDiscreteScheduler is")
    if name.removeprefix("Flax").removesuffix("Scheduler") not in _TRAINED:
      raise UserError(f"scheduler_config.json: _class_name={name!r} is not supported; "
                      "FlowMatchEulerDiscreteScheduler is, and DDIMScheduler and its like")
    return cls._trained_from_config(config, own)

  @classmethod
  def _flow_from_config(cls, config: dict, own: dict) -> "Schedule":
    for key in ("use_dynamic_shifting", "invert_sigmas", "shift_terminal", "use_karras_sigmas",
                "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling"):
      if config.get(key):
        raise UserError(f"scheduler_config.json: {key}={config[key]!r} is not supported")
    shift, steps = config.get("shift", 1.0), config.get("num_train_timesteps", 1000)
    if type(shift) not in (int, float) or not 0 < shift < np.inf:
      raise UserError(f"scheduler_config.json: shift={shift!r} is not a number above 0")
    if steps != 1000:
      raise UserError(f"scheduler_config.json: num_train_timesteps={steps!r} is not supported on a "
                      "flow (1000)")
    return cls.flow(float(shift), "shifted_twice", **own)

  @staticmethod
  def _betas(config: dict) -> np.ndarray:
    """`[N]` f64; what the file does not say is not guessed."""
    if config.get("trained_betas") is not None:
      try:
        betas = np.asarray(config["trained_betas"], np.float64)
      except (TypeError, ValueError):
        betas = np.zeros(0)
      if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
        raise UserError("scheduler_config.json: trained_betas is no list of numbers between 0 and "
                        "1")
      return betas
    keys = ("beta_start", "beta_end", "beta_schedule")
    missing = [key for key in keys if config.get(key) is None]
    if missing:
      raise UserError(f"scheduler_config.json: {', '.join(missing)} of "
                      f"{config.get('_class_name')} missing, and not guessed")
    start, end, kind = (config[key] for key in keys)
    steps = config.get("num_train_timesteps", 1000)
    for key in keys[:2]:
      if type(config[key]) not in (int, float) or not 0 < config[key] < 1:
        raise UserError(f"scheduler_config.json: {key}={config[key]!r} is not a number between 0 "
                        "and 1")
    if type(steps) is not int or not 2 <= steps <= 100_000:
      raise UserError(f"scheduler_config.json: num_train_timesteps={steps!r} is not a number of "
                      "steps")
    if kind == "scaled_linear":
      return np.linspace(start ** 0.5, end ** 0.5, steps, dtype=np.float64) ** 2
    if kind == "linear":
      return np.linspace(start, end, steps, dtype=np.float64)
    raise UserError(f"scheduler_config.json: beta_schedule={kind!r} is not supported "
                    "(scaled_linear, linear or trained_betas)")

  @classmethod
  def _trained_from_config(cls, config: dict, own: dict) -> "Schedule":
    betas = cls._betas(config)
    if config.get("timestep_type", "discrete") != "discrete":
      raise UserError(f"scheduler_config.json: timestep_type={config['timestep_type']!r} is not "
                      "supported (discrete)")
    for key in ("thresholding", "clip_sample"):
      # PyTorch schedulers clip by default; a config written by them always states the key.
      if config.get(key, False):
        raise UserError(f"scheduler_config.json: {key}=true is not supported")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS or prediction == "flow":
      raise UserError(f"scheduler_config.json: prediction_type={prediction!r} is not one of "
                      f"{PREDICTIONS[:3]}")
    abar = np.cumprod(1 - betas)
    if config.get("rescale_betas_zero_snr", False):
      root = np.sqrt(abar)
      abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    if abar[-1] == 0 and prediction == "epsilon":
      raise UserError("scheduler_config.json: rescale_betas_zero_snr=true starts from noise alone, "
                      "of which prediction_type='epsilon' says nothing; it is for 'v_prediction' "
                      "and 'sample'")
    return cls.variance_preserving(
        abar, prediction, steps_offset=int(config.get("steps_offset", 0)),
        spacing=config.get("timestep_spacing", "leading"),
        final="clean" if config.get("set_alpha_to_one", True) else "noisy", **own)

  @property
  def is_flow(self) -> bool:
    return self.prediction == "flow"

  @property
  def times(self) -> np.ndarray:
    """The times that a network is trained at, `[N]` f64, the noisiest last."""
    index = np.arange(len(self.alphas), dtype=np.float64)
    return index if self.shift == 1 else index[-1] * shifted(index / index[-1], self.shift)

  @property
  def training_levels(self) -> np.ndarray:
    """`(alpha, sigma)` at `times`, `[2, N]` f64."""
    index = np.arange(len(self.alphas))
    return np.stack([np.interp(self.times, index, table) for table in (self.alphas, self.sigmas)])

  def levels(self, t):
    """`(alpha, sigma)` f32 at times `t` of any shape."""
    t, last = jnp.asarray(t, jnp.float32), len(self.alphas) - 1
    low = jnp.clip(jnp.floor(t), 0, last)
    part, low = t - low, low.astype(jnp.int32)
    high = jnp.minimum(low + 1, last)

    def between(table):
      table = jnp.asarray(table, jnp.float32)
      return table[low] + part * (table[high] - table[low])
    return between(self.alphas), between(self.sigmas)

  def draw_t(self, key, shape=()):
    """Times of training, f32: uniform whole ones, or on a flow logit-normal(0, 1), then shifted.

    Reference: Ho et al. 2020, algorithm 1; Esser et al. 2024, section 3.1.
    """
    if self.is_flow:
      sigma = jax.nn.sigmoid(jax.random.normal(key, shape))
      return (len(self.alphas) - 1) * shifted(sigma, self.shift)
    return jax.random.randint(key, shape, 0, len(self.alphas)).astype(jnp.float32)

  def quantile(self, share):
    """The times below which a part `share`, in [0, 1), of those of training lies; f32.

    For batches that are spread evenly over time, where `draw_t` draws each time by itself.
    """
    if self.is_flow:
      sigma = jax.nn.sigmoid(jax.scipy.special.ndtri(share))
      return (len(self.alphas) - 1) * shifted(sigma, self.shift)
    return jnp.floor(share * len(self.alphas))

  def coefficients(self, alpha, sigma):
    """`(p, q), (r, w)` with `x0_hat = p x - q o` and `eps_hat = r x + w o`, numpy or JAX."""
    return _ESTIMATES[self.prediction](alpha, sigma)

  def to_x0(self, output, x_t, t):
    """Network output -> clean estimate; `t` is a scalar or `[B]`."""
    (p, q), _ = self.coefficients(*self._levels_like(t, x_t))
    return p * x_t - q * output

  def to_eps(self, output, x_t, t):
    """Network output -> noise estimate."""
    _, (r, w) = self.coefficients(*self._levels_like(t, x_t))
    return r * x_t + w * output

  def target(self, x_0, eps, t):
    """What the network should output where `x_t` is made of `x_0` and `eps`."""
    alpha, sigma = self._levels_like(t, x_0)
    return {"epsilon": lambda: eps, "sample": lambda: x_0, "flow": lambda: eps - x_0,
            "v_prediction": lambda: alpha * eps - sigma * x_0}[self.prediction]()

  def add_noise(self, x_0, noise, t):
    """`x_t`, also the network's input in denoising losses."""
    alpha, sigma = self._levels_like(t, x_0)
    return alpha * x_0 + sigma * noise

  def _levels_like(self, t, x):
    return [expand(level, x) for level in self.levels(t)]


def expand(values, like):
  """Scalar or `[B]` values -> shape that broadcasts against `[B, ...]`."""
  values = jnp.asarray(values)
  return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))
