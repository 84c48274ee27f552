"""Signs of 64 x 64 pixels: words of two to four bold capitals of fixed width on a flat colour.

The letters are DejaVu Sans Mono Bold's, 14 x 20 pixels each, kept in `letters.png` (side by side,
white on black), so that no font and no rasteriser has a say in what is learnt. At each of the four
places five letters are kept from a denoiser's training: a word with one of them there must be
composed. It has no Q, which is an O but for three pixels.
"""
import hashlib
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
_LIMIT = 50                # squared error of a letter that is still read; half of a letter's own
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


def _split() -> tuple[np.ndarray, np.ndarray]:
  """Letters of training `[4, 20]` and those held out `[4, 5]`, at each place, in order."""
  known, held_out = [i for i, letter in enumerate(LETTERS) if letter != "Q"], 5
  order = [sorted(known, key=lambda i: hashlib.sha256(f"{LETTERS[i]}{place}".encode()).digest())
           for place in range(LONGEST)]
  return (np.array([sorted(row[held_out:]) for row in order]),
          np.array([sorted(row[:held_out]) for row in order]))


TRAINED, HELD_OUT = _split()
_ALL = np.tile(np.arange(len(LETTERS)), (LONGEST, 1))


def is_new(word: str) -> bool:
  """Whether a word has a letter at a place where training has none of its kind."""
  return any(LETTERS.index(letter) in HELD_OUT[place] for place, letter in enumerate(word))


def ask(each: int, generator, new: bool) -> list[str]:
  """Random strings of two, three and four letters in turn.

  If `new`, with one letter at a place where training does not have it.
  """
  out = []
  for i in range(each):
    count = 2 + i % (LONGEST - 1)
    letters = [generator.choice(TRAINED[place]) for place in range(count)]
    if new:
      place = generator.integers(count)
      letters[place] = generator.choice(HELD_OUT[place])
    out.append("".join(LETTERS[letter] for letter in letters))
  return out


def draw(key, batch: int, letters=_ALL):
  """Random strings `[B, 4]` of two to four letters, colours `[B]`, shifts `[B, 2]` of -1 to 1.

  Args:
    letters: `[4, n]` int, those to choose from at each place.
  """
  k_letter, k_length, k_colour, k_shift = jax.random.split(key, 4)
  chosen = jax.random.randint(k_letter, (batch, LONGEST), 0, letters.shape[1])
  word = jnp.asarray(letters)[jnp.arange(LONGEST), chosen]
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


def ink(pictures):
  """What share of each pixel is ink, `[B, 64, 64]`, by the colour of the border.

  Args:
    pictures: `[B, 64, 64, 3]` in [0, 1].
  """
  border = jnp.concatenate(
      [pictures[:, 0], pictures[:, -1], pictures[:, :, 0], pictures[:, :, -1]], 1)
  ground = jax.lax.stop_gradient(jnp.median(border, 1))
  change = jnp.asarray(INKS)[(ground.mean(-1) < 0.55).astype(int)] - ground
  share = ((pictures - ground[:, None, None]) @ change[:, None, :, None])[..., 0]
  return share / jnp.square(change).sum(-1)[:, None, None]


def read(pictures) -> list[str]:
  """The words on `[B, 64, 64, 3]` in [0, 1], by the nearest letters; "?" for what is none.

  By rule, for signs in the middle of a picture or up to two pixels away; what a recogniser that was
  trained on real signs makes of them is another matter.
  """
  glyphs = letters()[:-1].reshape(len(LETTERS), -1)
  cover = np.asarray(ink(jnp.asarray(pictures, jnp.float32))).clip(0, 1)
  energy, best, words = np.square(cover).sum((1, 2)), np.full(len(cover), np.inf), [""] * len(cover)
  for count in range(1, LONGEST + 1):
    for down in range(-2, 3):
      for right in range(-2, 3):
        top, left = (SIZE - HEIGHT) // 2 + down, (SIZE - WIDTH * count) // 2 + right
        box = cover[:, top:top + HEIGHT, left:left + WIDTH * count]
        cells = box.reshape(-1, HEIGHT, count, WIDTH).swapaxes(1, 2).reshape(-1, HEIGHT * WIDTH)
        gap = (np.square(cells).sum(1)[:, None] - 2 * cells @ glyphs.T
               + np.square(glyphs).sum(1)).reshape(-1, count, len(LETTERS))
        error = gap.min(-1).sum(-1) + energy - np.square(box).sum((1, 2))
        for row in np.flatnonzero(error < best):
          best[row] = error[row]
          words[row] = "".join(LETTERS[i] if least < _LIMIT else "?" for i, least in zip(
              gap[row].argmin(-1), gap[row].min(-1)))
  return words
