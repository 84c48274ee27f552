"""Advantage-weighted matching: the denoising loss of own samples, each with the sign of its worth.

  sample with the policy;  A = clip((R - group's baseline) / scale, +-c) / c;  l = mean |o - y|^2
  log p = -l, or another function of l and the level                                (weighting)
  rho = exp(log p - log p at the start of the batch)
  L = max(-A rho, -A clip(rho, 0, 2)) + kl |o - o_ref|^2 + kl_old |o - o_old|^2

With one optimiser step a batch rho is 1, and the gradient that of `A W |o - y|^2`: NFT's direction
with another weight W of the levels. With weighting "uniform" and a kl the fixed point is RAM's at
`eta = 1 / (c kl)`; other weightings tilt each level differently, and with no kl there is none.

The rest is `shared/forward_process.py`. Xue et al. 2025, "Advantage Weighted Matching"; the loss
as in the published code.
"""
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxalign.config.fields import NonNegative
from jaxalign.methods.shared import forward_process
from jaxalign.methods.shared.forward_process import mean_square

make = forward_process.make
TINY = 1e-10


@dataclasses.dataclass(frozen=True)
class Config(forward_process.Config):
  """Keys of the `method` group; see `forward_process.Config` too.

  Attributes:
    weighting: minus the log-likelihood that stands for a squared error l at level sigma: "uniform"
      (l), "sigma", "sigma2" (times sigma or its square), "huber" (sigma times the root of l) or
      "ghuber" (`sigma l^p / p`, p = 1/4: large errors count least).
    kl_old: weight >= 0 of `mean |o - o_old|^2`. Samples that are pushed away have nothing else that
      stops them.
  """
  weighting: Literal["uniform", "sigma", "sigma2", "huber", "ghuber"] = "ghuber"
  kl_old: NonNegative = 1.0
  old_cap: forward_process.Fraction = 0.3

  samples_with = "policy"

  @property
  def reads_old(self):
    return self.kl_old > 0

  @property
  def reads_start(self):
    return self.minibatches > 1

  def log_likelihood(self, out, row):
    """What stands for the log-density of x_0 at this level and noise, `[R]`."""
    square, sigma = mean_square(out - row.target), row.sigma
    power = lambda p: (jnp.power(square + TINY, p) - TINY ** p) / p
    return -{"uniform": lambda: square, "sigma": lambda: sigma * square,
             "sigma2": lambda: jnp.square(sigma) * square,
             "huber": lambda: 0.5 * sigma * power(0.5),
             "ghuber": lambda: sigma * power(0.25)}[self.weighting]()

  def row_loss(self, out, row):
    log_p = self.log_likelihood(out, row)
    before = self.log_likelihood(row.start, row) if self.reads_start else log_p
    log_rho = jnp.minimum(log_p - jax.lax.stop_gradient(before), 20.0)      # stays finite
    rho, adv = jnp.exp(log_rho), row.adv / self.advantage_clip
    each = jnp.maximum(-adv * rho, -adv * jnp.clip(rho, 0.0, 2.0))
    metrics = {"train/ratio": rho, "train/clip_fraction": (rho > 2).astype(jnp.float32)}
    if self.kl_old:
      each = each + self.kl_old * mean_square(out - row.old)
    return each, metrics


# What the published code computes, for GenEval: argument of the recipe.
PRESETS: dict[str, dict[str, Any]] = {
    "release": dict(group=24, advantage_scale="batch_std", kl=1e-3, levels=6),
}
