"""A reward behind HTTP, asked of a server in this process."""
import base64
import contextlib
import http.server
import io
import json
import os
import signal
import sys
import threading
import time
import types

import numpy as np
import pytest
from PIL import Image

import runs
from jaxalign.devices import callbacks
from jaxalign.errors import UserError
from jaxalign.rewards import client, make_reward
from local_server import Local

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3)).astype(np.uint8)
PROMPTS = ["a cat", "a dog", "a cat", "naïve", "a bird"]


class Server(Local):
  """Scores by mean brightness plus the prompt's length; `mode` says how it misbehaves."""
  mode, requests, refusals, code = "", (), 0, 307

  def __enter__(self):
    self.requests = []
    return super().__enter__()

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_address[1]}/score"


class Handler(http.server.BaseHTTPRequestHandler):

  def do_POST(self):
    content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    server = self.server
    server.requests.append(len(content["prompts"]))
    if server.refusals:
      server.refusals -= 1
      return self.answer(503, b"later", **{"Retry-After": "99999"})
    if server.mode == "slow":
      time.sleep(1.5)
    if server.mode.startswith(("http", "ftp", "/")):
      if self.path != "/final":
        return self.answer(server.code, b"", location=server.mode)
    if server.mode == "drip":
      self.answer(200, b"")
      for _ in range(100):
        self.wfile.write(b" ")
        time.sleep(0.05)
    server.headers = dict(self.headers)
    scores = [float(np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))).mean()) + len(text)
              for image, text in zip(content["images"], content["prompts"], strict=True)]
    answers = {"nan": '{"scores": [%s]}' % ", ".join(["NaN"] * len(scores)), "text": "hello",
               "other": '{"rewards": []}', "few": json.dumps({"scores": scores[1:]}),
               "deep": '{"scores":' + "[" * 20000, "ragged": '{"scores": [[1], [1, 2], 3, 4, 5]}',
               "endless": " " * 10 ** 6, "not utf-8": "\udcff", "null": "null",
               "huge": '{"scores": [%s]}' % ", ".join(["1" * 5000] * len(scores)),
               "words": json.dumps({"scores": ["high"] * len(scores)})}
    code = 404 if server.mode == "gone" else 200
    self.answer(code, answers.get(server.mode, json.dumps({"scores": scores})).encode(
        errors="surrogateescape"))

  def answer(self, code, content, **headers):
    self.send_response(code)
    for key, value in headers.items():
      self.send_header(key, value)
    self.end_headers()
    self.wfile.write(content)

  def log_message(self, *_):
    pass


@pytest.fixture
def server():
  with Server(("127.0.0.1", 0), Handler) as server:
    yield server


def score(url):
  reward = make_reward((url,), (2.0,))
  return reward.score(IMAGES, PROMPTS)


def test_scores_in_order_and_in_batches(server):
  expected = IMAGES.mean((1, 2, 3)) + [len(prompt) for prompt in PROMPTS]
  np.testing.assert_allclose(score(f"{server.url}#batch=2"), 2 * expected, rtol=1e-6)
  assert sorted(server.requests) == [1, 2, 2]
  np.testing.assert_allclose(score(server.url), 2 * expected, rtol=1e-6)
  assert server.requests[3:] == [5]


def test_a_busy_server_is_asked_again(server, monkeypatch):
  """And is waited for no longer than is reasonable, whatever it asks for."""
  server.refusals = 2
  monkeypatch.setattr(client, "PAUSE", 0.1)
  assert np.isfinite(score(server.url)).all()
  assert server.requests == [5, 5, 5]


@pytest.mark.parametrize("mode, settings, words", [
    ("slow", "timeout=0.3&retries=0", "timed out"), ("gone", "", "404"), ("nan", "", "not finite"),
    ("text", "", "not JSON"), ("other", "", "no \"scores\""), ("few", "", "one score for each"),
    ("words", "", "not real numbers"), ("deep", "", "not JSON"), ("ragged", "", "one score for"),
    ("endless", "", "longer than"), ("not utf-8", "", "not JSON"), ("null", "", "no \"scores\""),
    ("huge", "", "not JSON"), ("drip", "timeout=0.3&retries=0", "timed out"),
    ("http://localhost:1/elsewhere", "", "redirects (307) to 'http://localhost:1/elsewhere'"),
    ("http://", "", "redirects"), ("http://[", "", "redirects"), ("ftp://a/b", "", "redirects"),
    ("/score", "", "redirects more than")])
def test_what_a_server_does_wrong(server, mode, settings, words):
  server.mode, begun = mode, time.monotonic()
  with pytest.raises(UserError) as error:
    score(f"{server.url}#{settings}")
  assert time.monotonic() - begun < 5 and "\n" not in str(error.value)
  assert server.url in str(error.value) and words in str(error.value)


def test_no_server():
  with pytest.raises(UserError, match="127.0.0.1"):
    score("http://127.0.0.1:9/score#retries=1")


def test_refusals_end(server, monkeypatch):
  server.refusals = 99
  monkeypatch.setattr(client, "PAUSE", 0.1)
  with pytest.raises(UserError, match="503"):
    score(f"{server.url}#retries=1")
  assert server.requests == [5, 5]


@pytest.mark.parametrize("settings, words", [
    ("size=3", "size is no setting"), ("batch=0", "outside"), ("batch=two", "not a number"),
    ("timeout=0", "outside"), ("timeout=inf", "outside"), ("timeout=nan", "outside"),
    ("timeout=1e30", "outside"), ("retries=-1", "outside"), ("retries=1e9", "not a number")])
def test_settings_that_are_none(settings, words):
  with pytest.raises(UserError, match=words):
    make_reward((f"http://localhost/#{settings}",), (1.0,))


def test_redirects_on_the_same_host_are_followed(server):
  server.mode = "/final"
  assert np.isfinite(score(server.url)).all()
  server.code = 302                              # would turn the POST into a GET
  with pytest.raises(UserError, match="redirects .302"):
    score(server.url)


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://h:99999/", "http://a..b/x"])
def test_what_is_no_url(url):
  with pytest.raises(UserError, match="is no URL"):
    make_reward((url,), (1.0,)).score(IMAGES, PROMPTS)


def test_credentials_are_sent_and_never_written(server):
  name = server.url.replace("//", "//me:s3cr%21t@") + "?model=7&api_key=hunter2#batch=5"
  reward = make_reward((name,), (1.0,))
  assert np.isfinite(reward.score(IMAGES, PROMPTS)).all()
  assert base64.b64decode(server.headers["Authorization"].split()[1]) == b"me:s3cr!t"
  shown = server.url.replace("//", "//***@") + "?model=7&api_key=***#batch=5"
  assert list(reward.weights) == [reward.name] == [shown]
  server.mode = "gone"
  messages = []
  for broken in (name, name.replace(str(server.server_address[1]), "9") + "&retries=0"):
    with pytest.raises(UserError) as error:
      make_reward((broken,), (1.0,)).score(IMAGES, PROMPTS)
    messages.append(str(error.value))
  config = runs.smoke("ddpo", reward__names=(name,))
  for text in (*messages, json.dumps(config.to_dict())):
    assert "***" in text and not any(s in text for s in ("s3cr", "hunter2")), text
  assert config.reward.names == (name,)
  with pytest.raises(UserError, match="twice"):    # what tells them apart could not be written
    make_reward((name, name.replace("hunter2", "other")), (1.0, 1.0))


def test_interrupts_do_not_wait_for_the_server(server):
  server.mode = "drip"
  timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
  # A process that was started in the background may ignore it.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  begun = time.monotonic()
  timer.start()
  try:
    with pytest.raises(KeyboardInterrupt):
      score(f"{server.url}#timeout=30")
  finally:
    signal.signal(signal.SIGINT, before)
    callbacks.forget()                    # or what runs next in this process would end as well
  assert time.monotonic() - begun < 5


# ---- the example of docs/rewards.md --------------------------------------------------------------


@pytest.fixture
def example():
  """The server of the documentation, as a module."""
  text = (runs.ROOT / "docs" / "rewards.md").read_text()
  module = types.ModuleType("scorer_server")
  exec(text.split("```python\n")[1].split("```")[0], module.__dict__)
  return module


@contextlib.contextmanager
def serving(scorer):
  thread = threading.Thread(target=scorer.serve_forever, daemon=True)
  thread.start()
  try:
    yield f"http://127.0.0.1:{scorer.server_address[1]}"
  finally:
    scorer.shutdown()
    scorer.server_close()


def brightness(images):
  return images.astype(np.float64).mean((1, 2, 3))


def test_the_documented_server_of_hpsv3(example, monkeypatch):
  """A stand-in for the package has its call; images and prompts arrive in order."""
  class Inferencer:
    def __init__(self, device):
      assert device == "cuda"

    def reward(self, prompts, image_paths):
      return [[np.float32(np.asarray(image).mean() + len(prompt)), np.float32(0)]
              for prompt, image in zip(prompts, image_paths, strict=True)]
  package = types.ModuleType("hpsv3")
  package.HPSv3RewardInferencer = Inferencer
  monkeypatch.setitem(sys.modules, "hpsv3", package)
  with serving(example.serve(example.hpsv3(), 0)) as url:
    found = make_reward((f"{url}/hpsv3#batch=2",), (1.0,)).score(IMAGES, PROMPTS)
  np.testing.assert_allclose(found, brightness(IMAGES) + list(map(len, PROMPTS)), rtol=1e-5)


def test_the_documented_server_of_a_judge_in_words(example):
  """A stand-in for the chat server answers in a sentence; one that answers nonsense is shown."""
  asked = []

  class Chat(http.server.BaseHTTPRequestHandler):
    log_message = Handler.log_message

    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      image, text = body["messages"][0]["content"]
      asked.append((self.path, text["text"]))
      png = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
      mean = np.asarray(Image.open(io.BytesIO(png))).mean()
      words = "I like it." if "bird" in text["text"] else f"Nice. Final Score: {mean / 60:.2f}."
      self.send_response(200)
      self.end_headers()
      self.wfile.write(json.dumps({"choices": [{"message": {"content": words}}]}).encode())
  with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Chat)) as chat:
    with serving(example.serve(example.unified(chat), 0)) as url:
      reward = make_reward((f"{url}/unified#retries=0",), (1.0,))
      found = reward.score(IMAGES[:4], PROMPTS[:4])
      np.testing.assert_allclose(found, brightness(IMAGES[:4]) / 60, atol=6e-3)
      with pytest.raises(UserError, match="500"):
        reward.score(IMAGES, PROMPTS)
  assert asked[0][0] == "/v1/chat/completions" and any("[naïve]" in text for _, text in asked)
