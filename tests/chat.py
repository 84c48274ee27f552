"""A judge in this process that speaks the chat API as vLLM documents it, and one that misbehaves.

The truth: P("yes") of a picture is its mean brightness in [0, 1]; of two pictures, the first is
better with the probability that the brighter one's share of their brightness says.
"""
import base64
import http.server
import io
import json
import math
import time

import numpy as np
from PIL import Image

from local_server import Local


class Chat(Local):
  """Answers with log-probabilities; `mode` says how it misbehaves, `refusals` how often it is busy.

  `requests` holds what it was asked, `headers` how.
  """
  daemon_threads = True

  def __init__(self, port: int = 0):
    super().__init__(("127.0.0.1", port), _Handler)
    self.mode, self.requests, self.headers, self.refusals, self.most = "", [], [], 0, 20
    self.word, self.bias, self.location, self.busy = None, 0.0, "", (503, {})

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_address[1]}/v1"

  def chances(self, request) -> dict[str, float]:
    """Tokens that the answer may begin with."""
    parts = request["messages"][0]["content"]
    light = [pixels(part).mean() / 255 for part in parts if part["type"] == "image_url"]
    if len(light) == 2:
      first = min(max(light[0] / max(sum(light), 1e-9) + self.bias, 0.0), 1.0)
      return {"1": first, "2": 1 - first}
    return {"Yes": 0.6 * light[0], " yes": 0.3 * light[0], "YES": 0.1 * light[0],
            "No": 0.9 * (1 - light[0]), "no": 0.1 * (1 - light[0])}


def pixels(part) -> np.ndarray:
  head, _, data = part["image_url"]["url"].partition(",")
  assert head == "data:image/png;base64"
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def place(token: str, chances: dict[str, float], most: int) -> dict:
  """One token in vLLM's schema."""
  entry = lambda token, p: {"token": token, "logprob": math.log(p) if p else -9999.0,
                            "bytes": list(token.encode())}
  listed = sorted(chances.items(), key=lambda item: -item[1])[:most]
  return {**entry(token, chances.get(token, 0.0)), "top_logprobs": [entry(*one) for one in listed]}


class _Handler(http.server.BaseHTTPRequestHandler):

  def do_POST(self):
    server = self.server
    request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    server.headers.append(dict(self.headers))
    if self.path != "/v1/chat/completions":
      return self.refuse(404, "Not Found")
    server.requests.append(request)
    if server.refusals:
      server.refusals -= 1
      code, headers = server.busy
      return self.refuse(code, "later", **headers)
    wanted = request.get("top_logprobs", 0) if request.get("logprobs") else 0
    if server.mode == "no logprobs" and "logprobs" in request:
      return self.refuse(400, "[{'type': 'extra_forbidden', 'loc': ('body', 'logprobs')}]")
    if wanted > server.most:
      return self.refuse(400, f"Requested sample logprobs of {wanted}, which is greater than max "
                              f"allowed: {server.most}", param="top_logprobs")
    if server.mode == "always logprobs":
      return self.refuse(400, "logprobs!")
    chances = server.chances(request)
    word = server.word or max(chances, key=chances.get)
    places = [place(" ", {" ": 0.9, **{k: v / 10 for k, v in chances.items()}}, wanted or 1),
              place(word, chances if server.word is None else {word: 0.9}, wanted or 1),
              place(".", {".": 1.0}, wanted or 1)]
    logprobs = {"content": places} if wanted and server.mode != "without" else None
    getattr(self, server.mode.replace(" ", "_"), self.whole)(f" {word}.", logprobs, request)

  def whole(self, text, logprobs, request):
    if request.get("stream"):
      return self.stream(text, logprobs, request)
    self.send(200, json.dumps({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": request["model"],
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text},
                     "logprobs": logprobs, "finish_reason": "stop", "stop_reason": None}],
        "usage": {"prompt_tokens": 5, "total_tokens": 8, "completion_tokens": 3}}).encode())

  def events(self, text, logprobs):
    """The stream's pieces, the way vLLM cuts it."""
    piece = lambda **choice: {"id": "chatcmpl-1", "object": "chat.completion.chunk",
                              "choices": [{"index": 0, "finish_reason": None, **choice}]}
    yield piece(delta={"role": "assistant", "content": ""})
    for i, token in enumerate([text[0], text[1:-1], text[-1]]):
      yield piece(delta={"content": token},
                  logprobs=logprobs and {"content": logprobs["content"][i:i + 1]},
                  finish_reason="stop" if i == 2 else None)
    yield {"id": "chatcmpl-1", "choices": [], "usage": {"total_tokens": 8}}

  def stream(self, text, logprobs, request):
    lines = [f"data: {json.dumps(event)}\r\n\r\n" for event in self.events(text, logprobs)]
    self.send(200, "".join([": ping\n\n", *lines, "data: [DONE]\n\n"]).encode(),
              **{"Content-Type": "text/event-stream"})

  def cut_stream(self, text, logprobs, request):
    first = json.dumps(next(self.events(text, logprobs)))
    self.send(200, f"data: {first}\n\ndata: {first[:20]}".encode())

  def bad_stream(self, text, logprobs, request):
    self.send(200, b'data: {"error": {"message": "the engine died", "code": 500}}\n\n')

  def huge(self, *_):
    self.send(200, b" " * 10 ** 6)

  def moved(self, *_):
    self.send(307, b"", location=self.server.location)

  def hang(self, *_):
    time.sleep(1.0)

  def drip(self, *_):
    self.send(200, b"")
    for _ in range(40):
      self.wfile.write(b" ")
      time.sleep(0.05)

  def short(self, text, logprobs, request):
    self.send_response(200)
    self.send_header("Content-Length", "99999")
    self.end_headers()
    self.wfile.write(b'{"choices": [')

  def garbage(self, *_):
    self.send(200, b"<html>welcome</html>")

  def empty(self, *_):
    self.send(200, b'{"choices": []}')

  def odd(self, *_):
    self.send(200, b'{"choices": [{"message": {"content": "yes"}, "logprobs": {"content": [7]}}]}')

  def error(self, *_):
    self.send(200, b'{"object": "error", "message": "out of memory", "code": 500}')

  def echo(self, *_):
    self.refuse(401, f"wrong key {self.headers.get('Authorization')}")

  def refuse(self, code, message, param=None, **headers):
    self.send(code, json.dumps({"error": {
        "message": message, "type": "BadRequestError", "param": param, "code": code}}).encode(),
        **headers)

  def send(self, code, content, **headers):
    self.send_response(code)
    for key, value in {"Content-Type": "application/json", **headers}.items():
      self.send_header(key, value)
    self.end_headers()
    self.wfile.write(content)

  def log_message(self, *_):
    pass
