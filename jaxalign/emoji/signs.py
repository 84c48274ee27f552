"""Signs of 64 x 64 pixels: words of two to four bold capitals of fixed width on a flat colour.

The letters are DejaVu Sans Mono Bold's, 14 x 20 pixels each, kept in `letters.png` (side by side,
white on black), so that no font and no rasteriser has a say in what is learnt.
"""
import pathlib
import string

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxalign.emoji.scenes import COLOURS, SIZE, with_article

LETTERS = string.ascii_uppercase
LONGEST = 4
WIDTH, HEIGHT = 14, 20
INKS = np.array([(0.08, 0.08, 0.08), (1, 1, 1)], np.float32)


def letters() -> np.ndarray:
  """`[27, 20, 14]` f32 coverage of A to Z in [0, 1], and of nothing."""
  with Image.open(pathlib.Path(__file__).parent / "letters.png") as image:
    strip = np.asarray(image, np.float32) / 255
  glyphs = strip.reshape(HEIGHT, len(LETTERS), WIDTH).swapaxes(0, 1)
  return np.pad(glyphs, ((0, 1), (0, 0), (0, 0)))


def caption(word: str, colour: str) -> str:
  """'a sign that says "CAT" on a blue background'."""
  return f'a sign that says "{word}" on {with_article(colour)} background'


def spell(words) -> np.ndarray:
  """`[B, 4]` int32 letters of the words, -1 behind their ends."""
  out = np.full((len(words), LONGEST), -1, np.int32)
  for row, word in zip(out, words):
    row[:len(word)] = [LETTERS.index(letter) for letter in word]
  return out


def draw(key, batch: int):
  """Random strings `[B, 4]` of two to four letters, colours `[B]`, shifts `[B, 2]` of -1 to 1."""
  k_letter, k_length, k_colour, k_shift = jax.random.split(key, 4)
  word = jax.random.randint(k_letter, (batch, LONGEST), 0, len(LETTERS))
  length = jax.random.randint(k_length, (batch, 1), 2, LONGEST + 1)
  word = jnp.where(jnp.arange(LONGEST)[None] < length, word, -1)
  return (word, jax.random.randint(k_colour, (batch,), 0, len(COLOURS)),
          jax.random.randint(k_shift, (batch, 2), -1, 2))


def render(words, rgb, shift):
  """Pictures of words in the middle, white on what is dark and nearly black on what is light.

  Args:
    words: `[B, 4]` int, letters in [0, 26), -1 behind the end.
    rgb: `[B, 3]` background in [0, 1].
    shift: `[B, 2]` int pixels down and to the right, -2 to 2.
  Returns:
    `[B, 64, 64, 3]` f32 in [0, 1].
  """
  words, rgb, shift = jnp.asarray(words), jnp.asarray(rgb), jnp.asarray(shift)
  strip = jnp.asarray(letters())[words].transpose(0, 2, 1, 3).reshape(
      len(words), HEIGHT, LONGEST * WIDTH)
  height, width = (SIZE - HEIGHT) // 2, (SIZE - LONGEST * WIDTH) // 2
  canvas = jnp.pad(strip, ((0, 0), (height, height), (width, width)))
  missing = (words < 0).sum(1)
  move = shift + jnp.stack([jnp.zeros_like(missing), missing * (WIDTH // 2)], 1)
  cover = jax.vmap(lambda picture, by: jnp.roll(picture, (by[0], by[1]), (0, 1)))(canvas, move)
  ink = jnp.asarray(INKS)[(rgb.mean(-1) < 0.55).astype(int)]
  cover = cover[..., None]
  return rgb[:, None, None] * (1 - cover) + ink[:, None, None] * cover
