"""The client of rewards on other machines: one or several servers, each asked by POSTs of JSON.

Requests go out together, each answer has a deadline as a whole and a size, and what fails in a way
that another attempt may not is tried again. A server that fails is left out for a growing while, or
as long as it asks for, and then tried with one request until it answers.
"""
import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import http
import logging
import netrc
import os
import threading
import time
import urllib.parse
from typing import Any

import httpx

from jaxalign.config.credentials import hidden, is_loopback, without
from jaxalign.config.source import one_line
from jaxalign.devices import callbacks
from jaxalign.errors import UserError

PAUSE = 30.0                     # seconds that a server which fails is left out, at most
MOST_SECONDS, MOST_RETRIES = 86400.0, 100
_AGAIN = (429, 502, 503, 504)    # the server asks for patience; another refusal would be the same
_MOVED, _HOPS = (307, 308), 5    # redirects that keep a POST what it is
_REFUSAL = 2 ** 14               # bytes that are read of a refusal

for _name in ("httpx", "httpcore"):
  logging.getLogger(_name).setLevel(logging.WARNING)     # below that they log URLs, with passwords


class Again(Exception):
  """An attempt failed in a way that another one may not; `pause` is what the server asks for."""

  def __init__(self, what: str, error: Exception | None = None, pause: float = 0.0):
    super().__init__(what)
    self.error, self.pause = error, pause


class Question:
  """One request and what its answer says.

  Attributes:
    most: bytes of the answer, at most; for messages, `what` it answers.
  """
  most, what = 2 ** 16, "a question"

  def content(self) -> bytes:
    """JSON to be sent; called in a thread before each attempt."""
    raise NotImplementedError

  def read(self, body: bytes) -> Any:
    """What the answer says. Raises Again, or what the run is to end with."""
    raise NotImplementedError

  def refused(self, status: int, text: str) -> bool:
    """Whether this refusal changed the question, which is then asked once more at once."""
    return False


@dataclasses.dataclass
class _Server:
  url: str
  shown: str
  host: tuple
  auth: httpx.Auth | None
  well: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
  failures: int = 0              # in a row
  due: float = 0.0               # clock time before which it is left out


class Client:
  """Servers that answer alike, and share the work.

  Args:
    name: of the reward, in messages; credentials in it are hidden. where: the config key or flag
      that has the name.
    urls: where the questions go.
    secrets: what may not be in messages either.
    timeout: seconds until an answer must be there as a whole. retries: of a question, after a
      failure while no other server was well. parallel: requests under way at a time, for each
      server. key: sent as a bearer token.
  Raises:
    UserError: one of them is no URL.
  """

  def __init__(self, name: str, urls: list[str], secrets: list[str], *, timeout: float,
               retries: int, parallel: int, key: str = "", where: str = "reward.names"):
    self._where, self._label, self._secrets = where, hidden(name), [
        *secrets, *([key] if key else [])]
    self._timeout, self._retries, self._parallel = timeout, retries, parallel
    try:
      self._servers = [_Server(url, hidden(url), host_of(url), None if key else _netrc(url))
                       for url in urls]
      headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
      headers |= {"Authorization": f"Bearer {key}"} if key else {}
      # No proxy is told what is for this machine.
      own = {server.host[1] for server in self._servers if is_loopback(server.host[1])}
      mounts = {f"all://[{host}]" if ":" in host else f"all://{host}": None for host in own}
      self._http = httpx.AsyncClient(
          headers=headers, timeout=None, follow_redirects=False, mounts=mounts,
          limits=httpx.Limits(max_connections=None, max_keepalive_connections=parallel))
    except ValueError as error:
      raise self.fault("is no URL", error) from error

  def fault(self, what: str, error: Exception | None = None) -> UserError:
    """What a run is to end with: names the reward, never its credentials."""
    reason = f" ({one_line(error)})" if error else ""
    return UserError(f"{self._where}: '{self._label}': {self.without_secrets(what + reason)[:600]}")

  def without_secrets(self, text: str) -> str:
    return without(text, self._secrets)

  def ask(self, questions: list[Question]) -> list:
    """What the answers say, in the order of the questions.

    Raises:
      UserError: servers that cannot be reached, are too slow, refuse, redirect elsewhere, or answer
        with too much; and what `read` raises. KeyboardInterrupt: Ctrl-C.
    """
    future = asyncio.run_coroutine_threadsafe(self._ask(questions), _loop())
    try:
      while not future.done():                   # lets Ctrl-C in
        concurrent.futures.wait([future], callbacks.TICK)
    except BaseException:
      future.cancel()
      raise
    return future.result()

  async def _ask(self, questions):
    answers, done = {}, asyncio.Event()
    waiting = asyncio.PriorityQueue()            # what was tried comes before what was not
    for i in range(len(questions)):
      waiting.put_nowait((i, 0))

    async def work(server, first):
      while True:
        if first:                                # it alone tries a server that has failed
          await asyncio.sleep(max(0.0, server.due - time.monotonic()))
        else:
          await server.well.wait()
        i, tried = await waiting.get()
        if server.failures and not first:        # since it began to wait
          waiting.put_nowait((i, tried))
          continue
        try:
          answers[i] = await self._answer(server, questions[i])
        except Again as again:
          elsewhere = any(other.well.is_set() for other in self._servers if other is not server)
          if tried == self._retries and not elsewhere:
            where = f"{server.shown}: " if len(self._servers) > 1 else ""
            raise self.fault(f"{where}{again}", again.error) from again
          server.failures += first or server.well.is_set()
          server.well.clear()
          server.due = time.monotonic() + min(max(again.pause, 0.1 * 2 ** server.failures), PAUSE)
          waiting.put_nowait((i, tried + (not elsewhere)))
        else:
          server.failures = 0
          server.well.set()
          if len(answers) == len(questions):
            done.set()

    for server in self._servers:
      if not server.failures:
        server.well.set()
    workers = [asyncio.ensure_future(work(server, first=not k))
               for k in range(self._parallel) for server in self._servers]
    end = asyncio.ensure_future(done.wait())
    try:
      if questions:
        ended, _ = await asyncio.wait([end, *workers], return_when=asyncio.FIRST_COMPLETED)
        for worker in ended - {end}:
          worker.result()                        # raises
    finally:
      for task in (end, *workers):
        task.cancel()
      await asyncio.gather(end, *workers, return_exceptions=True)
    return [answers[i] for i in range(len(questions))]

  async def _answer(self, server, question):
    while True:
      content = await asyncio.to_thread(question.content)
      try:
        async with asyncio.timeout(self._timeout):
          status, reason, pause, body = await self._post(server, content, question.most)
      except TimeoutError as error:
        raise Again(f"no answer: timed out after {self._timeout:g} s") from error
      except (ValueError, httpx.InvalidURL) as error:
        raise self.fault("is no URL, or redirects to none", error) from error
      except (httpx.HTTPError, httpx.StreamError, OSError) as error:
        raise Again("no answer", error) from error
      if status in _AGAIN:
        raise Again(f"no answer: status {status} {reason}", pause=pause)
      if not 200 <= status < 300:
        text = body.decode(errors="replace")
        if question.refused(status, text):
          continue
        says = f": {' '.join(text.split())[:300]!r}" if text.strip() else ""
        raise self.fault(f"refuses: status {status} {reason}{says}")
      if len(body) > question.most:
        raise self.fault(f"its answer is longer than {question.most} bytes, for {question.what}")
      return question.read(body)

  async def _post(self, server, content, most):
    """Status, its name, seconds to wait, and the body, or as much as shows that it is too long."""
    target = server.url
    for _ in range(_HOPS):
      async with self._http.stream("POST", target, content=content, auth=(
          server.auth or httpx.USE_CLIENT_DEFAULT)) as answer:
        code = answer.status_code
        if answer.has_redirect_location:
          goal = answer.headers["location"]
          target = _joined(target, goal, server.host) if code in _MOVED else None
          if target is None:
            raise self.fault(f"redirects ({code}) to {hidden(goal)[:200]!r}; write the URL that "
                             "answers itself")
          continue
        body, most = b"", most if answer.is_success else _REFUSAL
        async for piece in answer.aiter_bytes():
          body += piece
          if len(body) > most:
            break
        return code, _phrase(code), _seconds(answer.headers.get("Retry-After")), body
    raise self.fault(f"redirects more than {_HOPS} times")


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
  """The event loop of this process's clients, in a thread: notebooks have one of their own."""
  loop = asyncio.new_event_loop()
  threading.Thread(target=loop.run_forever, daemon=True, name="jaxalign http").start()
  return loop


def host_of(url: str) -> tuple:
  """Scheme, name and port; ValueError if one is wrong."""
  parts = urllib.parse.urlsplit(url)
  ports = {"http": 80, "https": 443}
  if parts.scheme not in ports or not parts.hostname:
    raise ValueError("neither http nor https, or no host")
  parts.hostname.encode("idna")
  try:
    httpx.URL(url)
  except httpx.InvalidURL as error:
    raise ValueError(str(error)) from error
  return parts.scheme, parts.hostname, parts.port or ports[parts.scheme]


def _joined(url: str, goal: str, host: tuple) -> str | None:
  """Where a redirect to `goal` leads to; None where that is not on `host`."""
  with contextlib.suppress(ValueError):
    url = urllib.parse.urljoin(url, goal)
    return url if host_of(url) == host else None


def _netrc(url: str) -> httpx.Auth | None:
  """What ~/.netrc, or the file that NETRC names, has for hosts of URLs without credentials."""
  if urllib.parse.urlsplit(url).username is None:
    with contextlib.suppress(OSError, netrc.NetrcParseError):
      return httpx.NetRCAuth(os.environ.get("NETRC") or os.path.expanduser("~/.netrc"))
  return None


def _phrase(code: int) -> str:
  """The standard's name of a status; what the server calls it may be anything."""
  return http.HTTPStatus(code).phrase if code in set(http.HTTPStatus) else ""


def _seconds(text: str | None) -> float:
  """A Retry-After in seconds, 0 where it is none or a date."""
  return float(text) if text and text.isascii() and text.isdigit() else 0.0
