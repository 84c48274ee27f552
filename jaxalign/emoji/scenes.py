"""Scenes of 64 x 64 pixels: one to four drawings on a flat colour, and the captions that say so.

A drawing alone fills the picture or a quarter of it; two to four of a kind, or two subjects side by
side or one above the other, take a quarter each. What a picture shows is therefore known by
construction, and can be read back by rule.
"""
import re
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.emoji.artwork import STYLES, Artwork
from jaxalign.emoji.colours import COLOURS, RGB
from jaxalign.errors import UserError

SIZE = 64                  # pixels of a side
NUMBERS = {"two": 2, "three": 3, "four": 4}
# Where the first subject is, seen from the second.
RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above",
             "below": "below"}
# What scenes are about, the most iconic first: code point and name as people say it.
SUBJECTS = dict(line.split(" ", 1) for line in """\
1f431 cat;1f436 dog;1f680 rocket;1f697 car;1f353 strawberry;1f355 pizza;2b50 star;1f3e0 house
1f427 penguin;1f438 frog;1f34c banana;1f354 hamburger;1f451 crown;1f333 tree;1f98b butterfly
2764 heart;1f3b8 guitar;1f68c bus;1f43c panda;1f422 turtle;26bd soccer ball;1f349 watermelon
1f916 robot;1f47b ghost;1f388 balloon;1f419 octopus;1f339 rose;1f98a fox;1f34e apple;1f381 gift
2708 airplane;1f981 lion;1f344 mushroom;1f433 whale;1f418 elephant
1f4f7 camera;1f511 key;1f366 ice cream;1f335 cactus;1f430 rabbit;1f41d bee;1f3c6 trophy
1f434 horse;1f989 owl;1f42f tiger;1f955 carrot;1f34d pineapple;1f986 duck;1f437 pig;26f5 boat
1f370 cake;1f33b sunflower;1f47d alien;1f980 crab;1f514 bell;1f4a1 light bulb;1f42e cow
1f984 unicorn;1f992 giraffe;1f36d lollipop;1f345 tomato;1f480 skull;1f435 monkey;1f41f fish
1f681 helicopter;1f3c0 basketball;1f337 tulip;1f951 avocado;1f993 zebra;1f48e diamond;1f40c snail
1f34b lemon;1f9a9 flamingo;1f528 hammer;1f414 chicken;1f43b bear;1f604 smiley;1f350 pear
1f369 donut;1f428 koala;1f334 palm tree;1f69c tractor;1f4d6 book;1f40d snake;1f512 lock
1f346 eggplant;1f36a cookie;1f996 dinosaur;1f351 peach;1f99c parrot;1f42d mouse;1f691 ambulance
1f950 croissant;1f4a3 bomb;1fad6 teapot;1f692 fire engine;1f425 chick;1f42a camel;2618 clover
""".replace("\n", ";").strip(";").split(";"))
_PLURALS = {"mouse": "mice", "fish": "fish", "cactus": "cacti", "tomato": "tomatoes"}
_A_DESPITE_A_VOWEL = ("unicorn",)


class Scene(NamedTuple):
  """What a caption says.

  Attributes:
    subjects: one name or two, in the caption's order.
    number: of the kind, 1 to 4; 1 where there are two subjects.
    relation: where the first is seen from the second, a key of `RELATIONS`; "" for one subject.
    colour: of the background.
    style: one of `STYLES`, or "" where none is named.
  """
  subjects: tuple[str, ...]
  number: int
  relation: str
  colour: str
  style: str = ""


def plural(name: str) -> str:
  """'strawberry' -> 'strawberries'."""
  if name in _PLURALS:
    return _PLURALS[name]
  if re.search("[^aeiou]y$", name):
    return name[:-1] + "ies"
  return name + ("es" if re.search("(s|x|z|ch|sh)$", name) else "s")


def with_article(noun: str) -> str:
  """'owl' -> 'an owl'."""
  vowel = noun[0] in "aeiou" and noun not in _A_DESPITE_A_VOWEL
  return f"{'an' if vowel else 'a'} {noun}"


def caption(scene: Scene) -> str:
  """'three strawberries on a pink background, 3d style'."""
  first, *second = scene.subjects
  if second:
    what = f"{with_article(first)} {RELATIONS[scene.relation]} {with_article(*second)}"
  elif scene.number == 1:
    what = with_article(first)
  else:
    word = next(word for word, number in NUMBERS.items() if number == scene.number)
    what = f"{word} {plural(first)}"
  style = f", {scene.style} style" if scene.style else ""
  return f"{what} on {with_article(scene.colour)} background{style}"


_CAPTION = re.compile(
    r"(?:(?P<word>two|three|four) (?P<many>[a-z ]+?)|an? (?P<one>[a-z ]+?)"
    r"(?: (?P<relation>to the left of|to the right of|above|below) an? (?P<other>[a-z ]+?))?)"
    rf" on an? (?P<colour>{'|'.join(COLOURS)}) background"
    rf"(?:,? (?P<style>{'|'.join(STYLES)}) style)?")
_SINGULAR = {plural(name): name for name in SUBJECTS.values()}


def parse(text: str) -> Scene:
  """The scene that a caption asks for; UserError where it is none of the grammar's."""
  match = _CAPTION.fullmatch(" ".join(text.lower().split()))
  names = [] if not match else [
      name for name in (_SINGULAR.get(match["many"]), match["one"], match["other"]) if name]
  if not names or not set(names) <= set(SUBJECTS.values()) or len(names) != len(set(names)):
    raise UserError(f"prompt {text!r} is no scene of the embedded world, such as "
                    "'three cats on a red background' or 'a cat above a dog on a blue background'")
  relation = next((key for key, words in RELATIONS.items() if words == match["relation"]), "")
  return Scene(tuple(names), NUMBERS.get(match["word"], 1), relation, match["colour"],
               match["style"] or "")


# --- what training never sees -------------------------------------------------------------------


def _percentile(*words: str) -> int:
  return zlib.crc32("|".join(words).encode()) % 100


def held_out(scene: Scene) -> tuple[str, ...]:
  """Which combinations of a scene are kept from training: of "colour", "number" and "pair".

  15 % of subject and colour, 20 % of subject and number (two to four), 30 % of ordered pairs: the
  order is that in the picture, so "a cat to the left of a dog" and "a dog to the right of a cat"
  are held out together.
  """
  out = []
  if any(_percentile(name, scene.colour) < 15 for name in scene.subjects):
    out.append("colour")
  if scene.number > 1 and _percentile(scene.subjects[0], str(scene.number)) < 20:
    out.append("number")
  if scene.relation:
    turned = scene.relation in ("right", "below")
    axis = "above" if scene.relation in ("above", "below") else "left"
    if _percentile(axis, *(scene.subjects[::-1] if turned else scene.subjects)) < 30:
      out.append("pair")
  return tuple(out)


def contrast(artwork: Artwork) -> np.ndarray:
  """`[N, 12]` bool: whether a drawing stands out from a colour, in each of the styles.

  At least half of its pixels, and half of those on its outline, are 0.2 or more away (root mean
  square over RGB in [0, 1]).
  """
  rgba = artwork.small.astype(np.float32) / 255
  solid = rgba[..., 3] >= 0.5
  around = np.pad(solid, ((0, 0), (0, 0), (1, 1), (1, 1)))
  inside = (around[:, :, :-2, 1:-1] & around[:, :, 2:, 1:-1] & around[:, :, 1:-1, :-2]
            & around[:, :, 1:-1, 2:])
  out = np.empty((len(artwork.names), len(COLOURS)), bool)
  for i, rgb in enumerate(RGB):
    far = np.sqrt(np.square(rgba[..., :3] - rgb).mean(-1)) > 0.2
    share = lambda where: (far & where).sum((2, 3)) / where.sum((2, 3)).clip(1)
    out[:, i] = np.minimum(share(solid), share(solid & ~inside)).min(0) >= 0.5
  return out


# --- pictures -----------------------------------------------------------------------------------


class Sheets(NamedTuple):
  """Drawings with their margins, style by style, and last an empty one.

  large, small: `[3 N + 1, 64, 64, 4]` and `[3 N + 1, 32, 32, 4]` uint8; row `style * N + subject`.
  """
  large: np.ndarray
  small: np.ndarray

  @classmethod
  def of(cls, artwork: Artwork) -> "Sheets":
    def sheet(rgba, size):
      margin = (size - rgba.shape[2]) // 2
      flat = rgba.reshape(-1, *rgba.shape[2:])
      return np.pad(flat, ((0, 1), (margin, margin), (margin, margin), (0, 0)))
    return cls(sheet(artwork.large, SIZE), sheet(artwork.small, SIZE // 2))


def compose(sheets: Sheets, large, quarters, rgb):
  """Pictures of drawings on flat colours.

  Args:
    large: `[B]` int, row of the drawing that fills the picture; the last row where none does.
    quarters: `[B, 4]` int, rows of the four quarters (upper left, upper right, lower left, lower
      right), the last row for an empty one; without effect where `large` is a drawing.
    rgb: `[B, 3]` in [0, 1].
  Returns:
    `[B, 64, 64, 3]` f32 in [0, 1].
  """
  half = SIZE // 2
  quarter = jnp.asarray(sheets.small)[quarters].reshape(-1, 2, 2, half, half, 4)
  grid = quarter.transpose(0, 1, 3, 2, 4, 5).reshape(-1, SIZE, SIZE, 4)
  large = jnp.asarray(large)
  alone = (large < len(sheets.large) - 1)[:, None, None, None]
  rgba = jnp.where(alone, jnp.asarray(sheets.large)[large], grid).astype(jnp.float32) / 255
  alpha = rgba[..., 3:]
  return rgba[..., :3] * alpha + jnp.asarray(rgb)[:, None, None] * (1 - alpha)


class Table(NamedTuple):
  """Scenes that may be drawn, colour and style left open; grouped as single, several, two.

  Attributes:
    first, second: `[H]` int32, subjects in the caption's order; `second` is -1 for none.
    number: `[H]` int32. relation: `[H]` int32, index into `RELATIONS`; -1 for none.
    colours: `[H, 12]` bool, those that the scene may have.
    starts: `[4]` int32, where the groups begin, and the end.
  """
  first: np.ndarray
  second: np.ndarray
  number: np.ndarray
  relation: np.ndarray
  colours: np.ndarray
  starts: np.ndarray

  def scene(self, row: int, colour: int, names, style: str = "") -> Scene:
    """One of them, in words."""
    second = int(self.second[row])
    return Scene((names[int(self.first[row])], *([names[second]] if second >= 0 else [])),
                 int(self.number[row]), (*RELATIONS, "")[int(self.relation[row])],
                 COLOURS[colour], style)


def table(names, visible, keep=lambda scene: not held_out(scene)) -> Table:
  """All scenes of subjects `names` that `keep` accepts (by default, those of training).

  Args:
    visible: `[N, 12]` bool, as `contrast` gives it.
  """
  groups = ([(i, -1, 1, -1) for i in range(len(names))],
            [(i, -1, number, -1) for i in range(len(names)) for number in NUMBERS.values()],
            [(i, j, 1, relation) for i in range(len(names)) for j in range(len(names)) if i != j
             for relation in range(len(RELATIONS))])
  heads, colours, starts = [], [], [0]
  words = (*RELATIONS, "")
  for group in groups:
    for i, j, number, relation in group:
      subjects = (names[i],) if j < 0 else (names[i], names[j])
      allowed = visible[i] & (visible[j] if j >= 0 else True)
      kept = [bool(ok) and keep(Scene(subjects, number, words[relation], colour))
              for ok, colour in zip(allowed, COLOURS)]
      if any(kept):
        heads.append((i, j, number, relation))
        colours.append(kept)
    starts.append(len(heads))
  return Table(*np.array(heads, np.int32).reshape(-1, 4).T, np.array(colours),
               np.array(starts, np.int32))


class Drawn(NamedTuple):
  """A batch of scenes as indices: row of the table, colour, style; and how they are laid out.

  row, colour, style: `[B]` int32. large: `[B]` bool. places: `[B, 4]` int32, the subject in each
  quarter, -1 where it is empty (all of them for a large one).
  """
  row: jax.Array
  colour: jax.Array
  style: jax.Array
  large: jax.Array
  places: jax.Array


def draw(scenes: Table, key, batch: int, shares=(0.3, 0.3, 0.4)) -> Drawn:
  """Random scenes: the kind by `shares` (single, several, two), then a scene, a colour, a style.

  Two thirds of the single ones are large. What is small takes random quarters.
  """
  k_kind, k_row, k_colour, k_style, k_large, k_place, k_line = jax.random.split(key, 7)
  starts = jnp.asarray(scenes.starts)
  kind = jax.random.choice(k_kind, 3, (batch,), p=jnp.asarray(shares))
  row = starts[kind] + jnp.int32(
      jax.random.uniform(k_row, (batch,)) * (starts[kind + 1] - starts[kind]))
  weights = jnp.where(jnp.asarray(scenes.colours)[row], 0.0, -jnp.inf)
  colour = jax.random.categorical(k_colour, weights)
  style = jax.random.randint(k_style, (batch,), 0, len(STYLES))
  large = (kind == 0) & (jax.random.uniform(k_large, (batch,)) < 2 / 3)
  take = lambda column: jnp.asarray(column)[row][:, None]
  first, second, relation = take(scenes.first), take(scenes.second), take(scenes.relation)
  order = jnp.argsort(jax.random.uniform(k_place, (batch, 4)))
  several = jnp.where(order < take(scenes.number), first, -1)
  # A pair lies in one line of the grid; right and below turn it round.
  line, quarter = jax.random.randint(k_line, (batch, 1), 0, 2), jnp.arange(4)[None]
  upright = relation >= 2
  across, along = jnp.where(upright, quarter % 2, quarter // 2), jnp.where(
      upright, quarter // 2, quarter % 2)
  two = jnp.where(across != line, -1, jnp.where(along == relation % 2, first, second))
  places = jnp.where(second < 0, several, two)
  return Drawn(row, colour, style, large, jnp.where(large[:, None], -1, places))


def render(sheets: Sheets, scenes: Table, drawn: Drawn, rgb=RGB):
  """`[B, 64, 64, 3]` f32 in [0, 1]: the pictures of drawn scenes."""
  empty = len(sheets.large) - 1
  base = drawn.style * (empty // len(STYLES))
  large = jnp.where(drawn.large, base + jnp.asarray(scenes.first)[drawn.row], empty)
  quarters = jnp.where(drawn.places < 0, empty, base[:, None] + drawn.places)
  return compose(sheets, large, quarters, jnp.asarray(rgb)[drawn.colour])
