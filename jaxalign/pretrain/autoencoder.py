"""The autoencoder: pictures of 64 x 64 pixels to 8 x 8 x 16 latents and back.

  z = the fixed latents of x (`jaxalign.emoji.latents`);  y = decode(z + noise of random size)
  L = |x - y| + edges * |differences of x - those of y| + square * (x - y)^2 + (encode(x) - z)^2

Both halves are regressions, so neither waits for the other, and denoisers may train on the same
latents before this is done. The absolute error keeps edges where a squared one blurs them; the
error of neighbouring pixels' differences counts them once more. Noise in latents makes a decoder
that forgives a denoiser's small errors. The latents are centred and of unit variance as they are:
no shift, and a scaling factor of 1.
"""
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.config.fields import Count, Fraction, NonNegative, check
from jaxalign.convert import weights
from jaxalign.emoji import artwork, latents, scenes, signs
from jaxalign.errors import UserError
from jaxalign.models.vae import AutoencoderKL
from jaxalign.pretrain import Look, Task
from jaxalign.storage.files import whole_folder

LOG_VARIANCE = -8.0        # of the encoder's posterior, everywhere


@dataclasses.dataclass(frozen=True)
class Config:
  """Keys of the `task` group.

  Attributes:
    artwork: the file `artwork.npz` that `python -m jaxalign.emoji.artwork` writes.
    widths: channels per resolution; the factor is 2 to the number of steps between them.
    layers: ResNet blocks per resolution in the encoder, one more in the decoder.
    batch: pictures per step. encoded: of these, the ones that the encoder learns from.
    signs: share in [0, 1) of pictures that are signs; the rest are drawings, large or in quarters.
    edges, square: weights of the loss.
    latent_noise: standard deviation up to which noise is added before decoding; half of the
      pictures get none.
    colour_jitter: half width of the uniform change of a background's RGB, in [0, 1).
  """
  artwork: str = "runs/drawings/artwork.npz"
  widths: tuple[int, ...] = (32, 32, 80, 160)
  layers: Count = 1
  batch: Count = 32
  encoded: Count = 4
  signs: Fraction = 0.2
  edges: NonNegative = 0.5
  square: NonNegative = 0.5
  latent_noise: NonNegative = 0.15
  colour_jitter: Fraction = 0.06

  def __post_init__(self):
    check("task", self)
    if len(self.widths) != 4 or any(width % 8 for width in self.widths):
      raise UserError(f"task.widths={self.widths}: widths are four multiples of 8")
    if self.encoded > self.batch:
      raise UserError(f"task.encoded={self.encoded} is more than task.batch={self.batch}")


def vae_config(cfg: Config) -> dict:
  """`vae/config.json` in diffusers' words."""
  levels = len(cfg.widths)
  return {
      "_class_name": "AutoencoderKL", "act_fn": "silu", "in_channels": 3, "out_channels": 3,
      "latent_channels": latents.CHANNELS, "block_out_channels": list(cfg.widths),
      "layers_per_block": cfg.layers, "down_block_types": ["DownEncoderBlock2D"] * levels,
      "up_block_types": ["UpDecoderBlock2D"] * levels, "norm_num_groups": 8,
      "sample_size": scenes.SIZE, "scaling_factor": 1.0, "force_upcast": False}


def reconstruction_loss(x, y, edges: float, square: float):
  """`|x - y| + edges * |dx - dy| + square * (x - y)^2`, means over pixels and channels.

  Args:
    x, y: `[B, S, S, 3]` in [-1, 1].
  """
  gap = x - y
  differences = jnp.abs(jnp.diff(gap, axis=1)).mean() + jnp.abs(jnp.diff(gap, axis=2)).mean()
  return jnp.abs(gap).mean() + edges * differences + square * jnp.square(gap).mean()


def decibel(images, reconstructed) -> float:
  """Mean over pictures of their peak signal-to-noise ratio; `[B, S, S, 3]` in [0, 1]."""
  gap = np.asarray(images, np.float64) - np.asarray(reconstructed, np.float64).clip(0, 1)
  return float(-10 * np.log10(np.square(gap).mean((1, 2, 3)) + 1e-9).mean())


def settled(params):
  """Parameters with all that is not learnt in its place.

  The 1x1 convolutions around the latents are the identity, so that pipelines with and without them
  read the same; the posterior has one variance.
  """
  def identity(layer):
    return {"kernel": jnp.eye(layer["kernel"].shape[-1])[None, None],
            "bias": jnp.zeros_like(layer["bias"])}
  encoder, mean = dict(params["encoder"]), np.arange(2 * latents.CHANNELS) < latents.CHANNELS
  out = encoder["conv_out"]
  encoder["conv_out"] = {"kernel": jnp.where(mean[None, None, None], out["kernel"], 0),
                         "bias": jnp.where(mean, out["bias"], LOG_VARIANCE)}
  return {**params, "encoder": encoder, "quant_conv": identity(params["quant_conv"]),
          "post_quant_conv": identity(params["post_quant_conv"])}


def draw_pictures(sheets: scenes.Sheets, rows, key, batch: int, jitter: float):
  """Drawings on palette colours about changed: two fifths large, the others in random quarters.

  Args:
    rows: two arrays of rows of the sheets; half of the drawings are from each.
  """
  k_large, k_alone, k_quarter, k_filled, k_colour, k_jitter = jax.random.split(key, 6)
  empty = len(sheets.large) - 1

  def choose(key, shape):
    k_which, *k_rows = jax.random.split(key, 3)
    chosen = [jax.random.choice(k, jnp.asarray(r), shape) for k, r in zip(k_rows, rows)]
    return jnp.where(jax.random.bernoulli(k_which, 0.5, shape), *chosen)
  large = jnp.where(jax.random.bernoulli(k_alone, 0.4, (batch,)), choose(k_large, (batch,)), empty)
  quarters = jnp.where(jax.random.bernoulli(k_filled, 0.7, (batch, 4)),
                       choose(k_quarter, (batch, 4)), empty)
  rgb = jax.random.choice(k_colour, jnp.asarray(scenes.RGB), (batch,))
  change = jax.random.uniform(k_jitter, rgb.shape, minval=-jitter, maxval=jitter)
  return scenes.compose(sheets, large, quarters, jnp.clip(rgb + change, 0, 1))


def make(cfg: Config) -> Task:
  """The autoencoder of all drawings and of signs as a Task."""
  drawings = artwork.load(cfg.artwork)
  sheets, count = scenes.Sheets.of(drawings), len(drawings.codes)
  subject = np.isin(drawings.codes, list(scenes.SUBJECTS))
  others = np.flatnonzero(~subject)
  in_all_styles = lambda rows: np.concatenate([s * count + rows
                                               for s in range(len(artwork.STYLES))])
  kept_out = in_all_styles(others[::16])
  subjects = in_all_styles(np.flatnonzero(subject))
  learnt = in_all_styles(np.setdiff1d(np.arange(count), others[::16]))
  fixed, vae = latents.load(), AutoencoderKL.from_config(vae_config(cfg))

  def apply(params, x, method):
    return vae.apply({"params": settled(params)}, x, method=method)

  def init(key):
    return vae.init(key, jnp.zeros((1, scenes.SIZE, scenes.SIZE, 3)))["params"]

  def draw(tables, key):
    k_pictures, k_signs, k_jitter, k_half, k_size, k_noise = jax.random.split(key, 6)
    number = round(cfg.signs * cfg.batch)
    word, colour, shift = signs.draw(k_signs, number)
    rgb = jnp.asarray(scenes.RGB)[colour]
    rgb = rgb + jax.random.uniform(k_jitter, rgb.shape, minval=-cfg.colour_jitter,
                                   maxval=cfg.colour_jitter)
    images = jnp.concatenate([
        signs.render(word, rgb.clip(0, 1), shift),
        draw_pictures(tables, (subjects, learnt), k_pictures, cfg.batch - number,
                      cfg.colour_jitter)])
    # In the order of a comb, so that the encoder's first ones, and each device's, are of all kinds.
    images = images[np.argsort(np.arange(cfg.batch) * 0.618034 % 1, kind="stable")]
    z, one = fixed.encode(images), (cfg.batch, 1, 1, 1)
    amount = jax.random.bernoulli(k_half, 0.5, one) * jax.random.uniform(
        k_size, one, maxval=cfg.latent_noise)
    return {"x": 2 * images - 1, "z": z, "noisy": z + amount * jax.random.normal(k_noise, z.shape)}

  def loss(params, batch):
    y = apply(params, batch["noisy"], "decode")
    reconstruction = reconstruction_loss(batch["x"], y, cfg.edges, cfg.square)
    part = slice(None, None, cfg.batch // cfg.encoded)
    mean, _ = apply(params, batch["x"][part], "encode")
    encoding = jnp.square(mean - batch["z"][part]).mean()
    return reconstruction + encoding, {
        "train/loss": reconstruction + encoding, "train/reconstruction": reconstruction,
        "train/encoding": encoding}

  encode = jax.jit(functools.partial(apply, method="encode"))
  decode = jax.jit(functools.partial(apply, method="decode"))
  looked_at = look_at(drawings, sheets, kept_out)

  def look(params, thorough):
    del thorough
    figures, shown = {}, []
    for kind, images in looked_at.items():
      direct, encoded = [np.asarray(decode(params, z)) / 2 + 0.5 for z in (
          fixed.encode(images), encode(params, 2 * images - 1)[0])]
      figures |= {f"eval/{kind}_db": decibel(images, direct),
                  f"eval/{kind}_encoded_db": decibel(images, encoded)}
      shown.append(np.stack([images[:12], direct[:12].clip(0, 1)]))
    return Look(figures, np.concatenate(shown), tuple(
        name for kind in looked_at for name in (kind, "decoded")))

  def save(params, folder: pathlib.Path, record) -> None:
    with whole_folder(folder, last="record.json") as new:
      vae = new / "vae"
      vae.mkdir()
      (vae / "config.json").write_text(json.dumps(vae_config(cfg), indent=2) + "\n")
      weights.save(vae, "vae", jax.device_get(settled(params)), {}, {}, format="diffusers",
                   dtype="float16")
      (new / "record.json").write_text(json.dumps(record, indent=2) + "\n")

  return Task(init, sheets, draw, loss, look, save)


def look_at(drawings: artwork.Artwork, sheets: scenes.Sheets, kept_out) -> dict[str, np.ndarray]:
  """Pictures `[96, 64, 64, 3]` of three kinds: drawings never learnt from, scenes, signs."""
  number, generator = 96, np.random.default_rng(0)
  empty = np.full((number, 4), len(sheets.large) - 1)
  large = generator.choice(kept_out, number) if len(kept_out) else empty[:, 0]
  rgb = scenes.RGB[generator.integers(len(scenes.COLOURS), size=number)]
  known = [code for code in scenes.SUBJECTS if code in drawings.codes]
  cast = drawings.of(known)
  table = scenes.table([scenes.SUBJECTS[code] for code in known], scenes.contrast(cast))
  word, colour, shift = signs.draw(jax.random.key(0), number)
  return {
      "drawings": np.asarray(scenes.compose(sheets, large, empty, rgb)),
      "scenes": np.asarray(scenes.render(scenes.Sheets.of(cast), table, scenes.draw(
          table, jax.random.key(0), number))),
      "signs": np.asarray(signs.render(word, scenes.RGB[np.asarray(colour)], shift))}


def read(folder) -> tuple[AutoencoderKL, dict, dict]:
  """Module, f32 parameters and JSON config of a `vae/` folder, or of a directory that holds one.

  Raises:
    UserError: the folder holds no autoencoder.
  """
  folder = pathlib.Path(folder)
  folder = folder / "vae" if (folder / "vae").is_dir() else folder
  try:
    config = json.loads((folder / "config.json").read_text())
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"task.vae={folder}: no autoencoder: {error}") from error
  vae = AutoencoderKL.from_config(config)
  image = jnp.zeros((1, vae.factor, vae.factor, 3))
  shapes = jax.eval_shape(vae.init, jax.random.key(0), image)["params"]
  params, _, _ = weights.load(folder, "vae", shapes)
  return vae, params, config
