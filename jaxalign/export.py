"""Command line: `python -m jaxalign.export --checkpoint=DIR --format=FORMAT --output=DIR`.

Writes the tuned model, adapters merged, so that the PyTorch class of diffusers that it came from
(`diffusers`) or its Flax form (`flax`, for Stable Diffusion 1.x and 2.x) loads it; as one file
(`single`), for ComfyUI, A1111 and `from_single_file`; or the adapter alone (`lora`), for
`load_lora_weights` of a PyTorch pipeline of the base model, with `--names=kohya` for ComfyUI, A1111
and kohya's trainers.
"""
import sys

from jaxalign.config.command import Flags, run_command
from jaxalign.config.places import checkpoint_path
from jaxalign.errors import UserError

_FLAGS = Flags()
_CHECKPOINT = _FLAGS.define("string", "checkpoint", None, "Run folder or checkpoint directory.")
_FORMAT = _FLAGS.define("enum", "format", "diffusers", ["diffusers", "flax", "single", "lora"],
                        "Layout to write.")
_OUTPUT = _FLAGS.define("string", "output", None,
                        "Folder to write; of `single` the file, NAME.safetensors.")
_NAMES = _FLAGS.define("enum", "names", "peft", ["peft", "kohya"],
                       "Of an adapter's layers.")
_DTYPE = _FLAGS.define("enum", "dtype", "float32", ["float32", "float16", "bfloat16"],
                       "Of the weights.")


def main(argv) -> None:
  del argv
  checkpoint, lora = checkpoint_path(_CHECKPOINT.value), _FORMAT.value == "lora"
  # These take seconds, which a wrong flag need not.
  from jaxalign.convert import save_adapter, save_pipeline
  from jaxalign.train.restore import load_adapters_of, load_tuned
  try:
    if lora:
      adapters, denoiser = load_adapters_of(checkpoint)
      save_adapter(adapters.pop(denoiser), _OUTPUT.value, denoiser, text_encoders=adapters,
                   dtype=_DTYPE.value, style=_NAMES.value)
    else:
      save_pipeline(load_tuned(checkpoint), _OUTPUT.value, format=_FORMAT.value, dtype=_DTYPE.value)
  except OSError as error:
    raise UserError(f"--output={_OUTPUT.value}: {error}") from error
  print(f"{_FORMAT.value} model in {_OUTPUT.value}")


if __name__ == "__main__":
  sys.exit(run_command(main, _FLAGS, required=("checkpoint", "output")))
