"""AlignProp: the reward's gradient through a random set of the sampler's steps.

  x = x_N, through the steps drawn;  at the others the network's output is constant

The rest is `shared/reward_gradient.py`. Prabhudesai et al. 2023 (AlignProp). Implemented from the
paper.
"""
import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.methods.shared import reward_gradient

make = reward_gradient.make


@dataclasses.dataclass(frozen=True)
class Config(reward_gradient.Config):
  """Keys of the `method` group; see `reward_gradient.Config` too.

  Attributes:
    truncation: which steps gradients run through. "normal": the last K, N - K drawn from a normal
      distribution around 0.84 N with standard deviation 0.1 N; "uniform": the last K, K uniform in
      1..N; "per_step": step k with probability `(k + 1) / (N + 1)`, each on its own.
  """
  truncation: Literal["normal", "uniform", "per_step"] = "normal"

  def kept(self, steps):
    return steps

  def visited(self, steps):
    if self.truncation == "per_step":
      return steps / 2
    return steps - np.exp(truncation_log_prob(self.truncation, steps)) @ np.arange(steps)

  def output(self, models, policy, frozen, rows, key):
    """Outputs through a random set of steps, one draw for all rows."""
    active = draw_active(self.truncation, key, models.sampler.steps)
    return reward_gradient.replayed(models, policy, frozen, rows, active)


def truncation_log_prob(kind: str, steps: int) -> np.ndarray:
  """Log-probabilities `[N]` of N - K = 0..N-1, the number of first steps without gradient."""
  if kind == "uniform" or steps == 1:
    return np.full(steps, -math.log(steps))
  below = lambda x: 0.5 * (1 + math.erf((x - 0.84 * steps) / (0.1 * steps * math.sqrt(2))))
  mass = np.asarray([below(i + 1) - below(i) for i in range(steps)])
  mass[0] = 0.0                                   # draws outside [1, N) are made anew
  with np.errstate(divide="ignore"):
    return np.log(mass / mass.sum())


def draw_active(kind: str, key, steps: int):
  """The steps that gradients run through in one update: `[N]` bool."""
  k = jnp.arange(steps)
  if kind == "per_step":
    return jax.random.randint(key, (steps,), 0, steps + 1) <= k
  log_prob = jnp.asarray(truncation_log_prob(kind, steps), jnp.float32)
  return k >= jax.random.categorical(key, log_prob)
