"""Recipes on a small flow-matching transformer: whole runs, what they leave, and plans."""
import dataclasses
import json

import jax
import numpy as np
import pytest

import runs
from jaxalign.convert import load_pipeline
from jaxalign.train import dry_run, generation, loop, opening
from jaxalign.train.experiment import build
from jaxalign.train.restore import load_adapters_of, load_tuned


def same(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  path = tmp_path_factory.mktemp("sd3") / "run"
  loop.run(runs.smoke("sft", "smoke_sd3"), path, jax.devices()[:1])
  return path


@pytest.mark.slow
def test_a_run_changes_the_transformer_alone(run):
  """Three updates; positions and text encoders come out as they went in."""
  summary = json.loads((run / "summary.json").read_text())
  assert summary["steps"] == 3 and np.isfinite(summary["tuned"]["kl_to_base"]["mean"])
  assert summary["tuned"]["kl_to_base"]["mean"] > 0
  tuned, base = load_tuned(run), opening.open_pipeline("jaxalign:fixture_sd3")
  for name in sorted(tuned.networks.keys() - {"transformer"}):
    same(tuned.params[name], base.params[name])
  same(tuned.constants, base.constants)
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), tuned.weights, base.weights)
  assert moved["transformer_blocks_1"]["attn"]["add_k_proj"]["kernel"]
  assert not moved["transformer_blocks_1"]["ff"]["net_2"]["kernel"]
  adapters, denoiser = load_adapters_of(run)
  assert denoiser == "transformer" and adapters["text_encoder_2"] == {}
  assert adapters[denoiser]["transformer_blocks_0"].keys() == {"attn", "attn2"}


def test_an_export_is_sampled_as_its_kind_is(run):
  """Without a run's own settings: Euler's method on the checkpoint's levels, to a clean image."""
  pipeline = load_pipeline(run / "export")
  chosen = opening.own_sampler(pipeline)
  assert (chosen.kind, chosen.eta, chosen.final, chosen.guidance) == ("ddim", 0.0, "", 7.0)
  chosen = dataclasses.replace(chosen, steps=3, height=16, width=24)
  images = generation.generate(pipeline, ["a cat"], 2, sample=chosen)
  assert images.shape == (1, 2, 16, 24, 3) and images.std() > 1


def test_all_weights():
  """The table of positions is no weight: neither copied into the policy nor kept twice."""
  exp = build(runs.smoke("mapo", "smoke_sd3", model__adapter="full"), jax.devices()[:1])
  policy = exp.models.init_policy(jax.random.key(0), exp.frozen)
  assert jax.tree.structure(policy) == jax.tree.structure(exp.pipeline.weights)
  variables = exp.models.combine(policy, exp.frozen["base"])
  assert variables.keys() == {"params", "constants"} and variables["params"] is policy
  half = build(runs.smoke("mapo", "smoke_sd3", model__dtype="bfloat16"), jax.devices()[:1])
  kinds = lambda tree: {str(a.dtype) for a in jax.tree.leaves(tree)}
  assert kinds(half.frozen["base"]["constants"]) == {"float32"}
  assert kinds(half.frozen["base"]["params"]) == {"float32", "bfloat16"}


def test_flow_net_of_a_transformer():
  """Starts at zero, reads what the denoiser reads, and learns: a gradient reaches its output."""
  exp = build(runs.smoke("nabla_gfn", "smoke_sd3"), jax.devices()[:1])
  flow, cond = exp.models.flow, exp.embed(["a cat"])
  params = jax.jit(flow.init)(jax.random.key(0))
  x = jax.random.normal(jax.random.key(1), (1, *exp.models.latent_shape))

  def along(params):
    out = flow.apply(params, x, 500.0, cond)
    return (out * x).sum(), out
  (_, out), slope = jax.jit(jax.value_and_grad(along, has_aux=True))(params)
  assert not np.any(out)
  assert np.any(slope["proj_out"]["kernel"])


def test_dry_run():
  text = dry_run.describe(runs.smoke("nabla_gfn", "smoke_sd3", mesh__data=2), jax.devices()[:2])
  for part in ("transformer ", "text encoder 2", "transformer parameters by partition",
               "norm1_context/linear/kernel", "one denoiser"):
    assert part in text


@pytest.mark.parametrize("name, weights", [("sd3_medium", 2_028_328_000),
                                           ("sd35_medium", 2_243_171_520),
                                           ("sd35_large", 8_056_627_520)])
def test_architectures_for_plans(name, weights):
  """Published parameter counts; prompts are as long as those of the real tokenizers."""
  pipeline = opening.open_pipeline(f"jaxalign:{name}", shapes_only=True).resized(512, 512)
  assert sum(leaf.size for leaf in jax.tree.leaves(pipeline.weights)) == weights
  assert pipeline.constants["constants"]["pos_embed"]["pos_embed"].shape[:2] == (32, 32)
  ids = pipeline.tokenize([""])
  cond = jax.eval_shape(pipeline.encode_prompts, pipeline.text_params, ids)
  assert cond["text"].shape == (1, 77 + 256, 4096) and cond["pooled"].shape == (1, 2048)
