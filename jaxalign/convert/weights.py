"""One network's weight files: found, read, checked tensor by tensor, and written."""
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import serialization, traverse_util

from jaxalign.convert import names
from jaxalign.convert.tensors import (
  PICKLES,
  check_finite,
  look,
  plain_names,
  read_msgpack,
  read_pickle,
  read_safetensors,
  read_sharded,
)
from jaxalign.errors import UserError
from jaxalign.models.pipeline import Stored
from jaxalign.storage.files import share

DTYPES = ("float32", "float16", "bfloat16")
# Buffers among the parameters, kept for the way back: position ids that old transformers versions
# saved, and the table of positions of Stable Diffusion 3.
_EXTRAS = ("position_ids", "pos_embed.pos_embed")
# Second names of one tensor, which some files of T5 have.
_TIED = {"encoder.embed_tokens.weight": "shared.weight"}
_SHOWN = 3  # tensors named per kind of mismatch


def _base(model: str, format: str) -> str:
  """The file name that transformers (CLIP towers) and diffusers (the rest) look for."""
  text = model.startswith(("text_encoder", "clip"))
  if format == "flax":
    return "flax_model.msgpack" if text else "diffusion_flax_model.msgpack"
  return "model.safetensors" if text else "diffusion_pytorch_model.safetensors"


def _read(source: pathlib.Path, model: str) -> tuple[pathlib.Path, str, dict[str, np.ndarray]]:
  """The weight file at or in `source`, its format and its tensors under their own names."""
  if source.is_file():
    readers = {".safetensors": _read_one, ".msgpack": read_msgpack,
               **dict.fromkeys(PICKLES, read_pickle)}
    if source.suffix not in readers:
      raise UserError(f"{source}: not a weight file, which ends in {', '.join(readers)}")
    format = "flax" if source.suffix == ".msgpack" else "diffusers"
    return source, format, readers[source.suffix](source)
  if not source.is_dir():
    raise UserError(f"{source}: no such file or folder")
  return _read_folder(source, model)


def _read_one(file: pathlib.Path) -> dict[str, np.ndarray]:
  return read_safetensors(file)[0]


def _read_folder(folder: pathlib.Path, model: str):
  torch, flax = _base(model, "diffusers"), _base(model, "flax")
  half = torch.replace(".safetensors", ".fp16.safetensors")
  for name, read, format in ((torch, _read_one, "diffusers"),
                             (f"{torch}.index.json", read_sharded, "diffusers"),
                             (half, _read_one, "diffusers"),
                             (f"{torch}.index.fp16.json", read_sharded, "diffusers"),
                             (f"{half}.index.json", read_sharded, "diffusers"),
                             (flax, read_msgpack, "flax")):
    if (folder / name).is_file():
      return folder / name, format, read(folder / name)
  pickled = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pt", ".ckpt")]
  if pickled:
    raise UserError(f"{folder / pickled[0]}: pickled weights are refused, they can run code when "
                    f"loaded; convert them to {torch}{look(folder / pickled[0])}")
  raise UserError(f"{folder}: no weights, looked for {torch}, {torch}.index.json, {half}, {flax}"
                  f"{look(folder)}")


def _check(file: pathlib.Path, expected: dict[str, tuple], tensors: dict[str, np.ndarray]) -> None:
  """UserError unless `tensors` has exactly the expected names, shapes and some known dtype."""
  problems = {
      "missing": [name for name in expected if name not in tensors],
      "unexpected": [name for name in tensors if name not in expected],
      "wrong shape": [f"{name} {tensors[name].shape} instead of {shape}"
                      for name, shape in expected.items()
                      if name in tensors and tensors[name].shape != shape],
      "wrong dtype": [f"{name} {tensors[name].dtype}" for name in expected
                      if name in tensors and str(tensors[name].dtype) not in DTYPES],
  }
  found = [f"{len(items)} {kind}: " + ", ".join(sorted(items)[:_SHOWN])
           + (", ..." if len(items) > _SHOWN else "")
           for kind, items in problems.items() if items]
  if found:
    raise UserError(f"{file}: tensors do not fit config.json ({'; '.join(found)}){look(file)}")


def load(source: pathlib.Path, model: str, shapes,
         adapt: Callable[[dict], dict] = lambda tensors: tensors, *,
         as_stored: bool = False) -> tuple[Any, dict, dict]:
  """Reads one network.

  Args:
    source: the folder that holds the weight file or files; or one file, named by the user.
    model: a network's folder in a checkpoint, "clip" (both towers) or "head".
    shapes: the expected tree of `jax.ShapeDtypeStruct`.
    adapt: `tensors -> tensors`, from the names and layouts of a PyTorch file to those of
      transformers or diffusers, before they are matched with `shapes`.
    as_stored: parameters stay in the dtype of the file.
  Returns:
    The tree of numpy arrays, f32 unless `as_stored`, `Stored` by parameter path, and tensors that
    are no parameters.
  Raises:
    UserError: no usable weights, or they do not fit `shapes`.
  """
  file, format, tensors = _read(source, model)
  if format == "diffusers":
    tensors = plain_names(tensors)
    if "embeddings.token_embedding.weight" in tensors:   # transformers 5 without its wrapper
      tensors = {f"text_model.{name}": x for name, x in tensors.items()}
    tensors = adapt(tensors)
  return fit(file, model, shapes, tensors, format=format, as_stored=as_stored)


def fit(file: pathlib.Path, model: str, shapes, tensors: dict[str, np.ndarray], *,
        format: str = "diffusers", as_stored: bool = False) -> tuple[Any, dict, dict]:
  """What `load` returns, of the `tensors` of `file`, which are taken out of the dict.

  Raises:
    UserError: they do not fit `shapes`, or a number is not finite.
  """
  shapes = {path: leaf.shape for path, leaf in
            traverse_util.flatten_dict(shapes, sep="/").items()}
  for name, own in _TIED.items():
    if name in tensors and own in tensors and np.array_equal(tensors[name], tensors[own]):
      del tensors[name]
  extras = {name: tensors.pop(name) for name in sorted(tensors) if name.endswith(_EXTRAS)}
  standard = {path: names.torch_name(path) for path in shapes}
  if model == "vae":  # old files keep the old attention names, which are also the Flax ones
    standard = {path: name if format == "diffusers" and name in tensors
                else names.new_vae_name(name) for path, name in standard.items()}
  if format == "flax":
    _check(file, shapes, tensors)
    check_finite(file, tensors)
    arrays = tensors
  else:
    _check(file, {standard[p]: names.torch_shape(p, s) for p, s in shapes.items()}, tensors)
    check_finite(file, tensors)
    # One after the other, so that a large network is not held twice.
    arrays = {path: names.from_torch(path, tensors.pop(standard[path])) for path in shapes}
  stored = {path: Stored(standard[path], str(arrays[path].dtype)) for path in shapes}
  params = {path: np.asarray(arrays.pop(path), None if as_stored else np.float32)
            for path in shapes}
  return traverse_util.unflatten_dict(params, sep="/"), stored, extras


def cast(path: str, x, dtype: str) -> np.ndarray:
  """`x` as numpy array of one of `DTYPES`; UserError if float16 cannot hold its values."""
  x = np.asarray(x)
  with np.errstate(over="ignore"):
    y = x.astype(jnp.dtype(dtype))
  if dtype == "float16" and np.isinf(y).any() and np.isfinite(x).all():
    raise UserError(f"dtype: {path} does not fit float16 (largest value {np.abs(x).max():.3g}); "
                    "save as bfloat16 or float32")
  return y


def save(folder: pathlib.Path, model: str, params, stored: dict[str, Stored],
         extras: dict[str, np.ndarray], *, format: str, dtype: str | None) -> None:
  """Writes one network's weight file; `dtype` None keeps each tensor's own (f32 if new)."""
  arrays = {}
  for path, x in traverse_util.flatten_dict(params, sep="/").items():
    name = names.new_vae_name(names.torch_name(path)) if model == "vae" else names.torch_name(path)
    target = stored.get(path, Stored(name, "float32"))
    x = cast(path, x, dtype or target.dtype)
    if format == "flax":
      arrays[path] = x
    else:
      arrays[target.name] = names.to_torch(path, x)
  file = folder / _base(model, format)
  if format == "flax":
    tree = traverse_util.unflatten_dict(arrays, sep="/")
    file.write_bytes(serialization.msgpack_serialize(tree))
  else:
    # transformers refuses a file that does not say who wrote it.
    safetensors.numpy.save_file({**arrays, **extras}, file, metadata={"format": "pt"})
    share(file)
