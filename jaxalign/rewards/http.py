"""A reward behind HTTP: any scorer, in any framework, on another machine.

In `reward.names` as its URL. Each request is a POST of JSON

  {"images": [PNG in base64, ...], "prompts": [text, ...]}

and is answered by `{"scores": [number, ...]}`, one for each image. Settings follow the URL after a
`#`, joined by `&`: `batch` images a request (default 16), `timeout` seconds to wait for an answer
(60), `retries` after a failure (4), with growing pauses in between.
"""
import base64
import dataclasses
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import requests
from PIL import Image
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from jaxalign.config.source import one_line
from jaxalign.errors import UserError
from jaxalign.rewards import HostReward
from jaxalign.rewards.settings import read_settings

PARALLEL = 4                     # requests under way at a time


@dataclasses.dataclass(frozen=True)
class Settings:
  """What follows `#`; see above."""
  batch: int = 16
  timeout: float = 60.0
  retries: int = 4

  def __post_init__(self):
    for key, value in vars(self).items():
      if value < 0 or (value == 0 and key != "retries"):
        raise UserError(f"{key}={value} is too small")


def http_reward(name: str) -> HostReward:
  """The reward at the URL `name`; its range is the server's own.

  Raises:
    UserError: of settings that are none; and, when called, of a server that cannot be reached, is
      too slow, refuses, or answers with something else than scores. Names the URL.
  """
  url, _, fragment = name.partition("#")
  settings = read_settings(name, fragment, Settings)
  # Only where no answer came or the server asks for patience: a refusal would be the same again.
  retry = Retry(total=settings.retries, backoff_factor=0.2, allowed_methods=None,
                status_forcelist=(429, 502, 503, 504), raise_on_status=False)
  session = requests.Session()
  for scheme in ("http://", "https://"):
    session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=PARALLEL))

  def fault(what, error=None):
    return UserError(f"reward.names: '{name}': {what}" + (f" ({one_line(error)})" if error else ""))

  def ask(images, prompts):
    content = {"images": [encode(image) for image in images], "prompts": prompts}
    try:
      answer = session.post(url, json=content, timeout=settings.timeout)
      answer.raise_for_status()
      scores = json.loads(answer.content)["scores"]     # whose NaN is reported as such later on
    except requests.RequestException as error:
      raise fault("no answer", error) from error
    except ValueError as error:
      raise fault("its answer is not JSON", error) from error
    except (KeyError, TypeError) as error:
      raise fault("its answer has no \"scores\"") from error
    if not isinstance(scores, list) or len(scores) != len(prompts):
      raise fault(f"its answer has not one score for each of {len(prompts)} images")
    return scores

  def score(images, prompts):
    size = settings.batch
    parts = [slice(i, i + size) for i in range(0, len(prompts), size)]
    with ThreadPoolExecutor(PARALLEL) as pool:
      answers = pool.map(lambda part: ask(images[part], prompts[part]), parts)
      return np.asarray([value for answer in answers for value in answer])

  return HostReward(name, score, "the server's")


def encode(image: np.ndarray) -> str:
  """`[H, W, 3]` uint8 as a PNG file in base64."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG")
  return base64.b64encode(file.getvalue()).decode()
