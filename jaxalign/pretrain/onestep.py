"""From a distilled run to the shipped one-step generator and its card.

  python -m jaxalign.pretrain.onestep --run=runs/distill_emoji_onestep-emoji

writes the run's export in float16, quality.json, README.md and samples.png into `--output`.
"""
import argparse
import json
import pathlib
import string
import sys

import jax
import numpy as np

from jaxalign import metrics
from jaxalign.config.command import exit_status
from jaxalign.config.places import ASSETS
from jaxalign.convert import load_pipeline, save_pipeline
from jaxalign.data.prompts import read_prompts
from jaxalign.devices import sharding
from jaxalign.emoji import card, quality, scenes
from jaxalign.emoji.scorers import scene_judge
from jaxalign.errors import UserError

PROMPTS, SAMPLES = 32, 8   # and samples of each prompt, for diversity


def diversity(pipeline) -> dict[str, float]:
  """Pairwise diversity on held-out prompts: mean and standard error over prompts."""
  prompts = read_prompts("prompts", "jaxalign:emoji_heldout")[:PROMPTS]
  judge = scene_judge()
  images = quality.draw(pipeline, [p for p in prompts for _ in range(SAMPLES)], 0, "for diversity")
  features = np.asarray(judge.features(judge.params, images))
  found = metrics.pairwise_diversity(features.reshape(len(prompts), SAMPLES, -1))
  return {key: found[key] for key in ("mean", "sem")}


def training_of(run: pathlib.Path) -> dict:
  """What the card says of training.

  Raises:
    UserError: the folder holds no finished run.
  """
  try:
    summary = json.loads((run / "summary.json").read_text())
    config = json.loads((run / "config.json").read_text())["config"]
    return {**{key: summary[key] for key in ("recipe", "steps", "seconds", "device")},
            "seed": config["seed"], "batch": config["sample"]["batch"]}
  except (OSError, ValueError, KeyError) as error:
    raise UserError(f"--run={run}: not a finished run: {error}") from error


def text(result: dict, teacher: dict) -> str:
  """README.md: from quality.json, and that of the teacher."""
  spread = lambda d: f"{d['mean']:.3f} ± {d['sem']:.3f}"
  rows = "\n".join(f"| {card.WORDS[key]} | {card.percent(value)} | "
                   f"{card.percent(teacher['trained'][key])} |"
                   for key, value in result["trained"].items())
  template = string.Template(pathlib.Path(__file__).with_suffix(".md").read_text())
  run = result["training"]
  return template.substitute(
      **{key: run[key] for key in ("recipe", "seed", "steps", "batch", "device")},
      images=result["images"], shown=card.SHOWN, hours=f"{run['seconds'] / 3600:.2f}", rows=rows,
      teacher_steps=teacher["steps"], guidance=f"{teacher['guidance']:g}",
      own_diversity=spread(result["diversity"]["onestep"]),
      teacher_diversity=spread(result["diversity"]["teacher"]))


def main(argv=None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--run", required=True, type=pathlib.Path, help="folder of the distilled run")
  parser.add_argument("--artwork", default="runs/drawings/artwork.npz",
                      help="what `python -m jaxalign.emoji.artwork` writes")
  parser.add_argument("--output", type=pathlib.Path, default=ASSETS / "emoji_onestep")
  args = parser.parse_args(argv)
  sharding.use_cores()
  training = training_of(args.run)
  save_pipeline(load_pipeline(args.run / "export"), args.output, dtype="float16")
  pipeline, teacher = load_pipeline(args.output), load_pipeline(ASSETS / "emoji")
  world = quality.world(args.artwork)
  asked, _ = quality.ask(world.trained, world.names, card.EACH, jax.random.key(1))
  captions = list(map(scenes.caption, asked))
  drawn = quality.draw(pipeline, captions, 1, "drawing scenes")
  result = {"images": len(captions), "training": training,
            "trained": card.figures(world, asked, drawn, scene_judge()),
            "diversity": {"onestep": diversity(pipeline), "teacher": diversity(teacher)}}
  card.save_samples(args.output / "samples.png", drawn, captions)
  (args.output / "quality.json").write_text(json.dumps(result, indent=2) + "\n")
  readme = text(result, json.loads((ASSETS / "emoji" / "quality.json").read_text()))
  (args.output / "README.md").write_text(readme)
  print(readme)


if __name__ == "__main__":
  sys.exit(exit_status(main))
