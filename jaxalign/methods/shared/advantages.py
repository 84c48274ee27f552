"""What a reward is worth to policy gradients, and which samples are worth training on.

`cfg` is `policy_gradient.Config`; groups lie side by side in a batch.
"""
from typing import Literal

import jax.numpy as jnp

Advantage = Literal["prompt", "batch", "group_z", "group_batch", "group_center", "group_loo"]
Selection = Literal["all", "extremes", "pairs"]
RAW = ("group_center", "group_loo")       # in units of the reward; the others are standardised


def standardize(rewards, mean, std, largest):
  """`(R - mean) / std`, and 0 where the pool's spread is rounding: below 1e-5 of its `largest`."""
  spread = std > 1e-5 * largest
  return jnp.where(spread, (rewards - mean) / jnp.where(spread, std, 1.0), 0.0)


def advantages(cfg, rewards, prompt_ids, history=None):
  """Advantages before clipping and selection, `[B]` f32, without gradient.

  Args:
    rewards: `[B]` f32, raw units; groups side by side.
    prompt_ids: `[B]` int32 >= 0.
    history: `{"rewards" [n, B], "prompt_ids" [n, B]}` of updates before, ids -1 where there was
      none; or None.
  Returns:
    In standard deviations (ddof 1), or in raw units for "group_center" and "group_loo". Sums to 0
    over every group in group modes, over the batch in mode "batch", and over the samples of a
    prompt in mode "prompt" without history.
  Reference: Black et al. 2023, section 4.3 (per-prompt statistics).
  """
  if cfg.advantage.startswith("group"):
    pool = rewards.reshape(-1, cfg.group)
    centred = pool - pool.mean(1, keepdims=True)
    if cfg.advantage == "group_loo":
      centred = centred * cfg.group / (cfg.group - 1)
    elif cfg.advantage == "group_z":
      centred = standardize(centred, 0.0, pool.std(1, ddof=1, keepdims=True),
                            jnp.abs(pool).max(1, keepdims=True))
    elif cfg.advantage == "group_batch":
      centred = standardize(centred, 0.0, rewards.std(ddof=1), jnp.abs(rewards).max())
    return centred.reshape(-1)
  of_batch = standardize(rewards, rewards.mean(), rewards.std(ddof=1), jnp.abs(rewards).max())
  if cfg.advantage == "batch":
    return of_batch
  pool, ids = rewards, prompt_ids
  if history is not None:
    pool = jnp.concatenate([pool, history["rewards"].reshape(-1)])
    ids = jnp.concatenate([ids, history["prompt_ids"].reshape(-1)])
  same = prompt_ids[:, None] == ids[None]                                       # [B, pool]
  count = same.sum(1)
  mean = jnp.where(same, pool[None], 0.0).sum(1) / count
  deviation = jnp.where(same, pool[None] - mean[:, None], 0.0)
  std = jnp.sqrt(jnp.square(deviation).sum(1) / jnp.maximum(count - 1, 1))
  largest = jnp.where(same, jnp.abs(pool)[None], 0.0).max(1)
  return jnp.where(count >= cfg.min_count, standardize(rewards, mean, std, largest), of_batch)


def select(cfg, adv):
  """Chooses the samples to train on; always as many slots, so that shapes are static.

  Args:
    adv: `[B]` advantages, groups side by side.
  Returns:
    `index [R, S]` of the chosen samples within their groups, `adv [R, S]` and `kept [R, S]` bool:
    slots that are not kept have no weight. S is the group's size for "all", 2 for "extremes", twice
    `pairs` for "pairs".
  """
  adv = adv.reshape(-1, cfg.group)
  if cfg.select == "all":
    return (jnp.broadcast_to(jnp.arange(cfg.group), adv.shape), adv,
            jnp.ones(adv.shape, bool))
  m = 1 if cfg.select == "extremes" else cfg.pairs
  order = jnp.argsort(adv, axis=1, descending=True)
  index = jnp.concatenate([order[:, :m], order[:, cfg.group - m:]], 1)
  chosen = jnp.take_along_axis(adv, index, 1)
  if cfg.select == "extremes":
    return index, chosen, jnp.stack(
        [chosen[:, 0] >= cfg.keep_above, chosen[:, 1] < cfg.keep_below], 1)
  spread = chosen[:, :1] > chosen[:, -1:]
  return index, chosen - chosen.mean(1, keepdims=True), jnp.broadcast_to(spread, chosen.shape)


def centred_as(cfg, values):
  """`values [B]` of the samples less a baseline, the one that `advantages` takes off rewards.

  What a return consists of beside the reward, in the advantages' unit.
  """
  pool = values.reshape(-1, cfg.group) if cfg.advantage.startswith("group") else values[None]
  centred = pool - pool.mean(1, keepdims=True)
  if cfg.advantage == "group_loo":
    centred = centred * cfg.group / (cfg.group - 1)
  return centred.reshape(-1)
