"""Checkpoints of a run: the whole state and the loop's own numbers, saved atomically by Orbax.

Beside both lies what they are to be when they are read again: a digest of every array.
"""
import contextlib
import copy
import errno
import hashlib
import json
import logging
import os
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxalign.devices import processes, sharding
from jaxalign.errors import UserError
from jaxalign.storage.digest import described, digests

# Orbax reports every directory it makes, and shows each error that it raises as a traceback first.
logging.getLogger("absl").setLevel(logging.CRITICAL)
# Of several arrays that a full disk refuses one is raised, and asyncio shows the others.
logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
_DISK = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)]


class Damaged(UserError):
  """A checkpoint that cannot be read, or whose numbers are not those that were saved."""


class Checkpointer:
  """Saves `(state, progress)` by step; asynchronous and atomic, oldest ones deleted.

  A save that was cut off leaves a temporary directory that is never read, and is deleted by the
  next run's first save. That also renames damaged checkpoints which were passed over to
  `damaged.STEP`.

  Args:
    directory: made if missing.
    keep: how many checkpoints are retained.
  Attributes:
    restored: the step of what was last restored; 0 before.
  """

  def __init__(self, directory: pathlib.Path, keep: int = 1):
    self._directory, self._keep, self.restored = directory, keep, 0
    self._passed_over, self._tidied = [], False
    with self._errors("write"):
      self._manager = ocp.CheckpointManager(
          directory.resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True))

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state, progress: dict[str, Any]) -> None:
    """Starts saving; the arrays are copied before this returns, so they may be donated after.

    Raises:
      UserError: the directory cannot be written.
    """
    progress = copy.deepcopy(progress)   # written by a thread, and the caller's own goes on
    with self._errors("write"):
      self.tidy()
      self._manager.save(step, args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress),
          digests=ocp.args.JsonSave(_seal(state, progress))), force=True)

  def tidy(self) -> None:
    """Takes out of the way what killed runs have left, and what was damaged; once.

    For who writes here: the first save does it at the latest.
    """
    if self._tidied:
      return
    self._tidied = True
    if processes.is_main():
      for left in self._directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(left, ignore_errors=True)
      for step in self._passed_over:
        aside = self._directory / f"damaged.{step}"
        shutil.rmtree(aside, ignore_errors=True)
        (self._directory / str(step)).rename(aside)
      # Older ones than are kept, whose deletion was cut off.
      steps = sorted(int(p.name) for p in self._directory.iterdir() if p.name.isdecimal())
      for step in steps[:-self._keep]:
        shutil.rmtree(self._directory / str(step), ignore_errors=True)
    processes.barrier("checkpoints tidied")
    self._manager.reload()

  def forget_from(self, step: int) -> None:
    """Deletes checkpoints of this step and of later ones."""
    self.wait()
    with self._errors("write"):
      for later in [s for s in self._manager.all_steps() if s >= step]:
        self._manager.delete(later)

  def restore(self, like, step: int | None = None):
    """`(state, progress)`, placed and typed like the tree `like`; all processes must call this.

    Args:
      like: arrays or ShapeDtypeStructs with shardings.
      step: of the checkpoint; None for the latest sound one, and a line says which are damaged.
    Raises:
      Damaged: it cannot be read, or is not what was saved; of several, the latest.
      UserError: there is none, or another version or config wrote it.
    """
    self.wait()
    steps = sorted(self._manager.all_steps(), reverse=True) if step is None else [step]
    if not steps:
      raise UserError(f"{self._directory}: no checkpoint there")
    faults = {}
    for step in steps:
      try:
        found = self._restore(like, step)
      except Damaged as error:
        faults[step] = error
      if not processes.any_of(step in faults):
        self._passed_over, self.restored = steps[:steps.index(step)], step
        for error in faults.values():
          processes.say(f"{error}; step {step} is sound and taken instead")
        return found
    fault = faults.get(steps[0]) or Damaged(f"{self._directory / str(steps[0])}: damaged, says "
                                            "another process")
    raise Damaged(f"{fault}; no checkpoint before it is sound; choose another --workdir"
                  ) from fault.__cause__

  def _restore(self, like, step: int):
    folder = self._directory / str(step)
    seal = self._read_seal(folder, step)
    self._check_same(folder, like, seal)
    with self._errors("read", Damaged, folder):
      abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
      restored = self._manager.restore(step, args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()))
    if seal:
      now = _seal(restored.state, restored.progress)
      wrong = [name for name, text in seal["arrays"].items() if now["arrays"][name] != text]
      wrong += ["progress"] * (now["progress"] != seal["progress"])
      if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise Damaged(f"{folder}: cannot read checkpoint: {wrong[0]}{more} is not what was saved")
    return restored.state, restored.progress

  def _read_seal(self, folder: pathlib.Path, step: int) -> dict | None:
    """What `_seal` made; None where a version without digests wrote the checkpoint."""
    if not (folder / "digests").is_dir():
      return None
    with self._errors("read", Damaged, folder):
      seal = self._manager.restore(
          step, args=ocp.args.Composite(digests=ocp.args.JsonRestore())).digests
      if seal.pop("self") != _hash(seal):
        raise Damaged(f"{folder}: cannot read checkpoint: its digests are not what was saved")
    return seal

  def _check_same(self, folder: pathlib.Path, like, seal: dict | None) -> None:
    """UserError where a checkpoint that is sound itself is of another state than `like`."""
    flat = lambda tree: {sharding.path_of(path): described(leaf) for path, leaf
                         in jax.tree_util.tree_flatten_with_path(tree)[0]}
    if seal:
      there = {name: text.split()[0] for name, text in seal["arrays"].items()}
    else:
      with self._errors("read", Damaged, folder):
        there = flat(ocp.PyTreeCheckpointer().metadata((folder / "state").resolve())
                     .item_metadata.tree)
    wanted = flat(like)
    if there != wanted:
      name = min(path for path in there.keys() | wanted.keys()
                 if there.get(path) != wanted.get(path))
      raise UserError(
          f"{folder}: cannot read checkpoint: another version or config wrote it: {name} is "
          f"{there.get(name, 'absent')} there and {wanted.get(name, 'absent')} here; go on with "
          "what wrote it, or choose another --workdir")

  def wait(self) -> None:
    """Blocks until what was started is on disk."""
    with self._errors("write"):
      self._manager.wait_until_finished()

  def close(self) -> None:
    try:
      self.wait()
    finally:
      with self._errors("write"):
        self._manager.close()

  @contextlib.contextmanager
  def _errors(self, verb: str, kind=UserError, folder: pathlib.Path | None = None):
    try:
      yield
    except UserError:
      raise
    except Exception as error:  # Orbax, tensorstore and the OS each raise kinds of their own
      reason = " ".join(str(error).split())
      reason = next((text for text in _DISK if text in reason), reason[:300])
      raise kind(f"{folder or self._directory}: cannot {verb} checkpoint: {reason}") from error


def _seal(state, progress: dict) -> dict:
  """What tells whether both are still the same, and itself: a flipped bit in it is found too."""
  seal = {"arrays": digests(state), "progress": _hash(progress)}
  return {**seal, "self": _hash(seal)}


def _hash(content) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
