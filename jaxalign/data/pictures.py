"""Pictures as people have them -> RGB arrays of one size."""
import io
import pathlib
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxalign.errors import UserError

BACKDROP = (255, 255, 255)       # what shows through transparent pixels, as on a white page
MOST_PIXELS = 80_000_000         # 240 MB as RGB; files of a few kB can say that they have more


def read_picture(content, place: str, height: int, width: int):
  """RGB `[height, width, 3]` uint8: the middle of the picture, scaled (bilinear) to cover that.

  The picture stands as its EXIF orientation says, transparent pixels show `BACKDROP`, 16-bit and
  float greys are brought to 8 bits. It is cut before it is scaled, so that a strip of any shape
  costs no more than its file.

  Args:
    content: the bytes of an image file, or its path. place: names it in messages.
  Returns:
    The pixels, and where they come from: `(height, width)` of the upright picture, and top and left
    of the cut in the scaled one.
  Raises:
    UserError: no image, a damaged one, or one of more than `MOST_PIXELS`.
  """
  if not isinstance(content, (bytes, pathlib.Path)):
    raise UserError(f"{place}: {type(content).__name__} is not the bytes of an image file")
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")                  # metadata that Pillow skips
      warnings.simplefilter("error", Image.DecompressionBombWarning)
      with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as file:
        if file.width * file.height > MOST_PIXELS:
          raise UserError(f"{place}: has {file.width} x {file.height} pixels, above the "
                          f"{MOST_PIXELS:,} that are read; scale it down")
        image = _rgb(ImageOps.exif_transpose(file), place)
  # Pillow raises kinds of all sorts on damaged files.
  except (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, OverflowError,
          EOFError, MemoryError, RuntimeError, UnidentifiedImageError,
          Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise UserError(f"{place}: cannot be read ({reason})") from error
  original = image.height, image.width
  scale = max(width / image.width, height / image.height)
  scaled = max(width, round(image.width * scale)), max(height, round(image.height * scale))
  left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
  across, down = image.width / scaled[0], image.height / scaled[1]
  box = (left * across, top * down, min((left + width) * across, image.width),
         min((top + height) * down, image.height))
  # Cut to whole pixels first: Pillow scales one axis of the whole height at a time.
  margin = 2 * max(across, down, 1.0) + 1
  outer = (max(int(box[0] - margin), 0), max(int(box[1] - margin), 0),
           min(int(box[2] + margin) + 1, image.width), min(int(box[3] + margin) + 1, image.height))
  image, box = image.crop(outer), [b - outer[i % 2] for i, b in enumerate(box)]
  pixels = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
  return np.asarray(pixels), (*original, top, left)


def _rgb(image: Image.Image, place: str) -> Image.Image:
  """The same in RGB."""
  if image.mode in ("F", "I", "I;16", "I;16L", "I;16B", "I;16N"):
    return _from_deep(np.asarray(image), place)
  if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
    image = image.convert("RGBA")
    backdrop = Image.new("RGBA", image.size, (*BACKDROP, 255))
    image = Image.alpha_composite(backdrop, image)
  return image.convert("RGB")


def _from_deep(grey: np.ndarray, place: str) -> Image.Image:
  """Greys of 16 bits, of 32-bit integers or floats, as RGB."""
  low, high = float(grey.min()), float(grey.max())
  if grey.dtype.kind == "f":
    most = 1.0
  else:
    most = 65535.0 if grey.dtype.itemsize == 2 or high > 255 else 255.0
  if not (0 <= low and high <= most):           # also where one is not a number
    raise UserError(f"{place}: grey values from {low:g} to {high:g}, but what is read is 0 "
                    f"to {most:g}; convert it to 8 bits")
  eight = np.round(grey.astype(np.float64) * (255 / most)).astype(np.uint8)
  return Image.fromarray(eight).convert("RGB")
