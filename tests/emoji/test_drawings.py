import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from jaxalign.emoji import drawings as emoji
from jaxalign.errors import UserError


def write_tarball(path, vendor, entries, pictures):
  files = {"package/emoji.json": json.dumps(entries).encode()}
  for name, rgba in pictures.items():
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "png")
    files[f"package/img/{vendor}/64/{name}"] = buffer.getvalue()
  with tarfile.open(path, "w:gz") as tar:
    for name, content in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def tarballs(tmp_path):
  """Two vendors; only the first of three emoji is drawn by both."""
  entries = [{"name": "CAT FACE!", "image": "1.png", "category": "Animals & Nature"},
             {"name": "KEYCAP #", "image": "2.png", "category": "Symbols"},
             {"name": "FLAG", "image": "3.png", "category": "Flags"}]
  picture = np.zeros((64, 64, 4), np.uint8)
  picture[16:48, 16:48] = (200, 100, 50, 255)
  paths = {v: tmp_path / f"{v}.tgz" for v in ("google", "twitter")}
  sums = {"google": write_tarball(paths["google"], "google", entries,
                                  {"1.png": picture, "2.png": picture}),
          "twitter": write_tarball(paths["twitter"], "twitter", entries,
                                   {"1.png": picture[..., [2, 1, 0, 3]], "3.png": picture})}
  return paths, sums


def test_reads_what_both_vendors_drew(tarballs, tmp_path):
  drawings = emoji.read_tarballs(tarballs[0], 32, tarballs[1])
  assert drawings.names.tolist() == ["cat face"]
  assert drawings.rgba.shape == (2, 1, 32, 32, 4) and drawings.rgba.dtype == np.uint8
  assert drawings.rgba[0, 0, 16, 16].tolist() == [200, 100, 50, 255]
  assert drawings.rgba[1, 0, 16, 16].tolist() == [50, 100, 200, 255]
  assert drawings.rgba[:, 0, 0, 0, 3].tolist() == [0, 0]
  np.savez(tmp_path / "emoji.npz", **drawings._asdict())
  again = emoji.load_drawings(tmp_path / "emoji.npz")
  np.testing.assert_array_equal(again.rgba, drawings.rgba)
  assert len(again.of(["Animals & Nature"]).names) == 1 and len(again.of(["Flags"]).names) == 0


def test_another_version_is_refused(tarballs):
  with pytest.raises(UserError, match="google.tgz.*checksum"):
    emoji.read_tarballs(tarballs[0], 32)


def test_missing_files_are_named(tmp_path):
  missing = tmp_path / "none.tgz"
  with pytest.raises(UserError, match="none.tgz"):
    emoji.read_tarballs({"google": missing, "twitter": missing}, 32)
  with pytest.raises(UserError, match="none.tgz.*jaxalign.emoji.drawings"):
    emoji.load_drawings(missing)


def test_captions():
  assert emoji.clean_name("  Man’s Shoe (#2) ") == "man s shoe 2"
  assert emoji.caption("cat", "red") == "a cat on a red background"
  assert emoji.caption("cat", "red", "noto") == "a cat on a red background noto style"


def test_one_pair_in_ten_is_held_out():
  out = [emoji.held_out(f"name {i}", c) for i in range(200) for c in emoji.COLOURS]
  assert 0.08 < np.mean(out) < 0.12
  assert emoji.held_out("cat face", "red") == emoji.held_out("cat face", "red")


def test_composite():
  rgba = np.zeros((3, 4, 4, 4), np.float32)
  rgba[:, :, 2:] = (0.2, 0.4, 0.6, 1.0)
  colours = np.stack([emoji.colour_rgb(c) for c in ("red", "white", "black")])
  image = emoji.composite(rgba, colours)
  np.testing.assert_allclose(image[:, 0, 0], colours)
  np.testing.assert_allclose(image[:, 0, 3], [[0.2, 0.4, 0.6]] * 3)
  np.testing.assert_allclose(emoji.composite(rgba[0], colours[0]), image[0])
