"""The shipped preference pairs: one vendor's drawing of an emoji preferred to the other's.

`python -m jaxalign.emoji.pairs --drawings=DIR/emoji.npz --output=FILE.parquet` writes, in the
columns of Pick-a-Pic v2, a pair for the names of the core categories: Twemoji's drawing (image 0,
preferred) and Noto's on the same plain background. What evaluation asks for is left out: captions
of `emoji_heldout`, names of `emoji_unseen`, and name-colour pairs that the embedded model never
saw.
"""
import argparse
import io
import pathlib
import sys

import numpy as np
from PIL import Image

from jaxalign.config.command import exit_status
from jaxalign.emoji.drawings import (
    COLOURS,
    CORE_CATEGORIES,
    STYLES,
    Drawings,
    caption,
    colour_rgb,
    composite,
    held_out,
    load_drawings,
)

WINNER = "twemoji"
PROMPTS = pathlib.Path(__file__).resolve().parent.parent / "assets" / "prompts"


def make_rows(drawings: Drawings, seed: int = 0) -> list[dict]:
  """A row for each name, on a colour drawn from those that go with it."""
  generator = np.random.default_rng(seed)
  heldout, unseen = (set((PROMPTS / f"emoji_{name}.txt").read_text().splitlines())
                     for name in ("heldout", "unseen"))
  first = STYLES.index(WINNER)
  rows = []
  for i, name in enumerate(map(str, drawings.names)):
    if any(caption(name, colour) in unseen for colour in COLOURS):
      continue
    colour = str(generator.choice([colour for colour in COLOURS if not held_out(name, colour)
                                   and caption(name, colour) not in heldout]))
    images = composite(drawings.rgba[:, i].astype(np.float32) / 255, colour_rgb(colour))
    images = (images * 255).round().astype(np.uint8)
    rows.append({"caption": caption(name, colour), "jpg_0": _png(images[first]),
                 "jpg_1": _png(images[1 - first]), "label_0": 1.0, "label_1": 0.0})
  return rows


def _png(image: np.ndarray) -> bytes:
  """At this size PNG is no larger than JPEG; readers tell by the content, not by the column."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "png", optimize=True)
  return buffer.getvalue()


def main(argv=None):
  import pyarrow as pa
  import pyarrow.parquet as pq
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--drawings", required=True, type=pathlib.Path,
                      help="emoji.npz of `python -m jaxalign.emoji.drawings`")
  parser.add_argument("--output", required=True, type=pathlib.Path, help="Parquet file")
  args = parser.parse_args(argv)
  rows = make_rows(load_drawings(args.drawings).of(CORE_CATEGORIES))
  args.output.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(pa.Table.from_pylist(rows), args.output, compression="zstd")
  print(f"{args.output}: {len(rows)} pairs, {args.output.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
  sys.exit(exit_status(main))
