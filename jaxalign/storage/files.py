"""Files that appear whole or not at all."""
import contextlib
import glob
import os
import pathlib
import platform
import time

DAY = 24 * 3600          # seconds; whatever was not written to for as long has been left behind


@contextlib.contextmanager
def whole(path):
  """Yields where to write what is to be the file `path`, which it becomes as the block ends.

  If the block raises, `path` stays as it was. The name there is this process's own, so that several
  may write the same file, of which the last one stays. It ends like that of `path`, which decides
  the format for those that ask it. What killed processes have left there is deleted.
  """
  path = pathlib.Path(path)
  for left in path.parent.glob(f".partial.*.{glob.escape(path.name)}"):
    if _abandoned(left, path.name):
      left.unlink(missing_ok=True)
  partial = path.with_name(f".partial.{platform.node()}.{os.getpid()}.{path.name}")
  try:
    yield partial
    os.replace(partial, path)
  except BaseException:
    with contextlib.suppress(OSError):
      partial.unlink()
    raise


def _abandoned(left: pathlib.Path, name: str) -> bool:
  """Whether the process that wrote `left` is gone: asked on its own machine, elsewhere assumed."""
  host, _, process = left.name.removeprefix(".partial.").removesuffix(f".{name}").rpartition(".")
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
