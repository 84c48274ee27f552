"""What a run leaves at its end, and what is said where that was damaged."""
import json
import shutil

import pytest

import runs
from jaxalign.errors import UserError
from jaxalign.train import report
from jaxalign.train.report import read_finished, read_summary
from jaxalign.train.workdir import Workdir

SUMMARY = {"recipe": "r", "steps": 3, "seconds": 1.0, "total_seconds": 2, "device": "cpu x1",
           "stopped": "", "base": {}, "tuned": {}, "cost": {}}


def test_a_run_is_finished_if_it_needs_nothing_more(tmp_path):
  assert read_summary(tmp_path) is None and read_finished(tmp_path, runs.smoke()) is None
  (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
  assert read_finished(tmp_path, runs.smoke()) == SUMMARY
  assert read_finished(tmp_path, runs.smoke(train__steps=4)) is None
  stopped = {**SUMMARY, "steps": 1, "stopped": "train.max_seconds=1 reached"}
  (tmp_path / "summary.json").write_text(json.dumps(stopped))
  assert read_finished(tmp_path, runs.smoke(train__max_seconds=1.0)) == stopped
  assert read_finished(tmp_path, runs.smoke(train__max_seconds=9.0)) is None


def test_a_run_killed_in_writing_its_report_gets_one(tmp_path, monkeypatch):
  monkeypatch.setattr(report, "write_report", lambda folders, file: file.write_text("page"))
  (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
  assert report.take_finished(tmp_path, runs.smoke()) == SUMMARY
  assert (tmp_path / "report.html").read_text() == "page"
  (tmp_path / "report.html").write_text("the user's own notes")
  report.take_finished(tmp_path, runs.smoke())
  assert (tmp_path / "report.html").read_text() == "the user's own notes"


@pytest.mark.parametrize("content", [
    b"", b"{", b"\xff\xfe", b"[]", b"{}", b"[" * 100_000, json.dumps(SUMMARY)[:80].encode(),
    *(json.dumps({**SUMMARY, key: None}).encode() for key in SUMMARY)])
def test_a_damaged_summary_is_one_line(tmp_path, content):
  (tmp_path / "summary.json").write_bytes(content)
  with pytest.raises(UserError, match=r"summary\.json: not the summary of a run") as error:
    read_finished(tmp_path, runs.smoke())
  assert "\n" not in str(error.value)


def open_workdir(path, step=9):
  workdir = Workdir(path, runs.smoke())
  workdir.create()
  workdir.open_metrics(step)
  return workdir


def test_damaged_rows_are_left_out_one_by_one_and_counted(tmp_path, capsys):
  workdir = open_workdir(tmp_path / "run")
  for step in (1, 2, 3):
    workdir.log(step, step, {"a": step / 10})
  workdir.close()
  file = tmp_path / "run" / "metrics.jsonl"
  first, second, third = file.read_bytes().splitlines(keepends=True)
  file.write_bytes(b'{"a": 1}\n\xff\xfe\n' + first + b'{"step": 2, "sec\n' + second + b"[" * 99999
                   + b"\n\n" + third + b'{"step": 4, "a": 1}\n{"step": 1.5}\n{"step": 3, "ab')
  open_workdir(tmp_path / "run", 3).close()
  assert file.read_bytes() == first + second + third
  assert f"{file}: 6 damaged rows left out" in capsys.readouterr().out


def test_one_row_a_step(tmp_path):
  """What an evaluation adds later, after a kill too, joins the step's row."""
  workdir = open_workdir(tmp_path / "run")
  workdir.log(1, 1.0, {"a": 1.0})
  workdir.log(2, 2.0, {"a": 2.0})
  workdir.log(2, 2.5, {"b": 3.0})
  workdir.close()
  workdir = open_workdir(tmp_path / "run", 2)
  workdir.log(2, 2.5, {"c": 4.0})
  workdir.log(3, 3.0, {"a": 5.0})
  workdir.close()
  assert runs.metrics(tmp_path / "run") == [
      {"step": 1, "seconds": 1.0, "a": 1.0},
      {"step": 2, "seconds": 2.5, "a": 2.0, "b": 3.0, "c": 4.0},
      {"step": 3, "seconds": 3.0, "a": 5.0}]


def test_a_folder_belongs_to_one_run(tmp_path):
  workdir = open_workdir(tmp_path / "run")
  with pytest.raises(UserError, match=r"--workdir=.*run: in use by process \d+ on "):
    open_workdir(tmp_path / "run")
  workdir.close()
  open_workdir(tmp_path / "run").close()


def test_a_run_that_has_not_taken_a_step_does_not_own_its_folder(tmp_path, capsys):
  path, other = tmp_path / "run", runs.smoke(optim__lr=0.5)
  open_workdir(path).close()
  (path / "evaluations").mkdir()
  for name in ("evaluations/base.npz", "notes.txt"):
    (path / name).write_text("of the first run")
  workdir = Workdir(path, other)
  assert (path / "evaluations" / "base.npz").exists()      # `create` takes the folder, no one else
  workdir.create()
  assert "not taken a step; begun anew" in capsys.readouterr().out
  assert not (path / "evaluations").exists() and (path / "notes.txt").exists()
  assert json.loads((path / "config.json").read_text())["config"] == other.to_dict()
  workdir.open_metrics(0)
  workdir.log(1, 1.0, {"a": 1.0})
  workdir.close()
  with pytest.raises(UserError, match="belongs to another run: optim.lr was 0.5"):
    Workdir(path, runs.smoke())


def test_a_run_at_work_owns_its_folder_from_the_start(tmp_path):
  workdir = open_workdir(tmp_path / "run")
  with pytest.raises(UserError, match="in use by process"):
    Workdir(tmp_path / "run", runs.smoke(optim__lr=0.5)).create()
  workdir.close()


def test_what_a_run_killed_as_it_began_has_left_is_no_other_runs(tmp_path):
  """The lock, and config.json half written."""
  run = tmp_path / "run"
  run.mkdir()
  for name in (".lock", ".partial.a-host.123.config.json"):
    (run / name).write_text("")
  open_workdir(run).close()
  assert (run / "config.json").exists() and not list(run.glob(".partial*"))
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "notes.txt").write_text("mine")
  with pytest.raises(UserError, match="not empty, and no run of jaxalign"):
    open_workdir(tmp_path / "other")


def test_a_folder_that_went_away_ends_the_run(tmp_path):
  workdir = open_workdir(tmp_path / "run")
  shutil.rmtree(tmp_path / "run")
  for write in (lambda: workdir.log(1, 1.0, {}), lambda: workdir.write_json("summary.json", {})):
    with pytest.raises(UserError, match="--workdir=.*: the folder was deleted or replaced"):
      write()
  workdir.close()
