"""`soft_word` is the posterior of a word under the model that draws signs, and has its gradient."""
import itertools

import jax
import numpy as np
import pytest

from jaxalign.emoji import lettering, scenes, signs
from jaxalign.errors import UserError
from jaxalign.rewards import make_reward

SHIFTS = list(itertools.product(range(-2, 3), repeat=2))


def pictures(words, noise=0.0, seed=0):
  """Signs of these words on colours in turn, somewhere near the middle."""
  generator = np.random.default_rng(seed)
  rgb = scenes.RGB[np.arange(len(words)) % len(scenes.RGB)]
  clean = signs.render(signs.spell(words), rgb, generator.integers(-1, 2, (len(words), 2)))
  return np.clip(clean + noise * generator.standard_normal(clean.shape), 0, 1).astype(np.float32)


def scored(images, words):
  reward = make_reward(("soft_word",), (1.0,))
  captions = [signs.caption(word, "blue") for word in words]
  return np.asarray(reward.score(reward.params, images, reward.prepare(captions)))


def test_equals_the_sum_over_all_words():
  """With an alphabet of three letters, by rendering each word at each place."""
  letters = "ABC"
  words = ["".join(word) for count in (2, 3, 4)
           for word in itertools.product(letters, repeat=count)]
  images = pictures(["AC", "BAB", "CCBA"], noise=0.2)
  prior = np.array([-len(word) * np.log(3) for word in words])
  black, likelihood = np.zeros((len(words), 3)), []
  ink = np.asarray(signs.ink(images))
  for shift in SHIFTS:
    shifts = np.tile(shift, (len(words), 1))
    cover = np.asarray(signs.render(signs.spell(words), black, shifts))[..., 0]
    square = np.square(ink[:, None] - cover[None]).sum((2, 3))
    likelihood.append(prior - square / (2 * lettering.NOISE ** 2))
  joint = np.logaddexp.reduce(likelihood, 0)
  expected = joint - np.logaddexp.reduce(joint, 1, keepdims=True)
  params = {"glyphs": signs.letters()[:3]}
  for asked in range(0, len(words), 13):
    word = {"word": np.tile(signs.spell([words[asked]]), (3, 1))}
    np.testing.assert_allclose(lettering.score(params, images, word), expected[:, asked],
                               rtol=1e-4, atol=1e-3)


def test_prefers_the_word_that_is_there():
  words = signs.ask(24, np.random.default_rng(1), new=True)
  images = pictures(words)
  right = scored(images, words)
  assert np.all((right > -1) & (right <= 0))
  others = scored(images, [words[(i + 3) % 24] for i in range(24)])
  assert np.all(others < right - 5)


def test_its_gradient_mends_a_letter():
  """A few steps from a picture of one word make another of it, which a rule reads."""
  images, words = pictures(["CAT", "DO", "ZEST"]), ["CUT", "GO", "BEST"]
  reward = make_reward(("soft_word",), (1.0,))
  prepared = reward.prepare([signs.caption(word, "red") for word in words])
  climb = jax.jit(jax.grad(lambda x: reward.score(reward.params, x, prepared).sum()))
  assert signs.read(images) == ["CAT", "DO", "ZEST"]
  for _ in range(60):
    gradient = np.asarray(climb(images))
    images = np.clip(images + 0.1 * gradient / np.abs(gradient).max((1, 2, 3), keepdims=True), 0, 1)
  assert signs.read(images) == words


@pytest.mark.parametrize("word", ["cat", "A", "LONGER", "A1"])
def test_other_words_are_refused(word):
  prompt = f'a sign that says "{word}" on a red background'
  with pytest.raises(UserError, match="soft_word.*two to four") as error:
    make_reward(("soft_word",), (1.0,)).prepare([prompt])
  assert prompt in str(error.value)


def test_other_sizes_are_refused():
  with pytest.raises(UserError, match="64 x 64, not 32 x 32 pixels"):
    scored(np.zeros((1, 32, 32, 3), np.float32), ["CAT"])
