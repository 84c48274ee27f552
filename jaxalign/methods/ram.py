"""RAM, Reinforce Adjoint Matching: regression on the reference's output plus rewarded residuals.

  sample with old;  A = (R - group's baseline) / scale
  L = mean |o - sg[o_ref + eta A (y - o_in)]|^2,    o_in the policy, or old            (inner)

The optimum of a KL-regularised reward has `o - o_ref = integral of Cov_lam(R, y | x) d lam` along
its tilts; RAM's fixed point takes the right end of that integral, `eta Cov_theta(A, y | x)`. It is
the exact tilt for a linear reward on Gaussians, and one to first order in eta otherwise: a concave
reward is tilted by less. Every level has the same weight on both terms, so none is favoured.

Where `E[A | x] < -1 / eta` the iteration repels: keep eta below 1 / max |A|, or take the baseline
"min".

The rest is `shared/forward_process.py`. Bergmeister et al. 2026, "Reinforce Adjoint Matching",
equation 17; from that equation as others state it, without its correction for the cost of the path.
"""
import dataclasses
from typing import Literal

import jax

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
    eta: >= 0, strength of the tilt: per standard deviation of the reward on the base model with the
      scale "fixed"; 0 keeps the reference.
    inner: o_in, whose residual is weighted: that of the "policy" or of "old".
    kl: none, the method has its own.
  """
  baseline: Literal["mean", "loo", "min"] = "loo"
  old_rate: NonNegative = 0.01
  old_cap: forward_process.Fraction = 0.9
  eta: NonNegative = 0.4
  inner: Literal["policy", "old"] = "policy"

  reads_ref = True
  strength = "eta"

  def __post_init__(self):
    super().__post_init__()
    if self.kl:
      raise UserError(f"method.kl={self.kl}: ram is held by its own regression on the reference; "
                      "method.eta is its strength")

  @property
  def reads_old(self):
    return self.inner == "old"

  @property
  def has_target(self):
    return self.advantage_scale == "fixed"

  def tilt(self, state):
    return self.eta

  def row_loss(self, out, row):
    inner = row.old if self.inner == "old" else jax.lax.stop_gradient(out)
    goal = row.ref + expand(self.eta * row.adv, out) * (row.target - inner)
    return mean_square(out - goal), {}
