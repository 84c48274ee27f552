"""MaPO: preference pairs without a reference model.

With l_w and l_l the denoising errors of preferred and rejected image (`shared/preference.py`):

  m = T [phi(s l_w) - phi(s l_l)],  phi(u) = u / (exp(u) - 1)
  L = l_w - b log sigmoid(m)

What makes an image easy or hard to denoise does not cancel, as it does in Diffusion-DPO at the
price of a second forward pass; the first term keeps the preferred images likely.

Hong et al. 2024 (arXiv 2406.06424, equations 9-11 and the released code). Implemented from the
paper.
"""
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp

from jaxalign.config.fields import NonNegative
from jaxalign.errors import UserError
from jaxalign.methods.shared import preference
from jaxalign.methods.shared.preference import binary_cross_entropy, margin_metrics

make = preference.make


@dataclasses.dataclass(frozen=True)
class Config(preference.PairConfig):
  """Keys of the `method` group; see `preference.PairConfig` too.

  Attributes:
    link: margin of the errors: "code" (`phi`), "power" (`phi^beta`) or "scaled" (`beta phi`).
    logit_scale: T > 0, factor of the margin. A constant of the objective: the sampler has no part
      in it.
    error_scale: s > 0, factor of the mean squared errors inside phi.
    weight: b >= 0 of the margin term; 0 is SFT.
    beta: > 0, of "power" and "scaled".
  """
  link: Literal["code", "power", "scaled"] = "code"
  logit_scale: NonNegative = 1000.0
  error_scale: NonNegative = 0.5
  weight: NonNegative = 0.1
  beta: NonNegative = 8.0

  def __post_init__(self):
    super().__post_init__()
    for key in ("logit_scale", "error_scale", "beta"):
      if getattr(self, key) == 0:
        raise UserError(f"method.{key}=0.0 leaves no preference to learn; it is above 0")

  def objective(self, error, change, label):
    return mapo_loss(error[:, 0], error[:, 1], label, cfg=self)


# Named forms, arguments of the recipe: what was released, and two readings of equation 11.
PRESETS: dict[str, dict[str, Any]] = {
    "release": dict(link="code", logit_scale=1000.0, error_scale=0.5, weight=0.1),
    "paper_power": dict(link="power", logit_scale=1.0, error_scale=1.0, weight=1 / 8, beta=8.0),
    "paper_scaled": dict(link="scaled", logit_scale=1.0, error_scale=1.0, weight=1 / 8, beta=8.0),
}

CAP = 80.0           # phi is 1e-33 there; beyond 88 exp(u) overflows f32
SERIES = 0.2         # below, u / (exp(u) - 1) loses digits, and its gradient all of them


def _by_size(u, series: Callable, formula: Callable):
  """`series(u)` for small u, else `formula(u)`, each kept off the other's side.

  There is no lower bound: clipping at 0 would halve the gradient there.
  """
  u = jnp.minimum(u, CAP)
  small = u < SERIES
  return jnp.where(small, series(u), formula(jnp.where(small, SERIES, u)))


def phi(u):
  """`u / (exp(u) - 1)` for f32 `u >= 0` of any shape: 1 at 0, decreasing and convex, 0 at infinity.

  Value and gradient are right to 1e-6 and finite for every finite u.
  """
  return _by_size(u, lambda u: 1 - u / 2 + u ** 2 / 12 - u ** 4 / 720,
                  lambda u: u * jnp.exp(-u) / -jnp.expm1(-u))


def log_phi(u):
  """`log phi(u)`, of use where `phi` underflows or is raised to a power."""
  return _by_size(u, lambda u: -u / 2 - u ** 2 / 24 + u ** 4 / 2880,
                  lambda u: jnp.log(u) - u - jnp.log(-jnp.expm1(-u)))


def link(cfg: Config, error):
  """The decreasing function of a mean squared error whose differences are MaPO's margins."""
  u = cfg.error_scale * error
  if cfg.link == "power":
    return jnp.exp(cfg.beta * log_phi(u))
  return phi(u) * (cfg.beta if cfg.link == "scaled" else 1.0)


def mapo_loss(error_w, error_l, label, *, cfg: Config):
  """MaPO's loss from denoising errors.

  Args:
    error_w, error_l: `[B]` f32, mean squared errors of preferred and rejected image, same t and
      noise for both.
    label: `[B]` f32, 1, or 0.5 for a tie: then neither margin nor image is preferred.
  Returns:
    Scalar loss (`l + b log 2` where both errors are l) and metrics.
  Reference: the released code for "code"; equations 9-11 for "power" and "scaled", whose beta can
    be read in either way.
  """
  link_w, link_l = link(cfg, error_w), link(cfg, error_l)
  margin = cfg.logit_scale * (link_w - link_l)
  sft = (label * error_w + (1 - label) * error_l).mean()
  preference = cfg.weight * binary_cross_entropy(margin, label).mean()
  return sft + preference, {
      "loss/sft": sft, "loss/preference": preference, "train/link_w": link_w.mean(),
      "train/link_l": link_l.mean(), **margin_metrics(margin, label)}
