"""Reading Parquet files, whose damage Arrow reports by exceptions of many kinds."""
import contextlib

from jaxalign.errors import UserError


@contextlib.contextmanager
def readable(where):
  """Turns what Arrow raises on a damaged file into a UserError that names `where`."""
  try:
    yield
  except (OSError, ValueError, KeyError, TypeError, IndexError, MemoryError,
          NotImplementedError) as error:
    reason = " ".join(str(error).split())[:200]
    raise UserError(f"{where}: not a Parquet file that can be read ({reason})") from error
