"""Files that appear whole or not at all."""
import contextlib
import os
import pathlib


@contextlib.contextmanager
def whole(path):
  """Yields where to write what is to be the file `path`, which it becomes as the block ends.

  The name there ends like that of `path`, which decides the format for those that ask it.
  """
  path = pathlib.Path(path)
  partial = path.with_name(f".partial.{path.name}")
  yield partial
  os.replace(partial, path)
