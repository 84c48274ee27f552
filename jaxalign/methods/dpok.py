"""DPOK: policy gradients held to the reference by the KL of every step.

  maximise E_theta[ R(x_N) - kl sum_k KL(p_theta(. | x_k) || p_ref(. | x_k)) ]

The sum bounds the KL of the images from above. The optimum is the reference's path tilted by
`exp(R / kl)` given its noise, that of nabla-GFlowNet and of adjoint matching, and the reward may be
a black box. The published gradient leaves out that a step changes the KL of the later ones
(`kl_gradient="local"`), and is then more timid for curved rewards.

The method is `shared/policy_gradient.py`; this file holds its values. Fan et al. 2023, "DPOK:
Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models"; the value function that the
published code subtracts is replaced by the mean of the group, which changes no optimum.
"""
import dataclasses
from typing import Any

from jaxalign.config.fields import Count, NonNegative, Whole
from jaxalign.errors import UserError
from jaxalign.methods.shared import policy_gradient

make = policy_gradient.make


@dataclasses.dataclass(frozen=True)
class Config(policy_gradient.Config):
  """Keys of the `method` group; see `policy_gradient.Config`."""
  minibatches: Count = 2
  group: Count = 4
  advantage: policy_gradient.Advantage = "group_loo"
  advantage_clip: NonNegative = 1e9
  history: Whole = 0
  kl: NonNegative = 0.1
  kl_gradient: policy_gradient.Gradient = "full"

  def __post_init__(self):
    super().__post_init__()
    if self.kl == 0:
      raise UserError("method.kl=0.0 leaves policy gradients without a reference; for these take "
                      "configs/ddpo.py")


# The gradient of the paper, and the loss of the published code for several prompts: its weights of
# the reward, 1000, and of the squared difference of outputs, 0.1. Arguments of the recipe.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": dict(kl_gradient="local"),
    "release": dict(kl_gradient="local", kl_form="dpok", kl_unit="raw", kl=1e-4, clip_range=1e-4,
                    step_weights="uniform"),
}
