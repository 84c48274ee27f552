"""Pictures of a model for a vote: drawn by `jaxalign.sample`, once."""
import contextlib
import hashlib
import json
import pathlib
import subprocess
import sys

from jaxalign.errors import UserError
from jaxalign.storage.files import whole
from jaxalign.votes.gallery import is_samples


def draw(checkpoint: str, prompts: str, folder: pathlib.Path, *, n: int, seed: int) -> pathlib.Path:
  """`folder`, filled by `jaxalign.sample` unless it already holds just these pictures.

  In a process of its own, so that the device is free while people vote.

  Raises:
    UserError: sampling failed; says why.
  """
  file = pathlib.Path(prompts)
  text = file.read_bytes() if len(prompts) < 255 and file.is_file() else prompts.encode()
  shipped = checkpoint.startswith("jaxalign:")
  wanted = {"checkpoint": checkpoint if shipped else str(pathlib.Path(checkpoint).resolve()),
            "prompts": hashlib.sha256(text).hexdigest(), "n": n, "seed": seed}
  note = folder / "drawn.json"
  with contextlib.suppress(OSError, ValueError, RecursionError):     # a damaged note is none
    if is_samples(folder) and json.loads(note.read_text()) == wanted:
      return folder
  print(f"drawing {checkpoint}", flush=True)
  done = subprocess.run(
      [sys.executable, "-m", "jaxalign.sample", f"--checkpoint={checkpoint}",
       f"--prompts={prompts}", f"--output={folder}", f"--n={n}", f"--seed={seed}"])
  if done.returncode:
    raise UserError(f"{checkpoint}: its pictures could not be drawn (the line above says why)")
  with whole(note) as file:
    file.write_text(json.dumps(wanted) + "\n")
  return folder
