"""Host code inside compiled programs: it must neither raise nor hang, and says here how it went.

Where a callback raises on one of several devices, the others wait for it in a collective until XLA
kills the process; where it takes long, likewise; and Ctrl-C is not seen meanwhile. So callbacks
record what went wrong and answer NaN, the loop asks `check` after each program, slow ones `meet`
before they let their devices go on, and what may never end runs in a thread that can be left.

All of this is one per process, as the devices and the thread are; the processes of a run do the
same in the same order.
"""
import contextlib
import ctypes
import dataclasses
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # its client alone knows how to wait for other processes

from jaxalign.devices import processes
from jaxalign.errors import UserError

TICK = 0.1             # seconds between looks at whether to go on waiting
PATIENCE = 10 ** 6     # seconds that XLA waits for a device: its callback has a limit of its own


class Ended(Exception):
  """A callback is to answer at once: the run has a fault, or was interrupted."""


@dataclasses.dataclass
class _Job:
  function: Callable
  done: threading.Event = dataclasses.field(default_factory=threading.Event)
  started: float = 0.0
  result: Any = None
  error: BaseException | None = None


class _State:
  """What callbacks of this process have in common."""

  def __init__(self):
    self.in_use, self.fault, self.interrupted = False, "", False
    self.jobs: queue.SimpleQueue | None = None         # of the thread that is not lost
    self.thread: threading.Thread | None = None
    self.seconds, self.checks, self.watched = 0.0, 0, False
    self.tallies: dict[str, int] = {}
    self.lock = threading.Lock()


_STATE = _State()


def forget() -> None:
  """A run begins: no callback is in use, and what happened to those of runs before is forgotten."""
  _STATE.in_use, _STATE.fault, _STATE.interrupted, _STATE.seconds = False, "", False, 0.0
  _STATE.tallies = {}


def begin() -> None:
  """Callbacks are in use from now on, and what happened to earlier ones is forgotten."""
  forget()
  _STATE.in_use = True
  _watch_interrupts()


def be_patient() -> None:
  """Makes XLA wait on CPUs as long as a callback may take; to be called before devices exist."""
  flag, flags = "--xla_cpu_collective_call_terminate_timeout_seconds", os.environ.get(
      "XLA_FLAGS", "")
  if flag not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {flag}={PATIENCE}".strip()


def ended() -> bool:
  """Whether a callback is to answer at once, as its answer is of no use any more."""
  return bool(_STATE.fault) or _STATE.interrupted


def record(fault: str) -> None:
  """The line that the run is to end with; the first one counts."""
  with _STATE.lock:
    _STATE.fault = _STATE.fault or fault


def check() -> None:
  """Ends the run if a callback went wrong, in all processes alike; all must call this.

  To be called when a program's results were awaited, before they are logged or saved. Callbacks of
  programs that are still under way answer at once from then on.

  Raises:
    UserError: what was recorded, here or in another process. KeyboardInterrupt: Ctrl-C.
  """
  if not _STATE.in_use:
    return
  if _STATE.interrupted:
    raise KeyboardInterrupt
  _STATE.checks += 1
  meet("check", _STATE.checks)
  if _STATE.interrupted:
    raise KeyboardInterrupt
  if _STATE.fault:
    raise UserError(_STATE.fault)


def tally(name: str, count: int) -> None:
  """Counts something that the log is to have as `name`; it has a 0 there too from now on."""
  with _STATE.lock:
    _STATE.tallies[name] = _STATE.tallies.get(name, 0) + count


def numbers() -> dict[str, float]:
  """For the log, since this was last asked: what was counted, and the thread's seconds of work."""
  with _STATE.lock:
    found = {name: float(count) for name, count in _STATE.tallies.items()}
    _STATE.tallies = dict.fromkeys(_STATE.tallies, 0)
    if _STATE.in_use:                    # else the thread has no part in this run
      found["train/reward_seconds"] = round(_STATE.seconds, 3)
    _STATE.seconds = 0.0
  return found


@contextlib.contextmanager
def lowering(method: str):
  """For JAX's refusal of forward mode through a `custom_vjp`, which names nobody.

  Raises:
    UserError: names the method, `method.name`.
  """
  try:
    yield
  except TypeError as error:
    if not _STATE.in_use or "custom_vjp" not in str(error):
      raise
    raise UserError(f"method.name={method!r} asks for derivatives in forward mode, which a reward "
                    "in PyTorch (reward.names) does not give; write it in JAX") from error


def meet(name: str, number: int) -> None:
  """Waits for the other processes at meeting `number` of this name, and learns of their faults.

  Collectives between processes give up after half a minute, this does not: it ends when all have
  come, or one has a fault.

  Args:
    number: counts up from 1, by one.
  """
  if not processes.several():
    return
  client, me = distributed.global_state.client, jax.process_index()
  key = lambda number, process: f"jaxalign/{name}/{number}/{process}"
  client.key_value_set(key(number, me), f"!{_STATE.fault}")
  if number > 2:                     # all have left that one, or they had not come to the last
    client.key_value_delete(key(number - 2, me))
  for other in range(jax.process_count()):
    found = None
    while other != me and found is None:
      try:
        found = client.blocking_key_value_get(key(number, other), 1000)
      except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
          raise
        if _STATE.interrupted or (_STATE.fault and name != "check"):
          return
    if found and found != "!":
      record(found[1:])


def in_thread(function: Callable, timeout: float):
  """`function()` in the one thread for such work, which is left behind if that does not end.

  Raises:
    TimeoutError: it took longer than `timeout` seconds, not counting what was before it in the
      queue. Ended: see there. KeyboardInterrupt: only in the main thread. Else what it raised.
  """
  if threading.current_thread() is _STATE.thread:
    return function()
  with _STATE.lock:
    if _STATE.jobs is None:
      _STATE.jobs = queue.SimpleQueue()
      _STATE.thread = threading.Thread(target=_work, args=(_STATE.jobs,), daemon=True,
                                       name="jaxalign callbacks")
      _STATE.thread.start()
    jobs, job = _STATE.jobs, _Job(function)
  jobs.put(job)
  try:
    while not job.done.wait(TICK):
      if ended():
        raise Ended
      if job.started and time.monotonic() - job.started > timeout:
        raise TimeoutError
  except BaseException as error:
    if isinstance(error, KeyboardInterrupt):
      _STATE.interrupted = True
    _leave(jobs)
    raise
  if job.error is not None:
    raise job.error
  return job.result


def _leave(jobs: queue.SimpleQueue) -> None:
  """Lets go of the thread that works on these jobs; another one will be made where one is needed.

  Python that it runs is ended, as the interpreter cannot shut down beside it; what it calls is not.
  """
  with _STATE.lock:
    if _STATE.jobs is not jobs:
      return
    thread, _STATE.jobs, _STATE.thread = _STATE.thread, None, None
  jobs.put(None)
  ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident),
                                             ctypes.py_object(SystemExit))
  thread.join(TICK)


def _work(jobs: queue.SimpleQueue) -> None:
  while (job := jobs.get()) is not None:
    job.started = time.monotonic()
    try:
      job.result = job.function()
    except BaseException as error:               # the caller's, whatever it is
      job.error = error
    with _STATE.lock:
      _STATE.seconds += time.monotonic() - job.started
    job.done.set()


def _watch_interrupts() -> None:
  """Lets callbacks go on Ctrl-C, wherever the main thread is; it then sees the signal itself.

  Python's own handler runs between two of its steps, which a main thread that waits for a device
  does not take; the byte that comes with a signal is written at once.
  """
  if _STATE.watched or threading.current_thread() is not threading.main_thread():
    return
  _STATE.watched = True
  here, there = socket.socketpair()
  there.setblocking(False)
  before = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)

  def watch():
    while received := here.recv(64):
      if signal.SIGINT in received:
        _STATE.interrupted = _STATE.in_use
      if before >= 0:
        with contextlib.suppress(OSError):
          os.write(before, received)
  _STATE.sockets = here, there                   # closed with the process
  threading.Thread(target=watch, daemon=True, name="jaxalign interrupts").start()
