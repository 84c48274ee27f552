"""Weights as people have them: half-precision indices, float8, compiled names; and the refused."""
import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from jaxalign.convert import load_pipeline
from jaxalign.convert.inspection import inspect
from jaxalign.errors import UserError
from jaxalign.testing.fixture import make_pipeline_dir

NAME = "diffusion_pytorch_model.safetensors"
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture(scope="module")
def fixture_folder(tmp_path_factory):
  return make_pipeline_dir(tmp_path_factory.mktemp("fixture") / "model")


@pytest.fixture
def folder(fixture_folder, tmp_path):
  return shutil.copytree(fixture_folder, tmp_path / "model")


@pytest.fixture(scope="module")
def weights(fixture_folder):
  return safetensors.numpy.load_file(fixture_folder / "unet" / NAME)


def flat(folder):
  return traverse_util.flatten_dict(load_pipeline(folder).params["unet"], sep="/")


def same(ours, theirs, **tolerance):
  assert ours.keys() == theirs.keys()
  for path in ours:
    np.testing.assert_allclose(ours[path], theirs[path], **{"rtol": 0, "atol": 0, **tolerance})


@pytest.mark.parametrize("name", [f"{NAME}.index.fp16.json",
                                  "diffusion_pytorch_model.fp16.safetensors.index.json"])
def test_index_of_half_precision(folder, fixture_folder, weights, name):
  file = folder / "unet" / NAME
  file.unlink()
  shards, place = {"one.safetensors": {}, "two.safetensors": {}}, {}
  for i, tensor in enumerate(sorted(weights)):
    shard = sorted(shards)[i % 2]
    shards[shard][tensor], place[tensor] = weights[tensor].astype(np.float16), shard
  for shard, content in shards.items():
    safetensors.numpy.save_file(content, file.with_name(shard))
  file.with_name(name).write_text(json.dumps({"weight_map": place}))
  same(flat(folder), flat(fixture_folder), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_float8(folder, weights, dtype):
  torch = pytest.importorskip("torch")
  kind = {ml_dtypes.float8_e4m3fn: torch.float8_e4m3fn, ml_dtypes.float8_e5m2: torch.float8_e5m2}
  import safetensors.torch
  small = {name: torch.from_numpy(x) for name, x in weights.items()}
  small[QUERY] = small[QUERY].to(kind[dtype])
  safetensors.torch.save_file(small, folder / "unet" / NAME)
  ours = flat(folder)["down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_q/kernel"]
  np.testing.assert_array_equal(ours, small[QUERY].float().numpy().T)
  assert load_pipeline(folder).stored["unet"][
      "down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_q/kernel"].dtype == "float16"


KEY = "down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_q/kernel"


@pytest.mark.parametrize("scale, shape, beside", [
    # ComfyUI's older names, its newer ones, and one scale a row.
    (".scale_weight", (), {"scaled_fp8": (0, "float8_e4m3fn"), ".scale_input": ((), "f4")}),
    (".weight_scale", (1,), {".comfy_quant": '{"format": "float8_e4m3fn"}'}),
    (".weight_scale", (32, 1), {}),
])
def test_float8_with_scales(folder, weights, scale, shape, beside):
  torch = pytest.importorskip("torch")
  import safetensors.torch
  layer = QUERY.removesuffix(".weight")
  small = {name: torch.from_numpy(x) for name, x in weights.items()}
  small[QUERY] = (small[QUERY] * 100).to(torch.float8_e4m3fn)
  small[layer + scale] = torch.linspace(0.5, 2, 32).reshape(shape) if 32 in shape else (
      torch.full(shape, 0.01))
  for name, content in beside.items():
    small[layer + name if name.startswith(".") else name] = (
        torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8)
        if isinstance(content, str) else torch.zeros(content[0]).to(
            torch.float32 if content[1] == "f4" else torch.float8_e4m3fn))
  safetensors.torch.save_file(small, folder / "unet" / NAME)
  # What ComfyUI multiplies: the weight as float32 by the scale as float32.
  expected = small[QUERY].float() * small[layer + scale].float()
  np.testing.assert_array_equal(flat(folder)[KEY], expected.numpy().T)
  assert load_pipeline(folder).stored["unet"][KEY].dtype == "float32"
  assert "float8_e4m3 with scales" in inspect(folder)["dtype"]


@pytest.mark.parametrize("weight, scale, config, word", [
    (np.uint8, np.ones((2, 2), "f4"), {"format": "nvfp4"}, "format nvfp4"),
    (np.int8, np.ones((), "f4"), None, "int8"), (np.float32, np.ones(3, "f4"), None, "[3]"),
    (np.float32, np.ones((), "u1"), {}, "uint8[]"),
    (np.float32, np.ones((), "f4"), {"format": "float8_e4m3fn", "convrot": True}, "convrot True"),
    (np.float32, np.ones((), "f4"), [1], "cannot be read"),
])
def test_weights_quantised_in_other_ways(folder, weights, weight, scale, config, word):
  layer = QUERY.removesuffix(".weight")
  about = {"_quantization_metadata": json.dumps({"layers": {layer: config}})} if config else None
  safetensors.numpy.save_file({**weights, QUERY: weights[QUERY].astype(weight),
                               f"{layer}.weight_scale": scale}, folder / "unet" / NAME, about)
  with pytest.raises(UserError) as error:
    load_pipeline(folder)
  message = str(error.value)
  assert f"unet/{NAME}" in message and word in message and "\n" not in message
  assert ("how its weights are quantised cannot be read" if config == [1] else
          "which is not supported; float8 with a scale is") in message


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_of_compiled_networks(folder, fixture_folder, weights, prefix):
  safetensors.numpy.save_file({prefix + name: x for name, x in weights.items()},
                              folder / "unet" / NAME)
  same(flat(folder), flat(fixture_folder))


def test_text_encoder_without_its_wrapper(folder, fixture_folder):
  """transformers since 5.6 has no `text_model` in the class."""
  file = folder / "text_encoder" / "model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  safetensors.numpy.save_file({name.removeprefix("text_model."): x for name, x in tensors.items()},
                              file)
  ours, theirs = (traverse_util.flatten_dict(load_pipeline(path).params["text_encoder"], sep="/")
                  for path in (folder, fixture_folder))
  same(ours, theirs)


def test_numbers_that_are_not_finite(folder, weights):
  for bad in (np.nan, np.inf):
    x = weights[QUERY].copy()
    x[1, 2] = bad
    safetensors.numpy.save_file({**weights, QUERY: x}, folder / "unet" / NAME)
    with pytest.raises(UserError, match=re.escape(
        f"unet/{NAME}: {QUERY} holds numbers that are not finite")):
      load_pipeline(folder)


@pytest.mark.parametrize("name", [f"unet/{NAME}", "unet/config.json", "model_index.json"])
def test_git_lfs_pointers(folder, name):
  (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n")
  with pytest.raises(UserError, match=re.escape(
      f"{folder / name}: a git-lfs pointer, not the file itself")):
    load_pipeline(folder)


@pytest.mark.parametrize("channels, word", [(9, "an inpainting UNet"), (8, "InstructPix2Pix"),
                                            (16, "another autoencoder's")])
def test_unets_that_take_something_else(folder, channels, word):
  file = folder / "unet" / "config.json"
  file.write_text(json.dumps({**json.loads(file.read_text()), "in_channels": channels}))
  with pytest.raises(UserError, match=f"unet/config.json: in_channels = {channels}: .*{word}"):
    load_pipeline(folder)
