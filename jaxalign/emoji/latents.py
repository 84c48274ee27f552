"""The latents of the embedded world: principal components of 8 x 8 patches of its pictures.

  z = basis^T (patch - mean) / scale, 64 x 64 x 3 to 8 x 8 x 16

A fixed linear map that needs no training: the autoencoder learns to invert it, and denoisers train
on it from the first day. `python -m jaxalign.emoji.latents --artwork=FILE` fits it anew to four
fifths scenes and one fifth signs and writes `latents.npz` beside this module.
"""
import argparse
import functools
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.config.command import exit_status
from jaxalign.emoji import artwork, scenes, signs

PATCH, CHANNELS = 8, 16
_FILE = pathlib.Path(__file__).parent / "latents.npz"


class Latents(NamedTuple):
  """mean `[192]`, basis `[192, 16]` (orthonormal columns), scale `[16]`; pixels in [-1, 1]."""
  mean: np.ndarray
  basis: np.ndarray
  scale: np.ndarray

  def encode(self, images):
    """`[B, H, W, 3]` in [0, 1] -> `[B, H / 8, W / 8, 16]`, about of unit variance over all."""
    B, H, W, _ = images.shape
    patches = (2 * images - 1).reshape(B, H // PATCH, PATCH, W // PATCH, PATCH, 3)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(B, H // PATCH, W // PATCH, -1)
    return (patches - np.reshape(self.mean, (1, 1, 1, -1))) @ (self.basis / self.scale)

  def decode(self, z):
    """The nearest pictures that the components span, `[B, H, W, 3]`, not clamped."""
    B, h, w, _ = z.shape
    patches = z @ (self.basis * self.scale).T + self.mean.reshape(1, 1, 1, -1)
    patches = patches.reshape(B, h, w, PATCH, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(B, h * PATCH, w * PATCH, 3) / 2 + 0.5


@functools.cache
def load() -> Latents:
  """The map that the package ships."""
  with np.load(_FILE) as file:
    return Latents(*(file[field] for field in Latents._fields))


def fit(images) -> Latents:
  """Components of the patches of `[B, H, W, 3]` in [0, 1].

  Channels are divided by their deviation to the power 0.75, between raw and white: where all were
  of one size, half of a denoiser's effort would go into details that nobody sees. The largest
  entry of each component is positive.
  """
  raw = Latents(0, np.eye(PATCH * PATCH * 3), 1)
  patches = np.asarray(raw.encode(np.asarray(images, np.float64))).reshape(-1, PATCH * PATCH * 3)
  mean = patches.mean(0)
  variance, vectors = np.linalg.eigh(np.cov((patches - mean).T))
  basis, std = vectors[:, ::-1][:, :CHANNELS], np.sqrt(variance[::-1][:CHANNELS])
  basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(CHANNELS)])
  scale = std ** 0.75
  scale = scale * np.sqrt(np.mean((std / scale) ** 2))
  return Latents(*(array.astype(np.float32) for array in (mean, basis, scale)))


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--artwork", required=True, help="the file artwork.npz")
  args = parser.parse_args(argv)
  drawings = artwork.load(args.artwork).of(scenes.SUBJECTS)
  table = scenes.table(list(scenes.SUBJECTS.values()), scenes.contrast(drawings))
  sheets, k_scene, k_sign = scenes.Sheets.of(drawings), *jax.random.split(jax.random.key(0))
  words, colour, shift = signs.draw(k_sign, 800)
  images = np.concatenate([
      scenes.render(sheets, table, scenes.draw(table, k_scene, 3200)),
      signs.render(words, jnp.asarray(scenes.RGB)[colour], shift)])
  latents = fit(images)
  np.savez(_FILE, **latents._asdict())
  error = np.square(np.asarray(latents.decode(latents.encode(images))).clip(0, 1) - images)
  decibel = -10 * np.log10(error.mean((1, 2, 3)))
  print(f"{_FILE}: scenes {decibel[:3200].mean():.2f} dB, signs {decibel[3200:].mean():.2f} dB")


if __name__ == "__main__":
  sys.exit(exit_status(main))
