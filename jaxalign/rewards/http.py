"""A reward behind HTTP: any scorer, in any framework, on another machine.

In `reward.names` as its URL. Each request is a POST of JSON

  {"images": [PNG in base64, ...], "prompts": [text, ...]}

and is answered by `{"scores": [number, ...]}`, one for each image. Settings follow the URL after a
`#`, joined by `&`: `batch` images a request (default 16), `timeout` seconds until an answer must be
there as a whole (60), `retries` after a failure (4), with growing pauses in between, or as long as
the server asks for, up to `PAUSE`. Credentials in the URL (`https://user:password@host/`, or in a
query's `key=`, `token=` and the like) are sent and never written; those of `~/.netrc` are taken
too.
"""
import base64
import contextlib
import dataclasses
import http.client
import io
import json
import queue
import threading
import time
import urllib.parse

import numpy as np
import requests
import urllib3
from PIL import Image
from requests.adapters import HTTPAdapter

from jaxalign.config.credentials import hidden, secrets, without
from jaxalign.config.source import one_line
from jaxalign.devices import callbacks
from jaxalign.errors import UserError
from jaxalign.rewards import HostReward
from jaxalign.rewards.settings import read_settings

PARALLEL = 4                     # requests under way at a time
PAUSE = 30.0                     # seconds between two attempts, at most
BYTES, ROW_BYTES = 2 ** 16, 2 ** 10    # an answer may be so large, and so much larger a score
MOST_SECONDS, MOST_RETRIES = 86400.0, 100
_AGAIN = (429, 502, 503, 504)    # the server asks for patience; another refusal would be the same
_MOVED, _HOPS = (307, 308), 5    # redirects that keep a POST what it is


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


@dataclasses.dataclass
class _Part:
  """A request: its rows, and how often it was tried. `token` tells attempts apart."""
  rows: slice
  tried: int = 0
  due: float = 0.0               # clock time before which it is not sent
  deadline: float = 0.0
  token: object = None


class _Again(Exception):
  """An attempt failed in a way that another one may not; `pause` is what the server asks for."""

  def __init__(self, what: str, error: Exception | None = None, pause: float = 0.0):
    super().__init__(what)
    self.error, self.pause = error, pause


def http_reward(name: str) -> HostReward:
  """The reward at the URL `name`; its range is the server's own.

  Raises:
    UserError: of a name that is no URL or settings that are none; and, when called, of a server
      that cannot be reached, is too slow, refuses, redirects elsewhere, or answers with something
      else than scores. Names the URL, without credentials.
  """
  label, secret = hidden(name), secrets(name)
  url, _, fragment = name.partition("#")
  settings = read_settings(label, fragment, Settings)

  def fault(what, error=None):
    reason = f" ({without(one_line(error), secret)[:300]})" if error else ""
    return UserError(f"reward.names: '{label}': {what}{reason}")
  try:
    host = _host(url)
    requests.Request("POST", url).prepare()
  except (ValueError, requests.RequestException) as error:
    raise fault("is no URL", error) from error
  session = requests.Session()
  for scheme in ("http://", "https://"):
    session.mount(scheme, HTTPAdapter(pool_maxsize=PARALLEL))

  def attempt(content: bytes, count: int, deadline: float) -> list:
    """The scores of one request. Ends by the deadline only where the network lets it."""
    target, most = url, BYTES + ROW_BYTES * count
    for _ in range(_HOPS):
      try:
        with session.post(target, data=content, stream=True, allow_redirects=False,
                          headers={"Content-Type": "application/json"},
                          timeout=max(deadline - time.monotonic(), 1e-3)) as answer:
          if answer.is_redirect or answer.is_permanent_redirect:
            goal = answer.headers["location"]
            target = _joined(target, goal, host) if answer.status_code in _MOVED else None
            if target is None:
              raise fault(f"redirects ({answer.status_code}) to {hidden(goal)[:200]!r}; write the "
                          "URL that answers itself")
            continue
          if answer.status_code in _AGAIN:
            raise _Again(f"no answer: status {answer.status_code} {answer.reason}",
                         pause=_seconds(answer.headers.get("Retry-After")))
          if not answer.ok:
            raise fault(f"refuses: status {answer.status_code} {answer.reason}")
          text = _read(answer, most, deadline)
      except ValueError as error:
        raise fault("is no URL, or redirects to none", error) from error
      except (OSError, http.client.HTTPException, urllib3.exceptions.HTTPError) as error:
        raise _Again("no answer", error) from error    # requests wraps most of them in OSErrors
      break
    else:
      raise fault(f"redirects more than {_HOPS} times")
    if text is None:
      raise fault(f"its answer is longer than {most} bytes, for {count} images")
    try:
      scores = json.loads(text)["scores"]          # whose NaN is reported as such later on
    except (ValueError, RecursionError) as error:
      raise fault("its answer is not JSON", error) from error
    except (KeyError, TypeError) as error:
      raise fault("its answer has no \"scores\"") from error
    if not isinstance(scores, list) or len(scores) != count or any(
        isinstance(value, (list, dict)) for value in scores):
      raise fault(f"its answer has not one score for each of {count} images")
    return scores

  def score(images, prompts):
    """Attempts run in threads that are left behind when they are late, or after Ctrl-C."""
    size, now = settings.batch, time.monotonic
    waiting = [_Part(slice(i, i + size)) for i in range(0, len(prompts), size)]
    running, answers, done = [], queue.SimpleQueue(), {}
    total = len(waiting)

    def start(part):
      content = json.dumps({"images": [encode(image) for image in images[part.rows]],
                            "prompts": prompts[part.rows]}).encode()
      part.token, part.deadline = object(), now() + settings.timeout

      def work(token=part.token, deadline=part.deadline, count=len(prompts[part.rows])):
        try:
          answers.put((token, attempt(content, count, deadline)))
        except BaseException as error:             # the waiting thread's, whatever it is
          answers.put((token, error))
      threading.Thread(target=work, daemon=True, name="jaxalign http").start()
      running.append(part)

    while len(done) < total:
      for part in [p for p in waiting if p.due <= now()][:PARALLEL - len(running)]:
        waiting.remove(part)
        start(part)
      until = [p.deadline for p in running]
      if len(running) < PARALLEL:
        until += [p.due for p in waiting]
      try:
        wait = min(max(min(until) - now(), 1e-3), callbacks.TICK)      # lets Ctrl-C in
        token, result = answers.get(timeout=wait)
        part = next((p for p in running if p.token is token), None)
      except queue.Empty:
        part = next((p for p in running if p.deadline <= now()), None)
        result = _Again(f"no answer: timed out after {settings.timeout:g} s")
      if part is None:                             # or of an attempt that was given up
        continue
      running.remove(part)
      if isinstance(result, _Again):
        part.tried += 1
        if part.tried > settings.retries:
          raise fault(str(result), result.error) from result
        part.due = now() + min(max(result.pause, 0.1 * 2 ** part.tried), PAUSE)
        waiting.append(part)
      elif isinstance(result, BaseException):
        raise result
      else:
        done[part.rows.start] = result
    return np.asarray([value for start in sorted(done) for value in done[start]])

  return HostReward(label, score, "the server's")


def encode(image: np.ndarray) -> str:
  """`[H, W, 3]` uint8 as a PNG file in base64."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG")
  return base64.b64encode(file.getvalue()).decode()


def _host(url: str) -> tuple:
  """Scheme, name and port; ValueError if one is wrong."""
  parts = urllib.parse.urlsplit(url)
  ports = {"http": 80, "https": 443}
  if parts.scheme not in ports or not parts.hostname:
    raise ValueError("neither http nor https, or no host")
  return parts.scheme, parts.hostname, parts.port or ports[parts.scheme]


def _joined(url: str, goal: str, host: tuple) -> str | None:
  """Where a redirect to `goal` leads to; None where that is not on `host`."""
  with contextlib.suppress(ValueError):
    url = urllib.parse.urljoin(url, goal)
    return url if _host(url) == host else None


def _read(answer: requests.Response, most: int, deadline: float) -> bytes | None:
  """The body; None if it is longer than `most`. Each piece is decoded: 64 kB may be 64 MB."""
  content = b""
  for piece in answer.iter_content(2 ** 14):
    content += piece
    if len(content) > most:
      return None
    if time.monotonic() > deadline:
      raise requests.Timeout("the answer timed out half way")
  return content


def _seconds(text: str | None) -> float:
  """A Retry-After in seconds, 0 where it is none or a date."""
  return float(text) if text and text.isascii() and text.isdigit() else 0.0
