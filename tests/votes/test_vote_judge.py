"""A vision-language model as a voter, by the command."""
import json

import numpy as np
import pytest
from PIL import Image
from vote_folders import write_samples

from chat import Chat, pixels
from jaxalign import vote
from jaxalign.config.command import run_command
from jaxalign.errors import UserError
from jaxalign.votes import judge

PROMPTS = [f"prompt {i}" for i in range(12)]


@pytest.fixture
def server():
  with Chat() as server:
    yield server


@pytest.fixture
def folders(tmp_path):
  """Those of two models; the first one's pictures are the brighter ones, but for the last two."""
  made = []
  for k in range(2):
    folder = write_samples(tmp_path / f"model{k}", PROMPTS)
    for p in range(len(PROMPTS)):
      light = 90 + 80 * ((k == 0) == (p < 10)) + p
      Image.fromarray(np.full((8, 8, 3), light, np.uint8)).save(folder / f"{p:04d}_00.png")
    made.append(folder)
  return made


def command(folders, output, *voters, alpha=0):
  first, second = folders
  vote._FLAGS.unparse_flags()                      # of the command before
  return run_command(vote.main, vote._FLAGS, required=("output",), argv=[
      "vote", f"--checkpoint={first}", f"--against={second}", f"--output={output}",
      f"--alpha={alpha}", *(f"--voter={voter}" for voter in voters)])


def test_a_model_votes_as_a_person_does(server, folders, tmp_path, capsys):
  output, name = tmp_path / "votes", f"vlm:{server.url}#model=judge"
  assert command(folders, output, name) == 0
  assert "12 pairs judged now, 0 otherwise" in capsys.readouterr().out
  verdict = json.loads((output / "verdict.json").read_text())
  assert verdict["win_rate"]["rate"] == pytest.approx(10 / 12) and verdict["voters"] == 1
  events = [json.loads(line) for line in (output / "votes.jsonl").read_text().splitlines()]
  assert [event["event"] for event in events] == ["ask", "vote"] * 12
  assert {event["voter"] for event in events} == {"judge"}
  assert not any(event["repeat"] for event in events)
  assert (output / "pairs.parquet").stat().st_size > 1000
  # Each pair in both orders, with its prompt, and none twice.
  asked = set()
  for request in server.requests:
    one, first, two, second, question = request["messages"][0]["content"]
    assert (one["text"], two["text"]) == ("Picture 1:", "Picture 2:")
    asked.add((question["text"].splitlines()[0], int(pixels(first).mean()),
               int(pixels(second).mean())))
  assert len(asked) == len(server.requests) == 24
  assert {(text, b, a) for text, a, b in asked} == asked
  assert {text.partition(": ")[2] for text, _, _ in asked} == set(PROMPTS)
  assert command(folders, output, name) == 0       # which has nothing more to ask
  assert len(server.requests) == 24


def test_what_depends_on_the_order_is_equal(server, folders, tmp_path, capsys):
  server.bias = 0.9                                # for whatever is shown first
  assert command(folders, tmp_path / "votes", f"vlm:{server.url}#model=judge") == 0
  assert "12 pairs judged now, 12 otherwise" in capsys.readouterr().out
  verdict = json.loads((tmp_path / "votes" / "verdict.json").read_text())
  assert verdict["choices"] == {"equal": 12} and verdict["win_rate"]["rate"] == 0.5


def test_a_vote_that_broke_off_goes_on(server, folders, tmp_path, capsys):
  output = tmp_path / "votes"
  names = [f"vlm:{server.url}#model=judge&retries=0&name={name}" for name in ("ann", "ben")]
  server.refusals = -9                             # counts down for ever: busy
  assert command(folders, output, *names) == 2
  assert "error: --voter: 'vlm:" in capsys.readouterr().err
  server.refusals = 0
  assert command(folders, output, *names, alpha=0.05) == 0
  verdict = json.loads((output / "verdict.json").read_text())
  assert verdict["voters"] == 2 and verdict["agreement"]["same"] == 1.0


def test_choices():
  assert judge.choose(0.8, 0.3) == "left" and judge.choose(0.4, 0.9) == "right"
  for shares in ((0.8, 0.7), (0.2, 0.3), (0.5, 0.1), (0.9, None), (None, None)):
    assert judge.choose(*shares) == "equal"


@pytest.mark.parametrize("names, words", [
    (["ann"], "takes vlm:"), (["vlm:http://h#ask=x"], "model is missing"),
    (["vlm:http://h#model=a&answers=1..3"], "must be two"),
    (["vlm:http://h#model=a", "vlm:http://g#model=a"], "two are called a")])
def test_voters_that_are_none(names, words):
  with pytest.raises(UserError, match=words):
    judge.open_voters(names)
