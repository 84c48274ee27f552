"""How often the alarm cries on the base model's own noise.

  python benchmarks/alarm_noise.py RUN [LOOKS]

RUN is the folder of a run, of any method, whose evaluations hold two draws of the base model. A
simulated look compares two sets of pictures of the base model, 16 prompts and 4 pictures each as
recipes have it, none in both: what a policy that has not moved shows, and more, since the looks of
a run share their noise. Prints the share of looks with each sign.
"""
import collections
import pathlib
import sys

import numpy as np

from jaxalign.config.schema import AlarmConfig, EvalConfig
from jaxalign.metrics import alarm
from jaxalign.reports.reading import DAMAGE, Pictures


def pool(folder: pathlib.Path) -> Pictures:
  """Both draws of the base model, `[P, 2K, ...]`."""
  draws = [dict(np.load(folder / "evaluations" / f"{name}.npz")) for name in ("base", "base_again")]
  joined = {key: np.concatenate([draw[key] for draw in draws], 1) for key in draws[0]}
  scores = {name: joined[f"scores/{name}"] for name in ("reward", "judge")}
  return Pictures(joined["images"], scores, joined["features"])


def simulate(pictures: Pictures, looks: int, limits=AlarmConfig(), seed: int = 0):
  """Looks with each sign, and with any; and the measured numbers of all."""
  rng, sizes = np.random.default_rng(seed), EvalConfig()
  prompts, samples = pictures.scores["reward"].shape
  counts, seen = collections.Counter(), collections.defaultdict(list)
  for _ in range(looks):
    rows = rng.permutation(prompts)[:sizes.watch_prompts, None]
    columns = rng.permuted(np.tile(np.arange(samples), (len(rows), 1)), axis=1)
    of = lambda c: Pictures(pictures.images[rows, c],
                            {name: v[rows, c] for name, v in pictures.scores.items()},
                            pictures.features[rows, c])
    k = sizes.watch_samples
    measured = alarm.measure(of(columns[:, :k]), of(columns[:, k:2 * k]))
    found = alarm.signs(measured, limits)
    counts.update(found)
    counts["any"] += bool(found)
    for name, values in measured.items():
      seen[name].append([values.get(key, np.nan) for key in ("change", "errors", "ratio")])
  return counts, {name: np.array(values) for name, values in seen.items()}


def main() -> None:
  folder, looks = pathlib.Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2000
  try:
    pictures = pool(folder)
  except DAMAGE as error:
    sys.exit(f"error: {folder}: no two draws of a base model ({error})")
  counts, seen = simulate(pictures, looks)
  print(f"{looks} looks at {folder}")
  for name in ("judge", "diversity", "saturation", "roughness", "any"):
    low, high = wilson(counts[name], looks)
    print(f"{name:12s}{counts[name]:6d}  {counts[name] / looks:.2%}  [{low:.2%}, {high:.2%}]")
  for name, values in seen.items():
    print(name, "1, 50, 99 % of change, errors, ratio:",
          np.nanpercentile(values, (1, 50, 99), axis=0).round(4).T.tolist())


def wilson(count: int, n: int) -> tuple[float, float]:
  """95 % interval of a share."""
  z = 1.96
  middle, half = count / n + z * z / (2 * n), z * np.sqrt(
      count / n * (1 - count / n) / n + z * z / (4 * n * n))
  return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


if __name__ == "__main__":
  main()
