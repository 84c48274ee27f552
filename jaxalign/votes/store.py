"""What happened in a vote, as lines of JSON: appended, on disk before anything else goes on."""
import fcntl
import json
import os
import pathlib
import threading

from jaxalign.errors import UserError


class Log:
  """`FOLDER/votes.jsonl`; one process at a time may append.

  A process that is killed leaves at most one line that is cut off, which nobody was told of: the
  next one removes it.
  """

  def __init__(self, folder: pathlib.Path):
    folder.mkdir(parents=True, exist_ok=True)
    self.path = folder / "votes.jsonl"
    self._lock = threading.Lock()
    self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      os.close(self._file)
      raise UserError(f"{self.path}: another jaxalign.vote is using it") from error
    content = self.path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
      os.ftruncate(self._file, whole)
      os.fsync(self._file)
    _sync_folder(folder)

  def append(self, event: dict) -> None:
    """Returns when the event is on disk."""
    line = json.dumps(event, ensure_ascii=False).encode() + b"\n"
    with self._lock:
      start = os.fstat(self._file).st_size
      try:
        if os.write(self._file, line) != len(line):
          raise OSError(f"{self.path}: the disk is full")
        os.fsync(self._file)
      except OSError:
        os.ftruncate(self._file, start)      # half a line would spoil the next
        raise

  def close(self) -> None:
    os.close(self._file)


def read_events(folder: pathlib.Path) -> list[dict]:
  """All whole lines of a votes folder; none if there is no file yet.

  Raises:
    UserError: a line is no JSON object; names it.
  """
  path, events = folder / "votes.jsonl", []
  try:
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path}: {error}") from error
  for number, line in enumerate(lines, 1):
    try:
      event = json.loads(line)
      event["event"], event["voter"], event["ask"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
      raise UserError(f"{path}: line {number} is damaged ({error})") from error
    events.append(event)
  return events


def _sync_folder(folder: pathlib.Path) -> None:
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)                         # the file's own name is on disk too
  finally:
    os.close(handle)
