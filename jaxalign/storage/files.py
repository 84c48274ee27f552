"""Files and folders that appear whole or not at all."""
import contextlib
import glob
import os
import pathlib
import platform
import shutil
import time

DAY = 24 * 3600          # seconds; whatever was not written to for as long has been left behind
UNFINISHED = ".unfinished"       # in a folder whose entries are being replaced, or were cut off
PARTIAL = ".partial."            # how names of what is being written begin


@contextlib.contextmanager
def whole(path):
  """Yields where to write what is to be the file `path`, which it becomes as the block ends.

  If the block raises, `path` stays as it was. The name there is this process's own, so that several
  may write the same file, of which the last one stays. It ends like that of `path`, which decides
  the format for those that ask it. What killed processes have left there is deleted.
  """
  path = pathlib.Path(path)
  partial = _begin(path)
  try:
    yield partial
    os.replace(partial, path)
  except BaseException:
    with contextlib.suppress(OSError):
      partial.unlink()
    raise


@contextlib.contextmanager
def whole_folder(path, removed=(), last: str = ""):
  """Yields an empty folder, whose entries become those of the folder `path` as the block ends.

  A folder that was not there appears with all of them at once. In one that was, they replace those
  of the same names; entries of other names stay. A process that is killed meanwhile leaves
  `UNFINISHED` there, and what it left beside it is deleted by the next one.

  Args:
    removed: names that go where no new entry has them.
    last: of the entry that makes the folder one of its kind: it goes first and comes back last.
  """
  path = pathlib.Path(path).resolve()    # renames need the real folder's file system
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = _begin(path)
  new, old = partial / "new", partial / "old"
  try:
    shutil.rmtree(partial, ignore_errors=True)      # of a process that had this one's number
    new.mkdir(parents=True)
    yield new
    if not path.exists():
      os.rename(new, path)
      return
    old.mkdir()
    (path / UNFINISHED).touch()
    names = {*removed, *(entry.name for entry in new.iterdir())} - {last}
    if last and (path / last).exists():
      os.rename(path / last, old / last)
    for name in sorted(names):
      if (path / name).exists():
        os.rename(path / name, old / name)
      if (new / name).exists():
        os.rename(new / name, path / name)
    if last:
      os.rename(new / last, path / last)
    (path / UNFINISHED).unlink()
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def share(path: pathlib.Path) -> None:
  """Gives a file the mode that new ones have here: safetensors writes for the owner alone."""
  mask = os.umask(0)
  os.umask(mask)
  os.chmod(path, 0o666 & ~mask)


def sweep(folder: pathlib.Path) -> None:
  """Deletes what killed processes have left below a folder that is this process's alone."""
  for left in [*folder.rglob(f"{PARTIAL}*")]:
    delete(left)


def delete(left: pathlib.Path) -> None:
  """Deletes a file or a folder with all in it, if it is there."""
  if left.is_dir():
    shutil.rmtree(left, ignore_errors=True)
  else:
    left.unlink(missing_ok=True)


def _begin(path: pathlib.Path) -> pathlib.Path:
  """This process's own name beside `path`, where what others left for that name is deleted."""
  for left in path.parent.glob(f"{PARTIAL}*.{glob.escape(path.name)}"):
    if _abandoned(left, path.name):
      delete(left)
  return path.with_name(f"{PARTIAL}{platform.node()}.{os.getpid()}.{path.name}")


def _abandoned(left: pathlib.Path, name: str) -> bool:
  """Whether the process that wrote `left` is gone: asked on its own machine, elsewhere assumed."""
  host, _, process = left.name.removeprefix(PARTIAL).removesuffix(f".{name}").rpartition(".")
  with contextlib.suppress(OSError):
    if time.time() - left.stat().st_mtime > DAY:
      return True
  if host != platform.node() or not process.isdecimal():
    return False
  try:
    os.kill(int(process), 0)             # signal 0 only asks
  except ProcessLookupError:
    return True
  except (OSError, OverflowError):       # another user's
    return False
  return False
