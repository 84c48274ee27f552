"""Command line: `python -m jaxalign.fid --weights=FILE --images=DIR --reference=DIR-or-FILE.npz`.

Frechet Inception distance of a folder of images (as `jaxalign.sample` writes it) to a reference:
another folder, or statistics (`mu`, `sigma`) that this command or PyTorch's FID programs have
written. The weights are `pt_inception-2015-12-05-6726825d.pth`, which those programs download.

The distance falls with the number of images: compare at equal numbers, 10,000 and more.
"""
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxalign import metrics
from jaxalign.config.command import Flags, run_command
from jaxalign.devices import processes, sharding
from jaxalign.errors import UserError
from jaxalign.metrics.inception import Inception, fit, load_inception
from jaxalign.storage.files import whole

_FLAGS = Flags()
_WEIGHTS = _FLAGS.define("string", "weights", None, "Inception's weights: .pth or .safetensors.")
_IMAGES = _FLAGS.define("string", "images", None, "Folder of images.")
_REFERENCE = _FLAGS.define("string", "reference", None, "Folder of images, or statistics (.npz).")
_SAVE = _FLAGS.define("string", "save", None, "File (.npz) for the reference's statistics.")
_BATCH = _FLAGS.define("integer", "batch", 32, "Images per call of the network.", lower_bound=1)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def image_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Images in a folder, in order, without the overview that `jaxalign.sample` adds."""
  if not folder.is_dir():
    raise UserError(f"{folder}: no such folder")
  files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)
  files = [f for f in files if f.name != "grid.png"]
  if len(files) < 2:
    raise UserError(f"{folder}: {len(files)} images ({', '.join(SUFFIXES)}); two are the least")
  return files


def features(params, files: list[pathlib.Path], batch: int, label: str = "images") -> np.ndarray:
  """`[N, 2048]` f32 of image files of any sizes.

  Raises:
    UserError: a file cannot be read; names it.
  """
  scale = jax.jit(fit)                                       # once for every size
  network = jax.jit(functools.partial(Inception().apply, {"params": params}))
  out = []
  with processes.progress(total=len(files), desc=label, unit="img", leave=False) as bar:
    for start in range(0, len(files), batch):
      part = files[start:start + batch]
      x = jnp.concatenate([scale(read_image(file)[None]) for file in part])
      x = jnp.pad(x, ((0, batch - len(part)), (0, 0), (0, 0), (0, 0)))
      out.append(np.asarray(network(x))[:len(part)])
      bar.update(len(part))
  return np.concatenate(out)


def read_image(file: pathlib.Path) -> np.ndarray:
  """`[H, W, 3]` f32 in [0, 1]; UserError, naming the file, where it cannot be read."""
  try:
    with Image.open(file) as image:
      return np.asarray(image.convert("RGB"), np.float32) / 255
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise UserError(f"{file}: cannot be read ({error})") from error


def _statistics(file: pathlib.Path) -> metrics.Moments:
  try:
    with np.load(file, allow_pickle=False) as arrays:
      moments = metrics.Moments(arrays["mu"], arrays["sigma"])
  except (OSError, ValueError, KeyError) as error:
    raise UserError(f"{file}: no statistics with mu and sigma ({error})") from error
  width = Inception.FEATURES
  if moments.mean.shape != (width,) or moments.covariance.shape != (width, width):
    raise UserError(f"{file}: mu {moments.mean.shape} and sigma {moments.covariance.shape} are not "
                    f"of {width} features")
  if not all(np.isfinite(x).all() for x in moments):
    raise UserError(f"{file}: mu or sigma hold numbers that are not finite")
  return moments


def main(argv) -> None:
  del argv
  sharding.use_cores()
  folder, reference = pathlib.Path(_IMAGES.value), pathlib.Path(_REFERENCE.value)
  files = image_files(folder)                                # before anything slow
  others = None if reference.suffix == ".npz" else image_files(reference)
  params = jax.device_put(load_inception(_WEIGHTS.value))
  if others is None:
    target = _statistics(reference)
  else:
    target = metrics.moments(features(params, others, _BATCH.value, str(reference)))
  if _SAVE.value:
    try:
      with whole(_SAVE.value.removesuffix(".npz") + ".npz") as file:
        np.savez(file, mu=target.mean, sigma=target.covariance)
    except OSError as error:
      raise UserError(f"--save={_SAVE.value}: {error}") from error
  drawn = metrics.moments(features(params, files, _BATCH.value, str(folder)))
  distance = metrics.frechet_between(drawn, target)
  counts = f"{len(files)} images" + (f" and {len(others)} of reference" if others else "")
  print(f"FID {distance:.4f} ({counts})")


if __name__ == "__main__":
  sys.exit(run_command(main, _FLAGS, required=("weights", "images", "reference")))
