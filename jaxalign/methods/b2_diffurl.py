"""B2-DiffuRL: policy gradients under sparse reward, by training backwards and comparing branches.

One number per image says little about twenty steps. Two remedies (Hu et al. 2025, "Towards Better
Alignment: Training Diffusion Models with Reinforcement Learning Against Sparse Rewards"):
backward progressive training trains the last steps first and ever more of them; branch sampling
draws several continuations of one prefix and learns from the best against the worst, which differ
by nothing but the trained steps.

One update:

  s: trained steps, from `interval_first` T to `interval_last` T as training goes on
  roots x_0..x_{T-s} with the policy, then `group` branches x_{T-s}..x_T of each
  A: rewards standardised within the branches of a root
  per root whose branches differ: the best and the worst, with weights +-(A_best - A_worst) / 2
  theta <- AdamW on the clipped surrogate of their last s steps, a few times

The method is `policy_gradient` with these options; this file holds their values.
"""
import dataclasses
from typing import Annotated, Any

from jaxalign.config.fields import MOST, Count, Range, Whole
from jaxalign.methods.shared import policy_gradient

make = policy_gradient.make


@dataclasses.dataclass(frozen=True)
class Config(policy_gradient.Config):
  """Keys of the `method` group; see `policy_gradient.Config`."""
  inner_epochs: Count = 2
  group: Count = 5
  branch: bool = True
  interval: str = "grow"
  interval_first: float = 0.7
  advantage: policy_gradient.Advantage = "group_z"
  history: Whole = 8
  min_count: Annotated[int, Range(2, MOST)] = 2
  select: policy_gradient.Selection = "pairs"


# The paper's idea, comparison within a branch, which is the default; and what the published code
# computes: five branches, scores against the prompt's rewards of nine updates, each extreme kept
# for itself, all steps alike, and a clip range that never acts. `history` is the recipe's, as it
# counts updates, of which a published stage may take several.
PRESETS: dict[str, dict[str, Any]] = {
    "b2_paper": dict(advantage="group_z", select="pairs", pairs=1, clip_range=1e-4),
    "b2_code": dict(group=5, advantage="prompt", min_count=2, select="extremes", keep_above=0.5,
                    keep_below=-0.5, clip_range=0.1, step_weights="uniform"),
}
