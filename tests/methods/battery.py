"""What the test files of the battery share: an update as the loop takes it, configs, data.

A method joins by being in the folder, with a recipe of its name that has the arguments of
`FAMILIES`.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
from jaxalign.config import registry
from jaxalign.config.schema import OptimConfig

METHODS = registry.own_methods()
FAMILIES = {"unet": "smoke", "transformer": "smoke_sd3"}
KEYS = [jax.random.key(i) for i in range(4)]
# Adam with so large an epsilon is plain descent: a change of the state is a gradient, and rounding
# in a gradient near zero stays small.
DESCENT = OptimConfig(lr=1e2, eps=1e3, b1=0.0, clip_norm=0.0)


def update_of(method, models, loops_own=None):
  """One update as the loop takes it: `(state, frozen, batch, key) -> (state, metrics)`.

  `loops_own`: models that decode and score what `collect` ends with, in place of `models`.
  """
  own = loops_own or models

  def step(state, frozen, batch, key):
    collect_key, update_key = jax.random.split(key)
    experience = dict(method.collect(state, frozen, batch, collect_key))
    rewards = None
    if "final" in experience:
      images = own.decode(frozen["decoder"], experience["final"])
      rewards = own.score(frozen["reward"], images, experience["batch"]["prepared"])
    elif "images" in experience:                     # at inference, n of each row side by side
      images = experience.pop("images")
      count = images.shape[0] // batch["sample_ids"].shape[0]
      rewards = models.score(frozen["reward"], images, jax.tree.map(
          lambda a: jnp.repeat(a, count, axis=0), batch["prepared"]))
    return method.update(state, frozen, experience, rewards, update_key)
  return step


def pairs_of(size: int, latent_shape) -> dict:
  """Clean latents of so many pairs, the last one a tie."""
  latents = np.random.default_rng(0).normal(size=(size, 2, *latent_shape)).astype(np.float32)
  label = np.ones(size, np.float32)
  label[-1] = 0.5
  return {"latents": latents, "label": label, "origin": np.full((size, 2, 4), 8, np.int32)}


# Keys under which rounding would decide: 2,500 times the difference of two errors goes through
# DPO's sigmoid at the recipe's beta; an assistant that has hardly moved is the teacher but for
# rounding.
MILD = {"diffusion_dpo": {"beta": 10.0}, "diff_instruct_star": {"assistant_lr": DESCENT.lr}}


def config_of(name: str, argument: str = "smoke", *, optim=DESCENT, **method_keys):
  """The recipe's config with nothing recomputed, which no cost counts, and an optimiser of ours."""
  method_keys = {**MILD.get(name, {}), **method_keys}
  recipe = runs.recipe(argument, name)
  if "remat" in recipe.method:
    method_keys["remat"] = "none"
  cfg = runs.smoke(name, argument, **{f"method__{key}": v for key, v in method_keys.items()})
  return dataclasses.replace(cfg, optim=optim)


# Methods whose code is another one's but for a loss or for options: their rows are slow.
COUSINS = {"awm": "nft", "ram": "nft", "dpok": "ddpo", "flow_grpo": "ddpo", "b2_diffurl": "ddpo",
           "refl": "draft", "alignprop": "draft", "sft": "mapo", "diffusion_dpo": "mapo",
           "best_of_n": "dno", "das": "fk_steering", "svdd": "fk_steering"}
every_method = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in COUSINS)) for name in METHODS])
