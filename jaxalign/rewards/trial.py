"""A reward tried out before anything compiles: does it score each picture on its own, and climb?

Pictures are smooth random colours with some noise, the same in every process and run.
"""
import dataclasses
import math
from collections.abc import Callable

import numpy as np

from jaxalign.devices import processes
from jaxalign.errors import UserError

ROWS = 4
DIRECTION = 0.05        # relative: by how much a gradient may miss the slope along itself
STEPS = (1e-3, 4e-3, 16e-3)     # root mean square of a step along the gradient, in pixels of [0, 1]


@dataclasses.dataclass(frozen=True)
class Trial:
  """What a run will ask of a reward.

  Attributes:
    size: `(H, W)` of its pictures. prompts: at least one of those that it will score.
    method: `method.name`, for messages. gradient: whether one will be asked for.
    outline: nothing will run, and only shapes are wanted.
  """
  size: tuple[int, int]
  prompts: list[str]
  method: str = ""
  gradient: bool = True
  outline: bool = False


def pictures(size: tuple[int, int]) -> np.ndarray:
  """`[ROWS, H, W, 3]` f32 in [0.1, 0.9]."""
  generator = np.random.default_rng(0)
  grid = generator.uniform(0.2, 0.8, (ROWS, 5, 5, 3))

  def spread(a, axis, length):       # linear between the points of the grid
    at = np.linspace(0, 4 - 1e-9, length)
    low, part = at.astype(int), at % 1
    part = part.reshape([-1 if i == axis else 1 for i in range(a.ndim)])
    return np.take(a, low, axis) * (1 - part) + np.take(a, low + 1, axis) * part
  smooth = spread(spread(grid, 1, size[0]), 2, size[1])
  return (smooth + generator.uniform(-0.1, 0.1, smooth.shape)).astype(np.float32)


def try_rows(name: str, score: Callable, trial: Trial, tolerance: float) -> None:
  """Refuses a reward whose score of a picture depends on the pictures beside it.

  Args:
    score: `(images [B, H, W, 3] f32, B prompts) -> [B]`.
    tolerance: relative to the largest score.
  Raises:
    UserError: rows alone, in pairs or reordered differ.
  """
  images, prompts = pictures(trial.size), _prompts(trial)
  together = score(images, prompts)
  pick = lambda *rows: score(images[list(rows)], [prompts[i] for i in rows])
  near = tolerance * np.abs(together).max() + 1e-3 * together.std()
  for how, again in (
      ("again", pick(0, 1, 2, 3)), ("in reverse order", pick(3, 2, 1, 0)[::-1]),
      ("in pairs", np.concatenate([pick(0, 1), pick(2, 3)])),
      ("alone", np.concatenate([pick(i) for i in range(ROWS)]))):
    i = int(np.abs(again - together).argmax())
    if not np.abs(again - together)[i] <= near:
      raise UserError(
          f"reward.names: {name} scores a picture {together[i]:.6g} among {ROWS} and "
          f"{again[i]:.6g} {how}: each score must depend on its own picture and prompt alone (a "
          "BatchNorm or Dropout in training, a mean over the batch, unseeded noise?)")


def try_gradient(name: str, score: Callable, gradient: Callable, trial: Trial) -> bool:
  """Whether the reward has a gradient; warns of one that is zero or does not climb.

  Args:
    gradient: `(images, prompts) -> [B, H, W, 3]`, or None if there is none.
  """
  images, prompts = pictures(trial.size), _prompts(trial)
  climb = gradient(images, prompts)
  if climb is None:
    processes.say(f"reward.names: {name} gives no gradient (no_grad, PIL, whole numbers?), so it "
                  "is a black box here")
    return False
  size = float(np.sqrt(np.square(climb, dtype=np.float64).sum()))
  if not math.isfinite(size):
    raise UserError(f"reward.names: {name} gives a gradient that is not finite")
  if size == 0:
    processes.say(f"warning: reward.names: {name} gives a gradient that is zero everywhere "
                  f"(rounding, a threshold?) on {ROWS} pictures; methods that climb it stand still")
    return True
  along = climb / size
  slopes = []
  for rms in STEPS:
    h = min(rms * math.sqrt(images.size), 0.1 / np.abs(along).max())     # no pixel leaves [0, 1]
    up, down = (score((images + sign * h * along).astype(np.float32), prompts)
                for sign in (1, -1))
    slopes.append(float(np.sum(up, dtype=np.float64) - np.sum(down, dtype=np.float64)) / (2 * h))
  nearest = min(slopes, key=lambda slope: abs(slope - size))
  if not abs(nearest - size) <= DIRECTION * size:
    processes.say(f"warning: reward.names: {name}: its gradient says that the score rises by "
                  f"{size:.4g} a unit along it, and the score rises by {nearest:.4g} "
                  f"({abs(nearest - size) / size:.0%} apart): part of it is detached, rounded, or "
                  "not smooth")
  return True


def _prompts(trial: Trial) -> list[str]:
  return [trial.prompts[i * len(trial.prompts) // ROWS] for i in range(ROWS)]
