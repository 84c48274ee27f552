"""A run that was interrupted, in whatever way, ends like one that was not: bit for bit."""
import filecmp
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_loop import restored

import runs
from jaxalign.errors import UserError

VARIANT = dict(method__replay_lag=1, optim__ema=0.9)


def assert_same_run(left, right, **overrides):
  """Same checkpoint, metrics and exported weights, to the last bit."""
  (state, progress), (other, other_progress) = (restored(p, **overrides) for p in (left, right))
  assert jax.tree.structure(state) == jax.tree.structure(other)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(other)):
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)
  for p in (progress, other_progress):
    del p["seconds"]
  assert progress == other_progress
  assert runs.without_seconds(left) == runs.without_seconds(right)
  files = [p.relative_to(left) for p in (left / "export").rglob("*.safetensors")]
  assert len(files) == 3
  for file in files:
    assert filecmp.cmp(left / file, right / file, shallow=False), file
  tuned = [json.loads((p / "summary.json").read_text())["tuned"] for p in (left, right)]
  assert tuned[0] == tuned[1]


@pytest.mark.slow
@pytest.mark.parametrize("name, overrides", [("plain", {}), ("variant", VARIANT)])
def test_two_and_two_steps_equal_four(name, overrides):
  whole = runs.run(f"{name} 4", train__steps=4, **overrides)
  # Stopped where an evaluation is due, which must not be lost.
  halves = runs.run(f"{name} 2+2", train__steps=2, **overrides)
  assert json.loads((halves / "summary.json").read_text())["steps"] == 2
  runs.run(f"{name} 2+2", train__steps=4, **overrides)
  assert_same_run(whole, halves, **overrides)
  assert [line["step"] for line in runs.metrics(halves)] == [1, 2, 3, 4]


# What a driver process does to itself: SIGKILL at a chosen point of the loop.
DRIVER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import conftest, runs
from jaxalign.config import command, recipes
from jaxalign.train import loop
import json, pathlib

where, step_of_death, folder = sys.argv[2], int(sys.argv[3]), pathlib.Path(sys.argv[4])
die = lambda: os.kill(os.getpid(), signal.SIGTERM if where == "notice" else signal.SIGKILL)

if where in ("update", "notice"):
  original = loop.Programs.update
  def update(self, state, experience, rewards, step):
    out = original(self, state, experience, rewards, step)     # dispatched, not awaited
    if step + 1 == step_of_death:
      die()
    return out
  loop.Programs.update = update
else:                                    # all files written, the directory not renamed yet
  from orbax.checkpoint._src.path import atomicity
  for cls in (atomicity.AtomicRenameTemporaryPath, atomicity.CommitFileTemporaryPath):
    def finalize(self, *args, original=cls.finalize, **kwargs):
      if self._final_path.name == str(step_of_death):
        die()
      return original(self, *args, **kwargs)
    cls.finalize = finalize
tree = json.loads((folder / "config.json").read_text())["config"]
tree["train"]["steps"] = 4
sys.exit(command.exit_status(lambda: loop.run(recipes.parse(tree), folder)))
"""


def killed(where, step, folder):
  """Continues the run in `folder` in a process that kills itself; returns its standard error."""
  env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
  tests = pathlib.Path(__file__).resolve().parent.parent
  done = subprocess.run([sys.executable, "-c", DRIVER, str(tests), where, str(step), str(folder)],
                        env=env, capture_output=True, text=True, timeout=500)
  assert done.returncode == (143 if where == "notice" else -signal.SIGKILL), done.stderr[-3000:]
  return done.stderr


def test_kill_in_a_checkpoint_and_in_a_step():
  whole = runs.run("plain 4", train__steps=4)
  path = runs.run("killed", train__steps=1)
  (path / "summary.json").unlink()
  shutil.rmtree(path / "export")
  killed("save", 3, path)
  # Step 3 was trained and logged; its checkpoint is a temporary directory that counts for nothing.
  names = {p.name for p in (path / "checkpoints").iterdir()}
  assert "2" in names and "3" not in names and any(n.startswith("3.") for n in names), names
  assert runs.metrics(path)[-1]["step"] >= 3
  killed("update", 4, path)
  names = {p.name for p in (path / "checkpoints").iterdir()}
  assert "2" in names and "4" not in names, names       # 3 if it was written in time
  assert not (path / "summary.json").exists()
  runs.run("killed", train__steps=4)
  assert_same_run(whole, path)


@pytest.mark.slow
def test_sigterm_saves_at_once():
  """Between checkpoints, and before the evaluation that is due then; neither is lost."""
  rare = dict(train__checkpoint_every=100)
  whole = runs.run("rare 4", train__steps=4, **rare)
  path = runs.run("rare 1+1+2", train__steps=1, **rare)
  (path / "summary.json").unlink()
  shutil.rmtree(path / "export")
  assert "saved at step 2; the same command continues" in killed("notice", 2, path)
  assert (path / "checkpoints" / "2").is_dir() and not (path / "samples/step_000002.png").exists()
  assert [line["step"] for line in runs.metrics(path)] == [1, 2]
  runs.run("rare 1+1+2", train__steps=4, **rare)
  # What was evaluated later has joined the step's line.
  assert runs.without_seconds(path) == runs.without_seconds(whole)
  (state, progress), (other, _) = (restored(p, **rare) for p in (path, whole))
  assert all(a.tobytes() == b.tobytes() for a, b in zip(*map(jax.tree.leaves, (state, other))))
  assert not progress["look_due"]


def test_metrics_are_cut_back_to_the_checkpoint():
  whole = runs.run("plain 4", train__steps=4)
  path = runs.FOLDER / "cut"
  shutil.copytree(runs.run("plain 2+2", train__steps=4), path)
  for name in ("3", "4"):
    shutil.rmtree(path / "checkpoints" / name, ignore_errors=True)
  shutil.copytree(whole / "checkpoints" / "3", path / "checkpoints" / "3")
  (path / "summary.json").unlink()
  with (path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 9, "seconds": 1.0}\n{"step": 10, "sec')      # died while writing
  runs.run("cut", train__steps=4)
  assert_same_run(whole, path)


def test_damaged_base_evaluation_names_the_file():
  path = runs.FOLDER / "damaged evaluation"
  shutil.copytree(runs.run("plain 4", train__steps=4), path)
  (path / "summary.json").unlink()
  file = path / "evaluations" / "base.npz"
  file.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(UserError, match=r"base\.npz: damaged"):
    runs.run("damaged evaluation", train__steps=5)


@pytest.mark.slow
def test_keep_best_survives_an_interruption():
  """The best policy so far is part of the checkpoint, not a file of its own."""
  overrides = dict(train__keep_best=True, eval__every=1, train__patience=0)
  whole = runs.run("best 3", train__steps=3, **overrides)
  runs.run("best 1+2", train__steps=1, **overrides)
  parts = runs.run("best 1+2", train__steps=3, **overrides)
  summaries = [json.loads((p / "summary.json").read_text()) for p in (whole, parts)]
  assert summaries[0]["exported_step"] == summaries[1]["exported_step"]
  assert np.array_equal(*(np.fromfile(p / "export/unet/diffusion_pytorch_model.safetensors", "u1")
                          for p in (whole, parts)))
