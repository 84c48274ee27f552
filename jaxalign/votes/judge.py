"""A vision-language model as a voter: asked like a person, and once more with the sides swapped."""
import pathlib
from collections.abc import Callable

from jaxalign.config.credentials import JUDGE
from jaxalign.devices import processes
from jaxalign.errors import UserError
from jaxalign.rewards.vlm import Judge
from jaxalign.votes.ballot import Ballot
from jaxalign.votes.gallery import picture_file, read_pixels

ASK = ("Both pictures were made for this text: {prompt}\nWhich one is better, by how well it fits "
       "the text and how good it looks? Answer 1 or 2, nothing else.")


def open_voters(names: list[str]) -> dict[str, Judge]:
  """`voter -> judge` of names as in `reward.names`, where `ask` and `answers` may be left out.

  Raises:
    UserError: a name is none, or two voters have one name.
  """
  voters = {}
  for name in names:
    if not name.startswith(JUDGE):
      raise UserError("--voter takes vlm:URL#model=NAME; for people there is --voters")
    judge = Judge(name, where="--voter", ask=ASK, answers="1,2")
    if len(judge.values) != 2:
      raise UserError(f"--voter: {judge.name}: answers must be two, for the first picture and for "
                      "the second")
    if judge.name in voters:
      raise UserError(f"--voter: two are called {judge.name}; tell them apart by name=")
    voters[judge.name] = judge
  return voters


def vote(ballot: Ballot, folder: pathlib.Path, voter: str, judge: Judge,
         over: Callable[[], bool]) -> None:
  """Answers what the ballot asks this voter, until there is no more or the vote is `over`.

  A picture wins if it does in both orders; otherwise, or where an answer is none, they are equal.

  Raises:
    UserError: what `Judge.judge` raises. What was voted stays.
  """
  judge.keep(folder)
  first, second = judge.values.values()          # of the answers that name either picture
  swayed = judged = 0
  with processes.progress(total=ballot.total, initial=ballot.done(voter), desc=voter,
                          unit="pair") as bar:
    while not over() and (ask := ballot.next(voter)):
      left, right = (ballot.gallery.pictures[i] for i in ballot.sides(ask))
      prompt = ballot.gallery.prompts[left.prompt]
      pixels = [read_pixels(picture_file(folder, picture.digest)) for picture in (left, right)]
      answers = judge.judge([(pixels, prompt), (pixels[::-1], prompt)])
      shares = [None if a is None else (a - second) / (first - second) for a in answers]
      choice = choose(*shares)
      if choice == "equal" and None not in shares:
        swayed += 1
      judged += 1
      ballot.vote(voter, ask.id, choice)
      bar.update()
  print(f"{voter}: {judged} pairs judged now, {swayed} otherwise when the order was swapped, "
        f"{judge.unparsable} of {judge.total} answers unparsable; both count as equal")


def choose(left_first: float | None, right_first: float | None) -> str:
  """The vote, as in `ballot.CHOICES`.

  Args:
    left_first: probability that the first picture is better, the left one being shown first.
    right_first: the same, of the first, with the right one shown first.
  """
  if left_first is None or right_first is None:
    return "equal"
  if left_first > 0.5 > right_first:
    return "left"
  if left_first < 0.5 < right_first:
    return "right"
  return "equal"
