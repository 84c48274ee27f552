"""The steps of a run, whatever one of them is: clock, looks, checkpoints, and how the run ends."""
import signal
import time
from collections.abc import Callable

import jax

from jaxalign.config.schema import Config
from jaxalign.devices import processes
from jaxalign.errors import Stopped, UserError
from jaxalign.storage.checkpoint import Checkpointer
from jaxalign.train import alarm
from jaxalign.train.bar import Bar, Work
from jaxalign.train.workdir import Workdir

AGREE_EVERY = 10         # steps between questions that several processes must answer alike


def begin(judge: float) -> dict:
  """The progress of a run before its first step; `judge` is the base model's score.

  Saved with every checkpoint. `seconds`: of steps, without compilation and evaluation. `look_due`:
  saved, on SIGTERM, before the evaluation of that step.
  """
  return {"seconds": 0.0, "best_step": 0, "below_base": 0, "stopped": "", "look_due": False,
          "best_judge": judge, **alarm.begin()}


def resume(cfg: Config, workdir: Workdir, checkpoints: Checkpointer, content, progress: dict):
  """`(step, content)` of the latest sound checkpoint, whose progress replaces `progress`.

  `(0, None)` where there is none at all.

  Raises:
    UserError: the checkpoints are damaged, or gone though the run has a result.
  """
  if not checkpoints.latest_step():
    checkpoints.tidy()
    if (workdir.path / "summary.json").exists():
      raise UserError(f"--workdir={workdir.path}: this run has a result, but no checkpoint "
                      "to go on from; choose another --workdir")
    return 0, None
  saved, old = checkpoints.restore(content)
  checkpoints.tidy()
  progress.update(old)
  if not cfg.train.max_seconds or progress["seconds"] < cfg.train.max_seconds:
    if progress["stopped"].startswith("train.max_seconds"):
      progress["stopped"] = ""             # it was given more time
  if cfg.train.alarm in ("off", "warn") and progress["stopped"].startswith(alarm.STOPPED):
    progress["stopped"] = ""               # it is to go on all the same
  processes.say(f"resumed at step {checkpoints.restored}")
  return checkpoints.restored, saved


def take(cfg: Config, workdir: Workdir, checkpoints: Checkpointer, progress: dict, step: int, *,
         advance: Callable, report: Callable, look: Callable, content: Callable,
         work: Work, ended: Callable = lambda step: "") -> int:
  """Takes steps until `train.steps`, or until something ends the run before; returns the last one.

  Args:
    progress: see `begin`; changed in place.
    advance: `step -> values`; takes the step after `step` and does not wait for the device.
    report: `(step, seconds, values, look) -> dict`; logs a step, whose values it fetches while the
      next one runs, with what `look()` adds; returns all that.
    look: `step -> dict`; the evaluation after that step, which judges the progress.
    content: `() -> tree`; what a checkpoint holds.
    work: of a step, for its speed.
    ended: `step -> str`; why the run ends after that step, or "".
  Raises:
    Stopped: SIGTERM or Ctrl-C; the state is saved.
  """
  before, clock, pending = progress["seconds"], time.monotonic(), None

  def settle(look=dict):
    nonlocal pending
    if pending is not None:
      bar.show(*pending[:2], report(*pending, look))
      pending = None

  if progress["look_due"]:
    progress["look_due"] = False
    workdir.log(step, before, look(step))
    clock = time.monotonic()
  with processes.Notice() as notice, Bar(cfg, step, work) as bar:
    while step < cfg.train.steps and not progress["stopped"]:
      values = advance(step)
      settle()
      step += 1
      due = bool(cfg.eval.every and step % cfg.eval.every == 0)
      if due or step == cfg.train.steps:
        jax.block_until_ready(values)    # all that was dispatched belongs to this side of the clock
      seconds = round(before + time.monotonic() - clock, 3)
      pending, progress["seconds"] = (step, seconds, values), seconds
      if notice.at(step):
        settle()
        progress["look_due"] = due
        checkpoints.save(step, content(), progress)
        checkpoints.wait()
        by_hand = notice.asked == signal.SIGINT
        raise Stopped(f"stopped by {'Ctrl-C' if by_hand else 'SIGTERM'} and saved at step {step}",
                      130 if by_hand else 143)
      if due:
        settle(lambda: look(step))
        clock, before = time.monotonic(), seconds          # evaluation is not training time
      progress["stopped"] = progress["stopped"] or ended(step) or _out_of_time(cfg, step, seconds)
      if step % cfg.train.checkpoint_every == 0 or step == cfg.train.steps or progress["stopped"]:
        settle()                         # a state that went wrong is never saved
        checkpoints.save(step, content(), progress)
    settle()
  checkpoints.wait()
  if progress["stopped"]:
    processes.say(f"stopped at step {step}: {progress['stopped']}")
  return step


def _out_of_time(cfg: Config, step: int, seconds: float) -> str:
  limit = cfg.train.max_seconds
  if not limit or (processes.several() and step % AGREE_EVERY):
    return ""
  return f"train.max_seconds={limit:g} reached" if processes.agreed(seconds >= limit) else ""
