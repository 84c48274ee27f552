"""Autoencoder of Stable Diffusion (`AutoencoderKL`); paths equal those of `FlaxAutoencoderKL`.

Everywhere else in the package latents are *scaled*, that is as the denoiser sees them. The scale
(and shift) of a checkpoint is applied here and only here, by `encode_images` and `decode_images`.
"""
import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxalign.errors import UserError
from jaxalign.models import layers
from jaxalign.models.attention import attend
from jaxalign.models.layers import Conv, Dense, check_config

WHERE = "AutoencoderKL"

_FIXED = {
    "_class_name": ("AutoencoderKL", "FlaxAutoencoderKL"),
    "act_fn": ("silu",), "mid_block_add_attention": (True,), "latents_mean": (None,),
    "latents_std": (None,), "force_upcast": ..., "sample_size": ...,
}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """The config keys that shape the network, under diffusers' names and with its defaults."""
  in_channels: int = 3
  out_channels: int = 3
  latent_channels: int = 4
  down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
  up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
  block_out_channels: tuple[int, ...] = (64,)
  layers_per_block: int = 1
  norm_num_groups: int = 32
  scaling_factor: float = 0.18215
  shift_factor: float | None = None
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True

  def __post_init__(self):
    layers.check_positive(self, WHERE, "layers_per_block", "latent_channels", "norm_num_groups",
                          "in_channels", "out_channels")
    layers.check_widths(self, WHERE)
    n = len(self.block_out_channels)
    for key, block in (("down_block_types", "DownEncoderBlock2D"),
                       ("up_block_types", "UpDecoderBlock2D")):
      value = getattr(self, key)
      check_config(value == (block,) * n, WHERE, key, value, f"{n} times {block}")
    for key in ("use_quant_conv", "use_post_quant_conv"):
      value = getattr(self, key)
      check_config(isinstance(value, bool), WHERE, key, value, "only True or False")


class Attention(nn.Module):
  """Single-head self-attention over pixels."""
  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    B, h, w, c = x.shape
    dense = lambda name: Dense(c, dtype=self.dtype, name=name)
    y = layers.group_norm(self.groups, 1e-6, self.dtype, "group_norm")(x).reshape(B, h * w, c)
    y = attend(dense("query")(y), dense("key")(y), dense("value")(y), heads=1)
    return x + dense("proj_attn")(y).reshape(B, h, w, c)


class Stage(nn.Module):
  """ResNet blocks at one resolution, then a change of resolution: "down", "up" or "none"."""
  width: int
  num_layers: int
  resample: str
  groups: int
  dtype: Any
  remat: str

  @nn.compact
  def __call__(self, x):
    block = layers.rematted(layers.ResnetBlock, self.remat)
    for i in range(self.num_layers):
      x = block(self.width, self.groups, 1e-6, self.dtype, name=f"resnets_{i}")(x)
    if self.resample == "down":
      x = layers.Downsample((0, 1), self.dtype, name="downsamplers_0")(x)
    elif self.resample == "up":
      x = layers.Upsample(self.dtype, name="upsamplers_0")(x)
    return x


class MidStage(nn.Module):
  groups: int
  dtype: Any
  remat: str

  @nn.compact
  def __call__(self, x):
    block = layers.rematted(layers.ResnetBlock, self.remat)
    resnet = lambda name: block(x.shape[-1], self.groups, 1e-6, self.dtype, name=name)
    attention = layers.rematted(Attention, self.remat)(self.groups, self.dtype, name="attentions_0")
    return resnet("resnets_1")(attention(resnet("resnets_0")(x)))


class Encoder(nn.Module):
  config: VAEConfig
  dtype: Any
  remat: str

  @nn.compact
  def __call__(self, x):
    c, widths = self.config, self.config.block_out_channels
    x = Conv(widths[0], dtype=self.dtype, name="conv_in")(x)
    for i, width in enumerate(widths):
      x = Stage(width, c.layers_per_block, "down" if i < len(widths) - 1 else "none",
                c.norm_num_groups, self.dtype, self.remat, name=f"down_blocks_{i}")(x)
    x = MidStage(c.norm_num_groups, self.dtype, self.remat, name="mid_block")(x)
    norm = layers.group_norm(c.norm_num_groups, 1e-6, self.dtype, "conv_norm_out")
    return Conv(2 * c.latent_channels, dtype=self.dtype, name="conv_out")(nn.silu(norm(x)))


class Decoder(nn.Module):
  config: VAEConfig
  dtype: Any
  remat: str

  @nn.compact
  def __call__(self, z):
    c, widths = self.config, self.config.block_out_channels[::-1]
    x = Conv(widths[0], dtype=self.dtype, name="conv_in")(z)
    x = MidStage(c.norm_num_groups, self.dtype, self.remat, name="mid_block")(x)
    for i, width in enumerate(widths):
      x = Stage(width, c.layers_per_block + 1, "up" if i < len(widths) - 1 else "none",
                c.norm_num_groups, self.dtype, self.remat, name=f"up_blocks_{i}")(x)
    norm = layers.group_norm(c.norm_num_groups, 1e-6, self.dtype, "conv_norm_out")
    return Conv(c.out_channels, dtype=self.dtype, name="conv_out")(nn.silu(norm(x)))


class AutoencoderKL(nn.Module):
  """Images in [-1, 1] to unscaled latents and back; parameters f32, computation in `dtype`."""
  config: VAEConfig
  dtype: Any = jnp.float32
  remat: str = "none"

  @classmethod
  def from_config(cls, json_dict: dict, *, dtype=jnp.float32, remat: str = "none"):
    """The model of a checkpoint's `vae/config.json`; `remat` as the UNet's.

    Raises:
      UserError: a key has a value that this implementation cannot represent exactly, or the
        checkpoint overflows in `dtype`.
    """
    if json_dict.get("force_upcast") and jnp.dtype(dtype) == jnp.float16:
      raise UserError(f"{WHERE} config: force_upcast = True, which this checkpoint needs since it "
                      "overflows in float16; choose dtype bfloat16 or float32")
    # FlaxAutoencoderKL and PyTorch agree on every default; a null scale means the default as well.
    json_dict = {k: v for k, v in json_dict.items() if k != "scaling_factor" or v is not None}
    return cls(layers.read_config(VAEConfig, json_dict, _FIXED, WHERE), jnp.dtype(dtype), remat)

  @property
  def factor(self) -> int:
    """Image pixels per latent pixel, along height and along width."""
    return 2 ** (len(self.config.block_out_channels) - 1)

  def setup(self):
    c, identity = self.config, lambda x: x
    conv = lambda features: Conv(features, 1, padding=(0, 0), dtype=self.dtype)
    self.encoder = Encoder(c, self.dtype, self.remat)
    self.decoder = Decoder(c, self.dtype, self.remat)
    self.quant_conv = conv(2 * c.latent_channels) if c.use_quant_conv else identity
    self.post_quant_conv = conv(c.latent_channels) if c.use_post_quant_conv else identity

  def encode(self, x):
    """`x [B, H, W, 3]` in [-1, 1] -> `(mean, logvar)`, `[B, h, w, c]` f32 each, unscaled."""
    moments = self.quant_conv(self.encoder(x)).astype(jnp.float32)
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)

  def decode(self, z):
    """Unscaled latents `[B, h, w, c]` -> `[B, H, W, 3]` f32, about [-1, 1] but not clamped."""
    return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)

  def __call__(self, x):
    """Reconstruction through the posterior mean; exists to create all the parameters."""
    return self.decode(self.encode(x)[0])


def encode_images(vae: AutoencoderKL, params, images, noise=None):
  """Scaled latents `[B, h, w, c]` of `images [B, H, W, 3]` in [0, 1].

  Args:
    vae, params: the autoencoder and its parameter tree.
    images: height and width must be multiples of `vae.factor`.
    noise: `[B, h, w, c]` standard normal to sample the posterior with; its mean if None.
  """
  mean, logvar = vae.apply({"params": params}, 2.0 * images - 1.0, method="encode")
  z = mean if noise is None else mean + jnp.exp(0.5 * logvar) * noise
  return (z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def decode_images(vae: AutoencoderKL, params, latents, clamp: bool = True):
  """Images `[B, H, W, 3]` f32 of scaled `latents [B, h, w, c]`, in [0, 1] if clamped."""
  z = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
  images = vae.apply({"params": params}, z, method="decode") / 2 + 0.5
  return jnp.clip(images, 0.0, 1.0) if clamp else images
