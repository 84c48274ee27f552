"""One owner of a folder at a time; a dead one frees it."""
import json
import os
import shutil
import subprocess
import sys
import time

import pytest

import runs
from jaxalign.errors import UserError
from jaxalign.storage import lock
from jaxalign.storage.lock import Lock

HOLD = """
import pathlib, sys, time
from jaxalign.storage.lock import Lock
held = Lock(pathlib.Path(sys.argv[1]), "--workdir=DIR")
print("held", flush=True)
time.sleep(60)
"""


def hold(folder):
  process = subprocess.Popen([sys.executable, "-c", HOLD, folder], cwd=runs.ROOT,
                             stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "held\n"
  return process


def test_a_second_process_is_told_who_has_it_until_that_one_is_killed(tmp_path):
  other = hold(tmp_path)
  try:
    message = rf"--workdir=DIR: in use by process {other.pid} on "
    with pytest.raises(UserError, match=message):
      Lock(tmp_path, "--workdir=DIR")
  finally:
    other.kill()
    other.wait()
  Lock(tmp_path, "--workdir=DIR").release()


def test_released_and_taken_again(tmp_path):
  for _ in range(2):
    held = Lock(tmp_path, "x")
    held.check()
    with pytest.raises(UserError, match="x: in use"):
      Lock(tmp_path, "x")
    held.release()
    held.release()
  assert (tmp_path / lock.FILE).read_bytes() == b""


@pytest.mark.parametrize("silence, free", [(0, False), (lock.SILENT + 5, True)])
def test_an_owner_on_another_host_lives_while_it_gives_signs_of_life(tmp_path, silence, free):
  file = tmp_path / lock.FILE
  file.write_text(json.dumps({"host": "elsewhere", "process": 7}))
  os.utime(file, (time.time() - silence,) * 2)
  if free:
    Lock(tmp_path, "x").release()
  else:
    with pytest.raises(UserError, match="x: in use by process 7 on elsewhere"):
      Lock(tmp_path, "x")


def test_signs_of_life(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "BEAT", 0.01)
  held = Lock(tmp_path, "x")
  os.utime(tmp_path / lock.FILE, (0, 0))
  for _ in range(200):
    if (tmp_path / lock.FILE).stat().st_mtime:
      break
    time.sleep(0.01)
  assert time.time() - (tmp_path / lock.FILE).stat().st_mtime < 10
  held.release()


@pytest.mark.parametrize("content", [b"\xff", b"[]", b"{}", b'{"host": 1}'])
def test_a_damaged_file_is_free(tmp_path, content):
  (tmp_path / lock.FILE).write_bytes(content)
  Lock(tmp_path, "x").release()


def test_a_folder_that_went_away_or_was_replaced(tmp_path):
  folder = tmp_path / "run"
  folder.mkdir()
  held = Lock(folder, "--workdir=DIR")
  shutil.rmtree(folder)
  with pytest.raises(UserError, match="--workdir=DIR: the folder was deleted or replaced"):
    held.check()
  folder.mkdir()
  Lock(folder, "y").release()
  with pytest.raises(UserError, match="deleted or replaced"):
    held.check()
  held.release()
