"""Diffusion-DPO: preference pairs against a reference model.

With l_w and l_l the denoising errors of preferred and rejected image (`shared/preference.py`) and
those of the base model with the policy off:

  z = -(beta / 2) [(l_w - l_l) - (l_w_ref - l_l_ref)]
  L = -log sigmoid(z)

The reference's errors cancel what makes an image easy or hard to denoise, at the price of a second
forward pass.

Wallace et al. 2023 (arXiv 2311.12908). Implemented from the paper.
"""
import dataclasses

from jaxalign.config.fields import NonNegative
from jaxalign.errors import UserError
from jaxalign.methods.shared import preference
from jaxalign.methods.shared.preference import binary_cross_entropy, margin_metrics

make = preference.make


@dataclasses.dataclass(frozen=True)
class Config(preference.PairConfig):
  """Keys of the `method` group; see `preference.PairConfig` too.

  Attributes:
    beta: > 0, raw, per mean squared error; `2 D` times the beta per summed squared error of the
      paper, D the elements of a latent. Larger keeps the policy closer to the base model.
  """
  beta: NonNegative = 5000.0

  reads_reference = True

  def __post_init__(self):
    super().__post_init__()
    if self.beta == 0:
      raise UserError("method.beta=0.0 leaves no preference to learn; it is above 0")

  def objective(self, error, change, label):
    total, metrics = dpo_loss(change[:, 0], change[:, 1], label, beta=self.beta)
    reference = (error - change).mean(0)
    return total, {"train/ref_error_w": reference[0], "train/ref_error_l": reference[1], **metrics}


def dpo_loss(change_w, change_l, label, *, beta: float):
  """Diffusion-DPO's loss from how denoising errors differ from the reference's.

  Args:
    change_w, change_l: `[B]` f32, mean squared errors of preferred and rejected image less those of
      the reference, same t and noise for all.
    label: `[B]` f32, 1, or 0.5 for a tie.
    beta: per mean squared error.
  Returns:
    Scalar loss (log 2 at the reference) and metrics.
  Reference: equation 14 with a constant weight, T absorbed into beta.
  """
  logit = -0.5 * beta * (change_w - change_l)
  return binary_cross_entropy(logit, label).mean(), margin_metrics(logit, label)
