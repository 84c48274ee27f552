"""The denoiser: UNet and text encoder together, on latents of all drawings.

  z, c ~ drawings on plain backgrounds and their captions; t uniform; e ~ N(0, 1)
  L = mean (e - unet(sqrt(abar_t) z + sqrt(1 - abar_t) e, t, text(c)))^2

A tenth of the captions is left empty, for guidance. Ho et al. 2020 (arXiv 2006.11239), equation 14;
Rombach et al. 2022 (arXiv 2112.10752).
"""
import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxalign.config.fields import Count, Fraction, check
from jaxalign.convert import load_pipeline, save_pipeline
from jaxalign.emoji import drawings as emoji
from jaxalign.emoji import quality
from jaxalign.emoji.scorers import ASSETS
from jaxalign.errors import UserError
from jaxalign.models.pipeline import Pipeline
from jaxalign.models.tokenizer import Tokenizer
from jaxalign.models.vae import encode_images
from jaxalign.pretrain import Look, Task, autoencoder
from jaxalign.sampling import Schedule


@dataclasses.dataclass(frozen=True)
class Config:
  """Keys of the `task` group.

  Attributes:
    vae: folder of the autoencoder, as `configs/pretrain_emoji_vae.py` writes it.
    tokenizer: folder of the tokenizer; the embedded model's by default.
    init: model whose UNet and text encoder training starts from, a diffusers directory or
      "jaxalign:emoji"; empty for new weights.
    widths: channels per resolution of the UNet.
    text_width, text_layers: of the text encoder.
    batch: drawings per step.
    style_fraction: share in [0, 1) of captions that name the vendor's style.
    caption_dropout: share in [0, 1) of captions left empty.
  """
  vae: str = "runs/pretrain_emoji_vae-emoji/export"
  tokenizer: str = str(ASSETS / "emoji" / "tokenizer")
  init: str = ""
  widths: tuple[int, ...] = (64, 128)
  text_width: Count = 128
  text_layers: Count = 3
  batch: Count = 64
  style_fraction: Fraction = 0.25
  caption_dropout: Fraction = 0.1

  def __post_init__(self):
    check("task", self)
    if not self.widths or any(width % 32 for width in self.widths):
      raise UserError(f"task.widths={self.widths}: widths are multiples of 32")
    if self.text_width % 4:
      raise UserError(f"task.text_width={self.text_width} is no multiple of its 4 heads")


def model_configs(cfg: Config, tokenizer: Tokenizer, vae: dict) -> dict[str, dict]:
  """The JSON files of the model in diffusers' words; `vae` is the autoencoder's own."""
  levels, absent = len(cfg.widths), [None, None]
  return {
      "model_index": {
          "_class_name": "StableDiffusionPipeline", "feature_extractor": absent,
          "image_encoder": absent, "safety_checker": absent, "requires_safety_checker": False,
          "scheduler": ["diffusers", "DDIMScheduler"], "vae": ["diffusers", "AutoencoderKL"],
          "text_encoder": ["transformers", "CLIPTextModel"],
          "tokenizer": ["transformers", "CLIPTokenizer"],
          "unet": ["diffusers", "UNet2DConditionModel"],
      },
      "scheduler": {
          "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
          "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "clip_sample": False,
          "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "epsilon",
          "timestep_spacing": "leading", "trained_betas": None,
      },
      "unet": {
          "_class_name": "UNet2DConditionModel",
          "sample_size": vae["sample_size"] // 2 ** (len(vae["block_out_channels"]) - 1),
          "in_channels": vae["latent_channels"], "out_channels": vae["latent_channels"],
          "block_out_channels": list(cfg.widths), "layers_per_block": 1,
          "down_block_types": ["CrossAttnDownBlock2D"] * levels,
          "up_block_types": ["CrossAttnUpBlock2D"] * levels,
          "cross_attention_dim": cfg.text_width, "attention_head_dim": 4,
      },
      "vae": vae,
      "text_encoder": {
          "architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
          "hidden_size": cfg.text_width, "intermediate_size": 2 * cfg.text_width,
          "num_hidden_layers": cfg.text_layers, "num_attention_heads": 4,
          "max_position_embeddings": tokenizer.length, "vocab_size": tokenizer.vocab_size,
          "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id,
          "pad_token_id": tokenizer.pad_id, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
          "projection_dim": 512,
      },
  }


def all_latents(vae, params, rgba) -> np.ndarray:
  """Scaled latents `[2 mirrored, 2, N, 12, h, w, c]` f32 of all drawings on all colours."""
  count = rgba.shape[1]
  encode = jax.jit(functools.partial(encode_images, vae))
  parts = []
  with tqdm(total=2 * 2 * count, desc="encoding drawings", unit="drawing", leave=False) as bar:
    for flip in (1, -1):
      for vendor in range(2):
        for i in range(count):
          image = rgba[vendor, i, None, :, ::flip].astype(np.float32) / 255
          parts.append(np.asarray(encode(
              params, emoji.composite(image, emoji.RGB).astype(np.float32))))
          bar.update()
  return np.stack(parts).reshape(2, 2, count, *parts[0].shape)


def make(cfg: Config, drawings: emoji.Drawings) -> Task:
  """UNet and text encoder for these drawings as a Task; its parameters are `{"unet", "text"}`."""
  vae, vae_params, vae_config = autoencoder.read(cfg.vae)
  tokenizer = Tokenizer.load(cfg.tokenizer)
  pipeline = Pipeline.build(
      model_configs(cfg, tokenizer, vae_config), {"tokenizer": tokenizer}, {})
  pipeline = dataclasses.replace(pipeline, params={"vae": vae_params})
  schedule = Schedule.from_config(pipeline.scheduler_config)
  steps = len(schedule.times)

  def init(key):
    if cfg.init:
      start = load_pipeline(ASSETS / "emoji" if cfg.init == "jaxalign:emoji" else cfg.init).params
      return jax.tree.map(jnp.asarray, {"unet": start["unet"], "text": start["text_encoder"]})
    k_unet, k_text = jax.random.split(key)
    unet = pipeline.denoiser.init(k_unet, *pipeline.denoiser.example_inputs())["params"]
    # A network that starts by predicting nothing learns sooner.
    unet = {**unet, "conv_out": jax.tree.map(jnp.zeros_like, unet["conv_out"])}
    return {"unet": unet, "text": pipeline.networks["text_encoder"].init(
        k_text, jnp.zeros((1, 2), jnp.int32))["params"]}

  trained = np.array([[not emoji.held_out(str(name), colour) for colour in emoji.COLOURS]
                      for name in drawings.names])
  tables = {"latents": all_latents(vae, vae_params, drawings.rgba),
            "tokens": emoji.caption_tokens(drawings, tokenizer), "empty": tokenizer([""]),
            "pairs": np.argwhere(trained).astype(np.int32)}

  def draw(tables, key):
    b, pairs = cfg.batch, tables["pairs"]
    k_pair, k_vendor, k_flip, k_style, k_drop, k_time, k_noise = jax.random.split(key, 7)
    name, colour = pairs[jax.random.randint(k_pair, (b,), 0, len(pairs))].T
    vendor = jax.random.randint(k_vendor, (b,), 0, 2)
    flip = jax.random.randint(k_flip, (b,), 0, 2)
    named = jax.random.uniform(k_style, (b,)) < cfg.style_fraction
    style = jnp.where(named, vendor, emoji.NO_STYLE)
    empty = jax.random.uniform(k_drop, (b, 1)) < cfg.caption_dropout
    latents = tables["latents"][flip, vendor, name, colour]
    # Evenly spread over time: a batch with few noisy images does not upset the next one's loss.
    t = (jnp.arange(b) + jax.random.uniform(k_time, (b,))) * (steps / b)
    return {"latents": latents, "noise": jax.random.normal(k_noise, latents.shape),
            "t": t.astype(jnp.int32),
            "tokens": jnp.where(empty, tables["empty"], tables["tokens"][name, colour, style])}

  def loss(params, batch):
    noise, t = batch["noise"], batch["t"]
    x_t = schedule.add_noise(batch["latents"], noise, t)
    cond = pipeline.encode_prompts({"text_encoder": params["text"]},
                                   {"text_encoder": batch["tokens"]})
    gap = pipeline.denoise({"params": params["unet"]}, x_t, t, cond) - noise
    each = jnp.square(gap).mean((1, 2, 3))
    clean = (t < steps // 3).astype(jnp.float32)
    return each.mean(), {"train/loss": each.mean(),
                         "train/error_clean": (clean * each).sum() / clean.sum(),
                         "train/error_noisy": ((1 - clean) * each).sum() / (1 - clean).sum()}

  whole = lambda params: dataclasses.replace(pipeline, params={
      "vae": vae_params, "unet": params["unet"], "text_encoder": params["text"]})

  def look(params, thorough):
    figures, images, captions = quality.measure(whole(params), drawings, 512 if thorough else 128)
    grid = images[:32].reshape(8, 4, *images.shape[1:])
    rows = tuple("; ".join(c.removeprefix("a ").replace(" background", "") for c in row)
                 for row in np.reshape(captions[:32], (8, 4)))
    return Look({f"eval/{name}": value["mean"] for name, value in figures.items()}, grid, rows)

  def save(params, folder: pathlib.Path, record) -> None:
    del record
    save_pipeline(whole(params), folder, dtype="float16")

  return Task(init, tables, draw, loss, look, save)
