"""Words in pictures, read by networks that were trained on other pictures than ours.

`ocr` and `ocr_exact` read with the recogniser of PP-OCRv4, an ONNX file of the package
`rapidocr-onnxruntime` (Apache-2.0), in onnxruntime alone; `ocr_judge` reads with Tesseract, a
program of its own, and is there to check the others. All compare what they read with the words
between quotes in the prompt.

References: Liu et al. 2025 (Flow-GRPO, arXiv 2505.05470), section 4; there a picture that has the
word among others counts as right, here it does not.
"""
import dataclasses
import functools
import importlib
import importlib.util
import pathlib
import re
import shutil
import string
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from jaxalign.errors import UserError
from jaxalign.rewards import HostReward
from jaxalign.rewards.settings import read_settings

_PACKAGE, _FILE = "rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx"
_HEIGHT, _WIDTH = 48, 320          # pixels of the recogniser's input; longer lines are wider
_AWAY, _MARGIN = 0.25, 3           # what differs so from the border is ink; pixels kept around it
_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


@dataclasses.dataclass(frozen=True)
class Settings:
  """What may follow `#`.

  Attributes:
    detect: 1 to look for lines of text first, with the package's own detector; 0 reads what differs
      from the border, of which there is one line.
    threads: of onnxruntime, or programs of Tesseract at a time.
  """
  detect: int = 0
  threads: int = 2

  def __post_init__(self):
    if self.detect not in (0, 1):
      raise UserError(f"detect={self.detect} is neither 0 nor 1")
    if not 1 <= self.threads <= 64:
      raise UserError(f"threads={self.threads} is outside 1 to 64")


def ocr(where: str = "") -> HostReward:
  """One minus the edit distance of what is read to the quoted words, over their length; [0, 1].

  Blanks and case do not count. A distance above the length counts as the length.
  """
  return _reward("ocr", _recogniser(where), _similarity, "[0, 1]; 1 is the quoted words")


def ocr_exact(where: str = "") -> HostReward:
  """1 where exactly the quoted words are read, else 0."""
  return _reward("ocr_exact", _recogniser(where), _same, "0 or 1")


def ocr_judge(where: str = "") -> HostReward:
  """`ocr_exact` by Tesseract 5."""
  return _reward("ocr_judge", _tesseract(where), _same, "0 or 1")


def quoted(prompt: str) -> str:
  """The words between quotes.

  Raises:
    UserError: there are none, or several.
  """
  found = [one or other for one, other in _QUOTED.findall(prompt)]
  if len(found) != 1 or not found[0].strip():
    raise UserError("reward.names: readers need one string between quotes in each prompt, such as "
                    f"'a sign that says \"CAT\"', not {prompt!r}")
  return found[0]


def _reward(name, read, compare, span) -> HostReward:
  def score(images, prompts):
    wanted = [quoted(prompt) for prompt in prompts]
    plain = lambda text: "".join(text.split()).lower()
    return np.array([compare(plain(text), plain(word))
                     for text, word in zip(read(images, wanted), wanted)], np.float32)
  return HostReward(name, score, span)


def _similarity(text: str, word: str) -> float:
  from rapidfuzz.distance import Levenshtein
  return 1 - min(Levenshtein.distance(text, word), len(word)) / len(word)


def _same(text: str, word: str) -> float:
  return float(text == word)


def ink(image: np.ndarray) -> np.ndarray:
  """The part of `[H, W, 3]` uint8 that differs from its border; all of it where nothing does."""
  border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
  far = np.abs(image - np.median(border, 0)).max(-1) > 255 * _AWAY
  rows, columns = np.flatnonzero(far.any(1)), np.flatnonzero(far.any(0))
  if far.sum() < 10:
    return image
  return image[max(rows[0] - _MARGIN, 0):rows[-1] + _MARGIN + 1,
               max(columns[0] - _MARGIN, 0):columns[-1] + _MARGIN + 1]


# --- PP-OCRv4 -----------------------------------------------------------------------------------


def _package_folder() -> pathlib.Path | None:
  spec = importlib.util.find_spec(_PACKAGE)
  return pathlib.Path(spec.submodule_search_locations[0]) if spec else None


def _recogniser(where: str):
  """`(images, words) -> texts`, of `FILE.onnx#settings`, each part of which may be missing."""
  file, _, settings = where.partition("#")
  settings = read_settings("ocr", settings, Settings)
  if not file:
    folder = _package_folder()
    if folder is None:
      raise UserError("the reader comes with `pip install rapidocr-onnxruntime` (Python below "
                      "3.13); elsewhere name its file, as in ocr:ch_PP-OCRv4_rec_infer.onnx")
    file = folder / _FILE
  session, characters = _session(str(file), settings.threads)
  if settings.detect:
    return _detecting(settings.threads)
  letters = [0, *(characters.index(letter) for letter in string.ascii_uppercase)]

  def read(images, words):
    # Without the other columns no digit stands for a letter that looks like it.
    return [_decode(session, characters, image, letters if word.isascii() and word.isalpha() else
                    None) for image, word in zip(images, words)]
  return read


@functools.lru_cache(maxsize=2)
def _session(file: str, threads: int):
  """The network, and the characters that its columns stand for; the first stands for none."""
  try:
    import onnxruntime
  except ImportError as error:
    raise UserError("the reader needs `pip install onnxruntime`") from error
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
  try:
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    characters = session.get_modelmeta().custom_metadata_map["character"].split("\n")
  except Exception as error:               # the library raises none of its own
    raise UserError(f"{file}: no recogniser in ONNX: {str(error).splitlines()[0]}") from error
  return session, ["", *characters, " "]


def _decode(session, characters: list[str], image, columns) -> str:
  """The best text of one picture's ink: the likeliest of `columns` (None: of all) at each place,
  repetitions and blanks left out."""
  crop = Image.fromarray(ink(image))
  width = max(16, int(crop.width * _HEIGHT / crop.height))
  crop = np.asarray(crop.resize((width, _HEIGHT), Image.BICUBIC), np.float32)[..., ::-1]
  line = np.zeros((1, 3, _HEIGHT, max(_WIDTH, width)), np.float32)
  line[0, :, :, :width] = (crop / 127.5 - 1).transpose(2, 0, 1)
  scores, = session.run(None, {session.get_inputs()[0].name: line})
  columns = np.arange(scores.shape[-1]) if columns is None else np.array(columns)
  best = columns[scores[0][:, columns].argmax(-1)]
  kept = best[np.flatnonzero(np.diff(best, prepend=-1))]
  return "".join(characters[i] for i in kept)


def _detecting(threads: int):
  """The package as a whole: lines are found, turned and read, from the first to the last."""
  try:
    package = importlib.import_module(_PACKAGE)
  except ImportError as error:             # also OpenCV's, which wants libGL
    raise UserError(f"detect=1 needs `pip install rapidocr-onnxruntime` and what OpenCV loads "
                    f"(on Debian `apt install libgl1`): {error}") from error
  engine = package.RapidOCR(intra_op_num_threads=threads)

  def read(images, words):
    del words
    found = [engine(np.ascontiguousarray(image[..., ::-1]))[0] for image in images]
    return ["".join(text for _, text, _ in lines or ()) for lines in found]
  return read


# --- Tesseract ----------------------------------------------------------------------------------


def _tesseract(where: str):
  """`(images, words) -> texts`, of `#settings`."""
  file, _, settings = where.partition("#")
  settings = read_settings("ocr_judge", settings, Settings)
  program = file or shutil.which("tesseract")
  if not program:
    raise UserError("the program tesseract is missing; on Debian: apt install tesseract-ocr")

  def read_one(image, word):
    # Dark on light and large, as pages are.
    crop = Image.fromarray(ink(image)).convert("L")
    crop = np.asarray(crop.resize((4 * crop.width, 4 * crop.height), Image.BICUBIC), np.int32)
    if np.median(np.concatenate([crop[0], crop[-1]])) < 128:
      crop = 255 - crop
    page = Image.fromarray(np.pad(crop, 20, "edge").astype(np.uint8))
    only = ["-c", f"tessedit_char_whitelist={string.ascii_uppercase}"] if (
        word.isascii() and word.isalpha()) else []
    try:
      done = subprocess.run([program, "stdin", "stdout", "--psm", "8", *only], capture_output=True,
                            input=_pgm(page), timeout=60, env={"OMP_THREAD_LIMIT": "1"})
    except (OSError, subprocess.TimeoutExpired) as error:
      raise UserError(f"reward.names: 'ocr_judge': {program}: {error}") from error
    if done.returncode:
      raise UserError(f"reward.names: 'ocr_judge': {program}: "
                      f"{done.stderr.decode(errors='replace').strip().splitlines()[-1:]}")
    return done.stdout.decode("utf-8", "replace")

  def read(images, words):
    with ThreadPoolExecutor(settings.threads) as pool:
      return list(pool.map(read_one, images, words))
  return read


def _pgm(page: Image.Image) -> bytes:
  return b"P5 %d %d 255\n" % page.size + page.tobytes()
