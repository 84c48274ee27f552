"""Preference files: what is read, and that every mistake in them is named with its row."""
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jaxalign.data.pairs import open_pairs
from jaxalign.errors import UserError

RED, BLUE = (200, 0, 0), (0, 0, 200)


def picture(colour, size=(8, 8), kind="png"):
  buffer = io.BytesIO()
  Image.new("RGB", size, colour).save(buffer, kind)
  return buffer.getvalue()


def row(label_0=1.0, **changes):
  return {"caption": "a cat", "jpg_0": picture(RED), "jpg_1": picture(BLUE), "label_0": label_0,
          "label_1": None if label_0 is None else 1 - label_0, "ranking_id": 7, **changes}


def write(path, rows, row_group_size=2):
  pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
  return str(path)


def first_colours(pairs):
  """Of each pair's first image, the preferred one: "r" or "b"."""
  blue = lambda i: pairs.images(i, 8, 8)["pixels"][0, 4, 4, 2]
  return "".join("rb"[int(blue(i) > 100)] for i in range(len(pairs)))


def test_parquet(tmp_path):
  """Two row groups; the loser may come first; ties are dropped or kept; JPEG as well as PNG."""
  rows = [row(), row(0.0), row(0.5, caption="a tie"), row(jpg_0=picture(BLUE, kind="jpeg")),
          row(0.0)]
  file = write(tmp_path / "pairs.parquet", rows)
  pairs = open_pairs(file, "drop")
  assert len(pairs) == 4 and "a tie" not in pairs.captions
  assert first_colours(pairs) == "rbbb"
  soft = open_pairs(file, "soft")
  assert len(soft) == 5 and soft.labels.tolist() == [1, 0, 0.5, 1, 0]
  assert first_colours(soft) == "rbrbb"


def test_folder_of_parquet_files(tmp_path):
  write(tmp_path / "b.parquet", [row(0.0), row(caption="last")])
  write(tmp_path / "a.parquet", [row(), row(), row(0.0)])
  pairs = open_pairs(str(tmp_path), "drop")
  assert pairs.captions[-1] == "last" and first_colours(pairs) == "rrbbr"
  assert pairs.place(3) == f"{tmp_path / 'b.parquet'}: row 1"


def test_integer_labels(tmp_path):
  assert len(open_pairs(write(tmp_path / "a.parquet", [row(1), row(0)]), "drop")) == 2


@pytest.mark.parametrize("changes, message", [
    (dict(caption=None), r"row 2: caption=None is not a text"),
    (dict(caption=" "), r"row 2: caption=' ' is not a text"),
    (dict(label_0=0.7), r"row 2: label_0=0\.7 is not 1"),
    (dict(label_0=None), r"row 2: label_0=None is not 1"),
    (dict(label_0=float("nan")), r"row 2: label_0=nan is not 1"),
    (dict(label_1=1.0), r"row 2: label_1=1\.0, but label_0=1\.0"),
])
def test_bad_rows_are_named_at_once(tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    open_pairs(write(tmp_path / "a.parquet", [row(), row(**changes)]), "drop")


@pytest.mark.parametrize("content, message", [
    (None, r"row 3: image 1: NoneType is not the bytes of an image"),
    (b"no image", r"row 3: image 1: cannot be read"),
    (picture(RED, (64, 64))[:-60], r"row 3: image 1: cannot be read"),
])
def test_bad_images_are_named_when_read(tmp_path, content, message):
  pairs = open_pairs(write(tmp_path / "a.parquet", [row(), row(), row(jpg_1=content)]), "drop")
  pairs.images(1, 8, 8)
  with pytest.raises(UserError, match=message):
    pairs.images(2, 8, 8)


def test_files_that_are_no_pairs(tmp_path):
  (tmp_path / "text.parquet").write_text("no")
  with pytest.raises(UserError, match=r"text\.parquet: not a Parquet file"):
    open_pairs(str(tmp_path / "text.parquet"), "drop")
  missing = {k: v for k, v in row().items() if k != "jpg_1"}
  with pytest.raises(UserError, match="column jpg_1 is missing; there are caption"):
    open_pairs(write(tmp_path / "b.parquet", [missing]), "drop")
  with pytest.raises(UserError, match="no pair but ties"):
    open_pairs(write(tmp_path / "c.parquet", [row(0.5)]), "drop")
  with pytest.raises(UserError, match="no such file or folder"):
    open_pairs(str(tmp_path / "none"), "drop")
  with pytest.raises(UserError, match="no such file or folder"):
    open_pairs("jaxalign:emojis", "drop")
  (tmp_path / "empty").mkdir()
  with pytest.raises(UserError, match="neither"):
    open_pairs(str(tmp_path / "empty"), "drop")
  with pytest.raises(UserError, match="data.pairs is empty"):
    open_pairs("", "drop")


def write_jsonl(tmp_path, *lines):
  for name, colour in (("r.png", RED), ("b.png", BLUE)):
    (tmp_path / name).write_bytes(picture(colour))
  good = {"caption": "a cat", "image_0": "r.png", "image_1": "b.png", "label_0": 1}
  text = "\n".join(line if isinstance(line, str) else json.dumps(good | line) for line in lines)
  (tmp_path / "votes.jsonl").write_text(text + "\n")
  return str(tmp_path / "votes.jsonl")


def test_jsonl(tmp_path):
  file = write_jsonl(tmp_path, {}, {"label_0": 0, "label_1": 1}, {"label_0": 0.5, "annotator": "x"})
  assert first_colours(open_pairs(file, "drop")) == "rb"
  assert first_colours(open_pairs(file, "soft")) == "rbr"


@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\x0c"])
def test_only_line_feeds_end_a_row(tmp_path, mark):
  """And a byte order mark, or an empty line at the end, is no part of one."""
  row = json.dumps({"caption": f"a{mark}b", "image_0": "r.png", "image_1": "b.png", "label_0": 1},
                   ensure_ascii=False)
  pairs = open_pairs(write_jsonl(tmp_path, f"\ufeff{row}", row, ""), "drop")
  assert pairs.captions == [f"a{mark}b"] * 2


@pytest.mark.parametrize("line, message", [
    ("{", r"votes\.jsonl: row 2: not JSON"),
    ("[1]", r"row 2: list is not an object"),
    ('{"caption": "a"}', r"row 2: image_0 is missing"),
    ({"image_1": "x.png"}, r"row 2: image_1='x\.png': no such file"),
    ({"image_1": 3}, r"row 2: image_1=3: no such file"),
    ({"label_0": True}, r"row 2: label_0=True is not 1"),
    ({"label_0": "1"}, r"row 2: label_0='1' is not 1"),
    ({"label_1": 1}, r"row 2: label_1=1, but label_0=1"),
    ({"caption": ["a"]}, r"row 2: caption=\['a'\] is not a text"),
])
def test_bad_jsonl(tmp_path, line, message):
  with pytest.raises(UserError, match=message):
    open_pairs(write_jsonl(tmp_path, {}, line), "drop")


def test_winner_and_loser_folders(tmp_path):
  for side, colour in (("winner", RED), ("loser", BLUE)):
    (tmp_path / side).mkdir()
    for name in ("one.png", "two.png"):
      (tmp_path / side / name).write_bytes(picture(colour))
  for name in ("one", "two"):
    (tmp_path / "winner" / f"{name}.txt").write_text(f"a {name}\n")
  pairs = open_pairs(str(tmp_path), "drop")
  assert pairs.captions == ["a one", "a two"] and first_colours(pairs) == "rr"
  (tmp_path / "winner" / "two.txt").write_text("\n")
  with pytest.raises(UserError, match=r"row 2 \(two\.png\): caption='' is not a text"):
    open_pairs(str(tmp_path), "drop")
  (tmp_path / "winner" / "two.txt").unlink()
  with pytest.raises(UserError, match=r"two\.txt: the caption of two\.png cannot be read"):
    open_pairs(str(tmp_path), "drop")
  (tmp_path / "loser" / "one.png").unlink()
  with pytest.raises(UserError, match=r"loser/one\.png: missing"):
    open_pairs(str(tmp_path), "drop")


def test_images_are_scaled_and_cut_to_the_middle(tmp_path):
  """16 x 8: the left and right quarters go. Each image by its own size."""
  wide = np.zeros((8, 16, 3), np.uint8)
  wide[:, 4:12] = RED
  buffer = io.BytesIO()
  Image.fromarray(wide).save(buffer, "png")
  rows = [row(jpg_0=buffer.getvalue(), jpg_1=picture(BLUE, (20, 40)))]
  pair = open_pairs(write(tmp_path / "a.parquet", rows), "drop").images(0, 8, 8)
  images = pair["pixels"]
  assert images.shape == (2, 8, 8, 3) and images.dtype == np.uint8
  np.testing.assert_array_equal(images[0], np.broadcast_to(RED, (8, 8, 3)))
  np.testing.assert_array_equal(images[1], np.broadcast_to(BLUE, (8, 8, 3)))
  # Height and width of the file; top and left of the cut, in the scaled image.
  blue_height, blue_width = Image.open(io.BytesIO(rows[0]["jpg_1"])).size[::-1]
  top = (round(blue_height * 8 / blue_width) - 8) // 2 if blue_height > blue_width else 0
  left = (round(blue_width * 8 / blue_height) - 8) // 2 if blue_width > blue_height else 0
  assert top + left == 4
  assert pair["origin"].tolist() == [[8, 16, 0, 4], [blue_height, blue_width, top, left]]


def test_origin_goes_with_its_image(tmp_path):
  """Where image 1 was preferred, both are turned round."""
  pictures = dict(jpg_0=picture(BLUE, (12, 12)), jpg_1=picture(RED, (20, 20)))
  rows = [row(**pictures), row(**pictures, label_0=0.0, label_1=1.0)]
  pairs = open_pairs(write(tmp_path / "a.parquet", rows), "drop")
  sides = lambda i: pairs.images(i, 8, 8)["origin"][:, 0].tolist()
  assert sides(0) == [12, 20] and sides(1) == [20, 12]
