"""How unsure a judge is of which picture of a pair is better: where a vote tells most.

The judge is a scorer as in `reward.names`. With the margin m between its scores of the two pictures
and the median |m| of all pairs as scale, it expects a to be preferred with p = 1 / (1 + exp(-m /
scale)); its doubt is the variance of that vote over the largest there is, 4 p (1 - p), in [0, 1].
"""
import concurrent.futures
import json
import multiprocessing
import pathlib

import numpy as np

from jaxalign.config.credentials import hidden
from jaxalign.errors import UserError
from jaxalign.storage.files import whole
from jaxalign.votes.gallery import Gallery, picture_file, read_pixels

_BATCH = 32


def open_doubts(judge: str, gallery: Gallery, folder: pathlib.Path) -> np.ndarray:
  """The judge's doubt of every pair, `[pairs]`; kept in `judge.json`, and read from there.

  Pictures are scored in a process of their own, so that the device is free while people vote.

  Raises:
    UserError: the judge is none, or does not score these pictures.
  """
  file, name = folder / "judge.json", hidden(judge)
  digests = [picture.digest for picture in gallery.pictures]
  try:
    saved = json.loads(file.read_text())
    scores = [saved["scores"][digest] for digest in digests] if saved["judge"] == name else None
  except (OSError, ValueError, KeyError, TypeError, RecursionError):     # a damaged one is none
    scores = None
  if scores is None:
    print(f"{name} scores {len(digests)} pictures", flush=True)
    prompts = [gallery.prompts[picture.prompt] for picture in gallery.pictures]
    files = [picture_file(folder, digest) for digest in digests]
    spawn = multiprocessing.get_context("spawn")
    try:
      with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
        scores = process.submit(score, judge, files, prompts).result()
    except (UserError, concurrent.futures.BrokenExecutor) as error:
      raise UserError(f"--judge={name}: {error}") from error
    with whole(file) as partial:
      partial.write_text(json.dumps({"judge": name, "scores": dict(zip(digests, scores))}) + "\n")
  return doubts(np.array([scores[pair.a] - scores[pair.b] for pair in gallery.pairs]))


def doubts(margins: np.ndarray) -> np.ndarray:
  """`[n]` margins -> `[n]` doubts; 1 everywhere for a judge that tells no pair apart."""
  scale = np.median(np.abs(margins)) or np.abs(margins).max() or 1.0
  # 4 p (1 - p) without exponentials that overflow.
  return 1 / np.cosh(np.minimum(np.abs(margins) / scale, 700.0) / 2) ** 2


def score(judge: str, files: list[pathlib.Path], prompts: list[str]) -> list[float]:
  """Scores of pictures, in order. Their sizes may differ."""
  import jax

  from jaxalign.devices import callbacks
  from jaxalign.rewards import Reward, check_scores, make_reward, open_reward
  from jaxalign.rewards.trial import Trial
  callbacks.be_patient()                       # it may be PyTorch
  images = [read_pixels(file) for file in files]
  reward = make_reward((judge,), (1.0,))
  reward = open_reward(reward, lambda: Trial(images[0].shape[:2], prompts, gradient=False))
  of = jax.jit(reward.score) if isinstance(reward, Reward) else reward.score
  result = np.zeros(len(files))
  for size in {image.shape for image in images}:
    rows = [i for i, image in enumerate(images) if image.shape == size]
    for start in range(0, len(rows), _BATCH):
      part = rows[start:start + _BATCH]
      filled = [*part, *part[-1:] * (min(_BATCH, len(rows)) - len(part))]     # one program
      pixels, texts = np.stack([images[i] for i in filled]), [prompts[i] for i in filled]
      scores = (of(reward.params, pixels.astype(np.float32) / 255, reward.prepare(texts))
                if isinstance(reward, Reward) else of(pixels, texts))
      result[part] = check_scores(judge, scores, texts)[:len(part)]
      callbacks.check()
  return result.tolist()
