"""The signs that a denoiser learns to letter: `signs`, a transformer for words."""
import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxalign.emoji import scenes, signs, words
from jaxalign.pretrain import Look, denoiser


@dataclasses.dataclass(frozen=True)
class Config(denoiser.Transformer, denoiser.Config):
  """See `denoiser.Transformer` and `denoiser.Config`."""


def _captions(tokenizer) -> tuple[np.ndarray, int]:
  """Tokens `[12, 5, L]` of a sign in each colour and of 0 to 4 letters, all of them "A", and where
  the letters begin."""
  make = lambda count: [signs.caption("A" * count, colour) for colour in scenes.COLOURS]
  tokens = np.stack([tokenizer(make(count)) for count in range(signs.LONGEST + 1)], 1)
  return tokens, int((tokens[0, 1] != tokens[0, 2]).argmax())


def _letters(tokenizer) -> np.ndarray:
  """Tokens `[2, 26]` of a letter inside a word and at its end."""
  start = _captions(tokenizer)[1]
  pairs = tokenizer([signs.caption(letter * 2, "red") for letter in signs.LETTERS])
  return pairs[:, start:start + 2].T


def tokens_of(tables, word, colour):
  """`[B, L]` int32: what the tokenizer makes of the captions of words `[B, 4]` in colours `[B]`."""
  captions, letters, start = tables["captions"], tables["letters"], tables["start"]
  count = (word >= 0).sum(1)
  at = jnp.arange(captions.shape[-1])[None] - start
  here = jnp.take_along_axis(word, jnp.clip(at, 0, signs.LONGEST - 1), 1)
  spelt = letters[(at == count[:, None] - 1).astype(jnp.int32), here]
  return jnp.where((at >= 0) & (at < count[:, None]), spelt, captions[colour, count])


def content() -> denoiser.Content:
  """Signs and their captions."""
  tokenizer = words.spelling_tokenizer()
  captions, start = _captions(tokenizer)
  tables = {"captions": captions, "letters": _letters(tokenizer), "start": np.int32(start)}

  def draw(tables, key, batch):
    word, colour, shift = signs.draw(key, batch, signs.TRAINED)
    images = signs.render(word, jnp.asarray(scenes.RGB)[colour], shift)
    return images, tokens_of(tables, word, colour)

  def look(paint, each):
    generator = np.random.default_rng(0)
    asked = signs.ask(each, generator, False) + signs.ask(each, generator, True)
    captions = [signs.caption(word, str(generator.choice(scenes.COLOURS))) for word in asked]
    images = paint(captions)
    seen = signs.read(images)
    figures = {}
    for prefix, part in (("", slice(0, each)), ("new_", slice(each, None))):
      pairs = list(zip(asked[part], seen[part]))
      figures[f"eval/{prefix}exact"] = float(np.mean([a == b for a, b in pairs]))
      figures[f"eval/{prefix}letters"] = float(np.mean([
          a == b for word, read in pairs for a, b in zip(word, read.ljust(len(word)))]))
    rows = range(0, len(asked), 8)
    return Look(figures, np.stack([images[i:i + 8] for i in rows]),
                tuple(" ".join(asked[i:i + 8]) for i in rows))

  return denoiser.Content(tokenizer, tables, draw, look)


def make(cfg: Config):
  """The denoiser of signs as a Task."""
  return denoiser.make(cfg, content())
