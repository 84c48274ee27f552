"""Damage, drawn from a seed: bytes of files, values of JSON."""
import copy
import json
import random


def bytes_of(rnd: random.Random, content: bytes) -> bytes:
  """One to a few flips, cuts, insertions, repetitions or runs of one byte; early bytes more often,
  as headers are there."""
  out = bytearray(content)
  for _ in range(rnd.choice((1, 1, 2, 4, 16))):
    place = int(len(out) * rnd.random() ** rnd.choice((1, 1, 4)))
    length = rnd.choice((1, 2, 4, 8, 64, 512))
    kind = rnd.randrange(7)
    if kind <= 1 and out:
      out[min(place, len(out) - 1)] ^= 1 << rnd.randrange(8)
    elif kind == 2:
      out[place:place + length] = rnd.randbytes(length)
    elif kind == 3:
      out[place:place + length] = rnd.choice((b"\0", b"\xff", b"\x7f", b" ")) * length
    elif kind == 4:
      del out[place:place + length]
    elif kind == 5:
      out[place:place] = out[:length] if rnd.random() < 0.5 else rnd.randbytes(length)
    else:
      del out[place if rnd.random() < 0.5 else int(0.9 * len(out)):]
  return bytes(out)


STRANGE = (None, True, -1, 0, 2 ** 31, 2 ** 63, -2 ** 63, 10 ** 400, 1e308, float("nan"),
           float("inf"), 0.5, "", "a", "\0", "\ud800", "../../etc/passwd", "é" * 5000, [], {}, [[]],
           [None], {"a": None}, {"": []}, [1, "a", None], "1", "nan", [0] * 1000)


def value(rnd: random.Random):
  return copy.deepcopy(rnd.choice(STRANGE))


def json_of(rnd: random.Random, tree):
  """The tree with one to three of its values or keys replaced, removed, doubled or nested."""
  tree = json.loads(json.dumps(tree))
  for _ in range(rnd.choice((1, 1, 2, 3))):
    at, path = tree, []
    while isinstance(at, (dict, list)) and at and (not path or rnd.random() < 0.8):
      key = rnd.choice(list(at) if isinstance(at, dict) else range(len(at)))
      path.append((at, key))
      at = at[key]
    if not path:
      return value(rnd)
    parent, key = path[-1]
    kind = rnd.randrange(6)
    if kind <= 2:
      parent[key] = value(rnd)
    elif kind == 3:
      del parent[key]
    elif kind == 4:
      parent[key] = [parent[key]] if rnd.random() < 0.5 else {"a": parent[key]}
    elif isinstance(parent, dict):
      parent[str(key) + rnd.choice((" ", "_", "2"))] = parent.pop(key)
    else:
      parent.append(parent[key])
  return tree


def text_of(rnd: random.Random, tree) -> bytes:
  """`json_of` as a file, half of them with damaged bytes too; a few are nested without end."""
  if rnd.random() < 0.02:
    return rnd.choice((b"[", b'{"a":')) * 100_000
  text = json.dumps(json_of(rnd, tree), ensure_ascii=rnd.random() < 0.5)
  content = text.encode(errors="surrogatepass")
  return bytes_of(rnd, content) if rnd.random() < 0.4 else content
