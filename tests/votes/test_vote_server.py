"""The server on a real loopback port: what it answers, what it refuses, and what it survives."""
import concurrent.futures
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from vote_folders import write_samples

import runs
from jaxalign.data.pairs import open_pairs
from jaxalign.votes.server import MAX_BODY, open_links
from jaxalign.votes.store import read_events

ANN = {"ann": "s" * 32}


def vote(client, ask, choice, secret=ANN["ann"], **kwargs):
  return client.post(f"/v/{secret}/vote", json={"ask": ask, "choice": choice}, **kwargs)


def test_a_whole_vote(make_vote):
  made = make_vote(repeats=0)
  with made.served(ANN) as (client, ballot):
    page = client.get(f"/v/{ANN['ann']}/")
    assert page.status_code == 200 and "a cat" not in page.text
    state, seen = client.get(f"/v/{ANN['ann']}/ask").json(), []
    while "ask" in state:
      for side in ("left", "right"):
        picture = client.get(f"/v/{ANN['ann']}/picture/{state[side]}")
        assert picture.headers["content-type"] == "image/png" and picture.content[:4] == b"\x89PNG"
      seen.append(state["prompt"])
      assert client.get(f"/v/{ANN['ann']}/ask").json() == state
      # On disk before the next pair shows.
      state = vote(client, state["ask"], "left").json()
      kinds = [event["event"] for event in read_events(made.folder)]
      assert kinds.count("vote") == len(seen) == state["done"]
    assert sorted(seen) == ["a cat", "a cow", "a dog"] and state["total"] == 3
    back = client.post(f"/v/{ANN['ann']}/vote", json={"ask": state["undo"]}).json()
    assert back["ask"] == state["undo"] and back["prompt"] == seen[-1] and back["done"] == 2


def test_nothing_tells_which_model(make_vote):
  made = make_vote()
  with made.served(ANN) as (client, _):
    state = client.get(f"/v/{ANN['ann']}/ask")
    assert set(state.json()) == {
        "voter", "done", "total", "undo", "decided", "ask", "prompt", "left", "right"}
    for name in ("model0", "model1", "swapped", "seed", "repeat"):
      assert name not in state.text


def test_a_decided_vote_asks_no_more(make_vote):
  with make_vote().served(ANN, decided=lambda: True) as (client, _):
    state = client.get(f"/v/{ANN['ann']}/ask").json()
    assert state["decided"] and "ask" not in state


@pytest.mark.parametrize("path", [
    "/", "/v/", "/v/wrong/", "/v/wrong/ask", "/v/wrong/picture/{digest}", "/votes.jsonl",
    "/v/{secret}/picture/0123", "/v/{secret}/picture/..%2f..%2fballot.json",
    "/v/{secret}/picture/../../links.json", "/v/{secret}/picture/%2e%2e/%2e%2e/links.json",
    "/v/{secret}/picture//etc/passwd", "/page/..%2f..%2fserver.py", "/page/../server.py",
    "/page/", "/page/%00", "/v/%00/", "/v/{secret}/picture/{digest}.png", "/v/%F0%9F%90%B8/"])
def test_no_file_is_served_by_path(make_vote, path):
  made = make_vote()
  with made.served(ANN) as (client, ballot):
    target = path.format(secret=ANN["ann"], digest=ballot.gallery.pictures[0].digest)
    host, port = client.base_url.host, client.base_url.port
    with socket.create_connection((host, port)) as raw:     # httpx would tidy the path up
      raw.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
      answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 405")), answer[:100]
    for secret in (b"PNG", b"digest", b"ann", b"import"):
      assert secret not in answer


def test_only_the_owner_of_a_link_votes_with_it(make_vote):
  links = {**ANN, "ben": "b" * 32}
  with make_vote().served(links) as (client, ballot):
    mine = client.get(f"/v/{ANN['ann']}/ask").json()["ask"]
    assert vote(client, mine, "left", links["ben"]).status_code == 409
    assert vote(client, mine, "left", "c" * 32).status_code == 404
    assert vote(client, "f" * 20, "left").status_code == 409
    assert vote(client, mine, "best").status_code == 409
    assert not ballot.answers()
    assert vote(client, mine, "left").status_code == 200
    assert vote(client, mine, "right").json()["done"] == 1       # the first one stays
    assert [a.choice for a in ballot.answers()] == ["left"]


@pytest.mark.parametrize("headers", [
    {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"},
    {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
    {"Host": "evil.example"}, {"Host": "127.0.0.1.evil.example"}, {"Host": ""}])
def test_other_sites_are_refused(make_vote, headers):
  with make_vote().served(ANN) as (client, ballot):
    ask = ballot.next("ann")
    assert vote(client, ask.id, "left", headers=headers).status_code in (400, 403)
    assert not ballot.answers()
    own = str(client.base_url).rstrip("/")
    assert vote(client, ask.id, "left", headers={"Origin": own}).status_code == 200


def test_a_link_may_be_opened_from_elsewhere_and_no_site_may_frame_it(make_vote):
  with make_vote().served(ANN) as (client, _):
    page = client.get(f"/v/{ANN['ann']}/", headers={
        "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"})
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(("content", "status"), [
    (b"", 400), (b"{", 400), (b"[]", 400), (b'"x"', 400), (b"null", 400), (b'{"ask": 1}', 400),
    (b'{"ask": "x", "choice": []}', 400), (b"\xff\xfe", 400), (b"[" * 2000, 400),
    (b'{"ask": "' + b"x" * MAX_BODY + b'"}', 413), (b"x" * 5_000_000, 413)])
def test_bodies_are_checked_and_limited(make_vote, content, status):
  with make_vote().served(ANN) as (client, ballot):
    kind = {"Content-Type": "application/json"}
    try:
      answer = client.post(f"/v/{ANN['ann']}/vote", content=content, headers=kind).status_code
    except httpx.TransportError:                 # it hung up on what it does not want to read
      answer = 413
    assert answer == status and not ballot.answers()
    form = client.post(f"/v/{ANN['ann']}/vote", data={"ask": "x", "choice": "left"})
    assert form.status_code == 415


def test_script_in_prompts_is_text(make_vote):
  evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)">'
  with make_vote([evil, "p"], repeats=0).served({evil: "s" * 32}) as (client, _):
    answers = [client.get("/v/" + "s" * 32 + "/"), client.get("/v/" + "s" * 32 + "/ask")]
    assert "alert(" not in answers[0].text
    assert answers[1].headers["content-type"] == "application/json"
    script = client.get("/page/vote.js").text
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
      assert sink not in script


def test_the_page_needs_no_other_host():
  folder = pathlib.Path(runs.ROOT / "jaxalign" / "votes" / "page")
  for file in folder.iterdir():
    text = file.read_text().replace("http://www.w3.org/2000/svg", "")    # a name, not an address
    assert not re.search(r"https?:|url\(|@import|//[a-z]+\.", text), file


def test_fifty_voters_at_once(make_vote):
  links = {f"voter {k}": f"{k:032d}" for k in range(50)}
  made = make_vote([f"p{i}" for i in range(6)], repeats=0)
  with made.served(links) as (client, ballot):
    base = str(client.base_url)

    def all_votes(secret):
      with httpx.Client(base_url=base, timeout=60) as mine:
        state = mine.get(f"/v/{secret}/ask").json()
        while "ask" in state:
          state = vote(mine, state["ask"], "left", secret).json()
        return state["done"]
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
      assert list(pool.map(all_votes, links.values())) == [6] * 50
  events = [event for event in read_events(made.folder) if event["event"] == "vote"]
  assert len(events) == 300 == len({(event["voter"], event["pair"]) for event in events})


def test_links_outlive_a_restart_and_are_private(tmp_path):
  links = open_links(tmp_path, ["ann", "ben"])
  assert len(set(links.values())) == 2 and min(map(len, links.values())) >= 32
  assert open_links(tmp_path, ["ben"]) == {"ben": links["ben"]}
  assert open_links(tmp_path, ["ann"]) == {"ann": links["ann"]}
  assert (tmp_path / "links.json").stat().st_mode & 0o77 == 0


# The command, in a process of its own.


@pytest.fixture
def command(tmp_path):
  started = []

  def start(*args):
    env = {**os.environ, "PYTHONPATH": str(runs.ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxalign.vote", f"--output={tmp_path / 'votes'}", *args],
        cwd=runs.ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started.append(process)
    return process
  yield start
  for process in started:
    if process.poll() is None:
      process.kill()
    process.communicate()


def url_of(process):
  for line in process.stdout:
    if found := re.search(r"http://127\.0\.0\.1:\d+/v/\S+/", line):
      return found[0]
  raise AssertionError(process.stderr.read())


def test_killed_between_votes_and_started_again(tmp_path, command):
  prompts = [f"p{i}" for i in range(12)]
  a, b = (write_samples(tmp_path / name, prompts, seed=k) for k, name in enumerate("ab"))
  args = (f"--checkpoint={a}", f"--against={b}", "--port=0", "--repeats=0", "--alpha=0")
  asked, link = [], None
  for _ in range(4):
    process = command(*args)
    url = url_of(process)
    assert link in (None, url.split("/v/")[1])
    link = url.split("/v/")[1]
    state = httpx.get(url + "ask").json()
    assert state["done"] == len(asked)
    for _ in range(3):
      asked.append(state["prompt"])
      state = httpx.post(url + "vote", json={"ask": state["ask"], "choice": "right"}).json()
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert sorted(asked) == sorted(prompts)
  process = command(*args)
  assert "ask" not in httpx.get(url_of(process) + "ask").json()
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=30)
  assert process.returncode == 0, err
  assert "12 votes by 1 voter" in out and "12 pairs" in out
  assert len(open_pairs(str(tmp_path / "votes"), "drop")) == 12
  verdict = json.loads((tmp_path / "votes" / "verdict.json").read_text())
  assert verdict["win_rate"]["prompts"] == 12 and verdict["models"] == [str(a), str(b)]
  wins = sum(e["models"][1] == 0 for e in read_events(tmp_path / "votes") if e["event"] == "vote")
  assert verdict["win_rate"]["rate"] == wins / 12       # of --checkpoint; "right" was always chosen
  process = command()                                  # counts, and serves nothing
  out, err = process.communicate(timeout=30)
  assert process.returncode == 0 and "12 votes" in out, err


def test_pictures_of_models_are_drawn_once(tmp_path, command):
  from jaxalign.testing.fixture import make_pipeline_dir
  model = make_pipeline_dir(tmp_path / "model")
  (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
  args = (f"--checkpoint={model}", f"--prompts={tmp_path / 'prompts.txt'}", "--n=3", "--port=0")
  drawn = []
  for _ in range(2):
    process = command(*args)
    state = httpx.get(url_of(process) + "ask").json()
    assert state["total"] == 7 and state["prompt"] in ("a cat", "a dog")      # 6 and a repeat
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "0 pairs" in out, err
    files = sorted((tmp_path / "votes" / "drawn" / "0").glob("*.png"))
    drawn.append([file.stat().st_mtime_ns for file in files])
  assert len(drawn[0]) == 7 and drawn[0] == drawn[1]                          # and the grid
  (tmp_path / "prompts.txt").write_text("")
  process = command(*args)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 2 and "could not be drawn" in err and "Traceback" not in err


def test_errors_are_one_line(tmp_path, command):
  process = command()
  _, err = process.communicate(timeout=60)
  assert process.returncode == 2 and "--checkpoint is required" in err and err.count("\n") == 1
  process = command(f"--checkpoint={tmp_path}")
  _, err = process.communicate(timeout=60)
  assert process.returncode == 2 and "name --prompts" in err and err.count("\n") == 1
