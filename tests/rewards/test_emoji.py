import importlib.util
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.data.emoji import COLOURS, Drawings, caption, colour_rgb
from jaxalign.errors import UserError
from jaxalign.models.tokenizer import Tokenizer
from jaxalign.rewards import train_scorers
from jaxalign.rewards.emoji import (
  ASSETS,
  EmojiJudge,
  emoji_accept,
  emoji_clip,
  emoji_judge,
  load_scorer,
)

ROOT = pathlib.Path(__file__).parent.parent.parent
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


def test_accept_is_a_threshold_of_clip():
  accept, clip = emoji_accept(), emoji_clip()
  hearts = np.stack([red_heart(c) for c in COLOURS])
  prepared = accept.prepare(["a red heart on a yellow background"] * len(COLOURS))
  scores = np.asarray(clip.score(clip.params, hearts, prepared))
  answers = accept.score(accept.params, hearts, prepared)
  assert answers.dtype == jnp.float32 and not accept.differentiable
  np.testing.assert_array_equal(answers, scores > 0.7)
  assert scores.min() < 0.7                               # a wrong background fails


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


# --- training -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawings():
  """Six flat drawings of six shades, two vendors apart by their size."""
  rgba = np.zeros((2, 6, 32, 32, 4), np.uint8)
  for i in range(6):
    rgba[0, i, 8:24, 8:24] = (40 * i, 255 - 40 * i, 120 * (i % 2), 255)
    rgba[1, i, 12:20, 4:28] = rgba[0, i, 10, 10]
  names = np.array(["cat", "dog", "whale", "tulip", "pizza", "heart"])
  return Drawings(rgba, names, np.array(["Activities"] * 6))


@pytest.fixture(scope="module")
def tables(drawings):
  return train_scorers.make_tables(drawings, Tokenizer.load(ASSETS / "emoji_clip"))


def smoke_config():
  spec = importlib.util.spec_from_file_location(
      "recipe", ROOT / "configs" / "pretrain_emoji_scorers.py")
  recipe = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(recipe)
  return recipe.get_config("smoke")


def test_batch_is_what_it_says(tables):
  draw = jax.jit(lambda key: train_scorers.draw_batch(
      tables, key, names=6, colours_per_step=4, style_fraction=0.5))
  batch = draw(jax.random.key(0))
  assert batch.images.shape == (12, 32, 32, 3)
  assert float(batch.images.min()) >= 0 and float(batch.images.max()) <= 1
  row = np.argsort(tables.same_name)[batch.name]
  assert np.all(np.asarray(tables.trained)[row, batch.colour])
  pairs = np.asarray(batch.colour).reshape(-1, 2)
  assert np.all(pairs[:, 0] != pairs[:, 1])
  assert np.all((batch.style == batch.vendor) | (batch.style == train_scorers.NO_STYLE))


def test_true_captions_are_no_negatives():
  zeros = np.zeros(4, np.int32)
  batch = train_scorers.Batch(None, None, name=zeros, colour=zeros, vendor=np.array([0, 1, 0, 1]),
                              style=zeros + train_scorers.NO_STYLE)
  image = text = np.eye(4, dtype=np.float32)
  loss, hit = train_scorers.contrastive_loss(image, text, 1.0, batch)
  assert float(loss) == 0 and float(hit) == 1
  loss, _ = train_scorers.contrastive_loss(np.ones((4, 1)), np.ones((4, 1)), 1.0,
                                           batch._replace(name=np.arange(4)))
  np.testing.assert_allclose(loss, np.log(4), rtol=1e-6)


def test_a_step_learns(tables):
  config = smoke_config()
  model = config.emoji_judge.model.to_dict() | {"vocab_size": 1515, "eos_token_id": 1}
  config.emoji_judge.steps = 60
  data = {k: v for k, v in config.data.items() if k != "categories"}
  init, step = train_scorers.make_step(EmojiJudge(model), tables, config.emoji_judge, data,
                                       config.optim)
  state, losses = init(jax.random.key(0)), []
  for i in range(60):
    state, metrics = step(state, jax.random.key(i), tables)
    losses.append(float(metrics["train/loss"]))
  assert step._cache_size() == 1  # one program, not one per call
  assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.3


def test_resumed_training_is_the_same(tables, tmp_path, monkeypatch):
  config, name = smoke_config(), "emoji_judge"
  config.train.save_every = 1
  config[name].steps = 4
  tokenizer = Tokenizer.load(ASSETS / "emoji_clip")
  train = lambda folder: train_scorers.train(name, config, tables, tokenizer, folder)
  whole = train(tmp_path / "whole")[1]

  save, count = train_scorers._save, []

  def killed(file, state):
    save(file, state)
    count.append(1)
    if len(count) == 2:
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(train_scorers, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
      train(tmp_path / "parts")
  chex.assert_trees_all_equal(whole, train(tmp_path / "parts")[1])
  config[name].lr = 0.5
  with pytest.raises(UserError, match="another config"):
    train(tmp_path / "parts")


@pytest.mark.slow
def test_the_recipe_writes_assets_that_load(drawings, tmp_path, images):
  np.savez(tmp_path / "emoji.npz", **drawings._asdict())
  config = smoke_config()
  config.eval.images = 32
  train_scorers.main(config, tmp_path / "emoji.npz", ASSETS / "emoji_clip", tmp_path / "out")
  for name in ("emoji_clip", "emoji_judge"):
    scorer = load_scorer(tmp_path / "out" / name)
    chex.assert_tree_all_finite(
        scorer.score(scorer.params, images, scorer.prepare(PROMPTS)))
    figures = json.loads((tmp_path / "out" / name / "config.json").read_text())["figures"]
    assert 0 <= figures["retrieval_20_held_out"] <= 1 and -1 <= figures["margin_correlation"] <= 1
