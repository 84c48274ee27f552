"""The denoiser: UNet and text encoder together, on the fixed latents of scenes.

  z, c ~ scenes and their captions; t uniform; e ~ N(0, 1)
  x_t = sqrt(abar_t) z + sqrt(1 - abar_t) e
  L = mean (sqrt(abar_t) e - sqrt(1 - abar_t) z - unet(x_t, t, text(c)))^2

Velocity in place of noise: of equal size at all times, and so well learnt where a picture's colour
and layout are settled. A tenth of the captions is left empty, for guidance. Salimans & Ho 2022
(arXiv 2202.00512), appendix D; Rombach et al. 2022 (arXiv 2112.10752).
"""
import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.config.fields import Count, Fraction, check
from jaxalign.convert import load_pipeline, save_pipeline
from jaxalign.emoji import artwork, latents, quality, reader, scenes, words
from jaxalign.emoji.artwork import STYLES
from jaxalign.errors import UserError
from jaxalign.models.pipeline import Pipeline
from jaxalign.models.tokenizer import Tokenizer
from jaxalign.pretrain import Look, Task, autoencoder
from jaxalign.sampling import Schedule

NO_STYLE = len(STYLES)     # second column of the caption's ends; those before name a style


@dataclasses.dataclass(frozen=True)
class Config:
  """Keys of the `task` group.

  Attributes:
    artwork: the file `artwork.npz` that `python -m jaxalign.emoji.artwork` writes.
    vae: folder of the autoencoder, as `configs/pretrain_emoji_vae.py` writes it; it draws what is
      looked at and is saved with the model, and has no part in training.
    init: diffusers directory of a model whose UNet and text encoder training starts from; empty for
      new weights.
    subjects: how many of `scenes.SUBJECTS`, from the first.
    widths: channels per resolution of the UNet.
    text_width, text_layers: of the text encoder.
    batch: scenes per step.
    style_fraction: share in [0, 1) of captions that name the style.
    caption_dropout: share in [0, 1) of captions left empty.
    single, several: shares in [0, 1) of scenes of one drawing and of two to four of a kind; the
      rest shows two subjects.
  """
  artwork: str = "runs/drawings/artwork.npz"
  vae: str = "runs/pretrain_emoji_vae-emoji/export"
  init: str = ""
  subjects: Count = len(scenes.SUBJECTS)
  widths: tuple[int, ...] = (64, 128)
  text_width: Count = 128
  text_layers: Count = 3
  batch: Count = 64
  style_fraction: Fraction = 0.5
  caption_dropout: Fraction = 0.1
  single: Fraction = 0.3
  several: Fraction = 0.3

  def __post_init__(self):
    check("task", self)
    if not self.widths or any(width % 32 for width in self.widths):
      raise UserError(f"task.widths={self.widths}: widths are multiples of 32")
    if self.text_width % 4:
      raise UserError(f"task.text_width={self.text_width} is no multiple of its 4 heads")
    if self.single + self.several >= 1:
      raise UserError(f"task.single={self.single} and task.several={self.several} leave nothing "
                      "for scenes of two subjects")


def model_configs(cfg: Config, tokenizer: Tokenizer, vae: dict) -> dict[str, dict]:
  """The JSON files of the model in diffusers' words; `vae` is the autoencoder's own.

  `beta_end` is larger than Stable Diffusion's, so that the last training step has all but forgotten
  a flat background: with 0.012 a fifteenth of its colour would be left, in each of 64 positions,
  and sampling starts from none.
  """
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
          "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.02,
          "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "clip_sample": False,
          "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction",
          "timestep_spacing": "trailing", "trained_betas": None,
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


class World(NamedTuple):
  """Subjects and their drawings, the scenes of training and those kept from it."""
  names: list[str]
  drawings: artwork.Artwork
  trained: scenes.Table
  held_out: scenes.Table


def world(file, subjects: int) -> World:
  """The first `subjects` of the world, out of the file of drawings."""
  if subjects > len(scenes.SUBJECTS):
    raise UserError(f"task.subjects={subjects}: there are {len(scenes.SUBJECTS)}")
  codes = list(scenes.SUBJECTS)[:subjects]
  drawings, names = artwork.load(file).of(codes), [scenes.SUBJECTS[code] for code in codes]
  return World(names, drawings, *world_of(drawings, names))


def world_of(drawings: artwork.Artwork, names) -> tuple[scenes.Table, scenes.Table]:
  """Scenes of training, and those whose subject and colour, subject and number, or pair is new.

  Which of the three depends on the kind of scene, and nothing else in it is new.
  """
  visible = scenes.contrast(drawings)
  new = lambda scene: scenes.held_out(scene) == (
      ("pair",) if scene.relation else ("number",) if scene.number > 1 else ("colour",))
  return scenes.table(names, visible), scenes.table(names, visible, new)


def make(cfg: Config) -> Task:
  """UNet and text encoder for these scenes as a Task; its parameters are `{"unet", "text"}`."""
  _, vae_params, vae_config = autoencoder.read(cfg.vae)
  tokenizer, fixed = words.tokenizer(), latents.load()
  pipeline = Pipeline.build(
      model_configs(cfg, tokenizer, vae_config), {"tokenizer": tokenizer}, {})
  schedule = Schedule.from_config(pipeline.scheduler_config)
  names, drawings, trained, held_out = world(cfg.artwork, cfg.subjects)
  shares = (cfg.single, cfg.several, 1 - cfg.single - cfg.several)
  steps = len(schedule.times)

  def init(key):
    if cfg.init:
      start = load_pipeline(cfg.init).params
      return jax.tree.map(jnp.asarray, {"unet": start["unet"], "text": start["text_encoder"]})
    k_unet, k_text = jax.random.split(key)
    unet = pipeline.denoiser.init(k_unet, *pipeline.denoiser.example_inputs())["params"]
    # A network that starts by predicting nothing learns sooner.
    unet = {**unet, "conv_out": jax.tree.map(jnp.zeros_like, unet["conv_out"])}
    return {"unet": unet, "text": pipeline.networks["text_encoder"].init(
        k_text, jnp.zeros((1, 2), jnp.int32))["params"]}

  tables: dict[str, Any] = {
      "sheets": scenes.Sheets.of(drawings), "scenes": trained,
      "captions": Captions.of(trained, names, tokenizer), "empty": tokenizer([""])}

  def draw(tables, key):
    b, table = cfg.batch, tables["scenes"]
    k_scene, k_style, k_drop, k_time, k_noise = jax.random.split(key, 5)
    drawn = scenes.draw(table, k_scene, b, shares)
    z = fixed.encode(scenes.render(tables["sheets"], table, drawn))
    said = jnp.where(jax.random.uniform(k_style, (b,)) < cfg.style_fraction, drawn.style, NO_STYLE)
    tokens = tables["captions"].tokens(drawn.row, drawn.colour, said, tokenizer.bos_id,
                                       tokenizer.length)
    dropped = jax.random.uniform(k_drop, (b, 1)) < cfg.caption_dropout
    # Evenly spread over time: a batch with few noisy images does not upset the next one's loss.
    t = (jnp.arange(b) + jax.random.uniform(k_time, (b,))) * (steps / b)
    return {"latents": z, "noise": jax.random.normal(k_noise, z.shape), "t": t.astype(jnp.int32),
            "tokens": jnp.where(dropped, tables["empty"], tokens)}

  def loss(params, batch):
    z, noise, t = batch["latents"], batch["noise"], batch["t"]
    x_t = schedule.add_noise(z, noise, t)
    cond = pipeline.encode_prompts({"text_encoder": params["text"]},
                                   {"text_encoder": batch["tokens"]})
    gap = pipeline.denoise({"params": params["unet"]}, x_t, t, cond) - schedule.target(z, noise, t)
    each = jnp.square(gap).mean((1, 2, 3))
    clean = (t < steps // 3).astype(jnp.float32)
    return each.mean(), {"train/loss": each.mean(),
                         "train/error_clean": (clean * each).sum() / clean.sum(),
                         "train/error_noisy": ((1 - clean) * each).sum() / (1 - clean).sum()}

  whole = lambda params: dataclasses.replace(pipeline, params={
      "vae": vae_params, "unet": params["unet"], "text_encoder": params["text"]})

  def look(params, thorough):
    each = 64 if thorough else 16
    asked = {kind: ask(table, names, each, np.random.default_rng(0))
             for kind, table in (("", trained), ("new_", held_out))}
    captions = [scenes.caption(scene) for part in asked.values() for scene in part]
    images = quality.draw(whole(params), captions)
    readings = reader.Reader(drawings, names)(images)
    figures, start = {}, 0
    for prefix, part in asked.items():
      found = scores(part, readings[start:start + len(part)])
      figures |= {f"eval/{prefix}{name}": value for name, value in found.items()}
      start += len(part)
    starts = range(0, len(captions), each // 2)             # two rows of each kind
    grid = np.stack([images[i:i + 4] for i in starts])
    rows = tuple("; ".join(caption.replace(" background", "") for caption in captions[i:i + 4])
                 for i in starts)
    return Look(figures, grid, rows)

  def save(params, folder: pathlib.Path, record) -> None:
    del record
    save_pipeline(whole(params), folder, dtype="float16")

  return Task(init, tables, draw, loss, look, save)


def ask(table: scenes.Table, names, each: int, generator) -> list[scenes.Scene]:
  """`3 each` scenes to ask for: single, several and two, half of them with a style."""
  out = []
  for start, end in zip(table.starts[:-1], table.starts[1:]):
    for i, row in enumerate(generator.integers(start, end, each) if end > start else ()):
      colour = generator.choice(np.flatnonzero(table.colours[row]))
      style = STYLES[generator.integers(len(STYLES))] if i % 2 else ""
      out.append(table.scene(int(row), int(colour), names, style))
  return out


def scores(asked, readings) -> dict[str, float]:
  """Shares of scenes that are read as asked for: by kind, and by what the caption says."""
  found = [(scene, reader.check(scene, reading)) for scene, reading in zip(asked, readings)]
  share = lambda values: float(np.mean(values)) if values else 0.0
  kinds = {"single": lambda s: not s.relation and s.number == 1,
           "several": lambda s: s.number > 1, "two": lambda s: bool(s.relation)}
  all_right = lambda parts: all(right for part, right in parts.items() if part != "style")
  return {**{kind: share([all_right(parts) for scene, parts in found if of(scene)])
             for kind, of in kinds.items()},
          "two_subjects": share([parts["subjects"] for scene, parts in found if scene.relation]),
          **{part: share([parts[part] for _, parts in found if part in parts])
             for part in ("number", "colour", "style")}}
