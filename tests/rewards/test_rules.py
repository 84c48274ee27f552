"""Rewards without a network, and the weighted sum."""
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxalign.emoji.colours import COLOURS, PALETTE, color_accuracy, color_match
from jaxalign.errors import UserError
from jaxalign.rewards import REWARDS, HostReward, Reward, make_reward, weighted_sum
from jaxalign.rewards.rules import (
  brightness,
  jpeg_compressibility,
  jpeg_incompressibility,
)

JAX_RULES = (color_match, color_accuracy, brightness)


def _plain(colour, size=32):
  return np.broadcast_to(np.float32(PALETTE[colour]) / 255, (size, size, 3))


def _noise(*shape, seed=0):
  return np.random.default_rng(seed).random(shape, np.float32)


def _score(reward, images, prompts):
  images = jnp.asarray(images)
  return np.asarray(reward.score(reward.params, images, reward.prepare(prompts)))


PROMPTS = [f"a white heart on a {colour} background noto style" for colour in COLOURS]


def test_brightness_in_float64():
  images = _noise(3, 8, 8, 3)
  expected = (images.astype(np.float64) @ [0.299, 0.587, 0.114]).mean((1, 2))
  np.testing.assert_allclose(_score(brightness(), images, ["", "", ""]), expected, rtol=1e-6)
  np.testing.assert_allclose(_score(brightness(), np.ones((1, 8, 8, 3)), [""]), 1, rtol=1e-6)


@pytest.mark.parametrize("factory", JAX_RULES)
def test_jit_equals_eager_and_batch_order_is_kept(factory):
  reward = factory()
  images, prepared = jnp.asarray(_noise(12, 16, 16, 3)), reward.prepare(PROMPTS)
  eager = reward.score(reward.params, images, prepared)
  assert eager.shape == (12,) and eager.dtype == jnp.float32
  jitted = jax.jit(reward.score)(reward.params, images, prepared)
  np.testing.assert_allclose(jitted, eager, rtol=1e-5)
  flipped = reward.score(reward.params, images[::-1], jax.tree.map(lambda a: a[::-1], prepared))
  np.testing.assert_allclose(flipped, eager[::-1], rtol=1e-5)


def test_jpeg_size_is_pillows_in_kilobytes():
  images = (_noise(3, 32, 32, 3) * 255).astype(np.uint8)
  images[0] = 200
  sizes = []
  for image in images:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=95)
    sizes.append(len(buffer.getvalue()) / 1000)
  np.testing.assert_allclose(jpeg_incompressibility().score(images, [""] * 3), sizes, rtol=1e-6)
  compressibility = jpeg_compressibility().score(images, [""] * 3)
  np.testing.assert_allclose(compressibility, np.negative(sizes), rtol=1e-6)
  assert compressibility[0] > compressibility[1]


# --- The registry and the weighted sum ---------------------------------------------------------

def test_sum_of_jax_rewards_is_the_sum_and_gives_its_terms():
  reward = make_reward(("color_match", "brightness"), (2.0, -0.5))
  assert isinstance(reward, Reward) and reward.differentiable
  assert reward.name == "2*color_match + -0.5*brightness"
  images = _noise(12, 16, 16, 3)
  a, b = (_score(f(), images, PROMPTS) for f in (color_match, brightness))
  np.testing.assert_allclose(_score(reward, images, PROMPTS), 2 * a - 0.5 * b, rtol=1e-5, atol=1e-6)
  terms = jax.jit(reward.terms)(reward.params, images, reward.prepare(PROMPTS))
  np.testing.assert_allclose(terms["color_match"], a, rtol=1e-5)
  np.testing.assert_allclose(terms["brightness"], b, rtol=1e-5)
  np.testing.assert_allclose(weighted_sum(reward.weights, terms), 2 * a - 0.5 * b, rtol=1e-5,
                             atol=1e-6)


def test_terms_of_one_name_do_not_mix():
  """Both colour rules have entries in `prepared`; each must get its own."""
  reward = make_reward(("color_match", "color_accuracy"), (0.0, 1.0))
  assert not reward.differentiable
  images = np.stack([_plain(c) for c in COLOURS])
  np.testing.assert_array_equal(_score(reward, images, PROMPTS), 1)
  assert all(len(a) == len(PROMPTS) for a in reward.prepare(PROMPTS).values())


def test_a_black_box_term_makes_the_sum_a_host_reward():
  reward = make_reward(("brightness", "jpeg_compressibility"), (1.0, 0.1))
  assert isinstance(reward, HostReward)
  images = (_noise(4, 16, 16, 3) * 255).astype(np.uint8)
  bright = _score(brightness(), images.astype(np.float32) / 255, [""] * 4)
  size = jpeg_compressibility().score(images, [""] * 4)
  scores = reward.score(images, [""] * 4)
  assert scores.dtype == np.float32
  np.testing.assert_allclose(scores, bright + 0.1 * size, rtol=1e-5)
  np.testing.assert_allclose(reward.terms(images, [""] * 4)["brightness"], bright, rtol=1e-5)


def test_a_single_name_is_a_sum_of_one():
  reward = make_reward(("color_match",), (1.0,))
  assert reward.name == "color_match" and reward.weights == {"color_match": 1.0}
  images, bare = _noise(12, 16, 16, 3), color_match()
  np.testing.assert_allclose(_score(reward, images, PROMPTS), _score(bare, images, PROMPTS))
  assert set(bare.terms(bare.params, jnp.asarray(images), bare.prepare(PROMPTS))) == {"color_match"}


@pytest.mark.parametrize("names, weights, message", [
  ((), (), "reward.names is empty"),
  (("brightness", "brightness"), (1, 1), "a name twice"),
  (("brightness",), (1, 2), "reward.weights has 2 numbers for 1 reward.names"),
  (("brightness",), (float("nan"),), "reward.weights must be finite"),
  (("beauty",), (1,), "reward.names: unknown reward 'beauty'; choose from brightness, color_acc"),
])
def test_wrong_config(names, weights, message):
  with pytest.raises(UserError) as e:
    make_reward(names, weights)
  assert message in str(e.value) and "\n" not in str(e.value)


class _EntryPoint:
  value = "other_package:reward"

  def __init__(self, name, reward):
    self.name, self._reward = name, reward

  def load(self):
    return lambda: self._reward


_SUM = Reward("theirs", {}, lambda prompts: {}, lambda p, x, c: x.sum((1, 2, 3)))


def _install(monkeypatch, name, reward=_SUM):
  monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [_EntryPoint(name, reward)])


@pytest.mark.parametrize("pad", [8, 0])
def test_a_mixed_sum_prepares_each_prompt_once(monkeypatch, pad):
  """Embedding a prompt takes a network; the prompts of a run are the same at every step."""
  asked = []

  def prepare(prompts):
    asked.extend(prompts)
    width = pad or max(map(len, prompts))
    return {"letters": np.stack([np.pad(np.ones(len(p), np.float32), (0, width - len(p)))
                                 for p in prompts])}
  score = lambda params, images, prepared: prepared["letters"].sum(1) + images.mean((1, 2, 3))
  _install(monkeypatch, "length", Reward("length", {}, prepare, score))
  reward = make_reward(("length", "jpeg_compressibility"), (1.0, 0.0))
  images = np.zeros((3, 8, 8, 3), np.uint8)
  for prompts in (["a", "bb", "a"], ["bb", "bb", "ccc"], ["ccc", "a", "bb"]):
    np.testing.assert_array_equal(reward.score(images, prompts), [len(p) for p in prompts])
  if pad:                        # else a prompt's row depends on the others of its call
    assert sorted(asked) == ["a", "bb", "ccc"]


def test_other_packages_add_rewards(monkeypatch):
  _install(monkeypatch, "theirs")
  images = _noise(2, 4, 4, 3)
  np.testing.assert_allclose(_score(make_reward(("theirs",), (2,)), images, ["", ""]),
                             2 * images.sum((1, 2, 3)), rtol=1e-6)


def test_a_name_cannot_be_registered_twice(monkeypatch):
  _install(monkeypatch, next(iter(REWARDS)))
  with pytest.raises(UserError, match="registered twice; other_package:reward"):
    make_reward(("brightness",), (1,))
