"""Prompts: read from files, and drawn for the steps of a run."""
import pathlib

import numpy as np

from jaxalign.errors import UserError

ASSETS = pathlib.Path(__file__).resolve().parent.parent / "assets" / "prompts"


def read_prompts(key: str, path: str) -> list[str]:
  """Prompts of a text file, one a line, or of `jaxalign:NAME`; errors name the config key `key`."""
  file = pathlib.Path(path)
  if path.startswith("jaxalign:"):
    file = ASSETS / f"{path.removeprefix('jaxalign:')}.txt"
  try:
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{key}={path}: {error}") from error
  prompts = [line for line in lines if line]
  if not prompts:
    raise UserError(f"{key}={path}: the file has no prompts")
  return prompts


def draw_prompts(seed: int, step: int, count: int, size: int, group: int = 1) -> np.ndarray:
  """`[size]` int32 prompt indices of a step, each `group` times side by side.

  Prompts do not repeat while there are enough of them.
  """
  generator, wanted = np.random.default_rng([seed, step]), size // group
  parts = [generator.permutation(count) for _ in range(-(-wanted // count))]
  return np.repeat(np.concatenate(parts)[:wanted], group).astype(np.int32)
