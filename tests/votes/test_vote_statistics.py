"""Statistics of votes against known truth: formulas by hand, coverage and error rates simulated."""
import types

import numpy as np
import pytest

from jaxalign.votes.statistics import (
    MANY_VOTERS,
    agreement,
    evidence,
    strengths,
    votes_to_decide,
    weights,
    win_rate,
)


def simulate(generator, rate=0.5, prompts=40, voters=1, each=60, prompt_sd=0.15, voter_sd=0.0,
             ties=0.2):
  """Votes of people whose taste differs by prompt and voter; each goes round the prompts."""
  of_prompt = generator.normal(0, prompt_sd, prompts)
  of_voter = generator.normal(0, voter_sd, voters)
  prompt, voter = [], []
  for v in range(voters):
    rounds = [generator.permutation(prompts) for _ in range(-(-each // prompts))]
    prompt.append(np.concatenate(rounds)[:each])
    voter.append(np.full(each, v))
  prompt, voter = np.stack(prompt).T.ravel(), np.stack(voter).T.ravel()    # in turns
  p = np.clip(rate + of_prompt[prompt] + of_voter[voter], 0, 1)
  outcome = (generator.random(len(p)) < p).astype(float)
  outcome[generator.random(len(p)) < ties] = 0.5
  return outcome, np.ones(len(p)), prompt, voter


def test_one_vote_a_prompt_is_the_textbook_interval():
  outcome = np.repeat([1.0, 0.0], [140, 60])
  got = win_rate(outcome, np.ones(200), np.arange(200), np.zeros(200, int))
  assert got["rate"] == 0.7 and got["votes"] == got["prompts"] == 200 and got["voters"] == 1
  assert got["interval"] == pytest.approx((0.633, 0.759), abs=0.006)      # Wilson's by hand


def test_votes_on_one_prompt_are_not_independent():
  outcome = np.repeat([1.0, 0.0], [14, 6])
  alone = win_rate(outcome, np.ones(20), np.arange(20), np.zeros(20, int))
  copies = win_rate(np.repeat(outcome, 10), np.ones(200), np.repeat(np.arange(20), 10),
                    np.tile(np.arange(2), 100))
  assert copies["rate"] == alone["rate"] == 0.7
  width = lambda r: r["interval"][1] - r["interval"][0]
  assert width(copies) == pytest.approx(width(alone), rel=0.02)


def test_unanimous_votes_leave_doubt():
  got = win_rate(np.ones(20), np.ones(20), np.arange(20), np.zeros(20, int))
  assert got["rate"] == 1 and 0.75 < got["interval"][0] < 0.9      # Clopper-Pearson has 0.83
  ties = win_rate(np.full(20, 0.5), np.ones(20), np.arange(20), np.zeros(20, int))
  assert ties["rate"] == 0.5 and 0.3 < ties["interval"][0] < 0.48


def test_no_interval_from_one_prompt():
  assert win_rate(np.ones(5), np.ones(5), np.zeros(5, int), np.arange(5)) is None
  assert win_rate(np.ones(0), np.ones(0), np.zeros(0, int), np.zeros(0, int)) is None


@pytest.mark.parametrize("case", [
    {"voters": 1}, {"voters": 3, "each": 40, "prompt_sd": 0.25}, {"voters": 8, "voter_sd": 0.12},
    {"voters": 1, "rate": 0.8, "prompts": 60, "prompt_sd": 0.05, "ties": 0.0}])
def test_intervals_cover(case):
  """95 % intervals hold the truth in 95 % of 400 votes, short by at most three standard errors."""
  generator, hits = np.random.default_rng(0), 0
  for _ in range(400):
    outcome, weight, prompt, voter = simulate(generator, **case)
    truth = 0.5 + (case.get("rate", 0.5) - 0.5) * (1 - case.get("ties", 0.2))
    low, high = win_rate(outcome, weight, prompt, voter)["interval"]
    hits += low <= truth <= high
  assert hits / 400 >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / 400)


@pytest.mark.parametrize("case", [
    {"voters": 1, "each": 120}, {"voters": 3, "each": 60, "prompt_sd": 0.25},
    {"voters": 8, "each": 30, "voter_sd": 0.1}, {"voters": 1, "each": 120, "ties": 0.6}])
def test_the_rule_keeps_its_error_rate(case):
  """Looked at after every fourth vote, no preference is called one in at most 5 % of 200 runs."""
  generator, stopped = np.random.default_rng(1), 0
  for _ in range(200):
    votes = simulate(generator, prompts=60, **case)
    stopped += any(evidence(win_rate(*(v[:n] for v in votes))) >= 20
                   for n in range(12, len(votes[0]) + 1, 4))
  assert stopped / 200 <= 0.05


def test_the_rule_stops_early_where_there_is_something_to_find():
  generator, at = np.random.default_rng(2), []
  for _ in range(40):
    votes = simulate(generator, rate=0.75, each=200, prompts=100, ties=0.1, prompt_sd=0.1)
    at.append(next((n for n in range(10, 201, 2)
                    if evidence(win_rate(*(v[:n] for v in votes))) >= 20), 999))
  assert np.median(at) < 110 and np.mean(np.array(at) < 999) > 0.9


def test_how_many_votes_decide():
  generator = np.random.default_rng(3)
  outcome, weight, prompt, voter = simulate(generator, 0.62, each=60, prompts=60, ties=0)
  few = win_rate(outcome, weight, prompt, voter)
  more = votes_to_decide(few, outcome, prompt, 400, 0.05)
  assert 10 < more < 600
  # Prompts that all have been seen, and disagree: votes on them alone never decide.
  outcome = np.repeat([1.0, 0.0] * 8 + [1.0], 10)
  prompt = np.repeat(np.arange(17), 10)
  split = win_rate(outcome, np.ones(170), prompt, np.zeros(170, int))
  assert votes_to_decide(split, outcome, prompt, 17, 0.05) is None


def test_weights_undo_the_choice_of_pairs():
  """Pairs that look unlike are shown more often; the weighted mean is that of all pairs."""
  generator = np.random.default_rng(4)
  truth = np.array([1.0, 1, 1, 0, 0, 0])
  q = np.array([0.35, 0.25, 0.16, 0.08, 0.08, 0.08])
  for shown in (1, 3, 6):
    means, plain = [], []
    for _ in range(4000):
      left, drawn, logged = list(range(6)), [], []
      for _ in range(shown):
        now = q[left] / q[left].sum()
        k = generator.choice(len(left), p=now)
        logged.append(now[k])
        drawn.append(left.pop(k))
      w = weights([0] * shown, [0] * shown, logged, {0: 6})
      assert (w > 0).all()
      means.append((w * truth[drawn]).mean())
      plain.append(truth[drawn].mean())
    assert np.mean(means) == pytest.approx(0.5, abs=4 * np.std(means) / np.sqrt(4000) + 1e-9)
    assert shown == 6 or np.mean(plain) > 0.6


def test_strengths_of_three_models():
  generator, truth = np.random.default_rng(5), np.array([-0.8, 0.1, 0.7])
  n = 3000
  a, b = np.array([(0, 1), (1, 2), (2, 0)])[generator.integers(3, size=n)].T
  outcome = (generator.random(n) < 1 / (1 + np.exp(truth[b] - truth[a]))).astype(float)
  prompt, voter = generator.integers(100, size=n), generator.integers(2, size=n)
  fit = strengths(a, b, outcome, np.ones(n), prompt, voter, 3)
  assert sum(fit["strength"]) == pytest.approx(0, abs=1e-9)
  assert np.abs((fit["strength"] - truth) / fit["sem"]).max() < 3.5
  assert max(fit["sem"]) < 0.08
  lost = strengths(np.zeros(20, int), np.ones(20, int), np.ones(20), np.ones(20), np.arange(20),
                   np.zeros(20, int), 3)
  assert np.isfinite(lost["strength"]).all() and lost["strength"][0] > lost["strength"][1]


def test_two_models_have_the_strengths_of_their_win_rate():
  outcome = np.repeat([1.0, 0.0], [300, 100])
  fit = strengths(np.zeros(400, int), np.ones(400, int), outcome, np.ones(400), np.arange(400),
                  np.zeros(400, int), 2)
  assert fit["strength"][0] - fit["strength"][1] == pytest.approx(np.log(3), abs=0.02)


def test_agreement():
  same = agreement(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), np.array([1.0, 1, 0, 0]))
  assert same == {"same": 1.0, "pairs": 2, "alpha": 1.0}
  # Krippendorff by hand: coincidences o(1,1) = 2, o(1,0) = o(0,1) = 1; D_o = 2/4, D_e = 6/12.
  half = agreement(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 0]),
                   np.array([1.0, 1, 1, 0, 0]))
  assert half["same"] == 0.5 and half["pairs"] == 2
  assert half["alpha"] == pytest.approx(1 - (2 / 4) / (2 * 3 * 1 / (4 * 3)))
  assert agreement(np.arange(3), np.zeros(3, int), np.ones(3)) is None


def test_many_voters_widen_the_interval_if_they_disagree():
  prompt = np.tile(np.arange(30), MANY_VOTERS)
  voter = np.repeat(np.arange(MANY_VOTERS), 30)
  outcome = np.where(voter < 3, 1.0, 0.0)
  got = win_rate(outcome, np.ones(len(prompt)), prompt, voter)
  assert got["clusters"] == "prompts and voters" and got["interval"][0] < 0.2


def test_no_evidence_before_ten_prompts():
  rate = types.SimpleNamespace(**win_rate(np.ones(9), np.ones(9), np.arange(9), np.zeros(9, int)))
  assert evidence(vars(rate)) == 0 == evidence(None)
