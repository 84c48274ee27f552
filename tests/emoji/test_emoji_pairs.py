"""The shipped preference pairs and prompts, and how they are made."""
import numpy as np
import pytest

import worlds
from jaxalign.data.pairs import ASSETS, open_pairs
from jaxalign.data.prompts import read_prompts
from jaxalign.emoji import prompts, quality, scenes
from jaxalign.emoji.artwork import STYLES
from jaxalign.emoji.pairs import main, make_rows
from jaxalign.emoji.reader import Reader


@pytest.fixture(scope="module")
def world():
  drawings = worlds.drawings().take(slice(0, 4))
  trained, held_out = quality.tables(worlds.NAMES, np.ones((4, 12), bool))
  return quality.World(worlds.NAMES, drawings, trained, held_out)


def test_shipped_pairs():
  """Nothing that evaluation asks for is among them."""
  pairs = open_pairs("jaxalign:emoji", "drop")
  assert len(pairs) == 512 and (ASSETS / "emoji.parquet").stat().st_size < 3e6
  assert set(pairs.labels) == {1.0}
  assert not set(pairs.captions) & set(read_prompts("", "jaxalign:emoji_heldout"))
  assert not any(scenes.held_out(scenes.parse(caption)) for caption in pairs.captions)
  images = pairs.images(0, 64, 64)["pixels"]
  assert images.shape == (2, 64, 64, 3) and np.abs(images[0] - images[1].astype(int)).mean() > 1


def test_pairs_show_one_scene_by_two_artists(world, tmp_path):
  rows = make_rows(world, 24)
  assert len(rows) == 24 and rows == make_rows(world, 24)
  import pyarrow as pa
  import pyarrow.parquet as pq
  pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
  pairs = open_pairs(str(tmp_path / "pairs.parquet"), "drop")
  read, others = Reader(world.drawings, world.names), set()
  for i in range(24):
    first, second = read(pairs.images(i, 64, 64)["pixels"].astype(np.float32) / 255)
    assert first._replace(styles=()) == second._replace(styles=())
    assert first.styles == ("3d",) and first.colour == scenes.parse(pairs.captions[i]).colour
    others |= set(second.styles)
  assert others == set(STYLES) - {"3d"}


def test_the_pairs_command_writes_the_same_bytes_again(tmp_path, monkeypatch, world):
  monkeypatch.setattr(quality, "world", lambda file: world)
  files = [tmp_path / name for name in ("a.parquet", "b.parquet")]
  for file in files:
    main([f"--output={file}"])
  assert files[0].read_bytes() == files[1].read_bytes()


def test_shipped_prompts_ask_for_what_training_lacks():
  sets = {name: list(map(scenes.parse, read_prompts("", f"jaxalign:emoji_{name}")))
          for name in ("train", "heldout", "captions")}
  assert [len(sets[name]) for name in sets] == [400, 200, 2048]
  assert all(len(set(some)) == len(some) for some in sets.values())
  for name in ("train", "heldout"):
    assert all(len(scenes.held_out(scene)) == 1 for scene in sets[name])
    assert {prompts.side(scene) for scene in sets[name]} == {name}
    kinds = [2 if scene.relation else int(scene.number > 1) for scene in sets[name]]
    assert kinds == [prompts.TURNS[i % 5] for i in range(len(kinds))]
  assert not any(map(scenes.held_out, sets["captions"]))


def test_both_words_for_a_pair_are_on_one_side():
  left = scenes.Scene(("cat", "dog"), 1, "left", "red")
  right = scenes.Scene(("dog", "cat"), 1, "right", "blue")
  assert prompts.side(left) == prompts.side(right)
