"""The card of `signs`, the embedded model that letters words: everything in it is measured.

  python -m jaxalign.emoji.sign_card [--runs=VAE_RUN,MODEL_RUN]

writes README.md, quality.json and samples.png into the model's folder. With `--runs`, what is said
about training is read from these run folders and kept in training.json.
"""
import argparse
import json
import pathlib
import string
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import viz
from jaxalign.config.command import exit_status
from jaxalign.config.places import ASSETS
from jaxalign.convert import load_pipeline
from jaxalign.data.prompts import read_prompts
from jaxalign.devices import sharding
from jaxalign.emoji import card, quality, scenes, signs
from jaxalign.rewards import ocr

COUNT, SHOWN, SEED = 256, 96, 3
GUIDANCES = (1.0, quality.GUIDANCE)
GROUPS = {"trained": "words whose letters training had at these places",
          "signs_train": "`signs_train`, for alignment",
          "signs_heldout": "`signs_heldout`, for tests"}
READERS = {"ocr_exact": "PP-OCRv4 (`ocr_exact`)", "ocr_judge": "Tesseract (`ocr_judge`)",
           "letters": "this package's rule, by letter shapes"}


def asked() -> dict[str, list[str]]:
  """Captions of each of `GROUPS`."""
  generator = np.random.default_rng(SEED)
  words = signs.ask(COUNT, generator, new=False)
  return {"trained": [signs.caption(word, str(generator.choice(scenes.COLOURS))) for word in words],
          **{name: read_prompts("signs", f"jaxalign:{name}") for name in list(GROUPS)[1:]}}


def found(pictures, captions) -> dict[str, np.ndarray]:
  """On which of the pictures `[n, 64, 64, 3]` in [0, 1] each of `READERS` finds the word, `[n]`."""
  words = [ocr.quoted(caption) for caption in captions]
  bytes_ = np.round(255 * np.asarray(pictures)).astype(np.uint8)
  return {"ocr_exact": ocr.ocr_exact().score(bytes_, captions),
          "ocr_judge": ocr.ocr_judge().score(bytes_, captions),
          "letters": np.equal(signs.read(pictures), words)}


def readings(pictures, captions) -> dict[str, dict]:
  """Shares of the pictures on which each of `READERS` finds the word."""
  return {name: quality.share(right) for name, right in found(pictures, captions).items()}


def real(pipeline, captions) -> np.ndarray:
  """Signs of these captions, drawn and sent through the autoencoder."""
  words = [ocr.quoted(caption) for caption in captions]
  colours = [next(i for i, colour in enumerate(scenes.COLOURS)
                  if caption == signs.caption(word, colour))
             for word, caption in zip(words, captions)]
  pictures = signs.render(signs.spell(words), jnp.asarray(scenes.RGB)[np.array(colours)],
                          np.zeros((len(words), 2), np.int32))
  return card.through_autoencoder(pipeline, np.asarray(pictures))


def measure(pipeline, folder: pathlib.Path) -> dict:
  """Shares of right words by group, guidance and reader; draws samples.png into `folder`."""
  out = {}
  for group, captions in asked().items():
    out[group] = {"real": readings(real(pipeline, captions), captions)}
    for guidance in GUIDANCES:
      pictures = quality.draw(pipeline, captions, SEED, f"drawing signs ({group})", guidance)
      out[group][f"{guidance:g}"] = readings(pictures, captions)
      if (group, guidance) == ("signs_heldout", 1.0):
        labels = [" ".join(map(ocr.quoted, captions[i:i + 12])) for i in range(0, SHOWN, 12)]
        viz.save_grid(pictures[:SHOWN].reshape(-1, 12, *pictures.shape[1:]),
                      folder / "samples.png", scale=2, row_labels=labels)
  return out


def text(result: dict, training: dict, pipeline) -> str:
  """The text of README.md."""
  size = lambda name: sum(leaf.size for leaf in jax.tree.leaves(pipeline.params[name]))
  rows = "\n".join(
      f"| {said} | {READERS[reader]} | " + " | ".join(
          card.percent(result[group][kind][reader])
          for kind in (*(f"{g:g}" for g in GUIDANCES), "real")) + " |"
      for group, said in GROUPS.items() for reader in READERS)
  template = string.Template(pathlib.Path(__file__).with_suffix(".md").read_text())
  return template.substitute(
      rows=rows, made=card.made(training), shown=SHOWN, steps=quality.STEPS, words=COUNT,
      guidance=f"{quality.GUIDANCE:g}", denoiser=f"{size(pipeline.denoiser_name):,}",
      text=f"{sum(map(size, pipeline.text_encoders)):,}")


def main(argv=None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--model", type=pathlib.Path, default=ASSETS / "signs", help="its folder")
  parser.add_argument("--runs", help="two run folders, comma between: autoencoder and model")
  args = parser.parse_args(argv)
  sharding.use_cores()
  training = card.record_of_training(args.model, args.runs)
  pipeline = load_pipeline(args.model)
  result = measure(pipeline, args.model)
  (args.model / "quality.json").write_text(json.dumps(result, indent=2) + "\n")
  (args.model / "README.md").write_text(text(result, training, pipeline))
  print((args.model / "README.md").read_text())


if __name__ == "__main__":
  sys.exit(exit_status(main))
