"""Evaluation: samples of a policy on fixed prompts and noise, scored and compared with the base."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import metrics
from jaxalign.devices import callbacks, memory, processes, rng
from jaxalign.errors import UserError
from jaxalign.rewards import Reward, check_scores, find, mixture, reweighted, weighted_sum
from jaxalign.train.experiment import Experiment, gather

DIVERSITY = {"diversity": metrics.pairwise_diversity, "vendi": metrics.vendi_score}


@dataclasses.dataclass(frozen=True)
class Samples:
  """K samples of each of P prompts.

  Attributes:
    images: `[P, K, H, W, 3]` uint8.
    scores: name -> `[P, K]` f32: "reward", the terms of a weighted sum as "reward/NAME", "judge",
      and "color_accuracy" where every prompt names a background colour.
    features: `[P, K, D]` f32, of `eval.features`.
    path_kl: `[P, K]` nats, or None where not measured.
  """
  images: np.ndarray
  scores: dict[str, np.ndarray]
  features: np.ndarray
  path_kl: np.ndarray | None = None

  def arrays(self) -> dict[str, np.ndarray]:
    """Flat dict for `np.savez`; `from_arrays` is the inverse."""
    out = {"images": self.images, "features": self.features}
    out.update({f"scores/{name}": value for name, value in self.scores.items()})
    return out if self.path_kl is None else {**out, "path_kl": self.path_kl}

  def terms(self, weights: dict[str, float]) -> dict[str, np.ndarray]:
    """Raw scores `[P, K]` of the terms of "reward", which has these weights."""
    several = {name: self.scores[f"reward/{name}"] for name in weights if len(weights) > 1}
    return several or {name: self.scores["reward"] / (w or 1.0) for name, w in weights.items()}

  def reweighted(self, old: dict[str, float], new: dict[str, float]) -> "Samples":
    """The same samples, whose "reward" has other weights."""
    if old == new:
      return self
    reward = weighted_sum(new, self.terms(old))
    return dataclasses.replace(self, scores={**self.scores, "reward": reward})

  @classmethod
  def from_arrays(cls, arrays) -> "Samples":
    scores = {k.removeprefix("scores/"): arrays[k] for k in arrays if k.startswith("scores/")}
    return cls(arrays["images"], scores, arrays["features"],
               arrays["path_kl"] if "path_kl" in arrays else None)


def calibrated(exp: Experiment, base: Samples) -> Experiment:
  """`exp` with the reward that `reward.normalise` asks for, and `models.reward_std`.

  Both are measured on samples of the base model; the latter is in the unit of what methods are
  given.
  """
  cfg, reward, models = exp.config.reward, exp.reward, exp.models
  terms = base.terms(reward.weights)
  if cfg.normalise == "std":
    reward = reweighted(reward, mixture.even_weights(reward.weights, terms))
    if models.score is not None:
      models = dataclasses.replace(models, score=reward.score)
  shape = base.scores["reward"].shape
  prompts = np.repeat(np.arange(shape[0]), shape[1])
  flat = {name: scores.reshape(-1) for name, scores in terms.items()}
  given = weighted_sum(reward.weights, mixture.comparable(
      cfg.normalise, flat, mixture.compared(exp.config.group, prompts))).reshape(shape)
  models = dataclasses.replace(models, reward_std=metrics.within_prompt_std(given))
  return dataclasses.replace(exp, reward=reward, models=models)


class Evaluator:
  """Draws and scores samples in batches of `eval.batch`; compiled once for all prompt sets."""

  def __init__(self, exp: Experiment):
    self._exp = exp
    self._root = jax.random.key(exp.config.seed)
    self._tables = {}            # the same few prompt sets are evaluated again and again
    self._sample = jax.jit(self._sample_batch)
    self._path_kl = jax.jit(self._path_kl_batch)

  def adopt(self, exp: Experiment) -> None:
    """Goes on with `exp`, which differs in the weights of its reward only: no new program."""
    self._exp = exp

  def _sample_batch(self, policy, frozen, judge_params, batch, key):
    exp, models = self._exp, self._exp.models
    given = {}
    if "noise" in batch:
      given = {"x_init": batch["noise"][:, 0], "noise": jnp.moveaxis(batch["noise"][:, 1:], 1, 0)}
    trajectory = models.rollout(policy, frozen, batch, key, **given)
    images = models.decode(frozen["decoder"], trajectory.final)
    out = {"images": (images * 255).round().astype(jnp.uint8),
           "features": exp.observer.features(judge_params["observer"], images), "scores": {}}
    if isinstance(exp.judge, Reward):
      out["scores"]["judge"] = exp.judge.score(judge_params["judge"], images, batch["judge"])
    if isinstance(exp.reward, Reward):
      out["terms"] = exp.reward.terms(frozen["reward"], images, batch["prepared"])
    return out, trajectory

  def _path_kl_batch(self, frozen, trajectory, conditioning):
    """`KL(path of policy || path of base)` of each trajectory, `[B]` nats, exact.

    `sum_k rate_k^2 |o - o_ref|^2 / 2` in the network's outputs o, see `metrics.gaussian_path_kl`.
    """
    models = self._exp.models
    sampler = models.sampler

    def gap(k, total):
      x = trajectory.latents[k]
      reference = models.output(None, frozen, x, sampler.at("timesteps", k), conditioning)
      return total.at[k].set(
          jnp.square(trajectory.out[k] - reference).sum(tuple(range(1, x.ndim))))
    gaps = jax.lax.fori_loop(0, sampler.steps, gap, jnp.zeros_like(trajectory.log_prob))
    return metrics.gaussian_path_kl(gaps, sampler.std, sampler.lam)

  def __call__(self, policy, prompts: list[str], samples: int, *, stream: str = rng.EVAL,
               path_kl: bool = False, label: str = "evaluating", noise=None) -> Samples:
    """Samples of `policy`, the same noise for the same stream, prompts and number at every call.

    Args:
      policy: None for the base model.
      noise: `[P * samples, 1+T, h, w, c]` f32, all that the sampler consumes, in place of a stream.
    Raises:
      UserError: a reward gave something that is not a finite number.
    """
    exp, size = self._exp, self._exp.config.eval.batch
    # Rows are gathered on the host, so that the program does not depend on the number of prompts.
    names = tuple(prompts)
    if names not in self._tables:
      self._tables[names] = exp.prompt_table(prompts)
    table = self._tables[names]
    total = len(prompts) * samples
    memory.check_fits(f"{samples} samples of {len(prompts)} prompts (eval.samples, --samples)",
                      total, (*exp.pipeline.image_size, 3), itemsize=1)
    ids = np.arange(-(-total // size) * size, dtype=np.int32)
    prompt_ids = np.minimum(ids, total - 1) // samples       # the last batch is filled up
    key = rng.stream(self._root, stream)
    parts = []
    with processes.progress(total=total, desc=label, unit="img", leave=False) as bar:
      for i in range(0, len(ids), size):
        rows = gather(table, prompt_ids[i:i + size], ids[i:i + size])
        if noise is not None:
          rows["noise"] = noise[np.minimum(ids[i:i + size], total - 1)]
        batch = exp.put_batch(rows)
        part, trajectory = self._sample(policy, exp.frozen, exp.judge_params, batch, key)
        if path_kl and np.all(exp.models.sampler.std > 0):
          part["path_kl"] = self._path_kl(exp.frozen, trajectory, batch["conditioning"])
        parts.append(processes.fetch(part))
        callbacks.check()
        bar.update(min(size, total - i))
    shape = lambda a: a[:total].reshape((len(prompts), samples) + a.shape[1:])
    out = jax.tree.map(lambda *a: shape(np.concatenate(a)), *parts)
    return Samples(out["images"], self._scores(out, prompts, samples), out["features"],
                   out.get("path_kl"))

  def _scores(self, out, prompts, samples) -> dict[str, np.ndarray]:
    rows = [p for p in prompts for _ in range(samples)]
    flat = out["images"].reshape((-1,) + out["images"].shape[2:])
    reward, judge, scores = self._exp.reward, self._exp.judge, dict(out["scores"])
    if not isinstance(judge, Reward):
      value, = processes.by_rows(judge.terms, flat, rows).values()
      scores["judge"] = value.reshape(len(prompts), samples)
    if isinstance(reward, Reward):
      terms = {name: check_scores(name, v.reshape(-1), rows) for name, v in out["terms"].items()}
    else:
      terms = processes.by_rows(reward.terms, flat, rows)
    terms = {name: v.reshape(len(prompts), samples) for name, v in terms.items()}
    scores["reward"] = np.asarray(weighted_sum(reward.weights, terms))
    if len(terms) > 1:
      scores.update({f"reward/{name}": v for name, v in terms.items()})
    rule = find("color_accuracy")
    try:
      prepared = rule.prepare(rows)
    except UserError:
      return scores      # prompts without a background colour
    right = rule.score(rule.params, jnp.asarray(flat, jnp.float32) / 255, prepared)
    scores["color_accuracy"] = np.asarray(right).reshape(len(prompts), samples)
    return scores


def describe(samples: Samples) -> dict:
  """Mean, clustered standard error and n of every score, and two measures of diversity."""
  out = {name: metrics.clustered_mean(value) for name, value in samples.scores.items()}
  out["reward"]["within_prompt_std"] = metrics.within_prompt_std(samples.scores["reward"])
  for name, measure in DIVERSITY.items():
    out[name] = measure(samples.features)
    del out[name]["per_prompt"]
  return out


def compare(tuned: Samples, base: Samples, base_again: Samples) -> dict:
  """The tuned model beside the base: `describe`, paired differences, distance and KL to base.

  Args:
    tuned, base: from the same noise. base_again: from other noise, for the floor of the distance.
  """
  out = describe(tuned)
  for name, value in tuned.scores.items():
    out[name]["change"] = metrics.paired_difference(value, base.scores[name])
  for name, measure in DIVERSITY.items():
    now, before = (measure(s.features)["per_prompt"] for s in (tuned, base))
    out[name]["ratio_to_base"] = float(now.mean() / before.mean())
    out[name]["change"] = metrics.clustered_mean((now - before)[:, None])
  flat = lambda s: s.features.reshape(-1, s.features.shape[-1])
  if flat(tuned).shape[1] <= 64:
    out["fd_to_base"] = metrics.frechet_with_floor(flat(tuned), flat(base), flat(base_again))
  if tuned.path_kl is not None:
    out["kl_to_base"] = metrics.clustered_mean(tuned.path_kl)
  return out


def exact_tilt(beta: float, *draws: Samples) -> dict:
  """What `p_base exp(beta R)` would give, by importance weights on all base samples at hand."""
  rewards = np.concatenate([d.scores["reward"] for d in draws], 1)
  features = np.concatenate([d.features for d in draws], 1)
  return {"beta_raw": beta, **metrics.tilt_expectation(rewards, features, beta)}

