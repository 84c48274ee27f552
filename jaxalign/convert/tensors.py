"""Files of named tensors: safetensors, PyTorch's pickles and Flax's msgpack, read as numpy arrays.

What the names mean is for others to say. Every error is one line that names the file.
"""
import importlib.util
import json
import pathlib

import ml_dtypes
import msgpack
import numpy as np
import safetensors
from flax import serialization, traverse_util

from jaxalign.errors import UserError

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
LOOK = "python -m jaxalign.inspect"    # the command that says what a file is
# numpy has none of these itself, and safetensors cannot hand them over. Both fit into float16.
_FP8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
_POINTER = b"version https://git-lfs.github.com/spec/"
# Beside the weights that ComfyUI quantises, by their older and their newer names: what a weight is
# to be multiplied by, and what only arithmetic in float8 needs.
SCALES = (".scale_weight", ".weight_scale")
_SIDECARS = (*SCALES, ".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
_SCALED = {"format": ("float8_e4m3fn", "float8_e5m2"), "full_precision_matrix_mult": (True, False)}


def look(path) -> str:
  """How an error about a file that is not what was wanted ends."""
  return f"; what it is: {LOOK} {path}"


def check_pointer(file: pathlib.Path) -> None:
  """UserError if the file is what git leaves in place of a large one that was not fetched."""
  try:
    with file.open("rb") as content:
      head = content.read(len(_POINTER))
  except OSError:
    return
  if head == _POINTER:
    raise UserError(f"{file}: a git-lfs pointer, not the file itself; fetch it with `git lfs pull`")


def read_safetensors(file: pathlib.Path, only=None) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Tensors (those named in `only`, where given) and metadata.

  float8 comes as float16, which holds all of its values; with scales, which ComfyUI gives it and
  `only` leaves out, as float32.
  """
  tensors, metadata = _read(file, only)
  return _scaled(file, tensors, metadata), metadata


def _read(file: pathlib.Path, only=None) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  check_pointer(file)
  try:
    with safetensors.safe_open(file, "np") as content:
      names = [name for name in content.keys() if only is None or name in only]
      kinds = {name: content.get_slice(name).get_dtype() for name in names}
      tensors = {name: content.get_tensor(name) for name in names if kinds[name] not in _FP8}
      metadata = content.metadata() or {}
    small = {name: _FP8[kind] for name, kind in kinds.items() if kind in _FP8}
    return {**tensors, **_read_raw(file, small)}, metadata
  except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
    if _is_pickle(file):
      raise refused(file) from error
    raise UserError(f"{file}: missing, truncated or corrupt safetensors file ({error})"
                    f"{look(file)}") from error


def _read_raw(file: pathlib.Path, kinds: dict) -> dict[str, np.ndarray]:
  """The tensors `kinds` (name -> dtype) as float16, by what the file's header says of them."""
  found = {}
  if not kinds:
    return found
  with file.open("rb") as content:
    size = int.from_bytes(content.read(8), "little")
    header = json.loads(content.read(size))
    for name, kind in kinds.items():
      begin, end = header[name]["data_offsets"]
      content.seek(8 + size + begin)
      x = np.frombuffer(content.read(end - begin), kind).reshape(header[name]["shape"])
      found[name] = x.astype(np.float16)
  return found


def _scaled(where, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> dict:
  """With the scales of quantised weights multiplied into these.

  Raises:
    UserError: they are quantised in another way than float8 with a scale.
  """
  if not any(name.endswith(_SIDECARS) for name in tensors):
    return tensors
  try:
    ways = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
    ways = {**ways, **{name.removesuffix(".comfy_quant"): json.loads(x.tobytes())
                       for name, x in tensors.items() if name.endswith(".comfy_quant")}}
    other = [(layer, key, value) for layer, way in ways.items() for key, value in way.items()
             if value not in _SCALED.get(key, ())]
  except (ValueError, TypeError, AttributeError, RecursionError) as error:
    raise UserError(f"{where}: how its weights are quantised cannot be read{look(where)}"
                    ) from error
  refusal = lambda layer, way: UserError(
      f"{where}: {layer} is quantised ({str(way)[:60]!r}), which is not supported; float8 with a "
      f"scale is")
  if other:
    raise refusal(other[0][0], f"{other[0][1]} {other[0][2]}")
  for name in [name for name in tensors if name.endswith(SCALES)]:
    layer = name.rpartition(".")[0]
    weight, scale = f"{layer}.weight", tensors[name]
    if weight not in tensors:
      continue
    x = tensors[weight]
    rows = x.ndim and scale.size == len(x)                   # one for each, or one for all
    if x.dtype.kind in "biu" or scale.dtype.kind in "biu" or not (scale.size == 1 or rows):
      raise refusal(layer, f"{x.dtype}{list(x.shape)}, {scale.dtype}{list(scale.shape)}")
    scale = np.asarray(scale, np.float32).reshape((-1, *[1] * (x.ndim - 1)) if rows else ())
    tensors[weight] = np.asarray(x, np.float32) * scale
  return {name: x for name, x in tensors.items() if not name.endswith(_SIDECARS)}


def outline(file: pathlib.Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
  """`{name: (dtype as safetensors calls it, shape)}` and metadata; reads no tensor."""
  check_pointer(file)
  try:
    with safetensors.safe_open(file, "np") as content:
      slices = {name: content.get_slice(name) for name in content.keys()}
      return ({name: (x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()},
              content.metadata() or {})
  except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
    if _is_pickle(file):
      raise refused(file) from error
    raise UserError(f"{file}: missing, truncated or corrupt safetensors file ({error})") from error


def read_sharded(index: pathlib.Path) -> dict[str, np.ndarray]:
  """All tensors of the safetensors files that an index names."""
  check_pointer(index)
  try:
    files = json.loads(index.read_text())["weight_map"]
    shards = sorted({str(shard) for shard in files.values()})
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise UserError(f"{index}: not a safetensors index (no valid weight_map){look(index)}"
                    ) from error
  tensors, metadata = {}, {}
  for shard in shards:
    found, about = _read(index.parent / shard)
    tensors.update(found)
    metadata.update(about)
  return _scaled(index, tensors, metadata)


def read_msgpack(file: pathlib.Path) -> dict[str, np.ndarray]:
  """The leaves of a Flax checkpoint by path, `a/b/kernel`."""
  check_pointer(file)
  try:
    tree = serialization.msgpack_restore(file.read_bytes())
    return traverse_util.flatten_dict(tree, sep="/")
  except (ValueError, TypeError, AttributeError, msgpack.UnpackException) as error:
    raise UserError(f"{file}: truncated or corrupt msgpack file "
                    f"({type(error).__name__}){look(file)}") from error


def read_pickle(file: pathlib.Path) -> dict[str, np.ndarray]:
  """A PyTorch state dict; only for a file that the user has named."""
  check_pointer(file)
  if importlib.util.find_spec("torch") is None:
    raise UserError(f"{file}: pickled weights need torch to be read; install it, or convert them "
                    "to safetensors")
  import torch
  try:
    state = torch.load(file, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)  # what open_clip's training writes
    # numpy has no bfloat16 of its own, and torch knows no other.
    return {name: (x.float() if x.dtype == torch.bfloat16 else x).detach().numpy()
            for name, x in state.items()}
  except Exception as error:  # torch lets through whatever a damaged file makes its parsers raise
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"{file}: not a PyTorch state dict of plain tensors ({reason}){look(file)}"
                    ) from error


def refused(file: pathlib.Path) -> UserError:
  """What is said of a pickle that nobody has named for what it is."""
  return UserError(f"{file}: pickled weights are refused, they can run code when loaded; convert "
                   f"them to safetensors{look(file)}")


def _is_pickle(file: pathlib.Path) -> bool:
  """Whether these are the first bytes of PyTorch's archives and bare pickles."""
  try:
    with file.open("rb") as content:
      return content.read(2) in (b"PK", b"\x80\x02")
  except OSError:
    return False


def plain_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Without what `torch.compile` and data-parallel training put before and into the names."""
  return {name.replace("_orig_mod.", "").removeprefix("module."): x for name, x in tensors.items()}


def check_finite(where, tensors: dict[str, np.ndarray]) -> None:
  """UserError that names the first tensor with a number that is not finite."""
  for name, x in tensors.items():
    if x.dtype.kind not in "biu" and not np.isfinite(x).all():
      raise UserError(f"{where}: {name} holds numbers that are not finite")
