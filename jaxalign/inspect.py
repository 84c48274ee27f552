"""Command line: `python -m jaxalign.inspect FILE-or-DIR`.

Says what a checkpoint, an adapter or another file of weights is: its family and prediction, dtype
and sizes, kind and rank of a LoRA, what is missing, and the command that uses it.
"""
import sys

from jaxalign.config.command import exit_status
from jaxalign.config.places import existing, model_path
from jaxalign.errors import UserError


def main(argv) -> None:
  names = argv[1:]
  if not names or any(name in ("--help", "-help", "-h") for name in names):
    print(__doc__.strip())
    if not names:
      raise UserError("name a file or a folder")
    return
  if len(names) > 1:
    raise UserError(f"unexpected argument {names[1]!r}")
  path = existing(model_path(names[0]))
  from jaxalign.convert.inspection import inspect  # takes seconds, which a wrong name need not
  for name, text in inspect(path).items():
    print(f"{name:12s}{text}")


if __name__ == "__main__":
  sys.exit(exit_status(lambda: main(sys.argv)))
