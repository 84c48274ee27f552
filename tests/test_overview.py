"""`python -m jaxalign`: the commands, the recipes, and the way to both."""
import os
import pathlib
import subprocess
import sys

import pytest

import runs
from jaxalign import __main__ as overview
from jaxalign.config.places import python
from jaxalign.config.recipes import load_recipe, shipped_recipes


def call(*args, cwd=None):
  return subprocess.run([sys.executable, "-m", "jaxalign", *args], capture_output=True, text=True,
                        cwd=cwd, env={"PYTHONPATH": str(runs.ROOT), "PATH": "/usr/bin:/bin"})


def test_alone_it_lists_all_there_is(tmp_path):
  done = call(cwd=tmp_path)
  assert done.returncode == 0
  lines = [line.split() for line in done.stdout.splitlines()]
  words = {line[0] for line in lines if line}
  files = {file.stem for file in (runs.ROOT / "jaxalign").glob("*.py")}
  commands = files - {"__init__", "__main__", "errors"}
  assert commands == set(overview.commands()) and commands <= words
  assert {file.stem for file in (runs.ROOT / "configs").glob("[a-z]*.py")} <= words
  assert max(map(len, done.stdout.splitlines())) <= 120
  assert all(len(text) > 10 for text in overview.commands().values())


def test_a_name_runs_that_command(tmp_path):
  (tmp_path / "file.txt").write_text("x")
  done = call("inspect", "nothing.bin", cwd=tmp_path)
  assert done.returncode == 2 and done.stderr.startswith("error: nothing.bin: no such file")


def test_another_name_suggests_the_nearest(capsys):
  assert overview.run(["jaxalign", "lanch"]) == 2
  assert "no command 'lanch'; did you mean 'launch'?" in capsys.readouterr().err


def test_the_name_of_this_python(tmp_path, monkeypatch):
  """As the shell of the user finds it: the environment may not be active."""
  for name in ("here", "there"):
    folder = tmp_path / name / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").symlink_to("/bin/sh")                  # an environment's is a link
  monkeypatch.setattr(sys, "executable", str(tmp_path / "here" / ".venv" / "bin" / "python"))
  monkeypatch.chdir(tmp_path / "here")
  for active, expected in (("here", "python"), ("there", os.path.join(".venv", "bin", "python")),
                           ("none", os.path.join(".venv", "bin", "python"))):
    monkeypatch.setenv("PATH", str(tmp_path / active / ".venv" / "bin"))
    assert python() == expected
  monkeypatch.chdir(tmp_path / "there")
  assert python() == sys.executable


def test_recipes_are_found_by_name():
  found = shipped_recipes()
  assert found["nabla_gfn"].name == "nabla_gfn.py" and list(found) == sorted(found)
  assert all(isinstance(file, pathlib.Path) and file.is_file() for file in found.values())
  with pytest.raises(Exception, match="no recipe 'nabla_gnf'; did you mean 'nabla_gfn'"):
    load_recipe("jaxalign:nabla_gnf")
