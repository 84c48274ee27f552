"""Training of the embedded emoji world from drawings: autoencoder, denoiser, scorers.

Each is a `Task`; `loop.run` trains any of them. Order: `emoji_vae`, then on its latents `emoji`
(UNet), `emoji_sd3` (transformer) and `signs` (one for words), each with its text encoders; and
`scene_clip`, `scene_judge` and `scene_check`, which score scenes.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxalign.config import registry
from jaxalign.errors import UserError

TASKS = {
    "emoji_vae": "jaxalign.pretrain.autoencoder",
    "emoji": "jaxalign.pretrain.scene_denoisers:emoji",
    "emoji_sd3": "jaxalign.pretrain.scene_denoisers:emoji_sd3",
    "signs": "jaxalign.pretrain.sign_denoiser",
    "scene_check": "jaxalign.pretrain.crops",
    "scene_clip": "jaxalign.pretrain.scene_scorers:scene_clip",
    "scene_judge": "jaxalign.pretrain.scene_scorers:scene_judge",
}


class Look(NamedTuple):
  """What is seen of a network between steps.

  Attributes:
    figures: scalars by `group/name`.
    images: `[P, K, H, W, 3]` in [0, 1], P rows that `labels` name; None where it draws none.
  """
  figures: dict[str, float]
  images: Any = None
  labels: tuple[str, ...] = ()


class Task(NamedTuple):
  """Something to train.

  A module of `TASKS` offers `Config`, a frozen dataclass, and `make(cfg) -> Task`.

  Attributes:
    init: `(key) -> params`.
    tables: tree of arrays that batches are drawn from.
    draw: `(tables, key) -> batch`, all that is random in a step; arrays `[B, ...]`.
    loss: `(params, batch) -> (loss, metrics)`.
    look: `(params, thorough) -> Look`; the thorough one is the last, and what is reported.
    save: `(params, folder, record)` writes the asset; `record` says how it was made.
  """
  init: Callable
  tables: Any
  draw: Callable
  loss: Callable
  look: Callable
  save: Callable


class Kind(NamedTuple):
  """One of several tasks of a module, which offers what a module of `TASKS` does."""
  Config: type
  make: Callable


def load(name: str):
  """What offers task `name`; raises UserError naming `task.name` if there is none."""
  if name not in TASKS:
    raise UserError(f"task.name={name!r} is unknown; choose one of {', '.join(TASKS)}")
  return registry.resolve(TASKS[name])
