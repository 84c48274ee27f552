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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.config.fields import Count, Fraction, NonNegative, check
from jaxalign.data import emoji
from jaxalign.devices import rng
from jaxalign.errors import UserError
from jaxalign.models.tokenizer import Tokenizer
from jaxalign.models.vae import decode_images, encode_images
from jaxalign.pretrain import Look, Task, autoencoder
from jaxalign.pretrain.denoiser import NO_STYLE, caption_tokens
from jaxalign.rewards.emoji import ASSETS, SCORERS, save_scorer


@dataclasses.dataclass(frozen=True)
class Config:
  """Keys of the `task` group that both scorers share.

  Attributes:
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
    if not 2 <= self.colours_per_step <= len(emoji.COLOURS):
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
    tower = dict(hidden_size=self.width, intermediate_size=3 * self.width, num_attention_heads=4,
                 projection_dim=self.width)
    return {
        "text_config": tower | dict(
            num_hidden_layers=self.text_layers, vocab_size=tokenizer.vocab_size,
            eos_token_id=tokenizer.eos_id, max_position_embeddings=tokenizer.length),
        "vision_config": tower | dict(
            num_hidden_layers=self.layers, image_size=size, patch_size=self.patch)}


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


class Batch(NamedTuple):
  """Images with their captions: `[B]` int32 name, colour, vendor, style; `[B, L]` token ids."""
  images: jax.Array
  tokens: jax.Array
  name: jax.Array
  colour: jax.Array
  vendor: jax.Array
  style: jax.Array


def module_of(folder: pathlib.Path):
  """The network of the asset in `folder`, without its weights."""
  config = json.loads((folder / "config.json").read_text())
  return SCORERS[config["name"]](config["model"])


def make_tables(drawings: emoji.Drawings, tokenizer: Tokenizer, vae=None) -> Tables:
  """The tables of all drawings."""
  tokens = caption_tokens(drawings, tokenizer)
  longest = int((tokens == tokenizer.eos_id).argmax(-1).max()) + 1  # the rest is padding everywhere
  trained = [[not emoji.held_out(str(name), colour) for colour in emoji.COLOURS]
             for name in drawings.names]
  same_name = np.unique(drawings.names, return_inverse=True)[1].astype(np.int32)
  return Tables(drawings.rgba, tokens[..., :longest], np.array(trained), same_name, vae)


# --- images -------------------------------------------------------------------------------------


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
  images = augment(tables.rgba[vendor, name], jnp.asarray(autoencoder.PALETTE)[colour], k_image)
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


class Kind(NamedTuple):
  """What the registry needs of a scorer."""
  Config: type
  make: Callable


def make(name: str, cfg: Config, drawings: emoji.Drawings) -> Task:
  """The scorer `name` for these drawings as a Task; parameters are `net` and `log_scale`."""
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
    # As the asset will be: rounded to the precision that it is stored in.
    rounded = jax.tree.map(lambda a: np.asarray(a, np.float16).astype(np.float32), params["net"])
    figures = evaluate({name: (module, rounded)}, tables, cfg.images)[name]
    return Look({f"eval/{key}": value for key, value in figures.items()})

  def save(params, folder: pathlib.Path, record) -> None:
    figures = {key.removeprefix("eval/"): value for key, value in record["figures"].items()}
    asset = {"name": name, "model": model, "training": {
        "task": json.loads(json.dumps(dataclasses.asdict(cfg))),
        "steps": record["steps"], "seconds": record["seconds"]}, "figures": figures}
    save_scorer(folder, asset, params["net"], tokenizer)

  return Task(init, tables, draw, loss, look, save)


emoji_clip, emoji_judge = (Kind(config, functools.partial(make, name)) for name, config in (
    ("emoji_clip", ClipConfig), ("emoji_judge", JudgeConfig)))


# --- evaluation ---------------------------------------------------------------------------------


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
    sharp = augment(tables.rgba[vendor, name], jnp.asarray(autoencoder.PALETTE)[colour], key)
    blur = _blur_matrix(jnp.full(images, 1.5 * sharp.shape[1] / 32), sharp.shape[1])
    soft = jnp.einsum("bkj,bljc->blkc", blur, jnp.einsum("bij,bjkc->bikc", blur, sharp))

    # [images, 19] wrong captions by name and by colour
    wrong_name = rand.integers(count, size=(images, 19))
    wrong_name = np.where(same[wrong_name] == same[name][:, None], (wrong_name + 1) % count,
                          wrong_name)
    wrong_colour = rand.integers(len(emoji.COLOURS), size=(images, 19))
    for scorer_name, (module, params) in scorers.items():
      embed = functools.partial(_apply_in_parts, module, params)
      text = embed("embed_text", tables.tokens[:, :, NO_STYLE].reshape(-1, tables.tokens.shape[-1]))
      text = text.reshape(count, len(emoji.COLOURS), -1)
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
