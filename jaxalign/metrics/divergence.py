"""Distances between the tuned and the base distribution."""
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
  """Mean `[D]` and ddof-1 covariance `[D, D]` of features."""
  mean: np.ndarray
  covariance: np.ndarray


def moments(x) -> Moments:
  """Of features `[N, D]`, N >= 2, in float64."""
  x = np.asarray(x, np.float64)
  return Moments(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)))


def frechet_between(a: Moments, b: Moments) -> float:
  """Squared Frechet distance between two Gaussians, as in FID.

    |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a^1/2 C_b C_a^1/2)^1/2)

  The last trace is the sum of the singular values of C_a^1/2 C_b^1/2, where both roots come from
  `eigh`: unlike a root of the product it stays real and accurate when a covariance is singular.

  Reference: Dowson & Landau 1982; Heusel et al. 2017.
  """
  cross = np.linalg.svd(_root(a.covariance) @ _root(b.covariance), compute_uv=False).sum()
  shift = ((a.mean - b.mean) ** 2).sum()
  return float(max(0.0, shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross))


def frechet_distance(a, b) -> float:
  """`frechet_between` Gaussians fitted to two sets of features.

  Biased upward by roughly D / n times the variance: compare only at equal n, and beside the floor
  of `frechet_with_floor`.

  Args:
    a, b: `[N,D]` features, N >= 2 (each its own N), D <= 64: more would need thousands of samples.
  Returns:
    A number >= 0 in squared feature units.
  """
  a, b = _features("a", a), _features("b", b)
  if a.shape[1] != b.shape[1]:
    raise ValueError(f"a {a.shape} and b {b.shape} must have the same number of features")
  return frechet_between(moments(a), moments(b))


def frechet_with_floor(tuned, base_a, base_b) -> dict:
  """Distance from tuned to base, and what two draws of the base itself are apart at the same n.

  Both are taken to `base_b`, whose noise neither `tuned` nor `base_a` shares: a model that has not
  moved, sampled with the noise of `base_a`, lies exactly at the floor.

  Args:
    tuned, base_a, base_b: `[N,D]`, the same N. `tuned` may share its noise with `base_a` only.
  Returns:
    `distance` = FD(tuned, base_b), `floor` = FD(base_a, base_b), `n` = N.
  """
  if not len(tuned) == len(base_a) == len(base_b):
    raise ValueError(f"the three sets must have the same size, not {len(tuned)}, {len(base_a)}, "
                     f"{len(base_b)}: the distance depends on it")
  return {"distance": frechet_distance(tuned, base_b), "floor": frechet_distance(base_a, base_b),
          "n": len(tuned)}


def gaussian_path_kl(gaps, sigma, lam):
  """KL(tuned path || base path) of each trajectory, for samplers with Gaussian steps.

    sum_k 1/2 s_k^2 lambda_k^2 ||o_tuned - o_base||_k^2

  Averaged over trajectories **of the tuned policy** it is the KL between the two path measures, an
  upper bound of the KL between the images.

  Args:
    gaps: `[T,B]` sums (not means) over h, w, c of the squared difference between the outputs that
      both networks have at the same x_k.
    sigma: `[T]` > 0, standard deviation s_k of each transition (no deterministic step).
    lam: `[T]`, lambda_k, which turns a difference of outputs into one in score:
      (mu_tuned - mu_base) / s_k^2 = -lambda_k (o_tuned - o_base).
  Returns:
    `[B]` >= 0, in nats. Takes numpy or JAX arrays and stays what it was given.
  Reference: KL of Gaussians of equal variance, ||mu - mu'||^2 / (2 s^2), summed by the chain rule.
  """
  steps = gaps.shape[:1]
  if gaps.ndim != 2 or sigma.shape != steps or lam.shape != steps:
    raise ValueError("gaps, sigma, lam must be [T,B], [T], [T], not "
                     f"{gaps.shape}, {sigma.shape}, {lam.shape}")
  return (0.5 * (sigma * lam)[:, None] ** 2 * gaps).sum(0)


def _features(name, x):
  x = np.asarray(x, np.float64)
  if x.ndim != 2 or len(x) < 2 or x.shape[1] > 64:
    raise ValueError(f"{name} must be [N,D] with N >= 2 and D <= 64, not {x.shape}")
  if not np.isfinite(x).all():
    raise ValueError(f"{name} has values that are not finite")
  return x


def _root(covariance):
  """Symmetric root of a covariance `[D,D]`."""
  values, vectors = np.linalg.eigh(covariance)
  return (vectors * np.sqrt(values.clip(0))) @ vectors.T
