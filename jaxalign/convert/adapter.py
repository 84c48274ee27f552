"""LoRA files of the diffusers world: PEFT's, kohya's, and the older ones of diffusers itself.

A file has, for each adapted layer, a matrix to the rank and one back, in PyTorch's layout, and says
by what the product is multiplied: in its metadata, in a JSON file beside it, or by an `alpha` for
each layer. Our factors (see `jaxalign.models.lora`) contain that number, so what is written has
alpha equal to the rank, and what is read has its scale multiplied into `b`.
"""
import json
import math
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy
from flax import traverse_util

from jaxalign.convert import lora_names, names, weights
from jaxalign.convert.tensors import PICKLES, check_finite, look, read_safetensors, refused
from jaxalign.errors import UserError
from jaxalign.storage.files import share, whole

FILE = "pytorch_lora_weights.safetensors"    # what `load_lora_weights` looks for in a folder
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAMES = ("peft", "kohya")

_METADATA = "lora_adapter_metadata"


def save_adapter(lora, folder, denoiser: str = "unet", *, text_encoders=None,
                 dtype: str = "float32", style: str = "peft") -> pathlib.Path:
  """Writes an adapter so that PyTorch's `pipeline.load_lora_weights(folder)` gives our images.

  Args:
    lora: the tree of `jaxalign.models.lora`.
    denoiser: what the pipeline calls the network that is adapted, `Pipeline.denoiser_name`.
    folder: made if missing; a file of this name in it is replaced, other files stay.
    text_encoders: name -> tree of each that the pipeline has, empty where it has no adapter.
    dtype: "float32", "float16" or "bfloat16".
    style: names of the layers: PEFT's, or "kohya" for ComfyUI, A1111 and kohya's trainers.
  Returns:
    The file, `pytorch_lora_weights.safetensors` in `folder`.
  Raises:
    UserError: a value does not fit float16.
    OSError: the folder cannot be written.
  """
  text_encoders = text_encoders or {}
  factors = {network: _factors(tree, dtype)
             for network, tree in {denoiser: lora, **text_encoders}.items() if tree}
  metadata, tensors, configs = {"format": "pt"}, {}, {}
  for network, own in factors.items():
    ranks = {module: len(a) for module, (a, _) in own.items()}
    rank = max(ranks.values())
    if style == "kohya":
      tensors |= lora_names.kohya_tensors(own, network, len(text_encoders) > 1)
      metadata.setdefault("ss_network_dim", str(rank))           # of the denoiser, the first one
      continue
    tensors |= {f"{network}.{module}.lora_{letter}.weight": x
                for module, pair in own.items() for letter, x in zip("AB", pair)}
    # PEFT matches the end of a name; the text encoders of transformers 5 have none that begins so.
    ranks = {lora_names.without_prefix(module): r for module, r in ranks.items()}
    other = {module: r for module, r in ranks.items() if r != rank}
    config = {"r": rank, "lora_alpha": rank, "rank_pattern": other, "alpha_pattern": other,
              "target_modules": sorted(ranks)}
    configs |= {f"{network}.{key}": value for key, value in config.items()}
  if style == "kohya":
    metadata |= {"ss_network_module": "networks.lora",
                 "ss_network_alpha": metadata["ss_network_dim"]}
  else:
    metadata[_METADATA] = json.dumps(configs, indent=2, sort_keys=True)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  with whole(folder / FILE) as file:
    safetensors.numpy.save_file(tensors, file, metadata=metadata)
    share(file)
  return folder / FILE


def _factors(lora, dtype: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """`{module: (a [r, in...], b [out, r...])}` in PyTorch's layout."""
  found, flat = {}, traverse_util.flatten_dict(lora, sep="/")
  for layer in (path.removesuffix("/a") for path in flat if path.endswith("/a")):
    a, b = (weights.cast(f"{layer}/{x}", flat[f"{layer}/{x}"], dtype) for x in "ab")
    # The way back of a convolution is a 1x1 one.
    found[lora_names.module_of(layer)] = names.to_torch("/kernel", a), names.to_torch(
        "/kernel", b[None, None] if a.ndim == 4 else b)
  return found


def load_adapter(path, params, denoiser: str = "unet"):
  """Reads an adapter of a denoiser alone; one that also has text encoders is refused.

  Args:
    path: as `load_adapters` takes it.
    params: arrays or `jax.ShapeDtypeStruct`, whose kernels it has to fit.
    denoiser: as in `save_adapter`.
  Returns:
    The tree of `jaxalign.models.lora`, numpy f32; alpha / rank is multiplied into `b`.
  """
  return load_adapters(path, {denoiser: params}, denoiser)[denoiser]


def load_adapters(path, params: dict[str, Any], denoiser: str) -> dict[str, Any]:
  """Reads an adapter of a denoiser, and of text encoders too.

  Args:
    path: a safetensors file, or a folder with `pytorch_lora_weights.safetensors`, PEFT's
      `adapter_model.safetensors` and `adapter_config.json`, or one safetensors file.
    params: network -> arrays or `jax.ShapeDtypeStruct`, whose kernels it has to fit.
    denoiser: which of them names without a network belong to.
  Returns:
    Network -> tree as `load_adapter` returns it, of those that the file has.
  Raises:
    UserError: one line that names the file, and the tensor at fault.
  """
  file = _find(pathlib.Path(path))
  tensors, metadata = read_safetensors(file)
  config = _config(file, metadata)
  kernels = {network: {name.removesuffix("/kernel"): x.shape for name, x in
                       traverse_util.flatten_dict(tree, sep="/").items()
                       if name.endswith("/kernel")} for network, tree in params.items()}
  found = _sort(file, tensors, lora_names.Layers(kernels, denoiser), denoiser)
  trees = {}
  for (network, layer), factors in found.items():
    module, kernel = lora_names.module_of(layer), kernels[network][layer]
    if not {"a", "b"} <= factors.keys():
      raise UserError(f"{file}: {module} has only one of its two factors")
    a, b = _fitted(file, module, factors["a"], factors["b"], kernel)
    scale = np.float32(_scale(file, config.get(network, {}), module, len(a),
                              factors.get("alpha")))
    a, b = (names.from_torch("/kernel", np.asarray(x, np.float32)) for x in (a, b))
    tree = trees.setdefault(network, {})
    tree[f"{layer}/a"] = a
    tree[f"{layer}/b"] = (b if len(kernel) == 2 else b[0, 0]) * scale
  return {network: traverse_util.unflatten_dict(tree, sep="/") for network, tree in trees.items()}


def _find(path: pathlib.Path) -> pathlib.Path:
  if path.is_dir():
    for name in (FILE, PEFT_FILE):
      if (path / name).is_file():
        return path / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
      return files[0]
    pickled = [p for p in sorted(path.iterdir()) if p.suffix in PICKLES]
    if not pickled:
      raise UserError(f"{path}: has no {FILE}, no {PEFT_FILE}, and not just one safetensors file")
    path = pickled[0]
  if not path.is_file():
    raise UserError(f"{path}: no such file or folder")
  if path.suffix in PICKLES:
    raise refused(path)
  return path


def _config(file: pathlib.Path, metadata: dict[str, str]) -> dict[str, dict]:
  """PEFT's `LoraConfig` of each network as far as the file has it; refuses what LoRA is not."""
  where, beside = f"{file}: {_METADATA}", file.with_name(PEFT_CONFIG)
  try:
    if file.name == PEFT_FILE and beside.is_file():
      where = str(beside)
      config = json.loads(beside.read_text(encoding="utf-8"))
      if config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{where}: peft_type {lora_names.json_like(config['peft_type'])} is not "
                        "supported (LORA)")
      config = {f"{network}.{key}": value for key, value in config.items()
                for network in lora_names.KOHYA}
    else:
      config = json.loads(metadata.get(_METADATA, "{}"))
    found = {}
    for key, value in config.items():
      network, _, key = key.partition(".")
      found.setdefault(network, {})[key] = value
  except (ValueError, AttributeError, RecursionError) as error:
    raise UserError(f"{where} is not a JSON object") from error
  for own in found.values():
    for key in ("use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save"):
      if own.get(key):
        raise UserError(f"{where}: {key} is not supported")
  return found


def _sort(file: pathlib.Path, tensors, layers, denoiser: str) -> dict[tuple[str, str], dict]:
  """`{(network, layer): {"a", "b", "alpha"}}`; UserError for any tensor that is none of these."""
  other = lora_names.other_kind(tensors)
  if other:
    raise UserError(f"{file}: {other[0]} ({other[1]}), which is not supported; plain LoRA is"
                    f"{look(file)}")
  check_finite(file, tensors)
  found = {}
  for name in sorted(tensors):
    module, factor = lora_names.parse(name) or (name, "")
    places = layers.find(module) if factor else []
    if not places:
      raise UserError(f"{file}: {name} is not an adapter of a layer of this {denoiser}"
                      f"{_of_another(name, denoiser)}{look(file)}")
    for network, layer, place in places:
      own = found.setdefault((network, layer), {})
      if factor in own:
        raise UserError(f"{file}: {name} is there under two names")
      x = tensors[name]
      if factor == "b" and place.parts > 1 and x.ndim and x.shape[0] % place.parts == 0:
        x = np.split(x, place.parts)[place.part]
      own[factor] = x
  if not any("a" in own or "b" in own for own in found.values()):
    raise UserError(f"{file}: has no adapter{look(file)}")
  return found


def _of_another(name: str, denoiser: str) -> str:
  return (", nor of its text encoders" if name.startswith(("text_encoder", "lora_te"))
          else "" if denoiser in name else f"; for a {denoiser} of another family")


def _fitted(file: pathlib.Path, module: str, a, b, kernel: tuple[int, ...]):
  """Both factors in the shapes that a layer with this kernel needs; UserError where they are not.

  A 1x1 convolution and a linear layer are the same thing.
  """
  rank, flat = (a.shape[0] if a.ndim else 0), len(kernel) == 2
  if flat:
    a, b = (x[:, :, 0, 0] if x.shape[2:] == (1, 1) else x for x in (a, b))
  elif kernel[:2] == (1, 1):
    a, b = (x[:, :, None, None] if x.ndim == 2 else x for x in (a, b))
  wanted = {"lora_A": (a, (rank, kernel[0]) if flat else (rank, kernel[2], *kernel[:2])),
            "lora_B": (b, (kernel[-1], rank) if flat else (kernel[-1], rank, 1, 1))}
  for name, (x, shape) in wanted.items():
    if x.shape != shape or not rank:
      raise UserError(f"{file}: {module}.{name} has shape {x.shape} instead of {shape}")
    if str(x.dtype) not in weights.DTYPES:
      raise UserError(f"{file}: {module}.{name} has dtype {x.dtype}")
  return a, b


def _scale(file: pathlib.Path, config: dict, module: str, rank: int, stored) -> float:
  """What PEFT multiplies the product of the factors by: alpha / rank, or alpha / sqrt(rank)."""
  if stored is not None:
    if stored.size != 1:
      raise UserError(f"{file}: {module}.alpha has shape {stored.shape}, not one number")
    alpha = float(stored.reshape(-1)[0])
  else:
    alpha = lora_names.pattern_value(f"{file}: alpha_pattern", config.get("alpha_pattern") or {},
                                     module, config.get("lora_alpha", rank))
  if type(alpha) not in (int, float) or not abs(alpha) <= 1e6:
    raise UserError(f"{file}: alpha of {module} is {lora_names.json_like(alpha)}, "
                    "no number below 1e6")
  return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
