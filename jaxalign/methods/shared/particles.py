"""Particles of each image: their weights, who descends from whom, and which one is the result.

K candidates of each image are denoised side by side. What each has consumed of the sampler's noise
is its lineage: where a particle descends from another one it takes over that noise up to there, and
from there on has the noise of its own place, so that copies diverge. The result is the noise of one
lineage, from which the plain sampler makes the very image that was scored.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.devices import rng
from jaxalign.errors import UserError
from jaxalign.methods import Models
from jaxalign.methods.shared.noise import draw


def strength(models: Models, cfg) -> float:
  """`cfg.beta` in 1 / reward units.

  Raises:
    UserError: it is in standard deviations of the reward, which has none.
  """
  if cfg.beta_unit == "raw":
    return cfg.beta
  if not models.reward_std:
    raise UserError("method.beta_unit='sigma': the reward gives every sample of a prompt the same "
                    "score on the base model; set 'raw', and method.beta in 1 / its unit")
  return cfg.beta / models.reward_std


def begin(models: Models, key, batch, count: int) -> dict:
  """State of K = `count` particles of each image: noise, latents, weights and the best so far.

  The first particle's noise is the evaluation's, so that K = 1 is the base model.
  """
  keys = [jax.random.fold_in(key, i) if i else key for i in range(count)]
  noise = jax.vmap(lambda k: draw(models, k, batch["sample_ids"]), out_axes=1)(
      jnp.stack(keys))                                                     # [B, K, 1+T, ...]
  size = noise.shape[0]
  return {"noise": noise, "x": models.sampler.input_scale * noise[:, :, 0],
          "log_w": jnp.zeros((size, count)), "log_z": jnp.zeros(size), "best": noise[:, 0],
          "best_reward": jnp.full(size, -jnp.inf, jnp.float32),
          "best_step": jnp.zeros(size, jnp.int32), "updates": jnp.asarray(0, jnp.int32)}


def together(a):
  """`[B, K, ...]` -> `[B K, ...]`."""
  return a.reshape((-1,) + a.shape[2:])


def apart(a, count: int):
  """`[B K, ...]` -> `[B, K, ...]`."""
  return a.reshape((-1, count) + a.shape[1:])


def repeated(batch, count: int):
  """A batch with each row K times, side by side."""
  return jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), batch)


def pick(a, index):
  """Of each image the particles `index [B, J]`: `[B, K, ...]` -> `[B, J, ...]`."""
  return jnp.take_along_axis(a, index.reshape(index.shape + (1,) * (a.ndim - 2)), axis=1)


def inherit(noise, index, k):
  """Noise `[B, K, 1+T, ...]` of particles that descend from `index` up to x_k, its own after it."""
  past = (jnp.arange(noise.shape[2]) <= k).reshape((1, 1, -1) + (1,) * (noise.ndim - 3))
  return jnp.where(past, pick(noise, index), noise)


def systematic(log_weight, u):
  """Indices `[B, K]` of systematic resampling: each particle K W times, rounded up or down.

  Args:
    log_weight: `[B, K]`, not normalised. u: `[B]` uniform in [0, 1).
  """
  count = log_weight.shape[1]
  total = jnp.cumsum(jax.nn.softmax(log_weight, 1), 1).at[:, -1].set(1.0)
  places = (u[:, None] + jnp.arange(count)[None]) / count
  index = jax.vmap(lambda t, p: jnp.searchsorted(t, p, side="right"))(total, places)
  return jnp.minimum(index, count - 1)


def effective_share(log_w):
  """`1 / (K sum W^2)` of log-weights `[B, K]`: 1/K (one counts) to 1 (all alike)."""
  return 1 / (log_w.shape[1] * jnp.square(jax.nn.softmax(log_w, 1)).sum(1))


class Weighed(NamedTuple):
  """What weights lead to.

  Attributes:
    share: `[B, K]` normalised weights. ess: `[B]` their effective share.
    index: `[B, K]` whom each particle descends from, itself where nothing is resampled.
    log_w: `[B, K]` log-weights after that. log_z: `[B]` what the normaliser's logarithm gains.
  """
  share: jax.Array
  ess: jax.Array
  index: jax.Array
  log_w: jax.Array
  log_z: jax.Array


def weigh(log_w, threshold: float, at_end, keys) -> Weighed:
  """Resamples the images whose effective share is below `threshold`, but not the outputs.

  Args:
    log_w: `[B, K]`; particles of -inf or NaN are dead. A group of these only goes on as it was.
    at_end: whether these are the outputs' weights. keys: `[B]`, one an image.
  """
  count = log_w.shape[1]
  log_w = jnp.where(jnp.isnan(log_w), -jnp.inf, log_w)
  log_w = jnp.where(jnp.all(jnp.isneginf(log_w), 1, keepdims=True), 0.0, log_w)
  ess = effective_share(log_w)
  resampled = ~at_end & (ess < threshold)
  u = jax.vmap(lambda k: jax.random.uniform(k))(keys)
  index = jnp.where(resampled[:, None], systematic(log_w, u), jnp.arange(count)[None])
  return Weighed(
      jax.nn.softmax(log_w, 1), ess, index, jnp.where(resampled[:, None], 0.0, log_w),
      jnp.where(resampled | at_end, jax.nn.logsumexp(log_w, 1) - jnp.log(count), 0.0))


def mean_reward(share, rewards):
  """The weighted mean `[B]` of rewards `[B, K]`, of which those without weight may be infinite."""
  return jnp.where(share > 0, share * rewards, 0.0).sum(1)


def winner(output: str, log_w, rewards, at_end, keys):
  """Index `[B]` of the particle that is the result.

  Args:
    output: at the end "draw" takes one by weight, "argmax_weight" the heaviest, "argmax_reward" the
      best. Before it, it is the best so far, whose later noise is yet to be seen.
  """
  best = rewards.argmax(1)
  if output == "argmax_reward":
    return best
  drawn = log_w.argmax(1) if output == "argmax_weight" else jax.vmap(
      lambda k, w: jax.random.categorical(jax.random.fold_in(k, 1), w))(keys, log_w)
  return jnp.where(at_end, drawn, best)


def advance(state, done, chosen, rewards, new):
  """The state after an update, which changes nothing once a run is `done`.

  Args:
    chosen: `[B]` the particle that is the result so far. rewards: `[B, K]`.
    new: what else changes, with the particles' `noise`.
  """
  one = lambda a: pick(a, chosen[:, None])[:, 0]
  new = {**new, "best": one(new["noise"]), "best_reward": one(rewards),
         "best_step": jnp.full(chosen.shape, state["updates"], jnp.int32)}
  kept = {name: jnp.where(done, state[name], value) for name, value in new.items()}
  return {**state, **kept, "updates": state["updates"] + 1}


def numbers(rewards, count: int):
  """Rewards `[B K]` as `[B, K]`, -inf in place of NaN."""
  return apart(jnp.where(jnp.isnan(rewards), -jnp.inf, rewards), count)


def keys_of(key, batch):
  """One key for each image."""
  return rng.per_sample(key, batch["sample_ids"])
