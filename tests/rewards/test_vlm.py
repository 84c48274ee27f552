"""A judge behind the chat API, asked of servers in this process."""
import json
import shutil
import time

import numpy as np
import pytest

import runs
from chat import Chat, pixels, place
from jaxalign.devices import callbacks
from jaxalign.errors import UserError
from jaxalign.rewards import answers, client, keep_answers, make_reward, vlm

LIGHT = np.array([0.0, 0.25, 0.5, 0.9], np.float32)
IMAGES = np.round(255 * LIGHT[:, None, None, None] * np.ones((1, 4, 6, 3))).astype(np.uint8)
TRUTH = IMAGES.mean((1, 2, 3)) / 255
PROMPTS = ["a cat", "a dog & a {prompt}", "naïve", "a cat"]
ASK = "ask=Does it show {prompt}? yes or no"


@pytest.fixture
def server():
  with Chat() as server:
    yield server


@pytest.fixture
def impatient(monkeypatch):
  """Failed servers are tried again at once."""
  monkeypatch.setattr(client, "PAUSE", 0.02)


def named(server, settings=""):
  return f"vlm:{server.url}#model=m&{ASK}{settings}"


def score(name, images=IMAGES, prompts=PROMPTS):
  return make_reward((name,), (1.0,)).score(images, prompts)


def test_the_score_is_the_expected_answer(server):
  reward = make_reward((named(server, '&extra={"top_k":3,"max_tokens":null}'),), (1.0,))
  assert list(reward.weights) == ["vlm"] and "0 to 1" in reward.range
  np.testing.assert_allclose(reward.score(IMAGES, PROMPTS), TRUTH, atol=1e-6)
  asked = {request["messages"][0]["content"][1]["text"]: request for request in server.requests}
  assert set(asked) == {f"Does it show {prompt}? yes or no" for prompt in PROMPTS}
  request = asked["Does it show a dog & a {prompt}? yes or no"]
  np.testing.assert_array_equal(pixels(request["messages"][0]["content"][0]), IMAGES[1])
  assert request["model"] == "m" and request["temperature"] == 0 and request["top_k"] == 3
  assert request["logprobs"] is True and request["top_logprobs"] == 20
  assert "max_tokens" not in request and "stream" not in request
  reward.score(IMAGES, PROMPTS)
  assert len(server.requests) == 4                 # nothing is asked twice


@pytest.mark.parametrize("text, expected", [
    ("yes,no", {"yes": 1.0, "no": 0.0}), ("1..3", {"1": 1.0, "2": 2.0, "3": 3.0}),
    ("Good, fair,BAD", {"good": 1.0, "fair": 0.5, "bad": 0.0}), ("0,5", {"0": 0.0, "5": 5.0}),
    ("1..10", "begins another"), ("yes", "2 to 20"), ("a,,b", "2 to 20"), ("yes,Yes", "begins"),
    ("9..1", "2 to 20"), ("1..9999", "2 to 20")])
def test_answers(text, expected):
  if isinstance(expected, dict):
    assert vlm.read_answers(text) == expected
  else:
    with pytest.raises(UserError, match=expected):
      vlm.read_answers(text)


def test_expected_value_by_hand():
  values = {"1": 1.0, "2": 2.0, "3": 3.0}
  listed = [("1", np.log(0.2)), ("\u0120" "1", np.log(0.2)), ("3", np.log(0.4)), ("x", np.log(0.2))]
  assert vlm.expected([("\n", [("3", 0.0)]), ("3", listed)], values) == pytest.approx(1.6 / 0.8)
  assert vlm.expected([("x", [("1", np.log(0.49)), ("x", np.log(0.5))])], values) is None
  assert vlm.expected([(" ", [("1", 0.0)])], values) is None
  # A server lists the token that was chosen apart, or beside the others.
  apart = place("2", {"2": 0.6, "3": 0.4}, 2)
  apart["top_logprobs"] = apart["top_logprobs"][1:]
  for one in (apart, place("2", {"2": 0.6, "3": 0.4}, 2)):
    places = vlm._logprobs({"logprobs": {"content": [one]}})
    assert vlm.expected(places, values) == pytest.approx(2.4)


@pytest.mark.parametrize("text, value", [
    ("Yes", 1.0), (" **No**.", 0.0), ("Yes, it shows no dog", 1.0), ("The answer is: no", 0.0),
    ("yes and no", 1.0), ("it is yes or no", None), ("maybe", None), ("", None), ("nobody", None)])
def test_what_a_text_says(text, value):
  assert vlm.spoken(text, {"yes": 1.0, "no": 0.0}) == value


@pytest.mark.parametrize("mode, most, asked, said", [
    ("no logprobs", 20, 6, "refuses"), ("without", 20, 4, "without"), ("", 5, 5, "")])
def test_servers_without_logprobs(server, capsys, mode, most, asked, said):
  """One at a time, so that the number of requests is known."""
  server.mode, server.most = mode, most
  reward = make_reward((named(server, "&parallel=1"),), (1.0,))
  exact = TRUTH if mode == "" else TRUTH >= 0.7
  np.testing.assert_allclose(reward.score(IMAGES, PROMPTS), exact, atol=1e-6)
  assert len(server.requests) == asked
  lines = [line for line in capsys.readouterr().out.splitlines() if "vlm" in line]
  assert len(lines) == bool(said) and all(said in line for line in lines)
  reward.score(IMAGES + 1, PROMPTS)
  assert len(server.requests) == asked + 4 and not capsys.readouterr().out


@pytest.mark.parametrize("mode", ["", "without"])
def test_event_streams_say_the_same(server, mode):
  server.mode = mode
  name = named(server, '&extra={"stream":true}')
  np.testing.assert_allclose(score(name), TRUTH if not mode else TRUTH >= 0.7, atol=1e-6)
  assert all(request["stream"] for request in server.requests)


def test_a_busy_server_is_asked_again(server, monkeypatch):
  monkeypatch.setattr(client, "PAUSE", 0.3)
  server.refusals, server.busy = 2, (429, {"Retry-After": "99999"})
  begun = time.monotonic()
  np.testing.assert_allclose(score(named(server, "&parallel=1")), TRUTH, atol=1e-6)
  assert len(server.requests) == 6 and time.monotonic() - begun > 0.6


@pytest.mark.parametrize("mode, words", [
    ("hang", "timed out"), ("drip", "timed out"), ("short", "no answer"), ("huge", "longer than"),
    ("garbage", "not JSON"), ("empty", "no message"), ("error", "out of memory"),
    ("cut stream", "breaks off"), ("bad stream", "the engine died"), ("moved", "redirects"),
    ("always logprobs", "400"), ("echo", "401")])
def test_what_a_server_does_wrong(server, impatient, mode, words):
  server.mode, server.location = mode, "http://localhost:1/v1"
  begun = time.monotonic()
  with pytest.raises(UserError) as error:
    score(named(server, "&timeout=0.3&retries=1&parallel=2"))
  assert time.monotonic() - begun < 5 and "\n" not in str(error.value)
  assert server.url in str(error.value) and words in str(error.value)
  if mode in ("short", "cut stream", "bad stream"):        # which another attempt may mend
    assert len(server.requests) > 2


def test_odd_logprobs_are_none(server):
  server.mode = "odd"
  np.testing.assert_array_equal(score(named(server)), 1.0)


def test_dead_servers_are_left_out_and_tried_again(server, impatient):
  with Chat() as other:
    port = other.server_address[1]
  name = f"vlm:{server.url},http://127.0.0.1:{port}/v1#model=m&{ASK}"
  reward = make_reward((name,), (1.0,))
  images = np.arange(160, dtype=np.uint8)[:, None, None, None] * np.ones((4, 4, 3), np.uint8)
  expected = images.mean((1, 2, 3)) / 255
  np.testing.assert_allclose(reward.score(images, ["a"] * 160), expected, atol=1e-6)
  assert len(server.requests) == 160
  with Chat(port) as other:
    np.testing.assert_allclose(reward.score(images, ["b"] * 160), expected, atol=1e-6)
    assert len(other.requests) > 20 and len(other.requests) + len(server.requests) == 320
  with pytest.raises(UserError, match=f"127.0.0.1:{port}.*no answer"):
    score(f"vlm:http://127.0.0.1:{port}#model=m&{ASK}&retries=1")


def test_the_key_is_sent_and_never_written(server, monkeypatch, tmp_path):
  monkeypatch.setenv("JUDGE_KEY", "sk-s3cr3t")
  name = named(server, "&key=JUDGE_KEY")
  reward = make_reward((name,), (1.0,))
  keep_answers(reward, tmp_path)
  reward.score(IMAGES, PROMPTS)
  assert {headers["Authorization"] for headers in server.headers} == {"Bearer sk-s3cr3t"}
  server.mode = "echo"
  with pytest.raises(UserError, match=r"Bearer \*\*\*") as error:
    reward.score(IMAGES + 1, PROMPTS)
  server.mode, server.word = "", "sk-s3cr3t"
  reward.score(IMAGES[:1] + 2, PROMPTS[:1])
  config = runs.smoke("ddpo", reward__names=(name,))
  written = "".join(file.read_text() for file in tmp_path.rglob("*.jsonl"))
  assert "***" in written
  for text in (str(error.value), json.dumps(config.to_dict()), written, reward.name):
    assert "s3cr3t" not in text
  assert "JUDGE_KEY" in json.dumps(config.to_dict())


@pytest.mark.parametrize("url, settings, words", [
    ("http://h:1", f"model=m&{ASK}&key=JUDGE_KEY", "https or to this machine"),
    ("https://me:pw@h", f"model=m&{ASK}&key=JUDGE_KEY", "credentials of its own"),
    ("https://h", f"model=m&{ASK}&key=NO_SUCH_KEY", "not set"),
    ("https://h", f"model=m&{ASK}&key=sk-abc", "never a key itself"),
    ("https://h", ASK, "model is missing"), ("https://h", "model=m", "ask is missing"),
    ("https://h", f"model=m&{ASK}&extra=[1]", "no object"),
    ("https://h", f"model=m&{ASK}&extra={{", "not JSON"),
    ("https://h", f'model=m&{ASK}&extra={{"messages":[]}}', "messages is not"),
    ("https://h", "model=m&ask=@no/file", "cannot be read"), ("h", f"model=m&{ASK}", "is no URL"),
    ("https://h,http://", f"model=m&{ASK}", "is no URL"),
    ("http://[::1", f"model=m&{ASK}", "is no URL"),
    ("https://h", f"model=m&{ASK}&tokens=0", "outside"),
    ("https://h", f"model=m&{ASK}&size=1", "no setting"),
    ("https://h", f"model=m&{ASK}&answers=yes", "2 to 20")])
def test_names_that_are_none(monkeypatch, url, settings, words):
  monkeypatch.setenv("JUDGE_KEY", "sk-s3cr3t")
  with pytest.raises(UserError) as error:
    make_reward((f"vlm:{url}#{settings}",), (1.0,))
  message = str(error.value)
  assert words in message and "\n" not in message
  assert not any(secret in message for secret in ("s3cr3t", "sk-abc", "pw@"))


def test_credentials_of_several_urls_are_hidden():
  name = f"vlm:http://me:one@h/v1,http://g/v1?token=two#model=m&{ASK}&name=mine"
  reward = make_reward((name,), (1.0,))
  assert list(reward.weights) == ["mine"]
  text = json.dumps(runs.smoke("ddpo", reward__names=(name,)).to_dict())
  assert "one@" not in text and "two" not in text and "***@h/v1,http://g/v1?token=***" in text


def test_unparsable_answers(server, tmp_path):
  callbacks.forget()
  reward = make_reward((named(server),), (1.0,))
  images = np.arange(97, dtype=np.uint8)[:, None, None, None] * np.ones((4, 4, 3), np.uint8)
  reward.score(images, ["a"] * 97)
  assert callbacks.numbers() == {"train/reward_unparsable": 0.0}
  server.word = "perhaps"
  np.testing.assert_array_equal(reward.score(IMAGES[:3], PROMPTS[:3]), 0.5)   # 3 %: the middle
  assert callbacks.numbers() == {"train/reward_unparsable": 3.0}
  with pytest.raises(UserError, match="7 of 104 answers are none of yes, no.*perhaps.*perhaps"):
    reward.score(IMAGES + 1, PROMPTS)
  callbacks.forget()


def test_answers_are_kept(server, tmp_path, monkeypatch):
  def opened(name):
    reward = make_reward((name, "brightness"), (1.0, 0.0))
    keep_answers(reward, tmp_path)
    return reward
  first = opened(named(server))
  expected = first.score(IMAGES[:2], PROMPTS[:2])
  (file,) = (tmp_path / answers.FOLDER).iterdir()
  with file.open("a") as lines:                    # another process, killed as it wrote
    lines.write('["half')
  again = opened(named(server, "&timeout=7"))
  np.testing.assert_array_equal(again.score(IMAGES[:2], PROMPTS[:2]), expected)
  assert len(server.requests) == 2
  again.score(IMAGES, PROMPTS)
  opened(named(server)).score(IMAGES, PROMPTS)
  assert len(server.requests) == 4 and len(file.read_text().splitlines()) == 5
  opened(named(server, "&tokens=9")).score(IMAGES[:1], PROMPTS[:1])      # may answer otherwise
  opened(named(server)).score(IMAGES[:1], ["a fox"])
  assert len(server.requests) == 6
  file.write_text('["a", {}]\n[1, 2.0]\nnull\n["b", NaN]\n["c", 1.0]\n')
  kept = answers.Answers()
  kept.keep(tmp_path, file.name.split(".")[0])
  assert "c" in kept and "a" not in kept and "b" not in kept
  # Old answers go where there is no room for all, also while they are asked for.
  monkeypatch.setattr(answers, "MOST", 3)
  full = make_reward((named(server),), (1.0,))
  full.score(IMAGES[:3], PROMPTS[:3])
  full.score(IMAGES[1:] + 1, PROMPTS[1:])
  np.testing.assert_allclose(full.score(np.concatenate([IMAGES[:1], IMAGES[:1] + 5]),
                                        PROMPTS[:2]), [0, 5 / 255], atol=1e-6)
  for i in range(8):
    kept.add(f"k{i}", float(i))
  sizes = {len(f.read_text().splitlines()) for f in file.parent.glob(f"{file.name.split('.')[0]}*")}
  assert sizes <= {1, 2, 3} and "k7" in kept and "k0" not in kept
  later = answers.Answers()
  later.keep(tmp_path, file.name.split(".")[0])
  assert all(f"k{i}" in later for i in (5, 6, 7))


@pytest.mark.slow
def test_a_resumed_run_asks_nothing_twice(server):
  name = named(server, "&answers=yes,no")
  options = {"method": "ddpo", "reward__names": (name,), "eval__every": 0}
  whole = runs.run("vlm_whole", train__steps=2, **options)
  lines = runs.metrics(whole)
  assert lines[-1]["train/reward_unparsable"] == 0
  asked = len(server.requests)
  files = list((whole / answers.FOLDER).glob("*.jsonl"))
  assert sum(len(f.read_text().splitlines()) for f in files) == asked > 0
  (whole / "summary.json").unlink()                # as if it had been killed before its first save
  shutil.rmtree(whole / "checkpoints")
  (whole / "evaluations" / "tuned.npz").unlink()
  runs.run("vlm_whole", train__steps=2, **options)
  assert len(server.requests) == asked
  rewards = [[line["train/reward"] for line in runs.metrics(whole)], [
      line["train/reward"] for line in lines]]
  assert rewards[0] == rewards[1]
