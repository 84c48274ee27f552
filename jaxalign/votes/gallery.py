"""The pictures that are voted on: read from folders of `jaxalign.sample`, paired, kept by digest.

A votes folder needs nothing else afterwards: `pictures/DIGEST.png` holds every picture, and
`ballot.json` says what it shows and which pairs there are.
"""
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib

import numpy as np
from PIL import Image

from jaxalign.errors import UserError
from jaxalign.storage.files import whole

_LOOK = 16                 # px of the small copies by which pictures are compared


@dataclasses.dataclass(frozen=True)
class Picture:
  """One picture: `digest` is the SHA-256 of its file, in hex; `seed` that of its noise, if told."""
  digest: str
  prompt: int
  model: int
  seed: int | None


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two pictures of one prompt, as indices; `difference` in [0, 1] is how unlike they look."""
  a: int
  b: int
  difference: float


@dataclasses.dataclass(frozen=True)
class Gallery:
  """What is voted on.

  Attributes:
    models: names, as given on the command line; voters never see them.
    prompts: texts. pictures: all of them. pairs: every pair that may be asked, grouped by prompt.
    identical: pairs left out because their pictures are the same file.
  """
  models: tuple[str, ...]
  prompts: tuple[str, ...]
  pictures: tuple[Picture, ...]
  pairs: tuple[Pair, ...]
  identical: int

  def prompt_of(self, pair: int) -> int:
    return self.pictures[self.pairs[pair].a].prompt

  def save(self, folder: pathlib.Path) -> None:
    with whole(folder / "ballot.json") as file:
      file.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

  @classmethod
  def load(cls, folder: pathlib.Path) -> "Gallery | None":
    """The gallery of a votes folder; None if there is none.

    Raises:
      UserError: the file is damaged, or a picture is missing.
    """
    file = folder / "ballot.json"
    if not file.exists():
      return None
    try:
      saved = json.loads(file.read_text(encoding="utf-8"))
      gallery = cls(tuple(saved["models"]), tuple(saved["prompts"]),
                    tuple(Picture(**p) for p in saved["pictures"]),
                    tuple(Pair(**p) for p in saved["pairs"]), saved["identical"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
      raise UserError(f"{file}: not the ballot of a votes folder ({error})") from error
    for picture in gallery.pictures:
      if not picture_file(folder, picture.digest).is_file():
        raise UserError(f"{picture_file(folder, picture.digest)}: a picture of the ballot is gone")
    return gallery


def picture_file(folder: pathlib.Path, digest: str) -> pathlib.Path:
  return folder / "pictures" / f"{digest}.png"


def read_pixels(file: pathlib.Path) -> np.ndarray:
  """`[H, W, 3]` uint8."""
  try:
    with Image.open(file, formats=("PNG",)) as image:
      return np.asarray(image.convert("RGB"))
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise UserError(f"{file}: not a PNG picture that can be read ({error})") from error


def is_samples(folder: pathlib.Path) -> bool:
  return (folder / "samples.jsonl").is_file()


def open_gallery(names: list[str], folders: list[pathlib.Path], output: pathlib.Path) -> Gallery:
  """Pairs the pictures of `folders` and puts them, and the ballot, into `output`.

  One folder: every two pictures of a prompt. Several: the i-th pictures of a prompt of every two
  folders; those of the same seed have the same noise, so that only the models differ.

  Args:
    names: of the models, one a folder.
  Raises:
    UserError: a folder is not one of `jaxalign.sample`, a picture is damaged, no pair can be made,
      or `output` holds votes on other pictures.
  """
  rows = [_read_samples(folder) for folder in folders]
  prompts = [p for p in rows[0] if all(p in other for other in rows[1:])]
  if not prompts:
    raise UserError(f"{folders[1]}: shares no prompt with {folders[0]}; draw both from one file")
  (output / "pictures").mkdir(parents=True, exist_ok=True)
  pictures, looks, index = [], [], {}
  for model, of_model in enumerate(rows):
    for p, prompt in enumerate(prompts):
      for i, (file, seed) in enumerate(of_model[prompt]):
        digest, look = _take(file, output)
        index[model, p, i] = len(pictures)
        pictures.append(Picture(digest, p, model, seed))
        looks.append(look)
  pairs, identical = [], 0
  for p, prompt in enumerate(prompts):
    counts = [len(of_model[prompt]) for of_model in rows]
    if len(folders) == 1:
      found = [((0, p, i), (0, p, j)) for i, j in itertools.combinations(range(counts[0]), 2)]
    else:
      found = [((m, p, i), (k, p, i)) for i in range(min(counts))
               for m, k in itertools.combinations(range(len(folders)), 2)]
    for first, second in found:
      a, b = index[first], index[second]
      if pictures[a].digest == pictures[b].digest:
        identical += 1
      else:
        difference = float(np.sqrt(np.mean((looks[a] - looks[b]) ** 2)))
        pairs.append(Pair(a, b, round(difference, 6)))
  if not pairs:
    raise UserError(f"{folders[-1]}: no two different pictures of one prompt to choose between")
  gallery = Gallery(tuple(names), tuple(prompts), tuple(pictures), tuple(pairs), identical)
  saved = Gallery.load(output)
  if saved is None:
    gallery.save(output)
  elif saved != gallery:
    raise UserError(f"{output / 'ballot.json'}: the votes there are on other pictures; name "
                    "another --output")
  return gallery


def _read_samples(folder: pathlib.Path) -> dict[str, list]:
  """`prompt -> [(file, seed), ..]` of a folder of `jaxalign.sample`, in its order."""
  file = folder / "samples.jsonl"
  try:
    lines = file.read_text(encoding="utf-8").split("\n")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{file}: cannot be read ({error}); name a folder of jaxalign.sample"
                    ) from error
  rows = {}
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      name, prompt, seed = row["file"], row["prompt"], row.get("seed")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
      raise UserError(f"{file}: line {number} is not of jaxalign.sample ({error})") from error
    if not isinstance(name, str) or pathlib.PurePath(name).name != name or name.startswith("."):
      raise UserError(f"{file}: line {number}: file={name!r} is not a name in that folder")
    if not isinstance(prompt, str) or not isinstance(seed, int | None):
      raise UserError(f"{file}: line {number}: prompt or seed is of the wrong type")
    rows.setdefault(prompt, []).append((folder / name, seed))
  if not rows:
    raise UserError(f"{file}: lists no pictures")
  return rows


def _take(file: pathlib.Path, output: pathlib.Path) -> tuple[str, np.ndarray]:
  """Puts a picture into `output`; returns its digest and a small copy `[s,s,3]` in [0, 1]."""
  try:
    content = file.read_bytes()
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
      small = image.convert("RGB").resize((_LOOK, _LOOK), Image.Resampling.BOX)
  # Pillow raises SyntaxError and ValueError on damaged PNG files.
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise UserError(f"{file}: not a PNG picture that can be read ({error})") from error
  digest = hashlib.sha256(content).hexdigest()
  kept = picture_file(output, digest)
  if not kept.exists():
    with whole(kept) as partial:
      partial.unlink(missing_ok=True)
      try:
        os.link(file, partial)               # no second copy on the same disk
      except OSError:
        partial.write_bytes(content)
  return digest, np.asarray(small, np.float32) / 255
