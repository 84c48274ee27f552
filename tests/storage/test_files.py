"""Whole files: none is seen half written, writers do not disturb each other, nothing is left."""
import os
import subprocess
import sys

import pytest

import runs
from jaxalign.storage import files
from jaxalign.storage.files import whole


def names(folder):
  return sorted(file.name for file in folder.iterdir())


def test_a_file_appears_as_the_block_ends(tmp_path):
  file = tmp_path / "a.json"
  with whole(file) as partial:
    partial.write_text("new")
    assert partial.suffix == ".json" and partial.parent == tmp_path and not file.exists()
  assert file.read_text() == "new" and names(tmp_path) == ["a.json"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
  file = tmp_path / "a.json"
  file.write_text("old")
  with pytest.raises(KeyError), whole(file) as partial:
    partial.write_text("half")
    raise KeyError
  assert file.read_text() == "old" and names(tmp_path) == ["a.json"]


def test_two_processes_write_one_file(tmp_path, monkeypatch):
  """Each its own; neither takes the other's away while that is being written."""
  file = tmp_path / "a.npy"
  with whole(file) as first:
    first.write_text("first")
    monkeypatch.setattr(files.os, "getpid", lambda mine=os.getpid(): os.getppid())
    with whole(file) as second:
      assert first != second and first.exists()
      second.write_text("second")
    assert file.read_text() == "second"
  assert file.read_text() == "first" and names(tmp_path) == ["a.npy"]


def test_what_a_killed_process_left_is_deleted(tmp_path):
  file, other = tmp_path / "[a].npy", tmp_path / "b.npy"
  code = ("import os, sys\nfrom jaxalign.storage.files import whole\n"
          "for name in sys.argv[1:]:\n  whole(name).__enter__().write_text('half')\nos._exit(9)")
  subprocess.run([sys.executable, "-c", code, file, other], cwd=runs.ROOT, check=False)
  assert len(names(tmp_path)) == 2
  with whole(file) as partial:
    partial.write_text("whole")
  left = names(tmp_path)
  assert left[1] == "[a].npy" and left[0].endswith(".b.npy") and len(left) == 2


def test_another_machine_is_given_a_day(tmp_path):
  file = tmp_path / "a.npy"
  there = tmp_path / ".partial.another.machine.1.a.npy"
  there.write_text("half")
  for age, kept in ((0, True), (2 * files.DAY, False)):
    os.utime(there, (there.stat().st_mtime - age,) * 2)
    with whole(file) as partial:
      partial.write_text("whole")
    assert there.exists() == kept
