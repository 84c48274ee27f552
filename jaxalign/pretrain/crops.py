"""The classifier of crops behind the rewards `scene`, `number`, `place` and their relatives.

Loss: cross-entropy of what each of five crops shows, and of the style where it shows a drawing.
Pictures have more freedom than scenes: any mixture of subjects, styles and drawings of something
else in the four quarters, so that it learns what is there, not what usually is. Half of them are
painted by the autoencoder's decoder from noisy latents, as generated pictures are.
"""
import dataclasses
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.config.fields import Count, Fraction, NonNegative, check
from jaxalign.emoji import artwork, checks, crops, scenes
from jaxalign.emoji.artwork import STYLES
from jaxalign.emoji.scorers import save_scorer
from jaxalign.errors import UserError
from jaxalign.pretrain import Look, Task, painting
from jaxalign.pretrain.scene_scorers import as_stored, described


@dataclasses.dataclass(frozen=True)
class Config:
  """Keys of the `task` group.

  Attributes:
    artwork: the file `artwork.npz` that `python -m jaxalign.emoji.artwork` writes.
    vae: folder of the autoencoder that paints half of the pictures.
    subjects: how many of `scenes.SUBJECTS`, from the first; all other drawings are something else.
    widths: channels per resolution. dim: of the hidden layer.
    batch: pictures per step, of five crops each.
    latent_noise: the latents' noise has a standard deviation up to this; theirs is about 1.
    others: share in [0, 1) of drawings that are something else.
    images: pictures of each kind in the thorough look.
  """
  artwork: str = "runs/drawings/artwork.npz"
  vae: str = "runs/pretrain_emoji_vae-emoji/export"
  subjects: Count = len(scenes.SUBJECTS)
  widths: tuple[int, ...] = (32, 64, 128)
  dim: Count = 256
  batch: Count = 48
  latent_noise: NonNegative = 0.4
  others: Fraction = 0.2
  images: Count = 1024

  def __post_init__(self):
    check("task", self)
    if any(width % 8 for width in self.widths) or not 1 <= len(self.widths) <= 4:
      raise UserError(f"task.widths={self.widths}: one to four multiples of 8")
    if self.batch % 2:
      raise UserError(f"task.batch={self.batch} is odd: half of it is painted by the autoencoder")
    if self.subjects > len(scenes.SUBJECTS):
      raise UserError(f"task.subjects={self.subjects}: there are {len(scenes.SUBJECTS)}")


class Tables(NamedTuple):
  """All drawings, subjects first; `[N, 12]` bool which stand out from which colour; autoencoder."""
  sheets: scenes.Sheets
  visible: np.ndarray
  vae: dict


class Layout(NamedTuple):
  """What pictures show, N drawings.

  drawing: `[B, 5]` int32 in [0, N], of the four quarters and of the one that fills the picture; N
  where there is none. style: `[B, 5]` int32. colour: `[B]` int32.
  """
  drawing: jax.Array
  style: jax.Array
  colour: jax.Array

  @classmethod
  def of(cls, drawn: scenes.Drawn, table: scenes.Table, count: int) -> "Layout":
    """What `scenes.draw` drew from the table."""
    filled = jnp.where(drawn.large, jnp.asarray(table.first)[drawn.row], count)
    return cls(jnp.concatenate([jnp.where(drawn.places < 0, count, drawn.places),
                                filled[:, None]], 1),
               jnp.repeat(drawn.style[:, None], 5, 1), drawn.colour)

  def with_one_replaced(self, generator, subjects: int, count: int) -> "Layout":
    """One drawing of each picture is one in [subjects, count) instead."""
    drawing = np.array(self.drawing)
    for row in drawing:
      row[generator.choice(np.flatnonzero(row < count))] = generator.integers(subjects, count)
    return self._replace(drawing=jnp.asarray(drawing))

  def render(self, sheets: scenes.Sheets):
    """`[B, 64, 64, 3]` in [0, 1]."""
    last = len(sheets.large) - 1
    count = last // len(STYLES)
    rows = jnp.where(self.drawing < count, self.style * count + self.drawing, last)
    return scenes.compose(sheets, rows[:, 4], rows[:, :4], jnp.asarray(scenes.RGB)[self.colour])

  def labels(self, subjects: int, count: int):
    """`[B, 5]`: subject of each crop, `subjects` for nothing, one more for something else."""
    fills = (self.drawing[:, 4:] < count)
    whole = jnp.where(fills, self.drawing[:, 4:], jnp.where(
        (self.drawing[:, :4] == count).all(1, keepdims=True), count, count + 1))
    shown = jnp.concatenate([jnp.where(fills, count + 1, self.drawing[:, :4]), whole], 1)
    return jnp.where(shown < subjects, shown, jnp.where(shown == count, subjects, subjects + 1))


def draw_layout(tables: Tables, key, batch: int, subjects: int, others: float) -> Layout:
  """A third shows one large drawing, the others something or nothing in each quarter."""
  count = len(tables.visible)
  keys = iter(jax.random.split(key, 9))
  chance = lambda p, shape: jax.random.uniform(next(keys), shape) < p
  subject = jax.random.randint(next(keys), (batch, 5), 0, subjects)
  if count > subjects:
    something = jax.random.randint(next(keys), (batch, 5), subjects, count)
    subject = jnp.where(chance(others, (batch, 5)), something, subject)
  alike = lambda x, p: jnp.where(chance(p, (batch, 1)), x[:, :1], x)
  drawing = alike(subject, 0.5)
  style = alike(jax.random.randint(next(keys), (batch, 5), 0, len(STYLES)), 0.8)
  large = chance(1 / 3, (batch, 1))
  shown = jnp.where(jnp.arange(5)[None] == 4, large, ~large & chance(0.55, (batch, 5)))
  # Colours from which all that is shown stands out, where there are any.
  seen = jnp.where(shown[..., None], jnp.asarray(tables.visible)[drawing], True).all(1)
  colour = jax.random.categorical(next(keys), jnp.where(seen, 0.0, -20.0))
  return Layout(jnp.where(shown, drawing, count), style, colour)


def altered(scene: scenes.Scene, names, generator) -> scenes.Scene:
  """Another scene that differs from this one in a random part of what its caption says."""
  other = lambda values, *but: str(generator.choice([v for v in values if v not in but]))
  changes = [lambda: scene._replace(colour=other(scenes.COLOURS, scene.colour)),
             lambda: scene._replace(style=other(STYLES, scene.style)),
             lambda: scene._replace(subjects=(other(names, *scene.subjects),
                                              *scene.subjects[1:]))]
  if scene.relation:
    changes.append(lambda: scene._replace(relation=other(scenes.RELATIONS, scene.relation)))
  else:
    numbers = [n for n in (1, 2, 3, 4) if n != scene.number]
    changes.append(lambda: scene._replace(number=int(generator.choice(numbers))))
  return changes[generator.integers(len(changes))]()


def make(cfg: Config) -> Task:
  """The classifier as a Task; its parameters are the network's."""
  painter, all_drawings = painting.Painter.read(cfg.vae), artwork.load(cfg.artwork)
  codes = list(scenes.SUBJECTS)[:cfg.subjects]
  others = [code for code in all_drawings.codes if code not in scenes.SUBJECTS]
  drawings = all_drawings.of([*codes, *others])
  names, count = [scenes.SUBJECTS[code] for code in codes], len(codes) + len(others)
  model = {"subjects": names, "widths": list(cfg.widths), "dim": cfg.dim}
  module = crops.CropClassifier(model)
  visible = scenes.contrast(drawings)
  table = scenes.table(names, visible[:cfg.subjects], lambda scene: True)
  tables = Tables(scenes.Sheets.of(drawings), visible, painter.params)

  def init(key):
    return module.init(key, jnp.zeros((1, crops.SIZE, crops.SIZE, 3)))["params"]

  def draw(tables, key):
    k_layout, k_picture = jax.random.split(key)
    layout = draw_layout(tables, k_layout, cfg.batch, cfg.subjects, cfg.others)
    images = painter.disturb(tables.vae, layout.render(tables.sheets), cfg.latent_noise, k_picture)
    return {"images": images, "style": layout.style, "drawn": layout.drawing < count,
            "subject": layout.labels(cfg.subjects, count)}

  def loss(params, batch):
    seen = crops.cut(batch["images"])
    subject, style = module.apply({"params": params}, seen.reshape(-1, *seen.shape[2:]))
    flat = lambda x: x.reshape(-1)
    nll = optax.softmax_cross_entropy_with_integer_labels
    named = nll(subject, flat(batch["subject"])).mean()
    drawn = flat(batch["drawn"]).astype(jnp.float32)
    styled = (nll(style, flat(batch["style"])) * drawn).sum() / drawn.sum().clip(1)
    hit = (subject.argmax(-1) == flat(batch["subject"])).mean()
    total = named + 0.5 * styled
    return total, {"train/loss": total, "train/subject": named, "train/style": styled,
                   "train/accuracy": hit}

  painted = jax.jit(lambda images, key: painter.paint(
      painter.params, images, jnp.full(len(images), painting.TRIAL), key))

  def figures(params, images: int) -> dict[str, float]:
    """Shares of wrong answers of the reward `scene`, over at least `images` of each kind.

    refused: a right picture. refused_painted: the same, painted by the decoder from noisy latents.
    accepted: a picture of another scene, which differs from the caption in one part.
    accepted_other: one in which a drawing is replaced by one of something else.
    """
    generator = np.random.default_rng(0)
    score = jax.jit(lambda images, said: checks.answers(
        crops.see(module, params, images).decided(), said)["scene"])
    wrong = {name: [] for name in ("refused", "refused_painted", "accepted", "accepted_other")}
    for part in range(-(-images // 64)):
      key = jax.random.fold_in(jax.random.key(1), part)
      drawn = scenes.draw(table, key, 64)
      right = Layout.of(drawn, table, count)
      said = [table.scene(int(row), int(colour), names, STYLES[int(style)])
              for row, colour, style in zip(drawn.row, drawn.colour, drawn.style)]
      ask = lambda said: checks.asked([scenes.caption(scene) for scene in said], names)
      pictures = right.render(tables.sheets)
      wrong["refused"].append(1 - score(pictures, ask(said)))
      wrong["refused_painted"].append(1 - score(painted(pictures, key), ask(said)))
      wrong["accepted"].append(score(pictures, ask([altered(s, names, generator) for s in said])))
      if count > cfg.subjects:
        strange = right.with_one_replaced(generator, cfg.subjects, count)
        wrong["accepted_other"].append(score(strange.render(tables.sheets), ask(said)))
    out = {name: float(np.concatenate(values).mean()) for name, values in wrong.items() if values}
    return out | {"error": float(np.mean(list(out.values())))}

  def look(params, thorough):
    found = figures(as_stored(params), cfg.images if thorough else 128)
    return Look({f"eval/{key}": value for key, value in found.items()})

  def save(params, folder: pathlib.Path, record) -> None:
    save_scorer(folder, described("scene_check", model, cfg, record), params)

  return Task(init, tables, draw, loss, look, save)
