"""Statistics of K samples for each of P prompts: means, spreads, diversity, the exact tilt.

Samples of one prompt resemble each other, so prompts, not images, are the independent units: every
`sem` is clustered by prompt. All in numpy float64, on the host. A number that cannot be had (the
`sem` of a single prompt) is left out of the result, never made up.
"""
import numpy as np
from scipy.spatial.distance import pdist, squareform
from scipy.special import entr, softmax


def clustered_mean(values) -> dict:
  """Mean of all samples with a standard error clustered by prompt.

    mean = mean_p m_p,  m_p = mean_k v_pk,  sem = sqrt(sum_p (m_p - mean)^2 / (P (P - 1)))

  Args:
    values: `[P,K]`, finite, any unit.
  Returns:
    `mean` and `sem` in the unit of `values` (no `sem` for P = 1), `n` = P K.
  Reference: cluster-robust variance of a mean with equal clusters (Liang & Zeger 1986).
  """
  values = _array("values", values, 2)
  return _over_prompts(values.mean(1), values.size)


def within_prompt_std(values) -> float:
  """Pooled standard deviation of the samples of one prompt: `sqrt(mean_p var_k(v_pk))`, ddof 1.

  The yardstick for rewards: what remains when the prompts' own levels are taken out.

  Args:
    values: `[P,K]`, K >= 2.
  """
  values = _array("values", values, 2, min_samples=2)
  return float(np.sqrt(values.var(1, ddof=1).mean()))


def paired_difference(tuned, base) -> dict:
  """Mean of tuned - base over pairs that share prompt and noise, clustered by prompt.

  Pairing takes the prompt's level and the luck of the noise out of the error.

  Args:
    tuned, base: `[P,K]`, K >= 2; entry (p, k) of both comes from the same prompt and noise.
  Returns:
    `mean`, `sem`, `n` as in `clustered_mean`, and the same divided by `within_prompt_std(base)`:
    `mean_in_std`, `sem_in_std` (absent where that is zero).
  """
  tuned, base = _array("tuned", tuned, 2), _array("base", base, 2, min_samples=2)
  if tuned.shape != base.shape:
    raise ValueError(f"tuned {tuned.shape} and base {base.shape} must have the same shape")
  result = clustered_mean(tuned - base)
  std = within_prompt_std(base)
  if std > 0:
    result |= {f"{k}_in_std": result[k] / std for k in ("mean", "sem") if k in result}
  return result


def pairwise_diversity(features) -> dict:
  """Mean distance between two samples of one prompt.

    d_p = mean_{i<j} || f_pi / |f_pi| - f_pj / |f_pj| ||_2

  Euclidean on L2-normalised features: in [0, 2], 0 for identical samples, sqrt(2) for orthogonal
  ones. Take the features from a network that was not the reward.

  Args:
    features: `[P,K,D]`, K >= 2, no zero vector.
  Returns:
    `mean`, `sem` (clustered), `n` = P K, and `per_prompt`, a float64 array `[P]`.
  """
  features = _unit(features)
  per_prompt = np.array([pdist(f).mean() for f in features])
  n = features.shape[0] * features.shape[1]
  return _over_prompts(per_prompt, n) | {"per_prompt": per_prompt}


def vendi_score(features) -> dict:
  """How many different samples the K of a prompt amount to: the Vendi score, in [1, K].

    exp(-sum_i l_i log l_i),  l the eigenvalues of K_ij / K,  K_ij = f_pi . f_pj / |f_pi| |f_pj|

  Args:
    features: `[P,K,D]`, K >= 2, no zero vector.
  Returns:
    `mean` and `sem` over prompts, `n` = P K, and `per_prompt`, a float64 array `[P]`.
  Reference: Friedman & Dieng 2023, arXiv 2210.02410, with the cosine kernel.
  """
  features = _unit(features)
  # The squares of f's singular values are the eigenvalues, without loss of digits.
  shares = np.linalg.svd(features, compute_uv=False) ** 2 / features.shape[1]
  per_prompt = np.exp(entr(shares).sum(1))
  n = features.shape[0] * features.shape[1]
  return _over_prompts(per_prompt, n) | {"per_prompt": per_prompt}


def tilt_expectation(base_rewards, features, beta: float, *, bootstraps: int = 200,
                     seed: int = 0) -> dict:
  """Reward and diversity of the exact tilt p_base exp(beta R), from samples of the base alone.

  Self-normalised importance weights within each prompt p, d_ij as in `pairwise_diversity`:

    w_i       = exp(beta R_i) / sum_j exp(beta R_j)
    reward    = mean_p sum_i w_i R_i
    diversity = mean_p sum_{i != j} w_i w_j d_ij / sum_{i != j} w_i w_j
    ess       = mean_p 1 / sum_i w_i^2, in [1, K]

  Where a method that keeps the distribution should arrive. The estimate is biased toward the base,
  by about 1 / ess; distrust it, errors included, where `ess` is below ten or so.

  Two errors, because they answer two questions: `sem` is for new prompts (clustered, like all
  others), `sem_samples` for these very prompts (a bootstrap of the samples within each); a tuned
  model that was scored on the same prompts is to be compared by the latter. Resampling both at once
  would count the sampling noise twice.

  Args:
    base_rewards: `[P,K]` R of base samples, K >= 2, raw units.
    features: `[P,K,D]` of the same samples.
    beta: inverse temperature, in 1 / unit of R; 0 gives the base itself.
    bootstraps: number of resamples.
    seed: of the resampling.
  Returns:
    `reward` and `diversity`: `mean`, `sem`, `sem_samples`, `n` = P K; `ess`: `mean` and `min` over
    prompts. No `diversity` if beta is so large that a prompt's weight sits on one sample alone.
  Reference: self-normalised importance sampling (Owen, Monte Carlo, chapter 9).
  """
  rewards = _array("base_rewards", base_rewards, 2, min_samples=2)
  features = _unit(features)
  if features.shape[:2] != rewards.shape:
    raise ValueError(f"features {features.shape} do not belong to base_rewards {rewards.shape}")
  prompts, samples = rewards.shape
  distance = np.stack([squareform(pdist(f)) for f in features])  # [P,K,K]

  def estimate(counts):
    """`[P,K]` multiplicities of the samples -> reward `[P]`, diversity `[P]`, ess `[P]`."""
    with np.errstate(divide="ignore"):  # log 0: a sample that was not drawn
      w = softmax(beta * rewards + np.log(counts), axis=1)
    # Only pairs of different samples: copies that a resample makes of one sample would bring in
    # distances of zero, which the base never has.
    pairs = np.einsum("pi,pij,pj->p", w, distance, w)
    weight = np.einsum("pi,ij,pj->p", w, 1 - np.eye(samples), w)
    with np.errstate(invalid="ignore"):  # 0/0 where one sample has all the weight
      return (w * rewards).sum(1), pairs / weight, 1 / (w ** 2).sum(1)

  reward, diversity, ess = estimate(np.ones_like(rewards))
  rng = np.random.default_rng(seed)
  draws = rng.multinomial(samples, np.full(samples, 1 / samples), (bootstraps, prompts))
  resampled = [estimate(counts) for counts in draws]
  # A bootstrap of K samples underestimates their variance by (K - 1) / K, which matters at K = 4.
  bessel = np.sqrt(samples / (samples - 1))

  def over_bootstraps(index):
    finite = [r[index][np.isfinite(r[index])] for r in resampled]
    return float(bessel * np.std([f.mean() for f in finite if f.size], ddof=1))

  n = rewards.size
  result = {
    "reward": _over_prompts(reward, n) | {"sem_samples": over_bootstraps(0)},
    "ess": {"mean": float(ess.mean()), "min": float(ess.min())}}
  if np.isfinite(diversity).all():
    result["diversity"] = _over_prompts(diversity, n) | {"sem_samples": over_bootstraps(1)}
  return result


def _over_prompts(per_prompt, n):
  result = {"mean": float(per_prompt.mean()), "n": int(n)}
  if per_prompt.size > 1:
    result["sem"] = float(per_prompt.std(ddof=1) / np.sqrt(per_prompt.size))
  return result


def _array(name, values, ndim, min_samples=1):
  """float64 with P >= 1 prompts and at least `min_samples` samples each, all finite."""
  values = np.asarray(values, np.float64)
  if values.ndim != ndim or values.shape[0] < 1 or values.shape[1] < min_samples:
    axes = "[P,K]" if ndim == 2 else "[P,K,D]"
    raise ValueError(f"{name} must be {axes} with K >= {min_samples}, not {values.shape}")
  if not np.isfinite(values).all():
    raise ValueError(f"{name} has values that are not finite")
  return values


def _unit(features):
  features = _array("features", features, 3, min_samples=2)
  norm = np.linalg.norm(features, axis=-1, keepdims=True)
  if not norm.all():
    raise ValueError("features has a zero vector, which has no direction")
  return features / norm
