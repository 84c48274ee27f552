"""The sentence on top of a report: made from the numbers, by the rules below and nothing else."""
import dataclasses
import math
from typing import Literal

from jaxalign.config.schema import AlarmConfig
from jaxalign.metrics import alarm

CLEAR = 2.0              # standard errors, clustered by prompt, from which on a change is one
KEPT = 0.95              # share of the base's diversity that still counts as kept
RULES = f"""\
Change: the mean over pictures of the same prompt and noise, after minus before. SE: its standard
error, clustered by prompt. Spread: the standard deviation of the reward between pictures that the
base model draws of one prompt. A change is clear from {CLEAR:g} SE on.
Reward: rises or falls if its change is clear, else does not clearly change.
Judge: agrees if its change is clear and upward, disagrees if clear and downward, else sees no clear
change.
Diversity: kept if at least {KEPT:.0%} of the base model's is left or the loss is not clear;
collapsed if a clear loss leaves less than the share alarm.diversity of the config; else reduced.
Over-optimisation: the reward rises while the judge disagrees, diversity collapsed, or the pictures
break a rule of the alarm (docs/alarm.md): saturation, grain, features that moved too far."""


@dataclasses.dataclass(frozen=True)
class Clause:
  """A part of the sentence; `tone` says how it is shown."""
  subject: Literal["reward", "judge", "diversity", "signs"]
  text: str
  tone: Literal["good", "bad", "plain"]


def clauses(base: dict, tuned: dict, measured: dict | None, limits: AlarmConfig) -> list[Clause]:
  """What is to be said of a run.

  Args:
    base, tuned: of summary.json.
    measured: of `alarm.measure`, for what only pictures tell; None where there are none.
    limits: of the run's config.
  """
  reward, judge = _size(tuned["reward"]["change"]), _size(tuned["judge"]["change"])
  out = [_reward(tuned["reward"]["change"], reward), _judge(tuned["judge"]["change"], judge),
         _diversity(tuned["diversity"], limits)]
  found = []
  if reward >= CLEAR and judge <= -CLEAR:
    found.append("the reward rises while the judge falls")
  if out[2].tone == "bad" and "collapsed" in out[2].text:
    found.append("diversity collapsed")
  if measured is not None:
    found += [text for name, text in alarm.signs(measured, limits).items()
              if name not in ("judge", "diversity")]
  if found:
    out.append(Clause("signs", "signs of over-optimisation: " + ", ".join(found), "bad"))
  else:
    out.append(Clause("signs", "no sign of over-optimisation", "good"))
  return out


def sentence(parts: list[Clause]) -> str:
  """The clauses as one sentence."""
  text = "; ".join(part.text for part in parts)
  return text[:1].upper() + text[1:] + "."


def errors_of(change: dict) -> str:
  """`"5.3 SE"`, or why there is none."""
  if "sem" not in change:
    return "one prompt, no error"
  return f"{abs(_size(change)):.1f} SE" if change["sem"] else "the same in every prompt"


def _size(change: dict) -> float:
  """A change in its own standard errors; 0 where there is no error to tell."""
  if "sem" not in change or not change["mean"]:
    return 0.0
  if not change["sem"]:
    return math.copysign(1e3, change["mean"])
  return change["mean"] / change["sem"]


def _amount(change: dict) -> str:
  if "mean_in_std" in change:
    return f"{change['mean_in_std']:+.2f} spreads"
  return f"{change['mean']:+.3g}"


def _reward(change, size) -> Clause:
  if abs(size) < CLEAR:
    return Clause("reward", f"reward does not clearly change ({_amount(change)}, "
                            f"{errors_of(change)})", "plain")
  return Clause("reward", f"reward {_amount(change)} ({errors_of(change)})",
                "good" if size > 0 else "bad")


def _judge(change, size) -> Clause:
  who = "the judge, which was never optimised, "
  if abs(size) < CLEAR:
    return Clause("judge", f"{who}sees no clear change ({change['mean']:+.3g}, "
                           f"{errors_of(change)})", "plain")
  verb, tone = ("agrees", "good") if size > 0 else ("disagrees", "bad")
  return Clause("judge", f"{who}{verb} ({change['mean']:+.3g}, {errors_of(change)})", tone)


def _diversity(diversity: dict, limits) -> Clause:
  ratio, size = diversity["ratio_to_base"], _size(diversity["change"])
  if ratio >= KEPT or size > -CLEAR:
    return Clause("diversity", f"diversity kept ({ratio:.0%})", "good")
  if ratio < limits.diversity:
    return Clause("diversity", f"diversity collapsed ({ratio:.0%} is left)", "bad")
  return Clause("diversity", f"diversity reduced ({ratio:.0%} is left)", "bad")
