"""The one line that shows a run at work: reward, judge, path KL and speed, beside the time left."""
import math
from typing import NamedTuple

from jaxalign.config.schema import Config
from jaxalign.devices import chips, processes

# Logged name -> what the bar calls it. A score of the judge is that of the last look.
SHOWN = {"train/reward": "reward", "train/best_reward": "best", "eval/judge": "judge",
         "train/margin_accuracy": "margin_accuracy", "train/path_kl": "KL"}


class Work(NamedTuple):
  """What a step is: `images` of it, `operations` (nan if they can't be counted), its devices."""
  images: int
  operations: float
  devices: tuple


class Bar:
  """A context: the bar of the steps of a run, from `step` on, as often renewed as a person reads.

  The time left is that of all that a step costs on the average, looks included; the speeds are
  those of training alone.
  """

  def __init__(self, cfg: Config, step: int, work: Work):
    self._work, self._peak, self._shown = work, chips.peak(work.devices), {}
    self._bar = processes.progress(total=cfg.train.steps, initial=step, desc=cfg.recipe,
                                   unit="step", smoothing=0)

  def __enter__(self) -> "Bar":
    return self

  def __exit__(self, *_) -> None:
    self._bar.close()

  def show(self, step: int, seconds: float, logged: dict[str, float]) -> None:
    """After `step` and so many seconds of training, what was logged of it."""
    for name, label in SHOWN.items():
      if name in logged:
        self._shown[label] = f"{logged[name]:.{2 if label == 'KL' else 4}f}"
    if seconds:
      self._shown |= self._speed(step / seconds)
    self._bar.set_postfix(self._shown, refresh=False)
    self._bar.update(step - self._bar.n)

  def _speed(self, steps: float) -> dict[str, str]:
    """Of so many steps a second."""
    rate = steps * self._work.operations
    shown = {"img/s": f"{steps * self._work.images:.3g}"}
    if self._peak:
      return shown | ({} if math.isnan(rate) else {"MFU": f"{rate / self._peak:.1%}"})
    return shown | ({} if math.isnan(rate) else {"GFLOP/s": f"{rate / 1e9:.3g}"})
