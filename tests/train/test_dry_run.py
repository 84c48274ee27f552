"""`--dry_run` tells what a run would be: every recipe, its files, its state, its counts."""
import math
import re

import jax
import jax.numpy as jnp
import pytest
from safetensors import safe_open

import runs
from jaxalign import train
from jaxalign.config.recipes import parse
from jaxalign.config.registry import own_methods
from jaxalign.emoji.recipes import MISMATCH
from jaxalign.errors import UserError
from jaxalign.train import dry_run, experiment
from jaxalign.train.opening import ASSETS

SEARCHES = ("best_of_n", "das", "dno", "fk_steering", "svdd")
QUICK = ("ddpo", "dno", "mapo")      # a reward that reads the prompts; a search; pairs


def stored_numbers(model: str) -> int:
  """How many numbers the file of a shipped UNet holds."""
  with safe_open(ASSETS / model / "unet" / "diffusion_pytorch_model.safetensors", "np") as file:
    return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())


def describe(name, argument="emoji", **overrides):
  """The text for a recipe on two devices, and its rows `{name: (numbers, MiB, MiB on each)}`."""
  config = runs.recipe(argument, name)
  for path, value in overrides.items():
    group, _, key = path.partition("__")
    config[group][key] = value
  text = dry_run.describe(parse(config), jax.devices()[:2])
  rows = re.findall(r"^(\S.*?) +([\d,]+) +([\d.]+) +([\d.]+)$", text, re.MULTILINE)
  return text, {row[0]: (int(row[1].replace(",", "")), *map(float, row[2:])) for row in rows}


@pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in sorted({*own_methods(), "diff_instruct_pp", "distill_emoji_onestep"})])
def test_every_recipe_on_the_embedded_model(name):
  text, rows = describe(name)
  assert "mesh {'data': 2, 'fsdp': 1, 'tensor': 1} on cpu" in text and "TFLOP" in text
  numbers = stored_numbers(runs.recipe("emoji", name).model.path.removeprefix("jaxalign:"))
  assert rows["unet"][:2] == (numbers, pytest.approx(4 * numbers / 2**20, abs=0.01))
  assert ("policy (trained)" in rows) == (name not in SEARCHES)
  if "policy (trained)" in rows and name != "nabla_gfn":           # which averages nothing else
    # Adam's two moments, and its count.
    assert rows["optimiser"][0] in (2 * rows["policy (trained)"][0] + n for n in (1, 2))


def test_a_search_updates_every_image(tmp_path):
  prompts = tmp_path / "prompts.txt"
  long = "a cat, " + "very " * 80
  prompts.write_text("\n".join(("a cat", "a dog", "a sun", long, long + "big")))
  text, rows = describe("dno", eval__prompts=5, eval__samples=3, sample__batch=8,
                        data__eval_prompts=str(prompts))
  assert text.count("2 of 5 prompts are cut to ") == 1 and repr(f"{long[:60]}...") in text
  assert "per update of 15 images" in text and "data.prompts is not read" in text
  assert f"{15 * 20 * 2:,} denoiser_forward" in text               # steps x guidance branches
  assert rows["z"][0] == 16 * 21 * 1024                             # the last batch is filled up
  assert rows["z"][2] == pytest.approx(rows["z"][1] / 2, abs=0.01)


def test_bytes_are_those_on_the_device():
  """In bfloat16 the kernels of frozen networks take half; what is trained does not."""
  _, full = describe("nabla_gfn", "smoke")
  text, half = describe("nabla_gfn", "smoke", model__dtype="bfloat16", optim__ema=0.9)
  assert 0.49 < half["unet"][1] / full["unet"][1] < 0.55
  assert half["policy (trained)"] == full["policy (trained)"]
  assert half["average"][0] == half["policy (trained)"][0] and "average" not in full
  weights = experiment.stored({"kernel": jnp.ones((2, 2))}, "float32")["kernel"]
  assert weights.dtype == jnp.float32


@pytest.mark.parametrize("name, overrides, message", [
    ("nabla_gfn", {"data__prompts": "nowhere.txt"}, "data.prompts=nowhere.txt"),
    ("nabla_gfn", {"data__eval_prompts": "nowhere.txt"}, "data.eval_prompts=nowhere.txt"),
    ("mapo", {"data__pairs": "nowhere.parquet"}, "data.pairs=nowhere.parquet"),
    ("ddpo", {"data__eval_prompts": "jaxalign:animals_heldout"},
     "'snail' is no scene of the embedded world")])
def test_files_that_the_run_would_refuse(name, overrides, message):
  with pytest.raises(UserError, match=message):
    describe(name, **overrides)


@pytest.mark.parametrize("size", MISMATCH)
def test_pairs_that_are_to_be_written_first(size, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=f"data.pairs=runs/pairs/{size}.parquet"):
    describe("diffusion_dpo", size)


def test_pairs_of_another_file():
  text, _ = describe("diffusion_dpo", "r0", data__pairs="jaxalign:fixture")
  assert re.search(r"\d+ preference pairs; watched on 400 training prompts, 32 held-out", text)


def test_devices_are_those_of_the_run(monkeypatch):
  asked = []
  monkeypatch.setattr(train.sharding, "use_cores", asked.append)
  cfg = runs.smoke(mesh__data=-1)
  train.start_devices(cfg)
  assert asked == [cfg.check_devices]
  train.start_devices(cfg, jax.devices())
  train.start_devices(runs.smoke(mesh__data=2))
  assert len(asked) == 1                    # whoever names devices or a mesh gets those
