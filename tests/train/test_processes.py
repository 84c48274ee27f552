"""Several processes that form one run: what they exchange, and whole runs through the script."""
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from test_loop import restored

import runs
from jaxalign.devices.sharding import path_of

SCRIPT = runs.ROOT / "launch" / "local_multiprocess.sh"
# As in test_devices.py: with less of a gradient, most of it is rounding.
STRONG = {"method.gamma": "one", "method.x0_net": "theta"}

EXCHANGE = """
import os, pathlib, signal, sys, time
import jax
import numpy as np
from jaxalign.devices import processes, sharding
from jaxalign.storage.checkpoint import Checkpointer

processes.start()
processes.start()                                        # a second call does nothing
me, folder = jax.process_index(), pathlib.Path(sys.argv[1])
assert processes.several() and processes.is_main() == (me == 0)
mesh = sharding.make_mesh(-1, 1, 1)
x = np.arange(8, dtype=np.float32).reshape(4, 2)
split = processes.put({"x": x}, sharding.batch_sharding(mesh))["x"]
assert [s.data.shape for s in split.addressable_shards] == [(2, 2)]
np.testing.assert_array_equal(split.addressable_shards[0].data, x[2 * me:2 * me + 2])
whole = processes.put(x, sharding.replicated(mesh))
for a in (split, whole, processes.put(split, sharding.replicated(mesh))):
  np.testing.assert_array_equal(processes.fetch(a), x)
assert processes.agreed(10 + me) == 10

calls = []
def score(images, prompts):
  calls.append(list(prompts))
  return {"sum": images.sum(1) + np.float32(len(prompts[0]))}
found = processes.by_rows(score, x[[0, 1, 2, 3, 0]], list("abcde"))
np.testing.assert_array_equal(found["sum"], x[[0, 1, 2, 3, 0]].sum(1) + 1)
assert calls == [list(["abc", "dee"][me])], calls       # the last share is filled up

checkpoints = Checkpointer(folder)
processes.barrier("before the checkpoint")
checkpoints.save(3, {"a": split}, {"seconds": 1.0})
checkpoints.wait()
state, progress = checkpoints.restore({"a": split})
assert progress == {"seconds": 1.0} and state["a"].sharding == split.sharding
np.testing.assert_array_equal(processes.fetch(state["a"]), x)
checkpoints.close()

with processes.Notice() as notice:
  for step in range(1, 1000):
    time.sleep(0.05)
    if step == 5 and me == 1:
      os.kill(os.getpid(), signal.SIGTERM)               # only one of them is told
    if notice.at(step):
      break
processes.say("said once")
print("stopped at", step)
"""


RESULTS = """
import pathlib, sys, time
from unittest import mock
import runs
from jaxalign import train
from jaxalign.devices import processes

export = pathlib.Path(sys.argv[1]) / "export"

def run(*args):
  if processes.is_main():
    time.sleep(3)
    export.write_text("whole")
  return {}

with mock.patch("jaxalign.train.loop.run", run):
  train.run(runs.smoke(), export.parent)
print(export.read_text())
"""


def test_all_processes_stay_until_results_are_written(tmp_path):
  out = two_processes(RESULTS, tmp_path)
  assert [o.split()[-1] for o, _ in out] == ["whole", "whole"]     # before it, lines of Gloo


def test_two_processes_exchange_arrays_and_stop_together(tmp_path):
  out = two_processes(EXCHANGE, tmp_path)
  stops = [[line for line in o.splitlines() if line.startswith("stopped at")] for o, _ in out]
  assert stops[0] == stops[1] and 5 <= int(stops[0][0].split()[-1]) < 999
  assert ["said once" in o for o, _ in out] == [True, False]


def two_processes(code, folder):
  """Standard output and error of two processes of one run, both of which must end well."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_NUM_PROCESSES": "2",
         "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
         "PYTHONPATH": f"{runs.ROOT}:{runs.ROOT / 'tests'}"}
  started = [subprocess.Popen([sys.executable, "-c", code, str(folder)],
                              env={**env, "JAX_PROCESS_ID": str(i)}, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(2)]
  out = [p.communicate(timeout=300) for p in started]
  assert [p.returncode for p in started] == [0, 0], "\n".join(e[-2000:] for _, e in out)
  return out


@pytest.mark.parametrize("env, part", [
    ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}, "JAX_NUM_PROCESSES"),
    ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "x", "JAX_PROCESS_ID": "0"},
     "must be numbers"),
])
def test_incomplete_environment(monkeypatch, env, part):
  from jaxalign.devices import processes
  from jaxalign.errors import UserError
  for key, value in env.items():
    monkeypatch.setenv(key, value)
  with pytest.raises(UserError, match=part):
    processes.start()


def test_usage_of_the_script():
  for args in ([], ["2"], ["two", "--config=x"]):
    done = subprocess.run([SCRIPT, *args], capture_output=True, text=True)
    assert done.returncode == 2 and "N processes" in done.stderr


# Whole runs. Compiling takes most of the time, in every process anew.


def command(count, path, **overrides) -> list[str]:
  keys = {"data.prompts": runs.TRAIN, "data.eval_prompts": runs.HELD_OUT, "mesh.data": count,
          "log.to": (), **STRONG, **overrides}
  return [str(SCRIPT), str(count), "--config=configs/nabla_gfn.py:smoke", f"--workdir={path}",
          *(f"--config.{key}={value}" for key, value in keys.items())]


def start(*args, **overrides) -> subprocess.Popen:
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  env.update(PYTHONPATH=str(runs.ROOT), PYTHON=sys.executable,
             JAX_COMPILATION_CACHE_DIR=str(runs.FOLDER / "cache"))
  return subprocess.Popen(command(*args, **overrides), env=env, cwd=runs.ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(started) -> str:
  out, _ = started.communicate(timeout=1800)
  assert started.returncode == 0, out[-3000:]
  return out


def python_keys(overrides) -> dict:
  return {key.replace(".", "__"): value for key, value in {**STRONG, **overrides}.items()}


def single(steps, **overrides) -> pathlib.Path:
  return runs.run(f"one process, {steps} steps", train__steps=steps, **python_keys(overrides))


def moments(path) -> np.ndarray:
  """First moments of the policy in the checkpoint: after one step, a tenth of the gradient."""
  state, _ = restored(path, **python_keys({}))
  leaves = jax.tree_util.tree_leaves_with_path(state["optimizer"])
  return np.concatenate([np.ravel(a) for p, a in leaves if "/mu/" in path_of(p)])


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_first_step_is_that_of_one_process(count):
  path = runs.FOLDER / f"{count} processes"
  out = finish(start(count, path, **{"train.steps": 1}))
  assert out.count("trainable parameters") == 1              # process 0 speaks
  one = single(1)
  (line,), (expected,) = runs.metrics(path), runs.metrics(one)
  for name in ("loss/total", "train/reward", "train/grad_norm"):
    assert line[name] == pytest.approx(expected[name], rel=1e-5), name
  found, wanted = moments(path), moments(one)
  assert found.shape == wanted.shape and wanted.any()
  error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
  assert error < 1e-5, error
  assert json.loads((path / "summary.json").read_text())["device"] == f"cpu x{count}"
  assert (path / "export" / "unet").is_dir()


def await_step(path, step, started) -> None:
  """Returns once `step` is logged."""
  for _ in range(3600):
    if (path / "metrics.jsonl").exists() and any(r["step"] >= step for r in runs.metrics(path)):
      return
    assert started.poll() is None, started.communicate()[0][-3000:]
    time.sleep(0.5)
  raise AssertionError(f"step {step} was not reached")


def workers(script) -> list[int]:
  """Process ids of the Python processes that the script started, in order."""
  listed = subprocess.run(["pgrep", "-P", str(script.pid), "-f", "jaxalign.launch"],
                          capture_output=True, text=True)
  return sorted(map(int, listed.stdout.split()))


@pytest.mark.slow
def test_killed_process_and_sigterm():
  """One of two processes dies, the script ends both; SIGTERM saves; each time the run goes on."""
  path, steps = runs.FOLDER / "two, interrupted", {"train.steps": 8, "train.checkpoint_every": 2}
  started = start(2, path, **steps)
  await_step(path, 3, started)
  os.kill(workers(started)[1], signal.SIGKILL)
  out, _ = started.communicate(timeout=300)
  assert started.returncode == 137, out[-3000:]
  assert not (path / "summary.json").exists()

  started = start(2, path, **steps)
  await_step(path, 5, started)
  started.send_signal(signal.SIGTERM)
  out, _ = started.communicate(timeout=300)
  assert started.returncode == 143 and "resumed at step" in out, out[-3000:]
  saved = max(int(p.name) for p in (path / "checkpoints").iterdir() if p.name.isdigit())
  assert saved == runs.metrics(path)[-1]["step"] and f"saved at step {saved}" in out

  assert f"resumed at step {saved}" in finish(start(2, path, **steps))
  whole = single(8, **{"train.checkpoint_every": 2})
  lines, expected = runs.metrics(path), runs.metrics(whole)
  assert sorted({line["step"] for line in lines}) == list(range(1, 9))
  by_step = {line["step"]: line["loss/total"] for line in lines if "loss/total" in line}
  for line in expected:
    assert by_step[line["step"]] == pytest.approx(line["loss/total"], rel=1e-4), line["step"]
