"""The model cards say what was measured, and nothing else."""
import json
import shutil
import sys

import jax
import numpy as np
import pytest

import worlds
from jaxalign.convert import load_pipeline
from jaxalign.emoji import card, quality, scenes, sign_card, signs
from jaxalign.emoji.scorers import ASSETS, scene_judge
from jaxalign.errors import UserError
from jaxalign.pretrain import onestep

MODELS = list(card.TITLES)


@pytest.mark.parametrize("name", MODELS)
def test_shipped_card_is_made_from_its_files(name):
  result, training = (json.loads((ASSETS / name / f"{file}.json").read_text())
                      for file in ("quality", "training"))
  assert card.card(name, result, training, load_pipeline(ASSETS / name)) == (
      ASSETS / name / "README.md").read_text()
  assert result["images"] == 3 * card.EACH and set(training) == {"autoencoder", "model"}


def test_shipped_weights_are_small_and_the_autoencoder_is_stored_once():
  files = {file.resolve() for file in ASSETS.rglob("*.safetensors")}
  assert sum(file.stat().st_size for file in files) < 60e6
  own = ASSETS / "emoji" / "vae" / "diffusion_pytorch_model.safetensors"
  for name in ("emoji_onestep", "emoji_sd3", "signs"):
    assert (ASSETS / name / "vae" / own.name).samefile(own)


def test_shipped_card_of_signs_is_made_from_its_files():
  result, training = (json.loads((ASSETS / "signs" / f"{file}.json").read_text())
                      for file in ("quality", "training"))
  assert sign_card.text(result, training, load_pipeline(ASSETS / "signs")) == (
      ASSETS / "signs" / "README.md").read_text()


@pytest.mark.skipif(not shutil.which("tesseract"), reason="no tesseract here")
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the reader's wheel wants Python below it")
def test_readers_find_words_on_real_signs():
  captions = [signs.caption("CAT", "red"), signs.caption("AB", "white")]
  pictures = sign_card.real(load_pipeline(ASSETS / "signs"), captions)
  found = {name: share["mean"] for name, share in sign_card.readings(pictures, captions).items()}
  assert found["letters"] == found["ocr_exact"] == 1


def test_shipped_one_step_card_is_made_from_its_files():
  result, teacher = (json.loads((ASSETS / name / "quality.json").read_text())
                     for name in ("emoji_onestep", "emoji"))
  assert onestep.text(result, teacher) == (ASSETS / "emoji_onestep" / "README.md").read_text()
  with pytest.raises(UserError, match="not a finished run"):
    onestep.training_of(ASSETS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, "emoji_onestep"])
def test_shipped_models_draw_what_captions_say(name):
  """The judge tells a picture's own subject from 31 others on the same background."""
  pipeline, judge = load_pipeline(ASSETS / name), scene_judge()
  asked = [scenes.Scene((subject,), 1, "", "white")
           for subject in list(scenes.SUBJECTS.values())[:32]]
  images = quality.draw(pipeline, list(map(scenes.caption, asked)))
  right = quality.choices(judge, images, asked, [scene.subjects[0] for scene in asked], "subjects")
  assert right.mean() > 0.6


def test_figures_of_pictures_that_are_what_they_should_be(monkeypatch):
  world = quality.World(worlds.NAMES, worlds.drawings().take(slice(0, 4)), None, None)
  table = scenes.table(world.names, np.ones((4, 12), bool))
  asked, drawn = quality.ask(table, world.names, 8, jax.random.key(0))
  pictures = scenes.render(scenes.Sheets.of(world.drawings), table, drawn)
  monkeypatch.setattr(quality, "choices", lambda *args: np.ones(8, bool))
  figures = card.figures(world, asked, pictures, None)
  assert set(figures) == set(card.WORDS)
  assert all(figure["mean"] == 1 and figure["low"] < 1 for figure in figures.values())
  figures = card.figures(world, asked, np.roll(pictures, 1, 0), None)
  assert figures["colour"]["mean"] < 0.5


def test_bars_say_what_was_missed():
  share = lambda value: {"mean": value, "low": value - 0.1, "high": value + 0.1}
  result = {group: {name: share(value) for name in card.WORDS}
            for group, value in (("trained", 0.96), ("new", 0.5))}
  lines = card.bars(result).splitlines()
  assert len(lines) == len(card.BARS)
  assert [line.endswith("| met |") for line in lines] == [True, False, True, True, True, True, True]


def test_card_without_a_record_of_training_is_refused(tmp_path):
  with pytest.raises(UserError, match="--runs"):
    card.main([f"--model={tmp_path}"])
  (tmp_path / "training.json").write_text("{}")
  with pytest.raises(UserError, match="the card knows emoji, emoji_sd3"):
    card.main([f"--model={tmp_path}"])
  with pytest.raises(UserError, match="not a finished run"):
    card.training_of([tmp_path])
