"""DiffusionNFT: the policy regresses on its lagged copy, moved by what good samples have in common.

  sample with old;  A = (R - group's baseline) / scale, clipped
  o+ = beta o + (1 - beta) o_old;  o- = (1 + beta) o_old - beta o;  r = (A / c + 1) / 2
  L  = (c / beta) [r |o+ - y|^2 + (1 - r) |o- - y|^2]
     = prox |o - o_old - (A / prox) (y - o_old)|^2 + constant,   prox = c beta

One regression, in which the reward's pull does not depend on prox, and the pull back to old does.
Its minimiser is the first-order tilt of old by `exp(R / (prox scale))`: with a fixed scale and a
`tilt_budget`, updates add up to the exact tilt, up to the size of a step; without a budget nothing
holds the policy, and it ends in the mode.

The rest is `shared/forward_process.py`. Zheng et al. 2025, "DiffusionNFT: Online Diffusion
Reinforcement with Forward Process"; the loss as in the published code.
"""
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxalign.config.fields import NonNegative
from jaxalign.errors import UserError
from jaxalign.methods.shared import forward_process
from jaxalign.methods.shared.forward_process import mean_square
from jaxalign.sampling import expand

make = forward_process.make


@dataclasses.dataclass(frozen=True)
class Config(forward_process.Config):
  """Keys of the `method` group; see `forward_process.Config` too.

  Attributes:
    prox: > 0, weight of `|o - o_old|^2`, and the inverse of a batch's tilt. The published `beta`
      times the clip range 5.
    weighting: of the levels: "adaptive" (each side's squared error over its mean absolute one, in
      units of the clean estimate, as published), "x0" (squared errors of the clean estimate) or
      "own" (of the network's output).
    tilt_budget: where training ends, in standard deviations of the reward on the base model: what
      batches add, `(1 - old's decay) / prox` each, is at most this in all; the last one is
      shortened, and nothing changes after it. Needs `advantage_scale="fixed"`; 0 is off.
  """
  prox: NonNegative = 5.0
  weighting: Literal["adaptive", "x0", "own"] = "adaptive"
  tilt_budget: NonNegative = 0.0

  def __post_init__(self):
    super().__post_init__()
    if self.prox == 0:
      raise UserError("method.prox=0.0 lets one batch move the policy without bound; it is above 0")
    if self.tilt_budget and self.advantage_scale != "fixed":
      raise UserError(f"method.tilt_budget={self.tilt_budget} counts a tilt that only "
                      "method.advantage_scale='fixed' has")

  @property
  def delta(self):
    return 1 / self.prox if self.advantage_scale == "fixed" else None

  @property
  def has_target(self):
    return self.delta is not None and not self.kl

  def tilt(self, state):
    return state["tilt"]

  def row_loss(self, out, row):
    if self.weighting != "adaptive":
      scale = jnp.square(row.unit) if self.weighting == "x0" else jnp.ones_like(row.unit)
      goal = row.old + expand(row.adv / self.prox, out) * (row.target - row.old)
      return self.prox * scale * mean_square(out - goal), {}
    c = self.advantage_clip
    beta, share = self.prox / c, 0.5 * (row.adv / c + 1)

    def side(sign):
      error = row.old + sign * beta * (out - row.old) - row.target
      size = row.unit * jnp.abs(error).mean(tuple(range(1, error.ndim)))
      return (jnp.square(row.unit) * mean_square(error)
              / jax.lax.stop_gradient(jnp.maximum(size, 1e-5)))
    return c / beta * (share * side(1) + (1 - share) * side(-1)), {}


# What the published code computes, for GenEval and PickScore, and for OCR: argument of the recipe.
PRESETS: dict[str, dict[str, Any]] = {
    "release": dict(group=24, advantage_scale="batch_std", kl=1e-4, levels=9),
    "release_ocr": dict(group=24, advantage_scale="batch_std", kl=1e-4, levels=9, prox=0.5,
                        minibatches=2, old_rate=0.0075, old_cap=0.999, old_flat=75),
}
