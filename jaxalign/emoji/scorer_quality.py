"""How good the embedded scorers are: what they are shown, and the figures of the card."""
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.devices import rng
from jaxalign.emoji.drawings import COLOURS, NO_STYLE, RGB, Drawings, caption_tokens, held_out
from jaxalign.emoji.scorers import SCORERS
from jaxalign.models.tokenizer import Tokenizer


class Tables(NamedTuple):
  """All a step draws from. N names, 12 colours.

  rgba: `[2, N, S, S, 4]` uint8. tokens: `[N, 12, 3, L]` int32, the last index before L is the style
  or `NO_STYLE`. trained: `[N, 12]` bool, pairs that are not held out. same_name: `[N]` int32, equal
  for equal names. vae: parameters of the autoencoder, where there is latent noise.
  """
  rgba: Any
  tokens: Any
  trained: Any
  same_name: Any
  vae: Any = None


def module_of(folder: pathlib.Path):
  """The network of the asset in `folder`, without its weights."""
  config = json.loads((folder / "config.json").read_text())
  return SCORERS[config["name"]](config["model"])


def make_tables(drawings: Drawings, tokenizer: Tokenizer, vae=None) -> Tables:
  """The tables of all drawings."""
  tokens = caption_tokens(drawings, tokenizer)
  longest = int((tokens == tokenizer.eos_id).argmax(-1).max()) + 1  # the rest is padding everywhere
  trained = [[not held_out(str(name), colour) for colour in COLOURS]
             for name in drawings.names]
  same_name = np.unique(drawings.names, return_inverse=True)[1].astype(np.int32)
  return Tables(drawings.rgba, tokens[..., :longest], np.array(trained), same_name, vae)


def _blur_matrix(sigma, size):
  """`[B]` pixels -> `[B, size, size]`, rows sum to one."""
  d = jnp.arange(size)[:, None] - jnp.arange(size)[None]
  weights = jnp.exp(-0.5 * (d[None] / jnp.maximum(sigma, 0.05)[:, None, None]) ** 2)
  return weights / weights.sum(-1, keepdims=True)


def augment(rgba, colour, key):
  """Drawings on plain backgrounds, as a decoder might paint them: shifted, soft, noisy.

  Args:
    rgba: `[B, S, S, 4]` uint8. colour: `[B, 3]` in [0, 1].
  Returns:
    `[B, S, S, 3]` f32 in [0, 1].
  """
  b, size = rgba.shape[:2]
  keys = iter(jax.random.split(key, 12))
  uniform = lambda low, high, shape=(): jax.random.uniform(next(keys), (b, *shape), jnp.float32,
                                                           low, high)
  x = rgba.astype(jnp.float32) / 255
  x = jnp.where((uniform(0, 1) < 0.5)[:, None, None, None], x[:, :, ::-1], x)

  # Scaled and shifted with premultiplied alpha; what comes in from outside is transparent.
  x = jnp.concatenate([x[..., :3] * x[..., 3:], x[..., 3:]], axis=-1)
  scale = uniform(0.8, 1.1, (1,)) * uniform(0.93, 1.07, (2,))
  shift = uniform(-2.5, 2.5, (2,)) * size / 32 + (1 - scale) * size / 2
  x = jax.vmap(lambda image, scale, shift: jax.image.scale_and_translate(
      image, image.shape, (0, 1), scale, shift, "linear"))(x, scale, shift)
  colour = jnp.clip(colour + uniform(-0.05, 0.05, (3,)), 0, 1)
  x = x[..., :3] + colour[:, None, None, :] * (1 - x[..., 3:])

  # Half of the images are softened, up to what a small autoencoder makes of fine lines.
  sigma = jnp.where(uniform(0, 1) < 0.5, 0.0, uniform(0.3, 2.0)) * size / 32
  blur = _blur_matrix(sigma, size)
  x = jnp.einsum("bij,bjkc->bikc", blur, x)
  x = jnp.einsum("bkj,bijc->bikc", blur, x)

  contrast, brightness = uniform(0.8, 1.2), uniform(-0.08, 0.08)
  x = (x - 0.5) * contrast[:, None, None, None] + 0.5 + brightness[:, None, None, None]
  x = x + uniform(0, 0.05)[:, None, None, None] * jax.random.normal(next(keys), x.shape)
  return jnp.clip(x, 0, 1)


def evaluate(scorers: dict[str, tuple], tables: Tables, images: int) -> dict[str, dict]:
  """Figures of each scorer on augmented images that no training step saw.

  All are shares in [0, 1] unless they say otherwise. `seen` and `held_out` are about the
  name-colour pair.

  retrieval_20: the image's own caption beats 19 of random other names and colours.
  retrieval_20_same_colour: it beats 19 other names on its own colour.
  name_top1: it beats all other names on its own colour.
  colour_12: it beats its own name on the other 11 colours.
  ..._soft: the same for images blurred further, by a Gaussian of 1.5 pixels of 32.
  score: mean cosine with the own caption.
  gap_name, gap_colour: mean loss of cosine by a wrong name, by a wrong colour.
  style_accuracy: the judge's second head names the vendor.
  margin_correlation: how the two scorers' margins (own caption against the mean of 19 other names
    on its colour) go together over images, -1 to 1.
  error_correlation: the same of their misses in retrieval_20_same_colour, on sharp and soft images;
    absent where a scorer has none.

  Args:
    scorers: module and parameters by name; images: number of images for each figure.
  """
  key = rng.stream(jax.random.key(0), rng.EVAL)
  count = tables.tokens.shape[0]
  rand = np.random.default_rng(0)
  figures = {name: {} for name in scorers}
  margins, misses = ({name: [] for name in scorers} for _ in range(2))
  trained, same = np.asarray(tables.trained), np.asarray(tables.same_name)
  for split in ("seen", "held_out"):
    pairs = np.argwhere(trained == (split == "seen"))
    name, colour = pairs[rand.integers(len(pairs), size=images)].T
    vendor = rand.integers(2, size=images)
    sharp = augment(tables.rgba[vendor, name], jnp.asarray(RGB)[colour], key)
    blur = _blur_matrix(jnp.full(images, 1.5 * sharp.shape[1] / 32), sharp.shape[1])
    soft = jnp.einsum("bkj,bljc->blkc", blur, jnp.einsum("bij,bjkc->bikc", blur, sharp))

    # [images, 19] wrong captions by name and by colour
    wrong_name = rand.integers(count, size=(images, 19))
    wrong_name = np.where(same[wrong_name] == same[name][:, None], (wrong_name + 1) % count,
                          wrong_name)
    wrong_colour = rand.integers(len(COLOURS), size=(images, 19))
    for scorer_name, (module, params) in scorers.items():
      embed = functools.partial(_apply_in_parts, module, params)
      text = embed("embed_text", tables.tokens[:, :, NO_STYLE].reshape(-1, tables.tokens.shape[-1]))
      text = text.reshape(count, len(COLOURS), -1)
      out = figures[scorer_name]
      for kind, x in (("", sharp), ("_soft", soft)):
        scores = np.einsum("bd,ncd->bnc", embed("embed_images", x), text)
        row = np.arange(images)
        own = scores[row, name, colour]
        mixed = scores[row[:, None], wrong_name, wrong_colour]
        alike = scores[row[:, None], wrong_name, colour[:, None]]
        on_colour = scores[row, :, colour]
        on_colour = np.where(same[None] == same[name][:, None], -np.inf, on_colour)
        of_name = scores[row, name].copy()
        of_name[row, colour] = -np.inf
        share = lambda ok: round(float(np.mean(ok)), 4)
        misses[scorer_name].append(own <= alike.max(1))
        out[f"retrieval_20_{split}{kind}"] = share(own > mixed.max(1))
        out[f"retrieval_20_same_colour_{split}{kind}"] = share(own > alike.max(1))
        out[f"name_top1_{split}{kind}"] = share(own > on_colour.max(1))
        out[f"colour_12_{split}{kind}"] = share(own > of_name.max(1))
        if not kind:
          of_name[row, colour] = np.nan
          out[f"score_{split}"] = share(own)
          out[f"gap_name_{split}"] = share(own - alike.mean(1))
          out[f"gap_colour_{split}"] = share(own - np.nanmean(of_name, 1))
          margins[scorer_name].append(own - alike.mean(1))
          if scorer_name == "emoji_judge":
            logits = embed("style", x)
            out[f"style_accuracy_{split}"] = share(logits.argmax(1) == vendor)
  if len(scorers) == 2:
    a, b = (np.concatenate(m) for m in margins.values())
    missed = [np.concatenate(m) for m in misses.values()]
    for out in figures.values():
      out["margin_correlation"] = round(float(np.corrcoef(a, b)[0, 1]), 4)
      if all(m.any() for m in missed):
        out["error_correlation"] = round(float(np.corrcoef(*missed)[0, 1]), 4)
  return figures


def _apply_in_parts(module, params, method: str, x, size=512):
  run = jax.jit(lambda params, x: module.apply({"params": params}, x, method=method))
  return np.concatenate([run(params, x[i:i + size]) for i in range(0, len(x), size)])
