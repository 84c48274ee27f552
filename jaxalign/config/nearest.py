"""What somebody may have meant."""
import difflib
from collections.abc import Iterable


def suggestion(name: str, known: Iterable[str]) -> str:
  """`"; did you mean 'optim.lr'?"`, or "" if nothing is near.

  Of dotted names, one whose last part is the same comes before one that is spelt alike.
  """
  known = list(known)
  last = name.rpartition(".")[2]
  same = [k for k in known if k.rpartition(".")[2] == last and k != name]
  near = same[:1] or difflib.get_close_matches(name, known, 1, 0.6) or [
      k for k in known if difflib.get_close_matches(last, [k.rpartition(".")[2]], 1, 0.75)][:1]
  return f"; did you mean {near[0]!r}?" if near else ""
