"""PyTorch tensor names and layouts from our parameter paths, by one mechanical rule."""
import re

import numpy as np

# Flax writes list members as `name_0`, PyTorch as `name.0`. `linear_1` and the like are no lists.
_LISTS = re.compile(r"\b((?:down|up|transformer)_blocks|resnets|attentions|(?:down|up)samplers"
                    r"|to_out|net|block|layer)_(\d+)")
_WEIGHTS = ("kernel", "scale", "embedding")

# diffusers renamed the attention of the autoencoder; the Flax class and older files did not.
_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def torch_name(path: str) -> str:
  """`down_blocks_0/attentions_0/.../to_out_0/kernel` -> its name in PyTorch's state dict."""
  module, slash, leaf = path.rpartition("/")
  module = _LISTS.sub(r"\1.\2", module.replace("/", "."))
  return f"{module}{'.' if slash else ''}{'weight' if leaf in _WEIGHTS else leaf}"


def new_vae_name(name: str) -> str:
  """The present-day PyTorch name of an autoencoder tensor; other names pass unchanged."""
  parent, _, tail = name.rpartition("attentions.0.")
  module, dot, leaf = tail.rpartition(".")
  if parent and module in _VAE_ATTENTION:
    return f"{parent}attentions.0.{_VAE_ATTENTION[module]}{dot}{leaf}"
  return name


def torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape in PyTorch's layout of the parameter at `path`."""
  if not path.endswith("/kernel"):
    return shape
  return shape[::-1] if len(shape) == 2 else (shape[3], shape[2], shape[0], shape[1])


def to_torch(path: str, x: np.ndarray) -> np.ndarray:
  """Kernels to [out, in] or OIHW; everything else as it is."""
  if not path.endswith("/kernel"):
    return x
  return np.ascontiguousarray(x.T if x.ndim == 2 else x.transpose(3, 2, 0, 1))


def from_torch(path: str, x: np.ndarray) -> np.ndarray:
  """The inverse of `to_torch`."""
  if not path.endswith("/kernel"):
    return x
  return np.ascontiguousarray(x.T if x.ndim == 2 else x.transpose(2, 3, 1, 0))
