"""Pictures of all sorts: what they look like once read, and what is said of damaged ones."""
import io
import resource

import numpy as np
import pytest
from PIL import Image

from jaxalign.data import pictures
from jaxalign.data.pictures import read_picture
from jaxalign.errors import UserError

RED, BLUE = (200, 0, 0), (0, 0, 200)


def encoded(image, kind="png", **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def read(content, height=8, width=8):
  return read_picture(content, "row 1: image 0", height, width)


def halves(size=(16, 16), left=RED, right=BLUE, mode="RGB"):
  image = Image.new(mode, size, right)
  image.paste(left, (0, 0, size[0] // 2, size[1]))
  return image


@pytest.mark.parametrize("size", [(16, 16), (40, 16), (16, 40), (33, 17), (5, 9), (1000, 700)])
def test_scaled_to_cover_and_the_middle_cut_out(size):
  """As scaling the whole picture and cutting then."""
  noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
  pixels, origin = read(encoded(Image.fromarray(noise)), 12, 16)
  scale = max(16 / size[0], 12 / size[1])
  scaled = max(16, round(size[0] * scale)), max(12, round(size[1] * scale))
  left, top = (scaled[0] - 16) // 2, (scaled[1] - 12) // 2
  whole = Image.fromarray(noise).resize(scaled, Image.Resampling.BILINEAR)
  wanted = np.asarray(whole.crop((left, top, left + 16, top + 12))).astype(int)
  assert pixels.shape == (12, 16, 3) and np.abs(pixels.astype(int) - wanted).max() <= 1
  assert origin == (size[1], size[0], top, left)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_strip_costs_no_more_than_its_file(size):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  pixels, _ = read(encoded(Image.new("RGB", size, RED)), 512, 512)
  assert (pixels == RED).all()
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024      # kB


def test_exif_orientation():
  exif = Image.Exif()
  exif[0x0112] = 6                                   # to be turned a quarter to the right
  pixels, origin = read(encoded(halves((16, 8)), "jpeg", exif=exif, quality=95), 16, 8)
  assert origin[:2] == (16, 8)
  assert pixels[2, 4, 0] > 150 and pixels[-3, 4, 2] > 150        # red on top, blue below


@pytest.mark.parametrize("image", [
    halves(mode="RGBA", left=(*RED, 255), right=(0, 0, 0, 0)),
    halves(mode="RGBA", left=(*RED, 255), right=(0, 0, 0, 0)).quantize(4),
])
def test_transparent_pixels_show_the_backdrop(image):
  pixels, _ = read(encoded(image))
  assert tuple(pixels[4, 1]) == RED and tuple(pixels[4, -2]) == pictures.BACKDROP


def test_grey_with_alpha_and_palette_with_a_transparent_colour():
  image = Image.new("LA", (16, 16), (90, 0))
  assert (read(encoded(image))[0] == 255).all()
  image = halves().convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
  blue = image.getpixel((12, 4))
  pixels, _ = read(encoded(image, transparency=blue))
  assert tuple(pixels[4, 1]) == RED and tuple(pixels[4, -2]) == pictures.BACKDROP


def test_deep_greys():
  ramp = np.linspace(0, 65535, 256).reshape(16, 16)
  wanted = np.round(ramp / 257)[:, :, None].repeat(3, 2)
  deep = encoded(Image.fromarray(ramp.astype(np.uint16)))
  np.testing.assert_allclose(read(deep, 16, 16)[0], wanted, atol=1)
  floats = encoded(Image.fromarray((ramp / 65535).astype(np.float32)), "tiff")
  np.testing.assert_allclose(read(floats, 16, 16)[0], wanted, atol=1)
  integers = encoded(Image.fromarray(ramp.astype(np.int32)), "tiff")
  np.testing.assert_allclose(read(integers, 16, 16)[0], wanted, atol=1)


def test_cmyk_and_one_bit():
  pixels, _ = read(encoded(halves().convert("CMYK"), "tiff"))
  assert pixels[4, 1, 0] > 150 and pixels[4, -2, 2] > 150
  assert (read(encoded(Image.new("1", (16, 16), 1)))[0] == 255).all()


@pytest.mark.parametrize("values", [[0, 2.5], [-1, 0], [0, np.nan], [0, np.inf]])
def test_floats_of_an_unknown_range_are_refused(values):
  image = Image.fromarray(np.resize(np.float32(values), (8, 8)))
  with pytest.raises(UserError, match="row 1: image 0: grey values from .* convert it to 8 bits"):
    read(encoded(image, "tiff"))


def test_too_many_pixels():
  bomb = bytearray(encoded(Image.new("1", (8, 8))))
  bomb[16:24] = (20_000).to_bytes(4) + (20_000).to_bytes(4)          # PNG's width and height
  with pytest.raises(UserError, match="row 1: image 0: cannot be read|has 20000 x 20000 pixels"):
    read(bytes(bomb))
  with pytest.raises(UserError, match=r"has 9000 x 9000 pixels, above the 80,000,000 "
                     "that are read; scale it down"):
    read(encoded(Image.new("1", (9_000, 9_000))))


def test_damaged_pictures_are_one_line():
  """Bytes changed at random; whatever Pillow makes of them."""
  generator, refused = np.random.default_rng(0), 0
  noise = Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8))
  kinds = [encoded(noise, kind) for kind in ("png", "jpeg", "webp", "gif", "bmp", "tiff")]
  for i in range(600):
    content = bytearray(kinds[i % len(kinds)])
    for place in generator.integers(0, len(content), 1 + i % 8):
      content[place] = generator.integers(0, 256)
    try:
      pixels, _ = read(bytes(content[:len(content) - (i % 5) * 7]))
      assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    except UserError as error:
      refused += 1
      assert str(error).startswith("row 1: image 0: ") and "\n" not in str(error)
  assert refused > 100
