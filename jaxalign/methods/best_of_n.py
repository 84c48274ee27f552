"""Best of N: of N samples of a prompt the one that scores best. The rival of all who optimise.

  z* = argmax of R(M(z)) over z_1 .. z_N ~ N(0, I)

It needs no gradient, takes any reward, and stays within what the model makes: the KL divergence of
its law from the prior is at most `ln N - (N - 1) / N` nats. Its gain grows as `sqrt(2 ln N)`
standard deviations of the reward. The first candidate is the sample that the base model is
evaluated on, so that N = 1 is the base.
"""
import dataclasses

import jax.numpy as jnp

from jaxalign.config.fields import check
from jaxalign.config.schema import OptimConfig
from jaxalign.methods import Method, Models
from jaxalign.methods.shared.noise import draw, generate


@dataclasses.dataclass(frozen=True)
class Config:
  """The `method` group has no keys: N - 1 is `train.steps`."""
  at_inference = True

  def __post_init__(self):
    check("method", self)


def make(models: Models, cfg: Config, optim: OptimConfig) -> Method:
  """Best of N as a Method at inference: one candidate of each image per update."""

  def init(key, frozen, batch):
    noise = draw(models, key, batch["sample_ids"])
    rows = noise.shape[:1]
    return {"best": noise, "best_reward": jnp.full(rows, -jnp.inf, jnp.float32),
            "best_step": jnp.zeros(rows, jnp.int32), "updates": jnp.asarray(0, jnp.int32)}

  def collect(state, frozen, batch, key):
    fresh = draw(models, key, batch["sample_ids"])
    noise = jnp.where(state["updates"] == 0, state["best"], fresh)
    return {"batch": batch, "noise": noise,
            "images": generate(models, frozen, noise, batch["conditioning"])}

  def update(state, frozen, experience, rewards, key):
    better, updates = rewards > state["best_reward"], state["updates"]
    noise = experience["noise"]
    per_row = better.reshape((-1,) + (1,) * (noise.ndim - 1))
    best_reward = jnp.where(better, rewards, state["best_reward"])
    state = {"best": jnp.where(per_row, noise, state["best"]), "best_reward": best_reward,
             "best_step": jnp.where(better, updates, state["best_step"]), "updates": updates + 1}
    return state, {"train/reward": rewards, "train/best_reward": best_reward}

  return Method(init=init, collect=collect, update=update, product=lambda state: state["best"],
                cost=lambda batch: cost(models, batch))


def cost(models: Models, batch: int) -> dict[str, int]:
  """Evaluations per update of one sample and one guidance branch."""
  return {"denoiser_forward": batch * models.sampler.steps * models.branches,
          "denoiser_backward": 0, "decodes": batch, "reward_queries": batch, "reward_gradients": 0}


def equal_candidates(models: Models, spent: dict[str, float], images: int) -> int:
  """N whose cost in denoiser evaluations is what was `spent` on so many images, at least 1.

  A backward pass counts as two forward ones: with respect to inputs it costs about one, and
  recomputing activations another.
  """
  calls = spent["denoiser_forward"] + 2 * spent["denoiser_backward"]
  return max(1, round(calls / cost(models, images)["denoiser_forward"]))
