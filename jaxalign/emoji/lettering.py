"""`soft_word`: log-probability that a sign says its word, with a gradient, by the letters' shapes.

No network and no training: the posterior of a word, given a picture, under a model in which
`signs.render` has drawn it and noise of standard deviation 1.5 falls on each pixel's share of ink.
Beforehand lengths of two to four, shifts of up to two pixels, and letters are alike. Given length
and shift the letters are independent, so that the sum over 475,228 words is one over letters.
"""
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.emoji import signs
from jaxalign.errors import UserError
from jaxalign.rewards import Reward
from jaxalign.rewards.ocr import quoted

NOISE = 1.5              # letters, squared: 74 to 133 from nothing, 12 or more apart, O from Q 3
_SHIFTS = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]
_LENGTHS = range(2, signs.LONGEST + 1)


def _prepare(prompts: list[str]) -> dict[str, np.ndarray]:
  words = [quoted(prompt) for prompt in prompts]
  for word, prompt in zip(words, prompts):
    if len(word) not in _LENGTHS or not set(word) <= set(signs.LETTERS):
      raise UserError(f"prompt {prompt!r}: the reward 'soft_word' reads words of two to four "
                      "capitals A to Z; the reward 'ocr' reads others")
  return {"word": signs.spell(words)}


def score(params, images, prepared):
  """`[B]`, at most 0: images `[B, 64, 64, 3]` in [0, 1], `word` `[B, 4]` of letters, -1 behind."""
  if images.shape[1:3] != (signs.SIZE, signs.SIZE):
    raise UserError(f"the reward 'soft_word' reads signs of {signs.SIZE} x {signs.SIZE}, not "
                    f"{images.shape[1]} x {images.shape[2]} pixels")
  word = prepared["word"]
  glyphs = params["glyphs"].reshape(len(params["glyphs"]), -1)
  ink = signs.ink(images)
  ours, all_words = [], []
  for count in _LENGTHS:
    top, left = (signs.SIZE - signs.HEIGHT) // 2, (signs.SIZE - signs.WIDTH * count) // 2
    boxes = jnp.stack([ink[:, top + down:top + down + signs.HEIGHT,
                           left + right:left + right + signs.WIDTH * count]
                       for down, right in _SHIFTS])
    cells = boxes.reshape(*boxes.shape[:3], count, signs.WIDTH).swapaxes(2, 3)
    alike = cells.reshape(*cells.shape[:3], -1) @ glyphs.T
    # Squares of (picture - word) but for the picture's own, which all words share.
    squares = jnp.square(glyphs).sum(1)[None, None, None] - 2 * alike
    letters = -squares / (2 * NOISE ** 2) - np.log(len(glyphs))          # [shifts, B, count, 26]
    chosen = jnp.take_along_axis(letters, word[None, :, :count, None].clip(0), -1)[..., 0].sum(-1)
    ours.append(jnp.where((word >= 0).sum(1)[None] == count, chosen, -jnp.inf))
    all_words.append(jax.nn.logsumexp(letters, -1).sum(-1))
  total = lambda parts: jax.nn.logsumexp(jnp.concatenate(parts), 0)
  return total(ours) - total(all_words)


def soft_word() -> Reward:
  """For prompts with one word of two to four capitals between quotes; a picture is 64 x 64."""
  glyphs = signs.letters()[:-1]
  return Reward("soft_word", {"glyphs": glyphs}, _prepare, score, "below 0, log-probability")
