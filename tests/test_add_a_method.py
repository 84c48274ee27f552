"""The page that adds a method, followed to the letter in a copy of the package."""
import os
import re
import shutil
import subprocess
import sys

import pytest

import runs

PAGE = (runs.ROOT / "docs" / "add_a_method.md").read_text()
FILES = re.findall(r"^`(\S+)`:\n\n```\w+\n(.*?)^```$", PAGE, re.M | re.S)
COMMANDS = re.findall(r"^python (-m .*)$", PAGE[PAGE.index("## Run it"):], re.M)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
  """The package, its recipes, docs and tests, with the page's files added."""
  root = tmp_path_factory.mktemp("copy")
  skipped = shutil.ignore_patterns("__pycache__", "assets", "images", "results", "sweeps")
  for name in ("jaxalign", "configs", "docs", "tests"):
    shutil.copytree(runs.ROOT / name, root / name, ignore=skipped)
  (root / "jaxalign" / "assets").symlink_to(runs.ROOT / "jaxalign" / "assets")
  for name, content in FILES:
    assert not (root / name).exists()
    (root / name).write_text(content)
  return root


def run(root, command: str):
  """Runs `python COMMAND` there, and nothing of ours."""
  out = subprocess.run([sys.executable, *command.split()], cwd=root, text=True, check=False,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                       env={**os.environ, "PYTHONPATH": str(root)})
  assert out.returncode == 0, out.stdout[-3000:]
  return out.stdout


def test_four_files_are_added():
  assert [name for name, _ in FILES] == ["jaxalign/methods/rwr.py", "configs/rwr.py",
                                         "docs/methods/rwr.md", "tests/methods/test_rwr.py"]


def test_its_tests_and_the_battery(copy):
  assert "tests/methods/test_all.py" in COMMANDS[0]
  run(copy, COMMANDS[0].replace("-m pytest", "-m pytest -c /dev/null --rootdir=. -q -p no:xdist"))


@pytest.mark.slow
@pytest.mark.parametrize("command", [
    pytest.param(COMMANDS[1], id="unet"), pytest.param(COMMANDS[2], id="transformer")])
def test_it_runs_on_both_families(copy, command):
  out = run(copy, f"{command} --config.data.prompts={runs.TRAIN} --config.train.steps=2 "
                  f"--config.data.eval_prompts={runs.HELD_OUT} --config.eval.every=0")
  assert "diversity kept" in out
  run(copy, f"{command} --config.data.prompts={runs.TRAIN} --config.train.steps=2 "
            f"--config.data.eval_prompts={runs.HELD_OUT} --config.eval.every=0")     # finished
