"""The table of docs/signs.md, printed, and its picture: who learns to letter words, by two readers.

  python -m benchmarks.signs RUN_FOLDER [RUN_FOLDER ...] [--shown=RUN,RUN,RUN]

Runs of `configs/NAME.py:signs`, finished. Base and tuned models draw the held-out prompts from the
same noise with one sampler, 20 steps without noise or guidance, whatever the runs sampled with.
"""
import argparse
import json
import pathlib

import numpy as np

from jaxalign import viz
from jaxalign.config.places import ASSETS
from jaxalign.convert import load_pipeline
from jaxalign.data.prompts import read_prompts
from jaxalign.emoji import quality, sign_card
from jaxalign.metrics.samples import clustered_mean, paired_difference
from jaxalign.rewards import ocr

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
SAMPLES, SHOWN = 2, 8
RIGHT, WRONG = (0.1, 0.6, 0.25), (0.85, 0.15, 0.15)
COLUMNS = ("recipe, seed", "learns from", "updates", "pictures asked about", "PP-OCRv4",
           "change", "Tesseract", "change", "diversity kept", "FD to base (floor)",
           "backgrounds right", "drift", "core minutes")


def repeated(prompts: list[str]) -> list[str]:
  return [prompt for prompt in prompts for _ in range(SAMPLES)]


def draw(folder: pathlib.Path, prompts: list[str]) -> np.ndarray:
  """`[P * SAMPLES, 64, 64, 3]` in [0, 1]."""
  return quality.draw(load_pipeline(folder), repeated(prompts), guidance=1.0,
                      label=folder.parent.name)


def read(images: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
  """`[P, SAMPLES]` of 0 and 1 by reader."""
  return {name: np.reshape(right, (len(prompts), SAMPLES)).astype(float)
          for name, right in sign_card.found(images, repeated(prompts)).items()}


def framed(images: np.ndarray, right: np.ndarray) -> np.ndarray:
  """The first of each of `SHOWN` prompts, `[SHOWN, 70, 70, 3]`, framed: green where it is right."""
  frame = np.where(right[:SHOWN, 0, None, None, None] > 0.5, RIGHT, WRONG)
  out = np.broadcast_to(frame, (SHOWN, 70, 70, 3)).copy()
  out[:, 3:-3, 3:-3] = images[:SHOWN * SAMPLES:SAMPLES]
  return out


def line(run: pathlib.Path, base: dict, tuned: dict) -> str:
  """The table's row of a run."""
  summary = json.loads((run / "summary.json").read_text())
  config = json.loads((run / "config.json").read_text())["config"]
  pm = lambda value, sign="": f"{value['mean']:{sign}.3f} ± {value['sem']:.3f}"
  cells = [f"{summary['recipe']}, {config['seed']}", ", ".join(config["reward"]["names"]),
           f"{summary['steps']:,}", f"{summary['cost']['reward_queries']:,}"]
  for reader in ("ocr_exact", "ocr_judge"):
    cells += [f"{base[reader].mean():.3f} → {pm(clustered_mean(tuned[reader]))}",
              pm(paired_difference(tuned[reader], base[reader]), "+")]
  after = summary["tuned"]
  looks = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
  drift = [look["eval/drift"] for look in looks if "eval/drift" in look][-1]
  cells += [f"{100 * after['diversity']['ratio_to_base']:.0f} %",
            f"{after['fd_to_base']['distance']:.4f} ({after['fd_to_base']['floor']:.4f})",
            f"{100 * after['color_accuracy']['mean']:.0f} %", f"{drift:.1f}",
            f"{summary['total_seconds'] / 60:.0f}"]
  return "| " + " | ".join(cells) + " |"


def main(argv=None) -> None:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.signs", description=__doc__)
  parser.add_argument("runs", nargs="+", type=pathlib.Path)
  parser.add_argument("--shown", help="names of at most three of them, comma between")
  args = parser.parse_args(argv)
  prompts = read_prompts("signs", "jaxalign:signs_heldout")
  before = draw(ASSETS / "signs", prompts)
  base = read(before, prompts)
  print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
  shown = args.shown.split(",") if args.shown else [run.name for run in args.runs[:3]]
  pictures = {"base": framed(before, base["ocr_exact"])}
  for run in args.runs:
    after = draw(run / "export", prompts)
    tuned = read(after, prompts)
    print(line(run, base, tuned), flush=True)
    if run.name in shown:
      pictures[run.name.split("-")[0]] = framed(after, tuned["ocr_exact"])
  viz.save_grid(np.stack(list(pictures.values())), DOCS / "images" / "signs.png", list(pictures),
                [ocr.quoted(prompt) for prompt in prompts[:SHOWN]])


if __name__ == "__main__":
  main()
