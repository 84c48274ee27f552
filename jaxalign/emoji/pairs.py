"""The shipped preference pairs: people who prefer 3-D to flat drawings.

`python -m jaxalign.emoji.pairs --artwork=FILE --output=FILE.parquet` writes, in the columns of
Pick-a-Pic v2, scenes of the embedded models' training drawn twice, once by the artist of 3-D emoji
(image 0, preferred) and once by one of the other two, in the same places. Captions name no style.
"""
import argparse
import io
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxalign.config.command import exit_status
from jaxalign.emoji import quality, scenes
from jaxalign.emoji.artwork import STYLES

WINNER = "3d"
PAIRS = 512


def make_rows(world: quality.World, count: int, seed: int = 0) -> list[dict]:
  """`count` rows, a third of each kind of scene."""
  key, generator = jax.random.key(seed), np.random.default_rng(seed)
  said, drawn = quality.ask(world.trained, world.names, -(-count // 3), key)
  winner = STYLES.index(WINNER)
  loser = generator.choice([i for i in range(len(STYLES)) if i != winner], len(said))
  sheets = scenes.Sheets.of(world.drawings)
  draw = lambda style: (np.asarray(scenes.render(
      sheets, world.trained, drawn._replace(style=jnp.broadcast_to(style, len(said))))) * 255
      ).round().astype(np.uint8)
  first, second = draw(jnp.int32(winner)), draw(jnp.asarray(loser, jnp.int32))
  return [{"caption": scenes.caption(said[i]._replace(style="")), "jpg_0": _png(first[i]),
           "jpg_1": _png(second[i]), "label_0": 1.0, "label_1": 0.0}
          for i in generator.permutation(len(said))[:count]]


def _png(image: np.ndarray) -> bytes:
  """At this size PNG is no larger than JPEG; readers tell by the content, not by the column."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "png", optimize=True)
  return buffer.getvalue()


def main(argv=None):
  import pyarrow as pa
  import pyarrow.parquet as pq
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--artwork", default="runs/drawings/artwork.npz",
                      help="what `python -m jaxalign.emoji.artwork` writes")
  parser.add_argument("--output", required=True, type=pathlib.Path, help="Parquet file")
  args = parser.parse_args(argv)
  rows = make_rows(quality.world(args.artwork), PAIRS)
  args.output.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(pa.Table.from_pylist(rows), args.output, compression="zstd")
  print(f"{args.output}: {len(rows)} pairs, {args.output.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
  sys.exit(exit_status(main))
