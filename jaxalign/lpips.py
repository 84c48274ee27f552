"""Command line: `python -m jaxalign.lpips --weights=FILE --heads=FILE --images=DIR`.

LPIPS diversity of a folder that `jaxalign.sample` wrote: the mean distance between two samples of
one prompt. With `--reference=DIR`, such as the base model's samples from the same prompts and seed,
also the mean distance between images of the same name: what tuning has changed to the eye.

Weights: torchvision's AlexNet (`alexnet-owt-7be5be79.pth`) or VGG-16, and LPIPS's heads of version
0.1 (`alex.pth`, `vgg.pth`), which the `lpips` package brings.
"""
import functools
import itertools
import pathlib
import sys

import jax
import numpy as np

from jaxalign import metrics
from jaxalign.config.command import Flags, run_command
from jaxalign.devices import processes, sharding
from jaxalign.errors import UserError
from jaxalign.fid import image_files, read_image
from jaxalign.metrics.lpips import NETWORKS, load_lpips, lpips

_FLAGS = Flags()
_WEIGHTS = _FLAGS.define("string", "weights", None, "The classifier's: .pth or .safetensors.")
_HEADS = _FLAGS.define("string", "heads", None, "LPIPS's own: .pth or .safetensors.")
_IMAGES = _FLAGS.define("string", "images", None, "Folder of `jaxalign.sample`.")
_REFERENCE = _FLAGS.define("string", "reference", "", "Folder with images of the same names.")
_NETWORK = _FLAGS.define("enum", "network", "alex", list(NETWORKS), "Whose features.")
_BATCH = _FLAGS.define("integer", "batch", 32, "Pairs per call of the network.", lower_bound=1)


def by_prompt(files: list[pathlib.Path]) -> list[list[pathlib.Path]]:
  """The files of each prompt, whose names begin alike up to the last underscore.

  Raises:
    UserError: no prompt has two images.
  """
  named = [file for file in files if "_" in file.stem]
  groups = [list(group) for _, group in itertools.groupby(
      named, lambda file: file.stem.rpartition("_")[0])]
  groups = [group for group in groups if len(group) > 1]
  if not groups:
    raise UserError(f"{files[0].parent}: no two images of one prompt (PROMPT_SAMPLE.png)")
  return groups


def distances(params, network: str, pairs, batch: int, label: str) -> np.ndarray:
  """`[N]` distances of pairs of image files.

  Raises:
    UserError: a file cannot be read, is too small, or differs in size from its batch; names it.
  """
  measure = jax.jit(functools.partial(lpips, network))
  images = functools.lru_cache(maxsize=2 * batch)(read_image)
  out = []
  with processes.progress(total=len(pairs), desc=label, unit="pair", leave=False) as bar:
    for start in range(0, len(pairs), batch):
      part = pairs[start:start + batch]
      sides = [[images(pair[side]) for pair in part] for side in (0, 1)]
      for pair, a, b in zip(part, *sides):
        if a.shape != b.shape or a.shape != sides[0][0].shape:
          raise UserError(f"{pair[1]}: is of another size than {pair[0]}, or than {part[0][0]}")
        if min(a.shape[:2]) < 32:
          raise UserError(f"{pair[0]}: is {a.shape[1]} x {a.shape[0]} pixels; LPIPS needs 32")
      fill = lambda x: np.concatenate([np.stack(x), np.repeat(x[:1], batch - len(x), 0)])
      out.append(np.asarray(measure(params, *map(fill, sides)))[:len(part)])
      bar.update(len(part))
  return np.concatenate(out)


def main(argv) -> None:
  del argv
  sharding.use_cores()
  files = image_files(pathlib.Path(_IMAGES.value))           # before anything slow
  groups, same = by_prompt(files), None
  if _REFERENCE.value:
    others = {file.name: file for file in image_files(pathlib.Path(_REFERENCE.value))}
    same = [(file, others[file.name]) for file in files if file.name in others]
    if not same:
      raise UserError(f"--reference={_REFERENCE.value}: no image has the name of one in "
                      f"{_IMAGES.value}")
  network = _NETWORK.value
  params = jax.device_put(load_lpips(network, _WEIGHTS.value, _HEADS.value))
  pairs = [list(itertools.combinations(group, 2)) for group in groups]
  found = distances(params, network, sum(pairs, []), _BATCH.value, "within prompts")
  ends = np.cumsum([len(p) for p in pairs])[:-1]
  show = lambda m: f"{m['mean']:.4f}" + (f" ± {m['sem']:.4f}" if "sem" in m else "")
  means = np.array([part.mean() for part in np.split(found, ends)])
  print(f"LPIPS ({network}) within prompts {show(metrics.clustered_mean(means[:, None]))} "
        f"({len(groups)} prompts, {len(found)} pairs)")
  if same:
    apart = distances(params, network, same, _BATCH.value, "to the reference")
    print(f"LPIPS ({network}) to the reference {apart.mean():.4f} ({len(same)} images)")


if __name__ == "__main__":
  sys.exit(run_command(main, _FLAGS, required=("weights", "heads", "images")))
