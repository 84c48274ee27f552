"""Who is asked what: which pair, on which sides, what is asked again, and with what probability.

A voter sees `votes` pairs. A share of them (`repeats`) are pairs seen before with the sides
swapped, at random places; they measure how far voters agree with themselves and count for nothing
else. New pairs are spread over prompts: the prompt is drawn among those with the fewest asks that
have a pair left for this voter, and of its pairs left one with probability

  q(pair) = (1 - s) (1/2 1/n + 1/2 difference / sum of differences)  +  s 1/m [seen by others]

so pictures that look unlike come first, and where m > 0 of the n pairs left were shown to others,
s = 1/4 of the asks go there: without shared pairs, agreement between voters can't be measured. With
a judge (`votes.doubt`) half of what goes to unlike pictures goes to pairs of which it is unsure, in
proportion to its doubt. q is logged, is never below 3/8 of uniform and depends on counts alone,
never on what was voted; `statistics.weights` undoes it.
"""
import dataclasses
import datetime
import hashlib
import threading
from collections.abc import Callable

import numpy as np

from jaxalign.errors import UserError
from jaxalign.votes.gallery import Gallery

CHOICES = ("left", "right", "equal", "both_bad")
_SHARED = 0.25             # of asks that go to pairs which other voters have seen
_GAP = 5                   # asks between a pair and its repeat, while there is a choice


@dataclasses.dataclass
class Ask:
  """One question: `pair` with picture a on the left unless `swapped`."""
  id: str
  voter: str
  pair: int
  swapped: bool
  repeat: bool
  propensity: float        # q of the pair among those of its prompt that were left; 1 for repeats
  choice: str | None = None


class Unknown(Exception):
  """A vote for something that this voter was not asked."""


class Ballot:
  """The state of a vote: replayed from the log, changed only by what was logged first.

  Methods may be called from threads.
  """

  def __init__(self, gallery: Gallery, log: Callable[[dict], None], events=(), *,
               votes: int = 100, repeats: float = 0.1, seed: int = 0, doubts=None):
    """
    Args:
      log: called with an event, returns when it is kept. events: what was logged before.
      votes, repeats: asked of a voter, and the share of these asked again. seed: of the draws.
      doubts: `[pairs]` in [0, 1], a judge's; may be another one's than in earlier draws.
    """
    self.gallery = gallery
    self.new = min(len(gallery.pairs), max(1, votes - round(votes * repeats)))
    self.again = min(self.new, round(self.new * repeats / (1 - repeats)))
    self.total = self.new + self.again
    self._log, self._seed, self._lock = log, seed, threading.RLock()
    self._doubts = doubts
    self._of_prompt = {}
    for i in range(len(gallery.pairs)):
      self._of_prompt.setdefault(gallery.prompt_of(i), []).append(i)
    self._asks: dict[str, Ask] = {}
    self._answered: dict[str, list[Ask]] = {}      # of each voter, in the order of the answers
    self._open: dict[str, list[Ask]] = {}          # the last is shown
    self._count = dict.fromkeys(self._of_prompt, 0)
    self._seen: dict[int, set[str]] = {}           # voters that a pair was shown to
    for event in events:
      self._replay(event)

  def done(self, voter: str) -> int:
    return len(self._answered.get(voter, ()))

  def answers(self) -> list[Ask]:
    """All answered asks, those of each voter in the order of the answers."""
    with self._lock:
      return [dataclasses.replace(ask) for asks in self._answered.values() for ask in asks]

  def next(self, voter: str) -> Ask | None:
    """What this voter is asked now, the same until it is answered; None after the last."""
    with self._lock:
      waiting = self._open.setdefault(voter, [])
      if not waiting and self.done(voter) < self.total:
        ask = self._draw(voter)
        self._log({"event": "ask", "time": _now(), "ask": ask.id, "voter": voter,
                   **self._shown(ask)})
        self._add(ask)
      return waiting[-1] if waiting else None

  def vote(self, voter: str, ask_id: str, choice: str) -> None:
    """Records a choice; a second one for the same ask changes nothing.

    Raises:
      Unknown: this voter was never asked that, or the choice is none.
    """
    with self._lock:
      ask = self._asks.get(ask_id)
      if ask is None or ask.voter != voter or choice not in CHOICES:
        raise Unknown
      if ask.choice is not None:
        return
      if ask is not self._open[voter][-1]:
        raise Unknown
      self._log({"event": "vote", "time": _now(), "ask": ask.id, "voter": voter, "choice": choice,
                 **self._shown(ask)})
      self._answer(ask, choice)

  def undo(self, voter: str, ask_id: str) -> None:
    """Takes the latest vote back, if it is for `ask_id`: it is asked again, on the same sides."""
    with self._lock:
      answered = self._answered.get(voter)
      if not answered or answered[-1].id != ask_id:
        raise Unknown
      self._log({"event": "undo", "time": _now(), "ask": ask_id, "voter": voter})
      self._take_back(answered[-1])

  def latest(self, voter: str) -> str | None:
    """Id of the ask that `undo` would take back."""
    answered = self._answered.get(voter)
    return answered[-1].id if answered else None

  # Drawing.

  def _draw(self, voter: str) -> Ask:
    number = len(self._asks)
    generator = np.random.default_rng([self._seed, number])
    answered = self._answered.get(voter, [])
    repeated = {ask.pair for ask in answered if ask.repeat}
    fresh = [ask for ask in answered if not ask.repeat]
    news, agains = self.new - len(fresh), self.again - len(repeated)
    ready = [ask for ask in answered[:-_GAP] if not ask.repeat and ask.pair not in repeated]
    if news == 0:
      ready = ready or [ask for ask in fresh if ask.pair not in repeated]
    if ready and generator.random() < agains / (news + agains):
      first = ready[generator.integers(len(ready))]
      return self._made(number, voter, first.pair, not first.swapped, True, 1.0)
    pair, q = self._draw_new(voter, {ask.pair for ask in fresh}, generator)
    return self._made(number, voter, pair, bool(generator.integers(2)), False, q)

  def _draw_new(self, voter: str, taken: set[int], generator) -> tuple[int, float]:
    left = {p: [i for i in pairs if i not in taken] for p, pairs in self._of_prompt.items()}
    mine = dict.fromkeys(left, 0)
    for i in taken:
      mine[self.gallery.prompt_of(i)] += 1
    # First each voter's own spread, then that of all: every voter goes once round the prompts.
    rank = {p: (mine[p], self._count[p]) for p, pairs in left.items() if pairs}
    fewest = min(rank.values())
    prompts = [p for p, r in rank.items() if r == fewest]
    pairs = left[prompts[generator.integers(len(prompts))]]
    telling = [np.array([self.gallery.pairs[i].difference for i in pairs])]
    if self._doubts is not None:
      telling.append(self._doubts[pairs])
    shares = [(values + 1e-6) / (values + 1e-6).sum() for values in telling]
    q = 0.5 / len(pairs) + 0.5 * np.mean(shares, axis=0)
    shared = np.array([bool(self._seen.get(i, set()) - {voter}) for i in pairs], float)
    if shared.any():
      q = (1 - _SHARED) * q + _SHARED * shared / shared.sum()
    i = int(generator.choice(len(pairs), p=q / q.sum()))
    return pairs[i], float(q[i])

  def _made(self, number, voter, pair, swapped, repeat, q) -> Ask:
    name = hashlib.sha256(f"{self._seed}/{number}/{voter}".encode()).hexdigest()[:20]
    return Ask(name, voter, pair, swapped, repeat, q)

  def sides(self, ask: Ask) -> tuple[int, int]:
    """Indices of the pictures on the left and on the right."""
    pair = self.gallery.pairs[ask.pair]
    return (pair.b, pair.a) if ask.swapped else (pair.a, pair.b)

  def _shown(self, ask: Ask) -> dict:
    left, right = (self.gallery.pictures[i] for i in self.sides(ask))
    return {"pair": ask.pair, "swapped": ask.swapped, "repeat": ask.repeat,
            "propensity": ask.propensity, "prompt": left.prompt,
            "left": left.digest, "right": right.digest, "models": [left.model, right.model],
            "seeds": [left.seed, right.seed]}

  # Changing.

  def _add(self, ask: Ask) -> None:
    self._asks[ask.id] = ask
    self._open.setdefault(ask.voter, []).append(ask)
    if not ask.repeat:
      self._count[self.gallery.prompt_of(ask.pair)] += 1
      self._seen.setdefault(ask.pair, set()).add(ask.voter)

  def _answer(self, ask: Ask, choice: str) -> None:
    ask.choice = choice
    self._open[ask.voter].remove(ask)
    self._answered.setdefault(ask.voter, []).append(ask)

  def _take_back(self, ask: Ask) -> None:
    ask.choice = None
    self._answered[ask.voter].remove(ask)
    self._open.setdefault(ask.voter, []).append(ask)

  def _replay(self, event: dict) -> None:
    try:
      kind = event["event"]
      if kind == "ask":
        ask = Ask(event["ask"], event["voter"], event["pair"], event["swapped"], event["repeat"],
                  event["propensity"])
        left, right = (self.gallery.pictures[i].digest for i in self.sides(ask))
        if (left, right) != (event["left"], event["right"]):
          raise ValueError("its pictures are not those of the ballot")
        self._add(ask)
      elif kind == "vote":
        if event["choice"] not in CHOICES or self._asks[event["ask"]].choice is not None:
          raise ValueError("a vote that cannot be")
        self._answer(self._asks[event["ask"]], event["choice"])
      elif kind == "undo":
        self._take_back(self._asks[event["ask"]])
      else:
        raise ValueError(f"event {kind!r} is unknown")
    except (KeyError, ValueError, TypeError, IndexError) as error:
      raise UserError(f"votes.jsonl: {event.get('event')} {event.get('ask')} does not fit what "
                      f"came before ({error})") from error


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
