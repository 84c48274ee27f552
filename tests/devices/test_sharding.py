"""Placement of parameters: every one matched, no rule dead, snapshots of whole models."""
import json
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from jaxalign.config.schema import OptimConfig
from jaxalign.devices import sharding
from jaxalign.devices.sharding import PARAM_RULES, make_mesh, param_shardings, spec_for
from jaxalign.errors import UserError
from jaxalign.methods.shared.optimizer import make_optimizer
from jaxalign.models import lora
from jaxalign.models.architectures import ARCHITECTURES
from jaxalign.models.clip import (
  CLIPTextModel,
  CLIPTextModelWithProjection,
  CLIPVisionModelWithProjection,
)
from jaxalign.models.mmdit import SD3Transformer2DModel
from jaxalign.models.stable_diffusion import StableDiffusionPipeline
from jaxalign.models.t5 import T5EncoderModel
from jaxalign.models.unet import UNet2DConditionModel
from jaxalign.models.vae import AutoencoderKL
from jaxalign.testing.fixture import make_configs, make_tokenizer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "sharding"
REFRESH = os.environ.get("JAXALIGN_REFRESH_GOLDEN") == "1"

SD15 = dict(
    sample_size=64, in_channels=4, out_channels=4, block_out_channels=[320, 640, 1280, 1280],
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    layers_per_block=2, cross_attention_dim=768, attention_head_dim=8)
SDXL = dict(
    sample_size=128, in_channels=4, out_channels=4, block_out_channels=[320, 640, 1280],
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    layers_per_block=2, cross_attention_dim=2048, attention_head_dim=[5, 10, 20],
    transformer_layers_per_block=[1, 2, 10], use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816)
VAE = dict(in_channels=3, out_channels=3, latent_channels=4,
           block_out_channels=[128, 256, 512, 512], layers_per_block=2,
           down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
           norm_num_groups=32, sample_size=512, scaling_factor=0.18215)
TEXT = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            projection_dim=768)
VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
              num_attention_heads=16, image_size=224, patch_size=14, projection_dim=768)
SD35_MEDIUM, SD35_LARGE = ARCHITECTURES["sd35_medium"], ARCHITECTURES["sd35_large"]
SMALL = make_configs(make_tokenizer())


def unet(config):
  module = UNet2DConditionModel.from_config(config)
  return module, module.example_inputs()


def transformer(config):
  module = SD3Transformer2DModel.from_config(config)
  return module, module.example_inputs()


def vae(config):
  module = AutoencoderKL.from_config(config)
  return module, (jnp.zeros((1, module.factor, module.factor, 3)),)


def text(config, kind=CLIPTextModel):
  return kind.from_config(config), (jnp.zeros((1, 2), jnp.int32),)


def vision(config):
  size = config["image_size"]
  return CLIPVisionModelWithProjection.from_config(config), (jnp.zeros((1, size, size, 3)),)


MODELS = {
    "unet_sd15": lambda: unet(SD15),
    "unet_sdxl": lambda: unet(SDXL),
    "unet_sdxl_small": lambda: unet({
        **SDXL, "block_out_channels": [32, 64, 96], "attention_head_dim": 4,
        "transformer_layers_per_block": [1, 1, 2]}),
    "unet_fixture": lambda: unet(SMALL["unet"]),
    "transformer_sd35_medium": lambda: transformer(SD35_MEDIUM["transformer"]),
    "transformer_sd35_large": lambda: transformer(SD35_LARGE["transformer"]),
    "t5_xxl": lambda: text(SD35_MEDIUM["text_encoder_3"], T5EncoderModel),
    "vae_sd15": lambda: vae(VAE),
    "vae_fixture": lambda: vae(SMALL["vae"]),
    "text_sd15": lambda: text(TEXT),
    "text_fixture": lambda: text(SMALL["text_encoder"]),
    "clip_large_text": lambda: text(TEXT, CLIPTextModelWithProjection),
    "clip_large_vision": lambda: vision(VISION),
}


def shapes(name):
  """Path -> ShapeDtypeStruct of a model's parameters and constants; computes nothing."""
  module, inputs = MODELS[name]()
  tree = jax.eval_shape(module.init, jax.random.key(0), *inputs)
  return {path: leaf for part in tree.values()
          for path, leaf in traverse_util.flatten_dict(part, sep="/").items()}


def first_rule(path):
  return next((i for i, (pattern, _) in enumerate(PARAM_RULES) if re.search(pattern, path)), None)


@pytest.fixture(scope="module")
def all_shapes():
  return {name: shapes(name) for name in MODELS}


def test_every_parameter_is_matched(all_shapes):
  unmatched = {f"{name}: {path}" for name, tree in all_shapes.items() for path in tree
               if first_rule(path) is None}
  assert not unmatched


def test_no_rule_is_dead(all_shapes):
  paths = {path for tree in all_shapes.values() for path in tree}
  base = traverse_util.unflatten_dict(all_shapes["unet_fixture"], sep="/")
  adapter = jax.eval_shape(
      lambda key: lora.init(key, base, 2, StableDiffusionPipeline.lora_targets), jax.random.key(0))
  paths |= set(traverse_util.flatten_dict(adapter, sep="/"))
  used = {first_rule(path) for path in paths}
  assert not [PARAM_RULES[i][0] for i in range(len(PARAM_RULES)) if i not in used]


@pytest.mark.parametrize("name", MODELS)
def test_snapshot(name, all_shapes):
  """Run with JAXALIGN_REFRESH_GOLDEN=1 to write the snapshots anew; review them as a diff."""
  mesh = make_mesh(2, 2, 2)
  found = {}
  for path, leaf in all_shapes[name].items():
    spec = spec_for(path, leaf.shape, mesh)
    # Equal blocks of a deep network share a line.
    key = f"{re.sub(r'(?<=[_/])[0-9]+(?=/)', '*', path)} {list(leaf.shape)}"
    text = str(spec).replace("PartitionSpec(", "P(")        # as newer versions of jax print it
    assert found.setdefault(key, text) == text
  file = GOLDEN / f"{name}.json"
  if REFRESH:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
  assert json.loads(file.read_text()) == found


@pytest.mark.parametrize("name, share", [("unet_sd15", 0.45), ("unet_sdxl", 0.3),
                                         ("vae_sd15", 0.55), ("text_sd15", 0.35),
                                         ("transformer_sd35_medium", 0.28),
                                         ("transformer_sd35_large", 0.26), ("t5_xxl", 0.27)])
def test_share_held_by_a_device(name, share, all_shapes):
  """Over fsdp=2, tensor=2: convolutions are split two ways, the layers of attention four ways."""
  mesh = make_mesh(2, 2, 2)
  place = lambda p, s: jax.sharding.NamedSharding(mesh, spec_for(p, s.shape, mesh))
  held = sum(np.prod(place(p, s).shard_shape(s.shape)) for p, s in all_shapes[name].items())
  total = sum(np.prod(s.shape) for s in all_shapes[name].values())
  assert 0.25 <= held / total < share, held / total


def test_layouts():
  """Inputs of a layer over fsdp, its heads and hidden units over tensor; conv over outputs."""
  mesh = make_mesh(2, 2, 2)
  spec = lambda path, *shape: spec_for(path, shape, mesh)
  block = "down_blocks_0/attentions_0/transformer_blocks_0"
  assert spec(f"{block}/attn1/to_q/kernel", 64, 64) == P("fsdp", "tensor")
  assert spec(f"{block}/attn1/to_out_0/kernel", 64, 64) == P("tensor", "fsdp")
  assert spec(f"{block}/ff/net_0/proj/kernel", 64, 512) == P("fsdp", "tensor")
  assert spec(f"{block}/ff/net_2/kernel", 256, 64) == P("tensor", "fsdp")
  assert spec("down_blocks_0/resnets_0/conv1/kernel", 3, 3, 32, 64) == P(None, None, None, "fsdp")
  assert spec("mid_block/attentions_0/proj_in/kernel", 64, 64) == P(None, "fsdp")     # SDXL: Dense
  assert spec("mid_block/attentions_0/proj_in/kernel", 1, 1, 64, 64) == P(None, None, None, "fsdp")
  block = "transformer_blocks_0"
  assert spec(f"{block}/attn/add_q_proj/kernel", 64, 64) == P("fsdp", "tensor")
  assert spec(f"{block}/attn/to_add_out/kernel", 64, 64) == P("tensor", "fsdp")
  assert spec(f"{block}/norm1_context/linear/kernel", 64, 384) == P("fsdp", "tensor")
  assert spec("norm_out/linear/kernel", 64, 128) == P("fsdp", "tensor")
  assert spec("context_embedder/kernel", 64, 64) == P("fsdp", None)
  assert spec("pos_embed/proj/kernel", 2, 2, 16, 64) == P(None, None, None, "fsdp")
  assert not any(spec("pos_embed/pos_embed", 64, 64, 64))
  block = "encoder/block_0"
  assert spec(f"{block}/layer_0/SelfAttention/q/kernel", 64, 64) == P("fsdp", "tensor")
  assert spec(f"{block}/layer_0/SelfAttention/o/kernel", 64, 64) == P("tensor", "fsdp")
  assert spec(f"{block}/layer_1/DenseReluDense/wi_1/kernel", 64, 64) == P("fsdp", "tensor")
  assert spec(f"{block}/layer_1/DenseReluDense/wo/kernel", 64, 64) == P("tensor", "fsdp")
  assert spec("shared/embedding", 64, 64) == P("fsdp", None)
  block = "down_blocks_0/attentions_0/transformer_blocks_0"
  assert spec("conv_in/bias", 64) == P() or not any(spec("conv_in/bias", 64))
  for leaf in ("a", "b"):
    assert not any(spec(f"{block}/attn1/to_q/{leaf}", 64, 64))            # adapters replicate


def test_dimension_that_does_not_divide_replicates():
  mesh = make_mesh(1, 4, 2)
  assert spec_for("x/to_q/kernel", (6, 8), mesh) == P(None, "tensor")
  assert spec_for("x/to_q/kernel", (8, 7), mesh) == P("fsdp", None)
  assert not any(spec_for("x/conv1/kernel", (3, 3, 8, 6), mesh))
  array = jax.device_put(np.ones((6, 8), np.float32), param_shardings(
      {"to_q": {"kernel": jnp.ones((6, 8))}}, mesh)["to_q"]["kernel"])
  assert array.addressable_shards[0].data.shape == (6, 4)


def test_moments_and_averages_lie_where_their_parameters_lie():
  mesh = make_mesh(2, 2, 2)
  params = {"block": {"attn1": {"to_q": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}},
                      "conv1": {"kernel": jnp.ones((3, 3, 8, 8))}}}
  state = {"optimizer": make_optimizer(OptimConfig()).init(params), "ema": params}
  wanted = {sharding.path_of(p): s.spec for p, s in
            jax.tree_util.tree_leaves_with_path(param_shardings(params, mesh))}
  seen = {path: 0 for path in wanted}
  for p, s in jax.tree_util.tree_leaves_with_path(param_shardings(state, mesh)):
    for path, spec in wanted.items():
      if sharding.path_of(p).endswith(path):
        assert s.spec == spec
        seen[path] += 1
  assert set(seen.values()) == {3}                                        # mu, nu, ema


def test_mesh():
  assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert dict(make_mesh(-1, 1, 1, jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
  assert make_mesh(3, 1, 1).size == 3
  assert sharding.batch_shards(make_mesh(2, 2, 2)) == 4
  with pytest.raises(UserError, match="mesh.data x mesh.fsdp x mesh.tensor = 16, but there are 8"):
    make_mesh(4, 2, 2)
  with pytest.raises(UserError, match="mesh.data x mesh.fsdp"):
    make_mesh(-1, 16, 1)


def test_table_has_a_line_per_kind_of_parameter(all_shapes):
  tree = traverse_util.unflatten_dict(all_shapes["unet_fixture"], sep="/")
  lines = sharding.sharding_table(tree, make_mesh(2, 2, 2))
  assert sum(int(line.split(" x ")[0]) for line in lines) == len(all_shapes["unet_fixture"])
  assert any("to_q/kernel" in line and "'tensor'" in line for line in lines)
