"""The page and its server: Starlette under uvicorn, one link with a secret for each voter.

Nothing is served by path: the page's files are in memory, pictures go by digest, and the
secret of the link names the voter. Requests of other origins and, on a loopback address, of other
host names are refused; bodies are limited.
"""
import asyncio
import contextlib
import hmac
import json
import pathlib
import secrets
import socket
import threading
import time
import urllib.parse

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from jaxalign.config.credentials import is_loopback
from jaxalign.errors import UserError
from jaxalign.storage.files import whole
from jaxalign.votes.ballot import Ballot, Unknown
from jaxalign.votes.gallery import picture_file

PAGE = pathlib.Path(__file__).resolve().parent / "page"
MAX_BODY = 2048            # bytes; a vote has about 70
_BODY_SECONDS = 10.0
_TYPES = {"vote.html": "text/html", "vote.css": "text/css", "vote.js": "text/javascript",
          "vote.svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self'; "
                               "script-src 'self'; connect-src 'self'; base-uri 'none'; "
                               "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin"}


def open_links(folder: pathlib.Path, voters: list[str]) -> dict[str, str]:
  """`voter -> secret`, kept in `FOLDER/links.json` (mode 0600), so that links outlive a restart."""
  file = folder / "links.json"
  try:
    links = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    links = {name: links.get(name) or secrets.token_urlsafe(24) for name in [*links, *voters]}
    with whole(file) as partial:
      partial.touch(mode=0o600)
      partial.write_text(json.dumps(links, indent=1) + "\n", encoding="utf-8")
  except (OSError, ValueError, AttributeError, RecursionError) as error:
    raise UserError(f"{file}: {error}") from error
  return {name: links[name] for name in voters}


def make_app(ballot: Ballot, folder: pathlib.Path, links: dict[str, str],
             decided=lambda: False, loopback: bool = True):
  """The ASGI application.

  Args:
    links: `voter -> secret`.
    decided: whether the vote may end early; asked before each new pair.
    loopback: only requests for localhost and loopback addresses are answered.
  """
  files = {name: (PAGE / name).read_bytes() for name in _TYPES}
  known = {picture.digest for picture in ballot.gallery.pictures}

  def voter_of(request: Request) -> str | None:
    given, found = request.path_params["secret"].encode(), None
    for voter, secret in links.items():
      if hmac.compare_digest(given, secret.encode()):
        found = voter
    return found

  def state(voter: str) -> dict:
    over = decided()
    ask = None if over else ballot.next(voter)
    answer = {"voter": voter, "done": ballot.done(voter), "total": ballot.total,
              "undo": ballot.latest(voter), "decided": over}
    if ask:
      left, right = (ballot.gallery.pictures[i] for i in ballot.sides(ask))
      answer |= {"ask": ask.id, "prompt": ballot.gallery.prompts[left.prompt],
                 "left": left.digest, "right": right.digest}
    return answer

  def page(request: Request) -> Response:
    if voter_of(request) is None:
      return _refuse(404, "This link is not valid. Ask for yours.")
    return Response(files["vote.html"], media_type="text/html")

  def static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _TYPES:
      return _refuse(404, "no such file")
    return Response(files[name], media_type=_TYPES[name])

  def ask(request: Request) -> Response:
    voter = voter_of(request)
    return _refuse(404, "unknown link") if voter is None else JSONResponse(state(voter))

  def picture(request: Request) -> Response:
    digest = request.path_params["digest"]
    if voter_of(request) is None or digest not in known:
      return _refuse(404, "no such picture")
    return Response(picture_file(folder, digest).read_bytes(), media_type="image/png",
                    headers={"Cache-Control": "private, max-age=86400, immutable"})

  async def change(request: Request) -> Response:
    voter = voter_of(request)
    if voter is None:
      return _refuse(404, "unknown link")
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
      return _refuse(415, "votes are JSON")
    try:
      body = json.loads(await asyncio.wait_for(_body(request), _BODY_SECONDS))
      ask_id, choice = body["ask"], body.get("choice", "undo")
      if not isinstance(ask_id, str) or not isinstance(choice, str):
        raise TypeError
    except OverflowError:
      return _refuse(413, "too long")
    except TimeoutError:
      return _refuse(408, "too slow")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
      return _refuse(400, "not a vote")

    def act():
      if choice == "undo":
        ballot.undo(voter, ask_id)
      else:
        ballot.vote(voter, ask_id, choice)
      return state(voter)
    try:
      return JSONResponse(await run_in_threadpool(act))
    except Unknown:
      return _refuse(409, "not what you were asked")
    except OSError as error:
      return _refuse(507, f"the vote could not be saved: {error.strerror or error}")

  app = Starlette(routes=[
      Route("/v/{secret}/", page), Route("/v/{secret}/ask", ask),
      Route("/v/{secret}/vote", change, methods=["POST"]),
      Route("/v/{secret}/picture/{digest}", picture), Route("/page/{name}", static)])
  return _guarded(app, loopback)


def _guarded(app, loopback: bool):
  """Refuses foreign hosts and origins; adds the headers that every answer has."""
  async def guarded(scope, receive, send):
    if scope["type"] != "http":
      await app(scope, receive, send)
      return

    async def send_with(message):
      if message["type"] == "http.response.start":
        have = {name.lower() for name, _ in message["headers"]}
        extra = {**_HEADERS, "Cache-Control": "no-store"}
        message["headers"] = [*message["headers"], *(
            (k.lower().encode(), v.encode()) for k, v in extra.items()
            if k.lower().encode() not in have)]
      await send(message)
    request = Request(scope)
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    site = request.headers.get("sec-fetch-site", "none")
    opened = request.method == "GET" and request.headers.get("sec-fetch-mode") == "navigate"
    if loopback and not is_loopback(urllib.parse.urlsplit(f"//{host}").hostname or ""):
      refusal = _refuse(403, "this server answers on localhost only")
    elif origin is not None and urllib.parse.urlsplit(origin).netloc != host:
      refusal = _refuse(403, "requests from other sites are refused")
    elif site not in ("none", "same-origin") and not opened:
      refusal = _refuse(403, "requests from other sites are refused")
    else:
      refusal = app
    await refusal(scope, receive, send_with)
  return guarded


async def _body(request: Request) -> bytes:
  content = b""
  async for chunk in request.stream():
    content += chunk
    if len(content) > MAX_BODY:
      raise OverflowError
  return content


def _refuse(status: int, text: str) -> Response:
  return PlainTextResponse(text + "\n", status)


@contextlib.contextmanager
def serving(app, host: str, port: int):
  """Serves `app` from a thread; yields the port (one that is free, for `port` 0).

  Raises:
    UserError: the address cannot be had.
  """
  try:
    listener = socket.create_server(
        (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=256)
  except OSError as error:
    raise UserError(f"--host={host} --port={port}: {error.strerror or error}") from error
  server = uvicorn.Server(uvicorn.Config(
      app, log_level="warning", access_log=False, lifespan="off", limit_concurrency=512,
      timeout_graceful_shutdown=3, server_header=False))
  thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
  thread.start()
  while not server.started and thread.is_alive():
    time.sleep(0.01)
  try:
    yield listener.getsockname()[1]
  finally:
    server.should_exit = True
    thread.join(10)
    listener.close()
