"""Metrics on plain arrays. `docs/metrics.md` is the glossary of the names they are logged under."""
from jaxalign.metrics.divergence import (
  Moments,
  frechet_between,
  frechet_distance,
  frechet_with_floor,
  gaussian_path_kl,
  moments,
)
from jaxalign.metrics.samples import (
  clustered_mean,
  paired_difference,
  pairwise_diversity,
  tilt_expectation,
  vendi_score,
  within_prompt_std,
)

__all__ = [
  "Moments", "clustered_mean", "frechet_between", "frechet_distance", "frechet_with_floor",
  "gaussian_path_kl", "moments", "paired_difference", "pairwise_diversity", "tilt_expectation",
  "vendi_score", "within_prompt_std"]
