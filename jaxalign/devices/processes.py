"""Several processes that form one run: how they find each other, what they agree on, who writes.

Every process runs the same program on the same config and holds the same host arrays; the devices
of all of them form one mesh. Process 0 alone writes files and shows progress. The folder of the run
must be one that all processes see. With a single process nothing here costs anything.
"""
import os
import signal
import sys
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from jaxalign.errors import UserError


def start() -> None:
  """Joins the other processes of the run, if the environment says that there are any.

  Either JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say who is who, or
  JAXALIGN_DISTRIBUTED=1 asks JAX to find out from the cluster (TPU slices, GKE, Slurm). To be
  called before anything runs on a device; does nothing after.

  Raises:
    UserError: the variables are incomplete, or the others cannot be reached.
  """
  env = os.environ
  address, found = env.get("JAX_COORDINATOR_ADDRESS"), env.get("JAXALIGN_DISTRIBUTED") == "1"
  if jax.distributed.is_initialized() or not (address or found):
    return
  options = {}
  if address and not found:
    try:
      options = {"num_processes": int(env["JAX_NUM_PROCESSES"]),
                 "process_id": int(env["JAX_PROCESS_ID"])}
    except (KeyError, ValueError) as error:
      raise UserError("JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID "
                      f"must be numbers ({error})") from error
    # All that is to be known is known; asking the cluster would only cost time.
    options["cluster_detection_method"] = "deactivate"
  try:
    jax.distributed.initialize(**options)
  except (RuntimeError, ValueError, TypeError) as error:
    raise UserError(f"cannot join the other processes of this run: {error}") from error


def several() -> bool:
  """Whether there is more than one process; may be asked before devices exist."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
  """Whether this is process 0, the one that writes files."""
  return not several() or jax.process_index() == 0


def say(text: str) -> None:
  """A line on standard output, from process 0."""
  if is_main():
    tqdm.write(text)


def progress(**options) -> tqdm:
  """A progress bar, shown by process 0: renewed twice a second, in a log twice a minute."""
  every = 0.5 if sys.stderr.isatty() else 30.0
  return tqdm(disable=not is_main(), mininterval=every, **options)


def barrier(name: str) -> None:
  """Waits until all processes are here, for as long as a compilation may take one of them."""
  if several():
    # Of the processes, not of their devices, whose collectives give up after less than a minute.
    import orbax.checkpoint as ocp  # takes long, and a run alone does without
    ocp.multihost.sync_global_processes(name, timeout=3600)


def agreed(value: int) -> int:
  """Process 0's value, for what files or clocks tell, which processes may read differently."""
  return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if several() else value


def any_of(value: bool) -> bool:
  """Whether it is so in any process; all must call this."""
  return bool(multihost_utils.process_allgather(np.bool_(value)).any()) if several() else value


def put(tree, shardings):
  """Host arrays, the same in every process, as global ones; each process keeps its own parts.

  Args:
    shardings: one for all, or a tree of them.
  """
  if not several():
    return jax.device_put(tree, shardings)

  def place(a, target):
    if isinstance(a, jax.Array) and not a.is_fully_addressable:
      return jax.device_put(a, target)
    a = np.asarray(a)
    return jax.make_array_from_callback(a.shape, target, lambda index: a[index])
  if isinstance(shardings, jax.sharding.Sharding):
    return jax.tree.map(lambda a: place(a, shardings), tree)
  return jax.tree.map(place, tree, shardings)


def fetch(tree):
  """Host copies of whole arrays. Where one is split over processes, all of them must call this."""
  def whole(a):
    split = isinstance(a, jax.Array) and not (a.is_fully_addressable or a.is_fully_replicated)
    return multihost_utils.process_allgather(a, tiled=True) if split else a
  return jax.device_get(jax.tree.map(whole, tree))


def by_rows(function, images, prompts) -> dict[str, np.ndarray]:
  """`function(images, prompts) -> {name: [B]}` on the host, the rows shared out over processes."""
  if not several():
    return function(images, prompts)
  share = -(-len(images) // jax.process_count())
  rows = np.minimum(np.arange(share) + share * jax.process_index(), len(images) - 1)
  part = function(images[rows], [prompts[i] for i in rows])
  return {name: multihost_utils.process_allgather(np.asarray(value)).reshape(-1)[:len(images)]
          for name, value in part.items()}


class Notice:
  """Whether a run has been asked to end: by SIGTERM, as schedulers do before they kill, or Ctrl-C.

  With one process both are caught inside `with`; elsewhere they end it as always, and so does a
  second Ctrl-C. With several, JAX's own handler catches SIGTERM in any of them, and all agree on
  the step at which they stop.

  Attributes:
    asked: the signal that has come, or None.
  """

  def __init__(self):
    self.asked: signal.Signals | None = None
    self._old = {}

  def __enter__(self) -> "Notice":
    if not several() and threading.current_thread() is threading.main_thread():
      self._old[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._catch)
      if signal.getsignal(signal.SIGINT) is signal.default_int_handler:     # else it is another's
        self._old[signal.SIGINT] = signal.signal(signal.SIGINT, self._catch)
    return self

  def _catch(self, number, frame) -> None:
    self.asked = signal.Signals(number)
    if number == signal.SIGINT:
      signal.signal(signal.SIGINT, self._old[signal.SIGINT])
      say("stopping after this step, which is saved; Ctrl-C again ends the run at once")

  def __exit__(self, *_) -> None:
    for number, old in self._old.items():
      signal.signal(number, old)

  def at(self, step: int) -> bool:
    """Whether to stop now, after update `step`. To be called after every update."""
    if several():
      return multihost_utils.reached_preemption_sync_point(step)
    return self.asked is not None
