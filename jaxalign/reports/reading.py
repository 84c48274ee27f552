"""What a page needs of a run, read from its folder alone: no model is opened."""
import dataclasses
import functools
import hashlib
import json
import pathlib
import zipfile
import zlib

import numpy as np

from jaxalign import metrics
from jaxalign.config import recipes, schema
from jaxalign.data.prompts import read_prompts
from jaxalign.errors import UserError
from jaxalign.metrics import alarm

DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError,
          zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class Pictures:
  """`images [P,K,H,W,3]` uint8, `scores` name -> `[P,K]`, `features [P,K,D]`."""
  images: np.ndarray
  scores: dict[str, np.ndarray]
  features: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """A run as its folder tells it.

  Attributes:
    name: of its folder. recipe: what it is a run of.
    config: nested plain values, with defaults of keys that are newer than the run.
    changed: `group.key` -> (the run's value, the shipped recipe's); None if there is none of that
      name.
    environment: versions and git revision. rows: of metrics.jsonl.
    summary: None while the run goes on.
    base, tuned: pictures of the same noise: held-out ones, or, of a run that goes on, those of its
      last look, on training prompts.
    prompts: P of them, or None where their file is gone or has changed.
    watch_diversity: of the base model on the prompts of the looks.
  """
  folder: pathlib.Path
  name: str
  recipe: str
  config: dict
  changed: dict | None
  environment: dict
  rows: list[dict]
  summary: dict | None
  base: Pictures | None
  tuned: Pictures | None
  prompts: list[str] | None
  watch_diversity: float | None

  @property
  def finished(self) -> bool:
    return self.summary is not None

  @functools.cached_property
  def limits(self) -> schema.AlarmConfig:
    """When a change counts as a sign of over-optimisation."""
    return recipes.build_group(schema.AlarmConfig, "alarm", {
        **dataclasses.asdict(schema.AlarmConfig()), **self.config.get("alarm", {})})

  @functools.cached_property
  def result(self) -> tuple[dict, dict] | None:
    """Base and tuned model in numbers, as in summary.json; of a run that goes on, its last look."""
    if self.summary:
      return self.summary["base"], self.summary["tuned"]
    if self.tuned is None:
      return None
    base, tuned = ({name: metrics.clustered_mean(value) for name, value in p.scores.items()}
                   for p in (self.base, self.tuned))
    for name, value in self.tuned.scores.items():
      tuned[name]["change"] = metrics.paired_difference(value, self.base.scores[name])
    now, before = (metrics.pairwise_diversity(p.features) for p in (self.tuned, self.base))
    tuned["diversity"] = {**now, "ratio_to_base": now["mean"] / before["mean"],
                          "change": metrics.clustered_mean(
                              (now["per_prompt"] - before["per_prompt"])[:, None])}
    return {**base, "diversity": before}, tuned

  @functools.cached_property
  def measured(self) -> dict | None:
    """What the rules of the alarm read from the pictures; None where there are none."""
    return None if self.tuned is None else alarm.measure(self.tuned, self.base)

  def same_noise(self, other: "Run") -> bool:
    """Whether pictures of both, one by one, come from the same prompt, noise and base model."""
    return (self.base is not None and other.base is not None
            and self.finished == other.finished and self.prompts == other.prompts
            and np.array_equal(self.base.images, other.base.images))


def read_run(folder: pathlib.Path) -> Run:
  """The run in `folder`.

  Raises:
    UserError: it is the folder of no such run, or a file in it is damaged.
  """
  record = _json(folder / "config.json")
  if record is None:
    raise UserError(f"--runs: {folder}: no folder of a run (no config.json)")
  try:
    if "task" in record["config"]:
      raise UserError(f"--runs: {folder}: a pretraining run has no before and after")
    summary = read_summary(folder)
    for name in ("reward", "judge", "diversity") if summary else ():
      float(summary["base"][name]["mean"]), float(summary["tuned"][name]["change"]["mean"])
    config = recipes.completed(record["config"])
    recipe = config["recipe"]
    watched = _pictures(folder, "base_watch")
    after = _pictures(folder, "tuned" if summary else "watch")
    # Where nothing is trained, the looks are at the held-out prompts.
    before = watched if watched and not summary else _pictures(folder, "base")
    if before is None or after is None or before.images.shape != after.images.shape:
      before = after = None
    return Run(folder, folder.absolute().name, recipe, config, recipes.changed(config),
               record.get("environment", {}), _rows(folder / "metrics.jsonl"), summary, before,
               after, _prompts(folder, record, not summary, before),
               watched and metrics.pairwise_diversity(watched.features)["mean"])
  except UserError:
    raise
  except DAMAGE as error:
    raise UserError(f"--runs: {folder}: damaged ({type(error).__name__}: {error})") from error


# What every summary has, and of which type.
_SUMMARY = {"recipe": str, "steps": int, "seconds": (int, float), "total_seconds": (int, float),
            "device": str, "stopped": str, "base": dict, "tuned": dict, "cost": dict}


def read_summary(folder: pathlib.Path) -> dict | None:
  """The summary of the run in `folder`; None if it has none.

  Raises:
    UserError: the file is damaged.
  """
  file = folder / "summary.json"
  try:
    summary = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return None
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{file}: not the summary of a run ({error}); delete it, and the run's command "
                    "makes it anew") from error
  for key, kind in _SUMMARY.items():
    if not isinstance(summary, dict) or not isinstance(summary.get(key), kind):
      raise UserError(f"{file}: not the summary of a run ({key} is missing or of another type); "
                      "delete it, and the run's command makes it anew")
  return summary


def _json(file: pathlib.Path):
  try:
    return json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return None
  except DAMAGE as error:
    raise UserError(f"{file}: damaged ({error})") from error


def _rows(file: pathlib.Path) -> list[dict]:
  """Rows that can be read: the last one may be half written while a run goes on."""
  rows = []
  for line in file.read_bytes().split(b"\n") if file.exists() else []:
    try:
      row = json.loads(line)
      rows.append({**row, "step": int(row["step"]), "seconds": float(row["seconds"])})
    except DAMAGE:
      continue
  return rows


def _pictures(folder: pathlib.Path, name: str) -> Pictures | None:
  file = folder / "evaluations" / f"{name}.npz"
  if not file.exists():
    return None
  try:
    with np.load(file) as arrays:
      scores = {key.removeprefix("scores/"): arrays[key] for key in arrays
                if key.startswith("scores/")}
      return Pictures(arrays["images"], scores, arrays["features"])
  except DAMAGE as error:
    raise UserError(f"{file}: damaged ({error})") from error


def _prompts(folder, record, watched: bool, pictures) -> list[str] | None:
  """Those that the run wrote down; of older runs, those of their file if it still is the same."""
  if pictures is None:
    return None
  count, written = pictures.images.shape[0], _json(folder / "evaluations" / "prompts.json")
  if written is not None:
    found = written["watched" if watched else "held_out"]
  else:
    config = record["config"]
    try:
      found = read_prompts("data.eval_prompts", config["data"]["eval_prompts"])
    except UserError:
      return None
    found = found[:config["eval"]["prompts"] or None]
    digests = record.get("contents", record.get("prompts", {}))
    digest = hashlib.sha256("\n".join(found).encode()).hexdigest()
    if watched or digests.get("data.eval_prompts", digest) != digest:
      return None
  return found if len(found) == count else None
