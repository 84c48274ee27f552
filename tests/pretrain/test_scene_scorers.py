"""What teaches the scorers of scenes: near misses, crops, and recipes that write assets."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
import worlds
from jaxalign.config.recipes import load_recipe
from jaxalign.emoji import crops, scenes, words
from jaxalign.emoji.artwork import STYLES
from jaxalign.emoji.scorers import load_scorer
from jaxalign.errors import UserError
from jaxalign.pretrain import crops as crops_task
from jaxalign.pretrain import loop
from jaxalign.pretrain.config import parse
from jaxalign.pretrain.scene_denoisers import NO_STYLE
from jaxalign.pretrain.scene_scorers import Rows, Said, loss_of, near_misses, true_of

NAMES = worlds.NAMES
TABLE = scenes.table(NAMES, np.ones((4, 12), bool), lambda scene: True)
ROWS = Rows.of(TABLE, len(NAMES))


def in_words(said, i, j=None) -> scenes.Scene:
  row, colour, style = (int(x[i] if j is None else x[i, j]) for x in said)
  return TABLE.scene(row, colour, NAMES, (*STYLES, "")[style])


def test_near_misses_are_wrong_in_one_part():
  drawn = scenes.draw(TABLE, jax.random.key(0), 200)
  said = Said(drawn.row, drawn.colour, drawn.style)
  wrong = near_misses(TABLE, ROWS, drawn, said, jax.random.key(1))
  across = jax.tree.map(lambda x: x[:, None], drawn)
  true = np.asarray(true_of(ROWS, across, wrong))
  for i in range(200):
    scene = in_words(said, i)
    subject, layout, colour, style = (in_words(wrong, i, j) for j in range(4))
    assert subject._replace(subjects=scene.subjects) == scene
    assert layout._replace(number=scene.number, relation=scene.relation) == scene
    assert colour._replace(colour=scene.colour) == scene != colour
    assert style._replace(style=scene.style) == scene != style
    assert layout != scene and not true[i, 1:].any()
    # The other subject of a pair would make it one of a kind, which is no scene of two.
    assert true[i, 0] == (subject == scene)


def test_captions_that_say_the_same_are_true_of_the_same_pictures():
  row = lambda *scene: next(
      i for i in range(len(TABLE.first)) if TABLE.scene(i, 0, NAMES)[:3] == scene)
  a, b, c, *_ = NAMES
  left, right = row((a, b), 1, "left"), row((b, a), 1, "right")
  other, above = row((b, a), 1, "left"), row((a, b), 1, "above")
  assert ROWS.same[left] == ROWS.same[right]
  assert len({int(ROWS.same[r]) for r in (left, other, above)}) == 3
  drawn = scenes.Drawn(*(jnp.asarray([x]) for x in (left, 2, 1)), None, None)
  said = lambda *x: Said(*(jnp.asarray([v]) for v in x))
  assert true_of(ROWS, drawn, said(right, 2, NO_STYLE))[0]
  assert true_of(ROWS, drawn, said(right, 2, 1))[0]
  assert not true_of(ROWS, drawn, said(right, 2, 0))[0]
  assert not true_of(ROWS, drawn, said(right, 3, 1))[0]


def test_loss_of_scorers():
  """By hand: two pictures, two captions, a near miss each."""
  eye = jnp.eye(4)
  image, text, wrong = eye[:2], eye[:2], eye[None, 2:3].repeat(2, 0)
  none = lambda *shape: jnp.zeros(shape, bool)
  loss, hit = loss_of(image, text, wrong, none(2, 2), none(2, 1), 3.0)
  of_images = -np.log(np.exp(3) / (np.exp(3) + 2))
  assert loss == pytest.approx(0.5 * (of_images - np.log(np.exp(3) / (np.exp(3) + 1))), rel=1e-5)
  assert hit == 1
  # What is true of the picture is no negative.
  loss, _ = loss_of(image, text, wrong, ~jnp.eye(2, dtype=bool), ~none(2, 1), 3.0)
  assert loss == pytest.approx(0, abs=1e-6)


def test_crops_are_labelled_by_what_they_show():
  subjects, count = 2, 4                      # two of four drawings are something else
  layout = crops_task.Layout(
      jnp.array([[0, 4, 1, 3, 4], [4, 4, 4, 4, 1], [4, 4, 4, 4, 4], [4, 4, 4, 4, 3]]),
      jnp.zeros((4, 5), jnp.int32), jnp.zeros(4, jnp.int32))
  empty, other = 2, 3
  np.testing.assert_array_equal(layout.labels(subjects, count), [
      [0, empty, 1, other, other], [other] * 4 + [1], [empty] * 5, [other] * 5])
  sheets = scenes.Sheets.of(worlds.drawings().take(slice(0, 4)))
  images = layout.render(sheets)
  cut = crops.cut(images)
  assert cut.shape == (4, 5, 32, 32, 3)
  np.testing.assert_allclose(cut[2], np.broadcast_to(scenes.RGB[0], (5, 32, 32, 3)), atol=1e-6)
  np.testing.assert_allclose(cut[0, 3], images[0, 32:, 32:], atol=1e-6)
  np.testing.assert_allclose(cut[0, 4].mean(), images[0].mean(), rtol=1e-5)


def test_scenes_as_layouts_are_the_same_pictures():
  drawn = scenes.draw(TABLE, jax.random.key(2), 50)
  sheets = scenes.Sheets.of(worlds.drawings().take(slice(0, 4)))
  layout = crops_task.Layout.of(drawn, TABLE, 4)
  np.testing.assert_array_equal(layout.render(sheets), scenes.render(sheets, TABLE, drawn))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scene_clip", "scene_judge", "scene_check"])
def test_recipes_write_assets_that_load(name, tmp_path):
  np.savez(tmp_path / "artwork.npz", **worlds.drawings()._asdict())
  vae = load_recipe(f"{runs.ROOT / 'configs'}/pretrain_emoji_vae.py:smoke")
  config = load_recipe(f"{runs.ROOT / 'configs'}/pretrain_scene_scorers.py:{name},smoke")
  config.task.artwork = vae.task.artwork = str(tmp_path / "artwork.npz")
  loop.run(parse(vae), tmp_path / "vae")
  config.task.vae = str(tmp_path / "vae" / "export")
  config.task.batch = 16                               # divides over the tests' eight devices
  summary = loop.run(parse(config), tmp_path / name)
  folder = tmp_path / name / "export"
  figures = json.loads((folder / "config.json").read_text())["figures"]
  assert {f"eval/{key}": value for key, value in figures.items()} == summary["figures"]
  images = np.zeros((2, 64, 64, 3), np.float32)
  if name == "scene_check":
    module, params = crops.load(folder)
    sight = crops.see(module, params, images)
    assert sight.quarters.shape == (2, 4, 6)
    np.testing.assert_allclose(sight.whole.sum(-1), 1, rtol=1e-5)
    with pytest.raises(UserError, match="name"):
      load_scorer(folder)
  else:
    scorer = load_scorer(folder)
    prepared = scorer.prepare(["a cat on a red background"] * 2)
    assert prepared["input_ids"].shape == (2, words.LENGTH)
    assert np.isfinite(scorer.score(scorer.params, images, prepared)).all()
