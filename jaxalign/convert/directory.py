"""Pipeline directories in diffusers' layout, for its PyTorch and its Flax classes."""
import dataclasses
import importlib.util
import json
import pathlib
import re
from collections.abc import Sequence

import jax

from jaxalign.convert import single, weights
from jaxalign.convert.tensors import check_pointer, look
from jaxalign.errors import UserError
from jaxalign.models.pipeline import Pipeline, families
from jaxalign.models.tokenizer import load_tokenizer
from jaxalign.storage.files import UNFINISHED, whole_folder

FORMATS = ("diffusers", "flax", "single")
_INDEX = "model_index.json"


def load_pipeline(path, *, unet: str = "", dtype="float32", remat: str = "none",
                  shapes_only: bool = False) -> Pipeline:
  """Reads a checkpoint of a family that there is a file of in `jaxalign.models`.

  Args:
    path: directory in diffusers' layout with safetensors (one file or sharded) or Flax msgpack
      weights; or a single-file checkpoint, see `single`; or a hub id `organisation/name`, if
      `huggingface_hub` is installed.
    unet: weights that take the place of the directory's denoiser, of the same architecture: a file,
      or a folder like `unet/`. Only here a pickled file is read, through torch's `weights_only`.
    dtype: what the networks compute in; parameters are f32 in any case.
    remat: "none" or "block": blocks of the networks are computed again in the backward pass.
    shapes_only: reads no weights, of which there need be none; `params` are shapes then.
  Raises:
    UserError: one line that names the file or config key at fault.
  """
  if pathlib.Path(path).is_file():
    pipeline = _from_file(pathlib.Path(path), dtype, remat, shapes_only)
    return pipeline if shapes_only or not unet else _with_denoiser(pipeline, pathlib.Path(unet))
  folder = _resolve(path)
  index = read_json(folder / "model_index.json")
  configs, tokenizers = {"model_index": index}, {}
  components = _check_index(folder / "model_index.json", index)
  for name in components:
    if not (folder / name).is_dir():
      raise UserError(f"{folder / name}: component is missing")
    if not name.startswith("tokenizer"):
      configs[name] = read_json(folder / name / _config_file(name))
  for name in components:
    if name.startswith("tokenizer"):
      encoder = configs.get(name.replace("tokenizer", "text_encoder"), {})
      tokenizers[name] = load_tokenizer(index[name][1], folder / name, _positions(encoder))
  try:
    pipeline = Pipeline.build(configs, tokenizers, {}, dtype=dtype, remat=remat)
  except UserError as error:
    raise UserError(f"{folder}: {error}") from error
  for name in pipeline.text_encoders:
    tokenizer = name.replace("text_encoder", "tokenizer")
    has, takes = tokenizers[tokenizer].vocab_size, pipeline.networks[name].config.vocab_size
    if has > takes:
      raise UserError(f"{folder / tokenizer}: has ids up to {has - 1}, and {name} takes them up to "
                      f"{takes - 1}")
  shapes = pipeline.param_shapes()
  if shapes_only:
    return dataclasses.replace(pipeline, params=shapes)
  params, stored, extras = {}, {}, {}
  for name in pipeline.networks:
    if unet and name == pipeline.denoiser_name:
      continue
    params[name], stored[name], extras[name] = weights.load(
        folder / name, name, shapes[name], as_stored=name in pipeline.as_stored)
  pipeline = dataclasses.replace(pipeline, params=params, stored=stored, extras=extras)
  return _with_denoiser(pipeline, pathlib.Path(unet)) if unet else pipeline


def _from_file(file: pathlib.Path, dtype, remat, shapes_only: bool) -> Pipeline:
  if file.suffix not in single.SUFFIXES:
    raise UserError(f"{file}: neither a directory nor a checkpoint file, which ends in "
                    f"{', '.join(single.SUFFIXES)}")
  return single.load_single(file, dtype=dtype, remat=remat, shapes_only=shapes_only)


def _with_denoiser(pipeline: Pipeline, source: pathlib.Path) -> Pipeline:
  """The pipeline with the denoiser's weights in `source`, in diffusers' or the original names."""
  name = pipeline.denoiser_name
  shapes = pipeline.param_shapes()[name]
  params, stored, extras = weights.load(
      source, name, shapes, lambda tensors: single.denoiser_tensors(tensors, pipeline, shapes),
      as_stored=name in pipeline.as_stored)
  return dataclasses.replace(
      pipeline, params={**pipeline.params, name: params},
      stored={**pipeline.stored, name: stored}, extras={**pipeline.extras, name: extras})


def save_pipeline(pipeline: Pipeline, path, *, format: str = "diffusers", params=None,
                  dtype: str | None = None) -> None:
  """Writes a checkpoint directory; a new one appears whole or not at all.

  A checkpoint already at `path` has its components replaced, once the new ones are on disk; other
  files in it stay. Where a process was killed meanwhile, the next one writes the whole again.

  Args:
    pipeline: what to write.
    path: the directory; new, empty, or a checkpoint.
    format: "diffusers" for the PyTorch class that it was read from, "flax" for its Flax form, which
      few families have, "single" for one file, as which `path` then is.
    params: `{"vae": tree, ...}` to write instead of the pipeline's own; may name some models only.
    dtype: "float32", "float16" or "bfloat16"; None keeps each tensor as it was stored.
  Raises:
    UserError: `path` holds something else, or the model does not exist in that format.
  """
  if format not in FORMATS:
    raise UserError(f"format: {format!r} is not one of {', '.join(FORMATS)}")
  if dtype is not None and dtype not in weights.DTYPES:
    raise UserError(f"dtype: {dtype!r} is not one of {', '.join(weights.DTYPES)}")
  if format == "single":
    _check_params(pipeline.params, {**pipeline.params, **(params or {})})
    single.save_single(dataclasses.replace(pipeline, params={**pipeline.params, **(params or {})}),
                       path, dtype=dtype)
    return
  if format not in pipeline.formats:
    raise UserError(f"format: {format} is not written for {type(pipeline).__name__}")
  params = {**pipeline.params, **(params or {})}
  _check_params(pipeline.params, params)
  path = pathlib.Path(path)
  if path.exists() and not any((path / name).is_file() for name in (_INDEX, UNFINISHED)) and (
      not path.is_dir() or any(path.iterdir())):
    raise UserError(f"{path}: exists and is not a checkpoint; not overwritten")
  configs = pipeline.export_configs(format)
  for name in pipeline.text_encoders:
    for key in ("dtype", "torch_dtype"):  # newer transformers versions load in this dtype
      if dtype and key in configs[name]:
        configs[name][key] = dtype
  # Without its index, which goes first and comes back last, the directory is not a checkpoint.
  with whole_folder(path, removed=_folders(), last=_INDEX) as new:
    for name in (*pipeline.networks, "scheduler"):
      (new / name).mkdir(parents=True)
      _write_json(new / name / _config_file(name), configs[name])
    for name in pipeline.networks:
      weights.save(new / name, name, params[name], pipeline.stored.get(name, {}),
                   pipeline.buffers.get(name, {}), format=format, dtype=dtype)
    for name, tokenizer in pipeline.tokenizers.items():
      tokenizer.save(new / name)
    _write_json(new / _INDEX, configs["model_index"])


def _folders() -> list[str]:
  """All folders that a checkpoint of any family may have."""
  return sorted({name for family in families().values() for name in family.components})


def _resolve(path) -> pathlib.Path:
  patterns = ["model_index.json"] + [f"{name}/*" for name in _folders()]
  # Half-precision variants only where there is nothing else: with the rest they can be 30 GB more.
  folder = find_folder(path, patterns, ["*.fp16*"])
  if folder != pathlib.Path(path) and not all(
      any(file.suffix in (".safetensors", ".msgpack") for file in config.parent.iterdir())
      for config in folder.glob("*/config.json")):
    folder = find_folder(path, patterns)
  if not (folder / "model_index.json").is_file():
    raise UserError(f"{folder}: not a diffusers directory, it has no model_index.json"
                    f"{look(folder)}")
  return folder


def find_folder(path, patterns: list[str], ignored: Sequence[str] = ()) -> pathlib.Path:
  """The local directory of `path`; of a hub id, the files that match `patterns` are downloaded.

  Those that match `ignored` too are not, nor pickled and foreign ones.

  Raises:
    UserError: neither a directory nor a hub id that can be downloaded.
  """
  folder = pathlib.Path(path)
  if folder.is_dir():
    return folder
  if folder.exists():
    raise UserError(f"{folder}: not a directory")
  if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)):
    raise UserError(f"{path}: not a directory, nor a hub id of the form organisation/name")
  if importlib.util.find_spec("huggingface_hub") is None:
    raise UserError(f"{path}: not a directory; a download from the hub needs huggingface_hub")
  import huggingface_hub
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(
        str(path), allow_patterns=patterns,
        ignore_patterns=["*.bin", "*.ckpt", "*non_ema*", "*.onnx*", *ignored]))
  except Exception as error:  # the library raises its own errors and those of its HTTP client
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"{path}: not a directory, and the hub download failed: {reason}") from error


def read_json(file: pathlib.Path) -> dict:
  check_pointer(file)
  try:
    content = json.loads(file.read_text(encoding="utf-8"))
  except OSError as error:
    raise UserError(f"{file}: cannot be read ({error.strerror})") from error
  except (ValueError, RecursionError) as error:
    raise UserError(f"{file}: not valid JSON ({error})") from error
  if not isinstance(content, dict):
    raise UserError(f"{file}: not a JSON object")
  return content


def _write_json(file: pathlib.Path, content: dict) -> None:
  file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _positions(encoder: dict) -> int | None:
  """Tokens that a text encoder takes, where its config is sound; T5 takes any number."""
  found = encoder.get("max_position_embeddings", 77)
  return found if type(found) is int and found >= 2 else None


def _config_file(name: str) -> str:
  return "scheduler_config.json" if name == "scheduler" else "config.json"


def _check_index(file: pathlib.Path, index: dict) -> list[str]:
  """Folders of the components that this `model_index.json` names; UserError for what we lack."""
  kind = str(index.get("_class_name"))
  flax = [name for name, family in families().items() if "flax" in family.formats]
  name = kind.removeprefix("Flax") if kind.removeprefix("Flax") in flax else kind
  if name not in families():
    raise UserError(f"{file}: _class_name {kind!r} is not supported (only "
                    f"{', '.join(families())}, and the Flax form of {', '.join(flax)})")
  family, found = families()[name], []
  for name, classes in family.components.items():
    value = index.get(name)
    if name in family.optional and (value is None or isinstance(value, list) and None in value):
      continue
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)):
      raise UserError(f"{file}: component {name!r} is missing")
    if classes and value[1].removeprefix("Flax") not in classes:
      raise UserError(f"{file}: {name} of class {value[1]!r} is not supported "
                      f"(only {' or '.join(classes)})")
    found.append(name)
  return found


def _check_params(own: dict, given: dict) -> None:
  """ValueError unless `given` has the names and shapes of the pipeline's own parameters."""
  for name in own:
    shapes = [jax.tree.map(lambda x: tuple(x.shape), tree[name]) for tree in (own, given)]
    if shapes[0] != shapes[1]:
      raise ValueError(f"params: the {name} tree differs from the pipeline's in names or shapes")
