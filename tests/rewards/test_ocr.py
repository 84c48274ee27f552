"""Readers of words: what they read on signs, the distance to what was asked for, and mistakes."""
import importlib.util
import shutil
import sys

import numpy as np
import pytest

from jaxalign.emoji import latents, scenes, signs
from jaxalign.errors import UserError
from jaxalign.rewards import find, make_reward, ocr

pytest.importorskip("onnxruntime")
if sys.version_info >= (3, 13) and importlib.util.find_spec("rapidocr_onnxruntime") is None:
  pytest.skip("the reader's wheel wants Python below 3.13", allow_module_level=True)
WORDS = ("CAT", "NO", "LION", "SUN", "EXIT", "BUS", "ON", "FROG", "KEY", "WE", "MAP", "TREE")
needs_tesseract = pytest.mark.skipif(not shutil.which("tesseract"), reason="no tesseract here")


@pytest.fixture(scope="module")
def images():
  """`[12, 64, 64, 3]` uint8, a sign on each of the colours."""
  drawn = signs.render(signs.spell(WORDS), scenes.RGB, np.zeros((len(WORDS), 2), int))
  return (np.asarray(drawn) * 255).round().astype(np.uint8)


def captions(words):
  return [signs.caption(word, colour) for word, colour in zip(words, scenes.COLOURS)]


def test_reads_signs_and_measures_the_distance(images):
  exact, near = find("ocr_exact"), find("ocr#threads=1")
  np.testing.assert_array_equal(exact.score(images, captions(WORDS)), 1)
  np.testing.assert_array_equal(near.score(images, captions(WORDS)), 1)
  asked = ["COT", "NOT", "LION", "XYZ", *WORDS[4:]]
  np.testing.assert_allclose(near.score(images, captions(asked))[:4], [2 / 3, 2 / 3, 1, 0],
                             rtol=1e-6)
  np.testing.assert_array_equal(exact.score(images, captions(asked))[:4], [0, 0, 1, 0])
  # Case, blanks and the kind of quotes do not count.
  np.testing.assert_array_equal(near.score(images[:1], ["a board saying “c at”"]), 1)


def test_reads_through_the_latents(images):
  fixed = latents.load()
  seen = np.asarray(fixed.decode(fixed.encode(images / np.float32(255)))).clip(0, 1)
  score = find("ocr_exact").score((seen * 255).astype(np.uint8), captions(WORDS))
  assert score.mean() >= 10 / 12
  blank = np.full((1, 64, 64, 3), 200, np.uint8)
  np.testing.assert_array_equal(find("ocr").score(blank, ['"CAT"']), 0)


@needs_tesseract
def test_the_other_reader(images):
  score = find("ocr_judge#threads=2").score(images, captions(WORDS))
  assert score.mean() >= 10 / 12
  np.testing.assert_array_equal(find("ocr_judge").score(images[:2], captions(["CAR", "ON"])), 0)


def test_only_the_ink_is_read():
  image = np.full((40, 60, 3), 250, np.uint8)
  image[10:20, 30:50] = 20
  assert ocr.ink(image).shape == (16, 26, 3)
  assert ocr.ink(image[:8]).shape == (8, 60, 3)


def test_mixed_with_others_under_its_short_name(images):
  reward = make_reward(("ocr#threads=1", "brightness"), (1.0, 0.5))
  terms = reward.terms(images[:2], captions(WORDS[:2]))
  assert set(terms) == {"ocr", "brightness"}


@pytest.mark.parametrize("name, prompt, message", [
    ("ocr", "a cat on a red background", "one string between quotes"),
    ("ocr", 'signs that say "A" and "B"', "one string between quotes"),
    ("ocr", 'a sign that says " "', "one string between quotes"),
    ("ocr#speed=2", "", "speed is no setting"),
    ("ocr#threads=0", "", "threads=0"),
    ("ocr#detect=2", "", "detect=2"),
    ("ocr:nothing.onnx", "", "nothing.onnx"),
    ("ocr_judge:/no/such/program", '"CAT"', "/no/such/program"),
])
def test_mistakes_are_named(images, name, prompt, message):
  with pytest.raises(UserError, match=message):
    find(name).score(images[:1], [prompt])


def test_says_what_is_missing(monkeypatch):
  monkeypatch.setattr(ocr, "_package_folder", lambda: None)
  with pytest.raises(UserError, match="pip install rapidocr-onnxruntime"):
    find("ocr")
  monkeypatch.setattr(shutil, "which", lambda name: None)
  with pytest.raises(UserError, match="tesseract-ocr"):
    find("ocr_judge")
