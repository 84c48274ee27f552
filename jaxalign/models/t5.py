"""T5's text encoder, version 1.1; parameter paths are transformers' names by `convert/names.py`."""
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import UserError
from jaxalign.models.layers import Dense

WHERE = "T5EncoderModel"


class T5Config(NamedTuple):
  """Sizes of the encoder. Defaults are those a `config.json` leaves out."""
  vocab_size: int = 32128
  d_model: int = 512
  d_kv: int = 64
  d_ff: int = 2048
  num_layers: int = 6
  num_heads: int = 8
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  layer_norm_epsilon: float = 1e-6


def buckets(distance, count: int, far: int) -> np.ndarray:
  """Row of the table of biases for each `distance`, key minus query in tokens.

  Half of the `count` rows are for keys behind the query. Of each half, the first half are for one
  distance each, the others as wide as their distance, up to `far`; all beyond share the last.
  """
  half = count // 2
  exact = half // 2
  rest, away = half - exact, np.abs(distance)
  # Row exact + m starts at exact (far / exact)^(m / rest); in whole numbers, since some meet it.
  starts = [next(a for a in range(exact, far + 1)
                 if a ** rest * exact ** m >= far ** m * exact ** rest) for m in range(1, rest)]
  row = np.where(away < exact, away, exact + np.searchsorted(starts, away, side="right"))
  return row + half * (distance > 0)


def _norm(config: T5Config, dtype, name: str) -> nn.Module:
  return nn.RMSNorm(epsilon=config.layer_norm_epsilon, dtype=dtype, name=name)


class SelfAttention(nn.Module):
  """`[B, L, D] -> [B, L, D]`, and the bias `[1, H, L, L]` that all blocks add to their scores.

  Scores are not divided by the root of their width: the weights are trained that way.
  """
  config: T5Config
  dtype: Any

  @nn.compact
  def __call__(self, x, bias=None):
    c, L = self.config, x.shape[1]
    dense = lambda name: Dense(c.num_heads * c.d_kv, use_bias=False, dtype=self.dtype, name=name)
    q, k, v = (dense(name)(x).reshape(*x.shape[:2], c.num_heads, c.d_kv) for name in "qkv")
    if bias is None:
      table = nn.Embed(c.relative_attention_num_buckets, c.num_heads, dtype=jnp.float32,
                       name="relative_attention_bias")
      rows = buckets(np.arange(L)[None] - np.arange(L)[:, None],
                     c.relative_attention_num_buckets, c.relative_attention_max_distance)
      bias = table(jnp.asarray(rows)).transpose(2, 0, 1)[None]
    out = jax.nn.dot_product_attention(q, k, v, bias, scale=1.0, implementation="xla")
    return Dense(c.d_model, use_bias=False, dtype=self.dtype, name="o")(
        out.reshape(*x.shape[:2], -1)), bias


class AttentionLayer(nn.Module):
  config: T5Config
  dtype: Any

  @nn.compact
  def __call__(self, x, bias):
    h = _norm(self.config, self.dtype, "layer_norm")(x)
    y, bias = SelfAttention(self.config, self.dtype, name="SelfAttention")(h, bias)
    return x + y, bias


class GatedFeedForward(nn.Module):
  config: T5Config
  dtype: Any

  @nn.compact
  def __call__(self, x):
    dense = lambda name, width: Dense(width, use_bias=False, dtype=self.dtype, name=name)
    gate = nn.gelu(dense("wi_0", self.config.d_ff)(x), approximate=True)
    return dense("wo", self.config.d_model)(gate * dense("wi_1", self.config.d_ff)(x))


class FeedForwardLayer(nn.Module):
  config: T5Config
  dtype: Any

  @nn.compact
  def __call__(self, x):
    h = _norm(self.config, self.dtype, "layer_norm")(x)
    return x + GatedFeedForward(self.config, self.dtype, name="DenseReluDense")(h)


class Block(nn.Module):
  config: T5Config
  dtype: Any

  @nn.compact
  def __call__(self, x, bias):
    x, bias = AttentionLayer(self.config, self.dtype, name="layer_0")(x, bias)
    return FeedForwardLayer(self.config, self.dtype, name="layer_1")(x), bias


class Encoder(nn.Module):
  config: T5Config
  dtype: Any

  @nn.compact
  def __call__(self, x):
    bias = None                                            # the first block has the table
    for i in range(self.config.num_layers):
      x, bias = Block(self.config, self.dtype, name=f"block_{i}")(x, bias)
    return _norm(self.config, self.dtype, "final_layer_norm")(x)


class T5EncoderModel(nn.Module):
  """`input_ids [B, L]` int32 -> states `[B, L, d_model]` in `dtype`; parameters f32 or bfloat16.

  Padding is attended to, as in the text conditions of Stable Diffusion 3.
  """
  config: T5Config
  dtype: Any = jnp.float32

  @classmethod
  def from_config(cls, json_dict: dict, dtype=jnp.float32):
    """The encoder of a checkpoint's `config.json`; its other keys do not change the forward pass.

    Raises:
      UserError: names the key whose value this implementation cannot represent, or the dtype.
    """
    for key, default, only in (("model_type", "t5", "t5"), ("is_decoder", False, False),
                               ("feed_forward_proj", "relu", "gated-gelu")):
      if (value := json_dict.get(key, default)) != only:
        raise UserError(f"{WHERE} config: {key} = {value!r} is not supported (only {only!r})")
    config = T5Config(**{key: json_dict[key] for key in T5Config._fields if key in json_dict})
    for key, default in T5Config._field_defaults.items():
      value = getattr(config, key)
      if type(value) not in (int, type(default)) or value <= 0:
        raise UserError(f"{WHERE} config: {key} = {value!r} is not supported "
                        f"(a positive {'integer' if type(default) is int else 'number'})")
    count, far = config.relative_attention_num_buckets, config.relative_attention_max_distance
    if count % 4 or far <= count // 4:
      key, value, wanted = (("relative_attention_max_distance", far, f"more than {count // 4}")
                            if count % 4 == 0 else
                            ("relative_attention_num_buckets", count, "a multiple of 4"))
      raise UserError(f"{WHERE} config: {key} = {value} is not supported ({wanted})")
    if jnp.dtype(dtype) == jnp.float16:
      raise UserError(f"{WHERE}: overflows in float16; choose dtype bfloat16 or float32")
    return cls(config, jnp.dtype(dtype))

  @nn.compact
  def __call__(self, input_ids):
    c = self.config
    x = nn.Embed(c.vocab_size, c.d_model, dtype=self.dtype, name="shared")(input_ids)
    return Encoder(c, self.dtype, name="encoder")(x)
