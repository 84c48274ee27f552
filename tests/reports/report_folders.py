"""Folders of runs as a finished run leaves them, with pictures whose numbers are known."""
import json
import pathlib

import numpy as np

import runs
from jaxalign.train.evaluation import Samples, compare, describe

PROMPTS = ["a cat on a red background", "a dog on a blue background", "<b>bold</b> & \"quoted\"",
           "a car", "a tree", "a house", "the moon", "the sun"]
VERSIONS = {"jax": "0.10.2", "python": "3.11.2", "git": "0123456789abcdef"}


def write_run(folder, *, gain=0.3, judge=0.05, collapse=0.0, seed=0, size=32, samples=4, prompts=8,
              finished=True, noise=0, **overrides) -> pathlib.Path:
  """A run whose reward rises by about `gain` and judge by `judge`, both ± 0.1 a picture.

  Args:
    collapse: share of the way to one picture a prompt that features go.
    noise: seed of the base model's pictures. seed: of all that the run itself has.
    overrides: config keys as of `runs.smoke`.
  """
  shared, own = np.random.default_rng(noise), np.random.default_rng([seed, 7])
  shape = (prompts, samples)
  base = Samples(
      shared.integers(60, 200, (*shape, size, size, 3), dtype=np.uint8),
      {"reward": shared.normal(0.5, 0.2, shape), "judge": shared.normal(0.4, 0.1, shape)},
      shared.normal(1, 1, (*shape, 16)))
  features = base.features + 0.1 * own.normal(size=base.features.shape)
  features += collapse * (features.mean(1, keepdims=True) - features)
  tuned = Samples(
      (base.images * 0.8 + 20).astype(np.uint8),
      {"reward": base.scores["reward"] + own.normal(gain, 0.1, shape),
       "judge": base.scores["judge"] + own.normal(judge, 0.1, shape)}, features,
      own.gamma(4.0, 2.0, shape))
  again = Samples(base.images, base.scores, shared.normal(1, 1, (*shape, 16)))
  folder.mkdir(parents=True)
  write = lambda name, content: (folder / name).write_text(json.dumps(content))
  config = runs.smoke(eval__prompts=prompts, eval__samples=samples, **overrides)
  write("config.json", {"config": config.to_dict(), "environment": VERSIONS})
  (folder / "evaluations").mkdir()
  write("evaluations/prompts.json", {"held_out": PROMPTS[:prompts], "watched": PROMPTS[:prompts]})
  names = {"base": base, "base_watch": base, **({"tuned": tuned} if finished else {"watch": tuned})}
  for name, found in names.items():
    np.savez(folder / "evaluations" / f"{name}.npz", **found.arrays())
  rows = []
  for step in range(1, 5):
    rows.append({"step": step, "seconds": 2.0 * step, "train/reward": 0.5 + gain * step / 4,
                 "loss/total": 1.0 / step, "train/path_kl": 2.0 * step})
    if step % 2 == 0:
      rows[-1] |= {"eval/reward": 0.5, "eval/reward_change": gain * step / 4,
                   "eval/reward_change_sem": 0.05, "eval/judge": 0.4,
                   "eval/judge_change": judge * step / 4, "eval/judge_change_sem": 0.02,
                   "eval/diversity": 1.0}
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  if finished:
    write("summary.json", {
        "recipe": config.recipe, "steps": 4, "exported_step": 4, "seconds": 8.0,
        "total_seconds": 12.0, "device": "cpu x1", "stopped": "", "base": describe(base),
        "tuned": compare(tuned, base, again),
        "cost": {"denoiser_forward": 3264, "reward_queries": 528, "peak_bytes": 5406801920,
                 "update_bytes": 2 ** 20}})
  return folder
