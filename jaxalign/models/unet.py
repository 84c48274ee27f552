"""Conditional UNet of Stable Diffusion 1.x, 2.x and XL; the variants differ only in configuration.

Parameter paths equal those of diffusers' `FlaxUNet2DConditionModel`. The numbers are those of the
PyTorch class, which the checkpoints were trained with: exact GELU, and 1e-6 in the transformer's
group norm, where the Flax class has the tanh form and 1e-5.
"""
import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxalign.models import layers
from jaxalign.models.attention import attend
from jaxalign.models.layers import Conv, Dense, check_config

WHERE = "UNet2DConditionModel"

# What the implementation hard-wires: key -> the values that mean exactly that; `...` for keys that
# choose between equal computations or that only other (refused) settings read.
_FIXED = {
    "_class_name": ("UNet2DConditionModel", "FlaxUNet2DConditionModel"),
    "act_fn": ("silu",), "attention_type": ("default",), "center_input_sample": (False,),
    "class_embed_type": (None,), "class_embeddings_concat": (False,), "conv_in_kernel": (3,),
    "conv_out_kernel": (3,), "cross_attention_norm": (None,), "downsample_padding": (1,),
    "dropout": (0.0,), "dual_cross_attention": (False,), "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,), "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,), "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,), "num_class_embeds": (None,), "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,), "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",), "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,), "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,), "time_embedding_type": ("positional",),
    "timestep_post_act": (None,), "addition_embed_type_num_heads": ..., "upcast_attention": ...,
    "use_memory_efficient_attention": ..., "split_head_dim": ...,
}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """The config keys that shape the network, under diffusers' names and with its defaults.

  `attention_head_dim` is, for historical reasons, the NUMBER of heads of each block.
  """
  sample_size: int = 64
  in_channels: int = 4
  out_channels: int = 4
  down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
  up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  layers_per_block: int = 2
  attention_head_dim: int | tuple[int, ...] = 8
  transformer_layers_per_block: int | tuple[int, ...] = 1
  cross_attention_dim: int = 1280
  use_linear_projection: bool = False
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  flip_sin_to_cos: bool = True
  freq_shift: int = 0
  addition_embed_type: str | None = None
  addition_time_embed_dim: int | None = None
  projection_class_embeddings_input_dim: int | None = None

  def __post_init__(self):
    layers.check_positive(self, WHERE, "layers_per_block", "cross_attention_dim",
                          "norm_num_groups", "sample_size", "in_channels", "out_channels")
    layers.check_widths(self, WHERE)
    widths, n = self.block_out_channels, len(self.block_out_channels)
    for key, choices in (("down_block_types", ("CrossAttnDownBlock2D", "DownBlock2D")),
                         ("up_block_types", ("CrossAttnUpBlock2D", "UpBlock2D"))):
      value = getattr(self, key)
      check_config(len(value) == n and all(v in choices for v in value), WHERE, key, value,
                   f"{n} of {' or '.join(choices)}")
    for key in ("attention_head_dim", "transformer_layers_per_block"):
      object.__setattr__(self, key, layers.per_block(getattr(self, key), n, WHERE, key))
    check_config(all(w % h == 0 for w, h in zip(widths, self.attention_head_dim)), WHERE,
                 "attention_head_dim", self.attention_head_dim,
                 f"numbers of heads, which must divide block_out_channels {widths}")
    check_config(self.addition_embed_type in (None, "text_time"), WHERE, "addition_embed_type",
                 self.addition_embed_type, "only None or 'text_time'")
    if self.addition_embed_type:
      for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        check_config(isinstance(getattr(self, key), int), WHERE, key, getattr(self, key),
                     "addition_embed_type 'text_time' needs an integer")


class Attention(nn.Module):
  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x, context):
    dense = lambda name: Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name=name)
    out = attend(dense("to_q")(x), dense("to_k")(context), dense("to_v")(context),
                 self.heads)
    return Dense(x.shape[-1], dtype=self.dtype, name="to_out_0")(out)


class GatedGelu(nn.Module):
  dtype: Any

  @nn.compact
  def __call__(self, x):
    value, gate = Dense(8 * x.shape[-1], dtype=self.dtype, parts=2, name="proj")(x)
    return value * layers.gelu(gate)


class FeedForward(nn.Module):
  dtype: Any

  @nn.compact
  def __call__(self, x):
    h = GatedGelu(self.dtype, name="net_0")(x)
    return Dense(x.shape[-1], dtype=self.dtype, name="net_2")(h)


class TransformerBlock(nn.Module):
  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x, text):
    norm = lambda name: layers.layer_norm(self.dtype, name)
    h = norm("norm1")(x)
    x = x + Attention(self.heads, self.dtype, name="attn1")(h, h)
    x = x + Attention(self.heads, self.dtype, name="attn2")(norm("norm2")(x), text)
    return x + FeedForward(self.dtype, name="ff")(norm("norm3")(x))


class SpatialTransformer(nn.Module):
  """Transformer over the pixels of `x [B, h, w, c]`, reading `text [B, L, D]`."""
  config: UNetConfig
  heads: int
  depth: int
  dtype: Any
  remat: str

  @nn.compact
  def __call__(self, x, text):
    B, h, w, c = x.shape
    if self.config.use_linear_projection:
      project = lambda name: Dense(c, dtype=self.dtype, name=name)
    else:
      project = lambda name: Conv(c, 1, padding=(0, 0), dtype=self.dtype, name=name)
    norm = layers.group_norm(self.config.norm_num_groups, 1e-6, self.dtype, "norm")
    y = project("proj_in")(norm(x)).reshape(B, h * w, c)
    for i in range(self.depth):
      block = layers.rematted(TransformerBlock, self.remat)
      y = block(self.heads, self.dtype, name=f"transformer_blocks_{i}")(y, text)
    return x + project("proj_out")(y.reshape(B, h, w, c))


class Stage(nn.Module):
  """One resolution: its ResNet blocks, each followed by a transformer where `heads` is not 0.

  Called with `skips` (a list) it pops one per layer, as the way up does; it returns the output and
  the list of its layers' outputs.
  """
  config: UNetConfig
  width: int
  num_layers: int
  heads: int
  depth: int
  resample: str  # "down", "up" or "none"
  dtype: Any
  remat: str

  @nn.compact
  def __call__(self, x, time, text, skips=None):
    outputs = []
    for i in range(self.num_layers):
      if skips is not None:
        x = jnp.concatenate([x, skips.pop()], axis=-1)
      x = self._resnet(i, x, time)
      if self.heads:
        x = self._transformer(i, x, text)
      outputs.append(x)
    if self.resample == "down":
      x = layers.Downsample((1, 1), self.dtype, name="downsamplers_0")(x)
      outputs.append(x)
    elif self.resample == "up":
      # The next skip's size: an odd height or width was rounded up on the way down.
      x = layers.Upsample(self.dtype, name="upsamplers_0")(x, skips[-1].shape[1:3])
    return x, outputs

  def _resnet(self, i, x, time):
    block = layers.rematted(layers.ResnetBlock, self.remat)
    return block(self.width, self.config.norm_num_groups, self.config.norm_eps, self.dtype,
                 name=f"resnets_{i}")(x, time)

  def _transformer(self, i, x, text):
    return SpatialTransformer(self.config, self.heads, self.depth, self.dtype, self.remat,
                              name=f"attentions_{i}")(x, text)


class MidStage(Stage):
  """ResNet block, then transformer and ResNet block `num_layers` times."""

  @nn.compact
  def __call__(self, x, time, text):
    x = self._resnet(0, x, time)
    for i in range(self.num_layers):
      x = self._resnet(i + 1, self._transformer(i, x, text), time)
    return x


class UNet2DConditionModel(nn.Module):
  """Predicts noise (or velocity) from noisy latents, a timestep and a text.

  Attributes:
    config: see `UNetConfig`.
    dtype: what it computes in; parameters, norms, softmax and the output are f32.
    remat: "none", or "block" to recompute ResNet and transformer blocks in the backward pass.
  """
  config: UNetConfig
  dtype: Any = jnp.float32
  remat: str = "none"

  @classmethod
  def from_config(cls, json_dict: dict, *, dtype=jnp.float32, remat: str = "none"):
    """The model of a checkpoint's `unet/config.json`.

    Raises:
      UserError: a key has a value that this implementation cannot represent exactly.
    """
    layers.check_remat(remat)
    # diffusers writes null where a config leaves the size open, and a list with a value a block.
    json_dict = {k: v for k, v in json_dict.items() if k != "sample_size" or v is not None}
    only_cross = json_dict.get("only_cross_attention")
    if isinstance(only_cross, list) and only_cross and not any(only_cross):
      json_dict["only_cross_attention"] = False
    return cls(layers.read_config(UNetConfig, json_dict, _FIXED, WHERE), jnp.dtype(dtype), remat)

  def example_inputs(self):
    """Zero inputs `(x, t, text, added)` of batch 1, for `init` and `jax.eval_shape`."""
    c, added = self.config, None
    if c.addition_embed_type:
      width = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
      added = {"text_embeds": jnp.zeros((1, width)), "time_ids": jnp.zeros((1, 6))}
    x = jnp.zeros((1, c.sample_size, c.sample_size, c.in_channels))
    return x, jnp.zeros((1,), jnp.int32), jnp.zeros((1, 1, c.cross_attention_dim)), added

  @nn.compact
  def __call__(self, x, t, text, added=None):
    """Prediction `[B, h, w, out_channels]` f32.

    Args:
      x: `[B, h, w, in_channels]` noisy latents in scaled units.
      t: `[]` or `[B]` train timestep.
      text: `[B, L, cross_attention_dim]` text encoder states.
      added: for SDXL `{"text_embeds": [B, P], "time_ids": [B, 6]}` (original height and width,
        crop top and left, target height and width, in pixels); otherwise None.
    """
    c, widths = self.config, self.config.block_out_channels
    last = len(widths) - 1
    embed = lambda t, dim: layers.sinusoid(t, dim, c.flip_sin_to_cos, c.freq_shift)
    time_embedding = lambda name: layers.TwoLayer(4 * widths[0], self.dtype, name=name)
    t = jnp.broadcast_to(jnp.asarray(t), x.shape[:1])
    time = time_embedding("time_embedding")(embed(t, widths[0]))
    if (added is not None) != (c.addition_embed_type is not None):
      raise ValueError(f"added: addition_embed_type is {c.addition_embed_type!r}, but added is "
                       f"{'missing' if added is None else 'given'}")
    if added is not None:
      ids = embed(added["time_ids"].reshape(-1), c.addition_time_embed_dim)
      ids = ids.reshape(x.shape[0], -1)
      time = time + time_embedding("add_embedding")(
          jnp.concatenate([added["text_embeds"].astype(jnp.float32), ids], axis=-1))

    def stage(kind, name, i, num_layers, attention, resample):
      return kind(c, widths[i], num_layers, c.attention_head_dim[i] if attention else 0,
                  c.transformer_layers_per_block[i], resample, self.dtype, self.remat, name=name)

    x = Conv(widths[0], dtype=self.dtype, name="conv_in")(x)
    skips = [x]
    for i, block in enumerate(c.down_block_types):
      x, outputs = stage(Stage, f"down_blocks_{i}", i, c.layers_per_block, "CrossAttn" in block,
                         "down" if i < last else "none")(x, time, text)
      skips += outputs
    x = stage(MidStage, "mid_block", last, 1, True, "none")(x, time, text)
    for i, block in enumerate(c.up_block_types):
      x, _ = stage(Stage, f"up_blocks_{i}", last - i, c.layers_per_block + 1,
                   "CrossAttn" in block, "up" if i < last else "none")(x, time, text, skips)
    norm = layers.group_norm(c.norm_num_groups, c.norm_eps, self.dtype, "conv_norm_out")
    x = Conv(c.out_channels, dtype=self.dtype, name="conv_out")(nn.silu(norm(x)))
    return x.astype(jnp.float32)
