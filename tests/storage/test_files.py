"""Whole files: none is seen half written, writers do not disturb each other, nothing is left."""
import inspect
import os
import subprocess
import sys

import pytest

import runs
from jaxalign.storage import files
from jaxalign.storage.files import UNFINISHED, whole, whole_folder


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


def content(folder):
  return {str(file.relative_to(folder)): file.read_text()
          for file in sorted(folder.rglob("*")) if file.is_file()}


def write(folder, text, last="index"):
  with whole_folder(folder, removed=("b", "gone"), last=last) as new:
    (new / "a").mkdir()
    for name in ("a/1", "c", "index"):
      (new / name).write_text(text)


def test_a_folder_appears_whole_and_keeps_what_is_not_of_it(tmp_path):
  folder = tmp_path / "export"
  write(folder, "old")
  assert content(folder) == {"a/1": "old", "c": "old", "index": "old"}
  for name in ("b", "mine"):
    (folder / name).write_text("kept?")
  (folder / "a" / "2").write_text("of the old one")
  write(folder, "new")
  assert content(folder) == {"a/1": "new", "c": "new", "index": "new", "mine": "kept?"}
  with pytest.raises(KeyError), whole_folder(folder) as new:
    (new / "c").write_text("half")
    raise KeyError
  assert content(folder)["c"] == "new" and names(tmp_path) == ["export"]


# Writes each folder in a process that dies without a word before its next system call of a kind.
KILLED = """
import os, sys
from jaxalign.storage.files import whole_folder

def die_after(calls):
  def counted(f):
    def call(*args, **kwargs):
      nonlocal calls
      calls -= 1
      if calls < 0:
        os._exit(9)
      return f(*args, **kwargs)
    return call
  for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
    setattr(os, name, counted(getattr(os, name)))

for calls, folder in enumerate(sys.argv[1:]):
  if not os.fork():
    die_after(calls)
    write(folder, "new")
    os._exit(0)
  print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.parametrize("new", [False, True])
def test_killed_at_any_moment_and_mended_by_the_next_run(tmp_path, new):
  """A folder is the old one, or the new one, or says that it is neither."""
  folders = [tmp_path / f"{i:02d}" / "export" for i in range(40)]
  for folder in folders:
    folder.parent.mkdir()
    if not new:
      write(folder, "old")
      (folder / "mine").write_text("mine")
  done = subprocess.run([sys.executable, "-c", inspect.getsource(write) + KILLED, *folders],
                        cwd=runs.ROOT, capture_output=True, text=True, check=True)
  mine = {} if new else {"mine": "mine"}
  seen = set()
  for folder, status in zip(folders, map(int, done.stdout.split()), strict=True):
    found = content(folder)
    seen.add((status, found.get("index"), UNFINISHED in found))
    ages = {text for name, text in found.items() if name not in ("mine", UNFINISHED)}
    if "index" in found:
      assert ages == {found["index"]}
    else:
      assert UNFINISHED in found or new and not found
    write(folder, "again")
    assert content(folder) == {"a/1": "again", "c": "again", "index": "again", **mine}
    assert names(folder.parent) == ["export"]
  if new:
    assert seen == {(9, None, False), (9, "new", False), (0, "new", False)}
  else:
    assert seen == {(9, "old", False), (9, "old", True), (9, None, True), (9, "new", True),
                    (9, "new", False), (0, "new", False)}
