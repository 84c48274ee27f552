"""docs/signs.md and its picture: who learns to letter words, by two readers that none has asked.

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
from jaxalign.emoji import quality
from jaxalign.metrics.samples import clustered_mean, paired_difference
from jaxalign.rewards import ocr

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
SAMPLES, SHOWN = 2, 10
RIGHT, WRONG = (0.1, 0.6, 0.25), (0.85, 0.15, 0.15)
COLUMNS = ("recipe, seed", "learns from", "updates", "pictures asked about", "PP-OCRv4",
           "change", "Tesseract", "change", "diversity kept", "FD to base (floor)", "core minutes")
HEAD = """# Words on signs

Does a model learn to write? `jaxalign:signs` ([card](../jaxalign/assets/signs/README.md)) letters words of two to four capitals, and was trained without
some letters at some places, so that a good half of the words of `signs_heldout` come out wrong. Right or wrong is read at a glance, and by two networks that
nobody here has trained: PP-OCRv4 and Tesseract 5 ([rewards](rewards.md#words-in-pictures)).

![Ten held-out words as the base model and three tuned ones draw them](images/signs.png)

The first ten prompts of the set, one sample each of the same noise, not picked. A green frame: PP-OCRv4 reads the word that was asked for.

| """  # noqa: E501
TAIL = """

Written by `python -m benchmarks.signs`. *PP-OCRv4* and *Tesseract*: share of {pictures} pictures of {prompts} held-out words that the reader finds exactly, without guidance, in 20 steps of
the deterministic sampler; the base model's first. Changes are paired by noise, with standard errors clustered by prompt. Diversity kept and Frechet distance are those of the run's own summary.
*Core minutes* are those of the run with all that is around it, on one CPU core that was not alone on its machine; compare them by halves and doubles only.
Words of alignment and words of the test share none, and of the test words none was trained on.
"""  # noqa: E501


def draw(folder: pathlib.Path, prompts: list[str]) -> np.ndarray:
  """`[P, SAMPLES, 64, 64, 3]` in [0, 1]."""
  captions = [prompt for prompt in prompts for _ in range(SAMPLES)]
  images = quality.draw(load_pipeline(folder), captions, guidance=1.0, label=folder.parent.name)
  return images.reshape(len(prompts), SAMPLES, *images.shape[1:])


def read(images: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
  """`[P, SAMPLES]` of 0 and 1 by reader."""
  captions = [prompt for prompt in prompts for _ in range(SAMPLES)]
  bytes_ = np.round(255 * images.reshape(-1, *images.shape[2:])).astype(np.uint8)
  return {name: np.asarray(reader.score(bytes_, captions)).reshape(images.shape[:2])
          for name, reader in (("ocr_exact", ocr.ocr_exact()), ("ocr_judge", ocr.ocr_judge()))}


def framed(images: np.ndarray, right: np.ndarray) -> np.ndarray:
  """`[P, 64, 64, 3]` in a frame of three pixels, green where it is right."""
  frame = np.where(right[:, None, None, None] > 0.5, RIGHT, WRONG)
  out = np.broadcast_to(frame, (len(images), 70, 70, 3)).copy()
  out[:, 3:-3, 3:-3] = images
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
  kept, distance = summary["tuned"]["diversity"]["ratio_to_base"], summary["tuned"]["fd_to_base"]
  cells += [f"{100 * kept:.0f} %", f"{distance['distance']:.4f} ({distance['floor']:.4f})",
            f"{summary['total_seconds'] / 60:.0f}"]
  return " | ".join(cells)


def main(argv=None) -> None:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.signs", description=__doc__)
  parser.add_argument("runs", nargs="+", type=pathlib.Path)
  parser.add_argument("--shown", help="names of at most three of them, comma between")
  args = parser.parse_args(argv)
  prompts = read_prompts("signs", "jaxalign:signs_heldout")
  before = draw(ASSETS / "signs", prompts)
  base, rows = read(before, prompts), []
  shown = args.shown.split(",") if args.shown else [run.name for run in args.runs[:3]]
  columns = {"base": framed(before[:SHOWN, 0], base["ocr_exact"][:SHOWN, 0])}
  for run in args.runs:
    after = draw(run / "export", prompts)
    tuned = read(after, prompts)
    rows.append(line(run, base, tuned))
    print(rows[-1], flush=True)
    if run.name in shown:
      columns[run.name.split("-")[0]] = framed(after[:SHOWN, 0], tuned["ocr_exact"][:SHOWN, 0])
  viz.save_grid(np.stack(list(columns.values()), 1), DOCS / "images" / "signs.png", prompts[:SHOWN],
                list(columns))
  table = [" | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), *(f"| {row} |" for row in rows)]
  (DOCS / "signs.md").write_text(HEAD + "\n".join(table) + TAIL.format(
      pictures=before.shape[0] * SAMPLES, prompts=len(prompts)))


if __name__ == "__main__":
  main()
