"""Weights and inputs by a formula, which `golden/sd3_golden.json` was computed from.

Every value is `centre + amplitude sin(2 pi k / 1000003)`; k depends on the tensor's name and on the
index in PyTorch's layout, so that no library's random numbers are needed to make them again.
"""
import functools
import json
import math
import pathlib
import zlib

import numpy as np
from flax import traverse_util

from jaxalign.convert import names

TABLES = ("token_embedding", "position_embedding", "shared", "relative_attention_bias")


def wave(name: str, shape, amplitude=1.0, centre=0.0) -> np.ndarray:
  i = np.arange(math.prod(shape), dtype=np.int64)
  k = (618033 * i * i + 271828 * i + zlib.crc32(name.encode())) % 1000003
  return (centre + amplitude * np.sin(2 * np.pi * k / 1000003)).reshape(shape)


def weight(name: str, shape) -> np.ndarray:
  """The tensor `name` of a PyTorch state dict."""
  if any(table in name for table in TABLES):
    return wave(name, shape)
  if len(shape) == 1:
    return wave(name, shape, 0.1) if name.endswith("bias") else wave(name, shape, 0.3, 1.0)
  return wave(name, shape, math.sqrt(2 / math.prod(shape[1:])))


def parameters(shapes) -> dict:
  """Our tree, f32, for a tree of `jax.ShapeDtypeStruct`."""
  def make(path, leaf):
    name = names.new_vae_name(names.torch_name(path))
    x = weight(name, names.torch_shape(path, leaf.shape))
    return names.from_torch(path, x).astype(np.float32)
  flat = traverse_util.flatten_dict(shapes, sep="/")
  return traverse_util.unflatten_dict({p: make(p, x) for p, x in flat.items()}, sep="/")


def inputs(name: str, *shape) -> np.ndarray:
  """The input `name`, f32, of PyTorch's `shape`; images and latents with channels last."""
  x = wave(f"input.{name}", shape).astype(np.float32)
  return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


@functools.cache
def goldens() -> dict:
  return json.loads((pathlib.Path(__file__).parent / "golden" / "sd3_golden.json").read_text())


def golden(key: str) -> list[np.ndarray]:
  """The arrays of a golden, float64; those of four dimensions with channels last."""
  entry = goldens()[key]
  arrays = [np.reshape(v, s) for v, s in zip(entry["values"], entry["shapes"], strict=True)]
  return [np.moveaxis(x, -3, -1) if x.ndim >= 4 else x for x in arrays]
