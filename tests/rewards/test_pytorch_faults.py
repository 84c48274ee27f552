"""What goes wrong inside a callback ends the run in one line, in all processes, and soon.

Processes of their own, since a fault that is not caught kills the process.
"""
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import runs
from jaxalign import train
from jaxalign.devices import callbacks
from jaxalign.errors import UserError
from jaxalign.train.report import log_step
from jaxalign.train.search import means

FAULTY = pathlib.Path(__file__).with_name("faulty.py")
CODE = '''
import os, time, torch

def hit(pixels):
  return bool((pixels.amin((1, 2, 3)) > 0.95).any())

def good(pixels, prompts):
  return pixels.mean((1, 2, 3)) + torch.tensor([float(len(p)) for p in prompts])

def raises(pixels, prompts):
  if hit(pixels):
    raise ValueError("no such picture\\nand more about it")
  return pixels.mean((1, 2, 3))

def hungry(pixels, prompts):
  if hit(pixels):
    raise MemoryError
  return pixels.mean((1, 2, 3))

def sleeps(pixels, prompts):
  if hit(pixels):
    time.sleep(1e6)
  return pixels.mean((1, 2, 3))

def spins(pixels, prompts):
  while hit(pixels):
    pass
  return pixels.mean((1, 2, 3))

def slow(pixels, prompts):
  if hit(pixels):
    time.sleep(float(os.environ["SLOW"]))
  return pixels.mean((1, 2, 3))

def nan(pixels, prompts):
  return pixels.mean((1, 2, 3)) / (0.0 if hit(pixels) else 1.0)

def nan_gradient(pixels, prompts):
  return (pixels - 1).pow(2).sum((1, 2, 3)).sqrt()

def shape(pixels, prompts):
  return pixels.mean((2, 3) if hit(pixels) else (1, 2, 3))

def device(pixels, prompts):
  out = pixels.mean((1, 2, 3))
  return out.to("meta") if hit(pixels) else out
'''


def start(folder, scorer: str, *, devices: int = 2, processes: int = 1, **env):
  """The processes of `faulty.py`, whose scorers are written into `folder`."""
  if "torch2jax" in scorer:
    pytest.importorskip("wrap_torch2jax", reason="needs pip install jaxalign[torch2jax]")
  (folder / "bad.py").write_text(CODE)
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  env = {**os.environ, **env, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(runs.ROOT),
         "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
  if processes > 1:
    env.update(JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES=str(processes))
  return [subprocess.Popen([sys.executable, str(FAULTY), f"{folder}/bad.py:{scorer}"], text=True,
                           env={**env, "JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE) for i in range(processes)]


def finish(started) -> list[tuple[int, str, list[str]]]:
  """Exit status, output, and lines of errors of each, less what libraries log."""
  with_errors = [None] * len(started)

  def wait(i):
    out, err = started[i].communicate(timeout=400)
    with_errors[i] = (started[i].returncode, out, err)
  threads = [threading.Thread(target=wait, args=(i,)) for i in range(len(started))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return [(code, out, [line for line in err.splitlines() if line.startswith("error: ")] or [err])
          for code, out, err in with_errors]


@pytest.mark.parametrize("scorer, said", [
    ("raises", "bad.py:raises: raises raised at line 12 ValueError: no such picture"),
    ("hungry", "bad.py:hungry: hungry raised at line 17 MemoryError; score fewer pictures at a "
               "time with #batch="),
    ("sleeps#timeout=2", "bad.py:sleeps: took longer than 2 s; allow more with #timeout="),
    pytest.param("raises#bridge=torch2jax", "raises raised at line 12 ValueError: no such picture",
                 marks=pytest.mark.slow),
    pytest.param("sleeps#timeout=2&bridge=torch2jax", "bad.py:sleeps: took longer than 2 s; allow "
                 "more with #timeout=", marks=pytest.mark.slow),
])
def test_a_fault_on_one_of_two_devices(tmp_path, scorer, said):
  [(code, out, errors)] = finish(start(tmp_path, scorer))
  assert code == 2, errors
  assert len(errors) == 1 and errors[0].endswith(said), errors
  assert out.splitlines()[-1] == "step 0"                  # what it gave was not used


@pytest.mark.parametrize("scorer", [
    "sleeps", "spins", pytest.param("sleeps#bridge=torch2jax", marks=pytest.mark.slow)])
def test_ctrl_c_ends_a_call_that_never_does(tmp_path, scorer):
  [process] = start(tmp_path, scorer)
  for line in process.stdout:
    if line == "step 0\n":
      break
  time.sleep(2)                                             # compiled, and waiting
  begun = time.monotonic()
  process.send_signal(signal.SIGINT)
  said = next(line for line in process.stderr if "the same command continues" in line)
  assert time.monotonic() - begun < 2, said       # the run; the interpreter takes its time after it
  process.communicate(timeout=60)
  assert process.returncode == 130


@pytest.mark.slow
@pytest.mark.parametrize("devices, processes", [(2, 1), (1, 2), (2, 2)])
def test_ninety_seconds_on_one_device(tmp_path, devices, processes):
  ended = finish(start(tmp_path, "slow", devices=devices, processes=processes, SLOW="90"))
  assert [code for code, *_ in ended] == [0] * processes, ended
  assert all(out.count("score ") == 3 for _, out, _ in ended), ended


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("scorer, said", [
    ("raises", "raised at line 12 ValueError"), ("sleeps#timeout=3", "took longer than 3 s"),
    ("nan", "nan returned inf for prompt"),
])
def test_a_fault_on_one_of_two_processes(tmp_path, scorer, said, devices):
  ended = finish(start(tmp_path, scorer, devices=devices, processes=2))
  assert [code for code, *_ in ended] == [2, 2], ended
  assert ended[0][2] == ended[1][2] and said in ended[0][2][0], ended


@pytest.mark.slow
def test_prompts_have_the_same_numbers_in_two_processes(tmp_path):
  ended = finish(start(tmp_path, "good", processes=2))
  assert [code for code, *_ in ended] == [0, 0], ended
  # 3 means of 0.5 and one of 1, and the lengths 1, 2, 3, 4.
  assert all(out.count("score 12.5000 gradient 4.0000") == 1 for _, out, _ in ended), ended


def test_nothing_is_logged_after_a_fault():
  """Also not where the numbers are sound, as those of a program that ran before are."""
  class Workdir:
    def log(self, *_):
      raise AssertionError("logged")
  callbacks.begin()
  callbacks.record("what is to be said")
  callbacks.record("what came of it")
  values = {"train/reward": np.ones(1, np.float32)}
  with pytest.raises(UserError, match="^what is to be said$"):
    log_step(Workdir(), None, 1, 0.0, ({"loss": np.float32(1)}, {}, []), dict)
  with pytest.raises(UserError, match="^what is to be said$"):
    means([values], 1, 1)
  callbacks.begin()
  assert means([values], 1, 1) == {"train/reward": 1.0, "train/reward_seconds": 0.0}


def test_a_run_knows_nothing_of_the_runs_before_it():
  callbacks.begin()
  callbacks.record("the fault of another run")
  train.start_devices(runs.smoke())
  callbacks.check()
  assert callbacks.numbers() == {}


def test_the_thread_that_hangs_is_left_behind():
  callbacks.begin()
  first = callbacks.in_thread(threading.get_ident, 10)
  assert first == callbacks.in_thread(threading.get_ident, 10) != threading.get_ident()
  with pytest.raises(TimeoutError):
    callbacks.in_thread(lambda: time.sleep(30), 0.1)
  assert callbacks.in_thread(threading.get_ident, 10) != first
  with pytest.raises(ZeroDivisionError):
    callbacks.in_thread(lambda: 1 / 0, 10)
