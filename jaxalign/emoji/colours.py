"""The flat backgrounds of the embedded world, and rules about the one that a caption names."""
import re

import jax.numpy as jnp
import numpy as np

from jaxalign.errors import UserError
from jaxalign.rewards import Reward

PALETTE = {  # sRGB, 0..255
    "white": (255, 255, 255), "black": (20, 20, 20), "red": (214, 48, 49), "green": (0, 148, 80),
    "blue": (9, 100, 227), "yellow": (253, 213, 70), "purple": (130, 80, 190),
    "orange": (240, 130, 40), "pink": (250, 170, 200), "gray": (140, 140, 140),
    "cyan": (90, 210, 220), "brown": (120, 80, 50),
}
COLOURS = tuple(PALETTE)
RGB = np.array(list(PALETTE.values()), np.float32) / 255      # [12, 3] in [0, 1]
_NAMED = re.compile(rf"\b({'|'.join(COLOURS)}) background\b", re.IGNORECASE)


def color_match() -> Reward:
  """How near the border is to the colour that the caption names ("a X on a red background").

  With d the root mean square over RGB of (mean border colour - named colour), both in [0,1]:

    score = -(sqrt(d^2 + s^2) - s) / (sqrt(1 + s^2) - s),  s = 0.05

  Smooth, in [-1, 0], 0 only at the exact colour. About linear in d, so that the pull does not fade
  with the distance, and quadratic within s (13 of 255 levels), so that the gradient exists at 0.
  """
  s = 0.05

  def score(params, images, prepared):
    difference = _border(images).mean(1) - prepared["colour"]
    return (s - jnp.sqrt((difference ** 2).mean(-1) + s ** 2)) / ((1 + s ** 2) ** 0.5 - s)

  return Reward("color_match", {}, lambda prompts: {"colour": RGB[_named_colours(prompts)]}, score,
                "[-1, 0]; 0 is the exact colour")


def color_accuracy() -> Reward:
  """1 if the palette colour nearest to the border's median colour is the named one, else 0.

  The median, unlike `color_match`'s mean, ignores a drawing that touches the border, and cannot be
  met by mixing two wrong colours. No gradient.
  """
  def score(params, images, prepared):
    median = jnp.median(_border(images), axis=1)  # [B, 3]
    distance = ((median[:, None] - RGB[None]) ** 2).sum(-1)  # [B, 12]
    return (distance.argmin(-1) == prepared["colour_index"]).astype(jnp.float32)

  return Reward("color_accuracy", {}, lambda prompts: {"colour_index": _named_colours(prompts)},
                score, "0 or 1", differentiable=False)


def _border(images):
  """Pixels of a frame one sixteenth of the image wide: `[B,H,W,3]` -> `[B,N,3]`."""
  b, height, width, _ = images.shape
  m = max(1, min(height, width) // 16)
  sides = (images[:, :m], images[:, height - m:],
           images[:, m:height - m, :m], images[:, m:height - m, width - m:])
  return jnp.concatenate([side.reshape(b, -1, 3) for side in sides], axis=1)


def _named_colours(prompts):
  """`[P]` int32 index into the palette of the colour before the word "background"."""
  found = [_NAMED.findall(prompt) for prompt in prompts]
  for prompt, colours in zip(prompts, found):
    if not colours:
      raise UserError(f"reward.names: colour rewards need 'on a <colour> background' with one of "
                      f"{', '.join(COLOURS)} in each prompt, not {prompt!r}")
  return np.array([COLOURS.index(colours[-1].lower()) for colours in found], np.int32)
