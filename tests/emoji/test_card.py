"""The model card says what was measured, and nothing else."""
import json

import pytest

from jaxalign.convert import load_pipeline
from jaxalign.emoji import card, quality
from jaxalign.emoji.scorers import ASSETS, emoji_judge
from jaxalign.errors import UserError
from jaxalign.pretrain import onestep

MODEL = ASSETS / "emoji"


def test_shipped_card_is_made_from_its_files():
  result, training = (json.loads((MODEL / f"{name}.json").read_text())
                      for name in ("quality", "training"))
  assert card.card(result, training, load_pipeline(MODEL)) == (MODEL / "README.md").read_text()
  assert result["images"] == 512 and set(training) == {"autoencoder", "model"}


def test_shipped_model_is_what_it_promises():
  figures = json.loads((MODEL / "quality.json").read_text())["model"]
  for name, target in card.TARGETS.items():
    assert figures[name]["low"] > target, name
  sizes = [file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()]
  assert sum(sizes) < 40e6


def test_shipped_one_step_card_is_made_from_its_files():
  result, teacher = (json.loads((ASSETS / name / "quality.json").read_text())
                     for name in ("emoji_onestep", "emoji"))
  assert onestep.text(result, teacher) == (ASSETS / "emoji_onestep" / "README.md").read_text()
  with pytest.raises(UserError, match="not a finished run"):
    onestep.training_of(ASSETS)


def test_shipped_one_step_generator_draws_what_captions_say():
  """Its card says 95 % of 512; of 64 easy captions 80 % lie more than five errors below that."""
  pipeline, judge = load_pipeline(ASSETS / "emoji_onestep"), emoji_judge()
  names = ("cat face", "monkey face", "panda face", "zipper mouth face", "sparkling heart",
           "garlic", "tomato", "lemon")
  captions = [f"a {name} on a {colour} background" for name in names
              for colour in ("red", "green", "blue", "pink", "black", "gray", "orange", "white")]
  images = quality.draw(pipeline, captions)
  wrong = [[captions[(i + 8 * k) % 64] for k in range(1, 8)] for i in range(64)]    # other names
  assert quality.ranks_first(judge, images, captions, wrong).mean() > 0.8


def test_task_table_is_about_the_shipped_prompts():
  folder = ASSETS / "prompts"
  for row in json.loads((folder / "tasks.json").read_text()):
    for side, count in row["prompts"].items():
      prompts = (folder / f"{row['set']}_{side}.txt").read_text().splitlines()
      assert len(prompts) == len(set(prompts)) == count
    assert 0 <= row["base_success"]["low"] < row["base_success"]["high"] <= 1


def test_card_without_a_record_of_training_is_refused(tmp_path):
  with pytest.raises(UserError, match="--runs"):
    card.main(["--drawings=none.npz", f"--model={tmp_path}"])
  with pytest.raises(UserError, match="not a finished run"):
    card.training_of([tmp_path])


