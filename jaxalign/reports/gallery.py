"""Before and after: the pairs of pictures that a page shows, chosen by rule and made to fit."""
import base64
import dataclasses
import io
import json
from html import escape

import numpy as np
from PIL import Image

from jaxalign.reports.reading import Run

BUDGET = 3_600_000       # characters of all pictures on a page: it stays below 5 MB
ENDS = 12                # so many of the worst and of the best come first
SMALL = 128              # px: smaller pictures are shown with their own pixels, as PNG
LARGE = 320              # px: larger ones are shrunk to this, as JPEG


@dataclasses.dataclass(frozen=True)
class Gallery:
  """HTML of the cards and what is to be said about their choice."""
  cards: str
  names: list[str]
  shown: int
  total: int
  rule: str


def make_gallery(runs: list[Run], budget: int = BUDGET) -> Gallery | None:
  """Cards of the base model and of runs with its noise, ordered by the first run's gain.

  Returns:
    None without pictures.
  """
  if not runs or runs[0].tuned is None:
    return None
  gains = (runs[0].tuned.scores["reward"] - runs[0].base.scores["reward"]).reshape(-1)
  ranks = np.argsort(-gains, kind="stable")                   # the best first
  columns = [runs[0].base, *(run.tuned for run in runs)]
  chosen, spent = {}, 0
  for rank in order(len(ranks)):
    p, k = divmod(int(ranks[rank]), runs[0].base.images.shape[1])
    pictures = [encode(column.images[p, k]) for column in columns]
    spent += sum(map(len, pictures))
    if chosen and spent > budget:
      break
    chosen[rank] = p, k, pictures
  names = ["base", *(run.name if len(runs) > 1 else "tuned" for run in runs)]
  cards = [_card(runs[0], columns, names, *chosen[rank]) for rank in sorted(chosen)]
  rule = f"All {len(ranks)} pairs of the run." if len(cards) == len(ranks) else (
      f"{len(cards)} of {len(ranks)} pairs, as many as fit into the page: the {ENDS} that gained "
      f"most and the {ENDS} that gained least in reward, then evenly between them by rank.")
  return Gallery("".join(cards), names, len(cards), len(ranks), rule)


def order(count: int, ends: int = ENDS) -> list[int]:
  """All ranks below `count`: best and worst in turn, then ever finer between them.

  Every beginning of the list holds the extremes, and the rest of it is spread evenly.
  """
  ends = min(ends, count // 2)
  out = [rank for k in range(ends) for rank in (k, count - 1 - k)]
  left, taken = count - 2 * ends, set()
  bits = max(1, (left - 1).bit_length())
  for k in range(1 << bits):
    rank = int(f"{k:0{bits}b}"[::-1], 2)                      # van der Corput's order
    if rank < left and rank not in taken:
      taken.add(rank)
      out.append(ends + rank)
  return out


def encode(image) -> str:
  """A `data:` URI of an image `[H,W,3]` uint8."""
  picture, file = Image.fromarray(np.asarray(image)), io.BytesIO()
  if max(picture.size) <= SMALL:
    picture.save(file, "PNG", optimize=True)
    kind = "png"
  else:
    picture.thumbnail((LARGE, LARGE), Image.Resampling.LANCZOS)
    picture.save(file, "JPEG", quality=85)
    kind = "jpeg"
  return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _card(run: Run, columns, names, p: int, k: int, pictures) -> str:
  prompt = run.prompts[p] if run.prompts else f"prompt {p + 1}"
  label = f"{prompt}, picture {k + 1}"
  score = lambda name: escape(json.dumps([round(float(c.scores[name][p, k]), 6) for c in columns]))
  height, width = columns[0].images.shape[2:4]
  small = ' class="small"' if max(height, width) <= SMALL else ""
  images = "".join(f'<img{small} src="{uri}" alt="{escape(f"{name}: {label}")}" width="{width}" '
                   f'height="{height}" loading="lazy" draggable="false">'
                   for name, uri in zip(names, pictures))
  plain = " → ".join(f"{c.scores['reward'][p, k]:.3g}" for c in columns)
  return (f'<li class="pair" data-place="{p * columns[0].images.shape[1] + k}" '
          f'data-reward="{score("reward")}" data-judge="{score("judge")}" '
          f'data-label="{escape(f"Before and after: {label}")}"><p class="prompt">{escape(prompt)}'
          f'</p><div class="frame">{images}</div><p class="scores">reward {plain}</p></li>')
