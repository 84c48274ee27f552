"""Preference pairs: two images of a caption, and which of them was preferred.

`open_pairs` reads three forms, told apart by the name:

  *.parquet, or a folder of them   the columns of Pick-a-Pic v2: `caption`, `jpg_0`, `jpg_1` (bytes
                                   of an image file), `label_0`, `label_1`; others are ignored
  *.jsonl                          one object a line: `caption`, `image_0`, `image_1` (files, beside
                                   the JSONL or absolute), `label_0` and, if given, `label_1`
  a folder                         images `winner/NAME.EXT` and `loser/NAME.EXT`, and the caption in
                                   `winner/NAME.txt`

`label_0` is 1 where image 0 was preferred, 0 where image 1 was, and 0.5 in a tie; `label_1` is the
rest to 1. Captions and labels are checked at once, images when they are read.
"""
import bisect
import dataclasses
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image

from jaxalign.config import places
from jaxalign.data.parquet import readable
from jaxalign.data.pictures import read_picture
from jaxalign.data.text import read_lines
from jaxalign.errors import UserError

ASSETS = places.ASSETS / "pairs"
CHECKED = 1000          # pairs whose images `Pairs.digest` reads
COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
  """N pairs; captions and labels in memory, images read one pair at a time.

  Attributes:
    captions: N strings. labels: `[N]` f32, 1, 0 or 0.5 as the source's `label_0`.
    load: `(row) -> (image 0, image 1)`, each the bytes of an image file or its path. Called from
      threads.
    place: `(row) -> str`, how messages call a row.
    rows: `[N]` int, the rows of the source that these pairs are.
  """
  captions: list[str]
  labels: np.ndarray
  load: Callable
  place: Callable[[int], str]
  rows: np.ndarray

  def __len__(self) -> int:
    return len(self.rows)

  def images(self, i: int, height: int, width: int) -> dict[str, np.ndarray]:
    """Pair `i`, the preferred image first.

    Returns:
      `pixels [2, height, width, 3]` uint8, and `origin [2, 4]` int32, which SDXL is told: height
      and width of the file, top and left of the crop in the scaled image, in pixels.
    Raises:
      UserError: an image cannot be read; names the row.
    """
    row = int(self.rows[i])
    pair = [read_picture(content, f"{self.place(row)}: image {k}", height, width)
            for k, content in enumerate(self.load(row))]
    pixels, origin = zip(*(pair if self.labels[i] >= 0.5 else pair[::-1]))
    return {"pixels": np.stack(pixels), "origin": np.asarray(origin, np.int32)}

  def fingerprint(self, i: int) -> bytes:
    """Of pair `i` all that matters: caption, label, checksums of both images.

    Raises:
      UserError: an image cannot be read; names the row.
    """
    parts = [repr((self.captions[i], float(self.labels[i]))).encode()]
    row = int(self.rows[i])
    for k, content in enumerate(self.load(row)):
      try:
        data = content.read_bytes() if isinstance(content, pathlib.Path) else content
      except OSError as error:
        raise UserError(f"{self.place(row)}: image {k}: {error.strerror or error}") from error
      data = data if isinstance(data, bytes) else repr(data).encode()
      parts.append(hashlib.sha256(data).digest())
    return b"".join(parts)

  def digest(self) -> str:
    """Tells whether these are the pairs of before: by all captions and labels, and by the images of
    the first `CHECKED` pairs, since reading those of millions takes hours."""
    digest = hashlib.sha256(repr((self.captions, self.labels.tolist())).encode())
    for i in range(min(CHECKED, len(self))):
      digest.update(self.fingerprint(i))
    return digest.hexdigest()

  def without_ties(self) -> "Pairs":
    return self._of(np.flatnonzero(self.labels != 0.5))

  def without(self, captions: Iterable[str]) -> "Pairs":
    """The pairs of other captions than these."""
    captions = set(captions)
    return self._of(np.flatnonzero([caption not in captions for caption in self.captions]))

  def _of(self, keep: np.ndarray) -> "Pairs":
    return dataclasses.replace(self, captions=[self.captions[i] for i in keep],
                               labels=self.labels[keep], rows=self.rows[keep])


def open_pairs(path: str, ties: str) -> Pairs:
  """The pairs of the config key `data.pairs`, ties included if `ties` is "soft".

  Raises:
    UserError: names the file, the row and the field at fault.
  """
  if not path:
    raise UserError("data.pairs is empty: this method trains on preference pairs; name a Parquet "
                    "file, a JSONL file or a folder of them")
  if path == "jaxalign:fixture":
    from jaxalign.testing.fixture import make_pairs
    pairs = from_rows(make_pairs(), lambda row: f"jaxalign:fixture: row {row + 1}")
  else:
    shipped = path.removeprefix("jaxalign:")
    file = ASSETS / f"{shipped}.parquet" if shipped != path else pathlib.Path(path)
    if not file.exists():
      raise UserError(f"data.pairs={path}: no such file or folder")
    pairs = _open(file)
  pairs = pairs.without_ties() if ties == "drop" else pairs
  if not len(pairs):
    raise UserError(f"data.pairs={path}: no pair" + (" but ties" if ties == "drop" else ""))
  return pairs


def _open(file: pathlib.Path) -> Pairs:
  if file.suffix == ".parquet":
    return _open_parquet([file])
  if file.suffix == ".jsonl":
    return _open_jsonl(file)
  if (file / "winner").is_dir() or (file / "loser").is_dir():
    return _open_folder(file)
  shards = sorted(file.glob("*.parquet"))
  if not shards:
    raise UserError(f"data.pairs={file}: neither *.parquet, nor *.jsonl, nor a folder with "
                    "*.parquet or with winner/ and loser/")
  return _open_parquet(shards)


def from_rows(rows: list[dict], place: Callable[[int], str]) -> Pairs:
  """Pairs of dicts `caption`, `image_0`, `image_1`, `label_0` and perhaps `label_1`, checked."""
  for i, row in enumerate(rows):
    for key in ("caption", "image_0", "image_1", "label_0"):
      if key not in row:
        raise UserError(f"{place(i)}: {key} is missing")
    _check_row(place(i), row["caption"], row["label_0"], row.get("label_1"))
  return Pairs([row["caption"] for row in rows],
               np.asarray([row["label_0"] for row in rows], np.float32),
               lambda i: (rows[i]["image_0"], rows[i]["image_1"]), place, np.arange(len(rows)))


def _check_row(place: str, caption, label_0, label_1) -> None:
  if not isinstance(caption, str) or not caption.strip():
    raise UserError(f"{place}: caption={caption!r} is not a text")
  if isinstance(label_0, bool) or label_0 not in (0, 0.5, 1):
    raise UserError(f"{place}: label_0={label_0!r} is not 1 (image 0 preferred), 0 (image 1) or "
                    "0.5 (tie)")
  if label_1 is not None and label_1 != 1 - label_0:
    raise UserError(f"{place}: label_1={label_1!r}, but label_0={label_0!r}: they add up to 1")


def _open_parquet(files: list[pathlib.Path]) -> Pairs:
  """Captions and labels of all files; image bytes by row group, when asked for."""
  import pyarrow.parquet as pq
  tables, total = [], 0
  names, groups = [], []                   # (first row, path), (first row, file, row group)
  for path in files:
    with readable(path):
      file = pq.ParquetFile(path)
      missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
      if missing:
        raise UserError(f"{path}: column {missing[0]} is missing; there are "
                        f"{', '.join(file.schema_arrow.names)}")
      tables.append(file.read(columns=["caption", "label_0", "label_1"]).to_pydict())
    names.append((total, path))
    for group in range(file.num_row_groups):
      groups.append((total, file, group))
      total += file.metadata.row_group(group).num_rows

  def place(row):
    first, path = names[bisect.bisect(names, row, key=lambda n: n[0]) - 1]
    return f"{path}: row {row - first + 1}"

  columns = {name: [v for table in tables for v in table[name]]
             for name in ("caption", "label_0", "label_1")}
  for row, values in enumerate(zip(*columns.values())):
    _check_row(place(row), *values)
  lock, cache = threading.Lock(), {}

  def load(row):
    first, file, group = groups[bisect.bisect(groups, row, key=lambda g: g[0]) - 1]
    with lock:                         # one row group is in memory at a time
      if first not in cache:
        cache.clear()
        with readable(place(row)):
          cache[first] = file.read_row_group(group, columns=["jpg_0", "jpg_1"])
      table = cache[first]
    return tuple(table[name][row - first].as_py() for name in ("jpg_0", "jpg_1"))

  return Pairs(columns["caption"], np.asarray(columns["label_0"], np.float32), load, place,
               np.arange(total))


def _open_jsonl(file: pathlib.Path) -> Pairs:
  rows, numbers = [], []
  for number, line in enumerate(read_lines(file, str(file)), 1):
    if not line.strip():
      continue
    here = f"{file}: row {number}"
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise UserError(f"{here}: not JSON ({error})") from error
    if not isinstance(row, dict):
      raise UserError(f"{here}: {type(row).__name__} is not an object with caption, image_0, "
                      "image_1 and label_0")
    for key in ("image_0", "image_1"):
      if key in row:
        if not isinstance(row[key], str) or not os.path.isfile(file.parent / row[key]):
          raise UserError(f"{here}: {key}={row[key]!r}: no such file beside {file.name}")
        row[key] = file.parent / row[key]
    rows.append(row)
    numbers.append(number)
  return from_rows(rows, lambda i: f"{file}: row {numbers[i]}")


def _open_folder(folder: pathlib.Path) -> Pairs:
  pictures = Image.registered_extensions()
  files = {side: {p.name: p for p in sorted((folder / side).glob("*"))
                  if p.suffix.lower() in pictures} for side in ("winner", "loser")}
  rows = []
  for name in sorted(files["winner"].keys() | files["loser"].keys()):
    for side, found in files.items():
      if name not in found:
        raise UserError(f"{folder / side / name}: missing; each image of a pair needs the other")
    text = files["winner"][name].with_suffix(".txt")
    try:
      caption = text.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f"{text}: the caption of {name} cannot be read ({error})") from error
    rows.append({"caption": caption, "image_0": files["winner"][name],
                 "image_1": files["loser"][name], "label_0": 1})
  return from_rows(rows, lambda i: f"{folder}: row {i + 1} ({rows[i]['image_0'].name})")
