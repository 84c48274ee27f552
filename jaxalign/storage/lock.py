"""A folder belongs to one process at a time, on whichever host."""
import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time

from jaxalign.errors import UserError

FILE = ".lock"
BEAT = 15.0          # seconds between signs of life
SILENT = 120.0       # after so many seconds without one, an owner on another host is dead


class Lock:
  """The file `.lock` of a folder, held from `Lock(folder)` until `release` or the process's death.

  On one host the kernel's own lock says whether the owner lives. Network file systems may not carry
  that to other hosts, so the owner also touches the file, every `BEAT` seconds.

  Args:
    what: how messages call the folder, such as `--workdir=DIR`.
  Raises:
    UserError: another process holds the folder; names it.
  """

  def __init__(self, folder: pathlib.Path, what: str):
    self._path, self._what = folder / FILE, what
    self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      self._take()
    except BaseException:
      os.close(self._file)
      raise
    self._released = threading.Event()
    threading.Thread(target=self._beat, daemon=True).start()

  def _take(self) -> None:
    owner = self._owner()
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise self._in_use(owner) from None
    except OSError:                      # a file system without locks; signs of life must do
      pass
    here = socket.gethostname()
    if owner and owner["host"] != here and time.time() - os.fstat(self._file).st_mtime < SILENT:
      raise self._in_use(owner)
    os.ftruncate(self._file, 0)
    os.pwrite(self._file, json.dumps({"host": here, "process": os.getpid()}).encode(), 0)

  def _owner(self) -> dict | None:
    """Who wrote the file; None if it was released, or says nothing that can be read."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
      owner = json.loads(os.pread(self._file, 4096, 0))
      return {"host": str(owner["host"]), "process": int(owner["process"])}
    return None

  def _in_use(self, owner: dict | None) -> UserError:
    who = f"process {owner['process']} on {owner['host']}" if owner else "another process"
    return UserError(f"{self._what}: in use by {who}; wait for it or stop it, or choose another "
                     "folder")

  def _beat(self) -> None:
    while not self._released.wait(BEAT):
      with contextlib.suppress(OSError):
        os.utime(self._file)

  def check(self) -> None:
    """Raises UserError if the folder was deleted or replaced since."""
    try:
      same = os.path.samestat(os.stat(self._path), os.fstat(self._file))
    except OSError:
      same = False
    if not same:
      raise UserError(f"{self._what}: the folder was deleted or replaced while this run went on; "
                      "what it computes can no longer be kept there")

  def release(self) -> None:
    """Gives the folder free; the file stays, empty, as deleting it could race with another owner.
    """
    if not self._released.is_set():
      self._released.set()
      with contextlib.suppress(OSError):
        os.ftruncate(self._file, 0)
      os.close(self._file)
