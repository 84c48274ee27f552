"""What a run does when a look shows signs that it cheats its reward (`train.alarm`).

`metrics/alarm.py` finds the signs; here is what follows from them. Pure functions of a run's
progress, which every checkpoint holds.
"""
import dataclasses
from collections.abc import Callable

from jaxalign.config import registry
from jaxalign.config.schema import Config
from jaxalign.devices import processes
from jaxalign.metrics import alarm

STOPPED = "the alarm (train.alarm): "


def begin() -> dict:
  """A run's progress before any alarm. `strength`: factor on the method's own, less after each."""
  return {"alarms": [], "strength": 1.0, "rollbacks": 0}


def look(cfg: Config, progress: dict, step: int, now, base,
         moved: Callable[[], float] | None = None) -> tuple[dict[str, float], dict]:
  """What the alarm adds to the log of a look, and the progress after it.

  Args:
    now, base: samples of the policy and of the base model, from the same prompts and noise.
    moved: tells how far the policy's weights are from where they started, see `policy.movement`.
  """
  if cfg.train.alarm == "off":
    return {}, progress
  measured = alarm.measure(now, base)
  if getattr(now, "path_kl", None) is not None:
    measured["path_kl"] = float(now.path_kl.mean())
  logged = {"eval/saturation_growth": measured["saturation"]["change"],
            "eval/roughness_ratio": measured["roughness"]["ratio"],
            "eval/drift": measured["drift"]["ratio"]}
  if moved is not None and cfg.alarm.weights:
    logged["eval/weights_moved"] = measured["weights"] = moved()
  return logged, heed(cfg, progress, step, alarm.signs(measured, cfg.alarm))


def heed(cfg: Config, progress: dict, step: int, signs: dict[str, str]) -> dict:
  """The progress after a look with these signs; says them, and ends the run where it is told to."""
  if not signs:
    return progress
  text = "; ".join(signs.values())
  processes.say(f"alarm at step {step}: {text}")
  progress = {**progress, "alarms": [*progress["alarms"], {
      "step": step, "strength": progress["strength"], "signs": signs}]}
  if cfg.train.alarm in ("stop", "rollback") and not progress["stopped"]:
    progress["stopped"] = f"{STOPPED}{text}"
  return progress


def to_roll_back(cfg: Config, progress: dict) -> bool:
  """Whether an alarm has ended the steps, and the run goes back rather than ends."""
  return (cfg.train.alarm == "rollback" and progress["stopped"].startswith(STOPPED)
          and progress["rollbacks"] < cfg.alarm.rollbacks)


def rolled_back(cfg: Config, progress: dict, sound: dict) -> dict:
  """The progress that a run goes on with: that of its last sound look, weaker.

  Training time that was thrown away still counts for `train.max_seconds`.
  """
  return {**sound, "alarms": progress["alarms"], "stopped": "", "seconds": progress["seconds"],
          "rollbacks": progress["rollbacks"] + 1,
          "strength": progress["strength"] * cfg.alarm.weaker}


def weakened(cfg: Config, strength: float) -> Config:
  """The config with the method's strength, or the learning rate where it has none, so much less."""
  key = registry.need(cfg.method, "strength")
  if strength == 1.0:
    return cfg
  if key:
    method = dataclasses.replace(cfg.method, **{key: strength * getattr(cfg.method, key)})
    return dataclasses.replace(cfg, method=method)
  return dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, lr=strength * cfg.optim.lr))
