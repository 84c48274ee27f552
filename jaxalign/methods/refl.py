"""ReFL: the reward's gradient through one late step's clean estimate.

  m ~ one of the last steps;  x = x0_hat(x_m), through the network at x_m

The rest is `shared/reward_gradient.py`. Xu et al. 2023 (ImageReward, algorithm 1). Implemented from
the paper.
"""
import dataclasses

import jax
import jax.numpy as jnp

from jaxalign.config.fields import Count
from jaxalign.methods.shared import reward_gradient

make = reward_gradient.make


@dataclasses.dataclass(frozen=True)
class Config(reward_gradient.Config):
  """Keys of the `method` group; see `reward_gradient.Config` too.

  Attributes:
    window: the step whose clean estimate is scored is uniform over this many last ones.
  """
  window: Count = 5

  def kept(self, steps):
    return reward_gradient.at_most("window", self.window, steps)

  def visited(self, steps):
    return 1.0

  def output(self, models, policy, frozen, rows, key):
    """Clean estimates at a late step m of each row, drawn on its own."""
    sampler, latents = models.sampler, rows["latents"]
    m = jax.random.randint(key, (latents.shape[0],), 0, self.window)
    x = jnp.take_along_axis(latents, m.reshape((-1,) + (1,) * (latents.ndim - 1)), 1)[:, 0]
    k = sampler.steps - self.window + m
    out = models.output(policy, frozen, x, sampler.at("timesteps", k), rows["conditioning"])
    return sampler.clean(k, x, out)
