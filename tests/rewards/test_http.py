"""A reward behind HTTP, asked of a server in this process."""
import base64
import http.server
import io
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image

from jaxalign.errors import UserError
from jaxalign.rewards import make_reward

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3)).astype(np.uint8)
PROMPTS = ["a cat", "a dog", "a cat", "naïve", "a bird"]


class Server(http.server.ThreadingHTTPServer):
  """Scores by mean brightness plus the prompt's length; `mode` says how it misbehaves."""
  mode, requests, refusals = "", (), 0

  def __enter__(self):
    self.requests = []
    threading.Thread(target=self.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *error):
    self.shutdown()
    super().__exit__(*error)

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
      return self.answer(503, b"later")
    if server.mode == "slow":
      time.sleep(1.5)
    scores = [float(np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))).mean()) + len(text)
              for image, text in zip(content["images"], content["prompts"], strict=True)]
    answers = {"nan": '{"scores": [%s]}' % ", ".join(["NaN"] * len(scores)), "text": "hello",
               "other": '{"rewards": []}', "few": json.dumps({"scores": scores[1:]}),
               "words": json.dumps({"scores": ["high"] * len(scores)})}
    code = 404 if server.mode == "gone" else 200
    self.answer(code, answers.get(server.mode, json.dumps({"scores": scores})).encode())

  def answer(self, code, content):
    self.send_response(code)
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


def test_a_busy_server_is_asked_again(server):
  server.refusals = 2
  assert np.isfinite(score(server.url)).all()
  assert server.requests == [5, 5, 5]


@pytest.mark.parametrize("mode, settings, words", [
    ("slow", "timeout=0.3&retries=0", "timed out"), ("gone", "", "404"), ("nan", "", "not finite"),
    ("text", "", "not JSON"), ("other", "", "no \"scores\""), ("few", "", "one score for each"),
    ("words", "", "not real numbers")])
def test_what_a_server_does_wrong(server, mode, settings, words):
  server.mode = mode
  with pytest.raises(UserError) as error:
    score(f"{server.url}#{settings}")
  assert server.url in str(error.value) and words in str(error.value)


def test_no_server():
  with pytest.raises(UserError, match="127.0.0.1"):
    score("http://127.0.0.1:9/score#retries=1")


def test_refusals_end(server):
  server.refusals = 99
  with pytest.raises(UserError, match="503"):
    score(f"{server.url}#retries=1")
  assert server.requests == [5, 5]


@pytest.mark.parametrize("settings, words", [
    ("size=3", "size is no setting"), ("batch=0", "too small"), ("batch=two", "not a number"),
    ("timeout=0", "too small")])
def test_settings_that_are_none(settings, words):
  with pytest.raises(UserError, match=words):
    make_reward((f"http://localhost/#{settings}",), (1.0,))
