"""The card of an embedded model: everything in it is measured or read from the runs.

  python -m jaxalign.emoji.card --model=jaxalign/assets/emoji [--runs=VAE_RUN,MODEL_RUN]

writes README.md, quality.json, samples.png and, of the autoencoder, autoencoder.png into the
model's folder. With `--runs`, what is said about training is read from these run folders and kept
in training.json.
"""
import argparse
import json
import pathlib
import string
import sys

import jax
import numpy as np

from jaxalign import viz
from jaxalign.config.command import exit_status
from jaxalign.config.places import ASSETS
from jaxalign.convert import load_pipeline
from jaxalign.devices import sharding
from jaxalign.emoji import checks, crops, quality, scenes
from jaxalign.emoji.artwork import PACKAGES
from jaxalign.emoji.reader import Reader, check
from jaxalign.emoji.scorers import scene_clip, scene_judge
from jaxalign.errors import UserError
from jaxalign.models.vae import decode_images, encode_images

EACH = 171                 # of each of three kinds of scenes: 513 of those trained, and of new ones
SHOWN = 96
TITLES = {"emoji": "emoji: a small Stable Diffusion of emoji scenes",
          "emoji_sd3": "emoji_sd3: a small Stable Diffusion 3 of emoji scenes"}
WORDS = {
    "named": "subject of a single drawing is first among all, by `scene_judge`",
    "single": "single drawing: all that the caption says, but for the style",
    "several": "two to four of a kind: the same",
    "two": "two subjects: the same",
    "two_subjects": "both of two subjects are there",
    "number": "number of drawings is right",
    "place": "place of two subjects is right",
    "colour": "background has the named colour",
    "style": "all is in the named style",
}
# Name of a bar -> figure, group, lowest and highest share.
BARS = (("named", "trained", 0.90, 1.0), ("colour", "trained", 0.99, 1.0),
        ("style", "trained", 0.95, 1.0), ("several", "trained", 0.70, 1.0),
        ("two", "trained", 0.70, 1.0), ("several", "new", 0.30, 0.70), ("two", "new", 0.30, 0.70))


def figures(world: quality.World, asked, pictures, judge) -> dict[str, dict]:
  """Shares of `WORDS` with their intervals; `pictures` `[n, 64, 64, 3]` of scenes `asked`."""
  pictures = np.asarray(pictures)
  out = quality.answers(asked, Reader(world.drawings, world.names)(pictures))
  single = [i for i, scene in enumerate(asked) if scene.number == 1 and not scene.relation]
  out["named"] = quality.choices(judge, pictures[single], [asked[i] for i in single], world.names,
                                 "subjects")
  return {name: quality.share(out[name]) for name in WORDS}


def agreement(world: quality.World, asked, pictures) -> dict[str, float]:
  """How far those who score pictures agree on them.

  check_reader: share on which the reward `scene` and the rule say the same. clip_judge: correlation
  of `scene_clip` and `scene_judge`, of both what a picture's own caption has over one of another
  picture of the same kind.
  """
  captions = list(map(scenes.caption, asked))
  whole = [all(parts.values()) for parts in map(
      check, asked, Reader(world.drawings, world.names)(pictures))]
  module, params = crops.shipped()
  found = np.asarray(checks.answers(crops.see(module, params, pictures).decided(),
                                    checks.asked(captions, world.names))["scene"])
  shift = np.roll(np.arange(len(asked)).reshape(3, -1), 1, axis=1).ravel()
  margins = []
  for scorer in (scene_clip(), scene_judge()):
    score = lambda texts: np.asarray(scorer.score(scorer.params, pictures, scorer.prepare(texts)))
    margins.append(score(captions) - score([captions[i] for i in shift]))
  return {"check_reader": float(((found > 0.5) == np.array(whole)).mean()),
          "clip_judge": float(np.corrcoef(*margins)[0, 1])}


def through_autoencoder(pipeline, pictures) -> np.ndarray:
  """`[n, 64, 64, 3]` in [0, 1], encoded and decoded."""
  vae, params = pipeline.vae, pipeline.params["vae"]
  again = jax.jit(lambda images: decode_images(vae, params, encode_images(vae, params, images)))
  return np.concatenate([np.asarray(again(pictures[i:i + 64]))
                         for i in range(0, len(pictures), 64)])


def save_samples(path: pathlib.Path, drawn, captions) -> None:
  """`SHOWN` of the samples, kinds in turn, as a picture of six a row with their captions."""
  order = np.arange(len(captions)).reshape(-1, EACH).T.ravel()[:SHOWN]
  said = [captions[i].replace(" background", "") for i in order]
  viz.save_grid(drawn[order].reshape(-1, 6, *drawn.shape[1:]), path, scale=2,
                row_labels=["; ".join(said[i:i + 6]) for i in range(0, SHOWN, 6)])


def measure(pipeline, world: quality.World, folder: pathlib.Path) -> dict:
  """Figures of model, autoencoder and scorers; draws the card's two pictures into `folder`."""
  judge, sheets, out, shown = scene_judge(), scenes.Sheets.of(world.drawings), {}, []
  for name, table, seed in (("trained", world.trained, 1), ("new", world.held_out, 2)):
    asked, drawn = quality.ask(table, world.names, EACH, jax.random.key(seed))
    captions = list(map(scenes.caption, asked))
    pictures = quality.draw(pipeline, captions, seed, f"drawing scenes ({name})")
    out[name] = figures(world, asked, pictures, judge)
    shown.append((captions, pictures, asked))
    if name == "trained":
      real = np.asarray(scenes.render(sheets, table, drawn))
      again = through_autoencoder(pipeline, real)
      out["real"] = figures(world, asked, again, judge)
  mean_square = np.square(real - again).mean((1, 2, 3))
  out["agreement"] = agreement(world, shown[0][2] + shown[1][2], np.concatenate(
      [pictures for _, pictures, _ in shown]))
  out |= {"images": 3 * EACH, "steps": quality.STEPS, "guidance": quality.GUIDANCE,
          "decibels": float((-10 * np.log10(mean_square)).mean())}
  save_samples(folder / "samples.png", shown[0][1], shown[0][0])
  pair = np.stack([real[::EACH // 10][:30], again[::EACH // 10][:30]], 1)
  viz.save_grid(pair.reshape(5, 12, *real.shape[1:]), folder / "autoencoder.png", scale=2)
  return out


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


def record_of_training(folder: pathlib.Path, runs: str | None) -> dict:
  """What training.json in a model's folder says; `runs`, two folders with a comma between, is read
  first and kept there.

  Raises:
    UserError: there is no record and no run is named.
  """
  kept = folder / "training.json"
  if runs:
    kept.write_text(json.dumps(training_of([pathlib.Path(r) for r in runs.split(",")]),
                               indent=2) + "\n")
  if not kept.exists():
    raise UserError(f"{kept}: missing; name the two run folders by --runs")
  return json.loads(kept.read_text())


def made(training: dict) -> str:
  """The runs that made a model, a line each."""
  return "\n".join(
      f"- **{key}**: `python -m jaxalign.launch --config=jaxalign:{run['recipe']}`, seed "
      f"{run['seed']}: {run['steps']:,} steps of {run['batch']} pictures, "
      f"{run['seconds'] / 3600:.2f} hours of training on {run['device']}."
      for key, run in training.items())


def percent(figure: dict) -> str:
  """A share with its interval."""
  return (f"{100 * figure['mean']:.1f} % ({100 * figure['low']:.1f} to "
          f"{100 * figure['high']:.1f})")


def bars(result: dict) -> str:
  """Which of `BARS` are met, a line each."""
  lines = []
  for name, group, low, high in BARS:
    value = result[group][name]["mean"]
    asked = f"{100 * low:.0f} % or more" if high == 1 else f"{100 * low:.0f} to {100 * high:.0f} %"
    lines.append(f"| {WORDS[name]} | {group} | {asked} | {percent(result[group][name])} | "
                 f"{'met' if low <= value <= high else 'missed'} |")
  return "\n".join(lines)


def card(name: str, result: dict, training: dict, pipeline) -> str:
  """The text of README.md."""
  count = lambda tree: f"{sum(a.size for a in jax.tree.leaves(tree)):,}"
  rows = "\n".join(f"| {words} | " + " | ".join(
      percent(result[group][key]) for group in ("trained", "new", "real")) + " |"
      for key, words in WORDS.items())
  template = string.Template(pathlib.Path(__file__).with_suffix(".md").read_text())
  text = {key: pipeline.params[key] for key in pipeline.text_encoders}
  return template.substitute(
      title=TITLES[name], name=name, made=made(training), rows=rows, bars=bars(result), shown=SHOWN,
      images=result["images"], steps=result["steps"], guidance=f"{result['guidance']:g}",
      packages=", ".join(f"`{package.spec}`" for package in PACKAGES.values()),
      subjects=len(scenes.SUBJECTS), denoiser=count(pipeline.params[pipeline.denoiser_name]),
      vae=count(pipeline.params["vae"]), text=count(text), decibels=f"{result['decibels']:.1f}",
      check_reader=f"{100 * result['agreement']['check_reader']:.1f} %",
      clip_judge=f"{result['agreement']['clip_judge']:.2f}")


def main(argv=None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--artwork", default="runs/drawings/artwork.npz",
                      help="what `python -m jaxalign.emoji.artwork` writes")
  parser.add_argument("--model", type=pathlib.Path, default=ASSETS / "emoji", help="its folder")
  parser.add_argument("--runs", help="two run folders, comma between: autoencoder and model")
  args = parser.parse_args(argv)
  sharding.use_cores()
  training = record_of_training(args.model, args.runs)
  if args.model.name not in TITLES:
    raise UserError(f"--model={args.model}: the card knows {', '.join(TITLES)}")
  pipeline = load_pipeline(args.model)
  result = measure(pipeline, quality.world(args.artwork), args.model)
  (args.model / "quality.json").write_text(json.dumps(result, indent=2) + "\n")
  text = card(args.model.name, result, training, pipeline)
  (args.model / "README.md").write_text(text)
  print(text)


if __name__ == "__main__":
  sys.exit(exit_status(main))
