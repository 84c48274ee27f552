import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.emoji import scenes
from jaxalign.emoji.scorers import ASSETS, load_scorer, scene_clip, scene_judge
from jaxalign.errors import UserError
from jaxalign.models.tokenizer import Tokenizer

PROMPTS = ["three frogs on a red background", "a cat on a blue background, noto style",
           "a heart above a star on a yellow background"]


@pytest.fixture(scope="module", params=[scene_clip, scene_judge], ids=lambda f: f.__name__)
def scorer(request):
  return request.param()


@pytest.fixture
def images():
  return np.random.default_rng(0).uniform(size=(3, 64, 64, 3)).astype(np.float32)


def test_shapes_range_and_jit(scorer, images):
  prepared = scorer.prepare(PROMPTS)
  assert all(a.shape[0] == len(PROMPTS) for a in prepared.values())
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(scorer.params))
  scores = scorer.score(scorer.params, images, prepared)
  assert scores.shape == (3,) and scores.dtype == jnp.float32
  assert np.all(np.abs(scores) <= 1 + 1e-6)
  np.testing.assert_allclose(jax.jit(scorer.score)(scorer.params, images, prepared), scores,
                             atol=1e-5)


def test_prepared_belongs_to_its_prompt(scorer, images):
  together = scorer.prepare(PROMPTS)
  for i, prompt in enumerate(PROMPTS):
    for key, value in scorer.prepare([prompt]).items():
      np.testing.assert_array_equal(value[0], together[key][i])
  same = np.repeat(images[:1], 3, axis=0)
  assert len(np.unique(np.asarray(scorer.score(scorer.params, same, together)))) == 3


@pytest.mark.parametrize("size", [64, 128, 48])
def test_gradient_reaches_every_image_size(scorer, size):
  images = jnp.full((3, size, size, 3), 0.5)
  prepared = scorer.prepare(PROMPTS)
  grad = jax.grad(lambda x: scorer.score(scorer.params, x, prepared).sum())(images)
  chex.assert_tree_all_finite(grad)
  assert np.all(np.abs(grad).max(axis=(1, 2, 3)) > 1e-5)


def test_bad_input_raises(scorer, images):
  with pytest.raises(ValueError, match=r"not \[B, H, W, 3\]"):
    scorer.score(scorer.params, images[0], scorer.prepare(PROMPTS))
  with pytest.raises(ValueError, match="3 images but 2"):
    scorer.score(scorer.params, images, scorer.prepare(PROMPTS[:2]))


def shapes(scene, size=64):
  """A picture that no artist drew, and no scorer saw: a flat background with discs on it."""
  y, x = np.mgrid[:size, :size] / size
  centres = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75))[:scene.number]
  inside = np.any([np.hypot(x - a, y - b) < 0.2 for a, b in centres], 0)[..., None]
  rgb = scenes.RGB[scenes.COLOURS.index(scene.colour)]
  return np.where(inside, np.array([0.95, 0.55, 0.1]), rgb).astype(np.float32)


def test_knows_the_colour_behind_what_it_never_saw(scorer):
  """One to three orange discs."""
  asked = [scenes.Scene(("basketball",), number, "", colour) for number in (1, 2, 3)
           for colour in ("white", "black", "blue", "green", "purple", "cyan", "gray", "pink")]
  images = np.stack(list(map(shapes, asked)))
  def best(variants):
    scores = np.stack([np.asarray(scorer.score(
        scorer.params, images, scorer.prepare([scenes.caption(change(s)) for s in asked])))
        for change in variants])
    return scores.argmax(0)
  colours = best([lambda s, c=c: s._replace(colour=c) for c in scenes.COLOURS])
  assert np.mean([scenes.COLOURS[i] == s.colour for i, s in zip(colours, asked)]) > 0.9


def test_judge_describes_images(images):
  judge = scene_judge()
  features = judge.features(judge.params, images)
  assert features.shape == (3, 64)
  np.testing.assert_allclose(jnp.sum(features**2, axis=-1), np.ones(3), atol=1e-5)
  assert judge.style(judge.params, images).shape == (3, 3)


def test_scorers_read_captions_as_the_model_does():
  folder = ASSETS / "emoji" / "tokenizer"
  for file in folder.iterdir():
    for name in ("scene_clip", "scene_judge"):
      assert (ASSETS / name / file.name).read_bytes() == file.read_bytes()
  np.testing.assert_array_equal(scene_judge().prepare(PROMPTS)["input_ids"],
                                Tokenizer.load(folder)(PROMPTS))


def test_assets_are_small():
  files = [f for name in ("scene_clip", "scene_judge") for f in (ASSETS / name).iterdir()]
  assert sum(f.stat().st_size for f in files) < 8e6


def test_unknown_asset_is_a_user_error(tmp_path):
  with pytest.raises(UserError, match="not a scorer"):
    load_scorer(tmp_path)
