"""Random keys: derived from one root, never carried.

A key for a purpose at a step is `stream(root, NAME, step)`; a resumed run derives the same keys, so
no key is ever saved. Noise that belongs to a sample is drawn from the sample's global id, so images
do not change with the number of devices.
"""
import zlib

import jax
import jax.numpy as jnp

# Every purpose has a name of its own; a test asserts that no two hash alike.
INIT = "init"              # initial trainable parameters
ROLLOUT = "rollout"        # initial and per-step noise of training rollouts
UPDATE = "update"          # randomness inside a method's update
EVAL = "eval"              # noise of evaluation samples, the same at every step
EVAL_FLOOR = "eval_floor"  # a second, independent evaluation draw (floor of the Frechet distance)
STREAMS = (INIT, ROLLOUT, UPDATE, EVAL, EVAL_FLOOR)


def stream(root, name: str, step=0):
  """Key for purpose `name` at `step` (int or traced); crc32 because Python's hash is salted."""
  return jax.random.fold_in(jax.random.fold_in(root, zlib.crc32(name.encode())), step)


def per_sample(key, sample_ids):
  """`[B]` int32 global sample ids -> `[B]` keys."""
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(sample_ids)


def normal_per_sample(keys, shape, index=0):
  """Standard normal `[B, *shape]` f32 from `[B]` per-sample keys; `index` tells draws apart."""
  draw = lambda k: jax.random.normal(jax.random.fold_in(k, index), shape, jnp.float32)
  return jax.vmap(draw)(keys)
