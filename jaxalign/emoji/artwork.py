"""Drawings of the embedded world: what three artists made of the same emoji.

`python -m jaxalign.emoji.artwork --output=DIR` fetches three npm packages (with `npm pack`; or
reads tarballs given by flags), checks them against known checksums, and writes `DIR/artwork.npz`:
every emoji that Noto, Twemoji and Fluent 3D drew, people, flags and signs left out.
"""
import argparse
import hashlib
import io
import json
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
from typing import NamedTuple

import numpy as np
from PIL import Image

from jaxalign.config.command import exit_status
from jaxalign.errors import UserError

LARGE, SMALL = 60, 28      # pixels: alone on a picture of 64, and in a quarter of it; margin of 2
LEFT_OUT = ("Flags", "People & Body", "Symbols", "Component")


class Package(NamedTuple):
  """One npm package: its name and version, checksum of its tarball, folder of its pictures."""
  name: str
  version: str
  sha256: str
  folder: str

  @property
  def spec(self) -> str:
    return f"{self.name}@{self.version}"


# Style word in captions -> package; also the order of the first axis of `Artwork`'s drawings.
PACKAGES = {
    "noto": Package(
        "emoji-datasource-google", "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "package/img/google/64/"),
    "twemoji": Package(
        "emoji-datasource-twitter", "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "package/img/twitter/64/"),
    "3d": Package(
        "@lobehub/fluent-emoji-3d", "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "package/assets/"),
}
STYLES = tuple(PACKAGES)


class Artwork(NamedTuple):
  """Drawings with alpha, colours not premultiplied.

  Attributes:
    large, small: `[3, N, 60, 60, 4]` and `[3, N, 28, 28, 4]` uint8, first axis as `STYLES`.
    codes: `[N]` str, code points in lower case joined by "-", without the variation selector.
    names, categories: `[N]` str, the packages' own.
  """
  large: np.ndarray
  small: np.ndarray
  codes: np.ndarray
  names: np.ndarray
  categories: np.ndarray

  def take(self, rows) -> "Artwork":
    """The drawings of the given rows, in that order."""
    return Artwork(self.large[:, rows], self.small[:, rows], self.codes[rows], self.names[rows],
                   self.categories[rows])

  def of(self, codes) -> "Artwork":
    """The drawings of the given code points, in that order; UserError names one that is absent."""
    row = {code: i for i, code in enumerate(self.codes)}
    for code in codes:
      if code not in row:
        raise UserError(f"data.artwork: it has no drawing of {code}; make it anew with "
                        "`python -m jaxalign.emoji.artwork --output=DIR`")
    return self.take([row[code] for code in codes])


def plain_code(code: str) -> str:
  """'2764-FE0F' -> '2764': lower case, no variation selector, which packages set differently."""
  return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def load(path) -> Artwork:
  """Drawings from the file that this module's command writes."""
  try:
    with np.load(path) as file:
      return Artwork(*(file[field] for field in Artwork._fields))
  except (OSError, KeyError, ValueError) as error:
    raise UserError(f"data.artwork={path}: not a file of drawings; make one with "
                    "`python -m jaxalign.emoji.artwork --output=DIR`") from error


def _contents(package: Package, path: pathlib.Path) -> tuple[dict[str, bytes], list[dict]]:
  """Pictures of a tarball by code point, and its list of emoji (empty where it has none)."""
  try:
    content = path.read_bytes()
  except OSError as error:
    raise UserError(f"{path}: cannot be read: {error.strerror}") from error
  if hashlib.sha256(content).hexdigest() != package.sha256:
    raise UserError(f"{path}: is not {package.spec} (checksum differs)")
  pictures, entries = {}, []
  with tarfile.open(fileobj=io.BytesIO(content)) as tar:
    for member in tar:
      if member.isfile() and member.name.startswith(package.folder):
        code = plain_code(pathlib.PurePosixPath(member.name).stem)
        pictures[code] = tar.extractfile(member).read()
      elif member.name == "package/emoji.json":
        entries = json.load(tar.extractfile(member))
  return pictures, entries


def read_tarballs(paths: dict[str, pathlib.Path], packages=None) -> Artwork:
  """What all packages drew, out of their tarballs (by style)."""
  packages = packages or PACKAGES
  pictures, entries = {}, []
  for style, package in packages.items():
    pictures[style], listed = _contents(package, paths[style])
    entries = entries or listed
  codes = {plain_code(entry["unified"]): entry for entry in entries
           if entry["category"] not in LEFT_OUT}
  codes = {code: entry for code, entry in codes.items()
           if all(code in pictures[style] for style in packages)}

  def draw(style, code, size):
    with Image.open(io.BytesIO(pictures[style][code])) as image:
      # Pillow scales RGBA with premultiplied alpha, so no dark fringe appears.
      return np.asarray(image.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS))

  drawings = [np.stack([[draw(style, code, size) for code in codes] for style in packages])
              for size in (LARGE, SMALL)]
  words = lambda name: re.sub("[^a-z0-9]+", " ", name.lower()).strip()
  return Artwork(*drawings, np.array(list(codes)),
                 np.array([words(entry["short_name"]) for entry in codes.values()]),
                 np.array([entry["category"] for entry in codes.values()]))


def fetch(style: str, folder) -> pathlib.Path:
  """Downloads one style's npm package into `folder`."""
  package = PACKAGES[style]
  try:
    name = subprocess.run(["npm", "pack", "--silent", package.spec], cwd=folder, check=True,
                          stdout=subprocess.PIPE, text=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError) as error:
    raise UserError(f"--{style}: `npm pack {package.spec}` failed ({error}); download the tarball "
                    "and name it with this flag") from error
  return pathlib.Path(folder) / name


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--output", required=True, type=pathlib.Path, help="folder for artwork.npz")
  for style, package in PACKAGES.items():
    parser.add_argument(f"--{style}", type=pathlib.Path, dest=style,
                        help=f"tarball of {package.spec}")
  args = vars(parser.parse_args(argv))
  with tempfile.TemporaryDirectory() as folder:
    artwork = read_tarballs({style: args[style] or fetch(style, folder) for style in STYLES})
  args["output"].mkdir(parents=True, exist_ok=True)
  file = args["output"] / "artwork.npz"
  np.savez_compressed(file, **artwork._asdict())
  print(f"{file}: {len(artwork.names)} names in {len(STYLES)} styles")


if __name__ == "__main__":
  sys.exit(exit_status(main))
