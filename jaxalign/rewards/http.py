"""A reward behind HTTP: any scorer, in any framework, on another machine.

In `reward.names` as its URL. Each request is a POST of JSON

  {"images": [PNG in base64, ...], "prompts": [text, ...]}

and is answered by `{"scores": [number, ...]}`, one for each image. Settings follow the URL after a
`#`, joined by `&`: `batch` images a request (default 16), `timeout` seconds until an answer must be
there as a whole (60), `retries` after a failure (4), with growing pauses in between, or as long as
the server asks for, up to `client.PAUSE`. Credentials in the URL (`https://user:password@host/`, or
in a query's `key=`, `token=` and the like) are sent and never written; those of `~/.netrc` are
taken too.
"""
import base64
import dataclasses
import io
import json

import numpy as np
from PIL import Image

from jaxalign.config.credentials import hidden, secrets
from jaxalign.errors import UserError
from jaxalign.rewards import HostReward
from jaxalign.rewards.client import MOST_RETRIES, MOST_SECONDS, Client, Question
from jaxalign.rewards.settings import read_settings

PARALLEL = 4                     # requests under way at a time
BYTES, ROW_BYTES = 2 ** 16, 2 ** 10    # an answer may be so large, and so much larger a score


@dataclasses.dataclass(frozen=True)
class Settings:
  """What follows `#`; see above."""
  batch: int = 16
  timeout: float = 60.0
  retries: int = 4

  def __post_init__(self):
    for key, low, high in (("batch", 1, 10 ** 6), ("timeout", 1e-3, MOST_SECONDS),
                           ("retries", 0, MOST_RETRIES)):
      value = getattr(self, key)
      if not low <= value <= high:               # also where it is not a number
        raise UserError(f"{key}={value} is outside [{low:g}, {high:g}]")


class _Scores(Question):
  """Asks for the scores of some images."""

  def __init__(self, client, images, prompts):
    self._client, self._images, self._prompts = client, images, prompts
    self.most, self.what = BYTES + ROW_BYTES * len(prompts), f"{len(prompts)} images"

  def content(self):
    return json.dumps({"images": [encode(image) for image in self._images],
                       "prompts": self._prompts}).encode()

  def read(self, body):
    fault = self._client.fault
    try:
      scores = json.loads(body)["scores"]          # whose NaN is reported as such later on
    except (ValueError, RecursionError) as error:
      raise fault("its answer is not JSON", error) from error
    except (KeyError, TypeError) as error:
      raise fault("its answer has no \"scores\"") from error
    if not isinstance(scores, list) or len(scores) != len(self._prompts) or any(
        isinstance(value, (list, dict)) for value in scores):
      raise fault(f"its answer has not one score for each of {self.what}")
    return scores


def http_reward(name: str) -> HostReward:
  """The reward at the URL `name`; its range is the server's own.

  Raises:
    UserError: of a name that is no URL or settings that are none; and, when called, of a server
      that cannot be reached, is too slow, refuses, redirects elsewhere, or answers with something
      else than scores. Names the URL, without credentials.
  """
  url, _, fragment = name.partition("#")
  settings = read_settings(hidden(name), fragment, Settings)
  client = Client(name, [url], secrets(name), timeout=settings.timeout, retries=settings.retries,
                  parallel=PARALLEL)

  def score(images, prompts):
    size = settings.batch
    scores = client.ask([_Scores(client, images[i:i + size], prompts[i:i + size])
                         for i in range(0, len(prompts), size)])
    return np.asarray([value for part in scores for value in part])

  return HostReward(hidden(name), score, "the server's")


def encode(image: np.ndarray) -> str:
  """`[H, W, 3]` uint8 as a PNG file in base64."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG")
  return base64.b64encode(file.getvalue()).decode()
