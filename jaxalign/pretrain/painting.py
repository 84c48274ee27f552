"""Pictures as a denoiser and its autoencoder would make them, for what is trained to judge them."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.emoji import latents
from jaxalign.models.vae import decode_images
from jaxalign.pretrain import autoencoder

SHIFT = 2                  # pixels by which a picture may be off
NOISE = 0.03               # standard deviation on pictures that the decoder did not paint
TINT = 0.04                # by which the colours of a picture may be off
TRIAL = 0.3                # standard deviation of the latents' noise where figures are taken


def shift(images, key):
  """Each of `[B, S, S, 3]` moved by up to `SHIFT` pixels; its border is carried on."""
  b, size = len(images), images.shape[1]
  by = jax.random.randint(key, (b, 2), 0, 2 * SHIFT + 1)
  wide = jnp.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), "edge")
  return jax.vmap(lambda image, at: jax.lax.dynamic_slice(
      image, (at[0], at[1], 0), (size, size, 3)))(wide, by)


class Painter(NamedTuple):
  """The autoencoder's decoder on the world's fixed latents."""
  vae: Any
  params: Any

  @classmethod
  def read(cls, folder) -> "Painter":
    """That of the autoencoder in the folder."""
    return cls(*autoencoder.read(folder)[:2])

  def paint(self, params, images, sizes, key):
    """Decoded from latents with noise of standard deviations `sizes` `[B]`; theirs is about 1."""
    z = latents.load().encode(images)
    noise = jnp.reshape(sizes, (-1, 1, 1, 1)) * jax.random.normal(key, z.shape)
    return decode_images(self.vae, params, z + noise)

  def disturb(self, params, images, most: float, key):
    """`[B, S, S, 3]` in [0, 1], B even: moved and tinted; the first half painted from latents with
    noise of up to `most`, the others noisy themselves."""
    k_shift, k_size, k_paint, k_noise, k_tint = jax.random.split(key, 5)
    half = len(images) // 2
    images = shift(jax.lax.optimization_barrier(images), k_shift)
    sizes = jax.random.uniform(k_size, (half,), maxval=most)
    images = images.at[:half].set(self.paint(params, images[:half], sizes, k_paint))
    images = images.at[half:].add(NOISE * jax.random.normal(k_noise, images[half:].shape))
    tint = jax.random.uniform(k_tint, (len(images), 1, 1, 3), minval=-TINT, maxval=TINT)
    return jnp.clip(images + tint, 0, 1)
