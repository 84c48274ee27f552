"""The emoji drawings behind the embedded model, and the captions made from them.

`python -m jaxalign.emoji.drawings --output=DIR` fetches two npm packages (with `npm pack`; or reads
tarballs given by `--google` and `--twitter`), checks them against known checksums, and writes
`DIR/emoji.npz`: every emoji that both Noto Emoji and Twemoji drew, about 1,900 names.
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
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from jaxalign.config.command import exit_status
from jaxalign.errors import UserError

VERSION = "16.0.0"
# Style word in captions -> vendor in the packages; also the order of `Drawings.rgba`'s first axis.
VENDORS = {"noto": "google", "twemoji": "twitter"}
STYLES = tuple(VENDORS)
SHA256 = {
    "google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
}
# What the embedded model is trained on: 544 names that one drawing can show.
CORE_CATEGORIES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Activities")
PALETTE = {  # sRGB, 0..255
    "white": (255, 255, 255), "black": (20, 20, 20), "red": (214, 48, 49), "green": (0, 148, 80),
    "blue": (9, 100, 227), "yellow": (253, 213, 70), "purple": (130, 80, 190),
    "orange": (240, 130, 40), "pink": (250, 170, 200), "gray": (140, 140, 140),
    "cyan": (90, 210, 220), "brown": (120, 80, 50),
}
COLOURS = tuple(PALETTE)
RGB = np.array(list(PALETTE.values()), np.float32) / 255      # [12, 3] in [0, 1]
NO_STYLE = len(STYLES)     # last column of the table of captions; those before name a style


class Drawings(NamedTuple):
  """rgba `[2, N, S, S, 4]` uint8 (first axis as `STYLES`), names and categories `[N]` str."""
  rgba: np.ndarray
  names: np.ndarray
  categories: np.ndarray

  def of(self, categories) -> "Drawings":
    """Those of the given categories."""
    keep = np.isin(self.categories, list(categories))
    return Drawings(self.rgba[:, keep], self.names[keep], self.categories[keep])


def colour_rgb(colour: str) -> np.ndarray:
  """`[3]` f32 in [0, 1] of a palette colour."""
  return RGB[COLOURS.index(colour)]


def clean_name(name: str) -> str:
  """Lower case; runs of anything but a-z and 0-9 become one space."""
  return re.sub("[^a-z0-9]+", " ", name.lower()).strip()


def caption(name: str, colour: str, style: str | None = None) -> str:
  """'a cat on a red background', with ' noto style' or ' twemoji style' where `style` is given."""
  return f"a {name} on a {colour} background" + (f" {style} style" if style else "")


def caption_tokens(drawings: Drawings, tokenizer) -> np.ndarray:
  """`[N, 12, 3, L]` int32 token ids of all captions: name, colour, style (or `NO_STYLE`)."""
  captions = [caption(name, colour, style) for name in drawings.names
              for colour in COLOURS for style in (*STYLES, None)]
  return tokenizer(captions).reshape(len(drawings.names), len(COLOURS), NO_STYLE + 1, -1)


def held_out(name: str, colour: str) -> bool:
  """Whether the pair (one in ten) is kept out of all training, for prompts to compose."""
  return zlib.crc32((name + colour).encode()) % 10 == 0


def composite(rgba, colour):
  """Drawings on plain backgrounds.

  Args:
    rgba: `[..., H, W, 4]` float in [0, 1], numpy or jax, colours not premultiplied by alpha.
    colour: `[..., 3]` float in [0, 1].
  Returns:
    `[..., H, W, 3]` in [0, 1].
  """
  alpha = rgba[..., 3:]
  return rgba[..., :3] * alpha + colour[..., None, None, :] * (1 - alpha)


def load_drawings(path) -> Drawings:
  """Drawings from the file that this module's command writes."""
  try:
    with np.load(path) as file:
      return Drawings(*(file[field] for field in Drawings._fields))
  except (OSError, KeyError, ValueError) as error:
    raise UserError(f"{path}: not a file of drawings; make one with "
                    "`python -m jaxalign.emoji.drawings --output=DIR`") from error


def read_tarballs(tarballs: dict[str, pathlib.Path], size: int, checksums=SHA256) -> Drawings:
  """Drawings out of the two npm tarballs (by vendor), scaled to `size` pixels (64 at most)."""
  images = {}
  for vendor, path in tarballs.items():
    try:
      content = path.read_bytes()
    except OSError as error:
      raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != checksums[vendor]:
      raise UserError(f"{path}: is not emoji-datasource-{vendor} {VERSION} (checksum differs)")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
      wanted = f"package/img/{vendor}/64/"
      images[vendor] = {member.name.removeprefix(wanted): tar.extractfile(member).read()
                        for member in tar
                        if member.isfile() and member.name.startswith(wanted)}
      entries = json.load(tar.extractfile("package/emoji.json"))

  entries = [e for e in entries if all(e["image"] in images[v] for v in VENDORS.values())]

  def draw(vendor, entry):
    with Image.open(io.BytesIO(images[vendor][entry["image"]])) as image:
      # Pillow scales RGBA with premultiplied alpha, so no dark fringe appears.
      return np.asarray(image.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS))

  return Drawings(
      np.stack([[draw(vendor, e) for e in entries] for vendor in VENDORS.values()]),
      np.array([clean_name(e["name"]) for e in entries]),
      np.array([e["category"] for e in entries]))


def fetch(vendor: str, folder) -> pathlib.Path:
  """Downloads one vendor's npm package into `folder`."""
  package = f"emoji-datasource-{vendor}@{VERSION}"
  try:
    subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True,
                   stdout=subprocess.DEVNULL)
  except (OSError, subprocess.CalledProcessError) as error:
    raise UserError(f"--{vendor}: `npm pack {package}` failed ({error}); download the tarball and "
                    "name it with this flag") from error
  return pathlib.Path(folder) / f"emoji-datasource-{vendor}-{VERSION}.tgz"


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--output", required=True, type=pathlib.Path, help="folder for emoji.npz")
  parser.add_argument("--size", type=int, default=32, help="pixels per side, 64 at most")
  for vendor in VENDORS.values():
    parser.add_argument(f"--{vendor}", type=pathlib.Path,
                        help=f"tarball of emoji-datasource-{vendor} {VERSION}")
  args = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as folder:
    drawings = read_tarballs(
        {v: getattr(args, v) or fetch(v, folder) for v in VENDORS.values()}, args.size)
  args.output.mkdir(parents=True, exist_ok=True)
  file = args.output / "emoji.npz"
  np.savez_compressed(file, **drawings._asdict())
  print(f"{file}: {len(drawings.names)} names, {len(STYLES)} drawings each, {args.size} pixels")


if __name__ == "__main__":
  sys.exit(exit_status(main))
