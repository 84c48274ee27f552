"""A full disk is one line, and nothing else is shown: no thread of any library has a say."""
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
