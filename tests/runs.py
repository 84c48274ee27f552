"""Runs of `:smoke` recipes that test files share: one folder, each program compiled once."""
import collections
import contextlib
import dataclasses
import functools
import json
import pathlib
import tempfile
from unittest import mock

from jaxalign.config import recipes, schema
from jaxalign.methods import nabla_gfn
from jaxalign.train import loop

ROOT = pathlib.Path(__file__).resolve().parent.parent
_TEMPORARY = tempfile.TemporaryDirectory(prefix="jaxalign-test-runs-")   # deleted at exit
FOLDER = pathlib.Path(_TEMPORARY.name)
TRAIN, HELD_OUT = FOLDER / "train.txt", FOLDER / "heldout.txt"
TRAIN.write_text("".join(f"a {name} on a {colour} background\n" for name in ("cat", "dog", "sun")
                         for colour in ("red", "blue", "green", "white")))
HELD_OUT.write_text("".join(f"a {name} on a blue background\n"
                            for name in ("car", "tree", "house", "moon")))
TRACES = collections.Counter()      # of the method's functions, in the run `finished()`


def recipe(argument: str = "smoke", name: str = "nabla_gfn"):
  """The ConfigDict of `configs/NAME.py`."""
  return recipes.load_recipe(f"{ROOT / 'configs' / name}.py:{argument}")


def smoke(method: str = "nabla_gfn", argument: str = "smoke", **overrides) -> schema.Config:
  """Config of a smoke recipe on one device; overrides as `train__steps=2`."""
  config = recipe(argument, method)
  config.data.prompts, config.data.eval_prompts = str(TRAIN), str(HELD_OUT)
  config.mesh.data, config.log.to = 1, ()
  for path, value in overrides.items():
    group, _, key = path.rpartition("__")
    (config[group] if group else config)[key] = value
  return recipes.parse(config)


def program_key(cfg, devices) -> str:
  """Equal for runs with the same compiled programs: weights and seeds are arguments of these."""
  return repr((cfg.method, cfg.optim, evaluation_key(cfg, devices)))


def evaluation_key(cfg, devices) -> str:
  """The same for the programs of evaluations, which no method has a part in."""
  return repr((cfg.model, cfg.reward, cfg.sample, cfg.mesh, cfg.eval.batch, cfg.eval.judge,
               devices))


def sharing(cfg, devices):
  """Makes the loop take compiled programs of an earlier run, where one had the same."""
  key = program_key(cfg, devices)

  class Programs(loop.Programs):
    def compile(self, state):
      if key not in _STEPS:
        super().compile(state)
        _STEPS[key] = self._collect, self._update, self.update_bytes, self.read_base
      self._collect, self._update, self.update_bytes, self.read_base = _STEPS[key]
      return "compiled"

  class Evaluator(loop.Evaluator):
    def __init__(self, exp):
      super().__init__(exp)
      self._sample, self._path_kl = _EVALUATIONS.setdefault(
          evaluation_key(cfg, devices), (self._sample, self._path_kl))

  stack = contextlib.ExitStack()
  stack.enter_context(mock.patch.object(loop, "Programs", Programs))
  stack.enter_context(mock.patch.object(loop, "Evaluator", Evaluator))
  return stack


_STEPS, _EVALUATIONS = {}, {}


def run(folder: str, devices=None, **options) -> pathlib.Path:
  """Runs, or continues, `smoke(**options)` in the folder `folder`, and returns that."""
  cfg = smoke(**options)
  with sharing(cfg, devices):
    loop.run(cfg, FOLDER / folder, devices)
  return FOLDER / folder


@functools.cache
def finished() -> pathlib.Path:
  """The smoke recipe as it stands, run once by the loop as it stands. Read only."""
  original = nabla_gfn.make

  def make(*args):
    method = original(*args)

    def counted(name):
      def function(*args):
        TRACES[name] += 1
        return getattr(method, name)(*args)
      return function
    return dataclasses.replace(method, collect=counted("collect"), update=counted("update"))

  with mock.patch.object(nabla_gfn, "make", make):
    loop.run(smoke(log__to=("tensorboard",)), FOLDER / "finished")
  return FOLDER / "finished"


def metrics(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def without_seconds(path: pathlib.Path) -> list[dict]:
  """Lines of metrics.jsonl less the one thing that no two runs share."""
  return [{k: v for k, v in line.items() if k != "seconds"} for line in metrics(path)]
