"""What votes say: win rate with its interval, strengths, agreement, when to stop.

Votes on one prompt resemble each other, and so do those of one voter. Standard errors are clustered
by prompt; from `MANY_VOTERS` voters on also by voter, and then speak of voters like these. With
fewer they speak of these voters: a spread between two or three people can't be estimated. All in
numpy float64. A number that cannot be had is absent.
"""
import collections

import numpy as np
from scipy import stats

from jaxalign.votes.ballot import Ballot

MANY_VOTERS = 5
_EFFECT = 0.15             # distance from 1/2 at which the sequential rule is quickest
_MIN_PROMPTS = 10          # before which it never stops


def table(ballot: Ballot) -> dict[str, np.ndarray]:
  """The votes that count (no repeats), in the order of the answers of each voter.

  Returns:
    Arrays `[n]`: `prompt`, `voter`, `pair`, `a`, `b` (model indices), `outcome` (1 picture a
    preferred, 0 picture b, 0.5 equal or both bad), `weight`.
  """
  asks = [ask for ask in ballot.answers() if not ask.repeat]
  pictures, pairs = ballot.gallery.pictures, ballot.gallery.pairs
  prompt = np.array([ballot.gallery.prompt_of(ask.pair) for ask in asks], int)
  names = sorted({ask.voter for ask in asks})
  voter = np.array([names.index(ask.voter) for ask in asks], int)
  sizes = collections.Counter(ballot.gallery.prompt_of(i) for i in range(len(pairs)))
  return {"prompt": prompt, "voter": voter, "pair": np.array([ask.pair for ask in asks], int),
          "a": np.array([pictures[pairs[ask.pair].a].model for ask in asks], int),
          "b": np.array([pictures[pairs[ask.pair].b].model for ask in asks], int),
          "outcome": np.array([outcome(ask) for ask in asks], float),
          "weight": weights(prompt, voter, [ask.propensity for ask in asks], sizes)}


def outcome(ask) -> float:
  """1 if picture a of the pair was preferred, 0 if b, 0.5 for "equal" and "both bad"."""
  if ask.choice in ("equal", "both_bad"):
    return 0.5
  return float((ask.choice == "left") != ask.swapped)


def weights(prompt, voter, propensity, sizes) -> np.ndarray:
  """What makes votes on pairs that were not drawn alike estimate the mean over all pairs.

  The m-th of M pairs that a voter was shown of a prompt with N, drawn with probability q among
  those left:

    w = 1 + (N - M) / (N - m) (1 / ((N - m + 1) q) - 1)

  1 where draws were uniform, and where all N were shown.

  Args:
    prompt, voter: `[n]` int, in the order of the draws. propensity: `[n]`, q. sizes: prompt -> N.
  Reference: Farquhar et al. 2021, arXiv 2101.11665, R_LURE.
  """
  total, seen = collections.Counter(zip(prompt, voter)), collections.Counter()
  result = np.ones(len(prompt))
  for k, (p, v, q) in enumerate(zip(prompt, voter, propensity)):
    seen[p, v] += 1
    n, m = sizes[p], seen[p, v]
    if n > m:
      result[k] = 1 + (n - total[p, v]) / (n - m) * (1 / ((n - m + 1) * q) - 1)
  return result


def win_rate(outcome, weight, prompt, voter, level: float = 0.95) -> dict | None:
  """Weighted mean of outcomes in [0, 1] with a clustered interval; None without two prompts.

  The mean is drawn a little toward 1/2 for the error, as if one more cluster had been seen, half
  won and half lost: unanimous votes would have an error of zero. The interval is Wilson's for as
  many independent votes as have that error, with quantiles of Student's t.

  Returns:
    `rate` (not drawn toward 1/2), `interval` (low, high), `sem`, `df`, `votes`, `prompts`,
    `voters`, `clusters` ("prompts" or "prompts and voters").
  Reference: two-way clusters, Cameron, Gelbach & Miller 2011, equation 2.3.
  """
  if len(outcome) == 0 or len(np.unique(prompt)) < 2:
    return None
  rate = float(np.sum(weight * outcome) / np.sum(weight))
  total = np.sum(weight)
  score = weight * (outcome - rate)
  prompts, voters = len(np.unique(prompt)), len(np.unique(voter))
  both = voters >= MANY_VOTERS
  spread = _clustered(score, prompt, voter, both)
  alone = np.sum(score ** 2)
  design = total / prompts if alone == 0 else np.clip(spread / alone, 1, total / prompts)
  middle = (rate * total + design / 2) / (total + design)
  pad = design ** 2 / 2 * ((1 - middle) ** 2 + middle ** 2)
  sem = float(np.sqrt(spread + pad) / (total + design))
  df = min(prompts, voters) - 1 if both else prompts - 1
  t = stats.t.ppf((1 + level) / 2, df)
  n = middle * (1 - middle) / sem ** 2
  centre = (middle + t ** 2 / (2 * n)) / (1 + t ** 2 / n)
  half = t / (1 + t ** 2 / n) * np.sqrt(sem ** 2 + t ** 2 / (4 * n ** 2))
  interval = (max(0.0, float(centre - half)), min(1.0, float(centre + half)))
  return {"rate": rate, "interval": interval, "sem": sem, "df": df, "votes": len(outcome),
          "prompts": prompts, "voters": voters,
          "clusters": "prompts and voters" if both else "prompts"}


def _clustered(score, prompt, voter, both: bool) -> float:
  """Variance of the sum of `score [n]`, clustered by prompt, or by prompt and voter."""
  def of(groups):
    sums = np.bincount(np.unique(groups, return_inverse=True)[1], score)
    return float(np.sum(sums ** 2)) * len(sums) / max(1, len(sums) - 1)
  by_prompt = of(prompt)
  if not both:
    return by_prompt
  by_voter = of(voter)
  cells = of(prompt * (voter.max() + 1) + voter)
  return max(by_prompt + by_voter - cells, by_prompt, by_voter)


def evidence(rate: dict | None) -> float:
  """Against a win rate of 1/2; stop at 1 / alpha, however often one looked.

  The likelihood ratio of a normal mixture of effects, N(0, 0.15^2), to no effect at all:

    E = sqrt(1 / (1 + r)) exp(z^2 r / (2 (1 + r))),   r = 0.15^2 / sem^2

  with t brought to the z of the same tail. Under no effect its mean is 1 at every look, so that
  it ever reaches 1 / alpha has probability alpha at most (Ville); that t is normal holds only
  approximately, and `tests/votes` and docs/votes.md have the rate that was simulated.
  Reference: Robbins 1970; Waudby-Smith et al. 2024, arXiv 2103.06476.
  """
  if rate is None or rate["prompts"] < _MIN_PROMPTS:
    return 0.0
  t = abs(rate["rate"] - 0.5) / rate["sem"]
  z = stats.norm.isf(max(stats.t.sf(t, rate["df"]), 1e-300))
  r = (_EFFECT / rate["sem"]) ** 2
  return float(np.exp(min(700.0, z ** 2 * r / (2 * (1 + r)) - 0.5 * np.log1p(r))))


def votes_to_decide(rate: dict, outcome, prompt, prompts: int, alpha: float) -> int | None:
  """How many more votes would decide if the rate stayed what it is; None if no number would.

  The error is split into what differs between prompts, which more votes on the same prompts do not
  lower, and the rest, by one-way analysis of variance; with too few second votes on a prompt to
  tell, half of the variance is taken to lie between prompts.

  Args:
    outcome, prompt: `[n]`. prompts: how many there are to vote on.
  """
  n, groups = len(outcome), np.unique(prompt, return_inverse=True)[1]
  counts = np.bincount(groups)
  means = np.bincount(groups, outcome) / counts
  everything = float(np.var(outcome, ddof=1))
  if n - len(counts) >= 10:
    within = float(np.sum((outcome - means[groups]) ** 2)) / (n - len(counts))
    between = float(np.clip(everything - within, 0, everything))
  else:
    between = everything / 2
  within = everything - between
  size = lambda n: between / min(n, prompts) + within / n
  rest = max(0.0, rate["sem"] ** 2 - size(n))       # of voters: more votes of theirs don't lower it
  for more in np.unique(np.geomspace(1, 1e5, 400).round().astype(int)):
    later = rate | {"sem": np.sqrt(size(n + more) + rest)}
    if evidence(later | {"prompts": min(prompts, rate["prompts"] + more)}) >= 1 / alpha:
      return int(more)
  return None


def strengths(a, b, outcome, weight, prompt, voter, models: int) -> dict | None:
  """Bradley-Terry: P(i preferred to j) = sigmoid(s_i - s_j), ties half a win; sum of s is 0.

  A ridge worth one vote keeps a model that lost every vote finite.

  Returns:
    `strength` and `sem` (clustered), lists in log odds; None for fewer than two votes or prompts.
  Reference: Bradley & Terry 1952; sandwich errors as in `win_rate`.
  """
  if len(outcome) < 2 or len(np.unique(prompt)) < 2:
    return None
  design = np.zeros((len(outcome), models))
  design[np.arange(len(a)), a] += 1
  design[np.arange(len(a)), b] -= 1
  s, ridge = np.zeros(models), np.eye(models) / (4 * models) + 1e-9
  for _ in range(50):
    p = 1 / (1 + np.exp(-design @ s))
    hessian = design.T @ (design * (weight * p * (1 - p))[:, None]) + ridge
    step = np.linalg.solve(hessian, design.T @ (weight * (outcome - p)) - ridge @ s)
    s = s + np.clip(step, -2, 2)
    if np.abs(step).max() < 1e-9:
      break
  s -= s.mean()
  both = len(np.unique(voter)) >= MANY_VOTERS
  influence = (design * (weight * (outcome - p))[:, None]) @ np.linalg.inv(hessian)
  influence -= influence.mean(1, keepdims=True)
  sem = [float(np.sqrt(_clustered(influence[:, k], prompt, voter, both))) for k in range(models)]
  return {"strength": [float(x) for x in s], "sem": sem}


def agreement(pair, voter, outcome) -> dict | None:
  """How far voters agree on pairs that at least two of them saw.

  Returns:
    `alpha`, Krippendorff's for nominal answers (1 all agree, 0 chance; absent if all answers are
    alike), `same`, the share of two votes on a pair that are the same, and `pairs`; None without
    a shared pair.
  Reference: Krippendorff 2011, computing Krippendorff's alpha-reliability, C.
  """
  del voter                              # a voter has one vote a pair
  values = np.unique(outcome)
  counts = np.zeros((len(np.unique(pair)), len(values)))
  np.add.at(counts, (np.unique(pair, return_inverse=True)[1], np.searchsorted(values, outcome)), 1)
  counts = counts[counts.sum(1) >= 2]
  if not len(counts):
    return None
  votes = counts.sum(1)
  seen = float(np.sum((counts * (counts - 1)).sum(1) / (votes - 1)))
  shares, n = counts.sum(0), counts.sum()
  twos = (counts * (counts - 1)).sum() / (votes * (votes - 1)).sum()
  result = {"same": float(twos), "pairs": len(counts)}
  chance = float(np.sum(shares * (shares - 1)) / (n - 1))
  if chance < n:
    result["alpha"] = 1 - (n - seen) / (n - chance)
  return result


def self_agreement(ballot: Ballot) -> dict[str, dict]:
  """`voter -> {"same", "repeats"}`: the share of swapped repeats that were answered as before."""
  first, result = {}, {}
  for ask in ballot.answers():
    if not ask.repeat:
      first[ask.voter, ask.pair] = outcome(ask)
    else:
      result.setdefault(ask.voter, []).append(outcome(ask) == first[ask.voter, ask.pair])
  return {voter: {"same": float(np.mean(same)), "repeats": len(same)}
          for voter, same in result.items()}


def rate_between(votes: dict[str, np.ndarray]) -> dict | None:
  """`win_rate` of the first model against the second."""
  return win_rate(votes["outcome"], votes["weight"], votes["prompt"], votes["voter"])


def verdict(ballot: Ballot, alpha: float) -> dict:
  """Everything that can be said, as JSON; `alpha` is the error rate of the sequential rule."""
  votes, asks, models = table(ballot), ballot.answers(), ballot.gallery.models
  of_choice = collections.Counter(ask.choice for ask in asks)
  result = {"models": list(models), "votes": len(votes["pair"]),
            "voters": len({ask.voter for ask in asks}), "prompts": len(set(votes["prompt"])),
            "choices": dict(of_choice), "identical": ballot.gallery.identical}
  sided = of_choice["left"] + of_choice["right"]
  if sided:
    result["left"] = of_choice["left"] / sided
  shared = agreement(votes["pair"], votes["voter"], votes["outcome"])
  result |= {"agreement": shared} if shared else {}
  result |= {"self_agreement": own} if (own := self_agreement(ballot)) else {}
  if len(models) == 2 and (rate := rate_between(votes)):
    strength = evidence(rate)
    decided = bool(alpha) and strength >= 1 / alpha
    result |= {"win_rate": rate, "evidence": strength, "alpha": alpha, "decided": decided}
    if alpha and not decided:
      result["votes_to_decide"] = votes_to_decide(
          rate, votes["outcome"], votes["prompt"], len(ballot.gallery.prompts), alpha)
  if len(models) > 2:
    fit = strengths(votes["a"], votes["b"], votes["outcome"], votes["weight"], votes["prompt"],
                    votes["voter"], len(models))
    result |= {"bradley_terry": fit} if fit else {}
  return result
