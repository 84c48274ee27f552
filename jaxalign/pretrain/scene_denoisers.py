"""The scenes that denoisers learn to draw: `emoji`, a UNet, and `emoji_sd3`, a transformer."""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.config.fields import Count, Fraction
from jaxalign.emoji import quality, reader, scenes, words
from jaxalign.emoji.artwork import STYLES
from jaxalign.errors import UserError
from jaxalign.models.tokenizer import Tokenizer
from jaxalign.pretrain import Kind, Look, denoiser

NO_STYLE = len(STYLES)     # second column of the caption's ends; those before name a style


@dataclasses.dataclass(frozen=True)
class _Scenes(denoiser.Config):
  """Keys of the `task` group, beside those of `denoiser.Config` and of the network.

  Attributes:
    artwork: the file `artwork.npz` that `python -m jaxalign.emoji.artwork` writes.
    subjects: how many of `scenes.SUBJECTS`, from the first.
    style_fraction: share in [0, 1) of captions that name the style.
    single, several: shares in [0, 1) of scenes of one drawing and of two to four of a kind; the
      rest shows two subjects.
  """
  artwork: str = "runs/drawings/artwork.npz"
  subjects: Count = len(scenes.SUBJECTS)
  style_fraction: Fraction = 0.5
  single: Fraction = 0.3
  several: Fraction = 0.3

  def __post_init__(self):
    super().__post_init__()
    if self.single + self.several >= 1:
      raise UserError(f"task.single={self.single} and task.several={self.several} leave nothing "
                      "for scenes of two subjects")


@dataclasses.dataclass(frozen=True)
class UNetConfig(denoiser.UNet, _Scenes):
  """See `denoiser.UNet` and `denoiser.Config`."""


@dataclasses.dataclass(frozen=True)
class TransformerConfig(denoiser.Transformer, _Scenes):
  """See `denoiser.Transformer` and `denoiser.Config`."""


class Captions(NamedTuple):
  """Captions in two parts, so that not all of their combinations need be stored.

  heads: `[H, P]` int32 tokens of "a cat above a dog" for each row of a `scenes.Table`, padded.
  lengths: `[H]` int32 of them. ends: `[12, 4, E]` int32 tokens of "on a red background, 3d style"
  for each colour and style, the last one naming none, with the tokens that end and fill a prompt.
  """
  heads: np.ndarray
  lengths: np.ndarray
  ends: np.ndarray

  @classmethod
  def of(cls, table: scenes.Table, names, tokenizer: Tokenizer) -> "Captions":
    def words_of(text):
      return text.split(" on a", 1)[0]
    some = [scenes.caption(table.scene(row, 0, names)) for row in range(len(table.first))]
    heads = tokenizer([words_of(text) for text in some])[:, 1:]
    lengths = (heads != tokenizer.eos_id).sum(1)
    ends = [[scenes.caption(scenes.Scene((names[0],), 1, "", colour, style)) for style in
             (*STYLES, "")] for colour in scenes.COLOURS]
    ends = [tokenizer([text[len(words_of(text)):] for text in row])[:, 1:] for row in ends]
    return cls(heads[:, :lengths.max()], lengths.astype(np.int32), np.array(ends))

  def tokens(self, row, colour, style, bos: int, length: int):
    """`[B, length]` int32: what the tokenizer makes of these captions."""
    at = jnp.arange(length - 1)[None]
    before, behind = jnp.asarray(self.lengths)[row][:, None], jnp.asarray(self.ends)[colour, style]
    head = jnp.take_along_axis(
        jnp.asarray(self.heads)[row], jnp.minimum(at, self.heads.shape[1] - 1), 1)
    end = jnp.take_along_axis(behind, jnp.clip(at - before, 0, behind.shape[1] - 1), 1)
    tokens = jnp.where(at < before, head, end)
    return jnp.concatenate([jnp.full((len(tokens), 1), bos, tokens.dtype), tokens], 1)


def content(cfg: _Scenes) -> denoiser.Content:
  """Scenes and their captions."""
  names, drawings, trained, held_out = quality.world(cfg.artwork, cfg.subjects)
  tokenizer = words.tokenizer()
  shares = (cfg.single, cfg.several, 1 - cfg.single - cfg.several)
  tables = {"sheets": scenes.Sheets.of(drawings), "scenes": trained,
            "captions": Captions.of(trained, names, tokenizer)}

  def draw(tables, key, batch):
    k_scene, k_style = jax.random.split(key)
    drawn = scenes.draw(tables["scenes"], k_scene, batch, shares)
    said = jax.random.uniform(k_style, (batch,)) < cfg.style_fraction
    tokens = tables["captions"].tokens(drawn.row, drawn.colour,
                                       jnp.where(said, drawn.style, NO_STYLE),
                                       tokenizer.bos_id, tokenizer.length)
    return scenes.render(tables["sheets"], tables["scenes"], drawn), tokens

  def look(paint, each):
    asked = {kind: quality.ask(table, names, each, jax.random.key(0))[0]
             for kind, table in (("", trained), ("new_", held_out))}
    captions = [scenes.caption(scene) for part in asked.values() for scene in part]
    images = paint(captions)
    readings = reader.Reader(drawings, names)(images)
    figures, start = {}, 0
    for prefix, part in asked.items():
      found = quality.answers(part, readings[start:start + len(part)])
      figures |= {f"eval/{prefix}{name}": float(np.mean(right)) for name, right in found.items()
                  if right}
      start += len(part)
    starts = range(0, len(captions), each // 2)             # two rows of each kind
    grid = np.stack([images[i:i + 4] for i in starts])
    rows = tuple("; ".join(caption.replace(" background", "") for caption in captions[i:i + 4])
                 for i in starts)
    return Look(figures, grid, rows)

  return denoiser.Content(tokenizer, tables, draw, look)


def make(cfg: _Scenes):
  """A denoiser of scenes as a Task."""
  return denoiser.make(cfg, content(cfg))


emoji, emoji_sd3 = Kind(UNetConfig, make), Kind(TransformerConfig, make)
