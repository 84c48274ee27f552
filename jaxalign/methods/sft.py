"""SFT: supervised fine-tuning on the preferred images of pairs, what preference losses must beat.

  L = mean over elements of (target_w - f_theta(x_w, t, c))^2

The rest is `shared/preference.py`.
"""
import dataclasses

from jaxalign.methods.shared import preference

make = preference.make


@dataclasses.dataclass(frozen=True)
class Config(preference.Config):
  """Keys of the `method` group; see `preference.Config`."""

  def objective(self, error, change, label):
    return error.mean(), {}
