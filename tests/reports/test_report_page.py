"""The page of runs: what is on it, where from, and what it never does."""
import html.parser
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from report_folders import PROMPTS, write_run

import runs
from jaxalign import launch, report
from jaxalign.config import command, recipes
from jaxalign.errors import UserError
from jaxalign.reports import gallery, page
from jaxalign.reports.reading import read_run

VOID = {"meta", "link", "img", "input", "br", "circle", "line", "polyline", "polygon"}


class Parser(html.parser.HTMLParser):
  """Checks that elements nest; keeps attributes and text."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.text = [], [], []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    if tag not in VOID:
      assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append((self.open[-1] if self.open else "", data))

  def all(self, name):
    return [attrs for tag, attrs in self.tags if tag == name]

  def shown(self):
    return " ".join(text for tag, text in self.text if tag not in ("style", "script"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  """A sound run, and one that cheats, from the same noise."""
  folder = tmp_path_factory.mktemp("runs")
  return [write_run(folder / "sound"),
          write_run(folder / "cheat", gain=0.6, judge=-0.2, collapse=0.7, seed=1, train__steps=4)]


def test_one_file_that_needs_nothing_else(two):
  text = page.page([read_run(f) for f in two])
  found = Parser(text)
  assert len(text) < 5e6
  for name, values in found.tags:
    for key in ("src", "href", "action", "poster", "srcset", "xlink:href"):
      assert values.get(key, "data:").startswith("data:"), (name, values)
  assert not re.search(r"url\(|@import|https?://", text)
  policy, = [m["content"] for m in found.all("meta")
             if m.get("http-equiv") == "Content-Security-Policy"]
  assert policy.startswith("default-src 'none'") and "connect-src" not in policy


def test_what_a_page_of_one_run_says(two):
  found = Parser(page.page([read_run(two[0])]))
  text = re.sub(r"\s+", " ", found.shown())
  summary = json.loads((two[0] / "summary.json").read_text())
  reward = summary["tuned"]["reward"]["change"]
  assert f"Reward {reward['mean_in_std']:+.2f} spreads ({reward['mean'] / reward['sem']:.1f} SE)" \
      in text
  for words in ("no sign of over-optimisation", "3,264", "5.0 GiB", "jax 0.10.2",
                "revision 0123456789ab", "All 32 pairs of the run.",
                f"{reward['mean']:+.4f} ± {reward['sem']:.4f}"):
    assert words in text, words
  assert len(found.all("svg")) == 6 + 3                    # curves, trade-offs
  for chart in found.all("svg"):
    assert chart["role"] == "img" and chart["aria-label"]
  pictures = found.all("img")
  assert len(pictures) == 2 * 32 and all(p["alt"] for p in pictures)


def test_prompts_are_text(two):
  text = page.page([read_run(two[0])])
  assert "<b>bold" not in text and "&lt;b&gt;bold&lt;/b&gt; &amp; &quot;quoted&quot;" in text


def test_pairs_come_by_gain_with_the_pictures_they_belong_to(two):
  run = read_run(two[0])
  cards = [c for c in Parser(page.page([run])).all("li") if c.get("class") == "pair"]
  gains = [np.subtract(*reversed(json.loads(c["data-reward"]))) for c in cards]
  assert gains == sorted(gains, reverse=True) and len(gains) == 32
  best = int(cards[0]["data-place"])
  p, k = divmod(best, 4)
  assert cards[0]["data-label"] == f"Before and after: {PROMPTS[p]}, picture {k + 1}"
  change = run.tuned.scores["reward"] - run.base.scores["reward"]
  assert best == change.reshape(-1).argmax()
  assert json.loads(cards[0]["data-judge"]) == pytest.approx(
      [run.base.scores["judge"][p, k], run.tuned.scores["judge"][p, k]], abs=1e-6)
  sources = [i["src"] for i in Parser(page.page([run])).all("img")]
  assert sources[:2] == [gallery.encode(run.base.images[p, k]),
                         gallery.encode(run.tuned.images[p, k])]


def test_order_of_choice():
  for count in (1, 2, 5, 24, 31, 256, 257):
    found = gallery.order(count)
    assert sorted(found) == list(range(count))
    assert not count >= 30 or set(found[:24]) == {*range(12), *range(count - 12, count)}
  middle = np.sort(gallery.order(1024)[24:24 + 64])
  assert np.diff(middle).max() <= 2 * np.diff(middle).min()       # evenly between them


def test_large_pictures_are_chosen_by_rank_until_the_page_is_full(tmp_path):
  run = read_run(write_run(tmp_path / "large", size=512, prompts=4, samples=8))
  found = gallery.make_gallery([run], budget=1_200_000)
  assert 2 <= found.shown < found.total == 32 and str(found.shown) in found.rule
  assert len(found.cards) < 1_250_000
  places = [int(m) for m in re.findall(r'data-place="(\d+)"', found.cards)]
  gains = (run.tuned.scores["reward"] - run.base.scores["reward"]).reshape(-1)
  assert {int(gains.argmax()), int(gains.argmin())} <= set(places)
  assert "image/jpeg" in found.cards and len(page.page([run])) < 5e6


def test_runs_side_by_side_with_paired_differences(two):
  sound, cheat = map(read_run, two)
  found = Parser(page.page([sound, cheat]))
  text = re.sub(r"\s+", " ", found.shown())
  assert "the reward rises while the judge falls" in text and "diversity collapsed" in text
  difference = cheat.tuned.scores["reward"] - sound.tuned.scores["reward"]
  means = difference.mean(1)
  half = 2.364624 * means.std(ddof=1) / np.sqrt(8)                # Student's t, 7 degrees
  assert (f"{means.mean():+.4f} [{means.mean() - half:+.4f}, {means.mean() + half:+.4f}]") in text
  assert len(found.all("img")) == 3 * 32
  names, = [c["data-names"] for c in found.all("ol")]
  assert json.loads(names) == ["base", "sound", "cheat"]
  assert [s["id"] for s in found.all("select")] == ["sort", "left", "right"]


def test_runs_of_other_noise_are_not_paired(two, tmp_path):
  other = read_run(write_run(tmp_path / "other", noise=5))
  found = Parser(page.page([read_run(two[0]), other]))
  assert "not to be compared picture by picture" in found.shown()
  assert len(found.all("img")) == 2 * 32


def test_the_command_repeats_the_run(two, monkeypatch):
  """Parsed as a shell and the launcher would, it gives the run's config."""
  run = read_run(two[1])
  words = subprocess.run(["bash", "-c", f'printf "%s\\n" {page.command(run).split(" ", 3)[3]}'],
                         capture_output=True, text=True, check=True).stdout.splitlines()
  assert words[0] == "--config=jaxalign:nabla_gfn:smoke"
  monkeypatch.setattr(sys, "argv", ["launch", *words])      # where config flags look for overrides
  command._parse(list(sys.argv), launch._FLAGS, ())
  assert recipes.parse(launch._CONFIG.value).to_dict() == run.config


def test_an_unfinished_run_shows_its_last_look(tmp_path):
  run = read_run(write_run(tmp_path / "going", finished=False))
  text = Parser(page.page([run])).shown()
  assert "not finished: step 4 of 3" in text and "spreads" in text and "on training prompts" in text
  for name in ("watch", "base_watch", "base"):
    (tmp_path / "going" / "evaluations" / f"{name}.npz").unlink(missing_ok=True)
  (tmp_path / "going" / "metrics.jsonl").write_text('{"step": 1, "seconds": 1.0}\n{"step": 2, "se')
  text = Parser(page.page([read_run(tmp_path / "going")])).shown()
  assert "Nothing to compare yet." in text and "step 1 of" in text


def test_a_run_without_its_pictures_still_has_numbers(two, tmp_path):
  folder = shutil.copytree(two[0], tmp_path / "bare")
  shutil.rmtree(folder / "evaluations")
  found = Parser(page.page([read_run(folder)]))
  assert "kept no pictures" in found.shown() and "spreads" in found.shown()
  assert not found.all("img")


def test_prompts_of_older_runs_come_from_their_file(two, tmp_path):
  folder = shutil.copytree(two[0], tmp_path / "older")
  (folder / "evaluations" / "prompts.json").unlink()
  assert read_run(folder).prompts is None                  # the file has four prompts, not eight
  record = json.loads((folder / "config.json").read_text())
  file = tmp_path / "mine.txt"
  file.write_text("\n".join(PROMPTS))
  record["config"]["data"]["eval_prompts"] = str(file)
  (folder / "config.json").write_text(json.dumps(record))
  assert read_run(folder).prompts == PROMPTS
  record["contents"] = {"data.eval_prompts": "of something else"}
  (folder / "config.json").write_text(json.dumps(record))
  assert read_run(folder).prompts is None and "prompt 1" in page.page([read_run(folder)])


@pytest.mark.parametrize("name, content", [
    ("config.json", "{"), ("config.json", '{"config": {}}'), ("summary.json", "[]"),
    ("summary.json", '{"tuned": {}}'), ("evaluations/tuned.npz", "PK"),
    ("evaluations/prompts.json", "[1]")])
def test_damage_is_one_line(two, tmp_path, name, content):
  folder = shutil.copytree(two[0], tmp_path / "run")
  (folder / name).write_text(content)
  with pytest.raises(UserError) as error:
    page.write_report([folder], tmp_path / "report.html")
  assert "run" in str(error.value) and "\n" not in str(error.value)
  assert not (tmp_path / "report.html").exists()


def test_the_command(two, tmp_path, capsys):
  output = tmp_path / "report.html"
  report._FLAGS(["report", f"--runs={two[0]},{two[1]}", f"--output={output}"])
  report.main([])
  printed = capsys.readouterr().out
  assert printed.startswith("sound: Reward +") and "cheat: Reward +" in printed
  Parser(output.read_text())
  for runs_flag, output_flag, words in (("", output, "--runs is empty"),
                                        (tmp_path, output, "no folder of a run"),
                                        (two[0], tmp_path / "no" / "x.html", "--output=")):
    report._FLAGS(["report", f"--runs={runs_flag}", f"--output={output_flag}"])
    with pytest.raises(UserError, match=words):
      report.main([])


def test_no_model_library_is_loaded_for_a_page():
  """A page of finished runs is read and written without waiting for XLA."""
  code = ("import sys, jaxalign.reports.page, jaxalign.reports.live; "
          "print([m for m in ('flax', 'orbax', 'optax') if m in sys.modules])")
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                       cwd=runs.ROOT)
  assert out.stdout.strip() == "[]"


def test_every_finished_run_has_one():
  folder = runs.finished()
  found = Parser((folder / "report.html").read_text())
  assert "jaxalign.launch" in found.shown() and len(found.all("img")) == 2 * 8
