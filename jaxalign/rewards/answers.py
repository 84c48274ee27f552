"""Answers that cost something to ask for, kept in the folder of a run for the next one there."""
import json
import math
import os
import pathlib

import jax

from jaxalign.devices import processes
from jaxalign.errors import UserError

FOLDER = "answers"
MOST = 100_000           # of a file; the one before it is kept too, so as many at least are known


class Answers:
  """What was answered, by key: in memory, and on disk from `keep` on.

  Each process appends lines `[key, answer]` to a file of its own, `NAME.PROCESS.jsonl`, and reads
  those of all. A full file becomes `NAME.PROCESS.old.jsonl`, in place of the one before. Half a
  line of a process that was killed is passed over.
  """

  def __init__(self):
    self._new, self._old, self._path, self._file = {}, {}, None, None

  def __contains__(self, key: str) -> bool:
    return key in self._new or key in self._old

  def __getitem__(self, key: str):
    return self._new[key] if key in self._new else self._old[key]

  def keep(self, folder: pathlib.Path, name: str) -> None:
    """Reads what earlier processes kept below `folder`; from now on answers are added there.

    Raises:
      UserError: it cannot be read or written.
    """
    index = jax.process_index() if processes.several() else 0
    asked, self._new = self._new, {}
    self._path = folder / FOLDER / f"{name}.{index}.jsonl"
    try:
      self._path.parent.mkdir(exist_ok=True)
      for file in self._path.parent.glob(f"{name}.*.jsonl"):
        (self._new if file == self._path else self._old).update(_read(file))
      self._open()
    except OSError as error:
      raise UserError(f"{self._path}: {error.strerror or error}") from error
    for key, answer in asked.items():
      if key not in self:
        self.add(key, answer)

  def _open(self):
    self._file = self._path.open("a+b", buffering=0)
    if self._file.tell():
      self._file.seek(-1, os.SEEK_END)
      if self._file.read(1) != b"\n":
        self._file.write(b"\n")

  def add(self, key: str, answer: float | str) -> None:
    """Keeps an answer, a number or a text.

    Raises:
      UserError: it cannot be written.
    """
    try:
      if len(self._new) >= MOST:
        self._old, self._new = self._new, {}
        if self._file is not None:
          self._file.close()
          os.replace(self._path, self._path.with_suffix(".old.jsonl"))
          self._open()
      self._new[key] = answer
      if self._file is not None:
        line = json.dumps([key, answer]).encode() + b"\n"
        if self._file.write(line) != len(line):
          raise OSError("the disk is full")
    except OSError as error:
      raise UserError(f"{self._path}: {error.strerror or error}") from error


def _read(file: pathlib.Path):
  """`(key, answer)` of the lines that are whole, and sound."""
  with file.open("rb") as lines:
    for line in lines:
      try:
        key, answer = json.loads(line)
      except (ValueError, TypeError, RecursionError):
        continue
      if isinstance(key, str) and (
          isinstance(answer, str) or (isinstance(answer, float) and math.isfinite(answer))):
        yield key, answer
