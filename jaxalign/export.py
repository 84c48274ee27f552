"""Command line: `python -m jaxalign.export --checkpoint=DIR --format=diffusers|flax --output=DIR`.

Writes the tuned model, adapters merged, so that PyTorch diffusers (`StableDiffusionPipeline`,
`StableDiffusionXLPipeline`) or its Flax classes (`FlaxStableDiffusionPipeline`) load it.
"""
import pathlib
import sys

from jaxalign.command import Flags, run_command
from jaxalign.convert import save_pipeline
from jaxalign.errors import UserError
from jaxalign.train.restore import load_tuned

_FLAGS = Flags()
_CHECKPOINT = _FLAGS.define("string", "checkpoint", None, "Run folder or checkpoint directory.")
_FORMAT = _FLAGS.define("enum", "format", "diffusers", ["diffusers", "flax"], "Layout to write.")
_OUTPUT = _FLAGS.define("string", "output", None, "Folder to write.")
_DTYPE = _FLAGS.define("enum", "dtype", "float32", ["float32", "float16", "bfloat16"],
                       "Of the weights.")


def main(argv) -> None:
  del argv
  pipeline = load_tuned(pathlib.Path(_CHECKPOINT.value))
  try:
    save_pipeline(pipeline, _OUTPUT.value, format=_FORMAT.value, dtype=_DTYPE.value)
  except OSError as error:
    raise UserError(f"--output={_OUTPUT.value}: {error}") from error
  print(f"{_FORMAT.value} model in {_OUTPUT.value}")


if __name__ == "__main__":
  sys.exit(run_command(main, _FLAGS, required=("checkpoint", "output")))
