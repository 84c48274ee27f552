"""The prompt files of the embedded world, of scenes and of signs.

  python -m jaxalign.emoji.prompts --artwork=runs/drawings/artwork.npz

`emoji_train` and `emoji_heldout` ask for what the embedded models never saw put together: a subject
on a new colour, a new number of a subject, a new ordered pair. How often a model fails there, its
card says. No combination is in both; training prompts differ from held-out ones in it, not only in
the colour.
`emoji_captions` are captions as in training, for distillation. `signs_train` and `signs_heldout`
have no word in common, and each word has a letter at a place where training never had it.
"""
import argparse
import pathlib
import sys
import zlib

import jax
import numpy as np

from jaxalign.config.command import exit_status
from jaxalign.config.places import ASSETS
from jaxalign.emoji import quality, scenes, signs

# Kinds of scenes, as `scenes.Table` groups them, in the order in which they take turns.
TURNS = (1, 2, 1, 2, 0)
COUNTS = {"train": 400, "heldout": 200}
CAPTIONS = 2048
WORDS = {"train": 256, "heldout": 128}
HELD_OUT = 40              # percent of new combinations that are kept for `emoji_heldout`


def side(scene: scenes.Scene) -> str:
  """Whether the new combination of a scene is for training or held out.

  A pair is one combination in either order and with either word for it.
  """
  what = (sorted(scene.subjects) if scene.relation else
          [scene.subjects[0], str(scene.number) if scene.number > 1 else scene.colour])
  return "heldout" if zlib.crc32(" & ".join(what).encode()) % 100 < HELD_OUT else "train"


def make(world: quality.World, seed: int = 0) -> dict[str, list[str]]:
  """Captions by file, in a fixed order and none twice; kinds take turns as `TURNS` says."""
  generator, out = np.random.default_rng(seed), {}
  table = world.held_out
  for name, count in COUNTS.items():
    waiting = []
    for start, end in zip(table.starts[:-1], table.starts[1:]):
      some = [table.scene(row, colour, world.names) for row in range(start, end)
              for colour in np.flatnonzero(table.colours[row])]
      some = [scenes.caption(scene) for scene in some if side(scene) == name]
      waiting.append([some[i] for i in generator.permutation(len(some))])
    turns = [TURNS[i % len(TURNS)] for i in range(count)]
    out[f"emoji_{name}"] = [waiting[kind].pop() for kind in turns]
  said = []
  for part in range(-(-CAPTIONS // 384)):
    said += quality.ask(world.trained, world.names, 128, jax.random.fold_in(
        jax.random.key(seed), part))[0]
  captions = list(dict.fromkeys(map(scenes.caption, said)))
  out["emoji_captions"] = [captions[i] for i in generator.permutation(len(captions))[:CAPTIONS]]
  return out


def make_signs(seed: int = 0) -> dict[str, list[str]]:
  """The same of signs: captions of new words, none of them twice, in random colours."""
  generator, out = np.random.default_rng(seed), {}
  words = dict.fromkeys(signs.ask(2 * sum(WORDS.values()), generator, new=True))
  words = [word for word in words if word != "SEX"]     # not on a sheet of samples
  for name, count in WORDS.items():
    chosen, words = words[:count], words[count:]
    out[f"signs_{name}"] = [
        signs.caption(word, str(generator.choice(scenes.COLOURS))) for word in chosen]
  return out


def main(argv=None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--artwork", default="runs/drawings/artwork.npz",
                      help="what `python -m jaxalign.emoji.artwork` writes")
  parser.add_argument("--output", type=pathlib.Path, default=ASSETS / "prompts", help="folder")
  args = parser.parse_args(argv)
  args.output.mkdir(parents=True, exist_ok=True)
  for name, captions in {**make(quality.world(args.artwork)), **make_signs()}.items():
    (args.output / f"{name}.txt").write_text("\n".join(captions) + "\n")
    print(f"{args.output / name}.txt: {len(captions)} prompts")


if __name__ == "__main__":
  sys.exit(exit_status(main))
