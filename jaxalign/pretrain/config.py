"""Configs of pretraining runs: what a recipe starts from, and the checked dataclass it becomes."""
import dataclasses
import json
from typing import Any

import ml_collections

from jaxalign import pretrain
from jaxalign.config.fields import Count, check
from jaxalign.config.recipes import build_group
from jaxalign.config.schema import check_seed
from jaxalign.errors import UserError
from jaxalign.pretrain.optimizer import OptimConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Length of the run and what is kept of it.

  Attributes:
    steps: optimiser steps in all. log_every: steps between lines of metrics.jsonl.
    checkpoint_every: steps between checkpoints. keep: how many of them are retained.
    look_every: steps between figures and pictures.
  """
  steps: Count = 1000
  log_every: Count = 20
  checkpoint_every: Count = 200
  keep: Count = 1
  look_every: Count = 500

  def __post_init__(self):
    check("train", self)


GROUPS = {"optim": OptimConfig, "train": TrainConfig}


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
  """A pretraining run, resolved and checked. `task` is the `Config` of the task's module."""
  recipe: str
  task_name: str
  seed: int
  task: Any
  optim: OptimConfig
  train: TrainConfig

  def __post_init__(self):
    check_seed(self.seed)
    if self.optim.accumulate != 1:
      raise UserError(f"optim.accumulate={self.optim.accumulate}: pretraining has no micro-batches")

  def check_devices(self, count: int) -> None:
    """Raises UserError unless a batch divides over `count` devices."""
    if self.task.batch % count:
      raise UserError(f"task: a batch of {self.task.batch} does not divide over {count} devices")

  def to_dict(self) -> dict:
    """Nested plain values, as written to config.json."""
    out = dataclasses.asdict(self)
    out["task"] = {"name": out.pop("task_name"), **out["task"]}
    return json.loads(json.dumps(out))


def default(task: str, recipe: str) -> ml_collections.ConfigDict:
  """Locked ConfigDict with all keys of a run of `task`, at their defaults."""
  as_dict = lambda cls: {f.name: f.default for f in dataclasses.fields(cls)}
  tree = {name: as_dict(cls) for name, cls in GROUPS.items()}
  tree["task"] = {"name": task, **as_dict(pretrain.load(task).Config)}
  return ml_collections.ConfigDict({"recipe": recipe, "seed": 0, **tree}).lock()


def parse(config: ml_collections.ConfigDict) -> PretrainConfig:
  """ConfigDict -> checked dataclasses.

  Raises:
    UserError: a wrong type or a value out of range; names the key.
  """
  tree = config.to_dict()
  task = dict(tree["task"])
  name = task.pop("name")
  return PretrainConfig(
      recipe=tree["recipe"], task_name=name, seed=tree["seed"],
      task=build_group(pretrain.load(name).Config, "task", task),
      **{key: build_group(cls, key, tree[key]) for key, cls in GROUPS.items()})
