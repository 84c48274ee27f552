"""Layers that the networks share: Dense and Conv with LoRA, norms, embeddings, ResNet block.

Parameters are f32; `dtype` is what a layer computes in. Dense and Conv read a second variable
collection, `"lora"`: where it holds factors `a` and `b` at a layer's path, a low-rank path runs
beside the kernel, so a frozen kernel never needs a gradient of its own size. The usual scale
alpha / rank is part of the factors.
"""
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import UserError

REMAT = ("none", "block")


def _lora_factors(module: nn.Module, dtype):
  """The adapter's `(a, b)` at this layer's path, or None where it has none."""
  if not module.has_variable("lora", "a"):
    return None
  return tuple(module.get_variable("lora", name).astype(dtype) for name in "ab")


def _add(y, bias):
  return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


class Dense(nn.Module):
  """`[..., in] -> [..., features]`; adapter factors `a [in, r]`, `b [r, features]`.

  With `parts` above 1 a list of as many outputs, `[..., features / parts]`, each the product with
  its own columns: where one output was to be split, the backward pass would have to put its
  gradients together again, which costs CPUs a sixth of a feed-forward layer.
  """
  features: int
  use_bias: bool = True
  dtype: Any = jnp.float32
  parts: int = 1

  @nn.compact
  def __call__(self, x):
    x = x.astype(self.dtype)
    kernel = self.param("kernel", nn.initializers.lecun_normal(),
                        (x.shape[-1], self.features), jnp.float32).astype(self.dtype)
    # A product of two matrices: CPUs take the kernel's gradient a third faster than of more axes.
    rows = x.reshape(-1, x.shape[-1])
    out = [rows @ part for part in jnp.split(kernel, self.parts, axis=1)]
    if factors := _lora_factors(self, self.dtype):
      a, b = factors
      low = rows @ a
      out = [y + low @ part for y, part in zip(out, jnp.split(b, self.parts, axis=1))]
    out = [y.reshape(*x.shape[:-1], -1) for y in out]
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
      out = [_add(y, part) for y, part in zip(out, jnp.split(bias, self.parts))]
    return out if self.parts > 1 else out[0]


class Conv(nn.Module):
  """`[B, H, W, in] -> [B, H', W', features]`; kernel HWIO; `padding` is (before, after) pixels.

  The adapter is a convolution to the rank, `a [k, k, in, r]`, and a 1x1 one back, `b [r, out]`.
  """
  features: int
  kernel_size: int = 3
  stride: int = 1
  padding: tuple[int, int] = (1, 1)
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    x = x.astype(self.dtype)
    size = self.kernel_size
    kernel = self.param("kernel", nn.initializers.lecun_normal(),
                        (size, size, x.shape[-1], self.features), jnp.float32)
    convolve = lambda w: jax.lax.conv_general_dilated(
        x, w, (self.stride,) * 2, (self.padding,) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = convolve(kernel.astype(self.dtype))
    if factors := _lora_factors(self, self.dtype):
      a, b = factors
      y = y + convolve(a) @ b
    return _add(y, self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32))


# Norms compute in f32 and round their output to `dtype`, so that what a backward pass keeps of the
# activation that follows is not f32. Two passes for the variance: activations with a large mean
# lose it in one.


class GroupNorm(nn.Module):
  """Flax's of `[B, ..., C]`, in an order that CPUs take twice as fast, gradient included.

  Sums go over positions first, channel by channel, then over the channels of a group: a group is
  but two or four neighbours, on which sums and products are no vectors.
  """
  groups: int
  eps: float
  dtype: Any

  @nn.compact
  def __call__(self, x):
    B, C = x.shape[0], x.shape[-1]
    of_channels = lambda name, init: self.param(name, init, (C,), jnp.float32).reshape(1, 1, C)
    scale = of_channels("scale", nn.initializers.ones)
    bias = of_channels("bias", nn.initializers.zeros)
    y = x.astype(jnp.float32).reshape(B, -1, C)

    def mean(y):
      """Of each group, `[B, 1, C]`."""
      of_group = y.mean(1).reshape(B, self.groups, -1).mean(-1, keepdims=True)
      return jnp.broadcast_to(of_group, (B, self.groups, C // self.groups)).reshape(B, 1, C)
    y = y - mean(y)
    y = y * (jax.lax.rsqrt(mean(jnp.square(y)) + self.eps) * scale) + bias
    return y.reshape(x.shape).astype(self.dtype)


def group_norm(groups: int, eps: float, dtype, name: str) -> nn.Module:
  return GroupNorm(groups, eps, dtype, name=name)


def layer_norm(dtype, name: str) -> nn.Module:
  return nn.LayerNorm(epsilon=1e-5, dtype=dtype, use_fast_variance=False, name=name)


def gelu(x):
  """The exact GELU, `x Phi(x)`.

  In f32 by erf, as PyTorch has it, at 40 % of what erfc costs CPUs; it differs by rounding alone,
  at most 1e-7 of x. Of fewer bits, erf would lose what the left tail has.
  """
  if x.dtype != jnp.float32:
    return nn.gelu(x, approximate=False)
  return x * (0.5 + 0.5 * jax.lax.erf(x * np.float32(0.5 ** 0.5)))


def check_remat(remat: str) -> None:
  if remat not in REMAT:
    raise ValueError(f"remat: {remat!r} is not one of {REMAT}")


def rematted(module, remat: str):
  """`module`, its activations computed again in the backward pass where `remat` is "block"."""
  return nn.remat(module) if remat == "block" else module


def sinusoid(t, dim: int, flip_sin_to_cos: bool, freq_shift: float):
  """Sinusoidal embedding of `t [N]` -> `[N, dim]` f32; wavelengths 2 pi to 2 pi 10^4."""
  half = dim // 2
  rates = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
  angle = t.astype(jnp.float32)[:, None] * rates[None]
  parts = (jnp.cos(angle), jnp.sin(angle)) if flip_sin_to_cos else (jnp.sin(angle), jnp.cos(angle))
  return jnp.concatenate(parts, axis=-1)


class TwoLayer(nn.Module):
  """`[..., in] -> [..., width]`: linear, SiLU, linear; what embeds times and pooled texts."""
  width: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    x = nn.silu(Dense(self.width, dtype=self.dtype, name="linear_1")(x))
    return Dense(self.width, dtype=self.dtype, name="linear_2")(x)


class ResnetBlock(nn.Module):
  """`[B, h, w, c] -> [B, h, w, features]`, with the time embedding `[B, D]` added if given."""
  features: int
  groups: int
  eps: float
  dtype: Any

  @nn.compact
  def __call__(self, x, time=None):
    conv = lambda name: Conv(self.features, dtype=self.dtype, name=name)
    norm = lambda name: group_norm(self.groups, self.eps, self.dtype, name)
    h = conv("conv1")(nn.silu(norm("norm1")(x)))
    if time is not None:
      shift = Dense(self.features, dtype=self.dtype, name="time_emb_proj")(nn.silu(time))
      h = h + shift[:, None, None, :]
    h = conv("conv2")(nn.silu(norm("norm2")(h)))
    if x.shape[-1] != self.features:
      x = Conv(self.features, 1, padding=(0, 0), dtype=self.dtype, name="conv_shortcut")(x)
    return x + h


class Downsample(nn.Module):
  """Halves height and width by a strided convolution."""
  padding: tuple[int, int]
  dtype: Any

  @nn.compact
  def __call__(self, x):
    return Conv(x.shape[-1], stride=2, padding=self.padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
  """Doubles height and width (nearest), cut to `size` if given, then convolves."""
  dtype: Any

  @nn.compact
  def __call__(self, x, size=None):
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    if size is not None:
      x = x[:, :size[0], :size[1]]
    return Conv(x.shape[-1], dtype=self.dtype, name="conv")(x)


def read_config(kind, json_dict: dict, fixed: dict, where: str):
  """The fields of dataclass `kind` out of a model's `config.json`.

  Args:
    kind: a dataclass whose fields are config keys with the defaults of keys left out.
    json_dict: the parsed file. Keys with a leading underscore are notes and have no effect.
    fixed: key -> values for which the model is exactly the one implemented here; `...` for any.
    where: the class name, for error messages.
  Raises:
    UserError: names the first key whose value cannot be represented.
  """
  fields = {field.name for field in dataclasses.fields(kind)}
  config = {}
  for key, value in json_dict.items():
    value = tuple(value) if isinstance(value, list) else value
    if key in fields:
      config[key] = value
    elif key in fixed:
      if fixed[key] is not ... and value not in fixed[key]:
        raise UserError(f"{where} config: {key} = {value!r} is not supported "
                        f"(only {' or '.join(map(repr, fixed[key]))})")
    elif not key.startswith("_") and value not in (None, False):
      raise UserError(f"{where} config: unknown key {key} = {value!r}")
  return kind(**config)


def check_positive(config, where: str, *keys: str) -> None:
  """UserError unless the fields `keys` of `config` are positive integers."""
  for key in keys:
    value = getattr(config, key)
    check_config(_is_positive(value), where, key, value, "a positive integer")


def check_widths(config, where: str) -> None:
  """UserError unless `block_out_channels` is a list that `norm_num_groups` divides."""
  widths, groups = config.block_out_channels, config.norm_num_groups
  check_config(isinstance(widths, tuple) and widths and all(map(_is_positive, widths)), where,
               "block_out_channels", widths, "a list of positive integers")
  check_config(all(w % groups == 0 for w in widths), where, "norm_num_groups", groups,
               f"must divide block_out_channels {widths}")


def per_block(value, count: int, where: str, key: str) -> tuple[int, ...]:
  """`value` for each of `count` blocks, from one positive integer or a list of them."""
  values = (value,) * count if isinstance(value, int) else value
  check_config(isinstance(values, tuple) and len(values) == count and
               all(map(_is_positive, values)), where, key, value,
               f"a positive integer, or {count} of them")
  return values


def _is_positive(value) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_config(ok: bool, where: str, key: str, value, wanted: str) -> None:
  """UserError naming `key` and `value` unless `ok`."""
  if not ok:
    raise UserError(f"{where} config: {key} = {value!r} is not supported ({wanted})")
