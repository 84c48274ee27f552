"""The shipped preference pairs, and how they are made."""
import numpy as np

from jaxalign.data.pairs import ASSETS, open_pairs
from jaxalign.data.prompts import read_prompts
from jaxalign.emoji.drawings import Drawings
from jaxalign.emoji.pairs import main

RED, BLUE = (200, 0, 0), (0, 0, 200)


def test_shipped_pairs():
  """Nothing that evaluation asks for is among them."""
  pairs = open_pairs("jaxalign:emoji", "drop")
  assert len(pairs) == 536 and (ASSETS / "emoji.parquet").stat().st_size < 2e6
  assert set(pairs.labels) == {1.0}
  name = lambda caption: caption.removeprefix("a ").rpartition(" on a ")[0]
  assert not set(pairs.captions) & set(read_prompts("", "jaxalign:emoji_heldout"))
  unseen = {name(prompt) for prompt in read_prompts("", "jaxalign:emoji_unseen")}
  assert unseen and not unseen & {name(caption) for caption in pairs.captions}
  images = pairs.images(0, 32, 32)["pixels"]
  assert images.shape == (2, 32, 32, 3) and np.abs(images[0] - images[1].astype(int)).mean() > 1


def test_rows_of_drawings(tmp_path):
  """Twemoji's drawing is preferred; the command writes what `open_pairs` reads, and the same again.
  """
  rgba = np.zeros((2, 2, 32, 32, 4), np.uint8)
  rgba[0], rgba[1] = (*BLUE, 255), (*RED, 255)
  drawings = Drawings(rgba, np.array(["alembic", "penguin"]), np.array(["Food & Drink"] * 2))
  np.savez(tmp_path / "emoji.npz", **drawings._asdict())
  files = [tmp_path / name for name in ("a.parquet", "b.parquet")]
  for file in files:
    main([f"--drawings={tmp_path / 'emoji.npz'}", f"--output={file}"])
  pairs = open_pairs(str(files[0]), "drop")
  assert len(pairs) == 1 and pairs.captions[0].startswith("a alembic on a ")    # penguin: unseen
  assert pairs.images(0, 32, 32)["pixels"][:, 5, 5].tolist() == [list(RED), list(BLUE)]
  assert files[0].read_bytes() == files[1].read_bytes()
