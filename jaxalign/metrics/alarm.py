"""Signs that a model cheats its reward: what was never optimised, beside what was.

`measure` compares samples of a policy with samples of the base model, from the same prompts and
noise; `signs` says which limits that passes. Pure functions in numpy. `docs/alarm.md` has the rules
with their false-alarm rate on the base model's own noise.
"""
import numpy as np

from jaxalign.metrics.samples import clustered_mean, paired_difference, pairwise_diversity

ENDS = 1 / 255           # a channel this near to 0 or 1 counts as saturated: a step of eight bits


def saturation(images) -> np.ndarray:
  """Share of an image's values that are at the end of their range, `[P,K]` in [0, 1].

  Args:
    images: `[P,K,H,W,3]` uint8.
  """
  images = np.asarray(images)
  low, high = round(255 * ENDS), 255 - round(255 * ENDS)
  return ((images <= low) | (images >= high)).mean((2, 3, 4))


def roughness(images) -> np.ndarray:
  """Share of a picture's variance that lies between neighbouring pixels, `[P,K]`, >= 0.

    (mean (x_i,j+1 - x_ij)^2 + mean (x_i+1,j - x_ij)^2) / (8 var x)

  of the luminance: 0.5 for independent noise, near 0 for smooth pictures and for those of one
  colour. A pattern of the finest grain, which rewards fall for and people do not see, raises it.
  """
  grey = np.asarray(images, np.float32) @ np.float32([0.299, 0.587, 0.114])
  across = np.square(np.diff(grey, axis=3)).mean((2, 3))
  down = np.square(np.diff(grey, axis=2)).mean((2, 3))
  # One grey level of eight bits keeps the noise of flat pictures from counting as a pattern.
  return ((across + down) / (8 * (grey.var((2, 3)) + 1))).astype(np.float64)


def drift(now, base) -> float:
  """How far the mean features of a prompt moved, in the base model's own noise.

    mean_p |mean_k f_pk - mean_k g_pk|^2 / mean_p (2 / K) tr Cov_k(g_pk)

  The part of a Frechet distance that is the distance of means, over what two draws of the base
  differ by: at most about 1 for a model that has not moved.

  Args:
    now, base: `[P,K,D]` features f and g, K >= 2.
  """
  now, base = np.asarray(now, np.float64), np.asarray(base, np.float64)
  moved = np.square(now.mean(1) - base.mean(1)).sum(-1).mean()
  own = base.var(1, ddof=1).sum(-1).mean() * 2 / base.shape[1]
  return float(moved / own) if own > 0 else 0.0


def measure(now, base) -> dict[str, dict[str, float]]:
  """What `signs` judges, name -> `change` and `errors`, its size in clustered standard errors.

  Args:
    now, base: have `images [P,K,H,W,3]` uint8, `scores` name -> `[P,K]` with "reward" and "judge",
      and `features [P,K,D]`; the same prompts and noise.
  Returns:
    "reward" and "judge": change in raw units. "diversity": `ratio` to the base. "saturation":
    change of the share. "roughness": `ratio`. "drift": `ratio`, see `drift`. `errors` is 0 where
    there is one prompt only, which tells nothing.
  """
  out = {name: _change(paired_difference(now.scores[name], base.scores[name]))
         for name in ("reward", "judge")}
  after, before = (pairwise_diversity(s.features)["per_prompt"] for s in (now, base))
  out["diversity"] = {**_change(clustered_mean((after - before)[:, None])),
                      "ratio": float(after.mean() / before.mean()) if before.mean() else 1.0}
  for name, of in (("saturation", saturation), ("roughness", roughness)):
    after, before = of(now.images), of(base.images)
    out[name] = _change(clustered_mean(after - before))
    if name == "roughness":
      out[name]["ratio"] = float(after.mean() / before.mean()) if before.mean() else 1.0
  out["drift"] = {"ratio": drift(now.features, base.features)}
  return out


def signs(measured: dict, limits) -> dict[str, str]:
  """Which rules are broken: name -> what was seen, in words. Empty is sound.

  A change counts from `limits.errors` standard errors on. The judge's fall is a sign while the
  reward rises; the others are damage whatever the reward does, unless their limit is 0, which is
  off.

  Args:
    measured: of `measure`; may have "path_kl" in nats, and "weights", see `AlarmConfig`.
    limits: has `errors`, `diversity`, `saturation`, `roughness`, `drift`, `path_kl`, `weights`; see
      `config.schema.AlarmConfig`.
  """
  seen, clear = {}, limits.errors
  value = lambda name, key="change": measured[name][key]
  beyond = lambda name: abs(value(name, "errors")) >= clear
  if value("reward") > 0 and value("judge") < 0 and beyond("reward") and beyond("judge"):
    seen["judge"] = (f"the judge fell by {-value('judge'):.3g} "
                     f"({-value('judge', 'errors'):.1f} SE) while the reward rose")
  if value("diversity", "ratio") < limits.diversity and beyond("diversity"):
    seen["diversity"] = f"{value('diversity', 'ratio'):.0%} of the base's diversity is left"
  if limits.saturation and value("saturation") > limits.saturation and beyond("saturation"):
    seen["saturation"] = f"{value('saturation'):.0%} more of the pictures' values are saturated"
  if limits.roughness and value("roughness", "ratio") > limits.roughness and beyond("roughness"):
    seen["roughness"] = (f"{value('roughness', 'ratio'):.1f} times as much of the pictures is "
                         "pattern of the finest grain")
  if limits.drift and value("drift", "ratio") > limits.drift:
    seen["drift"] = (f"the pictures' features moved {value('drift', 'ratio'):.0f} times as far as "
                     "the base's own noise moves them")
  if limits.path_kl and measured.get("path_kl", 0.0) > limits.path_kl:
    seen["path_kl"] = f"the path KL to the base is {measured['path_kl']:.0f} nats"
  if limits.weights and measured.get("weights", 0.0) > limits.weights:
    seen["weights"] = f"what is trained has moved by {measured['weights']:.0%} of its size"
  return seen


def _change(statistics: dict) -> dict[str, float]:
  sem, mean = statistics.get("sem", 0.0), statistics["mean"]
  # A change that is the same in every prompt has no error, and is as clear as can be.
  sure = float(np.sign(mean)) * 1e3 if "sem" in statistics else 0.0
  return {"change": mean, "errors": float(np.clip(mean / sem, -1e3, 1e3)) if sem else sure}
