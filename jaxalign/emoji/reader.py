"""Reads a picture back into a scene by rule, and says which part of a caption it gets wrong.

The background is the palette colour nearest to the border's median. On it, each quarter is the
nearest of all small drawings of all styles, or empty; or the whole picture is the nearest of the
large ones, whichever fits better. No network: what it says follows from the drawings alone. A part
that fits badly (root mean square above `LIMIT` where the drawing or the picture is not background)
is unreadable, and is no subject.
"""
from typing import NamedTuple

import numpy as np

from jaxalign.emoji import scenes
from jaxalign.emoji.artwork import STYLES, Artwork

PARTS = ("subjects", "number", "place", "colour", "style")
# Root mean square over RGB in [0, 1]. Of 384 real scenes through the autoencoder none is above it.
LIMIT = 0.30
_SEEN = 0.15               # a pixel is no background when it is this far away


class Reading(NamedTuple):
  """What is seen in one picture.

  Attributes:
    large: whether one drawing fills the picture.
    places: four names (all the same where `large`), "" where empty, "?" where unreadable.
    colour: of the background. styles: of the drawings that were read.
  """
  large: bool
  places: tuple[str, ...]
  colour: str
  styles: tuple[str, ...]


class Reader:
  """Reads pictures of the drawings of `artwork`, whose rows `names` name."""

  def __init__(self, artwork: Artwork, names):
    self._names, self._sheets = list(names), scenes.Sheets.of(artwork)

  def _nearest(self, pictures, drawings, rgb):
    """Index, squared error summed over pixels, and error of the part that is seen, per picture.

    Args:
      pictures: `[n, s, s, 3]`. drawings: `[m, s, s, 4]` uint8, the last one empty.
    """
    rgba = drawings.astype(np.float32) / 255
    templates = rgba[..., :3] * rgba[..., 3:] + rgb * (1 - rgba[..., 3:])
    flat = lambda images: images.reshape(len(images), -1)
    x, t = flat(pictures), flat(templates)
    error = (x ** 2).sum(1)[:, None] - 2 * x @ t.T + (t ** 2).sum(1)
    best = error.argmin(1)
    gap = np.square(pictures - templates[best]).mean(-1)
    far = lambda images: np.sqrt(np.square(images - rgb).mean(-1)) > _SEEN
    seen = far(pictures) | far(templates[best])
    rms = np.sqrt((gap * seen).sum((1, 2)) / seen.sum((1, 2)).clip(1))
    return best, error[np.arange(len(x)), best], rms

  def __call__(self, pictures) -> list[Reading]:
    """`[B, 64, 64, 3]` in [0, 1] -> a reading of each."""
    pictures = np.asarray(pictures, np.float32)
    border = np.concatenate([pictures[:, 0], pictures[:, -1], pictures[:, :, 0],
                             pictures[:, :, -1]], 1)
    away = np.square(np.median(border, 1)[:, None] - scenes.RGB).sum(-1)
    colours = away.argmin(1)
    out = [None] * len(pictures)
    for colour in np.unique(colours):
      rows = np.flatnonzero(colours == colour)
      for row, reading in zip(rows, self._on(pictures[rows], int(colour))):
        out[row] = reading
    return out

  def _on(self, pictures, colour: int) -> list[Reading]:
    rgb, half = scenes.RGB[colour], scenes.SIZE // 2
    quarters = pictures.reshape(-1, 2, half, 2, half, 3).transpose(0, 1, 3, 2, 4, 5)
    small, small_error, small_rms = (values.reshape(-1, 4) for values in self._nearest(
        quarters.reshape(-1, half, half, 3), self._sheets.small, rgb))
    large, large_error, large_rms = self._nearest(pictures, self._sheets.large, rgb)
    empty, out = len(self._sheets.large) - 1, []
    for i in range(len(pictures)):
      alone = large[i] != empty and large_error[i] < small_error[i].sum()
      found = [(large[i], large_rms[i])] * 4 if alone else list(zip(small[i], small_rms[i]))
      # What is taken for empty is unreadable when something stands there all the same.
      names = [self._name(row, rms, empty) for row, rms in found]
      styles = [STYLES[row // len(self._names)] for (row, _), name in zip(found, names)
                if name not in ("", "?")]
      out.append(Reading(bool(alone), tuple(names), scenes.COLOURS[colour],
                         tuple(sorted(set(styles)))))
    return out

  def _name(self, row, rms, empty) -> str:
    if rms > LIMIT:
      return "?"
    return "" if row == empty else self._names[row % len(self._names)]


def check(scene: scenes.Scene, reading: Reading) -> dict[str, bool]:
  """Which parts of a caption a picture gets right, of `PARTS`; those it does not name are absent.

  subjects: all that are named are there, and nothing else. number: as many drawings, whichever they
  are. place: one named subject each, where the caption says. style: all in the named one.
  """
  seen = [name for name in (reading.places[:1] if reading.large else reading.places) if name]
  out = {"subjects": set(seen) == set(scene.subjects),
         "number": len(seen) == scene.number * len(scene.subjects),
         "colour": reading.colour == scene.colour}
  if scene.relation:
    first, second = scene.subjects
    at = {name: [i for i, found in enumerate(reading.places) if found == name]
          for name in scene.subjects}
    step = {"left": 1, "right": -1, "above": 2, "below": -2}[scene.relation]
    one_each = len(at[first]) == len(at[second]) == 1 and not reading.large
    out["place"] = one_each and at[second][0] - at[first][0] == step and (
        abs(step) == 2 or at[first][0] // 2 == at[second][0] // 2)
  if scene.style:
    out["style"] = reading.styles == (scene.style,)
  return out
