"""CLIP's text and vision towers; parameter paths equal those of transformers' Flax classes."""
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.errors import UserError
from jaxalign.models.layers import Dense, gelu

ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": gelu,
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
}


def unit(x):
  """`[B, D]` to length one; the small constant keeps the gradient finite at zero."""
  return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


class TextConfig(NamedTuple):
  """Sizes of a text tower. Defaults are those a `config.json` leaves out."""
  vocab_size: int = 49408
  hidden_size: int = 512
  intermediate_size: int = 2048
  projection_dim: int = 512
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  max_position_embeddings: int = 77
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  eos_token_id: int = 49407


class VisionConfig(NamedTuple):
  """Sizes of a vision tower. Defaults are those a `config.json` leaves out."""
  hidden_size: int = 768
  intermediate_size: int = 3072
  projection_dim: int = 512
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  num_channels: int = 3
  image_size: int = 224
  patch_size: int = 32
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5


def _read_config(kind, json_dict: dict, model_type: str):
  """The fields of `kind` out of a `config.json`; other keys do not change the forward pass."""
  if json_dict.get("model_type", model_type) not in (model_type, "clip"):
    raise UserError(f"model_type: {json_dict['model_type']!r} is not {model_type!r}")
  config = kind(**{key: json_dict[key] for key in kind._fields if key in json_dict})
  for key, default in kind._field_defaults.items():
    value = getattr(config, key)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # 0 is a fine token id, nothing else here may be zero.
    if not isinstance(default, str) and not (number and (value > 0 or key == "eos_token_id")):
      raise UserError(f"{key}: {value!r} is not a positive number")
  if config.hidden_act not in ACTIVATIONS:
    raise UserError(
        f"hidden_act: {config.hidden_act!r} is unknown; choose from {', '.join(ACTIVATIONS)}")
  if config.hidden_size % config.num_attention_heads:
    raise UserError(f"num_attention_heads: {config.num_attention_heads} does not divide "
                    f"hidden_size {config.hidden_size}")
  return config


class TextOutput(NamedTuple):
  """What the text towers return.

  last_hidden_state: `[B, L, D]`, after the final layer norm.
  penultimate: `[B, L, D]`, what the last layer reads, without a layer norm (SDXL's conditioning).
  pooled: `[B, D]`, last_hidden_state at the end-of-text token.
  projected: `[B, P]`, pooled through the projection; None in a tower without one.
  """
  last_hidden_state: jax.Array
  penultimate: jax.Array
  pooled: jax.Array
  projected: jax.Array | None = None


class VisionOutput(NamedTuple):
  """`pooled [B, D]`: normalised class token; `projected [B, P]`: the same in the shared space."""
  pooled: jax.Array
  projected: jax.Array


def _norm(config, dtype, name: str) -> nn.Module:
  # Two passes for the variance: activations with a large mean lose it in one.
  return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=dtype, use_fast_variance=False,
                      name=name)


class Attention(nn.Module):
  config: Any
  causal: bool
  dtype: Any

  @nn.compact
  def __call__(self, x):
    heads, width = self.config.num_attention_heads, self.config.hidden_size
    dense = functools.partial(Dense, width, dtype=self.dtype)
    q, k, v = (dense(name=name)(x).reshape(*x.shape[:2], heads, width // heads)
               for name in ("q_proj", "k_proj", "v_proj"))
    out = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
    return dense(name="out_proj")(out.reshape(x.shape))


class MLP(nn.Module):
  config: Any
  dtype: Any

  @nn.compact
  def __call__(self, x):
    x = Dense(self.config.intermediate_size, dtype=self.dtype, name="fc1")(x)
    x = ACTIVATIONS[self.config.hidden_act](x)
    return Dense(self.config.hidden_size, dtype=self.dtype, name="fc2")(x)


class Layer(nn.Module):
  config: Any
  causal: bool
  dtype: Any

  @nn.compact
  def __call__(self, x):
    norm = functools.partial(_norm, self.config, self.dtype)
    x = x + Attention(self.config, self.causal, self.dtype, name="self_attn")(
        norm("layer_norm1")(x))
    return x + MLP(self.config, self.dtype, name="mlp")(norm("layer_norm2")(x))


class Layers(nn.Module):
  config: Any
  causal: bool
  dtype: Any

  @nn.compact
  def __call__(self, x):
    before = x
    for i in range(self.config.num_hidden_layers):
      before, x = x, Layer(self.config, self.causal, self.dtype, name=str(i))(x)
    return x, before


class Encoder(nn.Module):
  """`[B, L, D]` -> output and input of the last layer, both `[B, L, D]`."""
  config: Any
  causal: bool
  dtype: Any

  @nn.compact
  def __call__(self, x):
    return Layers(self.config, self.causal, self.dtype, name="layers")(x)


class TextEmbeddings(nn.Module):
  config: TextConfig
  dtype: Any

  @nn.compact
  def __call__(self, input_ids):
    cfg = self.config
    embed = functools.partial(nn.Embed, features=cfg.hidden_size, dtype=self.dtype,
                              embedding_init=nn.initializers.normal(0.02))
    tokens = embed(cfg.vocab_size, name="token_embedding")(input_ids)
    positions = embed(cfg.max_position_embeddings, name="position_embedding")(
        jnp.arange(input_ids.shape[1]))
    return tokens + positions[None]


class TextTransformer(nn.Module):
  config: TextConfig
  dtype: Any

  @nn.compact
  def __call__(self, input_ids) -> TextOutput:
    cfg = self.config
    if input_ids.ndim != 2 or input_ids.shape[1] > cfg.max_position_embeddings:
      raise ValueError(f"input_ids: shape {input_ids.shape} is not [B, L] with "
                       f"L <= {cfg.max_position_embeddings}")
    x = TextEmbeddings(cfg, self.dtype, name="embeddings")(input_ids)
    x, penultimate = Encoder(cfg, True, self.dtype, name="encoder")(x)
    x = _norm(cfg, self.dtype, "final_layer_norm")(x)
    # Configs written before transformers 4.31 say 2 whatever the real id is; in their vocabularies
    # end of text is the highest id. Elsewhere it is the first end token (padding may equal it).
    is_eos = input_ids if cfg.eos_token_id == 2 else input_ids == cfg.eos_token_id
    end = jnp.argmax(is_eos, axis=-1)
    pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
    return TextOutput(x, penultimate, pooled)


class CLIPTextModel(nn.Module):
  """Text tower: `input_ids [B, L]` int32 -> `TextOutput`; f32 parameters, `dtype` computation."""
  config: TextConfig
  dtype: Any = jnp.float32

  @classmethod
  def from_config(cls, json_dict: dict, dtype=jnp.float32):
    """Tower for a checkpoint's `config.json`; UserError names a key whose value is unusable."""
    return cls(_read_config(TextConfig, json_dict, "clip_text_model"), dtype)

  @nn.compact
  def __call__(self, input_ids) -> TextOutput:
    return TextTransformer(self.config, self.dtype, name="text_model")(input_ids)


class CLIPTextModelWithProjection(CLIPTextModel):
  """The same with a linear projection into the space shared with images."""

  @nn.compact
  def __call__(self, input_ids) -> TextOutput:
    out = TextTransformer(self.config, self.dtype, name="text_model")(input_ids)
    projection = Dense(self.config.projection_dim, use_bias=False, dtype=self.dtype,
                          name="text_projection")
    return out._replace(projected=projection(out.pooled))


class VisionEmbeddings(nn.Module):
  config: VisionConfig
  dtype: Any

  @nn.compact
  def __call__(self, pixels):
    cfg = self.config
    patch = (cfg.patch_size, cfg.patch_size)
    x = nn.Conv(cfg.hidden_size, patch, patch, "VALID", use_bias=False, dtype=self.dtype,
                name="patch_embedding")(pixels)
    x = x.reshape(x.shape[0], -1, cfg.hidden_size)
    token = self.param("class_embedding", nn.initializers.normal(0.02), (cfg.hidden_size,))
    token = jnp.broadcast_to(token.astype(x.dtype)[None, None], (x.shape[0], 1, x.shape[2]))
    x = jnp.concatenate([token, x], axis=1)
    positions = nn.Embed(x.shape[1], cfg.hidden_size, dtype=self.dtype, name="position_embedding",
                         embedding_init=nn.initializers.normal(0.02))(jnp.arange(x.shape[1]))
    return x + positions[None]


class VisionTransformer(nn.Module):
  config: VisionConfig
  dtype: Any

  @nn.compact
  def __call__(self, pixels):
    cfg = self.config
    shape = (cfg.image_size, cfg.image_size, cfg.num_channels)
    if pixels.ndim != 4 or pixels.shape[1:] != shape:
      raise ValueError(f"pixels: shape {pixels.shape} is not [B, {shape[0]}, {shape[1]}, "
                       f"{shape[2]}]")
    norm = functools.partial(_norm, cfg, self.dtype)
    x = VisionEmbeddings(cfg, self.dtype, name="embeddings")(pixels)
    x = norm("pre_layrnorm")(x)  # sic: the name in every published checkpoint
    x, _ = Encoder(cfg, False, self.dtype, name="encoder")(x)
    return norm("post_layernorm")(x[:, 0])


class CLIPVisionModelWithProjection(nn.Module):
  """Vision tower: normalised pixels `[B, S, S, 3]` -> `VisionOutput`."""
  config: VisionConfig
  dtype: Any = jnp.float32

  @classmethod
  def from_config(cls, json_dict: dict, dtype=jnp.float32):
    """Tower for a checkpoint's `config.json`; UserError names a key whose value is unusable."""
    return cls(_read_config(VisionConfig, json_dict, "clip_vision_model"), dtype)

  @nn.compact
  def __call__(self, pixels) -> VisionOutput:
    pooled = VisionTransformer(self.config, self.dtype, name="vision_model")(pixels)
    projection = Dense(self.config.projection_dim, use_bias=False, dtype=self.dtype,
                          name="visual_projection")
    return VisionOutput(pooled, projection(pooled))
