"""Flow-GRPO and its relatives: policy gradients on the stochastic sampler of a flow model.

  sample `group` images of each prompt with a sampler made stochastic (`sample.kind`)
  A = (R - mean of the group) / std of the batch
  theta <- AdamW on max(-A rho, -A clip(rho, 1 - c, 1 + c)) + kl KL_k / D, for the trained steps

The relatives train fewer steps, with noise in these alone (`interval`, `noise`), or take another
sampler or ratio. What they converge to depends on the KL: with the exact KL, raw rewards and all
steps (preset `flow_grpo_tilt`) the tilt of the chain's own law, as far as its noise reaches; with
the published, level-dependent weight or with none, the mode, and stopping is the only temperature.

The method is `shared/policy_gradient.py`; this file holds its values. On variance-preserving models
`sample.kind="ddim"` with `sample.eta=1` has the part of the SDEs. Liu et al. 2025 (Flow-GRPO), Xue
et al. 2025 (DanceGRPO), Li et al. 2025 (MixGRPO); as in the published code.
"""
import dataclasses
from typing import Any

from jaxalign.config.fields import Count, NonNegative, Whole
from jaxalign.methods.shared import policy_gradient

make = policy_gradient.make


@dataclasses.dataclass(frozen=True)
class Config(policy_gradient.Config):
  """Keys of the `method` group; see `policy_gradient.Config`."""
  minibatches: Count = 2
  group: Count = 8
  interval: str = "early"
  interval_first: float = 0.9
  advantage: policy_gradient.Advantage = "group_batch"
  history: Whole = 0
  kl: NonNegative = 0.04
  kl_form: policy_gradient.Form = "flow_grpo"

  noise_at_every_step = False           # the last step may have none


# Arguments of the recipe, which also sets the samplers that belong to them: windows of three steps
# in the first half; a random 60 % of the steps, groups on one initial noise; a sliding window of
# four of 25 steps; and the form that has a target.
PRESETS: dict[str, dict[str, Any]] = {
    "flow_grpo_fast": dict(interval="random", interval_first=0.3, interval_within=0.5,
                           noise="interval", ratio="cps", clip_range=1e-5, kl=0.0),
    "dance": dict(interval="random", interval_first=0.6, branch=True, advantage="group_z",
                  kl=0.0),
    "mix": dict(interval="slide", interval_first=0.16, interval_stages=550, noise="interval",
                branch=True, advantage="group_z", kl=0.0),
    "flow_grpo_tilt": dict(interval="full", interval_first=1.0, advantage="group_loo",
                           advantage_clip=1e9, kl=0.1, kl_form="nats", kl_gradient="full"),
}
