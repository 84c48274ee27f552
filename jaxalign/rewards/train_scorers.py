"""Trains the embedded scorers.

`python -m jaxalign.rewards.train_scorers --config=configs/pretrain_emoji_scorers.py
--data=DIR/emoji.npz --output=DIR` writes the assets `emoji_clip/` and `emoji_judge/` with their
measured figures into the output folder; `training/` beside them holds logs and checkpoints. The
same command again resumes.

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
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jaxalign import rng
from jaxalign.convert import load_pipeline
from jaxalign.data import emoji
from jaxalign.errors import UserError
from jaxalign.models.tokenizer import Tokenizer
from jaxalign.models.vae import AutoencoderKL, decode_images, encode_images
from jaxalign.rewards.emoji import ASSETS, SCORERS, save_scorer

NO_STYLE = 2  # third column of the caption table; 0 and 1 name the vendor's style
PALETTE = np.stack([emoji.colour_rgb(c) for c in emoji.COLOURS])


class Tables(NamedTuple):
  """All a step draws from, on the device. N names, 12 colours.

  rgba: `[2, N, S, S, 4]` uint8. tokens: `[N, 12, 3, L]` int32, the last index before L is the style
  or `NO_STYLE`. trained: `[N, 12]` bool, pairs that are not held out. same_name: `[N]` int32, equal
  for equal names.
  """
  rgba: jax.Array
  tokens: jax.Array
  trained: jax.Array
  same_name: jax.Array


class Batch(NamedTuple):
  """Images with their captions: `[B]` int32 name, colour, vendor, style; `[B, L]` token ids."""
  images: jax.Array
  tokens: jax.Array
  name: jax.Array
  colour: jax.Array
  vendor: jax.Array
  style: jax.Array


def make_tables(drawings: emoji.Drawings, tokenizer: Tokenizer) -> Tables:
  """The tables of all drawings."""
  captions = [emoji.caption(name, colour, style) for name in drawings.names
              for colour in emoji.COLOURS for style in (*emoji.STYLES, None)]
  tokens = tokenizer(captions)
  longest = int((tokens == tokenizer.eos_id).argmax(1).max()) + 1  # the rest is padding in all rows
  tokens = tokens[:, :longest].reshape(
      len(drawings.names), len(emoji.COLOURS), NO_STYLE + 1, longest)
  trained = [[not emoji.held_out(name, colour) for colour in emoji.COLOURS]
             for name in drawings.names]
  same_name = np.unique(drawings.names, return_inverse=True)[1].astype(np.int32)
  return Tables(*map(jnp.asarray, (drawings.rgba, tokens, np.array(trained), same_name)))


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
  images = augment(tables.rgba[vendor, name], jnp.asarray(PALETTE)[colour], k_image)
  return Batch(images, tables.tokens[name, colour, style], tables.same_name[name], colour, vendor,
               style)


# --- training -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Autoencoder:
  """The embedded model's, for noise in its latents."""
  vae: AutoencoderKL
  params: Any

  @classmethod
  def load(cls) -> "Autoencoder":
    pipeline = load_pipeline(ASSETS / "emoji")
    return cls(pipeline.vae, pipeline.params["vae"])


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


def make_step(module, tables: Tables, cfg, data_cfg, optim_cfg, autoencoder=None):
  """`(init, step)`: `init(key) -> state` and `step(state, key, tables) -> state, metrics` jitted.

  `autoencoder` is needed where `cfg.latent_noise` is above 0.

  The state holds `params` (`net` and `log_scale`), their average `ema`, `opt` and `step`.
  """
  optimiser = optax.chain(
      optax.clip_by_global_norm(optim_cfg.clip),
      optax.adamw(
          optax.warmup_cosine_decay_schedule(
              0.0, cfg.lr, max(1, int(optim_cfg.warmup * cfg.steps)), cfg.steps),
          b2=0.98, weight_decay=optim_cfg.weight_decay,
          mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)))
  draw = functools.partial(draw_batch, names=cfg.names, **data_cfg)

  def loss_fn(params, batch):
    image, text, *style = module.apply({"params": params["net"]}, batch.images, batch.tokens)
    scale = jnp.minimum(jnp.exp(params["log_scale"]), cfg.max_logit_scale)
    loss, hit = contrastive_loss(image, text, scale, batch)
    metrics = {"train/contrastive": loss, "train/accuracy": hit, "train/scale": scale}
    if style:  # the judge's second head
      style_loss = optax.softmax_cross_entropy_with_integer_labels(style[0], batch.vendor).mean()
      metrics["train/style"] = style_loss
      loss = loss + style_loss
    return loss, metrics | {"train/loss": loss}

  def init(key):
    size = tables.rgba.shape[2]
    net = module.init(key, jnp.zeros((1, size, size, 3)), tables.tokens[0, 0, :1])["params"]
    params = {"net": net, "log_scale": jnp.float32(np.log(10.0))}
    return {"params": params, "ema": net, "opt": optimiser.init(params), "step": jnp.int32(0)}

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, key, tables):
    # The barrier keeps XLA from redoing the augmentation inside the network's own loops.
    batch = draw(tables, key)
    if cfg.latent_noise:
      half = len(batch.images) // 2      # of the names, which come in random order
      noisy = through_latents(autoencoder.vae, autoencoder.params, batch.images[:half],
                              cfg.latent_noise, jax.random.fold_in(key, 1))
      batch = batch._replace(images=batch.images.at[:half].set(noisy))
    batch = jax.lax.optimization_barrier(batch)
    grads, metrics = jax.grad(loss_fn, has_aux=True)(state["params"], batch)
    updates, opt = optimiser.update(grads, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    decay = jnp.minimum(0.995, (1.0 + state["step"]) / (10.0 + state["step"]))
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state["ema"], params["net"])
    return {"params": params, "ema": ema, "opt": opt, "step": state["step"] + 1}, metrics

  return jax.jit(init), step  # jitted, so that no two leaves share a donated buffer


def _save(file: pathlib.Path, state) -> None:
  """Atomic: a killed run finds either the old checkpoint or the new one."""
  partial = file.with_suffix(".partial")
  partial.write_bytes(flax.serialization.to_bytes(state))
  os.replace(partial, file)


def train(name: str, config, tables: Tables, tokenizer: Tokenizer, folder: pathlib.Path):
  """Trains one scorer, or goes on with the one whose log and checkpoint are in `folder`.

  Returns:
    The asset's `config.json`, and the averaged parameters rounded to f16.
  """
  cfg = config[name]
  run = {"scorer": name, "cfg": cfg.to_dict(), "data": config.data.to_dict(),
         "optim": config.optim.to_dict()}
  folder.mkdir(parents=True, exist_ok=True)
  identity, checkpoint, log = (folder / f for f in ("run.json", "state.msgpack", "metrics.jsonl"))
  run = json.loads(json.dumps(run))
  if identity.exists() and json.loads(identity.read_text()) != run:
    raise UserError(f"--output: {folder} belongs to another config; name another folder")
  identity.write_text(json.dumps(run, indent=2) + "\n")

  model = cfg.model.to_dict()
  text = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_id}
  if name == "emoji_clip":
    model["text_config"] |= text | {"max_position_embeddings": tokenizer.length}
  else:
    model |= text
  module = SCORERS[name](model)
  data_cfg = {k: v for k, v in config.data.items() if k != "categories"}
  autoencoder = Autoencoder.load() if cfg.latent_noise else None
  init, step = make_step(module, tables, cfg, data_cfg, config.optim, autoencoder)
  root = jax.random.key(cfg.seed)
  state = init(rng.stream(root, rng.INIT))
  if checkpoint.exists():
    state = jax.device_put(flax.serialization.from_bytes(state, checkpoint.read_bytes()))
  start = int(state["step"])
  lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
  lines = [line for line in lines if line["step"] <= start]
  before = lines[-1]["seconds"] if lines else 0.0
  log.write_text("".join(json.dumps(line) + "\n" for line in lines))

  began = time.monotonic()
  bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc=name, mininterval=1)
  with log.open("a", buffering=1) as out:
    for i in bar:
      state, metrics = step(state, rng.stream(root, rng.PROMPTS, i), tables)
      done = i + 1
      if done % config.train.log_every == 0 or done == cfg.steps:
        line = {"step": done, "seconds": round(before + time.monotonic() - began, 1),
                **{k: round(float(v), 5) for k, v in metrics.items()}}
        if not np.isfinite(line["train/loss"]):
          raise FloatingPointError(f"{name}: loss is {line['train/loss']} at step {done}")
        out.write(json.dumps(line) + "\n")
        bar.set_postfix(loss=line["train/loss"], accuracy=line["train/accuracy"])
      if done % config.train.save_every == 0 or done == cfg.steps:
        _save(checkpoint, state)
  asset = {"name": name, "model": model,
           "training": run | {"seconds": round(before + time.monotonic() - began)}}
  rounded = lambda leaf: np.asarray(leaf).astype(np.float16).astype(np.float32)
  return asset, jax.tree.map(rounded, state["ema"])


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

  Args:
    scorers: module and parameters by name; images: number of images for each figure.
  """
  key = rng.stream(jax.random.key(0), rng.EVAL)
  count = tables.tokens.shape[0]
  rand = np.random.default_rng(0)
  figures, margins = {name: {} for name in scorers}, {name: [] for name in scorers}
  trained, same = np.asarray(tables.trained), np.asarray(tables.same_name)
  for split in ("seen", "held_out"):
    pairs = np.argwhere(trained == (split == "seen"))
    name, colour = pairs[rand.integers(len(pairs), size=images)].T
    vendor = rand.integers(2, size=images)
    sharp = augment(tables.rgba[vendor, name], jnp.asarray(PALETTE)[colour], key)
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
    for out in figures.values():
      out["margin_correlation"] = round(float(np.corrcoef(a, b)[0, 1]), 4)
  return figures


def _apply_in_parts(module, params, method: str, x, size=512):
  run = jax.jit(lambda params, x: module.apply({"params": params}, x, method=method))
  return np.concatenate([run(params, x[i:i + size]) for i in range(0, len(x), size)])


def main(config, data: str, tokenizer_dir: str, output: str) -> None:
  """Trains and measures both scorers and writes their assets."""
  output = pathlib.Path(output)
  drawings = emoji.load(data).of(config.data.categories)
  tokenizer = Tokenizer.load(tokenizer_dir)
  tables = make_tables(drawings, tokenizer)
  print(f"{len(drawings.names)} names by {len(emoji.STYLES)} vendors")
  trained = {name: train(name, config, tables, tokenizer, output / "training" / name)
             for name in SCORERS}
  scorers = {name: (SCORERS[name](asset["model"]), params)
             for name, (asset, params) in trained.items()}
  for name, figures in evaluate(scorers, tables, config.eval.images).items():
    asset, params = trained[name]
    save_scorer(output / name, asset | {"figures": figures}, params, tokenizer)
    print(name, json.dumps(figures, indent=2))


if __name__ == "__main__":
  from absl import app, flags
  from ml_collections import config_flags

  CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
  DATA = flags.DEFINE_string("data", None, "drawings, from jaxalign.data.emoji", required=True)
  TOKENIZER = flags.DEFINE_string("tokenizer", str(ASSETS / "emoji_clip"), "tokenizer folder")
  OUTPUT = flags.DEFINE_string("output", None, "folder for both scorers", required=True)
  flags.mark_flag_as_required("config")

  def run(_):
    try:
      main(CONFIG.value, DATA.value, TOKENIZER.value, OUTPUT.value)
    except UserError as error:
      print(f"error: {error}", file=sys.stderr)
      sys.exit(2)

  app.run(run)
