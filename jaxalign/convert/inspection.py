"""What a file or folder is, in a few lines: family, prediction, numbers, and how to use it.

Reads headers and configs, no weights but a few small ones; a pickle is not opened at all.
"""
import collections
import json
import math
import pathlib
import re

import numpy as np

from jaxalign.config.places import existing
from jaxalign.convert import lora_names, single
from jaxalign.convert.adapter import FILE, PEFT_CONFIG, PEFT_FILE
from jaxalign.convert.directory import load_pipeline, read_json
from jaxalign.convert.tensors import (
  PICKLES,
  SCALES,
  check_pointer,
  outline,
  plain_names,
  read_safetensors,
)
from jaxalign.errors import UserError
from jaxalign.models.pipeline import Pipeline
from jaxalign.sampling import Schedule

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
           "F8_E4M3": "float8_e4m3", "F8_E5M2": "float8_e5m2"}
_FAMILIES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x",
             "sdxl": "Stable Diffusion XL", "sd3": "Stable Diffusion 3.x"}
_BY_CONTEXT = {768: "sd1", 1024: "sd2", 2048: "sdxl"}     # width of what the UNet reads
_LAUNCH = "python -m jaxalign.launch --config=configs/nabla_gfn.py"


def inspect(path) -> dict[str, str]:
  """Name -> text of the lines about a file or folder.

  Raises:
    UserError: it does not exist, or is damaged; one line that names the file.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    return _folder(path)
  check_pointer(existing(path))
  if path.suffix in PICKLES:
    return {"what": f"a pickle ({path.suffix}), not opened: it can run code when loaded",
            "use": "convert it to safetensors; or name it as model.path or model.unet, where torch "
                   "reads it with weights_only"}
  if path.suffix == ".json":
    return _json(path)
  if path.suffix == ".safetensors":
    return _tensors(path)
  return {"what": f"no file of weights ({path.stat().st_size:,} bytes)",
          "use": "weights end in .safetensors; prompts and pairs see docs/files.md"}


def _json(file: pathlib.Path) -> dict[str, str]:
  content = read_json(file)
  if "weight_map" in content:
    return {"what": "the index of a network in several files", "use": f"name its folder, "
            f"{file.parent}"}
  kind = content.get("_class_name") or content.get("model_type") or content.get("peft_type")
  return {"what": f"a configuration of {kind}" if kind else "a JSON file",
          "use": f"name its folder, {file.parent}"}


def _folder(folder: pathlib.Path) -> dict[str, str]:
  if (folder / "model_index.json").is_file():
    return _pipeline(folder)
  if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
    return {"what": "the folder of a run",
            "use": f'python -m jaxalign.sample --checkpoint={folder} --prompts="..." --output=out'}
  for name in (FILE, PEFT_FILE):
    if (folder / name).is_file():
      return _tensors(folder / name)
  if (folder / PEFT_CONFIG).is_file():
    return {"what": "a folder of PEFT", "missing": PEFT_FILE}
  if (folder / "config.json").is_file():
    return _network(folder)
  files = sorted(folder.glob("*.safetensors"))
  if len(files) == 1:
    return _tensors(files[0])
  return {"what": f"a folder with {len(files)} safetensors files and neither model_index.json nor "
          "config.json", "use": "name one of its files" if files else "nothing in it is a model"}


def _pipeline(folder: pathlib.Path) -> dict[str, str]:
  kind = read_json(folder / "model_index.json").get("_class_name")
  lines = {"what": f"a diffusers directory, {kind}"}
  try:
    pipeline = load_pipeline(folder, shapes_only=True)
  except UserError as error:
    return {**lines, "missing": str(error)}
  lines |= _of(pipeline)
  kinds, without = collections.Counter(), []
  for name in pipeline.networks:
    files = sorted((folder / name).glob("*.safetensors"))
    flax = list((folder / name).glob("*.msgpack"))
    if not files and not flax:
      without.append(f"weights of {name}")
    # A checkpoint may lie there in full and in half precision.
    for file in [f for f in files if ".fp16" not in f.name] or files:
      kinds += _dtypes(outline(file)[0])
  lines["dtype"] = _shares(kinds) or "of Flax's files"
  lines["missing"] = ", ".join(without) or "nothing"
  return lines | {"use": f"{_LAUNCH} --config.model.path={folder}"}


def _of(pipeline: Pipeline) -> dict[str, str]:
  """Prediction and sizes."""
  count = lambda tree: sum(math.prod(leaf.shape) for leaf in _leaves(tree))
  height, width = pipeline.image_size
  sizes = ", ".join(f"{name} {_short(count(pipeline.params[name]))}" for name in pipeline.networks)
  try:
    schedule = Schedule.from_config(pipeline.scheduler_config)
    prediction = schedule.prediction
    if schedule.alphas[-1] == 0 and not schedule.is_flow:
      prediction += ", from noise alone (zero terminal SNR)"
    if schedule.one_step is not None:
      prediction += f", one step at {schedule.one_step}"
  except UserError as error:
    prediction = f"not supported: {error}"
  return {"prediction": prediction, "sizes": f"{sizes} numbers; images of {height} x {width}"}


def _leaves(tree):
  return [leaf for value in tree.values() for leaf in _leaves(value)] if isinstance(
      tree, dict) else [tree]


def _short(number: int) -> str:
  for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
    if number >= size:
      return f"{number / size:.3g}{unit}"
  return str(number)


def _dtypes(shapes) -> collections.Counter:
  """Numbers of each dtype."""
  found = collections.Counter()
  for name, (kind, shape) in shapes.items():
    scaled = any(f"{name.removesuffix('.weight')}{end}" in shapes for end in SCALES)
    found[_DTYPES.get(kind, kind.lower()) + " with scales" * scaled] += math.prod(shape)
  return found


def _shares(kinds: collections.Counter) -> str:
  total = sum(kinds.values()) or 1
  return ", ".join(kind if len(kinds) == 1 else f"{kind} {100 * n / total:.0f} %"
                   for kind, n in kinds.most_common(3) if n)


def _network(folder: pathlib.Path) -> dict[str, str]:
  config = read_json(folder / "config.json")
  kind = config.get("_class_name") or config.get("model_type") or "network"
  files = sorted(folder.glob("*.safetensors"))
  use = {"UNet2DConditionModel": f"model.unet={folder}", "clip": f"reward clip_score:{folder}",
         "SD3Transformer2DModel": f"model.unet={folder}"}.get(kind)
  lines = {"what": f"one network, {kind}"}
  if files:
    lines["dtype"] = _shares(sum((_dtypes(outline(file)[0]) for file in files),
                                 collections.Counter()))
  lines["missing"] = "nothing" if files else "its weights, *.safetensors"
  return lines | {"use": use or "as part of a diffusers directory"}


def _tensors(file: pathlib.Path) -> dict[str, str]:
  named, metadata = outline(file)
  named = plain_names(named)
  lines = {"dtype": _shares(_dtypes(named)),
           "sizes": f"{len(named):,} tensors, {_short(sum(_dtypes(named).values()))} numbers"}
  shapes = {name: shape for name, (_, shape) in named.items()}
  if other := lora_names.other_kind(shapes):
    return {"what": f"{other[0]} ({other[1]})", **lines,
            "use": "not supported; of adapters, plain LoRA is"}
  factors = {name: lora_names.parse(name) for name in shapes}
  if any(found and found[1] in "ab" for found in factors.values()):
    return _lora(file, shapes, factors, metadata, lines)
  if any(name.startswith((single.UNET, "cond_stage_model.", "conditioner.", "text_encoders.",
                          "control_model.")) for name in shapes) or any(
                              "double_blocks." in name for name in shapes):
    return _single(file, shapes, lines)
  denoisers = {"down_blocks.": "UNet", "input_blocks.": "UNet", "joint_blocks.": "SD 3 transformer",
               "transformer_blocks.": "SD 3 transformer"}
  for mark, kind in denoisers.items():
    if any(name.startswith(mark) for name in shapes):
      return {"what": f"a {kind} alone", **lines,
              "use": f"{_LAUNCH} --config.model.path=DIR --config.model.unet={file}"}
  for mark, kind in (("decoder.", "an autoencoder"), ("text_model.", "a CLIP text encoder"),
                     ("encoder.block.", "a T5 encoder"), ("visual.", "a CLIP of open_clip")):
    if any(name.startswith(mark) for name in shapes):
      return {"what": f"{kind} alone", **lines, "use": "as part of a directory"}
  return {"what": "tensors of an unknown kind, such as "
          + ", ".join(sorted(shapes)[:3] or ["none at all"]), **lines,
          "use": "nothing here reads it"}


def _single(file: pathlib.Path, shapes, lines) -> dict[str, str]:
  try:
    family = single.family_of(shapes, file)
    what = f"a single-file checkpoint, {_FAMILIES[family]}"
    pipeline = single.load_single(file, shapes_only=True)
  except UserError as error:
    return {"what": str(error).partition("; what it is:")[0], **lines,
            "use": "only as the first line says"}
  return {"what": what, **_of(pipeline), "dtype": lines["dtype"], "missing": "nothing",
          "use": f"{_LAUNCH} --config.model.path={file}"}


def _lora(file: pathlib.Path, shapes, factors, metadata, lines) -> dict[str, str]:
  networks, ranks, style, family = collections.Counter(), collections.Counter(), "", ""
  for name, found in factors.items():
    if not found or found[1] != "a":
      continue
    module = found[0]
    network = re.match(r"(lora_(?:unet|transformer|te\d?)|unet|transformer|text_encoder(?:_\d)?"
                       r"|diffusion_model)[._]", module)
    networks[network[1] if network else "unnamed"] += 1
    ranks[shapes[name][0] if shapes[name] else 0] += 1
    style = style or ("kohya's" if module.startswith("lora_") else
                      "PEFT's" if "lora_A" in name else "diffusers' older ones")
    if "joint_blocks" in module or network and "transformer" in network[1]:
      family = "sd3"
    elif re.search(r"attn2[._]to_k$", module) and len(shapes[name]) > 1:
      family = family or _BY_CONTEXT.get(shapes[name][1], "")
  alphas = _alphas(file, factors, metadata)
  parts = ", ".join(f"{count} layers of {name}" for name, count in networks.most_common())
  return {
      "what": f"a LoRA with {style} names" + (f", for {_FAMILIES[family]}" if family else ""),
      "rank": ", ".join(str(rank) for rank, _ in ranks.most_common(4)) + f"; alpha {alphas}",
      "layers": parts, **lines,
      "use": f"{_LAUNCH} --config.model.path=MODEL --config.model.lora={file} "
             f"--config.model.lora_rank={ranks.most_common(1)[0][0]}, or with "
             "--config.model.adapter=full, merged"}


def _alphas(file: pathlib.Path, factors, metadata) -> str:
  names = [name for name, found in factors.items() if found and found[1] == "alpha"]
  if names:
    values = read_safetensors(file, set(names))[0].values()
    return ", ".join(sorted({f"{float(np.ravel(x)[0]):g}" for x in values if np.size(x)})[:4])
  try:
    if file.name == PEFT_FILE and file.with_name(PEFT_CONFIG).is_file():
      return lora_names.json_like(read_json(file.with_name(PEFT_CONFIG)).get("lora_alpha"))
    config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    found = {lora_names.json_like(value) for key, value in config.items()
             if key.endswith("lora_alpha")}
  except (ValueError, AttributeError, RecursionError):
    return "in metadata that cannot be read"
  return ", ".join(sorted(found)) or "not said (taken for the rank)"
