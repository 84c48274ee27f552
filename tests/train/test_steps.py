"""The clock and the end of a run's steps, without a model; killing and resuming is test_resume."""
import gc
import json
import math
import os
import signal
import time

import jax
import numpy as np
import pytest

import runs
from jaxalign import train
from jaxalign.devices import processes
from jaxalign.errors import Stopped, UserError
from jaxalign.storage.checkpoint import Checkpointer
from jaxalign.train import steps
from jaxalign.train.bar import Work
from jaxalign.train.experiment import build
from jaxalign.train.pairs import PairTable
from jaxalign.train.workdir import Workdir


class Late:
  """A value that the device still works on for so many seconds."""

  def __init__(self, seconds: float):
    self._ready = time.monotonic() + seconds

  def block_until_ready(self):
    time.sleep(max(0.0, self._ready - time.monotonic()))
    return self


def take(folder, seconds, ended=lambda step: "", late=Late, **overrides):
  """Runs steps that return at once and last so long; the log, the progress and the last step."""
  cfg = runs.smoke(**overrides)
  workdir, log, state = Workdir(folder, cfg), [], {"a": np.zeros(2)}
  workdir.create()
  checkpoints = Checkpointer(folder / "checkpoints")
  progress = steps.begin(0.0)

  def report(step, spent, values, look):
    del values
    log.append((step, spent, look()))
    return log[-1][2]
  step = steps.take(cfg, workdir, checkpoints, progress, 0, advance=lambda step: late(seconds),
                    report=report, look=lambda step: {"looked": step}, content=lambda: state,
                    ended=ended, work=Work(1, math.nan, ()))
  checkpoints.close()
  return log, progress, step


def test_work_under_way_at_an_evaluation_counts_as_training(tmp_path):
  log, progress, step = take(tmp_path / "run", 0.2, train__steps=4, eval__every=2)
  assert step == 4 and [entry[0] for entry in log] == [1, 2, 3, 4]
  assert [entry[2] for entry in log] == [{}, {"looked": 2}, {}, {"looked": 4}]
  # Nothing awaits a step in between, so each pair of steps lasts as long as its second one.
  assert log[1][1] >= 0.2 and log[3][1] >= log[1][1] + 0.2
  assert progress["seconds"] == log[3][1]


def test_a_reason_to_end_is_kept_with_the_last_checkpoint(tmp_path):
  log, progress, step = take(tmp_path / "run", 0.0, lambda step: "enough" * (step == 2),
                             train__steps=9, train__checkpoint_every=9, eval__every=0)
  assert step == len(log) == 2 and progress["stopped"] == "enough"
  assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]


@pytest.mark.parametrize("number, status, name", [
    (signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")])
def test_a_run_that_is_asked_to_end_saves_its_step(tmp_path, monkeypatch, number, status, name):
  before = signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell may have ignored it
  monkeypatch.setattr(Workdir, "log", lambda *args: None)

  class Asked(Late):
    def block_until_ready(self):
      os.kill(os.getpid(), number)
      return self
  try:
    with pytest.raises(Stopped, match=f"stopped by {name} and saved at step 2") as stopped:
      take(tmp_path / "run", 0.0, late=Asked, train__steps=9, train__checkpoint_every=9,
           eval__every=2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  finally:
    signal.signal(signal.SIGINT, before)
  assert stopped.value.status == status
  assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]


def test_a_second_interrupt_ends_at_once(tmp_path, capsys):
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with pytest.raises(KeyboardInterrupt), processes.Notice() as notice:
      os.kill(os.getpid(), signal.SIGINT)
      assert notice.at(1)
      assert "Ctrl-C again ends the run at once" in capsys.readouterr().out
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(1)
  finally:
    signal.signal(signal.SIGINT, before)


def test_a_result_without_checkpoints_is_not_trained_over(tmp_path):
  cfg = runs.smoke()
  workdir = Workdir(tmp_path / "run", cfg)
  workdir.create()
  checkpoints = Checkpointer(tmp_path / "run" / "checkpoints")
  assert steps.resume(cfg, workdir, checkpoints, {}, steps.begin(0.0)) == (0, None)
  workdir.write_json("summary.json", {"steps": 1})
  with pytest.raises(UserError, match="has a result, but no checkpoint"):
    steps.resume(cfg, workdir, checkpoints, {}, steps.begin(0.0))
  checkpoints.close()


def test_full_disk_is_one_line_and_the_run_goes_on(monkeypatch):
  cfg, path = runs.smoke(), runs.FOLDER / "full disk"
  log = Workdir.log

  def full(self, step, seconds, values):
    if step == 3:
      raise OSError(28, "No space left on device", str(self.path / "metrics.jsonl"))
    log(self, step, seconds, values)
  with monkeypatch.context() as patch, runs.sharing(cfg, None):
    patch.setattr(Workdir, "log", full)
    with pytest.raises(UserError, match="No space left on device.*metrics.jsonl"):
      train.run(cfg, path)
  assert not (path / "summary.json").exists()
  runs.run("full disk")
  plain = runs.without_seconds(runs.finished())
  assert runs.without_seconds(path) == plain


@pytest.mark.slow
def test_the_base_model_is_held_only_where_a_step_reads_it(monkeypatch):
  """With all weights trained; for path KL it comes back."""
  held, draw = {}, PairTable.draw

  def living():
    gc.collect()
    return sum(a.nbytes for a in jax.live_arrays() if not a.is_deleted())

  def count(self, step, size):
    held[method] = living() - before
    return draw(self, step, size)
  monkeypatch.setattr(PairTable, "draw", count)
  for method in ("mapo", "diffusion_dpo"):
    before = living()
    path = runs.run(f"held {method}", method=method, model__adapter="full")
    summary = json.loads((path / "summary.json").read_text())
    assert summary["tuned"]["kl_to_base"]["mean"] > 0
  base = sum(a.nbytes for a in jax.tree.leaves(
      build(runs.smoke("mapo"), jax.devices()[:1]).models.frozen["base"]))
  assert held["diffusion_dpo"] - held["mapo"] == pytest.approx(base, rel=0.05)
