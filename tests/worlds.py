"""A tiny world for tests: flat drawings of four subjects (and three others) in three styles."""
import numpy as np

from jaxalign.emoji import artwork, scenes

CODES = [*list(scenes.SUBJECTS)[:4], "1f0aa", "1f0bb", "1f0cc"]
NAMES = [scenes.SUBJECTS[code] for code in CODES[:4]]


def drawings() -> artwork.Artwork:
  """A shade for each subject and a shape for each style; no shade is near a palette colour's."""
  def sheet(size):
    rgba = np.zeros((3, len(CODES), size, size, 4), np.uint8)
    third = size // 3
    for i in range(len(CODES)):
      shade = (200 - 25 * i, 60 + 20 * i, (90 * i) % 256, 255)
      rgba[0, i, 2:-2, 2:-2] = shade
      rgba[1, i, third:-third] = shade
      rgba[2, i, :, third:-third] = shade
      rgba[:, i, size // 2, size // 2 + i % 3 - 1] = (0, 0, 0, 255)
    return rgba
  return artwork.Artwork(sheet(artwork.LARGE), sheet(artwork.SMALL), np.array(CODES),
                         np.array([f"drawing {i}" for i in range(len(CODES))]),
                         np.array(["Activities"] * len(CODES)))
