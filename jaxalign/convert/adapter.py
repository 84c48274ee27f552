"""LoRA files of the diffusers world: PEFT's names, and the older ones of diffusers itself.

A file has, for each adapted layer of the denoiser, a matrix to the rank (`lora_A`) and one back
(`lora_B`), in PyTorch's layout, and says in its metadata by what the product is multiplied. Our
factors (see `jaxalign.models.lora`) contain that number, so what is written has alpha equal to the
rank, and what is read has its scale multiplied into `b`.
"""
import json
import math
import pathlib
import re

import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from jaxalign.convert import names, weights
from jaxalign.errors import UserError
from jaxalign.storage.files import whole

FILE = "pytorch_lora_weights.safetensors"    # what `load_lora_weights` looks for in a folder

_METADATA = "lora_adapter_metadata"
_FACTORS = {"A": "a", "B": "b", "down": "a", "up": "b"}
# `to_q.lora_A.weight`, `to_q.lora.down.weight`, and the oldest `processor.to_q_lora.down.weight`.
_FACTOR = re.compile(r"(?P<module>.+?)(?:\.lora_(?P<new>A|B)|[._]lora\.(?P<old>down|up))\.weight$")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def save_adapter(lora, folder, denoiser: str = "unet", *,
                 dtype: str = "float32") -> pathlib.Path:
  """Writes an adapter so that PyTorch's `pipeline.load_lora_weights(folder)` gives our images.

  Args:
    lora: the tree of `jaxalign.models.lora`.
    denoiser: what the pipeline calls the network that is adapted, `Pipeline.denoiser_name`.
    folder: made if missing; a file of this name in it is replaced, other files stay.
    dtype: "float32", "float16" or "bfloat16".
  Returns:
    The file, `pytorch_lora_weights.safetensors` in `folder`.
  Raises:
    UserError: a value does not fit float16.
    OSError: the folder cannot be written.
  """
  tensors, ranks = {}, {}
  flat = traverse_util.flatten_dict(lora, sep="/")
  for layer in (path.removesuffix("/a") for path in flat if path.endswith("/a")):
    a, b = (weights.cast(f"{layer}/{x}", flat[f"{layer}/{x}"], dtype) for x in "ab")
    module = _module(layer)
    ranks[module] = a.shape[-1]
    tensors[f"{denoiser}.{module}.lora_A.weight"] = names.to_torch("/kernel", a)
    # The way back of a convolution is a 1x1 one.
    tensors[f"{denoiser}.{module}.lora_B.weight"] = names.to_torch(
        "/kernel", b[None, None] if a.ndim == 4 else b)
  rank = max(ranks.values())
  other = {module: r for module, r in ranks.items() if r != rank}
  config = {"r": rank, "lora_alpha": rank, "rank_pattern": other, "alpha_pattern": other,
            "target_modules": sorted(ranks)}
  metadata = {"format": "pt", _METADATA: json.dumps(
      {f"{denoiser}.{key}": value for key, value in config.items()}, indent=2, sort_keys=True)}
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  with whole(folder / FILE) as file:
    safetensors.numpy.save_file(tensors, file, metadata=metadata)
  return folder / FILE


def load_adapter(path, params, denoiser: str = "unet"):
  """Reads an adapter for a denoiser of `params`, with PEFT's or diffusers' older names.

  Args:
    path: a safetensors file, or a folder with `pytorch_lora_weights.safetensors`.
    params: arrays or `jax.ShapeDtypeStruct`, whose kernels it has to fit.
    denoiser: as in `save_adapter`.
  Returns:
    The tree of `jaxalign.models.lora`, numpy f32; alpha / rank is multiplied into `b`.
  Raises:
    UserError: one line that names the file, and the tensor at fault.
  """
  file = _find(pathlib.Path(path))
  tensors, metadata = _read(file)
  config = _config(file, metadata, denoiser)
  kernels = {path.removesuffix("/kernel"): x.shape
             for path, x in traverse_util.flatten_dict(params, sep="/").items()
             if path.endswith("/kernel")}
  layers = {_module(layer): layer for layer in kernels}
  found, alphas = _sort(file, tensors, layers, denoiser)
  tree = {}
  for module, factors in found.items():
    if factors.keys() != {"a", "b"}:
      raise UserError(f"{file}: {module} has only one of its two factors")
    kernel = kernels[layers[module]]
    a, b = factors["a"], factors["b"]
    rank = a.shape[0] if a.ndim else 0
    flat = len(kernel) == 2
    wanted = {
        "lora_A": (a, (rank, kernel[0]) if flat else (rank, kernel[2], *kernel[:2])),
        "lora_B": (b, (kernel[-1], rank) if flat else (kernel[-1], rank, 1, 1))}
    for name, (x, shape) in wanted.items():
      if x.shape != shape or not rank:
        raise UserError(f"{file}: {module}.{name} has shape {x.shape} instead of {shape}")
      if str(x.dtype) not in weights.DTYPES:
        raise UserError(f"{file}: {module}.{name} has dtype {x.dtype}")
    a, b = (names.from_torch("/kernel", np.asarray(x, np.float32)) for x in (a, b))
    scale = np.float32(_scale(config, module, rank, alphas.get(module)))
    tree[f"{layers[module]}/a"] = a
    tree[f"{layers[module]}/b"] = (b if flat else b[0, 0]) * scale
  return traverse_util.unflatten_dict(tree, sep="/")


def _module(layer: str) -> str:
  return names.torch_name(f"{layer}/kernel").removesuffix(".weight")


def _find(path: pathlib.Path) -> pathlib.Path:
  if path.is_dir():
    if (path / FILE).is_file():
      return path / FILE
    pickled = [p for p in sorted(path.iterdir()) if p.suffix in _PICKLES]
    if not pickled:
      raise UserError(f"{path}: has no {FILE}")
    path = pickled[0]
  if not path.is_file():
    raise UserError(f"{path}: no such file or folder")
  if path.suffix in _PICKLES:
    raise _pickled(path)
  return path


def _pickled(file: pathlib.Path) -> UserError:
  return UserError(f"{file}: pickled weights are refused, they can run code when loaded; convert "
                   "them to safetensors")


def _read(file: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  try:
    with safetensors.safe_open(file, "np") as content:
      return {name: content.get_tensor(name) for name in content.keys()}, content.metadata() or {}
  except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
    if file.read_bytes()[:2] in (b"PK", b"\x80\x02"):   # PyTorch's archives and bare pickles
      raise _pickled(file) from error
    raise UserError(f"{file}: truncated or corrupt safetensors file ({error})") from error


def _config(file: pathlib.Path, metadata: dict[str, str], denoiser: str) -> dict:
  """PEFT's `LoraConfig` of the denoiser as far as the file has it; refuses what LoRA is not."""
  try:
    config = json.loads(metadata.get(_METADATA, "{}"))
    config = {key.removeprefix(f"{denoiser}."): value for key, value in config.items()
              if key.startswith(f"{denoiser}.")}
  except (ValueError, AttributeError) as error:
    raise UserError(f"{file}: {_METADATA} is not a JSON object") from error
  for key in ("use_dora", "lora_bias"):
    if config.get(key):
      raise UserError(f"{file}: {key} is not supported")
  return config


def _sort(file: pathlib.Path, tensors, layers, denoiser: str) -> tuple[dict, dict]:
  """`{module: {"a", "b"}}` and `{module: alpha}`; UserError for any tensor that is neither."""
  found, alphas = {}, {}
  for name in sorted(tensors):
    plain = name.removeprefix(f"{denoiser}.").replace(".processor.", ".")
    match = _FACTOR.fullmatch(plain)
    module = match["module"] if match else plain.removesuffix(".alpha")
    if module.endswith(".to_out"):           # the oldest names leave the place in the list out
      module += ".0"
    if module not in layers or not (match or plain.endswith(".alpha")):
      raise UserError(f"{file}: {name} is not an adapter of a layer of this {denoiser}")
    if not match:
      alphas[module] = float(tensors[name].reshape(-1)[0]) if tensors[name].size else 0.0
      continue
    factor = _FACTORS[match["new"] or match["old"]]
    if factor in found.setdefault(module, {}):
      raise UserError(f"{file}: {name} is there under two names")
    found[module][factor] = tensors[name]
  if not found:
    raise UserError(f"{file}: has no adapter")
  return found, alphas


def _scale(config: dict, module: str, rank: int, alpha: float | None) -> float:
  """What PEFT multiplies the product of the factors by: alpha / rank, or alpha / sqrt(rank)."""
  if alpha is None:
    # A key of the pattern is a regular expression for the end of the module's name.
    patterns = config.get("alpha_pattern") or {}
    alpha = next((value for key, value in patterns.items()
                  if re.match(rf"(.*\.)?({key})$", module)), config.get("lora_alpha", rank))
  return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
