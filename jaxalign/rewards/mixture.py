"""Terms of a mixture made comparable, and what each of them decides.

Raw scores of two rewards differ by orders of magnitude in spread, and the one that spreads most
decides alone. `reward.normalise` evens that out: "std" divides each term by its spread among
samples of a prompt on the base model, once for the whole run, so that gradients stay what they are;
"rank" puts the place among the samples of a batch in a term's stead, new in every batch.
"""
import numpy as np

from jaxalign import metrics
from jaxalign.errors import UserError
from jaxalign.rewards import weighted_sum


def even_weights(weights: dict[str, float], scores: dict[str, np.ndarray]) -> dict[str, float]:
  """Weights over each term's within-prompt standard deviation.

  Args:
    scores: of each term `[P, K]`, of K samples of P prompts on the base model.
  Raises:
    UserError: a term gives all samples of a prompt the same score.
  """
  out = {}
  for name, weight in weights.items():
    spread = metrics.within_prompt_std(scores[name])
    if not spread:
      raise UserError(f"reward.normalise='std': '{name}' gives every sample of a prompt the same "
                      "score on the base model, so it has no spread to divide by; leave it out of "
                      "reward.names, or set reward.normalise='none'")
    out[name] = weight / spread
  return out


def ranks(scores, groups):
  """Place `[B]` of each score within its group, -1 (lowest) to 1, ties their mean; 0 where alone.

  Args:
    scores: `[B]`, of numpy or JAX. groups: `[B]` int, equal where rows are compared.
  """
  same = groups[:, None] == groups[None]
  below = (same & (scores[:, None] > scores[None])).sum(1)
  above = (same & (scores[:, None] < scores[None])).sum(1)
  return ((below - above) / np.maximum(same.sum(1) - 1, 1)).astype(np.float32)


def compared(group: int, prompts):
  """Which rows `[B]` of a batch are compared: those of a prompt, or all where it has one of each.

  Args:
    group: rows that a prompt has in a batch. prompts: `[B]` int, equal for the same prompt.
  """
  return prompts if group > 1 else 0 * prompts


def comparable(normalise: str, terms: dict, groups) -> dict:
  """Terms `{name: [B]}` as they enter the sum, but for their weights."""
  if normalise != "rank":
    return terms
  return {name: ranks(scores, groups) for name, scores in terms.items()}


def shares(weights: dict[str, float], terms: dict[str, np.ndarray], groups) -> dict[str, float]:
  """Share of each term in what sets samples of a group apart; they add up to 1.

  `Cov(w_i r_i, R) / Var(R)` of deviations from the group's mean; below 0 for a term that loses
  where the sum wins. Empty where all samples of each group have the same sum.

  Args:
    terms: `{name: [B]}` as they enter the sum. groups: `[B]` int.
  """
  _, place = np.unique(groups, return_inverse=True)
  count = np.bincount(place)
  apart = lambda r: r - (np.bincount(place, r) / count)[place]
  parts = {name: apart(weights[name] * np.asarray(r, np.float64)) for name, r in terms.items()}
  total = weighted_sum(dict.fromkeys(parts, 1.0), parts)
  variance = np.square(total).mean()
  if not variance:
    return {}
  return {name: float((part * total).mean() / variance) for name, part in parts.items()}
