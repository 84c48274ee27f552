"""The folder of a run: config, metrics, pictures, evaluations, summary; never mixed up."""
import hashlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import zipfile
import zlib

import numpy as np
from flax import traverse_util
from tensorboardX import SummaryWriter

from jaxalign.config.recipes import completed
from jaxalign.config.schema import Config
from jaxalign.devices import processes
from jaxalign.errors import UserError
from jaxalign.storage.files import whole
from jaxalign.train.evaluation import Samples

# What may differ between a run and its continuation: how long it goes on, and what it logs.
FREE_KEYS = ("train.steps", "train.max_seconds", "train.keep", "log.tensorboard",
             "log.grid_prompts")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml_collections", "numpy")


class Workdir:
  """The folder `path` of the run `config`; checked at once, made or written by `create`.

  Of several processes all call these methods and process 0 writes.

  Args:
    prompts: what the files of config keys held: a file may change under its name, and what was
      measured on the old prompts must not pass for the new ones.
  Raises:
    UserError: the folder cannot be written, or belongs to a run with another config.
  """

  def __init__(self, path: pathlib.Path, config: Config,
               prompts: dict[str, list[str]] | None = None):
    self.path, self._config = path, config
    self._prompts = {key: hashlib.sha256("\n".join(lines).encode()).hexdigest()
                     for key, lines in (prompts or {}).items()}
    self._metrics = self._board = None
    record = path / "config.json"
    try:
      if record.exists():
        old = json.loads(record.read_text())
        self._check_same(old["config"], config.to_dict())
        for key, digest in old.get("prompts", {}).items():
          if self._prompts.get(key, digest) != digest:
            raise UserError(f"--workdir={path}: belongs to another run: the prompts of {key} have "
                            "changed since; choose another --workdir")
      elif path.exists() and any(path.iterdir()):
        raise UserError(f"--workdir={path}: not empty, and no run of jaxalign (no config.json)")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(f"--workdir={path}: {error}") from error
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
      raise UserError(f"--workdir={path}: {existing} is no folder that can be written")

  def create(self) -> None:
    """Makes the folder and writes config.json, each time: a continued run may go on for longer."""
    processes.barrier("workdir checked")           # by all, before one of them changes it
    if not processes.is_main():
      return
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      content = {"config": self._config.to_dict(), "prompts": self._prompts,
                 "environment": environment()}
      self.write_json("config.json", content)
    except OSError as error:
      raise UserError(f"--workdir={self.path}: {error}") from error

  def _check_same(self, old: dict, new: dict) -> None:
    if not isinstance(old, dict):
      raise ValueError("config.json is not that of a run")
    if "method" in old and "method" in new:
      old = completed(old)
    old, new = (traverse_util.flatten_dict(tree, sep=".") for tree in (old, new))
    for key in sorted(old.keys() | new.keys()):
      if key not in FREE_KEYS and old.get(key) != new.get(key):
        raise UserError(f"--workdir={self.path}: belongs to another run: {key} was "
                        f"{old.get(key)!r} and is {new.get(key)!r} now; choose another --workdir")

  def write_json(self, name: str, content) -> None:
    """Writes a JSON file that appears whole or not at all."""
    if not processes.is_main():
      return
    with whole(self.path / name) as file:
      file.write_text(json.dumps(content, indent=2) + "\n")

  def open_metrics(self, step: int, tensorboard: bool) -> None:
    """Cuts metrics.jsonl back to `step` and opens it for appending."""
    if not processes.is_main():
      return
    file = self.path / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    kept = []
    for line in lines:
      try:
        if json.loads(line)["step"] <= step:
          kept.append(line + "\n")
      except ValueError:     # the line during which the run died
        break
    with whole(file) as partial:
      partial.write_text("".join(kept))
    self._metrics = file.open("a")
    if tensorboard:
      self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)

  def log(self, step: int, seconds: float, values: dict[str, float]) -> None:
    """One line of metrics.jsonl, and the same to TensorBoard."""
    if self._metrics is None:
      return
    self._metrics.write(json.dumps({"step": step, "seconds": round(seconds, 3), **values}) + "\n")
    self._metrics.flush()
    if self._board:
      for name, value in values.items():
        self._board.add_scalar(name, value, step)

  def close(self) -> None:
    for file in (self._metrics, self._board):
      if file is not None:
        file.close()

  def cached(self, name: str, draw) -> Samples:
    """Samples from `NAME.npz`, or from `draw()`, which are then kept there."""
    file = self.path / "evaluations" / f"{name}.npz"
    if processes.agreed(file.exists()):
      try:
        with np.load(file) as arrays:
          return Samples.from_arrays(dict(arrays))
      except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file}: damaged ({error}); delete it to draw it again") from error
    samples = draw()
    self.keep(name, samples)
    return samples

  def keep(self, name: str, samples: Samples) -> None:
    """Writes Samples to `NAME.npz`, whole or not at all."""
    if not processes.is_main():
      return
    file = self.path / "evaluations" / f"{name}.npz"
    file.parent.mkdir(exist_ok=True)
    with whole(file) as partial:
      np.savez(partial, **samples.arrays())


def environment() -> dict:
  """Versions, command and git revision that a result came from."""
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  versions["python"] = sys.version.split()[0]
  try:
    git = subprocess.run(["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "HEAD"],
                         capture_output=True, text=True, check=False)
  except OSError:              # no git on this machine
    return versions
  if git.returncode == 0:
    versions["git"] = git.stdout.strip()
  return versions
