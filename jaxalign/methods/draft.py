"""DRaFT: the reward's gradient through the last steps of the sampler, or through all.

  DRaFT    : x = x_N, through all steps
  DRaFT-K  : x = x_N, through the last K steps;  x_{N-K} is constant
  DRaFT-LV : x = the last step applied to x_N noised again, n times

The rest is `shared/reward_gradient.py`. Clark et al. 2023 (DRaFT, algorithm 1). Implemented from
the paper.
"""
import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxalign.config.fields import Whole
from jaxalign.devices import rng
from jaxalign.errors import UserError
from jaxalign.methods.shared import reward_gradient

make = reward_gradient.make


@dataclasses.dataclass(frozen=True)
class Config(reward_gradient.Config):
  """Keys of the `method` group; see `reward_gradient.Config` too.

  Attributes:
    backprop_steps: K, the number of last steps that gradients run through; 0 is all of them.
    renoise: n, copies of the output that are noised and denoised again (DRaFT-LV, K = 1); 0 is off.
  """
  backprop_steps: Whole = 1
  renoise: Whole = 0

  def __post_init__(self):
    super().__post_init__()
    if self.renoise and self.backprop_steps != 1:
      raise UserError(f"method.renoise={self.renoise} noises to the last step only: set "
                      f"method.backprop_steps=1, not {self.backprop_steps}")

  @property
  def copies(self):
    return self.renoise or 1

  def kept(self, steps):
    if self.renoise:
      return 0
    return reward_gradient.at_most("backprop_steps", self.backprop_steps, steps) or steps

  def visited(self, steps):
    return float(self.renoise or self.kept(steps))

  def output(self, models, policy, frozen, rows, key):
    """Outputs through the last K steps, or (LV) through the last from the output noised again."""
    sampler, latents = models.sampler, rows["latents"]
    if not self.renoise:
      return reward_gradient.replayed(
          models, policy, frozen, rows, jnp.ones(latents.shape[1] - 1, bool))
    k = sampler.steps - 1
    t, keys = sampler.at("timesteps", k), rng.per_sample(key, jnp.arange(latents.shape[0]))
    noise, step_noise = (rng.normal_per_sample(keys, models.latent_shape, i) for i in range(2))
    x = models.schedule.add_noise(latents[:, -1], noise, t)
    out = models.output(policy, frozen, x, t, rows["conditioning"])
    return sampler.mean(k, x, out) + sampler.at("std", k) * step_noise


# Named forms, arguments of the recipe.
PRESETS: dict[str, dict[str, Any]] = {
    "full": dict(backprop_steps=0),
    "one": dict(backprop_steps=1),
    "lv": dict(backprop_steps=1, renoise=2),
}
