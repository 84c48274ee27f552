"""The noise of a sampler as a variable: what it is, what it turns into, and whether it still is
noise.

Everything that T sampler steps consume is one array `[B, 1+T, h, w, c]`, standard normal under the
prior: entry 0 is `x_0`, where sampling starts, over `Sampler.input_scale`; entry k+1 is what
transition k injects. `M(z)` is the image that the sampler makes of it. A method may change some of
its vectors, and then asks how far the result is from anything that N(0, I) would give.

`prno`: Tang et al. 2024 (Direct Noise Optimization); `norm`: Samuel et al. 2023, as in ReNO
(Eyring et al. 2024); `spectrum`: Whittle's likelihood. Implemented from the papers.
"""
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.devices import rng
from jaxalign.methods import Models
from jaxalign.sampling import Sampler, differentiable_rollout, guided_output

LN2 = math.log(2.0)


def draw(models: Models, key, sample_ids):
  """All noise of a trajectory from the prior, `[B, 1+T, h, w, c]`; that of `sampling.rollout`."""
  keys = rng.per_sample(key, sample_ids)
  # One program for all vectors: as many as there are steps would take minutes to compile.
  return jax.vmap(lambda k: rng.normal_per_sample(keys, models.latent_shape, k), out_axes=1)(
      jnp.arange(models.sampler.steps + 1))


def live_vectors(sampler: Sampler, which: str) -> np.ndarray:
  """Indices of the vectors that reach the output: "all" of them, or the "first" only.

  Transitions without noise have a vector that nothing depends on; it is left out.
  """
  noisy = 1 + np.flatnonzero(sampler.std > 0)
  return np.concatenate([[0], noisy if which == "all" else []]).astype(np.int32)


def generate(models: Models, frozen, noise, conditioning, *, remat: str = "full",
             clamp: bool = True):
  """`M(z)`: images `[B, H, W, 3]` of `noise [B, 1+T, h, w, c]` under the base model.

  Differentiable in `noise`. `remat` is that of `sampling.differentiable_rollout`; without `clamp`
  the images are what the decoder gives and may leave [0, 1].
  """
  latents, _ = differentiable_rollout(
      guided_output(models.denoise, models.guidance), models.combine(None, frozen["base"]),
      models.sampler, conditioning, models.sampler.input_scale * noise[:, 0],
      jnp.moveaxis(noise[:, 1:], 1, 0), remat=remat)
  decode = models.decode if clamp else models.decode_unclamped
  return decode(frozen["decoder"], latents)


# ------------------------------------------------------------------ is it noise?


def concentration(z, block: int):
  """Log-probability bounds that `z` is standard normal, from its first two moments.

  Cut into m blocks of k numbers, with `M1 = |mean of the blocks|` and
  `M2 = |second moment of the blocks - I|` in spectral norm,

    log_p1 = -m M1^2 / (2 k),   log_p2 = -(m / 2) max(sqrt(1 + M2) - 1 - sqrt(k / m), 0)^2

  and `p = min(1, 2 exp(log_p))` bounds the probability of so large a deviation.

  Args:
    z: `[B, D]` f32; a remainder of D / k is left out.
    block: k >= 1. Small blocks see more: each adds a direction of its own.
  Returns:
    `log_p1`, `log_p2`, both `[B]` <= 0 and before the minimum with `-ln 2` that makes p at most 1.
  Reference: Tang et al. 2024, section 4; Wainwright 2019, chapters 2 and 6.
  """
  count = z.shape[1] // block
  blocks = z[:, :count * block].reshape(-1, count, block)
  mean_square = jnp.square(blocks.mean(1)).sum(-1)       # a norm would have no gradient at 0
  second = jnp.einsum("bmi,bmj->bij", blocks, blocks, preferred_element_type=jnp.float32) / count
  off = jnp.abs(jnp.linalg.eigvalsh(second - jnp.eye(block)[None])).max(-1)
  excess = jnp.maximum(jnp.sqrt(1 + off) - 1 - math.sqrt(block / count), 0.0)
  return -count * mean_square / (2 * block), -0.5 * count * jnp.square(excess)


def detection_limit(size: int, block: int) -> float:
  """The M2 above which `concentration` of `size` numbers is below `-ln 2`."""
  count = size // block
  return (1 + math.sqrt(block / count) + math.sqrt(2 * LN2 / count)) ** 2 - 1


def permutations(key, count: int, size: int):
  """`[count, size]` int32 orders of `size` numbers, one after the other to save memory."""
  return jax.lax.map(lambda k: jax.random.permutation(k, size), jax.random.split(key, count))


class Prno(NamedTuple):
  """PRNO of noise; all `[B]` f32.

  Attributes:
    score: `log_p1 + log_p2`, each at most `-ln 2`, in the natural order plus their mean over
      permutations, plus `4 ln 2`: 0 for anything unsuspicious, below it in nats.
    p: mean over permutations of `min(p1, p2)`; above 0.1 is healthy, below 1e-4 is not noise.
    p_min: the smallest p1 or p2 of all orders. Genuine noise has 0.2 to 0.9, not 1.
    mean_hinge, second_hinge: share of orders in which the moment is suspicious, and hence has a
      gradient.
  """
  score: jax.Array
  p: jax.Array
  p_min: jax.Array
  mean_hinge: jax.Array
  second_hinge: jax.Array


def prno(z, orders, block: int = 4) -> Prno:
  """Probability regularisation of noise `z [B, D]`, seen in natural order and in `orders [b, D]`.

  It is a hinge: where the moments are those of noise, the gradient is exactly 0. And it sees the
  first two moments only: signs, or a smooth pattern in few of many vectors, pass it.

  Reference: Tang et al. 2024, equation of P(z) and its regulariser; the natural order is counted
  once more, as in the published code.
  """
  at = lambda order: jnp.stack(concentration(z[:, order], block))                   # [2, B]
  orders = jnp.concatenate([jnp.arange(z.shape[1])[None].astype(orders.dtype), orders])
  everything = jax.lax.map(jax.checkpoint(at), orders)                              # [1+b, 2, B]
  hinge = (everything < -LN2).astype(jnp.float32).mean(0)
  bounded = jnp.minimum(everything, -LN2)
  p = 2 * jnp.exp(bounded)
  excess = bounded[0] + bounded[1:].mean(0) + 2 * LN2
  return Prno(excess.sum(0), p[1:].min(1).mean(0), p.min((0, 1)), *hinge)


def prno_per_vector(z, orders, block: int = 4) -> Prno:
  """`prno` of each vector of `z [B, V, d]` on its own, mean over vectors; `orders` are `[b, d]`.

  What is wrong with one of many vectors drowns in the moments of all.
  """
  each = prno(z.reshape(-1, z.shape[-1]), orders, block)
  return Prno(*(a.reshape(z.shape[:2]).mean(1) for a in each))


def norm_score(z):
  """Log-density of the vectors' lengths less its maximum, `[B]` nats <= 0, summed over vectors.

    sum_v (d - 1) ln |z_v| - |z_v|^2 / 2

  `z` is `[B, V, d]`; the maximum is at `|z_v| = sqrt(d - 1)`.
  Reference: Samuel et al. 2023 (norm-guided seeds); ReNO weights it by 0.01.
  """
  rest, square = z.shape[-1] - 1, jnp.square(z).sum(-1)
  best = 0.5 * rest * (math.log(rest) - 1)
  return (0.5 * rest * jnp.log(jnp.maximum(square, 1e-12)) - 0.5 * square - best).sum(1)


def kl_from_start(z, start):
  """`KL(N(z, I) || N(start, I)) = |z - start|^2 / 2`, `[B]` nats >= 0: the drift."""
  return 0.5 * jnp.square(z - start).sum(tuple(range(1, z.ndim)))


def spectrum_score(z):
  """How white the vectors `z [B, V, h, w, c]` are, `[B]` nats <= 0.

  The power of white noise is 1 at every frequency. With `S_f` the power in a ring of frequencies of
  one vector, mean over its `n_f` coefficients and all channels,

    -1/2 sum_v sum_f n_f (S_f - 1 - ln S_f)

  is the log-likelihood of N(0, I) less that of the best stationary noise. About `-1/2` a ring for
  genuine noise. It sees smooth patterns, which permutations hide from `prno`.
  Reference: Whittle 1953.
  """
  height, width, channels = z.shape[2:]
  frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij"))
  ring = np.round(frequency * min(height, width)).astype(int).ravel()
  member = np.eye(ring.max() + 1)[ring]                                             # [h w, rings]
  power = jnp.square(jnp.abs(jnp.fft.fft2(z, axes=(2, 3)))) / (height * width)
  mean = power.mean(-1).reshape(z.shape[:2] + (-1,)) @ jnp.asarray(
      member / member.sum(0), jnp.float32)
  mean = jnp.maximum(mean, 1e-12)
  count = jnp.asarray(channels * member.sum(0), jnp.float32)
  return -0.5 * ((mean - 1 - jnp.log(mean)) * count[None, None]).sum((1, 2))
