"""Where things lie that flags name. Imports nothing that takes long, as typing errors end here."""
import os
import pathlib
import shutil
import sys

from jaxalign.config.nearest import suggestion
from jaxalign.errors import UserError

ASSETS = pathlib.Path(__file__).resolve().parent.parent / "assets"


def model_path(name) -> pathlib.Path:
  """The folder or file that a flag like `--checkpoint` names; `jaxalign:NAME` is a shipped model.

  Raises:
    UserError: no model of that name is shipped.
  """
  name = os.fspath(name)
  if not name.startswith("jaxalign:"):
    return pathlib.Path(name)
  folder = ASSETS / name.removeprefix("jaxalign:")
  if not (folder / "model_index.json").is_file():
    known = sorted(f"jaxalign:{file.parent.name}" for file in ASSETS.glob("*/model_index.json"))
    raise UserError(f"{name}: no model of this name is shipped{suggestion(name, known)}; there are "
                    f"{', '.join(known)}")
  return folder


def existing(path: pathlib.Path, flag: str = "") -> pathlib.Path:
  """The path; raises UserError if nothing is there, and suggests what lies beside it."""
  if not path.exists():
    near = suggestion(str(path), map(str, path.parent.glob("*")))
    raise UserError(f"{flag}{path}: no such file or folder{near}")
  return path


def checkpoint_path(name) -> pathlib.Path:
  """What `--checkpoint` names, a run's folder or a model; raises UserError if there is none."""
  return existing(model_path(name), "--checkpoint=")


def python() -> str:
  """What starts this Python in the user's shell: `python`, or its path where that is another."""
  own, found = os.path.abspath(sys.executable), shutil.which("python")
  if found and os.path.dirname(os.path.abspath(found)) == os.path.dirname(own):
    return "python"
  near = os.path.relpath(own)                      # a link, which is not to be followed
  return own if near.startswith("..") else near
