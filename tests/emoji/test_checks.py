"""Does a picture show its caption: the answers from what is seen, and the classifier's rewards."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import worlds
from jaxalign.emoji import checks, crops, reader, scenes
from jaxalign.emoji.artwork import STYLES

K = len(worlds.NAMES)
EMPTY, OTHER = K, K + 1
RED = scenes.COLOURS.index("red")


def reading(large, places, colour, style):
  """The same sight for the reader by rule and, as certainties, for the classifier."""
  names = [*worlds.NAMES, "", "?"]
  places = (places[0],) * 4 if large else places
  known = any(place < K for place in places)
  rule = reader.Reading(large, tuple(names[p] for p in places), scenes.COLOURS[colour],
                        (STYLES[style],) if known else ())
  one = lambda index, n: np.eye(n, dtype=np.float32)[index]
  sight = crops.Sight(one(places[0] if large else OTHER, K + 2),
                      one([OTHER] * 4 if large else list(places), K + 2),
                      one(style, 3), one([style] * 4, 3), one(colour, 12))
  return rule, sight


def test_certain_answers_are_those_of_the_reader_by_rule():
  a, b, c, *_ = worlds.NAMES
  captions = [scenes.caption(scene) for scene in (
      scenes.Scene((a,), 1, "", "red"), scenes.Scene((a,), 3, "", "red"),
      scenes.Scene((b,), 4, "", "red", "3d"), scenes.Scene((a,), 2, "", "white", STYLES[0]),
      *(scenes.Scene((a, b), 1, relation, "red", style) for relation in scenes.RELATIONS
        for style in ("", "3d")))]
  layouts = [*itertools.product((0, 1, 2, EMPTY, OTHER), repeat=4)]
  generator = np.random.default_rng(0)
  chosen = [layouts[i] for i in generator.integers(len(layouts), size=300)] + [
      (0, EMPTY, 0, 0), (0, 1, EMPTY, EMPTY), (EMPTY, EMPTY, 1, 0), (EMPTY, 0, EMPTY, 1),
      (1, EMPTY, 0, EMPTY), (EMPTY, EMPTY, 0, EMPTY), (1, 1, 1, 1), (EMPTY, 0, 0, EMPTY)]
  seen = [reading(large, places, colour, style) for places in chosen for large in (False, True)
          if not large or places[0] < K for colour, style in ((0, 0), (RED, 2))]
  rules, sights = zip(*seen)
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sights)
  for text in captions:
    scene = scenes.parse(text)
    said = jax.tree.map(lambda x: jnp.repeat(x, len(seen), 0),
                        checks.asked([text], worlds.NAMES))
    found = jax.device_get(checks.answers(stacked, said))
    for i, rule in enumerate(rules):
      right = reader.check(scene, rule)
      assert {part: bool(found[part][i]) for part in right} == right, (text, rule)
      assert all(found[part][i] in (0.0, 1.0) for part in found)
      assert bool(found["scene"][i]) == all(right.values()), (text, rule)
    assert found["scene"].any(), text                  # each caption has its picture


@pytest.mark.slow
def test_uncertain_answers_are_averages_over_certain_ones():
  """Against enumeration of everything that five crops can show."""
  rng = np.random.default_rng(1)
  p = lambda *shape: jax.nn.softmax(jnp.asarray(rng.normal(size=shape), jnp.float32) * 2)
  classes = 4                                          # two subjects, empty, other
  sight = crops.Sight(p(1, classes), p(1, 4, classes), p(1, 3), p(1, 4, 3), p(1, 12))
  said = checks.Asked(*(np.array([x], np.int32) for x in (0, 1, 1, 2, 3, 1)))
  events, weights = [], []
  grid = float(sight.whole[0, 2:].sum())
  for places in itertools.product(range(classes), repeat=4):
    for styles in itertools.product(range(3), repeat=4):
      weights.append(grid * np.prod([sight.quarters[0, i, k] for i, k in enumerate(places)])
                     * np.prod([sight.quarter_styles[0, i, k] for i, k in enumerate(styles)]))
      events.append((3, places, 0, styles))
  for k, style in itertools.product(range(2), range(3)):
    weights.append(float(sight.whole[0, k] * sight.whole_style[0, style]))
    events.append((k, (3,) * 4, style, (0,) * 4))
  assert np.sum(weights) == pytest.approx(1, abs=1e-5)
  one = lambda index, n: jnp.asarray(np.eye(n, dtype=np.float32)[np.array(index)])
  whole, quarters, whole_style, styles = zip(*events)
  certain = crops.Sight(one(whole, 4), one(quarters, 4), one(whole_style, 3), one(styles, 3),
                        jnp.repeat(sight.colour, len(events), 0))
  many = jax.tree.map(lambda x: np.repeat(x, len(events), 0), said)
  expected = {k: float(np.dot(weights, v)) for k, v in checks.answers(certain, many).items()}
  found = {k: float(v[0]) for k, v in checks.answers(sight, said).items()}
  assert found == pytest.approx(expected, abs=1e-5)
  assert 0 < found["scene"] < found["place"] < 1
