"""The folder of a run: config, metrics, pictures, evaluations, summary; never mixed up."""
import contextlib
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

from jaxalign.config.credentials import hidden
from jaxalign.config.recipes import completed
from jaxalign.config.schema import Config
from jaxalign.devices import processes
from jaxalign.errors import UserError
from jaxalign.storage import lock
from jaxalign.storage.files import PARTIAL, delete, sweep, whole
from jaxalign.train.evaluation import Samples
from jaxalign.train.sinks import Callback, open_sinks

# What may differ between a run and its continuation: how long it goes on, and what it logs.
FREE_KEYS = ("train.steps", "train.max_seconds", "train.keep", "train.alarm",
             "log.to",
             "log.grid_prompts")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml_collections", "numpy")


# What a run leaves that has not taken a step.
BEFORE_STEPS = ("config.json", "metrics.jsonl", "evaluations", "samples", "tensorboard",
                "wandb", "mlflow.db", "trackio",
                "checkpoints", "sound", "pairs.npy", "pairs_origin.npy")


def has_begun(path: pathlib.Path) -> bool:
  """Whether the run in a folder has taken a step that was logged or saved."""
  metrics, checkpoints = path / "metrics.jsonl", path / "checkpoints"
  return ((path / "summary.json").exists() or metrics.exists() and metrics.stat().st_size > 0
          or checkpoints.is_dir() and any(p.name.isdecimal() for p in checkpoints.iterdir()))


class Workdir:
  """The folder `path` of the run `config`; checked at once, made or written by `create`.

  Of several processes all call these methods and process 0 writes.

  Args:
    contents: lines that tell what the files of config keys held: a file may change under its name,
      and what was made of the old prompts or pairs must not pass for the new ones.
  Raises:
    UserError: the folder cannot be written, or belongs to a run with another config.
  """

  def __init__(self, path: pathlib.Path, config: Config,
               contents: dict[str, list[str]] | None = None):
    self.path, self._config = path, config
    self._contents = {key: hashlib.sha256("\n".join(lines).encode()).hexdigest()
                      for key, lines in (contents or {}).items()}
    self._metrics = self._lock = None
    self._sinks = []
    self._anew = False                   # what another run left before its first step is to go
    self._last = 0, {}                   # where the last row of metrics.jsonl begins, and the row
    record = path / "config.json"
    try:
      if record.exists():
        old = json.loads(record.read_text())
        try:
          self._check_same(old["config"], config.to_dict())
          self._check_contents(old.get("contents", old.get("prompts", {})))
        except UserError:
          if has_begun(path):
            raise
          self._anew = True                # it died before its first step, and owns nothing
      elif path.exists() and not all(file.name == lock.FILE or file.name.startswith(PARTIAL)
                                     for file in path.iterdir()):     # of a run killed as it began
        raise UserError(f"--workdir={path}: not empty, and no run of jaxalign (no config.json)")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
      raise UserError(f"--workdir={path}: {error}") from error
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
      raise UserError(f"--workdir={path}: {existing} is no folder that can be written")

  def create(self) -> None:
    """Makes the folder, takes it for this run alone until `close`, and writes config.json.

    Each time: a continued run may go on for longer.

    Raises:
      UserError: another run has the folder, or it cannot be written.
    """
    processes.barrier("workdir checked")           # by all, before one of them changes it
    failure = None
    if processes.is_main():
      try:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock.Lock(self.path, f"--workdir={self.path}")
        sweep(self.path)
        if self._anew:
          processes.say(f"{self.path}: what was there had another config and not taken a step; "
                        "begun anew")
          for name in BEFORE_STEPS:
            delete(self.path / name)
        content = {"config": self._config.to_dict(), "contents": self._contents,
                   "environment": environment()}
        self.write_json("config.json", content)
      except UserError as error:
        failure = error
      except OSError as error:
        failure = UserError(f"--workdir={self.path}: {error}")
    if processes.agreed(failure is not None):
      raise failure or UserError(f"--workdir={self.path}: process 0 could not take it")

  def _check_same(self, old: dict, new: dict) -> None:
    if not isinstance(old, dict):
      raise ValueError("config.json is not that of a run")
    if "method" in old and "method" in new:
      old = completed(old)
    old, new = (traverse_util.flatten_dict(tree, sep=".") for tree in (old, new))
    old = {key: hidden(value) for key, value in old.items()}       # older versions wrote them
    for key in sorted(old.keys() | new.keys()):
      if key not in FREE_KEYS and old.get(key) != new.get(key):
        raise UserError(f"--workdir={self.path}: belongs to another run: {key} was "
                        f"{old.get(key)!r} and is {new.get(key)!r} now; choose another --workdir")

  def _check_contents(self, old: dict[str, str]) -> None:
    for key, digest in old.items():
      if self._contents.get(key, digest) != digest:
        raise UserError(f"--workdir={self.path}: belongs to another run: the contents of {key} "
                        "have changed since; choose another --workdir")

  def _check_there(self) -> None:
    """UserError if the folder was deleted or replaced since this run took it."""
    if self._lock is not None:
      self._lock.check()

  def write_json(self, name: str, content) -> None:
    """Writes a JSON file that appears whole or not at all."""
    if not processes.is_main():
      return
    self._check_there()
    with whole(self.path / name) as file:
      file.write_text(json.dumps(content, indent=2) + "\n")

  def open_metrics(self, step: int, to: tuple[str, ...] = (), on_step=None) -> None:
    """Cuts metrics.jsonl back to `step` and opens it for appending.

    Rows that cannot be read are left out, each for itself, and counted on the screen.

    Args:
      to: services that get the numbers too, `log.to`. on_step: a function `(step, values)`.
    Raises:
      UserError: a service is not there, or refuses.
    """
    if not processes.is_main():
      return
    for opened in [*filter(None, [self._metrics]), *self._sinks]:
      opened.close()
    self._last, file = (0, {}), self.path / "metrics.jsonl"
    rows, damaged = {}, 0
    for line in file.read_bytes().split(b"\n") if file.exists() else []:
      try:
        row = json.loads(line)
        if type(row["step"]) is not int:
          raise ValueError
      except (ValueError, KeyError, TypeError, RecursionError):
        damaged += bool(line.strip())
        continue
      if row["step"] <= step:
        rows[row["step"]] = {**rows.get(row["step"], {}), **row}
    if damaged:
      processes.say(f"{file}: {damaged} damaged {'row' if damaged == 1 else 'rows'} left out")
    lines = [json.dumps(row) + "\n" for row in rows.values()]
    with whole(file) as partial:
      partial.write_text("".join(lines))
    self._metrics = file.open("a")
    if rows:
      self._last = sum(map(len, lines[:-1])), list(rows.values())[-1]
    self._sinks = open_sinks(to, self.path, self._config.to_dict(), step)
    if on_step is not None:
      self._sinks.append(Callback(on_step))

  def log(self, step: int, seconds: float, values: dict[str, float]) -> None:
    """The row of a step in metrics.jsonl, or what is added to it; and the same to the sinks.

    Raises:
      UserError: the folder was deleted or replaced.
    """
    if self._metrics is None:
      return
    self._check_there()
    row = {"step": step, "seconds": round(seconds, 3), **values}
    if self._last[1].get("step") == step:
      row = {**self._last[1], **row}
      self._metrics.truncate(self._last[0])
    self._last = self._metrics.tell(), row
    self._metrics.write(json.dumps(row) + "\n")
    self._metrics.flush()
    for sink in self._sinks:
      sink.add(step, values)

  def close(self) -> None:
    """Closes all of it, whatever a full disk says to one part."""
    with contextlib.ExitStack() as stack:
      if self._lock is not None:
        stack.callback(self._lock.release)
      for file in [*filter(None, [self._metrics]), *self._sinks]:
        stack.callback(file.close)
      self._metrics, self._sinks = None, []

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

  def keep_prompts(self, held_out: list[str], watched: list[str]) -> None:
    """Writes which prompts the pictures of evaluations and of looks are of, in order."""
    if processes.is_main():
      (self.path / "evaluations").mkdir(exist_ok=True)
    self.write_json("evaluations/prompts.json", {"held_out": held_out, "watched": watched})

  def keep(self, name: str, samples: Samples) -> None:
    """Writes Samples to `NAME.npz`, whole or not at all."""
    if not processes.is_main():
      return
    self._check_there()
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
