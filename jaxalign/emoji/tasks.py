"""Task sets with headroom: prompts on which the embedded model succeeds now and then.

`python -m jaxalign.emoji.tasks --drawings=FILE [--model=DIR] [--output=DIR]` draws every name,
keeps those with 20 to 60 % success, splits their backgrounds into training and held-out prompts,
measures the held-out ones afresh and writes prompt files, `tasks.json` and a page.
"""
import argparse
import json
import pathlib
import string
import sys
import zlib
from typing import NamedTuple

import jax
import numpy as np

from jaxalign.config.command import exit_status
from jaxalign.convert import load_pipeline
from jaxalign.devices import sharding
from jaxalign.emoji import quality
from jaxalign.emoji.drawings import (
  COLOURS,
  CORE_CATEGORIES,
  STYLES,
  Drawings,
  caption,
  load_drawings,
)
from jaxalign.emoji.scorers import ASSETS
from jaxalign.errors import UserError
from jaxalign.rewards import make_reward

HELD_OUT_COLOURS = ("pink", "gray", "cyan", "brown")
LOW, HIGH = 0.2, 0.6
NAMES = 8                         # of a set, at most
CANDIDATES = 544                  # names, or names and styles, to choose from
SCREEN, CHOICE = 6, 24            # samples of a name to find candidates, and to choose by
SAMPLES = 10                      # of a held-out prompt, to report


class TaskSet(NamedTuple):
  """Prompts for one kind of method; `styles` are those to choose names by, none if it is fixed."""
  label: str
  methods: str
  reward: str
  success: str
  styles: tuple = ()


SETS = (
    TaskSet("emoji", "rewards: nabla-GFlowNet, ReFL, DRaFT, AlignProp, DDPO (`:emoji_clip`), "
            "Diff-Instruct*", "emoji_clip", "emoji_rank", (None,)),
    TaskSet("emoji", "preferences: MaPO, Diffusion-DPO, SFT", "pairs", "emoji_twemoji"),
    TaskSet("emoji_styles", "yes or no: DDPO, B2-DiffuRL; noise: DNO, best-of-N", "emoji_style",
            "emoji_styled", STYLES),
)


def rewards_of(pipeline, captions: list[str], names: tuple[str, ...], seed: int, label: str):
  """`{reward name: [len(captions)]}` of one image of each caption."""
  images = quality.draw(pipeline, captions, seed, label)
  out = {}
  for name in names:
    reward = make_reward((name,), (1.0,)).parts[0][2]
    score = jax.jit(reward.score)
    out[name] = np.concatenate([
        np.asarray(score(reward.params, images[i:i + 64], reward.prepare(captions[i:i + 64])))
        for i in range(0, len(captions), 64)])
  return out


def choose(pipeline, names: list[str], task: TaskSet) -> list[tuple[str, str | None]]:
  """At most `NAMES` (name, style) with a success between `LOW` and `HIGH`.

  `SCREEN` samples of each say which are worth `CHOICE` more, and those alone decide: names kept for
  few samples would partly be kept for their luck. Among them, those whose reward varies most in
  the direction that the judge confirms (standard deviation times correlation): where all images
  are alike there is nothing to choose between, where the judge disagrees nothing is gained.
  """
  entries = [(name, style) for name in names for style in task.styles]
  entries = sorted(entries, key=lambda entry: zlib.crc32(str(entry).encode()))[:CANDIDATES]
  colours = [c for c in COLOURS if c not in HELD_OUT_COLOURS]
  inside = lambda rate: (rate >= LOW) & (rate <= HIGH)

  def scores(entries, samples, seed, label):
    captions = [caption(name, colours[k % len(colours)], style)
                for name, style in entries for k in range(samples)]
    rewards = rewards_of(pipeline, captions, (task.reward, task.success, "emoji_judge"), seed,
                         f"{label} {task.label}")
    return [rewards[name].reshape(-1, samples)
            for name in (task.reward, task.success, "emoji_judge")]

  kept = inside((scores(entries, SCREEN, 0, "screening")[1] > 0).mean(1))
  entries = [entry for entry, keep in zip(entries, kept, strict=True) if keep]
  reward, success, judge = scores(entries, CHOICE, 1, "choosing")
  apart = lambda x: x - x.mean(1, keepdims=True)
  agreed = (apart(reward) * apart(judge)).mean(1) / np.maximum(judge.std(1), 1e-6)
  kept = np.flatnonzero(inside((success > 0).mean(1)))
  return [entries[i] for i in sorted(kept, key=lambda i: -agreed[i])[:NAMES]]


def write(pipeline, drawings: Drawings, folder: pathlib.Path, keep=False) -> list[dict]:
  """Writes the prompt files of all sets (unless `keep`) and their table, which it returns."""
  unseen = (ASSETS / "prompts" / "emoji_unseen.txt").read_text()
  names = sorted({name for name in map(str, drawings.names) if f"a {name} on" not in unseen})
  table = []
  for task in SETS:
    files = {side: folder / f"{task.label}_{side}.txt" for side in ("train", "heldout")}
    if task.styles and not keep:
      chosen = choose(pipeline, names, task)
      if not chosen:
        raise UserError(f"{task.label}: no name has a success between {LOW} and {HIGH}")
      for side, file in files.items():
        file.write_text("\n".join(
            caption(name, colour, style) for name, style in chosen
            for colour in COLOURS
            if (colour in HELD_OUT_COLOURS) == (side == "heldout")) + "\n")
    prompts = {side: file.read_text().splitlines() for side, file in files.items()}
    repeated = [prompt for prompt in prompts["heldout"] for _ in range(SAMPLES)]
    right = rewards_of(pipeline, repeated, (task.success,), 2,
                       f"measuring {task.label}")[task.success] > 0
    table.append({"set": task.label, "methods": task.methods, "reward": task.reward,
                  "success": task.success, "base_success": quality.share(right),
                  "prompts": {side: len(lines) for side, lines in prompts.items()}})
  (folder / "tasks.json").write_text(json.dumps(table, indent=2) + "\n")
  (folder / "README.md").write_text(page(table))
  return table


def page(table: list[dict]) -> str:
  """README.md of the folder: the sets and the base model's success on their held-out prompts."""
  percent = lambda f: f"{100 * f['mean']:.0f} % ({100 * f['low']:.0f} to {100 * f['high']:.0f})"
  rows = "\n".join(
      f"| `jaxalign:{row['set']}_train`, `_heldout` | {row['prompts']['train']}, "
      f"{row['prompts']['heldout']} | {row['methods']} | `{row['reward']}` | `{row['success']}` | "
      f"{percent(row['base_success'])} |" for row in table)
  template = string.Template(pathlib.Path(__file__).with_suffix(".md").read_text())
  return template.substitute(low=f"{100 * LOW:.0f}", high=f"{100 * HIGH:.0f}", rows=rows,
                             candidates=CANDIDATES, screen=SCREEN, names=NAMES, choice=CHOICE,
                             samples=SAMPLES)


def main(argv=None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--drawings", required=True, help="emoji.npz of jaxalign.emoji.drawings")
  parser.add_argument("--model", default=str(ASSETS / "emoji"), help="diffusers directory")
  parser.add_argument("--output", type=pathlib.Path, default=ASSETS / "prompts", help="folder")
  parser.add_argument("--keep_prompts", action="store_true", help="only measure them anew")
  args = parser.parse_args(argv)
  sharding.use_cores()
  args.output.mkdir(parents=True, exist_ok=True)
  table = write(load_pipeline(args.model), load_drawings(args.drawings).of(CORE_CATEGORIES),
                args.output, args.keep_prompts)
  print(json.dumps(table, indent=2))


if __name__ == "__main__":
  sys.exit(exit_status(main))
