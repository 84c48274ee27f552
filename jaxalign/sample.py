"""Command line: `python -m jaxalign.sample --checkpoint=DIR --prompts=FILE|"text" --output=DIR`.

Draws pictures. `DIR` is a run's folder, any checkpoint directory, or `jaxalign:NAME` for a model
that is shipped. Writes one PNG an image as soon as it is drawn, `grid.png` (the first prompts) and,
when all is there, `samples.jsonl`.
"""
import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
from PIL import Image

from jaxalign import viz
from jaxalign.config.command import Flags, run_command
from jaxalign.config.places import checkpoint_path
from jaxalign.config.schema import SampleConfig
from jaxalign.data.prompts import read_prompts
from jaxalign.errors import UserError
from jaxalign.storage.files import whole

_FLAGS = Flags()
_CHECKPOINT = _FLAGS.define("string", "checkpoint", None, "Run folder or checkpoint directory.")
_PROMPTS = _FLAGS.define("string", "prompts", None, "Text file, one prompt a line; or a prompt.")
_OUTPUT = _FLAGS.define("string", "output", None, "Folder for the images.")
_N = _FLAGS.define("integer", "n", 4, "Images per prompt.", lower_bound=1)
_SEED = _FLAGS.define_seed("Same seed, prompts and n: same images.")
_NEGATIVE = _FLAGS.define("string", "negative_prompt", "", "What to steer away from.")
_STEPS = _FLAGS.define("integer", "steps", None,
                        "Denoising steps; those of the run, else 20 (28 on a flow).")
_GUIDANCE = _FLAGS.define("float", "guidance", None,
                           "Guidance scale; that of the run, else 3 (7 on a flow).")
_ETA = _FLAGS.define("float", "eta", None,
                      "Noise of the sampler; that of the run, else 1 (0 on a flow).")
_HEIGHT = _FLAGS.define("integer", "height", None, "Pixels; as in the run, else the model's.")
_WIDTH = _FLAGS.define("integer", "width", None, "Pixels; as in the run, else the model's.")
_BATCH = _FLAGS.define("integer", "batch", 32, "Images per device program.", lower_bound=1)
_DTYPE = _FLAGS.define("enum", "dtype", None, ["float32", "bfloat16"],
                       "What networks compute in; that of the run, else float32.")
_GRID = 32, 16         # rows and columns of grid.png, at most
_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".yaml", ".parquet")   # of files


def _prompts(text: str) -> list[str]:
  """The prompts of the file `text`, or `text` itself.

  Raises:
    UserError: it is meant to be a file, which does not exist: has no blanks, but slashes or a
      suffix of text files. A sentence may have slashes; only ".txt" ends none.
  """
  if text.startswith("jaxalign:") or os.path.isfile(text):     # a long prompt is no path
    return read_prompts("--prompts", text)
  looks_so = os.sep in text or text.endswith(_SUFFIXES)
  if text.endswith(".txt") or looks_so and not any(map(str.isspace, text)):
    raise UserError(f"--prompts={text}: no such file")
  return [text]


def _write(output: pathlib.Path, images: Iterator[np.ndarray], prompts: list[str], n: int) -> None:
  """Every image as it comes, the grid as soon as its own are there, at last `samples.jsonl`.

  Each appears whole or not at all; what an earlier run listed is no longer true from the start.
  """
  for stale in ("samples.jsonl", "grid.png"):
    (output / stale).unlink(missing_ok=True)
  rows, columns = min(len(prompts), _GRID[0]), min(n, _GRID[1])
  shown = []
  with whole(output / "samples.jsonl") as file, file.open("w") as listing:
    for count, image in enumerate(image for part in images for image in part):
      p, i = divmod(count, n)
      name = f"{p:04d}_{i:02d}.png"
      with whole(output / name) as picture:
        Image.fromarray(image).save(picture)
      listing.write(json.dumps({"file": name, "prompt": prompts[p], "seed": _SEED.value,
                                "negative_prompt": _NEGATIVE.value}) + "\n")
      if p < rows and i < columns:
        shown.append(image.copy())         # a view would keep its whole batch
        if len(shown) == rows * columns:
          grid = np.stack(shown).reshape((rows, columns) + image.shape)
          viz.save_grid(grid, output / "grid.png", row_labels=prompts[:rows])
          del grid
          shown.clear()


def main(argv) -> None:
  del argv
  checkpoint, prompts = checkpoint_path(_CHECKPOINT.value), _prompts(_PROMPTS.value)
  # These take seconds, which a wrong flag need not.
  from jaxalign.devices import sharding
  from jaxalign.train.generation import batches
  from jaxalign.train.opening import own_sampler
  from jaxalign.train.restore import load_tuned, run_config
  sharding.use_cores()
  cfg = run_config(checkpoint) if checkpoint.is_dir() else None
  chosen = {"steps": _STEPS.value, "guidance": _GUIDANCE.value, "eta": _ETA.value,
            "height": _HEIGHT.value, "width": _WIDTH.value}
  pipeline = load_tuned(checkpoint, _DTYPE.value)
  base = (cfg.sample if cfg else own_sampler(pipeline)).__dict__
  sample = SampleConfig(**{**base, **{k: v for k, v in chosen.items() if v is not None}})
  # Checks sampler and sizes before a folder is made.
  images = batches(pipeline, prompts, _N.value, seed=_SEED.value, sample=sample,
                   negative_prompt=_NEGATIVE.value, batch=_BATCH.value)
  output = pathlib.Path(_OUTPUT.value)
  try:
    output.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"--output={output}: {error}") from error
  cut = pipeline.cut([text for text in (*prompts, _NEGATIVE.value) if text])
  if cut:
    print(cut)
  try:
    with contextlib.closing(images):     # ends the bar before an error is shown
      _write(output, images, prompts, _N.value)
  except OSError as error:
    raise UserError(f"--output={output}: {error}") from error
  print(f"{len(prompts) * _N.value} images in {output}")


if __name__ == "__main__":
  sys.exit(run_command(main, _FLAGS, required=("checkpoint", "prompts", "output")))
