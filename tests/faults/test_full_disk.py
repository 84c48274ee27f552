"""A full disk is one line, and nothing else is shown: no thread of any library has a say."""
import os
import subprocess
import sys

import full_disk
import pytest

import runs

# What a run has open: event files, rows, a checkpoint that is written by threads.
CODE = """
import contextlib, json, pathlib, sys
import jax.numpy as jnp
from jaxalign.config import command, recipes
from jaxalign.storage.checkpoint import Checkpointer
from jaxalign.train.workdir import Workdir

def main(argv):
  folder = pathlib.Path(sys.argv[1])
  with contextlib.ExitStack() as stack:
    workdir = Workdir(folder, recipes.parse(recipes.load_recipe("jaxalign:ddpo:smoke")))
    workdir.create()
    stack.callback(workdir.close)
    checkpoints = Checkpointer(folder / "checkpoints", keep=2)
    stack.callback(checkpoints.close)
    state = {str(i): jnp.arange(3e4) + i for i in range(8)}
    checkpoints.restore(state) if checkpoints.latest_step() else None
    start = checkpoints.restored
    workdir.open_metrics(start, ("tensorboard",))
    for step in range(start + 1, 6):
      workdir.log(step, 1.0, {f"train/{i}": 1.0 for i in range(20)})
      checkpoints.save(step, state, {})
    checkpoints.wait()
    rows = (folder / "metrics.jsonl").read_text().splitlines()
  print("done", start, [json.loads(row)["step"] for row in rows])

sys.exit(command.exit_status(lambda: main(None)))
"""


@pytest.mark.skipif(not full_disk.available(), reason="no C compiler")
@pytest.mark.parametrize("size", [12_000, 1_200_000])
def test_one_line_and_the_same_command_goes_on(tmp_path, size):
  run = lambda **options: subprocess.run(
      [sys.executable, "-c", CODE, tmp_path / "run"], cwd=runs.ROOT, text=True,
      capture_output=True, timeout=120, **options)
  full = run(env=full_disk.environment(tmp_path, size))
  lines = full.stderr.strip().splitlines()
  assert full.returncode == 2 and len(lines) == 1, full.stderr
  assert lines[0].startswith("error: ") and "No space left on device" in lines[0]
  assert full.stdout == ""
  again = run()
  assert again.returncode == 0 and again.stderr == "", again.stderr
  assert again.stdout.startswith("done") and again.stdout.endswith("[1, 2, 3, 4, 5]\n")


@pytest.mark.parametrize("stdout", ["a log", "a closed pipe", "none"])
def test_the_last_line_of_a_log_is_the_error(tmp_path, stdout):
  """Where stdout and stderr are one file, or what was printed before can go nowhere."""
  code = ("import sys\nfrom jaxalign.config import command\n"
          "def main():\n  print('begun')\n  raise command.UserError('why')\n"
          "sys.exit(command.exit_status(main))\n")
  env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
  read, closed = os.pipe()
  os.close(read)
  with open(tmp_path / "log", "w") as log, open(closed, "w") as pipe:
    out = {"a log": log, "a closed pipe": pipe}.get(stdout)
    status = subprocess.run(
        [sys.executable, "-c", code], cwd=runs.ROOT, env=env, timeout=120, stderr=log, stdout=out,
        preexec_fn=None if out else lambda: os.close(1)).returncode
  before = "begun\n" if stdout == "a log" else ""
  assert (status, (tmp_path / "log").read_text()) == (2, f"{before}error: why\n")
