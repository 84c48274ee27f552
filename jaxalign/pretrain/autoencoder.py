"""The autoencoder: drawings on plain backgrounds to 8x8x4 latents and back.

  z ~ N(mean(x), std(x)^2);  y = decode(z + noise of random size)
  L = |x - y| + edges * |differences of x - those of y| + kl * KL(N(mean, std^2) || N(0, 1))

The absolute error keeps edges where a squared one blurs them; the error of neighbouring pixels'
differences counts them once more. Noise in latents makes a decoder that forgives a denoiser's small
errors. The scale of the latents is measured at the end, so that those of the data have standard
deviation 1 for the denoiser (as in Rombach et al. 2022, arXiv 2112.10752, appendix G).
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
from jaxalign.emoji import drawings as emoji
from jaxalign.emoji.quality import reconstruction_error
from jaxalign.errors import UserError
from jaxalign.models.vae import AutoencoderKL
from jaxalign.pretrain import Look, Task


@dataclasses.dataclass(frozen=True)
class Config:
  """Keys of the `task` group.

  Attributes:
    widths: channels per resolution; the factor is 2 to the number of steps between them.
    layers: ResNet blocks per resolution in the encoder, one more in the decoder.
    batch: drawings per step.
    edges, kl: weights of the loss; kl is per element of the latents.
    latent_noise: standard deviation, relative to that of the batch's latents, up to which noise is
      added before decoding; half of the images get none.
    colour_jitter: half width of the uniform change of a background's RGB, in [0, 1).
  """
  widths: tuple[int, ...] = (32, 64, 96)
  layers: Count = 1
  batch: Count = 32
  edges: NonNegative = 0.5
  kl: NonNegative = 3e-4
  latent_noise: NonNegative = 0.2
  colour_jitter: Fraction = 0.06

  def __post_init__(self):
    check("task", self)
    if any(width % 16 for width in self.widths) or not self.widths:
      raise UserError(f"task.widths={self.widths}: widths are multiples of 16")


def vae_config(cfg: Config, size: int, scaling_factor: float = 1.0) -> dict:
  """`vae/config.json` in diffusers' words."""
  levels = len(cfg.widths)
  return {
      "_class_name": "AutoencoderKL", "act_fn": "silu", "in_channels": 3, "out_channels": 3,
      "latent_channels": 4, "block_out_channels": list(cfg.widths), "layers_per_block": cfg.layers,
      "down_block_types": ["DownEncoderBlock2D"] * levels,
      "up_block_types": ["UpDecoderBlock2D"] * levels, "norm_num_groups": 16, "sample_size": size,
      "scaling_factor": scaling_factor, "force_upcast": False}


def draw_images(rgba, key, *, batch: int, jitter: float):
  """Drawings of random names and vendors, half of them mirrored, on palette colours about changed.

  Args:
    rgba: `[2, N, S, S, 4]` uint8.
  Returns:
    `[batch, S, S, 3]` f32 in [0, 1].
  """
  k_vendor, k_name, k_colour, k_jitter, k_flip = jax.random.split(key, 5)
  vendor = jax.random.randint(k_vendor, (batch,), 0, rgba.shape[0])
  name = jax.random.randint(k_name, (batch,), 0, rgba.shape[1])
  colour = jax.random.choice(k_colour, jnp.asarray(emoji.RGB), (batch,))
  colour = jnp.clip(
      colour + jax.random.uniform(k_jitter, colour.shape, minval=-jitter, maxval=jitter), 0, 1)
  images = emoji.composite(rgba[vendor, name].astype(jnp.float32) / 255, colour)
  flip = jax.random.bernoulli(k_flip, 0.5, (batch, 1, 1, 1))
  return jnp.where(flip, images[:, :, ::-1], images)


def reconstruction_loss(x, y, edges: float):
  """`|x - y| + edges * |dx - dy|`, means over pixels and channels.

  Args:
    x, y: `[B, S, S, 3]` in [-1, 1].
  """
  gap = x - y
  differences = jnp.abs(jnp.diff(gap, axis=1)).mean() + jnp.abs(jnp.diff(gap, axis=2)).mean()
  return jnp.abs(gap).mean() + edges * differences


def kl_to_normal(mean, logvar):
  """KL(N(mean, exp(logvar)) || N(0, 1)) per element, nats."""
  return 0.5 * (mean ** 2 + jnp.exp(logvar) - 1 - logvar).mean()


def make(cfg: Config, drawings: emoji.Drawings) -> Task:
  """The autoencoder of these drawings as a Task."""
  size = drawings.rgba.shape[2]
  vae = AutoencoderKL.from_config(vae_config(cfg, size))

  def apply(params, x, method):
    return vae.apply({"params": params}, x, method=method)

  def init(key):
    return vae.init(key, jnp.zeros((1, size, size, 3)))["params"]

  def draw(rgba, key):
    k_images, k_sample, k_half, k_size, k_noise = jax.random.split(key, 5)
    images = draw_images(rgba, k_images, batch=cfg.batch, jitter=cfg.colour_jitter)
    latents = (cfg.batch, size // vae.factor, size // vae.factor, 4)
    one = (cfg.batch, 1, 1, 1)
    amount = jax.random.bernoulli(k_half, 0.5, one) * jax.random.uniform(
        k_size, one, maxval=cfg.latent_noise)
    return {"x": 2 * images - 1, "sample": jax.random.normal(k_sample, latents),
            "noise": amount * jax.random.normal(k_noise, latents)}

  def loss(params, batch):
    mean, logvar = apply(params, batch["x"], "encode")
    std, spread = jnp.exp(0.5 * logvar), mean.std()
    z = mean + std * batch["sample"] + jax.lax.stop_gradient(spread) * batch["noise"]
    y = apply(params, z, "decode")
    reconstruction = reconstruction_loss(batch["x"], y, cfg.edges)
    kl = kl_to_normal(mean, logvar)
    total = reconstruction + cfg.kl * kl
    return total, {"train/loss": total, "train/reconstruction": reconstruction, "train/kl": kl,
                   "train/latent_std": spread, "train/posterior_std": std.mean()}

  encode = jax.jit(functools.partial(apply, method="encode"))
  decode = jax.jit(functools.partial(apply, method="decode"))
  generator = np.random.default_rng(0)
  count = len(drawings.names)
  name = generator.permutation(count)[:min(256, count)]
  vendor, colour = generator.integers(2, size=len(name)), generator.integers(12, size=len(name))
  shown = np.asarray(emoji.composite(
      drawings.rgba[vendor, name].astype(np.float32) / 255, emoji.RGB[colour]))

  def look(params, thorough):
    mean, _ = encode(params, 2 * shown - 1)
    y = np.asarray(decode(params, mean)) / 2 + 0.5
    rows = min(8, len(shown))
    pair = np.stack([shown[:rows], y[:rows].clip(0, 1)], 1)
    return Look({f"eval/{k}": v for k, v in reconstruction_error(shown, y.clip(0, 1)).items()},
                pair, tuple(str(drawings.names[i]) for i in name[:rows]))

  def save(params, folder: pathlib.Path, record) -> None:
    means = [np.asarray(encode(params, 2 * np.asarray(
        draw_images(drawings.rgba, jax.random.key(i), batch=64, jitter=0.0)) - 1)[0])
             for i in range(8)]
    folder = folder / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    config = vae_config(cfg, size, float(1 / np.std(means)))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder.parent / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    weights.save(folder, "vae", params, {}, {}, format="diffusers", dtype="float16")

  return Task(init, drawings.rgba, draw, loss, look, save)


def read(folder) -> tuple[AutoencoderKL, dict, dict]:
  """Module, f32 parameters and JSON config of a `vae/` folder, or of a directory that holds one.

  Raises:
    UserError: the folder holds no autoencoder.
  """
  folder = pathlib.Path(folder)
  folder = folder / "vae" if (folder / "vae").is_dir() else folder
  try:
    config = json.loads((folder / "config.json").read_text())
  except (OSError, ValueError) as error:
    raise UserError(f"task.vae={folder}: no autoencoder: {error}") from error
  vae = AutoencoderKL.from_config(config)
  image = jnp.zeros((1, vae.factor, vae.factor, 3))
  shapes = jax.eval_shape(vae.init, jax.random.key(0), image)["params"]
  params, _, _ = weights.load(folder, "vae", shapes)
  return vae, params, config
