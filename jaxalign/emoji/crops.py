"""What is seen in a picture of a scene, by a small network: `Sight`.

One classifier looks at five crops of 32 pixels, the four quarters and the whole at half its size,
where a drawing that fills the picture is as large as one in a quarter. It names the subject of a
crop, or says that it is empty or something else, and whose style it is. The background's colour is
read by rule. `configs/pretrain_scene_scorers.py:scene_check` trains it.
"""
import functools
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.config.places import ASSETS
from jaxalign.emoji import scenes
from jaxalign.emoji.artwork import STYLES
from jaxalign.emoji.scorers import read_network
from jaxalign.models.layers import Conv, Dense, Downsample, ResnetBlock

SIZE = scenes.SIZE // 2
# Squared distance over RGB in [0, 1] at which a colour is e times less likely than a nearer one.
_SOFTNESS = 0.02


class Sight(NamedTuple):
  """Probabilities of what is seen in each of B pictures, K subjects.

  Attributes:
    whole: `[B, K + 2]`, of the one drawing that fills it; the last two are "empty" and "something
      else", such as a grid of drawings.
    quarters: `[B, 4, K + 2]`, of upper left, upper right, lower left and lower right.
    whole_style, quarter_styles: `[B, 3]` and `[B, 4, 3]`, in the order of `STYLES`.
    colour: `[B, 12]`, of the background.
  """
  whole: jax.Array
  quarters: jax.Array
  whole_style: jax.Array
  quarter_styles: jax.Array
  colour: jax.Array

  def decided(self) -> "Sight":
    """The most likely of each, with certainty."""
    return jax.tree.map(lambda p: jax.nn.one_hot(p.argmax(-1), p.shape[-1]), self)


class CropClassifier(nn.Module):
  """Residual convolutions, `[N, 32, 32, 3]` in [0, 1] -> logits `[N, K + 2]` and `[N, 3]`.

  `config`: `subjects`, their names; `widths`, channels per resolution; `dim` of what both heads
  read.
  """
  config: Any

  @nn.compact
  def __call__(self, crops):
    cfg = self.config
    x = Conv(cfg["widths"][0], stride=2, name="stem")(crops * 2 - 1)
    for i, width in enumerate(cfg["widths"]):
      x = ResnetBlock(width, 8, 1e-5, jnp.float32, name=f"block_{i}")(x)
      if i + 1 < len(cfg["widths"]):
        x = Downsample((1, 1), jnp.float32, name=f"down_{i}")(x)
    x = nn.silu(nn.GroupNorm(8, epsilon=1e-5, use_fast_variance=False, name="norm")(x))
    x = nn.silu(Dense(cfg["dim"], name="hidden")(x.reshape(len(x), -1)))
    return (Dense(len(cfg["subjects"]) + 2, name="subject")(x),
            Dense(len(STYLES), name="style")(x))


def cut(images):
  """`[B, 64, 64, 3]` -> crops `[B, 5, 32, 32, 3]`: the quarters, then the whole at half its size.

  Pictures of another size are scaled first.
  """
  if images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(f"images: shape {images.shape} is not [B, H, W, 3]")
  b, images = len(images), images.astype(jnp.float32)
  if images.shape[1:3] != (scenes.SIZE, scenes.SIZE):
    images = jax.image.resize(images, (b, scenes.SIZE, scenes.SIZE, 3), "linear")
  split = images.reshape(b, 2, SIZE, 2, SIZE, 3).transpose(0, 1, 3, 2, 4, 5)
  whole = images.reshape(b, SIZE, 2, SIZE, 2, 3).mean((2, 4))
  return jnp.concatenate([split.reshape(b, 4, SIZE, SIZE, 3), whole[:, None]], 1)


def see(module: CropClassifier, params, images) -> Sight:
  """`[B, H, W, 3]` in [0, 1] -> what is seen in each; differentiable."""
  crops = cut(images)
  b = len(crops)
  subject, style = (jax.nn.softmax(logits.reshape(b, 5, -1)) for logits in module.apply(
      {"params": params}, crops.reshape(-1, *crops.shape[2:])))
  border = jnp.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], 1)
  away = jnp.square(jnp.median(border, 1)[:, None] - scenes.RGB[None]).sum(-1)
  return Sight(subject[:, 4], subject[:, :4], style[:, 4], style[:, :4],
               jax.nn.softmax(-away / _SOFTNESS))


@functools.cache
def shipped() -> tuple[CropClassifier, Any]:
  """The network of the package and its weights."""
  return load(ASSETS / "scene_check")


def load(folder: pathlib.Path) -> tuple[CropClassifier, Any]:
  """The classifier in `folder`, as training writes it; UserError where there is none."""
  config, params = read_network(folder, ("scene_check",))
  return CropClassifier(config["model"]), params
