"""Grids of images with labels, as PNG."""
import pathlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxalign.storage.files import whole

_PAGE = (240, 241, 244)  # not white: many images have a white background
_INK = (40, 43, 52)
_MARGIN = 24  # px around the page, and between blocks
_GAP = 6  # px between tiles
_LABEL_WIDTH = 190  # px of the column of row labels
_TEXT, _HEADING = 15, 17  # px font sizes
_TILE = 128  # px: small images are enlarged to about this


def save_grid(images, path, row_labels=None, col_labels=None, scale=None):
  """Writes `images` as a labelled grid, one row per prompt; the file appears whole or not at all.

  Args:
    images: `[P,K,H,W,3]`, uint8 or float in [0,1] (values outside are clipped).
    path: PNG to write; missing folders are made.
    row_labels: P strings at the left, wrapped; usually the prompts.
    col_labels: K strings above the columns.
    scale: whole number of screen pixels per image pixel; by default images below 128 px are
      enlarged to about that size. Nearest neighbour: people see the pixels that the model made.
  """
  tiles = _tiles(images, scale)
  if col_labels is not None and len(col_labels) != tiles.shape[1]:
    raise ValueError(f"{len(col_labels)} col_labels for {tiles.shape[1]} columns")
  headings = [(text, k, 1) for k, text in enumerate(col_labels or ())]
  _save(_compose(tiles, row_labels, headings, _GAP, tiles.shape[1]), path)


def before_after(base, tuned, prompts, path, scale=None):
  """Writes base samples on the left and tuned ones, from the same noise, on the right.

  Args:
    base, tuned: `[P,K,H,W,3]`, uint8 or float in [0,1]; entry (p, k) of both from the same noise.
    prompts: P strings, written beside their rows.
    path: PNG to write; missing folders are made.
    scale: as in `save_grid`.
  """
  base, tuned = _tiles(base, scale), _tiles(tuned, scale)
  if base.shape != tuned.shape:
    raise ValueError(f"base {base.shape} and tuned {tuned.shape} must have the same shape")
  k = base.shape[1]
  headings = [("base", 0, k), ("tuned", k, k)]
  _save(_compose(np.concatenate([base, tuned], 1), prompts, headings, _MARGIN, k), path)


def _tiles(images, scale):
  """`[P,K,H,W,3]` uint8, enlarged."""
  images = np.asarray(images)
  if images.ndim != 5 or images.shape[-1] != 3 or 0 in images.shape:
    raise ValueError(f"images must be [P,K,H,W,3], not {images.shape}")
  if images.dtype != np.uint8:
    images = np.nan_to_num(images.astype(np.float32))  # a broken image is black, not a crash
    images = (images.clip(0, 1) * 255).round().astype(np.uint8)
  if scale is None:
    scale = max(1, round(_TILE / images.shape[2]))
  return images.repeat(scale, 2).repeat(scale, 3)


def _compose(tiles, row_labels, headings, block_gap, per_block):
  """Puts tiles `[P,N,H,W,3]` on a page, in blocks of `per_block` columns.

  Args:
    headings: `(text, first column, number of columns)`, each centred above its columns.
    block_gap: px between blocks.
  """
  rows, columns, height, width, _ = tiles.shape
  if row_labels is not None and len(row_labels) != rows:
    raise ValueError(f"{len(row_labels)} labels for {rows} rows")
  font, heading_font = ImageFont.load_default(_TEXT), ImageFont.load_default(_HEADING)
  line = round(1.3 * _TEXT)

  left = _MARGIN + (_LABEL_WIDTH + _MARGIN // 2 if row_labels is not None else 0)
  top = _MARGIN + (_HEADING + _GAP if headings else 0)
  x = [left + c * (width + _GAP) + c // per_block * (block_gap - _GAP) for c in range(columns)]
  labels = [_wrap(text, font, _LABEL_WIDTH) for text in row_labels or [""] * rows]
  pitch = max(height, line * max(map(len, labels))) + _GAP
  page = Image.new("RGB", (x[-1] + width + _MARGIN, top + rows * pitch - _GAP + _MARGIN), _PAGE)
  draw = ImageDraw.Draw(page)

  for text, first, count in headings:
    middle = (x[first] + x[first + count - 1] + width) / 2
    draw.text((middle, top - 1.5 * _GAP), text, _INK, heading_font, anchor="ms")
  for row in range(rows):
    y = top + row * pitch
    for n, text in enumerate(labels[row]):
      middle = y + height / 2 + line * (n - (len(labels[row]) - 1) / 2)
      draw.text((_MARGIN, middle), text, _INK, font, anchor="lm")
    for column in range(columns):
      page.paste(Image.fromarray(tiles[row, column]), (x[column], y))
  return page


def _wrap(text, font, width):
  """Lines of `text` that fit in `width` px; a word that does not fit is broken."""
  lines = [""]
  for word in text.split():
    if lines[-1] and font.getlength(f"{lines[-1]} {word}") > width:
      lines.append("")
    lines[-1] = f"{lines[-1]} {word}".strip()
    while font.getlength(lines[-1]) > width and len(lines[-1]) > 1:
      cut = next(n for n in range(len(lines[-1]) - 1, 0, -1)
                 if n == 1 or font.getlength(lines[-1][:n]) <= width)
      lines[-1:] = [lines[-1][:cut], lines[-1][cut:]]
  return lines


def _save(page, path):
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  with whole(path) as file:
    page.save(file, format="PNG")
