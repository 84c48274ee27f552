"""The `:sdxl` recipes on a small checkpoint of that family."""
import dataclasses

import jax
import numpy as np
import pytest

import families
import runs
from jaxalign.config import recipes, schema
from jaxalign.convert import load_pipeline
from jaxalign.train import dry_run, generation
from jaxalign.train.experiment import build

RECIPES = ("nabla_gfn", "mapo", *(pytest.param(name, marks=pytest.mark.slow)
                                  for name in ("diffusion_dpo", "draft", "ddpo", "dno",
                                               "diff_instruct_star")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return families.write(tmp_path_factory.mktemp("families"), "sdxl")


def config(name, folder, **sizes):
  config = runs.recipe("sdxl", name)
  config.model.path, config.mesh.data = str(folder), 1
  if name == "diff_instruct_star":
    config.model.teacher, config.model.unet = str(folder), str(folder / "unet")
  if name in ("mapo", "diffusion_dpo"):
    config.data.pairs = "jaxalign:fixture"
  config.sample.update(sizes)
  return recipes.parse(config)


@pytest.mark.parametrize("name", RECIPES)
def test_dry_run(folder, name):
  cfg = config(name, folder)
  cfg = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, data=2))
  text = dry_run.describe(cfg, jax.devices()[:2])
  for part in ("text encoder ", "text encoder 2", "add_embedding/linear_*/kernel", "one denoiser"):
    assert part in text


def test_conditioning_and_size_of_a_run(folder):
  """The null condition is zero; sizes are those of the config, of both kinds of latents."""
  exp = build(config("nabla_gfn", folder, height=24))
  table = exp.prompt_table(["a cat", "a dog"])
  assert exp.models.latent_shape == (12, 8, 4)
  assert table["cond"]["text"].shape == (2, 16, 64) and not table["uncond"]["text"].any()
  np.testing.assert_array_equal(table["uncond"]["added"]["time_ids"], [[24, 16, 0, 0, 24, 16]])
  flow = jax.eval_shape(exp.models.flow.init, jax.random.key(0))
  assert "add_embedding" in flow


@pytest.mark.slow
def test_samples_have_the_size_that_is_asked_for(folder):
  pipeline = load_pipeline(folder)
  chosen = schema.SampleConfig(steps=2, height=8, width=24)
  images = generation.generate(pipeline, ["a cat"], 2, sample=chosen)
  assert images.shape == (1, 2, 8, 24, 3)
  assert np.abs(images[0, 0].astype(int) - images[0, 1]).mean() > 0
