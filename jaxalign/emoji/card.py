"""The card of the embedded model: everything in it is measured or read from the runs.

  python -m jaxalign.emoji.card --drawings=FILE [--model=DIR] [--runs=VAE_RUN,MODEL_RUN]

writes README.md, quality.json, samples.png and autoencoder.png into the model's folder. With
`--runs`, what is said about training is read from these run folders and kept in training.json.
"""
import argparse
import json
import pathlib
import string
import sys

import numpy as np

from jaxalign import viz
from jaxalign.config.command import exit_status
from jaxalign.convert import load_pipeline
from jaxalign.devices import sharding
from jaxalign.emoji import quality, scorer_quality
from jaxalign.emoji.drawings import (
  CORE_CATEGORIES,
  VERSION,
  Drawings,
  colour_rgb,
  composite,
  load_drawings,
)
from jaxalign.emoji.scorers import ASSETS, emoji_clip, emoji_judge
from jaxalign.errors import UserError
from jaxalign.models.vae import decode_images, encode_images

IMAGES = 512
TARGETS = {"colour": 0.9, "judge_20": 0.7, "noto": 0.2, "twemoji": 0.2}
WORDS = {
    "colour": "background has the named colour",
    "judge_20": "`emoji_judge` ranks the caption above 19 random ones",
    "judge_20_names": "the same where the 19 differ in the name only",
    "clip_20": "`emoji_clip` ranks the caption above 19 random ones",
    "noto": "takes Noto's style, where the caption names none",
    "twemoji": "takes Twemoji's style, where the caption names none",
}
SCORER_ROWS = ("retrieval_20_held_out", "retrieval_20_same_colour_held_out",
               "retrieval_20_held_out_soft", "name_top1_held_out", "colour_12_held_out")


def save_samples(path: pathlib.Path, drawn, captions) -> None:
  """The first 48 samples as a picture, four a row, with their captions."""
  labels = [", ".join(c.removeprefix("a ").removesuffix(" background") for c in row)
            for row in np.reshape(captions[:48], (12, 4))]
  viz.save_grid(drawn[:48].reshape(12, 4, *drawn.shape[1:]), path, row_labels=labels, scale=3)


def measure(pipeline, drawings: Drawings, folder: pathlib.Path) -> dict:
  """Figures of model, autoencoder and scorers; draws the card's two pictures into `folder`."""
  figures, drawn, captions = quality.measure(pipeline, drawings, IMAGES)
  by_category = {}
  judge = emoji_judge()
  scores = np.asarray(judge.score(judge.params, drawn, judge.prepare(captions)))
  names = list(map(str, drawings.names))
  category = {name: str(c) for name, c in zip(names, drawings.categories)}
  of = np.array([category[c.removeprefix("a ").split(" on a ")[0]] for c in captions])
  for name in sorted(set(of)):
    by_category[name] = {"judge_score": float(scores[of == name].mean()),
                         "n": int((of == name).sum())}

  generator = np.random.default_rng(1)
  pairs = quality.trained_pairs(drawings)
  chosen = [pairs[i] for i in generator.integers(len(pairs), size=IMAGES)]
  vendor = generator.integers(2, size=IMAGES)
  rows = [names.index(name) for name, _ in chosen]
  real = composite(drawings.rgba[vendor, rows].astype(np.float32) / 255,
                         np.stack([colour_rgb(colour) for _, colour in chosen]))
  vae, params = pipeline.vae, pipeline.params["vae"]
  again = np.concatenate([np.asarray(decode_images(vae, params, encode_images(
      vae, params, real[i:i + 64]))) for i in range(0, IMAGES, 64)])
  reconstruction = {**quality.reconstruction_error(real, again),
                    **quality.score(again, chosen, drawings, generator)}

  loaded = {reward.name: reward for reward in (emoji_clip(), emoji_judge())}
  modules = {name: (scorer_quality.module_of(ASSETS / name), reward.params)
             for name, reward in loaded.items()}
  tables = scorer_quality.make_tables(drawings, pipeline.tokenizer)
  result = {"images": IMAGES, "steps": quality.STEPS, "guidance": quality.GUIDANCE,
            "model": figures, "by_category": by_category, "autoencoder": reconstruction,
            "scorers": scorer_quality.evaluate(modules, tables, 1024)}
  save_samples(folder / "samples.png", drawn, captions)
  pair = np.stack([real[:32], again[:32]], 1).reshape(8, 8, *real.shape[1:])
  viz.save_grid(pair, folder / "autoencoder.png", scale=3)
  return result


def training_of(runs: list[pathlib.Path]) -> dict:
  """What the card says of training, from the folders of the two runs.

  Raises:
    UserError: a folder holds no finished run.
  """
  out = {}
  for key, run in zip(("autoencoder", "model"), runs):
    try:
      summary = json.loads((run / "summary.json").read_text())
      config = json.loads((run / "config.json").read_text())
    except OSError as error:
      raise UserError(f"--runs={run}: not a finished run: {error}") from error
    out[key] = {**{k: summary[k] for k in ("recipe", "steps", "seconds", "device", "parameters")},
                "batch": config["config"]["task"]["batch"], "seed": config["config"]["seed"]}
  return out


def card(result: dict, training: dict, pipeline) -> str:
  """The text of README.md."""
  percent = lambda f: f"{100 * f['mean']:.1f} % ({100 * f['low']:.1f} to {100 * f['high']:.1f})"
  count = lambda name: f"{sum(a.size for a in _leaves(pipeline.params[name])):,}"
  model = "\n".join(
      f"| {WORDS[key]} | {percent(value)} | "
      + (f"{100 * TARGETS[key]:.0f} %, {'met' if value['mean'] >= TARGETS[key] else 'missed'}"
         if key in TARGETS else "") + f" | {percent(result['autoencoder'][key])} |"
      for key, value in result["model"].items())
  by_category = "\n".join(f"| {name} | {value['judge_score']:.3f} | {value['n']} |"
                          for name, value in result["by_category"].items())
  scorer_names = list(result["scorers"])
  scorer_rows = "\n".join(
      f"| `{row}` | " + " | ".join(f"{100 * result['scorers'][n][row]:.1f} %" for n in scorer_names)
      + " |" for row in SCORER_ROWS)
  either = result["scorers"][scorer_names[0]]
  errors = (f"misses among 20 captions of one colour correlate {either['error_correlation']:.2f}"
            if "error_correlation" in either else "one of them misses none")
  weakest = min(result["by_category"], key=lambda n: result["by_category"][n]["judge_score"])
  made = "\n".join(
      f"- **{key}**: `python -m jaxalign.launch --config=jaxalign:{run['recipe']}`, seed "
      f"{run['seed']}: {run['steps']:,} steps of {run['batch']} drawings, "
      f"{run['seconds'] / 3600:.2f} hours of training on {run['device']}."
      for key, run in training.items())
  reconstruction = result["autoencoder"]
  template = string.Template(pathlib.Path(__file__).with_suffix(".md").read_text())
  return template.substitute(
      images=result["images"], steps=result["steps"], guidance=f"{result['guidance']:g}",
      version=VERSION, unet=count("unet"), vae=count("vae"),
      text_encoder=count("text_encoder"), vocabulary=f"{pipeline.tokenizer.vocab_size:,}",
      length=pipeline.tokenizer.length, prediction=pipeline.scheduler_config["prediction_type"],
      made=made, model=model, by_category=by_category, weakest=weakest,
      mean_error=f"{reconstruction['mean_absolute_error']:.4f}",
      root_error=f"{reconstruction['root_mean_squared_error']:.4f}",
      scorers=" | ".join(f"`{name}`" for name in scorer_names), scorer_rows=scorer_rows,
      errors=errors, margins=f"{either['margin_correlation']:.2f}")


def _leaves(tree):
  for value in tree.values():
    yield from _leaves(value) if isinstance(value, dict) else (value,)


def main(argv=None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--drawings", required=True, help="emoji.npz of jaxalign.emoji.drawings")
  parser.add_argument("--model", type=pathlib.Path, default=ASSETS / "emoji", help="its folder")
  parser.add_argument("--runs", help="two run folders, comma between: autoencoder and model")
  args = parser.parse_args(argv)
  sharding.use_cores()
  kept = args.model / "training.json"
  if args.runs:
    kept.write_text(json.dumps(training_of([pathlib.Path(r) for r in args.runs.split(",")]),
                               indent=2) + "\n")
  if not kept.exists():
    raise UserError(f"{kept}: missing; name the two run folders by --runs")
  pipeline = load_pipeline(args.model)
  drawings = load_drawings(args.drawings).of(CORE_CATEGORIES)
  result = measure(pipeline, drawings, args.model)
  (args.model / "quality.json").write_text(json.dumps(result, indent=2) + "\n")
  text = card(result, json.loads(kept.read_text()), pipeline)
  (args.model / "README.md").write_text(text)
  print(text)


if __name__ == "__main__":
  sys.exit(exit_status(main))
