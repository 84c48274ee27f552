"""Mixtures of rewards: terms made comparable, their shares, and runs with them."""
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import rankdata

import runs
from jaxalign import metrics
from jaxalign.errors import UserError
from jaxalign.rewards import make_reward, mixture, reweighted
from jaxalign.testing import analytic
from jaxalign.train.evaluation import Samples, calibrated
from jaxalign.train.experiment import Experiment

RNG = np.random.default_rng(0)
NAMES = ("brightness", "grayness")


def test_ranks():
  """As scipy's, in numpy and in JAX; ties share a place, and who is alone has the middle."""
  groups = np.asarray([3, 3, 3, 3, 0, 0, 7, 0])
  scores = np.asarray([1.0, 9.0, 9.0, -4.0, 5.0, 5.0, 2.0, 5.0], np.float32)
  want = np.zeros(8)
  for group in (0, 3):
    rows = groups == group
    want[rows] = 2 * (rankdata(scores[rows]) - 1) / (rows.sum() - 1) - 1
  for found in (mixture.ranks(scores, groups), mixture.ranks(jnp.asarray(scores), groups)):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, want, atol=1e-6)
  np.testing.assert_allclose(mixture.ranks(scores, 0 * groups)[[3, 1]], [-1, 13 / 14 - 1 / 14])


def test_shares_add_up():
  """A term of twice the spread decides four times as much; one of the prompt alone, nothing."""
  groups = np.repeat(np.arange(500), 4)
  terms = {"a": RNG.normal(size=2000), "b": RNG.normal(size=2000) + groups, "c": 9.0 * groups}
  found = mixture.shares({"a": 1.0, "b": 2.0, "c": 5.0}, terms, groups)
  assert sum(found.values()) == pytest.approx(1) and found["c"] == pytest.approx(0, abs=1e-9)
  assert found["a"] == pytest.approx(0.2, abs=0.03)
  against = mixture.shares({"a": 1.0, "b": -0.5}, {"a": terms["a"], "b": terms["a"]}, groups)
  assert against == {"a": pytest.approx(2), "b": pytest.approx(-1)}
  assert mixture.shares({"c": 1.0}, {"c": terms["c"]}, groups) == {}


def experiment(normalise, terms, method="ddpo", names=NAMES, weights=(1.0, 3.0)):
  """An outline of an experiment, and samples of its base model with these scores."""
  cfg = runs.smoke(method, reward__names=names, reward__weights=weights,
                   reward__normalise=normalise)
  reward = make_reward(names, weights)
  models = analytic.make_models(
      analytic.Mixture(np.ones(1), np.zeros((1, 2)), np.ones(1)), analytic.linear_reward([1.0, 0]))
  exp = Experiment(config=cfg, mesh=None, pipeline=None, reward=reward, judge=None, observer=None,
                   frozen={}, judge_params={}, put=None, encode=None,
                   models=dataclasses.replace(models, score=reward.score))
  scores = {f"reward/{name}": terms[name] for name in names if len(names) > 1}
  total = sum(w * terms[name] for name, w in zip(names, weights))
  return exp, Samples(None, {"reward": total, **scores}, None)


TERMS = {"brightness": RNG.normal(0.5, 0.01, (6, 8)), "grayness": RNG.normal(0.5, 4.0, (6, 8))}


def test_std_divides_by_the_spread_on_the_base_model():
  exp, base = experiment("std", TERMS)
  new = calibrated(exp, base)
  spread = {name: metrics.within_prompt_std(v) for name, v in TERMS.items()}
  assert new.reward.weights == {"brightness": pytest.approx(1 / spread["brightness"]),
                                "grayness": pytest.approx(3 / spread["grayness"])}
  again = base.reweighted(exp.reward.weights, new.reward.weights)
  assert new.models.reward_std == pytest.approx(metrics.within_prompt_std(again.scores["reward"]))
  images = jnp.asarray(RNG.uniform(size=(3, 8, 8, 3)), jnp.float32)
  parts = new.reward.terms(new.reward.params, images, {})
  np.testing.assert_allclose(
      new.models.score(exp.reward.params, images, {}),
      sum(new.reward.weights[name] * v for name, v in parts.items()), rtol=1e-5)
  back = again.reweighted(new.reward.weights, exp.reward.weights)
  np.testing.assert_allclose(back.scores["reward"], base.scores["reward"], rtol=1e-6)


def test_a_single_reward_may_be_divided_too():
  exp, base = experiment("std", TERMS, names=("brightness",), weights=(5.0,))
  new = calibrated(exp, base)
  assert new.models.reward_std == pytest.approx(5.0, rel=1e-5)
  assert new.reward.weights["brightness"] == pytest.approx(
      5 / metrics.within_prompt_std(TERMS["brightness"]))


def test_raw_scores_and_ranks_keep_their_weights():
  for normalise, method, std in (("none", "ddpo", None), ("rank", "nft", None),
                                 ("rank", "ddpo", None)):
    exp, base = experiment(normalise, TERMS, method)
    new = calibrated(exp, base)
    assert new.reward is exp.reward
    assert base.reweighted(exp.reward.weights, new.reward.weights) is base
    if normalise == "none":
      std = metrics.within_prompt_std(base.scores["reward"])
    else:
      prompts = np.repeat(np.arange(6), 8) * (method == "nft")
      places = sum(w * mixture.ranks(TERMS[name].ravel(), prompts)
                   for name, w in zip(NAMES, (1.0, 3.0)))
      std = metrics.within_prompt_std(places.reshape(6, 8))
    assert new.models.reward_std == pytest.approx(std)


def test_refused():
  exp, base = experiment("std", {**TERMS, "grayness": np.full((6, 8), 0.3)})
  with pytest.raises(UserError, match="reward.normalise='std': 'grayness' gives every sample"):
    calibrated(exp, base)
  for method in ("nabla_gfn", "best_of_n", "sft"):
    with pytest.raises(UserError, match=f"for method.name='{method}'; set 'std'"):
      runs.smoke(method, reward__normalise="rank")
  with pytest.raises(UserError, match=r"reward\.normalise='mean' is not one of"):
    runs.smoke("ddpo", reward__normalise="mean")


def test_reweighted_sums_share_their_parts():
  reward = make_reward(("brightness", "jpeg_compressibility"), (1.0, 1.0))
  other = reweighted(reward, {"brightness": 2.0, "jpeg_compressibility": 0.0})
  images = (255 * RNG.uniform(size=(2, 16, 16, 3))).astype(np.uint8)
  terms = other.terms(images, ["", ""])
  np.testing.assert_allclose(other.score(images, ["", ""]), 2 * terms["brightness"])
  assert [part for *_, part in other.parts] == [part for *_, part in reward.parts]


@pytest.mark.slow
@pytest.mark.parametrize("method, normalise", [("nft", "rank"), ("nft", "std"), ("dno", "std"),
                                               ("fk_steering", "std")])
def test_runs_with_a_mixture(method, normalise):
  """Terms are logged apart, with what each decides; the summary is in the unit of the sum."""
  from jaxalign.train import inference, loop
  cfg = runs.smoke(method, reward__names=NAMES, reward__weights=(1.0, 1.0),
                   reward__normalise=normalise)
  folder = runs.FOLDER / f"mixture {method} {normalise}"
  summary = (inference if cfg.at_inference else loop).run(cfg, folder)
  if not cfg.at_inference:
    for line in runs.metrics(folder):
      shares = [line[f"train/share/{name}"] for name in NAMES]
      assert sum(shares) == pytest.approx(1) and "train/reward/brightness" in line
  base = summary["base"]
  terms = [base[f"reward/{name}"]["mean"] for name in NAMES]
  if normalise == "std":
    assert base["reward"]["mean"] > 3 * sum(terms)               # their spread is far below 1
  else:
    assert base["reward"]["mean"] == pytest.approx(sum(terms), rel=1e-4)
