"""Classifier-free guidance around a denoiser."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Conditioning(NamedTuple):
  """What a guided denoiser is conditioned on; both trees have the batch as leading axis."""
  cond: Any
  uncond: Any


class Guided(NamedTuple):
  """Predictions `[B, ...]`; `cond` and `uncond` are None where guidance needs one branch only."""
  cond: Any
  uncond: Any
  combined: Any


def branches(scale: float) -> int:
  """Evaluations of the network that guidance of this scale takes."""
  return 2 if scale > 1 else 1


def guided(denoise, scale: float):
  """Wraps `denoise(params, x_t, t, cond)` into `f(params, x_t, t, conditioning) -> Guided`.

  `combined = uncond + scale (cond - uncond)`, in whatever unit the network predicts. Both branches
  run as one batch, interleaved, so that each device of a sharded batch keeps its own rows. Scales
  up to 1 are off, as in the pipelines: the conditional branch alone.
  Reference: Ho & Salimans 2022, equation 6 (with `w + 1 = scale`).
  """
  def predict(params, x_t, t, conditioning: Conditioning) -> Guided:
    if branches(scale) == 1:
      cond = denoise(params, x_t, t, conditioning.cond)
      return Guided(cond, None, cond)
    pair = lambda a, b: jnp.stack([a, b], 1).reshape((2 * a.shape[0],) + a.shape[1:])
    t = jnp.broadcast_to(t, (x_t.shape[0],))
    both = denoise(params, pair(x_t, x_t), pair(t, t), jax.tree.map(pair, *conditioning))
    both = both.reshape((x_t.shape[0], 2) + both.shape[1:])
    cond, uncond = both[:, 0], both[:, 1]
    return Guided(cond, uncond, uncond + scale * (cond - uncond))
  return predict


def guided_output(denoise, scale: float):
  """The guided network: `f(params, x_t, t, conditioning) -> output` f32."""
  predict = guided(denoise, scale)
  return lambda *args: predict(*args).combined.astype(jnp.float32)
