"""The line: a Gaussian and a parabola for a reward, where the theory of a method is a formula.

Data N(0.7, 0.5), `R = -scale (x - 2)^2 / 2`. All chains of 20 steps are affine in x, so that the
law of the base's output, its exact tilt and the fixed point of each method are known; the method's
own result is measured on samples of several runs.
"""
import dataclasses

import jax.numpy as jnp
import numpy as np

from benchmarks.atlas.laboratory import Entry, World, sample, searched, trained
from jaxalign.config import registry
from jaxalign.testing import analytic

MEAN, VAR, CENTRE = 0.7, 0.5, 2.0
MIXTURE = analytic.Mixture(np.ones(1), np.asarray([[MEAN]]), np.asarray([VAR]))
SEEDS, COUNT = 4, 2048


def reward(x):
  return -0.5 * jnp.square(x[:, 0] - CENTRE)


AFFINE = World("line", MIXTURE, reward,
               lambda schedule, sampler: analytic.affine_per_step(sampler, 1, centre=MEAN))
# Pairs are noised to every level, not to those of a sampler.
SMOOTH = World("smooth line", MIXTURE, reward,
               lambda schedule, sampler: analytic.mlp(schedule, 1, width=32))


@dataclasses.dataclass(frozen=True)
class Law:
  mean: float
  var: float

  @property
  def std(self) -> float:
    return float(np.sqrt(self.var))

  def tilted(self, beta: float) -> "Law":
    """`p exp(-beta (x - c)^2 / 2) / Z`."""
    precision = 1 / self.var + beta
    return Law((self.mean / self.var + beta * CENTRE) / precision, 1 / precision)


# ---- chains --------------------------------------------------------------------------------------


def line_of(models, law: Law = Law(MEAN, VAR)):
  """Slopes and offsets `[N]` of the outputs that are exact for data of this law."""
  s = models.sampler
  return analytic.gaussian_line(models.schedule, s.alpha, s.sigma, law.mean, law.var)


def steps_of(models, line=None):
  """Gains and offsets `[N]` of the transitions' means."""
  s, (slope, offset) = models.sampler, line or line_of(models)
  return s.x_coef - s.out_coef * slope, -s.out_coef * offset


def output_law(models, line=None) -> Law:
  """Of the chain whose network is affine, second-order steps included."""
  s, (slope, offset) = models.sampler, line or line_of(models)
  gain, add = steps_of(models, (slope, offset))
  x, noise, before = np.asarray([1.0, 0.0]), 0.0, None          # x = x[0] z + x[1] + noise
  for k in range(s.steps):
    clean = (s.clean_x_coef[k] - s.clean_out_coef[k] * slope[k]) * x
    clean[1] -= s.clean_out_coef[k] * offset[k]
    x, noise = gain[k] * x + [0, add[k]], gain[k] ** 2 * noise + s.std[k] ** 2
    x = x + (s.correction[k] * (clean - before) if before is not None else 0)
    before = clean
  return Law(float(x[1]), float(x[0] ** 2 + noise))


def pulled(models, curvature, centre, narrow: bool) -> Law:
  """The output's law where each step's mean is drawn toward `centre_k` of `x_{k+1}`.

  The mean maximises `-curvature (m - centre)^2 / 2 - (m - mu)^2 / (2 s^2)`; with `narrow` the step
  is the whole kernel times the exponential of the first term.
  """
  gain, add = steps_of(models)
  m, v = 0.0, 1.0
  for k, s2 in enumerate(models.sampler.std ** 2):
    share = 1 / (1 + s2 * curvature[k])
    m = share * (gain[k] * m + add[k] + s2 * curvature[k] * centre[k])
    v = (share * gain[k]) ** 2 * v + (share if narrow else 1) * s2
  return Law(float(m), float(v))


def estimates_after(models):
  """Slopes and offsets `[N]` of the clean estimate at `x_{k+1}`; the output itself at the end."""
  s = models.sampler
  slope, offset = analytic.gaussian_line(models.schedule, s.alpha[1:], s.sigma[1:], MEAN, VAR)
  p, q = s.clean_x_coef[1:], s.clean_out_coef[1:]
  return np.append(p - q * slope, 1.0), np.append(-q * offset, 0.0)


# ---- theory: (models, beta) -> Law ---------------------------------------------------------------


def tilt(models, beta):
  return output_law(models).tilted(beta)


def control(models, beta):
  """The best policy whose steps keep their variances."""
  return pulled_by_value(models, beta, narrow=False)


def pulled_by_value(models, beta, narrow: bool):
  """Steps toward the value, or with `narrow` times its exponential: backwards from the reward."""
  gain, add = steps_of(models)
  curvature, centre = np.zeros(len(gain)), np.zeros(len(gain))
  p, c = beta, CENTRE
  for k in reversed(range(len(gain))):
    curvature[k], centre[k] = p, c
    p = gain[k] ** 2 * p / (1 + models.sampler.std[k] ** 2 * p)
    c = (c - add[k]) / gain[k] if gain[k] else 0.0          # pure noise says nothing of the end
  return pulled(models, curvature, centre, narrow)


def forward_looking(models, beta):
  """nabla-GFlowNet's guess `alpha grad R(x0_hat)` in place of the value's gradient."""
  slope, offset = estimates_after(models)
  gamma = np.append(models.sampler.alpha[1:], 1.0)
  return pulled(models, gamma * beta * slope ** 2, (CENTRE - offset) / slope, narrow=False)


def candidates(models, beta):
  """SVDD's limit of many candidates: kernels times `exp(beta R(x0_hat))`."""
  slope, offset = estimates_after(models)
  return pulled(models, beta * slope ** 2, (CENTRE - offset) / slope, narrow=True)


def _tangent(models, law: Law, line, beta):
  """`line` moved by `beta Cov(R, y | x_t)` of samples of this law."""
  s = models.sampler
  total = s.alpha ** 2 * law.var + s.sigma ** 2
  spread = law.var * s.sigma ** 2 / total
  mean = law.var * s.alpha / total, s.sigma ** 2 * law.mean / total
  # Cov(R, x_0 | x) = spread (c - mean(x)); the output falls by that over the clean coefficient.
  q = s.clean_out_coef
  return (line[0] + beta * spread * mean[0] / q, line[1] - beta * spread * (CENTRE - mean[1]) / q)


def first_order(models, beta):
  """RAM's and AWM's fixed point: the reference's outputs and the tangent at their own samples."""
  law = output_law(models)
  for _ in range(200):
    law = output_law(models, _tangent(models, law, line_of(models), beta))
  return law


def integrated(models, beta, parts=400):
  """NFT's small steps of the tangent, each from where the last one ended."""
  line = line_of(models)
  for _ in range(parts):
    line = _tangent(models, output_law(models, line), line, beta / parts)
  return output_law(models, line)


def climbed(models, beta, steps=20):
  """DNO's plain steps on the noise, of which all vectors move by their share."""
  law = output_law(models)
  left = (1 - beta / steps * law.var) ** steps
  return Law(CENTRE + left * (law.mean - CENTRE), left ** 2 * law.var)


def best_of(models, count):
  """The best of so many samples, by quadrature."""
  law = output_law(models)
  x = law.mean + law.std * np.linspace(-8, 8, 4001)
  p = np.exp(-0.5 * (x - law.mean) ** 2 / law.var)
  p /= p.sum()
  order = np.argsort(np.abs(x - CENTRE))[::-1]                  # from the worst on
  below = np.empty_like(p)
  below[order] = np.cumsum(p[order]) - 0.5 * p[order]
  return _moments(x, p * below ** (count - 1))


def preferred(models, beta):
  """The samples that win, as the network learns them: by their mean and variance."""
  law = output_law(models)
  x = law.mean + law.std * np.linspace(-6, 6, 801)
  p = np.exp(-0.5 * (x - law.mean) ** 2 / law.var)
  r = -0.5 * beta * (x - CENTRE) ** 2
  wins = (1 / (1 + np.exp(r[None] - r[:, None]))) @ (p / p.sum())
  return output_law(models, line_of(models, _moments(x, p * wins)))


def _moments(x, p):
  p = p / p.sum()
  return Law(float(p @ x), float(p @ x ** 2 - (p @ x) ** 2))


def mode(models, beta):
  """The reward's maximum, as sharply as the last step's noise allows."""
  return Law(CENTRE, float(models.sampler.std[-1] ** 2))


THEORY = {"fk_steering": tilt, "das": tilt, "svdd": candidates,
          "dno": climbed, "nabla_gfn": forward_looking, "nabla_gfn, flow net": control,
          "adjoint_matching": control, "dpok": control, "flow_grpo, tilt": control,
          "nft": integrated, "ram": first_order, "awm": first_order, "sft": preferred,
          "ddpo": mode, "b2_diffurl": mode, "flow_grpo": mode, "draft": mode,
          "draft, full": mode, "refl": mode, "alignprop": mode}


def theory_of(entry: Entry, models) -> Law | None:
  """The fixed point of an entry, where it has a formula."""
  if entry.strength == "candidates":
    return best_of(models, entry.updates)
  return THEORY[entry.name](models, entry.line_scale) if entry.name in THEORY else None


def chain_of(entry: Entry, path: str) -> str:
  return "noisy" if entry.chain == "sde" and path == "vp" else entry.chain


def row(entry: Entry, path: str) -> dict:
  """Base, exact tilt, theory's fixed point and the measured law, with errors over the runs."""
  world = SMOOTH if registry.need(registry.load_method(entry.method).Config,
                                  "reads_pairs") else AFFINE
  scale = entry.line_scale
  models, chain = world.models(path, chain_of(entry, path)), chain_of(entry, path)
  own = theory_of(entry, models)
  if entry.at_inference:
    x = np.stack([searched(entry, models, scale, i, COUNT) for i in range(SEEDS)])
  else:
    entry = dataclasses.replace(entry, lr=entry.line_lr or entry.lr)
    policies = trained(entry, world, path, chain, [scale] * SEEDS, list(range(SEEDS)))[-1]
    x, _ = sample(world, path, chain, policies, COUNT)
  runs = np.stack([x[..., 0].mean(1), x[..., 0].std(1)], 1).astype(np.float64)
  of = lambda law: law and [law.mean, law.std]
  return {"scale": scale, "base": of(output_law(models)), "tilt": of(tilt(models, scale)),
          "own": of(own), "measured": runs.mean(0).tolist(),
          "error": (runs.std(0, ddof=1) / np.sqrt(SEEDS)).tolist()}

