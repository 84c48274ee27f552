"""Families of models: found by file; Stable Diffusion 3's text and a chain, against goldens."""
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import waves
from jaxalign.models import mmdit
from jaxalign.models.pipeline import Pipeline, families
from jaxalign.sampling import Conditioning, Schedule, guided_output, make_sampler, rollout
from jaxalign.testing import fixture

pytestmark = pytest.mark.usefixtures("compile_quickly")


def close(got, want, tolerance=1e-5):
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def test_families_are_found_in_their_folder():
  assert list(families()) == ["StableDiffusion3Pipeline", "StableDiffusionPipeline",
                              "StableDiffusionXLPipeline"]
  for name, family in families().items():
    assert family.__name__ == name and family.denoiser_name in family.components
    assert {"vae", "scheduler", "text_encoder", "tokenizer"} <= family.components.keys()
    assert set(family.optional) | set(family.as_stored) <= family.components.keys()


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline"])
def test_sizes_of_the_fixtures(name):
  tokenizer = fixture.make_tokenizer()
  configs = {"StableDiffusionPipeline": fixture.make_configs,
             "StableDiffusion3Pipeline": fixture.make_sd3_configs}[name](tokenizer, 32)
  pipeline = Pipeline.build(configs, {"tokenizer": tokenizer, "tokenizer_2": tokenizer}, {})
  assert type(pipeline) is families()[name] and pipeline.image_size == (32, 32)
  assert pipeline.resized(0, 16).image_size == (32, 16)
  origin = jnp.zeros((1, 4))
  assert pipeline.with_origin({"text": 1}, origin) == {"text": 1}


def test_text_of_two_clips_without_t5_is_the_golden():
  """The golden has three zero tokens in T5's place, we have one that stands for 256."""
  sizes = dict(vocab_size=12, max_position_embeddings=6, num_attention_heads=2, eos_token_id=1)
  tokenizer = fixture.make_tokenizer().with_length(6)
  configs = fixture.make_sd3_configs(tokenizer)
  configs["transformer"] |= {"joint_attention_dim": 28, "pooled_projection_dim": 16}
  configs["text_encoder"] = dict(sizes, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
                                 projection_dim=6, hidden_act="quick_gelu")
  configs["text_encoder_2"] = dict(sizes, hidden_size=12, intermediate_size=20, projection_dim=10,
                                   num_hidden_layers=3, hidden_act="gelu")
  pipeline = Pipeline.build(configs, {"tokenizer": tokenizer, "tokenizer_2": tokenizer}, {})
  shapes = pipeline.param_shapes()
  params = {name: waves.parameters(shapes[name]) for name in pipeline.text_encoders}
  ids = np.asarray(waves.goldens()["text"]["ids"], np.int32)
  cond = jax.jit(pipeline.encode_prompts)(params, dict.fromkeys(pipeline.text_encoders, ids))
  states, pooled = waves.golden("text")
  close(cond["text"], states[:, :7])
  close(cond["pooled"], pooled)
  np.testing.assert_allclose(cond["key_bias"], [[0.0] * 6 + [np.log(256)]] * 2, rtol=1e-6)


def test_guided_chain_is_the_golden():
  """Four Euler steps on levels with shift 3, guidance 4, the network with dual attention."""
  entry = waves.goldens()["transformer_dual"]
  model = mmdit.SD3Transformer2DModel.from_config(entry["config"])
  ((first, last),) = waves.golden("chain")
  c, (h, w) = model.config, first.shape[1:3]
  shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
  table = waves.weight("pos_embed.pos_embed", (1, c.pos_embed_max_size ** 2, c.width))
  variables = {"params": waves.parameters(shapes), "constants": mmdit.constants(table, c, h, w)}
  family = families()["StableDiffusion3Pipeline"]
  denoise = lambda *args: family.denoise(types.SimpleNamespace(denoiser=model), *args)
  cond, null = ({"text": waves.inputs(f"{kind}states", 1, 5, 20),
                 "pooled": waves.inputs(f"{kind}pooled", 1, 14)} for kind in ("", "null_"))
  sampler = make_sampler(Schedule.from_config(
      {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}), 4, eta=0.0)
  path = jax.jit(lambda variables, x: rollout(
      guided_output(denoise, 4.0), variables, sampler, Conditioning(cond, null), jax.random.key(0),
      jnp.arange(1), (h, w, 4), x_init=x))(variables, waves.inputs("latents", 1, 4, h, w))
  close(path.latents[1], first)
  close(path.final, last, 5e-5)               # PyTorch's own error in f32 is 7e-5 of an element


def test_position_table_of_new_weights_is_the_formula():
  tokenizer = fixture.make_tokenizer()
  own = {"tokenizer": tokenizer, "tokenizer_2": tokenizer}
  pipeline = Pipeline.build(fixture.make_sd3_configs(tokenizer), own)
  assert not pipeline.extras
  table = pipeline.buffers["transformer"]["pos_embed.pos_embed"]
  np.testing.assert_array_equal(table, mmdit.position_table(pipeline.denoiser.config))
  pipeline = dataclasses.replace(
      pipeline, extras={"transformer": {"pos_embed.pos_embed": table + 1}})
  crop = pipeline.constants["constants"]["pos_embed"]["pos_embed"]
  np.testing.assert_array_equal(crop, table.reshape(6, 6, -1)[1:5, 1:5] + 1)
