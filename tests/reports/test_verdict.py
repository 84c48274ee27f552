"""The sentence on top of a report, by its rules."""
import itertools

import numpy as np
import pytest

from jaxalign.config.schema import AlarmConfig
from jaxalign.reports import verdict

LIMITS = AlarmConfig()


def change(mean, sem=0.1, **others):
  return {"mean": mean, "sem": sem, **others}


def result(reward=0.3, judge=0.3, ratio=1.0, loss=0.0):
  """Changes with a standard error of 0.1 each; of diversity, `loss` of it."""
  base = {"reward": {"mean": 0.0}, "judge": {"mean": 0.0}, "diversity": {"mean": 1.0}}
  tuned = {"reward": {"mean": reward, "change": change(reward, mean_in_std=2 * reward)},
           "judge": {"mean": judge, "change": change(judge)},
           "diversity": {"mean": ratio, "ratio_to_base": ratio, "change": change(loss)}}
  return base, tuned


def tones(**options):
  parts = verdict.clauses(*result(**options), None, LIMITS)
  assert [p.subject for p in parts] == ["reward", "judge", "diversity", "signs"]
  return [p.tone for p in parts], verdict.sentence(parts)


def test_a_sound_run():
  found, text = tones()
  assert found == ["good"] * 4
  assert text == ("Reward +0.60 spreads (3.0 SE); the judge, which was never optimised, agrees "
                  "(+0.3, 3.0 SE); diversity kept (100%); no sign of over-optimisation.")


@pytest.mark.parametrize("options, expected, words", [
    ({"reward": 0.19}, ["plain", "good", "good", "good"], "reward does not clearly change (+0.38"),
    ({"reward": -0.3}, ["bad", "good", "good", "good"], "reward -0.60 spreads (3.0 SE)"),
    ({"judge": 0.1}, ["good", "plain", "good", "good"], "sees no clear change (+0.1, 1.0 SE)"),
    ({"judge": -0.3}, ["good", "bad", "good", "bad"],
     "disagrees (-0.3, 3.0 SE); diversity kept (100%); signs of over-optimisation: the reward "
     "rises while the judge falls."),
    # A judge that falls with the reward is no over-optimisation.
    ({"reward": -0.3, "judge": -0.3}, ["bad", "bad", "good", "good"], "no sign of"),
    ({"ratio": 0.94, "loss": -0.19}, ["good", "good", "good", "good"], "diversity kept (94%)"),
    ({"ratio": 0.94, "loss": -0.3}, ["good", "good", "bad", "good"], "reduced (94% is left)"),
    ({"ratio": 0.5, "loss": -0.3}, ["good", "good", "bad", "bad"],
     "diversity collapsed (50% is left); signs of over-optimisation: diversity collapsed."),
    ({"ratio": 0.5, "loss": -0.1}, ["good", "good", "good", "good"], "diversity kept (50%)")])
def test_each_rule(options, expected, words):
  found, text = tones(**options)
  assert found == expected and words.lower() in text.lower()


def test_what_pictures_tell_is_a_sign():
  measured = {"reward": {"change": 0.3, "errors": 3.0}, "judge": {"change": 0.3, "errors": 3.0},
              "diversity": {"change": 0.0, "errors": 0.0, "ratio": 1.0},
              "saturation": {"change": 0.4, "errors": 9.0},
              "roughness": {"change": 0.0, "errors": 0.0, "ratio": 1.0}, "drift": {"ratio": 1.0}}
  last = verdict.clauses(*result(), measured, LIMITS)[-1]
  assert last.tone == "bad" and "40% more of the pictures' values are saturated" in last.text


def test_without_an_error_nothing_is_clear():
  base, tuned = result()
  for score in ("reward", "judge", "diversity"):
    del tuned[score]["change"]["sem"]
  parts = verdict.clauses(base, tuned, None, LIMITS)
  assert [p.tone for p in parts] == ["plain", "plain", "good", "good"]
  assert "one prompt, no error" in parts[0].text


def test_the_same_change_in_every_prompt_is_clear():
  base, tuned = result()
  tuned["reward"]["change"]["sem"] = 0.0
  assert verdict.clauses(base, tuned, None, LIMITS)[0].tone == "good"
  tuned["reward"]["change"]["mean"] = 0.0
  assert verdict.clauses(base, tuned, None, LIMITS)[0].tone == "plain"


def test_a_sentence_for_all_numbers():
  values = np.linspace(-0.5, 0.5, 5)
  texts = {tones(reward=r, judge=j, ratio=d, loss=d - 1)[1]
           for r, j, d in itertools.product(values, values, (0.0, 0.7, 1.0, 1.3))}
  assert len(texts) == 5 * 5 * 4
  assert all(text[0].isupper() and text.endswith(".") and text.count(";") == 3 for text in texts)
