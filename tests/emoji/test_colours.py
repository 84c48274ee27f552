"""Rules about the colour of the background."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.emoji.colours import COLOURS, PALETTE, color_accuracy, color_match
from jaxalign.errors import UserError


def _plain(colour, size=32):
  return np.broadcast_to(np.float32(PALETTE[colour]) / 255, (size, size, 3))


def _noise(*shape, seed=0):
  return np.random.default_rng(seed).random(shape, np.float32)


def _score(reward, images, prompts):
  images = jnp.asarray(images)
  return np.asarray(reward.score(reward.params, images, reward.prepare(prompts)))


PROMPTS = [f"a white heart on a {colour} background noto style" for colour in COLOURS]


def test_right_colours_score_best_and_every_wrong_one_scores_less():
  images = np.stack([_plain(c) for c in COLOURS])
  np.testing.assert_allclose(_score(color_match(), images, PROMPTS), 0, atol=1e-6)
  np.testing.assert_array_equal(_score(color_accuracy(), images, PROMPTS), 1)
  shifted = np.roll(images, 1, axis=0)
  assert (_score(color_match(), shifted, PROMPTS) < -0.05).all()
  np.testing.assert_array_equal(_score(color_accuracy(), shifted, PROMPTS), 0)


def test_color_match_in_float64():
  images = _noise(12, 32, 48, 3)
  ring = np.ones((32, 48), bool)
  ring[2:-2, 2:-2] = False  # a sixteenth of 32 px
  mean = images.astype(np.float64)[:, ring].mean(1)
  d = np.sqrt(((mean - np.array([PALETTE[c] for c in COLOURS]) / 255) ** 2).mean(1))
  expected = -(np.sqrt(d ** 2 + 0.05 ** 2) - 0.05) / (np.sqrt(1 + 0.05 ** 2) - 0.05)
  np.testing.assert_allclose(_score(color_match(), images, PROMPTS), expected, atol=1e-6)


def test_color_match_is_bounded():
  prompts = ["a cat on a white background"]
  assert -1 <= _score(color_match(), np.zeros((1, 8, 8, 3), np.float32), prompts)[0] < -0.99


def test_color_match_gradient_points_to_the_colour():
  reward = color_match()
  images = jnp.full((1, 1, 2, 3), 0.5)  # two pixels, both border
  gradient = jax.grad(lambda x: reward.score(
    {}, x, reward.prepare(["a cat on a red background"])).sum())(images)
  np.testing.assert_array_equal(np.sign(gradient[0, 0]), [[1, -1, -1]] * 2)


def test_color_match_gradient_exists_at_the_exact_colour():
  reward = color_match()
  gradient = jax.grad(lambda x: reward.score({}, x, reward.prepare(PROMPTS[:1])).sum())(
    jnp.asarray(_plain(COLOURS[0])[None]))
  np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("factory", [color_match, color_accuracy])
def test_the_middle_of_the_image_does_not_matter(factory):
  images = np.stack([_plain("red"), _plain("red")])
  images[1, 2:-2, 2:-2] = 0
  scores = _score(factory(), images, ["a cat on a red background"] * 2)
  assert scores[0] == scores[1]


def test_color_accuracy_survives_a_drawing_that_touches_the_border():
  image = _plain("blue").copy()
  image[:, 10:20] = 0  # 20 of 64 columns' ends of the ring
  assert _score(color_accuracy(), image[None], ["a cat on a blue background"])[0] == 1


@pytest.mark.parametrize("prompt", ["", "a red heart", "a heart on a teal background"])
def test_a_prompt_without_a_palette_colour_is_named(prompt):
  with pytest.raises(UserError, match="each prompt, not") as e:
    color_match().prepare(["a cat on a red background", prompt])
  assert repr(prompt) in str(e.value) and "\n" not in str(e.value)


def test_the_background_word_decides_not_other_colours():
  prepared = color_match().prepare(["a red heart on an Orange background, white outline"])
  np.testing.assert_allclose(prepared["colour"][0] * 255, PALETTE["orange"])
