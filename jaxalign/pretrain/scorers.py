"""The embedded scorers: `emoji_clip`, a reward, and `emoji_judge`, its independent check.

Loss: symmetric InfoNCE over the images and captions of a step. Each name of a step comes in both
vendors' drawings on two different backgrounds, so every caption has a wrong colour of its own name
to be told from; a step has few colours, so it has many wrong names on its own colour too. A caption
that is also true of another image (the same name drawn by the other vendor, an equal name) is no
negative.

A scorer with `latent_noise` sees half of the images through the autoencoder, with noise on their
latents. A reward's gradient is taken there, through the decoder, at the half-done images of a
sampler; a scorer that is right in spite of such noise has gradients that change what one sees.
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
from jaxalign.emoji.drawings import COLOURS, CORE_CATEGORIES, NO_STYLE, RGB, load_drawings
from jaxalign.emoji.scorer_quality import Tables, augment, evaluate, make_tables
from jaxalign.emoji.scorers import ASSETS, SCORERS, save_scorer
from jaxalign.errors import UserError
from jaxalign.models.tokenizer import Tokenizer
from jaxalign.models.vae import decode_images, encode_images
from jaxalign.pretrain import Kind, Look, Task, autoencoder


@dataclasses.dataclass(frozen=True)
class Config:
  """Keys of the `task` group that both scorers share.

  Attributes:
    drawings: the file `emoji.npz` that `python -m jaxalign.emoji.drawings` writes.
    categories: of the packages' own, those that are used.
    tokenizer: folder of the tokenizer; the embedded model's by default.
    names: drawn per step, each in two images, of two vendors on two colours.
    colours_per_step: of 12: the fewer, the more wrong names share their background.
    style_fraction: share in [0, 1) of captions that name the vendor's style.
    max_logit_scale: caps 1 / temperature, so that scores spread over [-1, 1].
    latent_noise: half of the images are decoded from latents with noise of a standard deviation up
      to this, where those of the data have 1; 0 shows plain drawings only.
    vae: folder of the autoencoder that does so.
    images: number of images for each figure of the thorough look.
  """
  drawings: str = "runs/drawings/emoji.npz"
  categories: tuple[str, ...] = CORE_CATEGORIES
  tokenizer: str = str(ASSETS / "emoji" / "tokenizer")
  names: Count = 64
  colours_per_step: Count = 4
  style_fraction: Fraction = 0.25
  max_logit_scale: NonNegative = 30.0
  latent_noise: NonNegative = 0.0
  vae: str = str(ASSETS / "emoji" / "vae")
  images: Count = 1024

  def __post_init__(self):
    check("task", self)
    if not 2 <= self.colours_per_step <= len(COLOURS):
      raise UserError(f"task.colours_per_step={self.colours_per_step} is outside [2, 12]")

  @property
  def batch(self) -> int:
    """Images per step."""
    return 2 * self.names


@dataclasses.dataclass(frozen=True)
class ClipConfig(Config):
  """Keys of the `task` group for `emoji_clip`.

  Attributes:
    width, text_layers, layers, patch: of the two transformers; pixels per side of an image patch.
  """
  latent_noise: NonNegative = 1.0
  width: Count = 128
  text_layers: Count = 2
  layers: Count = 3
  patch: Count = 4

  def model(self, tokenizer: Tokenizer, size: int) -> dict:
    """The asset's own config of its network."""
    return towers(self, tokenizer, size)


def towers(cfg, tokenizer: Tokenizer, size: int) -> dict:
  """Config of CLIP's two towers, of which `cfg` has `width`, `text_layers`, `layers`, `patch`."""
  tower = dict(hidden_size=cfg.width, intermediate_size=3 * cfg.width, num_attention_heads=4,
               projection_dim=cfg.width)
  return {
      "text_config": tower | dict(
          num_hidden_layers=cfg.text_layers, vocab_size=tokenizer.vocab_size,
          eos_token_id=tokenizer.eos_id, max_position_embeddings=tokenizer.length),
      "vision_config": tower | dict(
          num_hidden_layers=cfg.layers, image_size=size, patch_size=cfg.patch)}


@dataclasses.dataclass(frozen=True)
class JudgeConfig(Config):
  """Keys of the `task` group for `emoji_judge`.

  Attributes:
    dim: of the features. widths: channels per resolution. text_width: of the token embeddings.
  """
  dim: Count = 64
  widths: tuple[int, ...] = (32, 64, 128)
  text_width: Count = 128

  def model(self, tokenizer: Tokenizer, size: int) -> dict:
    """The asset's own config of its network."""
    del size
    return {"dim": self.dim, "widths": list(self.widths), "text_width": self.text_width,
            "vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_id}


class Batch(NamedTuple):
  """Images with their captions: `[B]` int32 name, colour, vendor, style; `[B, L]` token ids."""
  images: jax.Array
  tokens: jax.Array
  name: jax.Array
  colour: jax.Array
  vendor: jax.Array
  style: jax.Array


def draw_batch(tables: Tables, key, *, names: int, colours_per_step: int,
               style_fraction: float) -> Batch:
  """A step's images: `names` names by two vendors, each vendor's on another background."""
  k_name, k_subset, k_colour, k_style, k_image = jax.random.split(key, 5)
  count, colours = tables.trained.shape
  name = jax.random.choice(k_name, count, (names,), replace=count < names)
  subset = jax.random.permutation(k_subset, colours) < colours_per_step
  # A name whose colours of this step are held out falls back to its others.
  preference = jnp.where(subset[None], 0.0, -50.0) + jnp.where(tables.trained[name], 0.0, -1e9)
  gumbel = jax.random.gumbel(k_colour, (names, colours))
  colour = jax.lax.top_k(preference + gumbel, 2)[1]  # two different ones

  name, colour = jnp.repeat(name, 2), colour.reshape(-1)
  vendor = jnp.tile(jnp.arange(2), names)
  style = jnp.where(jax.random.uniform(k_style, vendor.shape) < style_fraction, vendor, NO_STYLE)
  images = augment(tables.rgba[vendor, name], jnp.asarray(RGB)[colour], k_image)
  return Batch(images, tables.tokens[name, colour, style], tables.same_name[name], colour, vendor,
               style)


# --- training -----------------------------------------------------------------------------------


def through_latents(vae, params, images, most: float, key):
  """Images decoded from noisy latents.

  Args:
    images: `[B, H, W, 3]` in [0, 1]. most: standard deviations are uniform in [0, most], in latent
      units, where those of the data have standard deviation 1.
  """
  k_size, k_noise = jax.random.split(key)
  latents = encode_images(vae, params, images)
  sizes = jax.random.uniform(k_size, (len(images), 1, 1, 1), maxval=most)
  return decode_images(vae, params, latents + sizes * jax.random.normal(k_noise, latents.shape))


def contrastive_loss(image, text, scale, batch: Batch):
  """Symmetric InfoNCE; log B at initialisation.

  Args:
    image, text: `[B, D]` of length one. scale: inverse temperature, > 0.
  Returns:
    Scalar loss; share of captions `[]` in [0, 1] that score their own image best.
  """
  equal = lambda x: x[:, None] == x[None]
  true = equal(batch.name) & equal(batch.colour) & (
      (batch.style[None] == NO_STYLE) | (batch.vendor[:, None] == batch.style[None]))
  own = jnp.eye(len(image), dtype=bool)
  logits = jnp.where(true & ~own, -jnp.inf, scale * image @ text.T)
  nll = lambda logits: -jnp.diagonal(jax.nn.log_softmax(logits, axis=1)).mean()
  hit = (logits.argmax(0) == jnp.arange(len(image))).mean()
  return 0.5 * (nll(logits) + nll(logits.T)), hit


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
  drawings = load_drawings(cfg.drawings).of(cfg.categories)
  if not len(drawings.names):
    raise UserError(f"task.categories={cfg.categories}: {cfg.drawings} has none of them")
  tokenizer = Tokenizer.load(cfg.tokenizer)
  size = drawings.rgba.shape[2]
  model = cfg.model(tokenizer, size)
  module = SCORERS[name](model)
  vae = vae_params = None
  if cfg.latent_noise:
    vae, vae_params, _ = autoencoder.read(cfg.vae)
  tables = make_tables(drawings, tokenizer, vae_params)

  def init(key):
    net = module.init(key, jnp.zeros((1, size, size, 3)), tables.tokens[0, 0, :1])["params"]
    return {"net": net, "log_scale": jnp.float32(np.log(10.0))}

  def draw(tables, key):
    batch = draw_batch(tables, key, names=cfg.names, colours_per_step=cfg.colours_per_step,
                       style_fraction=cfg.style_fraction)
    if cfg.latent_noise:
      half = len(batch.images) // 2      # of the names, which come in random order
      noisy = through_latents(vae, tables.vae, jax.lax.optimization_barrier(batch.images[:half]),
                              cfg.latent_noise, jax.random.fold_in(key, 1))
      batch = batch._replace(images=batch.images.at[:half].set(noisy))
    return batch

  def loss(params, batch):
    image, text, *style = module.apply({"params": params["net"]}, batch.images, batch.tokens)
    scale = jnp.minimum(jnp.exp(params["log_scale"]), cfg.max_logit_scale)
    loss, hit = contrastive_loss(image, text, scale, batch)
    metrics = {"train/contrastive": loss, "train/accuracy": hit, "train/scale": scale}
    if style:  # the judge's second head
      style_loss = optax.softmax_cross_entropy_with_integer_labels(style[0], batch.vendor).mean()
      metrics["train/style"] = style_loss
      loss = loss + style_loss
    return loss, metrics | {"train/loss": loss}

  def look(params, thorough):
    if not thorough:
      return Look({})
    figures = evaluate({name: (module, as_stored(params["net"]))}, tables, cfg.images)[name]
    return Look({f"eval/{key}": value for key, value in figures.items()})

  def save(params, folder: pathlib.Path, record) -> None:
    save_scorer(folder, described(name, model, cfg, record), params["net"], tokenizer)

  return Task(init, tables, draw, loss, look, save)


emoji_clip, emoji_judge = (Kind(config, functools.partial(make, name)) for name, config in (
    ("emoji_clip", ClipConfig), ("emoji_judge", JudgeConfig)))
