"""What somebody may have meant."""
import difflib
from collections.abc import Iterable


def suggestion(name: str, known: Iterable[str]) -> str:
  """`"; did you mean 'optim.lr'?"`, or "" if nothing is near.

  Of dotted names, one whose last part is the same comes before one that is spelt alike.
  """
  group, _, last = name.rpartition(".")
  # What stands before the last dot is alike for a whole group of keys, and says nothing.
  ends = {}
  for full in known:
    if full != name:
      before, _, end = full.rpartition(".")
      ends.setdefault(end, []).append((before != group, full))
  own = [end for end, fulls in ends.items() if not all(other for other, _ in fulls)]
  near = [last] if last in ends else (difflib.get_close_matches(last, own, 1, 0.6)
                                      or difflib.get_close_matches(last, ends, 1, 0.75))
  return f"; did you mean {min(ends[near[0]])[1]!r}?" if near else ""
