"""Is a picture the scene that its caption asks for? Rewards that answer as GenEval does, in parts.

Crops are taken to be independent, so that the probability of each answer is a short sum of
products over the four quarters, or the one drawing that fills the picture. With what is most likely
taken as certain the same formulas say yes or no: the black boxes `scene`, `scene_share`, `number`,
`subjects`, `place`, `colour` and `style_3d`. Their `soft_` relatives are log-probabilities, smooth.

GenEval: Ghosh et al. 2023, arXiv 2310.11513.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.emoji import crops, scenes
from jaxalign.emoji.artwork import STYLES
from jaxalign.emoji.reader import PARTS
from jaxalign.errors import UserError
from jaxalign.rewards import Reward

# A log-probability is that of (1 - FLOOR) p + FLOOR. Lower, and rounding decides; higher, and a
# picture that is plainly wrong has no gradient.
FLOOR = 1e-6
# Quarters of the first and of the second subject, for each of `scenes.RELATIONS`.
_RELATED = (((0, 1), (2, 3)), ((1, 0), (3, 2)), ((0, 2), (1, 3)), ((2, 0), (3, 1)))


class Asked(NamedTuple):
  """What captions say, `[B]` int32 each: indices, or -1 where a caption says nothing of it."""
  first: jax.Array
  second: jax.Array
  number: jax.Array
  relation: jax.Array
  colour: jax.Array
  style: jax.Array


def asked(captions, names) -> Asked:
  """Captions of scenes of `names` in numbers; UserError names one that is none."""
  said = [scenes.parse(text) for text in captions]
  row = {name: i for i, name in enumerate(names)}
  for text, scene in zip(captions, said):
    if not set(scene.subjects) <= row.keys():
      raise UserError(f"prompt {text!r}: the scene classifier was not taught "
                      f"{' and '.join(sorted(set(scene.subjects) - row.keys()))}")
  of = lambda values: np.array(list(values), np.int32)
  relations = list(scenes.RELATIONS)
  return Asked(of(row[s.subjects[0]] for s in said),
               of(row[s.subjects[1]] if s.relation else -1 for s in said),
               of(s.number for s in said),
               of(relations.index(s.relation) if s.relation else -1 for s in said),
               of(scenes.COLOURS.index(s.colour) for s in said),
               of(STYLES.index(s.style) if s.style else -1 for s in said))


def _counts(yes, no):
  """`[B, 4]` weights of yes and no in each quarter -> `[B, 5]`: of so many yes, the rest no."""
  total = jnp.zeros((len(yes), 5)).at[:, 0].set(1.0)
  for i in range(4):
    more = jnp.pad(total, ((0, 0), (1, 0)))[:, :-1]
    total = total * no[:, i, None] + more * yes[:, i, None]
  return total


def _related(first, second, others, relation):
  """`[B]`: weight of one first and one second where the relation says, `others` elsewhere.

  Args:
    first, second, others: `[B, 4]`. relation: `[B]`, of `scenes.RELATIONS`.
  """
  sums = []
  for places in _RELATED:
    sums.append(sum(first[:, i] * second[:, j] * jnp.prod(jnp.stack(
        [others[:, k] for k in range(4) if k not in (i, j)]), 0) for i, j in places))
  return jnp.take_along_axis(jnp.stack(sums, 1), relation.clip(0)[:, None], 1)[:, 0]


def answers(sight: crops.Sight, said: Asked) -> dict[str, jax.Array]:
  """Probability of each of `PARTS`, and of all that a caption says at once (`scene`).

  subjects: all that are named are there, and nothing else. number: as many drawings as asked for,
  whatever they are. place: one of each of two subjects, where asked for. style: all that is
  recognised is in the named one. 1 for a part that the caption does not name.

  Returns:
    `[B]` in [0, 1] by name.
  """
  take = lambda table, index: jnp.take_along_axis(
      table, index.clip(0).reshape(-1, *[1] * (table.ndim - 1)), -1)[..., 0]
  two, styled = said.second >= 0, said.style >= 0
  whole = sight.whole
  grid = whole[:, -2] + whole[:, -1]                    # no one drawing fills the picture
  empty, other = sight.quarters[..., -2], sight.quarters[..., -1]
  first = take(sight.quarters, said.first)
  second = jnp.where(two[:, None], take(sight.quarters, said.second), 0.0)
  alone = jnp.where(two, 0.0, take(whole, said.first))
  product = lambda x: x.prod(1)

  # All quarters show one of these or nothing, less the cases where one of them is missing.
  none_but = lambda x: product(x + empty)
  kinds = none_but(first) - product(empty)
  kinds = jnp.where(two, none_but(first + second) - kinds - none_but(second), kinds)
  subjects = alone + grid * kinds
  asked_for = said.number * jnp.where(two, 2, 1)
  number = jnp.where(asked_for == 1, 1 - grid, 0.0) + grid * take(
      _counts(1 - empty, empty), asked_for)
  place = grid * _related(first, second, 1 - first - second, said.relation)
  colour = take(sight.colour, said.colour)

  in_style = jnp.where(styled[:, None], take(sight.quarter_styles, said.style), 1.0)
  whole_in_style = jnp.where(styled, take(sight.whole_style, said.style), 1.0)
  known = 1 - empty - other
  style = (1 - grid) * whole_in_style + grid * (
      product(empty + other + known * in_style) - product(empty + other))

  scene = jnp.where(two, _related(first * in_style, second * in_style, empty, said.relation),
                    take(_counts(first * in_style, empty), said.number))
  filled = jnp.where(said.number == 1, alone * whole_in_style, 0.0)
  scene = (filled + grid * scene) * colour
  named = {"subjects": True, "number": True, "place": two, "colour": True, "style": styled}
  parts = dict(zip(PARTS, (subjects, number, place, colour, style), strict=True))
  return {part: jnp.where(named[part], value, 1.0).clip(0.0, 1.0)
          for part, value in parts.items()} | {"scene": scene.clip(0.0, 1.0)}


# --- rewards ------------------------------------------------------------------------------------


def _prepare(part: str, prompts: list[str]) -> dict[str, np.ndarray]:
  said = asked(prompts, crops.shipped()[0].config["subjects"])
  if part == "place" and (said.second < 0).any():
    prompt = prompts[int((said.second < 0).argmax())]
    raise UserError(f"prompt {prompt!r}: the reward 'place' reads prompts that say where one of "
                    "two subjects is, such as 'a cat above a dog on a blue background'")
  if part == "style_3d":
    said = said._replace(style=np.full_like(said.style, STYLES.index("3d")))
  return said._asdict()


def _score(module, part: str, soft: bool, params, images, prepared):
  sight, said = crops.see(module, params, images), Asked(**prepared)
  found = answers(sight if soft else sight.decided(), said)
  log = lambda p: jnp.log((1 - FLOOR) * p + FLOOR)
  if part == "scene_share":
    named = jnp.stack([said.first >= 0, said.first >= 0, said.second >= 0, said.first >= 0,
                       said.style >= 0])
    values = jnp.stack([found[name] for name in PARTS])
    return ((log(values) if soft else values) * named).sum(0) / named.sum(0)
  value = found["style" if part == "style_3d" else part]
  return log(value) if soft else value


def _reward(part: str, soft: bool) -> Reward:
  module, params = crops.shipped()
  share = part == "scene_share"
  return Reward(
      ("soft_" if soft else "") + part, params, functools.partial(_prepare, part),
      functools.partial(_score, module, part, soft),
      f"{np.log(FLOOR):.1f} to 0, log-probability" if soft
      else "0 to 1, share of parts" if share else "0 or 1",
      differentiable=soft)


def _both(part: str):
  return (functools.partial(_reward, part, False), functools.partial(_reward, part, True))


scene, soft_scene = _both("scene")                     # all that the caption says at once
scene_share, soft_scene_share = _both("scene_share")   # mean over the parts that it names
number, soft_number = _both("number")
subjects, soft_subjects = _both("subjects")
place, soft_place = _both("place")
colour, soft_colour = _both("colour")
style_3d, soft_style_3d = _both("style_3d")            # whatever style the caption names
