"""Prompts: read from files, and drawn for the steps of a run.

`read_prompts` takes, told apart by the name:

  *.txt (and any other)     one prompt a line
  *.json                    a list of prompts, or of objects with a prompt each
  *.jsonl                   a prompt or such an object a line
  *.csv, *.tsv              a table with a line of column names
  *.parquet                 a table

Objects and tables have their prompts under the first of `FIELDS` that is there. Prompts without a
letter are left out; a field that is no text is an error that names its row.
"""
import csv
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxalign.config import places
from jaxalign.data.parquet import readable
from jaxalign.data.text import read_lines
from jaxalign.errors import UserError

ASSETS = places.ASSETS / "prompts"
FIELDS = ("prompt", "caption", "text")


def read_prompts(key: str, path: str) -> list[str]:
  """The prompts of a file in one of the forms above, or of `jaxalign:NAME`.

  Args:
    key: the config key or flag that names the file, for messages.
  Raises:
    UserError: names key, file and row at fault.
  """
  file, what = pathlib.Path(path), f"{key}={path}"
  if path.startswith("jaxalign:"):
    file = ASSETS / f"{path.removeprefix('jaxalign:')}.txt"
  read = _READERS.get(file.suffix.lower(), read_lines)
  prompts = [prompt for prompt in (_prompt(f"{what}: row {i}", entry)
                                   for i, entry in enumerate(read(file, what), 1)) if prompt]
  if not prompts:
    raise UserError(f"{what}: the file has no prompts")
  return prompts


FEWEST = 12          # different prompts, below which none are held out


@dataclasses.dataclass(frozen=True)
class PromptSets:
  """What a run trains on (or, on pairs, watches) and what it is judged by.

  Attributes:
    held_out: of `evaluation`, those that were taken out of `training`; of two files, none.
  """
  training: list[str]
  evaluation: list[str]
  held_out: list[str]

  def __str__(self) -> str:
    show = lambda prompts: ", ".join(map(repr, prompts[:3])) + ", ..." * (len(prompts) > 3)
    text = (f"{len(self.training)} training prompts ({show(self.training)}); judged on "
            f"{len(self.evaluation)} others ({show(self.evaluation)})")
    if self.held_out:
      return f"{text}, held out of them: data.eval_prompts names no file"
    if set(self.training) & set(self.evaluation):
      return f"{text}. Some are the same: what is reported of these was trained on"
    return text


def read_sets(prompts: str, eval_prompts: str, most: int, captions=()) -> PromptSets:
  """Training and evaluation prompts of a run.

  Args:
    prompts: file as for `read_prompts`; empty for the captions of the pairs.
    eval_prompts: the same; empty to hold some of the others out: a tenth of them, at least four,
      always the same ones, or none where there are too few to spare any.
    most: prompts to evaluate on, the first so many; 0 is all.
    captions: of the run's preference pairs.
  """
  training = read_prompts("data.prompts", prompts) if prompts else list(dict.fromkeys(captions))
  if not training:
    raise UserError("data.prompts is empty: name a file of prompts")
  if eval_prompts:
    evaluation = read_prompts("data.eval_prompts", eval_prompts)
    return PromptSets(training, evaluation[:most or None], [])
  different = list(dict.fromkeys(training))
  if len(different) < FEWEST:
    return PromptSets(training, different[:most or None], [])
  # By their own digest: the same prompts, whatever else joins the file.
  ranked = sorted(different, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
  held = set(ranked[:min(most or len(different), max(4, len(different) // 10))])
  return PromptSets([p for p in training if p not in held], [p for p in different if p in held],
                    [p for p in different if p in held])


def some_prompt(prompts: str, eval_prompts: str) -> list[str]:
  """Prompts like those of a run, for trials and shapes: of its files, or one of ours."""
  for key, name in (("data.eval_prompts", eval_prompts), ("data.prompts", prompts)):
    if name:
      return read_prompts(key, name)
  return ["a photo"]


def _prompt(where: str, entry) -> str:
  if isinstance(entry, dict):
    field = next((name for name in FIELDS if name in entry), None)
    if field is None:
      known = ", ".join(map(str, list(entry)[:8]))
      raise UserError(f"{where}: has no {' or '.join(FIELDS)}; there are {known}")
    where, entry = f"{where}: {field}", entry[field]
  if not isinstance(entry, str):
    raise UserError(f"{where}: {json.dumps(entry, default=str)[:60]} is not a text")
  return entry.strip()


def _json(file, what) -> list:
  try:
    content = json.loads("\n".join(read_lines(file, what)))
  except (ValueError, RecursionError) as error:
    raise UserError(f"{what}: not JSON ({error})") from error
  if not isinstance(content, list):
    raise UserError(f"{what}: holds one {type(content).__name__}, not a list of prompts or of "
                    f"objects with {FIELDS[0]}")
  return content


def _json_lines(file, what) -> Iterator[Any]:
  for i, line in enumerate(read_lines(file, what), 1):
    if not line.strip():
      continue
    try:
      yield json.loads(line)
    except (ValueError, RecursionError) as error:
      raise UserError(f"{what}: row {i}: not JSON ({error})") from error


def _table(file, what) -> Iterator[dict]:
  lines = read_lines(file, what)
  rows = csv.DictReader((f"{line}\n" for line in lines), strict=True,
                        delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
  try:
    if not set(rows.fieldnames or ()) & set(FIELDS):
      raise UserError(f"{what}: has no column {' or '.join(FIELDS)}; the first line has "
                      f"{', '.join(rows.fieldnames or ['nothing'])[:200]}")
    yield from rows
  except csv.Error as error:
    raise UserError(f"{what}: row {rows.line_num}: not CSV ({error})") from error


def _parquet(file, what) -> list[dict]:
  import pyarrow.parquet as pq
  with readable(what):
    table = pq.ParquetFile(file)
    field = next((name for name in FIELDS if name in table.schema_arrow.names), None)
    if field is None:
      raise UserError(f"{what}: has no column {' or '.join(FIELDS)}; there are "
                      f"{', '.join(table.schema_arrow.names)[:200]}")
    return [{field: value} for value in table.read(columns=[field])[field].to_pylist()]


_READERS = {".json": _json, ".jsonl": _json_lines, ".csv": _table, ".tsv": _table,
            ".parquet": _parquet}


def draw_prompts(seed: int, step: int, count: int, size: int, group: int = 1) -> np.ndarray:
  """`[size]` int32 prompt indices of a step, each `group` times side by side.

  Prompts do not repeat while there are enough of them.
  """
  generator, wanted = np.random.default_rng([seed, step]), size // group
  parts = [generator.permutation(count) for _ in range(-(-wanted // count))]
  return np.repeat(np.concatenate(parts)[:wanted], group).astype(np.int32)
