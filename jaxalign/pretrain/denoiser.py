"""Denoisers: network and text encoders together, on the fixed latents of pictures that are drawn.

  z, c ~ pictures and their captions; t as the schedule trains; e ~ N(0, 1)
  x_t = alpha_t z + sigma_t e
  L = mean (target(z, e, t) - network(x_t, t, text(c)))^2

The target is the velocity, of a variance-preserving path or of a flow, which is of equal size at
all times: what is settled early, a picture's colour and layout, is learnt as well as the rest. A
tenth of the captions is left empty, for guidance. Salimans & Ho 2022 (arXiv 2202.00512), appendix
D; Esser et al. 2024 (arXiv 2403.03206), section 3.1.
"""
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.config.fields import Count, Fraction, check
from jaxalign.convert import load_pipeline, save_pipeline
from jaxalign.emoji import latents, quality
from jaxalign.errors import UserError
from jaxalign.models.pipeline import Pipeline
from jaxalign.models.tokenizer import Tokenizer
from jaxalign.pretrain import Task, autoencoder, layouts
from jaxalign.sampling import Schedule


@dataclasses.dataclass(frozen=True)
class Config:
  """Keys of the `task` group that all denoisers share.

  Attributes:
    vae: folder of the autoencoder, as `configs/pretrain_emoji_vae.py` writes it; it draws what is
      looked at and is saved with the model, and has no part in training.
    init: diffusers directory of a model whose network and text encoders training starts from; empty
      for new weights.
    text_width, text_layers: of the (first) text encoder.
    batch: pictures per step.
    caption_dropout: share in [0, 1) of captions left empty.
  """
  vae: str = "runs/pretrain_emoji_vae-emoji/export"
  init: str = ""
  text_width: Count = 128
  text_layers: Count = 3
  batch: Count = 64
  caption_dropout: Fraction = 0.1

  def __post_init__(self):
    check("task", self)
    if self.text_width % 4:
      raise UserError(f"task.text_width={self.text_width} is no multiple of its 4 heads")


@dataclasses.dataclass(frozen=True)
class UNet:
  """Keys of the `task` group for a model in Stable Diffusion's layout.

  Attributes:
    widths: channels per resolution of the UNet.
  """
  widths: tuple[int, ...] = (64, 128)

  def layout(self, tokenizer: Tokenizer, vae: dict) -> dict[str, dict]:
    """The model's JSON files."""
    if not self.widths or any(width % 32 for width in self.widths):
      raise UserError(f"task.widths={self.widths}: widths are multiples of 32")
    return layouts.stable_diffusion(tokenizer, vae, widths=self.widths,
                                    text_width=self.text_width, text_layers=self.text_layers)


@dataclasses.dataclass(frozen=True)
class Transformer:
  """Keys of the `task` group for a model in Stable Diffusion 3's layout.

  Attributes:
    width: features of a token, a multiple of 32. layers: blocks. dual: of these, from the first,
      those with a second attention of the picture alone. patch: latents per side of a token.
  """
  width: Count = 192
  layers: Count = 6
  dual: int = 1
  patch: Count = 2

  def layout(self, tokenizer: Tokenizer, vae: dict) -> dict[str, dict]:
    """The model's JSON files."""
    if self.width % 32:
      raise UserError(f"task.width={self.width} is no multiple of 32")
    if self.text_layers < 2:
      raise UserError(f"task.text_layers={self.text_layers}: the states before the last layer are "
                      "read, so there are two or more")
    if not 0 <= self.dual <= self.layers:
      raise UserError(f"task.dual={self.dual}: 0 to task.layers={self.layers}")
    return layouts.stable_diffusion_3(
        tokenizer, vae, width=self.width, layers=self.layers, dual=self.dual, patch=self.patch,
        text_width=self.text_width, text_layers=self.text_layers)


class Content(NamedTuple):
  """What a denoiser learns to draw.

  Attributes:
    tokenizer: of its captions.
    tables: tree of arrays.
    draw: `(tables, key, batch) -> pictures [B, S, S, 3], tokens [B, L]`.
    look: `(paint, each) -> Look`, where `paint(captions)` gives `[B, S, S, 3]` in [0, 1], and
      `each` captions of a kind are asked for.
  """
  tokenizer: Tokenizer
  tables: Any
  draw: Callable
  look: Callable


def make(cfg, content: Content) -> Task:
  """Network and text encoders as a Task; its parameters are those of a `Pipeline`, but the VAE."""
  _, vae_params, vae_config = autoencoder.read(cfg.vae)
  configs = cfg.layout(content.tokenizer, vae_config)
  pipeline = Pipeline.build(configs, {
      name: content.tokenizer for name, entry in configs["model_index"].items()
      if name.startswith("tokenizer") and entry[0]})
  trained = (pipeline.denoiser_name, *pipeline.text_encoders)
  schedule, fixed = Schedule.from_config(pipeline.scheduler_config), latents.load()
  empty = content.tokenizer([""])

  def init(key):
    if cfg.init:
      start = load_pipeline(cfg.init).params
      return {name: jax.tree.map(jnp.asarray, start[name]) for name in trained}
    keys = dict(zip(trained, jax.random.split(key, len(trained))))
    text = {name: pipeline.networks[name].init(keys[name], jnp.zeros((1, 2), jnp.int32))["params"]
            for name in pipeline.text_encoders}
    return {pipeline.denoiser_name: pipeline.init(keys[pipeline.denoiser_name]), **text}

  def draw(tables, key):
    k_picture, k_drop, k_time, k_noise = jax.random.split(key, 4)
    images, tokens = content.draw(tables, k_picture, cfg.batch)
    z = fixed.encode(images)
    dropped = jax.random.uniform(k_drop, (cfg.batch, 1)) < cfg.caption_dropout
    # Evenly spread over time: a batch with few noisy images does not upset the next one's loss.
    share = (jnp.arange(cfg.batch) + jax.random.uniform(k_time, (cfg.batch,))) / cfg.batch
    return {"latents": z, "noise": jax.random.normal(k_noise, z.shape),
            "t": schedule.quantile(share), "tokens": jnp.where(dropped, empty, tokens)}

  def loss(params, batch):
    z, noise, t = batch["latents"], batch["noise"], batch["t"]
    x_t = schedule.add_noise(z, noise, t)
    cond = pipeline.encode_prompts(params, dict.fromkeys(pipeline.text_encoders, batch["tokens"]))
    variables = {**pipeline.constants, "params": params[pipeline.denoiser_name]}
    gap = pipeline.denoise(variables, x_t, t, cond) - schedule.target(z, noise, t)
    each = jnp.square(gap).mean((1, 2, 3))
    clean = (t < 333).astype(jnp.float32)
    return each.mean(), {"train/loss": each.mean(),
                         "train/error_clean": (clean * each).sum() / clean.sum(),
                         "train/error_noisy": ((1 - clean) * each).sum() / (1 - clean).sum()}

  whole = lambda params: dataclasses.replace(pipeline, params={"vae": vae_params, **params})

  def look(params, thorough):
    return content.look(lambda captions: quality.draw(whole(params), captions),
                        64 if thorough else 16)

  def save(params, folder: pathlib.Path, record) -> None:
    del record
    save_pipeline(whole(params), folder, dtype="float16")

  return Task(init, content.tables, draw, loss, look, save)
