"""The user's own Python files, recipes and rewards: run as they stand, their errors on one line.

They are trusted code, named explicitly by the user.
"""
import importlib.util
import pathlib
import sys
import traceback
import zlib


def run_file(path: pathlib.Path):
  """The module of the file `path`, which is run again at every call; raises whatever that raises.
  """
  # The name tells two files of the same stem apart. Registered, because dataclasses and pickle look
  # up the module of a class by name.
  name = f"jaxalign_user_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
  except BaseException:
    del sys.modules[name]
    raise
  return module


def line_in(error: BaseException, path) -> str:
  """' at line N' of the innermost frame in the file `path`, or '' if there is none."""
  same = lambda f: pathlib.Path(f).resolve() == pathlib.Path(path).resolve()
  lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if same(f.filename)]
  if isinstance(error, SyntaxError) and error.filename and same(error.filename):
    lines.append(error.lineno)
  return f" at line {lines[-1]}" if lines else ""


def one_line(error: BaseException) -> str:
  """An exception as one line: its type and the first line of its message."""
  lines = str(error).strip().splitlines()
  return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
