"""The analytic world: Gaussian mixtures, exact networks and exact reward-tilted targets.

`make_models` puts a mixture behind the same seam as a pretrained network, so that a method's real
code can be proved against closed forms, on any linear path. Samples are vectors: latents `[B, D]`,
and `decode` is the identity.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.methods import FlowNet, Models
from jaxalign.sampling import Conditioning, Sampler, Schedule, make_sampler

SD_SCHEDULE = Schedule.variance_preserving(
    np.cumprod(1 - np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2))
FLOW_SCHEDULE = Schedule.flow()
# What proofs run on: options of `make_models` for a chain on either path, with noise at every step.
PATHS = {"vp": dict(schedule=SD_SCHEDULE),
         "flow": dict(schedule=FLOW_SCHEDULE, kind="flow_sde", eta=0.7)}


@dataclasses.dataclass(frozen=True)
class Mixture:
  """`sum_i weights_i N(means_i, variances_i I)` in D dimensions; f64 `[M]`, `[M, D]`, `[M]`."""
  weights: np.ndarray
  means: np.ndarray
  variances: np.ndarray

  def tilted(self, w, beta: float) -> "Mixture":
    """Exact `p(x) exp(beta w.x) / Z`: the same shift for every component, and new weights."""
    w = np.asarray(w, np.float64)
    log = (np.log(self.weights) + beta * self.means @ w
           + 0.5 * beta ** 2 * self.variances * (w @ w))
    weights = np.exp(log - log.max())
    return Mixture(weights / weights.sum(), self.means + beta * self.variances[:, None] * w,
                   self.variances)

  def noised(self, alpha: float, sigma: float) -> "Mixture":
    """Marginal of `alpha x + sigma eps`."""
    return Mixture(self.weights, alpha * self.means, alpha ** 2 * self.variances + sigma ** 2)

  def tree(self):
    return {"log_weights": jnp.log(jnp.asarray(self.weights, jnp.float32)),
            "means": jnp.asarray(self.means, jnp.float32),
            "variances": jnp.asarray(self.variances, jnp.float32)}


def estimates(mixture, x, alpha, sigma):
  """`E[x_0 | x_t = x]` and `E[eps | x_t = x]` of a mixture tree, both `[B, D]`, at any level.

  `alpha`, `sigma` are scalars or `[B]`; x is `[B, D]`.
  """
  alpha, sigma = (jnp.broadcast_to(level, x.shape[:1])[:, None] for level in (alpha, sigma))
  spread, means = mixture["variances"][None], mixture["means"][None]
  var = jnp.square(alpha) * spread + jnp.square(sigma)                            # [B, M]
  delta = x[:, None] - alpha[..., None] * means                                   # [B, M, D]
  log = (mixture["log_weights"][None] - 0.5 * jnp.square(delta).sum(-1) / var
         - 0.5 * x.shape[-1] * jnp.log(var))
  share = jax.nn.softmax(log, -1)[..., None]
  clean = means + (alpha * spread / var)[..., None] * delta
  return (share * clean).sum(1), sigma * (share * delta / var[..., None]).sum(1)


def exact_output(schedule: Schedule, mixture, x, t):
  """What a perfect network of this schedule outputs at times `t`, a scalar or `[B]`."""
  return schedule.target(*estimates(mixture, x, *schedule.levels(t)), t)


def gaussian_line(schedule: Schedule, alpha, sigma, mean, var):
  """`slope, offset` of the perfect output `slope x + offset` for N(mean, var) data, numpy f64.

  `alpha`, `sigma` are levels of any shape. The closed form of `exact_output` for one Gaussian, of
  which chains of affine steps are made.
  """
  total = alpha ** 2 * var + sigma ** 2
  of_eps, of_clean = {"epsilon": (1, 0), "sample": (0, 1), "v_prediction": (alpha, -sigma),
                      "flow": (1, -1)}[schedule.prediction]
  slope = (of_eps * sigma + of_clean * alpha * var) / total
  return slope, of_clean * mean - slope * alpha * mean


def linear_reward(w):
  """`R(x) = w.x`: (reward params, score function)."""
  return {"w": jnp.asarray(w, jnp.float32)}, lambda p, x, _: (x * p["w"][None]).sum(-1)


def quadratic_reward(c):
  """`R(x) = -|x - c|^2 / 2`: (reward params, score function)."""
  score = lambda p, x, _: -0.5 * jnp.square(x - p["c"][None]).sum(-1)
  return {"c": jnp.asarray(c, jnp.float32)}, score


def affine_per_step(sampler: Sampler, dim: int, centre: float = 0.0) -> FlowNet:
  """`bias_k + slope_k (x - alpha_k centre)` at each level of the sampler and at its output.

  `centre` near the mean of the data decorrelates bias and slope, which speeds up training; what the
  map can represent does not depend on it.
  """
  times = -jnp.asarray(np.append(sampler.timesteps, 0), jnp.float32)
  alpha = np.append(sampler.alpha, sampler.alpha_next[-1])
  middle = centre * jnp.asarray(alpha, jnp.float32)

  def apply(params, x, t, cond):
    k = jnp.searchsorted(times, -jnp.broadcast_to(t, x.shape[:1]))
    return params["bias"][k] + params["slope"][k] * (x - middle[k][:, None])
  zeros = lambda: jnp.zeros((sampler.steps + 1, dim), jnp.float32)
  return FlowNet(lambda key: {"bias": zeros(), "slope": zeros()}, apply)


def mlp(schedule: Schedule, dim: int, width: int = 64) -> FlowNet:
  """A two-layer network on `(x, noise level features)` with zero-initialised output."""
  def init(key):
    k1, k2 = jax.random.split(key)
    normal = lambda k, n, m: jax.random.normal(k, (n, m)) / np.sqrt(n)
    return {"w1": normal(k1, dim + 6, width), "b1": jnp.zeros(width),
            "w2": normal(k2, width, width), "b2": jnp.zeros(width),
            "w3": jnp.zeros((width, dim)), "b3": jnp.zeros(dim)}

  def apply(params, x, t, cond):
    alpha, sigma = (level[:, None] for level in schedule.levels(jnp.broadcast_to(t, x.shape[:1])))
    level = jnp.concatenate([alpha, sigma], -1)
    log_snr = jnp.log(jnp.maximum(alpha, 1e-3) / jnp.maximum(sigma, 1e-3)) / 2
    angles = jnp.concatenate(
        [jnp.sin(log_snr), jnp.cos(log_snr), log_snr, jnp.sin(2 * log_snr)], -1)
    h = jnp.concatenate([x, level, angles], -1)
    h = jax.nn.silu(h @ params["w1"] + params["b1"][None])
    h = jax.nn.silu(h @ params["w2"] + params["b2"][None])
    return h @ params["w3"] + params["b3"][None]
  return FlowNet(init, apply)


def make_models(mixture: Mixture, reward, *, steps: int = 50, policy=None, flow=None,
                schedule: Schedule = SD_SCHEDULE, **sampler_options) -> Models:
  """`Models` whose base denoiser is exact for `mixture`.

  Args:
    reward: what `linear_reward` or `quadratic_reward` returns.
    policy, flow: FlowNets added to the exact output, and used as flow network; per-step affine maps
      by default.
  """
  dim = mixture.means.shape[1]
  sampler = make_sampler(schedule, steps, **sampler_options)
  policy = policy or affine_per_step(sampler, dim)
  reward_params, score = reward

  def denoise(variables, x, t, cond):
    out = exact_output(schedule, variables["base"], x, t)
    if variables["policy"] is None:
      return out
    return out + policy.apply(variables["policy"], x, t, cond)
  return Models(
      denoise=denoise, schedule=schedule, sampler=sampler, guidance=1.0, latent_shape=(dim,),
      combine=lambda policy, base: {"base": base, "policy": policy},
      init_policy=lambda key, frozen: policy.init(key),
      decode=lambda params, latents: latents,
      decode_unclamped=lambda params, latents: latents, score=score,
      flow=flow or affine_per_step(sampler, dim),
      frozen={"base": mixture.tree(), "decoder": {}, "reward": reward_params})


def make_batch(size: int):
  """The batch of an unconditional model."""
  return {"conditioning": Conditioning({}, {}), "prepared": {},
          "prompt_ids": jnp.zeros(size, jnp.int32), "sample_ids": jnp.arange(size)}
