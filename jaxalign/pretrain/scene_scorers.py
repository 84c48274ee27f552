"""The scorers of scenes: `scene_clip`, a reward with gradients, and `scene_judge`, its check.

Loss: symmetric InfoNCE over the pictures and captions of a step; each picture has besides one
caption for each part that is wrong in this part only: another subject, another number or place,
another colour, another style. Such near misses are what alignment must tell apart, and random
captions of a batch hardly ever are. A caption that is also true of another picture ("a dog to the
right of a cat" of "a cat to the left of a dog", or without a style) is no negative.
"""
import dataclasses
import functools
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.config.fields import Count, Fraction, NonNegative, check
from jaxalign.emoji import quality, scenes, words
from jaxalign.emoji.artwork import STYLES
from jaxalign.emoji.scorers import SCORERS, save_scorer
from jaxalign.errors import UserError
from jaxalign.models.tokenizer import Tokenizer
from jaxalign.pretrain import Kind, Look, Task, painting
from jaxalign.pretrain.scene_denoisers import NO_STYLE, Captions

WRONG = ("subject", "layout", "colour", "style")


@dataclasses.dataclass(frozen=True)
class Config:
  """Keys of the `task` group that both scorers share.

  Attributes:
    artwork: the file `artwork.npz` that `python -m jaxalign.emoji.artwork` writes.
    vae: folder of the autoencoder that paints half of the pictures.
    subjects: how many of `scenes.SUBJECTS`, from the first.
    batch: scenes per step.
    style_fraction: share in [0, 1) of captions that name the style.
    max_logit_scale: caps 1 / temperature.
    latent_noise: the latents' noise has a standard deviation up to this; theirs is about 1.
    images: pictures for the figures of the thorough look.
  """
  artwork: str = "runs/drawings/artwork.npz"
  vae: str = "runs/pretrain_emoji_vae-emoji/export"
  subjects: Count = len(scenes.SUBJECTS)
  batch: Count = 64
  style_fraction: Fraction = 0.5
  max_logit_scale: NonNegative = 30.0
  latent_noise: NonNegative = 0.6
  images: Count = 1024

  def __post_init__(self):
    check("task", self)
    if self.batch % 2:
      raise UserError(f"task.batch={self.batch} is odd: half of it is painted by the autoencoder")


@dataclasses.dataclass(frozen=True)
class ClipConfig(Config):
  """Keys of the `task` group for `scene_clip`.

  Attributes:
    width, text_layers, layers, patch: of the two transformers; pixels per side of a patch.
  """
  width: Count = 128
  text_layers: Count = 2
  layers: Count = 4
  patch: Count = 8

  def model(self, tokenizer: Tokenizer) -> dict:
    """The asset's own config of its network."""
    tower = dict(hidden_size=self.width, intermediate_size=3 * self.width, num_attention_heads=4,
                 projection_dim=self.width)
    return {
        "text_config": tower | dict(
            num_hidden_layers=self.text_layers, vocab_size=tokenizer.vocab_size,
            eos_token_id=tokenizer.eos_id, max_position_embeddings=tokenizer.length),
        "vision_config": tower | dict(
            num_hidden_layers=self.layers, image_size=scenes.SIZE, patch_size=self.patch)}


@dataclasses.dataclass(frozen=True)
class JudgeConfig(Config):
  """Keys of the `task` group for `scene_judge`.

  Attributes:
    dim: of the features. widths: channels per resolution. text_width: of the token embeddings.
  """
  dim: Count = 64
  widths: tuple[int, ...] = (32, 64, 128)
  text_width: Count = 128

  def model(self, tokenizer: Tokenizer) -> dict:
    """The asset's own config of its network."""
    return {"dim": self.dim, "widths": list(self.widths), "text_width": self.text_width,
            "vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_id,
            "image_size": scenes.SIZE, "styles": len(STYLES)}


class Rows(NamedTuple):
  """Where a scene stands in a `scenes.Table`, -1 where it does not.

  Attributes:
    several: `[N, 4]` int32 by subject and number less one. two: `[N, N, 4]` int32 by both subjects
      and relation. same: `[H]` int32, for each row the first one that says the same.
  """
  several: np.ndarray
  two: np.ndarray
  same: np.ndarray

  @classmethod
  def of(cls, table: scenes.Table, subjects: int) -> "Rows":
    several = np.full((subjects, 4), -1, np.int32)
    two = np.full((subjects, subjects, 4), -1, np.int32)
    rows = np.arange(len(table.first), dtype=np.int32)
    one = table.second < 0
    several[table.first[one], table.number[one] - 1] = rows[one]
    two[table.first[~one], table.second[~one], table.relation[~one]] = rows[~one]
    # Left and right, above and below are neighbours in the list of relations.
    turned = two[table.second[~one], table.first[~one], table.relation[~one] ^ 1]
    same = rows.copy()
    same[~one] = np.where(turned < 0, rows[~one], np.minimum(rows[~one], turned))
    return cls(several, two, same)


class Said(NamedTuple):
  """Captions in numbers, `[...]` int32: row of the table, colour, style (`NO_STYLE` for none)."""
  row: jax.Array
  colour: jax.Array
  style: jax.Array


def near_misses(table: scenes.Table, rows: Rows, drawn: scenes.Drawn, said: Said, key) -> Said:
  """`[B, 4]` captions that are wrong in one part, in the order of `WRONG`.

  Where the table has no such scene, it is the caption itself. The wrong style is always named.
  """
  k_subject, k_layout, k_colour, k_style = jax.random.split(key, 4)
  shape, take = said.row.shape, lambda column: jnp.asarray(column)[said.row]
  first, second, number, relation = map(take, (table.first, table.second, table.number,
                                               table.relation))
  two = second >= 0
  other = lambda key, value, count: (value + jax.random.randint(key, shape, 1, count)) % count
  row_of = lambda first, number, relation: jnp.where(
      two, jnp.asarray(rows.two)[first, second, relation],
      jnp.asarray(rows.several)[first, number - 1])
  count = len(rows.several)
  subject = row_of(other(k_subject, first, count) if count > 1 else first, number, relation)
  layout = row_of(first, other(k_layout, number - 1, 4) + 1, other(k_layout, relation, 4))
  or_own = lambda row: jnp.where(row < 0, said.row, row)
  same, colours = said.row, said.colour
  return Said(
      jnp.stack([or_own(subject), or_own(layout), same, same], 1),
      jnp.stack([colours, colours, other(k_colour, colours, len(scenes.COLOURS)), colours], 1),
      jnp.stack([said.style] * 3 + [other(k_style, drawn.style, len(STYLES))], 1))


def true_of(rows: Rows, drawn: scenes.Drawn, said: Said):
  """Whether captions are true of pictures; shapes of `drawn` and `said` broadcast."""
  same = jnp.asarray(rows.same)
  return (same[drawn.row] == same[said.row]) & (drawn.colour == said.colour) & (
      (said.style == NO_STYLE) | (drawn.style == said.style))


def loss_of(image, text, wrong, true, wrong_true, scale):
  """InfoNCE both ways; near misses compete with a picture's own caption.

  Args:
    image, text: `[B, D]` of length one. wrong: `[B, K, D]`, near misses of each picture.
    true: `[B, B]` bool, pictures by captions. wrong_true: `[B, K]` bool. scale: 1 / temperature.
  Returns:
    Scalar loss; share `[]` of pictures that score their own caption best.
  """
  own = jnp.eye(len(image), dtype=bool)
  logits = jnp.where(true & ~own, -jnp.inf, scale * image @ text.T)
  near = jnp.where(wrong_true, -jnp.inf, scale * jnp.einsum("bd,bkd->bk", image, wrong))
  of_images = jax.nn.log_softmax(jnp.concatenate([logits, near], 1), 1)
  nll = -jnp.diagonal(of_images).mean() - jnp.diagonal(jax.nn.log_softmax(logits, 0)).mean()
  return 0.5 * nll, (of_images.argmax(1) == jnp.arange(len(image))).mean()


def as_stored(params):
  """Parameters as the asset will be: rounded to the precision that it is stored in."""
  return jax.tree.map(lambda a: np.asarray(a, np.float16).astype(np.float32), params)


def described(name: str, model: dict, cfg, record) -> dict:
  """The asset's `config.json`: its network, how it was made (`record`), and its figures."""
  return {"name": name, "model": model, "training": {
      "task": json.loads(json.dumps(dataclasses.asdict(cfg))),
      "steps": record["steps"], "seconds": record["seconds"]},
      "figures": {key.removeprefix("eval/"): value for key, value in record["figures"].items()}}


def make(name: str, cfg: Config) -> Task:
  """The scorer `name` as a Task; parameters are `net` and `log_scale`."""
  painter = painting.Painter.read(cfg.vae)
  names, drawings, _, _ = quality.world(cfg.artwork, cfg.subjects)
  table = scenes.table(names, scenes.contrast(drawings), lambda scene: True)
  rows, tokenizer = Rows.of(table, len(names)), words.tokenizer()
  model = cfg.model(tokenizer)
  module = SCORERS[name](model)
  tables = {"sheets": scenes.Sheets.of(drawings), "scenes": table, "vae": painter.params,
            "captions": Captions.of(table, names, tokenizer)}
  embed = lambda params, method, x: module.apply({"params": params}, x, method=method)

  def spelt(captions, said: Said):
    flat = jax.tree.map(lambda x: x.reshape(-1), said)
    return captions.tokens(*flat, tokenizer.bos_id, tokenizer.length)

  def init(key):
    net = module.init(key, jnp.zeros((1, scenes.SIZE, scenes.SIZE, 3)),
                      jnp.zeros((1, tokenizer.length), jnp.int32))["params"]
    return {"net": net, "log_scale": jnp.float32(np.log(10.0))}

  def draw(tables, key):
    k_scene, k_style, k_wrong, k_picture = jax.random.split(key, 4)
    drawn = scenes.draw(tables["scenes"], k_scene, cfg.batch)
    named = jax.random.uniform(k_style, (cfg.batch,)) < cfg.style_fraction
    said = Said(drawn.row, drawn.colour, jnp.where(named, drawn.style, NO_STYLE))
    wrong = near_misses(tables["scenes"], rows, drawn, said, k_wrong)
    plain = scenes.render(tables["sheets"], tables["scenes"], drawn)
    images = painter.disturb(tables["vae"], plain, cfg.latent_noise, k_picture)
    across = jax.tree.map(lambda x: x[:, None], drawn)
    return {"images": images, "tokens": spelt(tables["captions"], said), "style": drawn.style,
            "wrong": spelt(tables["captions"], wrong).reshape(cfg.batch, len(WRONG), -1),
            "true": true_of(rows, across, jax.tree.map(lambda x: x[None], said)),
            "wrong_true": true_of(rows, across, wrong)}

  def loss(params, batch):
    net, b = params["net"], len(batch["images"])
    # Style logits come with the judge alone.
    image, text, *style = module.apply({"params": net}, batch["images"], batch["tokens"])
    wrong = embed(net, "embed_text", batch["wrong"].reshape(b * len(WRONG), -1))
    scale = jnp.minimum(jnp.exp(params["log_scale"]), cfg.max_logit_scale)
    total, hit = loss_of(image, text, wrong.reshape(b, len(WRONG), -1), batch["true"],
                         batch["wrong_true"], scale)
    metrics = {"train/contrastive": total, "train/accuracy": hit, "train/scale": scale}
    if style:
      metrics["train/style"] = optax.softmax_cross_entropy_with_integer_labels(
          style[0], batch["style"]).mean()
      total = total + metrics["train/style"]
    return total, metrics | {"train/loss": total}

  @jax.jit
  def trial(params, key):
    """A batch of 64 as in training, half of it painted: own score less that of near misses."""
    k_scene, k_wrong, k_picture = jax.random.split(key, 3)
    drawn = scenes.draw(table, k_scene, 64)
    said = Said(drawn.row, drawn.colour, drawn.style)
    wrong = near_misses(table, rows, drawn, said, k_wrong)
    plain = scenes.render(tables["sheets"], table, drawn)
    sizes = jnp.full(len(plain), painting.TRIAL)
    own = embed(params, "embed_text", spelt(tables["captions"], said))
    missed = embed(params, "embed_text", spelt(tables["captions"], wrong)).reshape(
        64, len(WRONG), -1)
    differs = ~true_of(rows, jax.tree.map(lambda x: x[:, None], drawn), wrong)
    beaten = {}
    for kind, images in (("", plain), ("_painted", painter.paint(
        tables["vae"], plain, sizes, k_picture))):
      image = embed(params, "embed_images", images)
      own_score = (image * own).sum(-1, keepdims=True)
      beaten[kind] = own_score > jnp.einsum("bd,bkd->bk", image, missed)
    return beaten, differs

  def look(params, thorough):
    """Share of pictures that score their caption above one that is wrong in this part."""
    net = as_stored(params["net"])
    count = -(-(cfg.images if thorough else 128) // 64)
    parts = [trial(net, jax.random.fold_in(jax.random.key(1), i)) for i in range(count)]
    differs = np.concatenate([differs for _, differs in parts])
    figures = {}
    for kind in ("", "_painted"):
      beaten = np.concatenate([np.asarray(part[kind]) for part, _ in parts])
      figures |= {f"eval/{part}{kind}": float(beaten[differs[:, i], i].mean())
                  for i, part in enumerate(WRONG) if differs[:, i].any()}
      figures[f"eval/all{kind}"] = float((beaten | ~differs).all(1).mean())
    return Look(figures)

  def save(params, folder: pathlib.Path, record) -> None:
    save_scorer(folder, described(name, model, cfg, record), params["net"], tokenizer)

  return Task(init, tables, draw, loss, look, save)


scene_clip, scene_judge = (Kind(config, functools.partial(make, name)) for name, config in (
    ("scene_clip", ClipConfig), ("scene_judge", JudgeConfig)))
