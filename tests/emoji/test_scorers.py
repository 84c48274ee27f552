import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.emoji.drawings import COLOURS, caption, colour_rgb
from jaxalign.emoji.scorers import (
  ASSETS,
  emoji_clip,
  emoji_judge,
  emoji_rank,
  emoji_style,
  emoji_styled,
  load_scorer,
)
from jaxalign.errors import UserError
from jaxalign.models.tokenizer import Tokenizer

PROMPTS = ["a grinning face on a red background", "a cat on a blue background noto style",
           "a red heart on a yellow background"]


@pytest.fixture(scope="module", params=[emoji_clip, emoji_judge], ids=lambda f: f.__name__)
def scorer(request):
  return request.param()


@pytest.fixture
def images():
  return np.random.default_rng(0).uniform(size=(3, 32, 32, 3)).astype(np.float32)


def red_heart(background, size=32):
  """A drawing that no vendor made: two discs and a triangle, antialiased."""
  y, x = (np.mgrid[:4 * size, :4 * size] + 0.5) / (4 * size) - 0.5
  discs = np.minimum(np.hypot(x - 0.18, y + 0.12), np.hypot(x + 0.18, y + 0.12)) < 0.22
  inside = discs | ((y > -0.1) & (np.abs(x) * 1.05 + y < 0.38))
  inside = inside.reshape(size, 4, size, 4).mean((1, 3))[..., None]
  return (inside * np.array([0.87, 0.18, 0.27]) + (1 - inside) * colour_rgb(background)).astype(
      np.float32)


def test_shapes_range_and_jit(scorer, images):
  prepared = scorer.prepare(PROMPTS)
  assert all(a.shape[0] == len(PROMPTS) for a in prepared.values())
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(scorer.params))
  scores = scorer.score(scorer.params, images, prepared)
  assert scores.shape == (3,) and scores.dtype == jnp.float32
  assert np.all(np.abs(scores) <= 1 + 1e-6)
  np.testing.assert_allclose(jax.jit(scorer.score)(scorer.params, images, prepared), scores,
                             atol=1e-5)


def test_rank_asks_whether_the_prompt_is_best_of_twenty():
  rank, clip = emoji_rank(), emoji_clip()
  prompts = ["a red heart on a yellow background", "a whale on a yellow background noto style"]
  hearts = np.repeat(red_heart("yellow")[None], 2, 0)
  prepared = rank.prepare(prompts)
  assert prepared["input_ids"].shape[:2] == (2, 20)
  assert len({row.tobytes() for row in prepared["input_ids"][1]}) == 20
  np.testing.assert_array_equal(prepared["input_ids"][:, 0], clip.prepare(prompts)["input_ids"])
  answers = jax.jit(rank.score)(rank.params, hearts, prepared)
  assert answers.dtype == jnp.float32 and not rank.differentiable
  scores = np.stack([clip.score(clip.params, hearts, {"input_ids": prepared["input_ids"][:, k]})
                     for k in range(20)])
  np.testing.assert_array_equal(answers, scores[0] > scores[1:].max(0))
  best = scores.argmax(0)                  # asked for what it takes the image for, it says yes
  swapped = prepared["input_ids"].copy()
  swapped[[0, 1], 0], swapped[[0, 1], best] = swapped[[0, 1], best], swapped[[0, 1], 0]
  np.testing.assert_array_equal(rank.score(rank.params, hearts, {"input_ids": swapped}), [1, 1])
  with pytest.raises(UserError, match="emoji_rank reads"):
    rank.prepare(["a red heart"])


def test_style_is_a_difference_of_two_captions(images):
  style, clip = emoji_style(), emoji_clip()
  prompts = ["a cat on a red background noto style"] * 3
  score = style.score(style.params, images, style.prepare(prompts))
  own, other = (
      clip.score(clip.params, images, clip.prepare([f"a cat on a red background {s} style"] * 3))
      for s in ("noto", "twemoji"))
  np.testing.assert_allclose(score, own - other, atol=1e-6)
  styled = emoji_styled()
  np.testing.assert_array_equal(
      styled.score(styled.params, images, styled.prepare(prompts)), score > 0)
  with pytest.raises(UserError, match="end in a style"):
    style.prepare(["a cat on a red background"])


def test_prepared_belongs_to_its_prompt(scorer, images):
  together = scorer.prepare(PROMPTS)
  for i, prompt in enumerate(PROMPTS):
    for key, value in scorer.prepare([prompt]).items():
      np.testing.assert_array_equal(value[0], together[key][i])
  same = np.repeat(images[:1], 3, axis=0)
  assert len(np.unique(np.asarray(scorer.score(scorer.params, same, together)))) == 3


@pytest.mark.parametrize("size", [32, 64, 48])
def test_gradient_reaches_every_image_size(scorer, size):
  images = jnp.full((3, size, size, 3), 0.5)
  prepared = scorer.prepare(PROMPTS)
  grad = jax.grad(lambda x: scorer.score(scorer.params, x, prepared).sum())(images)
  chex.assert_tree_all_finite(grad)
  assert np.all(np.abs(grad).max(axis=(1, 2, 3)) > 1e-5)


def test_score_hardly_depends_on_resolution(scorer):
  prepared = scorer.prepare(PROMPTS[2:])
  score = lambda size: float(scorer.score(
      scorer.params, red_heart("yellow", size)[None], prepared)[0])
  assert abs(score(32) - score(64)) < 0.1


def test_bad_input_raises(scorer, images):
  with pytest.raises(ValueError, match=r"not \[B, H, W, 3\]"):
    scorer.score(scorer.params, images[0], scorer.prepare(PROMPTS))
  with pytest.raises(ValueError, match="3 images but 2"):
    scorer.score(scorer.params, images, scorer.prepare(PROMPTS[:2]))


def test_knows_an_unseen_red_heart(scorer):
  names = ["heavy black heart", "cat", "pizza", "grinning face", "soccer ball", "tulip", "whale"]
  prepared = scorer.prepare([caption(name, "yellow") for name in names])
  drawn = np.repeat(red_heart("yellow")[None], len(names), axis=0)
  assert int(jnp.argmax(scorer.score(scorer.params, drawn, prepared))) == 0
  prepared = scorer.prepare([caption("red heart", colour) for colour in COLOURS])
  drawn = np.repeat(red_heart("yellow")[None], len(COLOURS), axis=0)
  assert COLOURS[int(jnp.argmax(scorer.score(scorer.params, drawn, prepared)))] == "yellow"


def test_judge_describes_images(images):
  judge = emoji_judge()
  features = judge.features(judge.params, images)
  assert features.shape == (3, 64)
  np.testing.assert_allclose(jnp.sum(features**2, axis=-1), np.ones(3), atol=1e-5)
  assert judge.style(judge.params, images).shape == (3, 2)


def test_scorers_read_captions_as_the_model_does():
  folder = ASSETS / "emoji" / "tokenizer"
  for file in folder.iterdir():
    for name in ("emoji_clip", "emoji_judge"):
      assert (ASSETS / name / file.name).read_bytes() == file.read_bytes()
  np.testing.assert_array_equal(emoji_judge().prepare(PROMPTS)["input_ids"],
                                Tokenizer.load(folder)(PROMPTS))


def test_assets_are_small():
  files = [f for name in ("emoji_clip", "emoji_judge") for f in (ASSETS / name).iterdir()]
  assert sum(f.stat().st_size for f in files) < 8e6


def test_unknown_asset_is_a_user_error(tmp_path):
  with pytest.raises(UserError, match="not a scorer"):
    load_scorer(tmp_path)
