"""Pictures: every pixel is where it belongs, and files are written whole."""
import numpy as np
import pytest
from PIL import Image

from jaxalign.viz import before_after, save_grid


def _images(p, k, size=4, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (p, k, size, size, 3), np.uint8)


def _read(path):
  return np.asarray(Image.open(path))


def _find(page, tile):
  """Positions `(y, x)` of an exact copy of `tile` on the page."""
  windows = np.lib.stride_tricks.sliding_window_view(page, tile.shape)[:, :, 0]
  return [tuple(p) for p in np.argwhere((windows == tile).all((-3, -2, -1)))]


def test_tiles_stand_in_rows_and_columns(tmp_path):
  images = _images(2, 3)
  save_grid(images, tmp_path / "grid.png", ["a cat", "a dog"], ["0", "1", "2"], scale=1)
  page = _read(tmp_path / "grid.png")
  at = np.array([[_find(page, images[p, k])[0] for k in range(3)] for p in range(2)])
  assert (np.diff(at[..., 0], axis=1) == 0).all() and (np.diff(at[..., 0], axis=0) >= 4).all()
  assert (np.diff(at[..., 1], axis=0) == 0).all() and (np.diff(at[..., 1], axis=1) >= 4).all()


def test_small_images_are_enlarged_without_smoothing(tmp_path):
  images = _images(1, 1, size=32)
  save_grid(images, tmp_path / "grid.png")
  page = _read(tmp_path / "grid.png")
  assert _find(page, images[0, 0].repeat(4, 0).repeat(4, 1))
  save_grid(_images(1, 1, size=200), tmp_path / "large.png")
  assert _read(tmp_path / "large.png").shape[0] < 300


def test_float_and_uint8_draw_the_same(tmp_path):
  images = _images(1, 2)
  save_grid(images, tmp_path / "a.png")
  save_grid(images / 255, tmp_path / "b.png")
  np.testing.assert_array_equal(_read(tmp_path / "a.png"), _read(tmp_path / "b.png"))
  broken = np.full((1, 1, 4, 4, 3), np.nan)
  broken[..., 0] = 7.0
  save_grid(broken, tmp_path / "broken.png")
  assert _find(_read(tmp_path / "broken.png"), np.uint8([[[255, 0, 0]]]))


def test_base_is_left_of_tuned(tmp_path):
  base, tuned = _images(2, 2, seed=1), _images(2, 2, seed=2)
  before_after(base, tuned, ["a cat", "a dog on a very long background " * 5],
               tmp_path / "pairs.png", scale=1)
  page = _read(tmp_path / "pairs.png")
  x = [_find(page, tile)[0][1] for tile in (*base[1], *tuned[1])]
  assert x == sorted(x) and x[2] - x[1] > x[1] - x[0]


def test_folder_is_made_and_nothing_else_is_left(tmp_path):
  save_grid(_images(1, 1), tmp_path / "new" / "step_3.png")
  save_grid(_images(1, 1, seed=1), tmp_path / "new" / "step_3.png")
  assert [p.name for p in (tmp_path / "new").iterdir()] == ["step_3.png"]


def test_every_prompt_can_be_drawn(tmp_path):
  labels = ["", "x" * 300, "a\nb", "wide 表 🐸"]
  save_grid(_images(4, 1), tmp_path / "grid.png", labels)


@pytest.mark.parametrize("call", [
  lambda path: save_grid(_images(1, 1)[0], path),
  lambda path: save_grid(_images(1, 0), path),
  lambda path: save_grid(_images(2, 1), path, ["one"]),
  lambda path: save_grid(_images(2, 1), path, None, ["one", "two"]),
  lambda path: before_after(_images(1, 1), _images(1, 2), ["a"], path),
])
def test_bad_shapes_raise(call, tmp_path):
  with pytest.raises(ValueError):
    call(tmp_path / "never.png")
  assert not (tmp_path / "never.png").exists()
