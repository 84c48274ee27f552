"""Transformer of Stable Diffusion 3 and 3.5 (MMDiT); the variants differ only in configuration.

Image and text tokens have weights of their own and share one attention. The network predicts the
velocity `eps - x_0` of the straight path between data and noise. Parameter paths are the names of
diffusers' `SD3Transformer2DModel` by the rule of `convert/names.py`; the numbers are its numbers.

The position table is no parameter: nobody trains it, and a checkpoint's own counts even where it
differs from the formula. The part that an image size needs is an argument of the network, in a
collection of its own: `apply({"params": ..., "constants": constants(table, config, h, w)}, ...)`.

Reference: Esser et al. 2024, arXiv 2403.03206; dual attention and norms of queries and keys are
those of the release of Stable Diffusion 3.5.
"""
import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import UserError
from jaxalign.models import layers
from jaxalign.models.attention import attend
from jaxalign.models.layers import Conv, Dense, check_config

WHERE = "SD3Transformer2DModel"

_FIXED = {"_class_name": (WHERE,)}

@dataclasses.dataclass(frozen=True)
class SD3Config:
  """The config keys that shape the network, under diffusers' names and with its defaults.

  `sample_size` is the side of the checkpoint's own latents, and the base of the position table,
  which is `pos_embed_max_size` patches high and wide.
  """
  sample_size: int = 128
  patch_size: int = 2
  in_channels: int = 16
  out_channels: int | None = 16
  num_layers: int = 18
  attention_head_dim: int = 64
  num_attention_heads: int = 18
  joint_attention_dim: int = 4096
  caption_projection_dim: int = 1152
  pooled_projection_dim: int = 2048
  pos_embed_max_size: int = 96
  dual_attention_layers: tuple[int, ...] = ()
  qk_norm: str | None = None

  def __post_init__(self):
    if self.out_channels is None:
      object.__setattr__(self, "out_channels", self.in_channels)
    numbers = [f.name for f in dataclasses.fields(self) if isinstance(f.default, int)]
    layers.check_positive(self, WHERE, *numbers)

    def check(key, ok, wanted):
      check_config(ok, WHERE, key, getattr(self, key), wanted)
    check("patch_size", self.sample_size % self.patch_size == 0,
          f"must divide sample_size {self.sample_size}")
    check("out_channels", self.out_channels == self.in_channels,
          f"only in_channels, {self.in_channels}")
    check("attention_head_dim", self.width % 4 == 0,
          f"times num_attention_heads {self.num_attention_heads} must be a multiple of 4")
    check("caption_projection_dim", self.caption_projection_dim == self.width,
          f"only num_attention_heads times attention_head_dim, {self.width}")
    check("pos_embed_max_size", self.pos_embed_max_size >= self.sample_size // self.patch_size,
          f"at least sample_size / patch_size, {self.sample_size // self.patch_size}")
    dual = self.dual_attention_layers
    check("dual_attention_layers",
          isinstance(dual, tuple) and len(set(dual)) == len(dual) and
          all(type(i) is int and 0 <= i < self.num_layers for i in dual),
          f"a list of different layers, 0 to {self.num_layers - 1}")
    check("qk_norm", self.qk_norm in (None, "rms_norm"), "only None or 'rms_norm'")

  @property
  def width(self) -> int:
    """Features of a token."""
    return self.num_attention_heads * self.attention_head_dim


def positions(config: SD3Config, rows: int, columns: int) -> np.ndarray:
  """The middle `[rows, columns, D]` f32 of the position table that new networks have.

  Sinusoids of column and row, in units in which the checkpoint's own image is as wide as it has
  patches. A checkpoint's own table is to be read and not made.
  """
  side, part = config.pos_embed_max_size, config.width // 4
  unit = side / (config.sample_size // config.patch_size)
  rates = 10000.0 ** (-np.arange(part) / part)

  def waves(count):
    angle = (((side - count) // 2 + np.arange(count)) / unit)[:, None] * rates
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)
  return np.concatenate(np.broadcast_arrays(waves(columns)[None], waves(rows)[:, None]), axis=-1)


def position_table(config: SD3Config) -> np.ndarray:
  """All of `positions`, `[1, S^2, D]` f32 with S `pos_embed_max_size`, as checkpoints hold it."""
  side = config.pos_embed_max_size
  return positions(config, side, side).reshape(1, side * side, -1)


def constants(table, config: SD3Config, h: int, w: int) -> dict:
  """The collection `"constants"` for latents `h` high and `w` wide: the middle of the table.

  Args:
    table: `[1, S^2, D]`, as a checkpoint holds it or `position_table` makes it.
  Raises:
    UserError: the latents are larger than the table, or the table is another network's.
  """
  side, patch = config.pos_embed_max_size, config.patch_size
  if np.shape(table) != (1, side * side, config.width):
    raise UserError(f"pos_embed.pos_embed has shape {list(np.shape(table))} where "
                    f"pos_embed_max_size says {[1, side * side, config.width]}")
  rows, columns = h // patch, w // patch
  if max(rows, columns) > side:
    raise UserError(f"latents of {h}x{w} are {rows}x{columns} patches, but this checkpoint has "
                    f"positions for {side}x{side} (pos_embed_max_size); choose smaller images")
  top, left = (side - rows) // 2, (side - columns) // 2
  table = np.reshape(table, (side, side, -1))[top:top + rows, left:left + columns]
  return {"pos_embed": {"pos_embed": table.astype(np.float32)}}


class PatchEmbed(nn.Module):
  """`[B, h, w, C] -> [B, N, D]`: tokens of patches, row by row, with their positions added."""
  config: SD3Config
  dtype: Any

  @nn.compact
  def __call__(self, x):
    c = self.config
    grid = [side // c.patch_size for side in x.shape[1:3]]
    table = self.variable("constants", "pos_embed", lambda: jnp.asarray(positions(c, *grid))).value
    x = Conv(c.width, c.patch_size, c.patch_size, (0, 0), self.dtype, name="proj")(x)
    if table.shape != x.shape[1:]:
      raise ValueError(f"constants: positions {table.shape} are not those of {x.shape[1:]} "
                       "tokens; make them for this image size")
    x = (x.astype(jnp.float32) + table[None]).astype(self.dtype)
    return x.reshape(x.shape[0], -1, c.width)


class ConditionEmbedding(nn.Module):
  """`[B, D]` of times `t [B]` and pooled texts `[B, Q]`."""
  width: int
  dtype: Any

  @nn.compact
  def __call__(self, t, pooled):
    two_layer = lambda name: layers.TwoLayer(self.width, self.dtype, name=name)
    return (two_layer("timestep_embedder")(layers.sinusoid(t, 256, True, 0))
            + two_layer("text_embedder")(pooled))


class Modulation(nn.Module):
  """`parts` vectors `[B, 1, D]` linear in `s [B, D]`, the activated condition."""
  parts: int
  dtype: Any

  @nn.compact
  def __call__(self, s):
    y = Dense(self.parts * s.shape[-1], dtype=self.dtype, name="linear")(s)
    return jnp.split(y[:, None], self.parts, axis=-1)


def modulate(x, scale, shift):
  """Layer norm without parameters, then a scale and a shift of each sample's own."""
  norm = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, use_fast_variance=False,
                      dtype=x.dtype)
  return norm(x) * (1 + scale) + shift


class Attention(nn.Module):
  """Attention of image tokens `[B, N, D]` alone, or with text tokens `[B, M, D]` in one softmax.

  Returns both; the text's is None where there is none, or where `last` says that nobody reads it.
  """
  config: SD3Config
  dtype: Any
  last: bool = False

  @nn.compact
  def __call__(self, x, text=None, key_bias=None):
    c, dense = self.config, lambda name: Dense(self.config.width, dtype=self.dtype, name=name)

    def project(y, q, k, v, norms):
      """Queries, keys and values of one kind of token, all `[B, L, D]`."""
      out = [dense(name)(y) for name in (q, k, v)]
      if c.qk_norm:
        heads = (*y.shape[:2], c.num_attention_heads, c.attention_head_dim)
        for i, name in enumerate(norms):
          norm = nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name=name)
          out[i] = norm(out[i].reshape(heads)).reshape(y.shape)
      return out

    qkv = project(x, "to_q", "to_k", "to_v", ("norm_q", "norm_k"))
    if text is not None:
      added = project(text, "add_q_proj", "add_k_proj", "add_v_proj",
                      ("norm_added_q", "norm_added_k"))
      if self.last:
        added[0] = added[0][:, :0]                         # parameters without an effect
      qkv = [jnp.concatenate(pair, axis=1) for pair in zip(qkv, added, strict=True)]
    if key_bias is not None:
      key_bias = jnp.pad(key_bias, ((0, 0), (x.shape[1], 0)))
    out = attend(*qkv, c.num_attention_heads, key_bias)
    image, text_out = out[:, :x.shape[1]], out[:, x.shape[1]:]
    return (dense("to_out_0")(image),
            None if text is None or self.last else dense("to_add_out")(text_out))


class Gelu(nn.Module):
  dtype: Any

  @nn.compact
  def __call__(self, x):
    return nn.gelu(Dense(4 * x.shape[-1], dtype=self.dtype, name="proj")(x), approximate=True)


class FeedForward(nn.Module):
  dtype: Any

  @nn.compact
  def __call__(self, x):
    return Dense(x.shape[-1], dtype=self.dtype, name="net_2")(Gelu(self.dtype, name="net_0")(x))


class TransformerBlock(nn.Module):
  """Image tokens `x [B, N, D]` and text tokens `text [B, M, D]` to the same; `s [B, D]`.

  Attributes:
    dual: image tokens attend to themselves a second time.
    last: the text is read, but not changed.
  """
  config: SD3Config
  dtype: Any
  dual: bool
  last: bool

  @nn.compact
  def __call__(self, x, text, s, key_bias):
    part = lambda kind, *fields, name: kind(*fields, self.dtype, name=name)
    shift1, scale1, gate1, shift2, scale2, gate2, *second = part(
        Modulation, 9 if self.dual else 6, name="norm1")(s)
    if self.last:
      scale, shift = part(Modulation, 2, name="norm1_context")(s)
    else:
      shift, scale, text_gate1, text_shift2, text_scale2, text_gate2 = part(
          Modulation, 6, name="norm1_context")(s)
    attention = Attention(self.config, self.dtype, self.last, name="attn")
    image, text_out = attention(modulate(x, scale1, shift1), modulate(text, scale, shift),
                                key_bias)
    y = x + gate1 * image
    if self.dual:
      shift3, scale3, gate3 = second
      # Of the block's input: both attentions read the same tokens.
      image, _ = part(Attention, self.config, name="attn2")(modulate(x, scale3, shift3))
      y = y + gate3 * image
    y = y + gate2 * part(FeedForward, name="ff")(modulate(y, scale2, shift2))
    if not self.last:
      text = text + text_gate1 * text_out
      text = text + text_gate2 * part(FeedForward, name="ff_context")(
          modulate(text, text_scale2, text_shift2))
    return y, text


class SD3Transformer2DModel(nn.Module):
  """Predicts the velocity `eps - x_0` from noisy latents, a time and a text.

  Attributes:
    config: see `SD3Config`.
    dtype: what it computes in; parameters, statistics of norms, softmax and the output are f32.
    remat: "none", or "block" to recompute transformer blocks in the backward pass.
  """
  config: SD3Config
  dtype: Any = jnp.float32
  remat: str = "none"

  @classmethod
  def from_config(cls, json_dict: dict, *, dtype=jnp.float32, remat: str = "none"):
    """The model of a checkpoint's `transformer/config.json`.

    Raises:
      UserError: a key has a value that this implementation cannot represent exactly.
    """
    layers.check_remat(remat)
    return cls(layers.read_config(SD3Config, json_dict, _FIXED, WHERE), jnp.dtype(dtype), remat)

  def example_inputs(self):
    """Zero inputs `(x, t, states, pooled)` of batch 1, for `init` and `jax.eval_shape`."""
    c = self.config
    return (jnp.zeros((1, c.sample_size, c.sample_size, c.in_channels)), jnp.zeros((1,)),
            jnp.zeros((1, 1, c.joint_attention_dim)), jnp.zeros((1, c.pooled_projection_dim)))

  @nn.compact
  def __call__(self, x, t, states, pooled, key_bias=None):
    """Prediction `[B, h, w, C]` f32.

    Args:
      x: `[B, h, w, C]` noisy scaled latents, h and w multiples of `patch_size`.
      t: `[]` or `[B]` f32, 1000 times the noise level, 0 to 1000.
      states: `[B, M, J]` joined states of the text encoders; all tokens take part, padding too.
      pooled: `[B, Q]` joined projections of the CLIP text encoders.
      key_bias: `[B, M]` f32 added to the scores of a text token as key; None for none. Text has no
        positions, so n equal tokens are exactly one whose bias is log n; minus infinity is none.
    """
    c = self.config
    B, h, w, _ = x.shape
    if h % c.patch_size or w % c.patch_size:
      raise ValueError(f"x: latents of {h}x{w} are no whole patches of {c.patch_size}")
    t = jnp.broadcast_to(jnp.asarray(t), (B,))
    x = PatchEmbed(c, self.dtype, name="pos_embed")(x)
    s = nn.silu(ConditionEmbedding(c.width, self.dtype, name="time_text_embed")(t, pooled))
    text = Dense(c.width, dtype=self.dtype, name="context_embedder")(states)
    block = layers.rematted(TransformerBlock, self.remat)
    for i in range(c.num_layers):
      x, text = block(c, self.dtype, i in c.dual_attention_layers, i == c.num_layers - 1,
                      name=f"transformer_blocks_{i}")(x, text, s, key_bias)
    scale, shift = Modulation(2, self.dtype, name="norm_out")(s)
    x = Dense(c.patch_size ** 2 * c.out_channels, dtype=self.dtype, name="proj_out")(
        modulate(x, scale, shift))
    # A token's outputs are (row in its patch, column in its patch, channel).
    x = x.reshape(B, h // c.patch_size, w // c.patch_size, c.patch_size, c.patch_size, -1)
    return x.swapaxes(2, 3).reshape(B, h, w, -1).astype(jnp.float32)
