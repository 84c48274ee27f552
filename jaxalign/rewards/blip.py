"""BLIP's image-grounded text encoder in Flax: a ViT, and a BERT that looks at its tokens.

Li et al. 2022, "BLIP: Bootstrapping Language-Image Pre-training" (arXiv 2201.12086), section 3.1.
Parameter paths are those of the published checkpoints, `visual_encoder` and `text_encoder`.
"""
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.models import layers
from jaxalign.models.layers import Dense

WHERE = "BLIP"


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """Sizes of the ViT; the defaults are ViT-L/16 at 224 px."""
  hidden_size: int = 1024
  intermediate_size: int = 4096
  num_hidden_layers: int = 24
  num_attention_heads: int = 16
  image_size: int = 224
  patch_size: int = 16

  def __post_init__(self):
    layers.check_positive(self, f"{WHERE} vision", *(f.name for f in dataclasses.fields(self)))
    layers.check_config(self.hidden_size % self.num_attention_heads == 0, f"{WHERE} vision",
                        "num_attention_heads", self.num_attention_heads, "divides hidden_size")


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """Sizes of the text encoder as `med_config.json` has them; the defaults are BERT-base."""
  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  max_position_embeddings: int = 512
  vocab_size: int = 30524
  layer_norm_eps: float = 1e-12

  def __post_init__(self):
    sizes = (f.name for f in dataclasses.fields(self) if f.type is int)
    layers.check_positive(self, f"{WHERE} text", *sizes)
    layers.check_config(self.hidden_size % self.num_attention_heads == 0, f"{WHERE} text",
                        "num_attention_heads", self.num_attention_heads, "divides hidden_size")


def _norm(eps: float, name: str) -> nn.Module:
  return nn.LayerNorm(epsilon=eps, use_fast_variance=False, name=name)


def _heads(x, count: int):
  return x.reshape(*x.shape[:2], count, -1)


class VisionAttention(nn.Module):
  heads: int

  @nn.compact
  def __call__(self, x):
    q, k, v = (_heads(part, self.heads) for part in
               jnp.split(Dense(3 * x.shape[-1], name="qkv")(x), 3, axis=-1))
    out = jax.nn.dot_product_attention(q, k, v)
    return Dense(x.shape[-1], name="proj")(out.reshape(x.shape))


class VisionMLP(nn.Module):
  hidden: int

  @nn.compact
  def __call__(self, x):
    h = layers.gelu(Dense(self.hidden, name="fc1")(x))
    return Dense(x.shape[-1], name="fc2")(h)


class VisionBlock(nn.Module):
  config: VisionConfig

  @nn.compact
  def __call__(self, x):
    cfg = self.config
    x = x + VisionAttention(cfg.num_attention_heads, name="attn")(_norm(1e-6, "norm1")(x))
    return x + VisionMLP(cfg.intermediate_size, name="mlp")(_norm(1e-6, "norm2")(x))


class VisionBlocks(nn.Module):
  config: VisionConfig

  @nn.compact
  def __call__(self, x):
    # Of a block only its input is kept for the reward's gradient.
    for i in range(self.config.num_hidden_layers):
      x = nn.remat(VisionBlock)(self.config, name=str(i))(x)
    return x


class PatchEmbed(nn.Module):
  config: VisionConfig

  @nn.compact
  def __call__(self, pixels):
    patch = (self.config.patch_size,) * 2
    x = nn.Conv(self.config.hidden_size, patch, patch, "VALID", name="proj")(pixels)
    return x.reshape(x.shape[0], -1, x.shape[-1])


class VisionTransformer(nn.Module):
  """`[B, S, S, 3]` normalised pixels -> tokens `[B, 1 + (S / patch)^2, D]`, class token first."""
  config: VisionConfig

  @nn.compact
  def __call__(self, pixels):
    cfg = self.config
    x = PatchEmbed(cfg, name="patch_embed")(pixels)
    token = self.param("cls_token", nn.initializers.zeros, (1, 1, cfg.hidden_size))
    x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, cfg.hidden_size)), x], axis=1)
    x = x + self.param("pos_embed", nn.initializers.normal(0.02), (1, *x.shape[1:]))
    return _norm(1e-6, "norm")(VisionBlocks(cfg, name="blocks")(x))


class TextEmbeddings(nn.Module):
  config: TextConfig

  @nn.compact
  def __call__(self, ids):
    cfg = self.config
    embed = lambda count, name: nn.Embed(count, cfg.hidden_size, name=name)
    words = embed(cfg.vocab_size, "word_embeddings")(ids)
    places = embed(cfg.max_position_embeddings, "position_embeddings")(jnp.arange(ids.shape[1]))
    return _norm(cfg.layer_norm_eps, "LayerNorm")(words + places[None])


class SelfAttention(nn.Module):
  """Attention of `x [B, L, D]` to `y [B, M, E]`, where `mask [B, M]` (all of it, if None)."""
  config: TextConfig

  @nn.compact
  def __call__(self, x, y, mask):
    width, heads = self.config.hidden_size, self.config.num_attention_heads
    q, k, v = (_heads(Dense(width, name=name)(z), heads)
               for name, z in (("query", x), ("key", y), ("value", y)))
    mask = None if mask is None else mask[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask).reshape(*x.shape[:2], width)


class AddNorm(nn.Module):
  """A projection, added to what came before, and normalised."""
  config: TextConfig

  @nn.compact
  def __call__(self, h, x):
    h = Dense(self.config.hidden_size, name="dense")(h)
    return _norm(self.config.layer_norm_eps, "LayerNorm")(x + h)


class TextAttention(nn.Module):
  config: TextConfig

  @nn.compact
  def __call__(self, x, y, mask):
    h = SelfAttention(self.config, name="self")(x, y, mask)
    return AddNorm(self.config, name="output")(h, x)


class Intermediate(nn.Module):
  config: TextConfig

  @nn.compact
  def __call__(self, x):
    return layers.gelu(Dense(self.config.intermediate_size, name="dense")(x))


class TextLayer(nn.Module):
  config: TextConfig

  @nn.compact
  def __call__(self, x, mask, image):
    cfg = self.config
    x = TextAttention(cfg, name="attention")(x, x, mask)
    x = TextAttention(cfg, name="crossattention")(x, image, None)
    return AddNorm(cfg, name="output")(Intermediate(cfg, name="intermediate")(x), x)


class TextLayers(nn.Module):
  config: TextConfig

  @nn.compact
  def __call__(self, x, mask, image):
    for i in range(self.config.num_hidden_layers):
      x = TextLayer(self.config, name=str(i))(x, mask, image)
    return x


class Encoder(nn.Module):
  config: TextConfig

  @nn.compact
  def __call__(self, x, mask, image):
    return TextLayers(self.config, name="layer")(x, mask, image)


class TextEncoder(nn.Module):
  """Token states `[B, L, D]` of `ids [B, L]` where `mask [B, L]`, given tokens of an image."""
  config: TextConfig

  @nn.compact
  def __call__(self, ids, mask, image):
    x = TextEmbeddings(self.config, name="embeddings")(ids)
    return Encoder(self.config, name="encoder")(x, mask, image)


class Blip(nn.Module):
  """Pixels `[B, S, S, 3]` and token `ids, mask [B, L]` -> first token's state `[B, D]`."""
  vision: VisionConfig
  text: TextConfig

  @nn.compact
  def __call__(self, pixels, ids, mask):
    image = VisionTransformer(self.vision, name="visual_encoder")(pixels)
    return TextEncoder(self.text, name="text_encoder")(ids, mask, image)[:, 0]
