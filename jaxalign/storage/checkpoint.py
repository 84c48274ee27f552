"""Checkpoints of a run: the whole state and the loop's own numbers, saved atomically by Orbax."""
import contextlib
import logging
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxalign.devices import sharding
from jaxalign.errors import UserError

logging.getLogger("absl").setLevel(logging.WARNING)   # Orbax reports every directory it makes


class Checkpointer:
  """Saves `(state, progress)` by step; asynchronous and atomic, oldest ones deleted.

  A save that was cut off leaves a temporary directory that is never read.

  Args:
    directory: made if missing.
    keep: how many checkpoints are retained.
  """

  def __init__(self, directory: pathlib.Path, keep: int = 1):
    self._directory = directory
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
    with self._errors("write"):
      self._manager.save(step, args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)), force=True)

  def restore(self, like, step: int | None = None):
    """`(state, progress)` at `step` (the latest by default), placed and typed like the tree `like`.

    Args:
      like: arrays or ShapeDtypeStructs with shardings.
    Raises:
      UserError: there is no checkpoint, or it is damaged, or another version or config wrote it.
    """
    step = self.latest_step() if step is None else step
    if step is None:
      raise UserError(f"{self._directory}: no checkpoint there")
    with self._errors("read", lambda: self._way_out(step, like)):
      abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
      restored = self._manager.restore(step, args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()))
    return restored.state, restored.progress

  def _way_out(self, step: int, like) -> str:
    """What to do about a checkpoint that could not be read: sound ones are never given up."""
    folder = self._directory / str(step)
    shapes = lambda tree: {sharding.path_of(path): tuple(leaf.shape) for path, leaf
                           in jax.tree_util.tree_flatten_with_path(tree)[0]}
    try:
      there = shapes(ocp.PyTreeCheckpointer().metadata((folder / "state").resolve())
                     .item_metadata.tree)
    except Exception:    # as above; what describes the arrays is damaged too, or of another Orbax
      there = wanted = None
    else:
      wanted = shapes(like)
    if there != wanted:
      name = min(path for path in there.keys() | wanted.keys()
                 if there.get(path) != wanted.get(path))
      old, new = ("absent" if tree.get(name) is None else list(tree[name])
                  for tree in (there, wanted))
      return (f"; another version or config wrote it: {name} is {old} there and {new} here; go on "
              "with what wrote it, or choose another --workdir")
    if any(other < step for other in self._manager.all_steps()):
      return f"; move {folder} elsewhere to go on from the one before"
    return "; choose another --workdir"

  def wait(self) -> None:
    """Blocks until what was started is on disk."""
    with self._errors("write"):
      self._manager.wait_until_finished()

  def close(self) -> None:
    self.wait()
    self._manager.close()

  @contextlib.contextmanager
  def _errors(self, verb: str, way_out=lambda: ""):
    try:
      yield
    except UserError:
      raise
    except Exception as error:  # Orbax, tensorstore and the OS each raise kinds of their own
      reason = " ".join(str(error).split())[:300]
      raise UserError(
          f"{self._directory}: cannot {verb} checkpoint: {reason}{way_out()}") from error
