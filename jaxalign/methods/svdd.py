"""SVDD: at every step of the sampler several candidates, of which one is kept.

No weight is trained, and the reward may be a black box. With the base model's transitions
`x_{k+1} = mu_k(x_k) + s_k z`, and r the reward of the clean estimate, of the output at the end:

  x_1 .. x_M <- candidates for the next step, all from one x, each with its own z
  r_m <- R(decode(x0_hat(x_m)))                                                      (collect)
  x <- one of them, by softmax(beta r_m), or the best                                (update)

With the value `log E[exp(beta R(x_N)) | x]` in place of beta r and M to infinity the softmax takes
each step of the tilt `p exp(beta R)` from the noise that it began with. There are no weights to
make up for what else r is: its limit is then another law; and the best of many at every step leaves
the model. `fk_steering` has the weights.

Li et al. 2024, "Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft
Value-Based Decoding" (SVDD). Implemented from the equations, with the reward of the clean estimate
as the value ("PM").
"""
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxalign.config.fields import Count, NonNegative, check
from jaxalign.config.schema import OptimConfig
from jaxalign.methods import Method, Models
from jaxalign.methods.shared import particles


@dataclasses.dataclass(frozen=True)
class Config:
  """Keys of the `method` group.

  Attributes:
    candidates: M of each step; 1 is the base model.
    beta: strength of the softmax.
    beta_unit: what it is measured in: "sigma" (divided by the reward's within-prompt standard
      deviation on the base model) or "raw".
    select: the candidate that is kept: by "softmax" of beta r, or "argmax".
    last_step: whether the outputs are candidates too; otherwise the first is the result.
  """
  candidates: Count = 8
  beta: NonNegative = 2.0
  beta_unit: Literal["sigma", "raw"] = "sigma"
  select: Literal["softmax", "argmax"] = "softmax"
  last_step: bool = True

  at_inference = True
  noise_at_every_step = True

  def __post_init__(self):
    check("method", self)


# The published script's: argument of the recipe.
PRESETS: dict[str, dict[str, Any]] = {
    "release": dict(candidates=20, select="argmax", last_step=False),
}


def make(models: Models, cfg: Config, optim: OptimConfig) -> Method:
  """SVDD as a Method at inference: a step of each image per update, and one for the outputs."""
  sampler, count = models.sampler, cfg.candidates
  steps = sampler.steps
  beta = particles.strength(models, cfg)

  def init(key, frozen, batch):
    state = particles.begin(models, key, batch, count)
    everyone = jnp.zeros_like(state["log_w"], jnp.int32)
    noise = particles.inherit(state["noise"], everyone, 0)
    kept = {name: value for name, value in state.items() if name not in ("log_w", "log_z")}
    return {**kept, "noise": noise, "x": sampler.input_scale * noise[:, :, 0]}

  def collect(state, frozen, batch, key):
    k = jnp.minimum(state["updates"], steps)
    rows = particles.repeated(batch, count)

    def on_the_way(x):
      out = models.output(None, frozen, x, sampler.at("timesteps", k), rows["conditioning"])
      return sampler.clean(k, x, out), sampler.mean(k, x, out)
    clean, mean = jax.lax.cond(k < steps, on_the_way, lambda x: (x, x),
                               particles.together(state["x"]))
    return {"batch": batch, "images": models.decode(frozen["decoder"], clean),
            "mean": particles.apart(mean, count)}

  def update(state, frozen, experience, rewards, key):
    k = jnp.minimum(state["updates"], steps)
    at_end = k == steps
    rewards = particles.numbers(rewards, count)
    chosen = rewards.argmax(1)
    if cfg.select == "softmax":
      keys = particles.keys_of(key, experience["batch"])
      logits = jnp.where(jnp.isneginf(rewards), -jnp.inf, beta * rewards)
      chosen = jax.vmap(jax.random.categorical)(keys, logits)
    if not cfg.last_step:
      chosen = jnp.where(at_end, 0, chosen)
    kept = jnp.broadcast_to(chosen[:, None], rewards.shape)
    noise = particles.inherit(state["noise"], kept, k)
    std = jnp.where(at_end, 0.0, sampler.at("std", jnp.minimum(k, steps - 1)))
    x = particles.pick(experience["mean"], kept) + std * noise[:, :, jnp.minimum(k + 1, steps)]
    state = particles.advance(state, state["updates"] > steps, chosen, rewards,
                              {"noise": noise, "x": x})
    return state, {"train/reward": rewards.mean(1), "train/best_reward": state["best_reward"]}

  return Method(init=init, collect=collect, update=update, product=lambda state: state["best"],
                cost=lambda batch: cost(models, cfg, batch))


def cost(models: Models, cfg: Config, batch: int) -> dict[str, int]:
  """Evaluations per update of one sample and one guidance branch, but for the outputs' update,
  which asks for their rewards only.
  """
  rows = batch * cfg.candidates
  return {"denoiser_forward": rows * models.branches, "denoiser_backward": 0, "decodes": rows,
          "reward_queries": rows, "reward_gradients": 0}
