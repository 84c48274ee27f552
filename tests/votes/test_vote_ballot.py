"""Which pair, on which side, what is asked again; and that nothing is asked twice or lost."""
import collections
import itertools
import json

import numpy as np
import pytest
from vote_folders import write_samples

from jaxalign.data.pairs import open_pairs
from jaxalign.errors import UserError
from jaxalign.votes.ballot import Ballot, Unknown
from jaxalign.votes.gallery import Gallery, Pair, Picture, open_gallery
from jaxalign.votes.pairs import write_pairs
from jaxalign.votes.statistics import self_agreement, table
from jaxalign.votes.store import Log, read_events


def finish(ballot, voter, choose=lambda ask: "left"):
  asks = []
  while ask := ballot.next(voter):
    ballot.vote(voter, ask.id, choose(ask))
    asks.append(ask)
  return asks


def test_every_pair_once_spread_over_prompts_and_repeats_with_sides_swapped(make_vote):
  ballot = make_vote([f"p{i}" for i in range(10)], n=3, votes=40, repeats=0.25).open()
  asks = finish(ballot, "ann")
  fresh = [ask for ask in asks if not ask.repeat]
  again = [ask for ask in asks if ask.repeat]
  assert len(fresh) == 30 and len(again) == 10 == len({ask.pair for ask in again})
  assert len({ask.pair for ask in fresh}) == 30
  assert {ballot.gallery.prompt_of(ask.pair) for ask in fresh[:10]} == set(range(10))
  first = {ask.pair: (k, ask) for k, ask in enumerate(asks) if not ask.repeat}
  for k, ask in enumerate(asks):
    if ask.repeat:
      assert first[ask.pair][1].swapped != ask.swapped and first[ask.pair][0] < k


def test_sides_are_drawn_and_gaps_kept(make_vote):
  ballot = make_vote([f"p{i}" for i in range(60)], n=1, votes=60, repeats=0.2).open()
  asks = finish(ballot, "ann")
  at = {ask.pair: k for k, ask in enumerate(asks) if not ask.repeat}
  assert min(k - at[ask.pair] for k, ask in enumerate(asks) if ask.repeat) > 5
  swapped = sum(ask.swapped for ask in asks if not ask.repeat)
  assert 12 < swapped < 36


def test_logged_propensities_are_those_of_the_draws(make_vote):
  """Drawn anew with many seeds, pairs come up as often as the log says."""
  vote = make_vote(["p"], n=4, models=1)
  gallery = vote.open().gallery
  vote.log.close()
  counts, said = collections.Counter(), {}
  for seed in range(3000):
    ask = Ballot(gallery, lambda event: None, seed=seed).next("ann")
    counts[ask.pair] += 1
    said[ask.pair] = ask.propensity
  assert len(said) == 6 and sum(said.values()) == pytest.approx(1)
  for pair, q in said.items():
    assert counts[pair] / 3000 == pytest.approx(q, abs=4 * np.sqrt(q / 3000))


def test_pairs_of_doubt_come_first_and_estimates_stay_unbiased():
  """Simulated voters who like `a` the less, the less sure the judge is: a plain mean is wrong."""
  generator = np.random.default_rng(0)
  pictures = tuple(Picture(f"{p}{i}", p, 0, 7) for p in range(10) for i in range(4))
  couples = [(4 * p + i, 4 * p + j) for p in range(10) for i, j in itertools.combinations(
      range(4), 2)]
  gallery = Gallery(("m",), tuple(map(str, range(10))), pictures,
                    tuple(Pair(a, b, 0.1) for a, b in couples), 0)
  doubts = generator.random(len(couples))
  likes = (doubts < 0.5).astype(float)
  truth, plain, weighted, asked = likes.mean(), [], [], []
  for seed in range(120):
    ballot = Ballot(gallery, lambda event: None, votes=20, repeats=0, seed=seed, doubts=doubts)
    finish(ballot, "ann", lambda ask: "left" if likes[ask.pair] != ask.swapped else "right")
    votes = table(ballot)
    plain.append(votes["outcome"].mean())
    weighted.append((votes["weight"] * votes["outcome"]).mean())
    asked.append(doubts[votes["pair"]].mean())
  error = lambda values: np.std(values) / np.sqrt(len(values))
  assert abs(np.mean(weighted) - truth) < 3.5 * error(weighted)
  assert np.mean(plain) < truth - 4 * error(plain)
  assert np.mean(asked) > doubts.mean() + 4 * error(asked)
  # The floor of every probability, whatever the judge thinks.
  ballot = Ballot(gallery, lambda event: None, doubts=(np.arange(60) % 6 == 0).astype(float))
  assert min(ask.propensity * 6 for ask in [ballot.next(str(k)) for k in range(10)]) >= 0.375


def test_voters_share_pairs(make_vote):
  ballot = make_vote([f"p{i}" for i in range(20)], n=4, models=1, votes=40, repeats=0).open()
  seen = [{ask.pair for ask in finish(ballot, name)} for name in ("ann", "ben")]
  assert len(seen[0] & seen[1]) > 10           # 13.3 would be shared by chance, of 120 pairs


def test_started_again_nothing_is_lost_or_asked_twice(make_vote):
  vote = make_vote([f"p{i}" for i in range(8)], repeats=0)
  ballot = vote.open()
  asks = [ballot.next("ann")]
  for _ in range(3):
    ballot.vote("ann", asks[-1].id, "right")
    asks.append(ballot.next("ann"))
  ballot.undo("ann", asks[2].id)
  vote.log.close()
  with open(vote.folder / "votes.jsonl", "a") as file:      # killed while it wrote
    file.write('{"event": "vote", "ask"')
  ballot = vote.open()
  assert (vote.folder / "votes.jsonl").read_bytes().endswith(b"}\n")
  assert ballot.next("ann").id == asks[2].id and ballot.done("ann") == 2
  rest = finish(ballot, "ann")
  assert [ask.id for ask in rest[:2]] == [asks[2].id, asks[3].id]
  assert len({ask.pair for ask in ballot.answers()}) == 8 == ballot.done("ann")


def test_a_line_says_everything(make_vote):
  vote = make_vote()
  ballot = vote.open()
  ask = ballot.next("ann")
  ballot.vote("ann", ask.id, "both_bad")
  event = read_events(vote.folder)[-1]
  left, right = (ballot.gallery.pictures[i] for i in ballot.sides(ask))
  assert event.pop("time").endswith("+00:00") and 0 < event.pop("propensity") <= 1
  assert event == {
      "event": "vote", "ask": ask.id, "voter": "ann", "choice": "both_bad", "pair": ask.pair,
      "swapped": ask.swapped, "repeat": False, "prompt": left.prompt, "left": left.digest,
      "right": right.digest, "models": [left.model, right.model], "seeds": [7, 7]}


def test_a_vote_that_cannot_be_saved_does_not_count(make_vote):
  ballot = make_vote().open()
  ask = ballot.next("ann")

  def full(event):
    raise OSError("disk full")
  ballot._log, good = full, ballot._log
  with pytest.raises(OSError):
    ballot.vote("ann", ask.id, "left")
  assert ballot.done("ann") == 0 and ballot.next("ann").id == ask.id
  ballot._log = good
  ballot.vote("ann", ask.id, "left")


def test_forged_and_repeated_votes(make_vote):
  ballot = make_vote().open()
  ask = ballot.next("ann")
  for voter, name, choice in (("ben", ask.id, "left"), ("ann", "0" * 20, "left"),
                              ("ann", ask.id, "best")):
    with pytest.raises(Unknown):
      ballot.vote(voter, name, choice)
  ballot.vote("ann", ask.id, "left")
  ballot.vote("ann", ask.id, "right")
  assert [a.choice for a in ballot.answers()] == ["left"]
  with pytest.raises(Unknown):
    ballot.undo("ben", ask.id)


def test_two_processes_cannot_write_one_vote(tmp_path):
  log = Log(tmp_path)
  with pytest.raises(UserError, match="another"):
    Log(tmp_path)
  log.close()
  Log(tmp_path).close()


def test_pairs_are_those_that_were_preferred(make_vote):
  vote = make_vote([f"p{i}" for i in range(12)], repeats=0.2)
  ballot = vote.open()
  better = lambda ask: "right" if ask.swapped else "left"     # always the first model
  choose = lambda ask: "equal" if ballot.gallery.prompt_of(ask.pair) == 3 else better(ask)
  finish(ballot, "ann", choose)
  assert write_pairs(ballot, vote.folder) == 12 < ballot.total
  pairs = open_pairs(str(vote.folder), "soft")
  assert sorted(pairs.captions) == sorted(f"p{i}" for i in range(12))
  assert [pairs.labels[i] for i in range(12) if pairs.captions[i] == "p3"] == [0.5]
  first = {p: (vote.folders[0] / f"{p:04d}_00.png").read_bytes() for p in range(12)}
  for i, caption in enumerate(pairs.captions):
    if caption != "p3":
      images = pairs.load(i)
      assert images[0 if pairs.labels[i] == 1 else 1] == first[int(caption[1:])]
  assert {0.0, 1.0} <= set(pairs.labels)
  assert set(table(ballot)["outcome"]) == {0.5, 1.0}
  assert self_agreement(ballot)["ann"]["same"] == 1


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", ".hidden.png", "a/b.png", 3])
def test_a_folder_cannot_name_files_elsewhere(tmp_path, name):
  folder = write_samples(tmp_path / "a", ["p"], 2)
  line = json.dumps({"file": name, "prompt": "p"})
  (folder / "samples.jsonl").write_text(line + "\n")
  with pytest.raises(UserError, match="line 1"):
    open_gallery(["a"], [folder], tmp_path / "votes")


def test_other_pictures_are_another_vote(tmp_path, make_vote):
  vote = make_vote()
  vote.open()
  vote.log.close()
  vote.folders[1] = write_samples(tmp_path / "other", ["a cat", "a dog", "a cow"], seed=9)
  with pytest.raises(UserError, match="other pictures"):
    vote.open()
  vote.log.close()


def test_identical_pictures_are_not_asked(tmp_path):
  a = write_samples(tmp_path / "a", ["p", "q"], seed=1)
  b = write_samples(tmp_path / "b", ["p", "q"], seed=2)
  (b / "0000_00.png").write_bytes((a / "0000_00.png").read_bytes())
  gallery = open_gallery(["a", "b"], [a, b], tmp_path / "votes")
  assert gallery.identical == 1 and len(gallery.pairs) == 1
