"""Preference pairs at a chosen distance from what the embedded model draws.

  python -m jaxalign.emoji.mismatch --scenario=r0 [--pairs=512] --output=runs/pairs/r0.parquet

Losers and winners, on captions of `emoji_train`:

  r0  two samples of the model; `scene_clip` votes, with the noise of a Bradley-Terry choice
  r1  a sample with more guidance against one as usual: a near variant
  r2  a sample against one that was spoilt (blurred, noisy): what is rejected is off the model
  r3  a sample in shades of gray against the sample itself: what is preferred is off the model

`--strength` in [0, 1] moves from the sample (0) to the full restyling (1) in r2 and r3. Columns are
those of Pick-a-Pic v2. A JSON file beside the pairs says how far winners and losers lie from what
the model draws, by the judge's features (Hong et al. 2024, arXiv 2406.06424, section 4).
"""
import argparse
import io
import json
import pathlib
import sys

import numpy as np
from PIL import Image, ImageFilter

from jaxalign import metrics
from jaxalign.config.command import exit_status
from jaxalign.config.places import ASSETS
from jaxalign.convert import load_pipeline
from jaxalign.data.prompts import read_prompts
from jaxalign.devices import sharding
from jaxalign.emoji import quality
from jaxalign.emoji.recipes import MISMATCH
from jaxalign.emoji.scorers import scene_clip, scene_judge
from jaxalign.errors import UserError

SHARPNESS = 2.0          # of a vote, in 1 / standard deviations of the reward's differences
MORE_GUIDANCE = 6.0


def gray(images: np.ndarray) -> np.ndarray:
  """Luma (Rec. 601) in all three channels, `[B, S, S, 3]` in [0, 1]."""
  luma = images @ np.array([0.299, 0.587, 0.114], np.float32)
  return np.repeat(luma[..., None], 3, -1)


def spoil(images: np.ndarray, generator) -> np.ndarray:
  """Blurred by a Gaussian of 2 pixels and noisy by 0.15, `[B, S, S, 3]` in [0, 1]."""
  blurred = np.stack([np.asarray(Image.fromarray((x * 255).round().astype(np.uint8)).filter(
      ImageFilter.GaussianBlur(2))) for x in images]).astype(np.float32) / 255
  return (blurred + 0.15 * generator.standard_normal(images.shape)).clip(0, 1).astype(np.float32)


def vote(first: np.ndarray, second: np.ndarray, generator) -> np.ndarray:
  """Whether the first of two scores `[B]` wins a Bradley-Terry choice."""
  gap = first - second
  chance = 1 / (1 + np.exp(-SHARPNESS * gap / max(gap.std(), 1e-8)))
  return generator.uniform(size=len(gap)) < chance


def make_pairs(pipeline, captions: list[str], scenario: str, strength: float, seed: int):
  """Winners and losers `[B, S, S, 3]` in [0, 1] of B captions."""
  generator = np.random.default_rng(seed)
  base = quality.draw(pipeline, captions, seed, "drawing samples")
  mix = lambda image, other: (1 - strength) * image + strength * other
  if scenario == "r0":
    other = quality.draw(pipeline, captions, seed + 1, "drawing others")
    clip = scene_clip()
    score = lambda x: np.asarray(clip.score(clip.params, x, clip.prepare(captions)))
    wins = vote(score(base), score(other), generator)[:, None, None, None]
    return np.where(wins, base, other), np.where(wins, other, base)
  if scenario == "r1":
    return quality.draw(pipeline, captions, seed + 1, "drawing winners", MORE_GUIDANCE), base
  if scenario == "r2":
    return base, mix(base, spoil(base, generator))
  return mix(base, gray(base)), base


def distances(pipeline, captions, sides: dict[str, np.ndarray], seed: int) -> dict[str, dict]:
  """Of each side from new samples of the model: mean feature distance (1 - cosine) within captions,
  and Frechet distance with its floor, the model's from itself."""
  judge = scene_judge()
  features = lambda x: np.asarray(judge.features(judge.params, x))
  fresh, again = (features(quality.draw(pipeline, captions, seed + k, "drawing a reference"))
                  for k in (2, 3))
  out = {"model": {"feature_distance": float(1 - (again * fresh).sum(-1).mean())}}
  for name, images in sides.items():
    own = features(images)
    out[name] = {"feature_distance": float(1 - (own * fresh).sum(-1).mean()),
                 "frechet": metrics.frechet_with_floor(own, fresh, again)}
  return out


def rows_of(captions, winners, losers) -> list[dict]:
  """Rows of the table, the winner as image 0 and image 1 in turn."""
  def png(image):
    buffer = io.BytesIO()
    Image.fromarray((image * 255).round().astype(np.uint8)).save(buffer, "png")
    return buffer.getvalue()
  rows = []
  for i, caption in enumerate(captions):
    first = i % 2
    images = [png(winners[i]), png(losers[i])]
    rows.append({"caption": caption, "jpg_0": images[first], "jpg_1": images[1 - first],
                 "label_0": 1.0 - first, "label_1": float(first)})
  return rows


def main(argv=None) -> None:
  import pyarrow as pa
  import pyarrow.parquet as pq
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--scenario", required=True, choices=MISMATCH)
  parser.add_argument("--output", required=True, type=pathlib.Path, help="Parquet file")
  parser.add_argument("--pairs", type=int, default=512)
  parser.add_argument("--strength", type=float, default=1.0, help="0 to 1, of r2 and r3")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--model", default=str(ASSETS / "emoji"), help="diffusers directory")
  parser.add_argument("--prompts", default="jaxalign:emoji_train", help="captions")
  args = parser.parse_args(argv)
  sharding.use_cores()
  if args.pairs < 1 or not 0 <= args.strength <= 1:
    raise UserError(f"--pairs={args.pairs} is below 1" if args.pairs < 1 else
                    f"--strength={args.strength} is outside [0, 1]")
  prompts = read_prompts("--prompts", args.prompts)
  captions = [prompts[i % len(prompts)] for i in range(args.pairs)]
  pipeline = load_pipeline(args.model)
  winners, losers = make_pairs(pipeline, captions, args.scenario, args.strength, args.seed)
  measured = distances(pipeline, captions, {"winners": winners, "losers": losers}, args.seed)
  args.output.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(pa.Table.from_pylist(rows_of(captions, winners, losers)), args.output,
                 compression="zstd")
  about = {"scenario": args.scenario, "pairs": args.pairs, "strength": args.strength,
           "seed": args.seed, "distance_to_model": measured}
  args.output.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
  print(json.dumps(about, indent=2))


if __name__ == "__main__":
  sys.exit(exit_status(main))
