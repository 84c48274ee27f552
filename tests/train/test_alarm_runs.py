"""What a run does when the alarm sees something: it says so, ends, or goes back."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
from jaxalign import methods
from jaxalign.errors import UserError
from jaxalign.metrics import alarm as rules
from jaxalign.train import alarm, loop, steps
from jaxalign.train.policy import movement
from jaxalign.train.report import read_finished

SIGNS = {"judge": "the judge fell by 1"}


def cries(monkeypatch, looks):
  """The alarm sees signs at the looks of these numbers, 1 the first; returns what it was asked."""
  asked = []

  def signs(measured, limits):
    asked.append(measured)
    return SIGNS if len(asked) in looks else {}
  monkeypatch.setattr(rules, "signs", signs)
  return asked


def strengths(monkeypatch):
  """`method.beta` of all methods that the loop makes."""
  made, make = [], methods.make

  def recorded(name, models, config, optim):
    made.append(config.beta)
    return make(name, models, config, optim)
  monkeypatch.setattr(loop.methods, "make", recorded)
  return made


def read(path):
  return json.loads((path / "summary.json").read_text())


def test_warn_says_it_and_goes_on(monkeypatch, capsys):
  cries(monkeypatch, {1})
  path = runs.run("alarm_warn", eval__every=1)
  summary = read(path)
  assert summary["steps"] == 3 and not summary["stopped"]
  assert summary["alarms"] == [{"step": 1, "strength": 1.0, "signs": SIGNS}]
  assert "alarm at step 1: the judge fell by 1" in capsys.readouterr().out
  rows = runs.metrics(path)
  assert all({"eval/saturation_growth", "eval/roughness_ratio", "eval/drift"} <= row.keys()
             for row in rows)
  moved = [row["eval/weights_moved"] for row in rows]
  assert 0 < moved[0] < moved[-1] < 0.25


def test_stop_ends_the_run_and_warn_continues_it(monkeypatch):
  cries(monkeypatch, {2})
  path = runs.run("alarm_stop", eval__every=1, train__alarm="stop")
  summary = read(path)
  assert summary["steps"] == 2 and summary["stopped"] == alarm.STOPPED + SIGNS["judge"]
  stop, warn = (runs.smoke(eval__every=1, train__alarm=kind) for kind in ("stop", "warn"))
  assert read_finished(path, stop) == summary and read_finished(path, warn) is None
  runs.run("alarm_stop", eval__every=1, train__alarm="warn")
  assert read(path)["steps"] == 3 and not read(path)["stopped"]


def test_rollback_goes_on_from_the_last_sound_look_more_weakly(monkeypatch, capsys):
  """Looks at 1, 2 (alarm), 2 (alarm again), 2, 3: two rollbacks to step 1, then to the end."""
  cries(monkeypatch, {2, 3})
  made = strengths(monkeypatch)
  path = runs.run("alarm_back", eval__every=1, train__alarm="rollback", alarm__weaker=0.25)
  summary, beta = read(path), runs.smoke().method.beta
  assert made[1:] == [beta, beta / 4, beta / 16]           # the first one only checks the config
  assert summary["steps"] == 3 and not summary["stopped"]
  assert [(a["step"], a["strength"]) for a in summary["alarms"]] == [(2, 1.0), (2, 0.25)]
  assert [row["step"] for row in runs.metrics(path)] == [1, 2, 3]
  said = capsys.readouterr().out
  assert said.count("back at step 1, with 0.25 of the strength") == 1
  assert said.count("back at step 1, with 0.0625 of the strength") == 1
  assert {p.name for p in (path / "checkpoints").iterdir()} == {"2", "3"}


@pytest.mark.slow
def test_rollback_before_any_sound_look_begins_anew_and_gives_up_at_last(monkeypatch):
  cries(monkeypatch, {1, 2, 3})
  path = runs.run("alarm_anew", eval__every=1, train__alarm="rollback", alarm__rollbacks=2)
  summary = read(path)
  assert summary["steps"] == 1 and summary["stopped"].startswith(alarm.STOPPED)
  assert [a["strength"] for a in summary["alarms"]] == [1.0, 0.5, 0.25]


@pytest.mark.slow
def test_a_run_that_was_rolled_back_resumes_as_weak_as_it_was(monkeypatch):
  """Killed after the rollback, before its next checkpoint of its own."""
  cries(monkeypatch, {2})
  taken, take = [], steps.take

  def killed(*args, **kwargs):
    taken.append(args[3]["strength"])
    if len(taken) == 2:
      raise KeyboardInterrupt
    return take(*args, **kwargs)
  monkeypatch.setattr(steps, "take", killed)
  with pytest.raises(KeyboardInterrupt):
    runs.run("alarm_killed", eval__every=1, train__alarm="rollback")
  made = strengths(monkeypatch)
  path = runs.run("alarm_killed", eval__every=1, train__alarm="rollback")
  assert taken == [1.0, 0.5, 0.5] and made[-1] == runs.smoke().method.beta / 2
  assert read(path)["steps"] == 3 and len(read(path)["alarms"]) == 1


def test_off_looks_for_nothing(monkeypatch):
  asked = cries(monkeypatch, {1})
  progress = {**steps.begin(0.0)}
  assert alarm.look(runs.smoke(train__alarm="off"), progress, 1, None, None) == ({}, progress)
  assert not asked


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_how_far_weights_went(adapter):
  rng = np.random.default_rng(0)
  base = {"one": {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)},
          "two": {"kernel": rng.normal(size=(3, 4))}}
  if adapter == "full":
    start = {name: dict(layer) for name, layer in base.items()}
    policy = jax.tree.map(lambda a: jnp.asarray(1.5 * a, jnp.float32), start)
    expected = 0.5
  else:                              # of one layer, begun from an adapter that is not zero
    start = {"two": {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=(2, 4))}}
    policy = jax.tree.map(lambda a: jnp.asarray(2 * a, jnp.float32), start)
    expected = np.linalg.norm(3 * start["two"]["a"] @ start["two"]["b"]) / np.linalg.norm(
        base["two"]["kernel"])
  moved = movement(runs.smoke(model__adapter=adapter), start, base)
  assert moved(policy) == pytest.approx(expected, rel=1e-5)
  assert moved(start) < 1e-6


def test_weights_are_not_measured_where_their_rule_is_off(monkeypatch):
  monkeypatch.setattr(rules, "measure", lambda now, base: {
      "saturation": {"change": 0.0}, "roughness": {"ratio": 1.0}, "drift": {"ratio": 1.0}})
  asked = cries(monkeypatch, {})
  look = lambda **options: alarm.look(runs.smoke(**options), steps.begin(0.0), 1, None, None,
                                      lambda: 0.125)[0].get("eval/weights_moved")
  assert look() == 0.125 and look(alarm__weights=0.0) is None
  assert [measured.get("weights") for measured in asked] == [0.125, None]


def test_weakened():
  cfg = runs.smoke()
  assert alarm.weakened(cfg, 1.0) is cfg
  assert alarm.weakened(cfg, 0.5).method.beta == cfg.method.beta / 2
  ddpo = runs.smoke("ddpo")                                # has no key for its strength
  weaker = alarm.weakened(ddpo, 0.5)
  assert weaker.optim.lr == ddpo.optim.lr / 2 and weaker.method == ddpo.method


def test_nothing_to_go_back_to_without_a_policy():
  with pytest.raises(UserError, match="train.alarm='rollback' goes back"):
    runs.smoke("dno", train__alarm="rollback")
  assert runs.smoke("dno", train__alarm="stop").train.alarm == "stop"
