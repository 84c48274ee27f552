"""What of a caption is right, before and after alignment: a table as GenEval's.

  python -m jaxalign.emoji.parts --runs=runs/A,runs/B [--artwork=runs/drawings/artwork.npz]

reads the held-out pictures of finished runs on an embedded model. With `--artwork` they are read by
rule, which no run can have optimised; without, by the classifier behind the reward `scene`.
`--style=3d` asks for that style where a prompt names none: what the reward `style_3d` wants.

GenEval: Ghosh et al. 2023, arXiv 2310.11513.
"""
import argparse
import json
import pathlib
import sys

import jax
import numpy as np

from jaxalign import metrics
from jaxalign.config.command import exit_status
from jaxalign.emoji import checks, crops, quality, scenes
from jaxalign.emoji.artwork import STYLES
from jaxalign.emoji.reader import PARTS, Reader, check
from jaxalign.errors import UserError
from jaxalign.train.evaluation import Samples

KINDS = ("single", "several", "two")
COLUMNS = (*KINDS, "number", "place", "colour", "style", "overall")


def kind(scene: scenes.Scene) -> str:
  """One of `KINDS`."""
  return "two" if scene.relation else "several" if scene.number > 1 else "single"


def by_rule(world: quality.World):
  """`(pictures [n, 64, 64, 3] in [0, 1], scenes) -> parts of each`, as of `reader.check`."""
  reader = Reader(world.drawings, world.names)
  return lambda pictures, asked: [check(*pair) for pair in zip(asked, reader(pictures))]


def by_classifier():
  """The same, from the most likely of all that the shipped classifier sees."""
  module, params = crops.shipped()
  see = jax.jit(lambda pictures, said: checks.answers(
      crops.see(module, params, pictures).decided(), said))
  names = module.config["subjects"]

  def read(pictures, asked):
    found = see(pictures, checks.asked(list(map(scenes.caption, asked)), names))
    said = lambda scene: {"place": bool(scene.relation), "style": bool(scene.style)}
    return [{part: bool(found[part][i] > 0.5) for part in PARTS if said(scene).get(part, True)}
            for i, scene in enumerate(asked)]
  return read


def shares(images, prompts: list[str], read, style: str = "") -> dict[str, dict]:
  """Clustered mean of each of `COLUMNS` that any prompt has.

  Args:
    images: `[P, K, 64, 64, 3]` uint8, K pictures of each prompt.
    read: what `by_rule` and `by_classifier` give.
    style: asked of pictures whose prompt names none.
  """
  asked = [scene._replace(style=scene.style or style) for scene in map(scenes.parse, prompts)]
  samples = images.shape[1]
  flat = images.reshape(-1, *images.shape[2:]).astype(np.float32) / 255
  found = read(flat, [scene for scene in asked for _ in range(samples)])
  rows = [found[i:i + samples] for i in range(0, len(found), samples)]
  out = {}
  for column in COLUMNS:
    part = lambda parts: parts[column] if column in PARTS else all(parts.values())
    values = [[float(part(parts)) for parts in row] for scene, row in zip(asked, rows)
              if (column not in PARTS or column in row[0])
              and (column not in KINDS or kind(scene) == column)]
    if values:
      out[column] = metrics.clustered_mean(np.array(values))
  return out


def read_run(folder: pathlib.Path, read, style: str = "") -> list[tuple[str, dict]]:
  """Rows of the table: the base model and the tuned one.

  Raises:
    UserError: the folder holds no finished run on prompts of scenes.
  """
  try:
    config = json.loads((folder / "config.json").read_text())["config"]
    prompts = json.loads((folder / "evaluations" / "prompts.json").read_text())["held_out"]
    pictures = {}
    for name in ("base", "tuned"):
      with np.load(folder / "evaluations" / f"{name}.npz") as file:
        pictures[name] = Samples.from_arrays(file).images
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"--runs: {folder}: not a finished run: {error}") from error
  if pictures["base"].shape[2:] != (scenes.SIZE, scenes.SIZE, 3):
    raise UserError(f"--runs: {folder}: its pictures are not of {scenes.SIZE} pixels")
  label = f"`{config['recipe']}`, seed {config['seed']}"
  return [(label if name == "tuned" else f"{config['model']['path']}",
           shares(images, prompts, read, style)) for name, images in pictures.items()]


def table(rows: list[tuple[str, dict]]) -> str:
  """Markdown; a base model that several runs share is said once."""
  def cell(found, column):
    if column not in found:
      return ""
    error = f" ± {100 * found[column]['sem']:.0f}" if "sem" in found[column] else ""   # one prompt
    return f"{100 * found[column]['mean']:.0f}{error}"
  lines = [f"| % of pictures right | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
  lines += dict.fromkeys(f"| {label} | {' | '.join(cell(found, c) for c in COLUMNS)} |"
                         for label, found in rows)
  return "\n".join(lines)


def main(argv=None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--runs", required=True, help="folders of finished runs, comma between")
  parser.add_argument("--artwork", help="what `python -m jaxalign.emoji.artwork` writes")
  parser.add_argument("--style", choices=STYLES, default="", help="asked where prompts name none")
  args = parser.parse_args(argv)
  read = by_rule(quality.world(args.artwork)) if args.artwork else by_classifier()
  print(table([row for run in args.runs.split(",")
               for row in read_run(pathlib.Path(run), read, args.style)]))


if __name__ == "__main__":
  sys.exit(exit_status(main))
