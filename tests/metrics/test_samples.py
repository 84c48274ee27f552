"""Means, errors, diversity and the tilt against closed forms, plain loops and simulation."""
import itertools

import numpy as np
import pytest

from jaxalign.metrics import (
  clustered_mean,
  paired_difference,
  pairwise_diversity,
  tilt_expectation,
  vendi_score,
  within_prompt_std,
)


def _rng(seed=0):
  return np.random.default_rng(seed)


def test_clustered_mean_by_hand():
  # Prompt means 2 and 6: mean 4, deviation of the means sqrt(8), over sqrt(2).
  assert clustered_mean([[1, 3], [5, 7]]) == {"mean": 4.0, "n": 4, "sem": pytest.approx(2.0)}


def test_one_prompt_has_no_clustered_error():
  assert clustered_mean([[1.0, 2.0, 3.0]]) == {"mean": 2.0, "n": 3}


def test_clustered_error_matches_repeated_experiments():
  """Prompts differ by 2, samples by 1: the naive error sigma/sqrt(n) would be far too small."""
  rng = _rng()
  runs = [clustered_mean(2 * rng.standard_normal((20, 1)) + rng.standard_normal((20, 8)))
          for _ in range(400)]
  actual = np.std([r["mean"] for r in runs])
  assert np.sqrt(np.mean([r["sem"] ** 2 for r in runs])) == pytest.approx(actual, rel=0.12)


def test_within_prompt_std_ignores_prompt_levels():
  values = _rng().standard_normal((500, 6)) * 3
  assert within_prompt_std(values) == pytest.approx(3, rel=0.05)
  shifted = values + 100 * np.arange(500)[:, None]
  assert within_prompt_std(shifted) == pytest.approx(within_prompt_std(values), rel=1e-6)


def test_paired_difference():
  rng = _rng()
  base = rng.standard_normal((10, 4)) + 50 * rng.standard_normal((10, 1))
  tuned = base + 0.5
  result = paired_difference(tuned, base)
  assert result["mean"] == pytest.approx(0.5) and result["sem"] == pytest.approx(0, abs=1e-12)
  assert result["mean_in_std"] == pytest.approx(0.5 / within_prompt_std(base))
  scaled = paired_difference(10 * tuned + 3, 10 * base + 3)
  assert scaled["mean_in_std"] == pytest.approx(result["mean_in_std"])
  assert "mean_in_std" not in paired_difference(np.ones((2, 2)), np.zeros((2, 2)))


def test_diversity_by_loops_and_by_hand():
  features = _rng().standard_normal((3, 5, 7)).astype(np.float32)
  unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
  loops = [np.mean([np.linalg.norm(u[i] - u[j]) for i, j in itertools.combinations(range(5), 2)])
           for u in unit]
  result = pairwise_diversity(features)
  np.testing.assert_allclose(result["per_prompt"], loops, rtol=1e-5)
  assert result["mean"] == pytest.approx(np.mean(loops), rel=1e-5)
  assert result["sem"] == pytest.approx(np.std(loops, ddof=1) / 3 ** 0.5, rel=1e-5)
  orthogonal = pairwise_diversity(np.eye(4)[None])
  assert orthogonal["mean"] == pytest.approx(2 ** 0.5) and "sem" not in orthogonal
  assert pairwise_diversity([[[1.0, 2.0], [1.0, 2.0]]])["mean"] == 0
  assert pairwise_diversity([[[1.0, 2.0], [-1.0, -2.0]]])["mean"] == pytest.approx(2)


def test_diversity_ignores_length_order_and_rotation():
  rng = _rng(1)
  features = rng.standard_normal((2, 6, 4))
  rotation = np.linalg.qr(rng.standard_normal((4, 4)))[0]
  other = (features * rng.uniform(0.1, 9, (2, 6, 1)))[:, rng.permutation(6)] @ rotation
  assert pairwise_diversity(other)["mean"] == pytest.approx(pairwise_diversity(features)["mean"])


def test_tilt_without_beta_is_the_base():
  rng = _rng(2)
  rewards, features = rng.standard_normal((4, 6)), rng.standard_normal((4, 6, 3))
  result = tilt_expectation(rewards, features, 0.0, bootstraps=20)
  for got, base in ((result["reward"], clustered_mean(rewards)),
                    (result["diversity"], pairwise_diversity(features))):
    assert {k: got[k] for k in ("mean", "sem", "n")} == {
      k: pytest.approx(base[k]) for k in ("mean", "sem", "n")}
  assert result["ess"] == {"mean": pytest.approx(6), "min": pytest.approx(6)}


def test_tilt_by_loops():
  rng = _rng(3)
  rewards, features, beta = rng.standard_normal((1, 5)), rng.standard_normal((1, 5, 3)), 1.7
  w = np.exp(beta * rewards[0])
  w /= w.sum()
  unit = features[0] / np.linalg.norm(features[0], axis=-1, keepdims=True)
  pairs = list(itertools.permutations(range(5), 2))
  diversity = (sum(w[i] * w[j] * np.linalg.norm(unit[i] - unit[j]) for i, j in pairs)
               / sum(w[i] * w[j] for i, j in pairs))
  result = tilt_expectation(rewards, features, beta, bootstraps=5)
  assert result["reward"]["mean"] == pytest.approx(w @ rewards[0])
  assert result["diversity"]["mean"] == pytest.approx(diversity)
  assert result["ess"]["mean"] == pytest.approx(1 / (w ** 2).sum())
  shifted = tilt_expectation(rewards + 1e4, features, beta, bootstraps=5)
  assert shifted["reward"]["mean"] == pytest.approx(w @ rewards[0] + 1e4)
  assert shifted["diversity"]["mean"] == pytest.approx(diversity)


def _coins(rng, prompts, samples):
  """Two modes, chance 1/2 each: reward 0 or 1, orthogonal features. The tilt is a biased coin."""
  heads = rng.integers(0, 2, (prompts, samples))
  return heads.astype(float), np.eye(2)[heads]


def test_tilt_of_a_discrete_set_in_closed_form_and_its_errors():
  """P(head) = e/(1+e); diversity = 2 p (1-p) sqrt(2); both errors against repeated experiments."""
  rng = _rng(4)
  head = np.e / (1 + np.e)
  runs = [tilt_expectation(*_coins(rng, 12, 40), 1.0, bootstraps=60, seed=s) for s in range(80)]
  for key, expected in (("reward", head), ("diversity", 2 * head * (1 - head) * 2 ** 0.5)):
    means = np.array([r[key]["mean"] for r in runs])
    # The bias of self-normalised weights is about 1 / ess.
    assert means.mean() == pytest.approx(expected, abs=0.02)
    # All prompts are alike here, so both errors estimate the same spread.
    for error in ("sem", "sem_samples"):
      assert np.mean([r[key][error] for r in runs]) == pytest.approx(means.std(ddof=1), rel=0.25)


def test_error_of_these_prompts_leaves_out_the_spread_between_prompts():
  rng = _rng(5)
  rewards, features = _coins(rng, 10, 30)
  rewards = rewards + 20 * np.arange(10)[:, None]
  result = tilt_expectation(rewards, features, 1.0, bootstraps=50)["reward"]
  assert result["sem"] > 10 and result["sem_samples"] < 0.1


def test_tilt_beyond_the_samples_reports_no_diversity():
  result = tilt_expectation([[0.0, 1.0, 2.0]], np.eye(3)[None], 1e4, bootstraps=10)
  assert "diversity" not in result and result["ess"]["min"] == 1
  assert result["reward"]["mean"] == 2


def test_the_same_seed_gives_the_same_errors():
  data = _coins(_rng(6), 3, 8)
  assert tilt_expectation(*data, 1.0, seed=1) == tilt_expectation(*data, 1.0, seed=1)


@pytest.mark.parametrize("call", [
  lambda: clustered_mean(np.zeros(3)),
  lambda: clustered_mean([[1.0, np.nan]]),
  lambda: within_prompt_std(np.zeros((3, 1))),
  lambda: paired_difference(np.zeros((3, 2)), np.zeros((2, 2))),
  lambda: paired_difference(np.zeros((3, 1)), np.zeros((3, 2))),
  lambda: pairwise_diversity(np.ones((3, 1, 2))),
  lambda: pairwise_diversity(np.zeros((1, 2, 2))),
  lambda: tilt_expectation(np.zeros((2, 3)), np.ones((2, 4, 5)), 1.0),
  lambda: tilt_expectation(np.zeros((2, 1)), np.ones((2, 1, 5)), 1.0),
])
def test_bad_shapes_and_values_raise(call):
  with pytest.raises(ValueError):
    call()


def test_vendi_score_of_copies_and_of_strangers():
  copies, strangers = np.ones((2, 5, 3)), np.stack([np.eye(5)] * 2) * 7
  score = vendi_score(copies)
  assert score["mean"] == pytest.approx(1) and score["sem"] == pytest.approx(0)
  assert score["n"] == 10 and score["per_prompt"] == pytest.approx(np.ones(2))
  assert vendi_score(strangers)["mean"] == pytest.approx(5)
  assert vendi_score(np.concatenate([np.ones((1, 5, 5)), strangers[:1]]))["mean"] == \
      pytest.approx(3)


def test_vendi_score_of_two_by_hand():
  """Cosine c: eigenvalues (1 +- c) / 2; at c = 0.6 the entropy of (0.8, 0.2)."""
  features = np.array([[[1, 0], [3, 4]]])
  expected = np.exp(-0.8 * np.log(0.8) - 0.2 * np.log(0.2))
  assert vendi_score(features)["mean"] == pytest.approx(expected)


def test_vendi_score_counts_groups():
  """Three copies each of four orthogonal samples are four."""
  assert vendi_score(np.repeat(np.eye(4), 3, 0)[None])["mean"] == pytest.approx(4)


def test_vendi_score_is_that_of_the_kernel():
  features = _rng(3).standard_normal((3, 6, 40))
  unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
  shares = [np.linalg.eigvalsh(f @ f.T / 6) for f in unit]
  scores = [np.exp(-(s * np.log(s)).sum()) for s in shares]
  assert vendi_score(features)["mean"] == pytest.approx(np.mean(scores))
