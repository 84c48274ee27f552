"""Checkpoints: bit-identical round trips, exports that diffusers loads, errors naming the file."""
import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import serialization, traverse_util

from jaxalign.convert import load_pipeline, names, save_pipeline
from jaxalign.errors import UserError
from jaxalign.models.vae import decode_images
from jaxalign.storage.files import UNFINISHED
from jaxalign.testing.fixture import make_pipeline_dir

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
PROMPTS = ["a red apple on a blue background", "zebra"]


@pytest.fixture
def copy(folder, tmp_path):
  return shutil.copytree(folder, tmp_path / "copy")


def read(file):
  with safetensors.safe_open(file, "np") as tensors:
    return {name: tensors.get_tensor(name) for name in tensors.keys()}


def write(file, tensors):
  safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file, **changes):
  file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def assert_same_tensors(left, right):
  assert left.keys() == right.keys()
  for name, x in left.items():
    assert x.dtype == right[name].dtype and x.shape == right[name].shape, name
    assert x.tobytes() == right[name].tobytes(), name


def assert_same_checkpoint(left, right, files=(UNET, VAE, TEXT)):
  for file in files:
    assert_same_tensors(read(left / file), read(right / file))
  for file in left.rglob("*.json"):
    if not file.name.endswith("index.json") or file.name == "model_index.json":
      other = right / file.relative_to(left)
      assert json.loads(file.read_text()) == json.loads(other.read_text()), file
  for file in (left / "tokenizer").iterdir():
    assert file.read_bytes() == (right / "tokenizer" / file.name).read_bytes()


def assert_same_params(left, right):
  flatten = lambda tree: traverse_util.flatten_dict(tree, sep="/")
  assert_same_tensors(flatten(left), flatten(right))


# Round trips.


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_round_trip_is_bit_identical(pipeline, tmp_path, dtype):
  save_pipeline(pipeline, tmp_path / "one", dtype=dtype)
  loaded = load_pipeline(tmp_path / "one")
  assert {str(x.dtype) for x in read(tmp_path / "one" / UNET).values()} == {dtype}
  assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {np.dtype(np.float32)}
  save_pipeline(loaded, tmp_path / "two")
  assert_same_checkpoint(tmp_path / "one", tmp_path / "two")


def test_mixed_dtypes_old_vae_names_and_buffers_come_back(copy, tmp_path):
  old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
  rename = lambda name: re.sub(r"(?<=attentions\.0\.)(to_out\.0|to_\w)(?=\.)",
                               lambda m: old[m[0]], name)
  tensors = {rename(name): x for name, x in read(copy / VAE).items()}
  assert "encoder.mid_block.attentions.0.proj_attn.bias" in tensors
  write(copy / VAE, tensors)
  text = read(copy / TEXT)
  text["text_model.final_layer_norm.bias"] = text["text_model.final_layer_norm.bias"].astype("f2")
  text["text_model.embeddings.position_ids"] = np.arange(16)[None]
  write(copy / TEXT, text)
  save_pipeline(load_pipeline(copy), tmp_path / "again")
  assert_same_checkpoint(copy, tmp_path / "again")


def test_sharded_weights(copy, pipeline, tmp_path):
  tensors = sorted(read(copy / UNET).items())
  (copy / UNET).unlink()
  shards = {"part-1.safetensors": tensors[::2], "part-2.safetensors": tensors[1::2]}
  for name, part in shards.items():
    write(copy / "unet" / name, dict(part))
  index = {"weight_map": {key: name for name, part in shards.items() for key, _ in part}}
  (copy / f"{UNET}.index.json").write_text(json.dumps(index))
  loaded = load_pipeline(copy)
  assert_same_params(loaded.params, pipeline.params)
  save_pipeline(loaded, tmp_path / "again")
  assert_same_tensors(read(tmp_path / "again" / UNET), dict(tensors))
  (copy / "unet" / "part-2.safetensors").unlink()
  with pytest.raises(UserError, match="part-2"):
    load_pipeline(copy)


def test_half_precision_variant_is_read_where_it_is_alone(copy, pipeline):
  (copy / UNET).rename((copy / UNET).with_suffix(".fp16.safetensors"))
  assert_same_params(load_pipeline(copy).params, pipeline.params)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_flax_round_trip(pipeline, folder, tmp_path, dtype):
  save_pipeline(pipeline, tmp_path / "flax", format="flax", dtype=dtype)
  loaded = load_pipeline(tmp_path / "flax")
  save_pipeline(loaded, tmp_path / "flax2", format="flax")
  for file in ("unet/diffusion_flax_model.msgpack", "vae/diffusion_flax_model.msgpack",
               "text_encoder/flax_model.msgpack"):
    trees = [serialization.msgpack_restore((tmp_path / f / file).read_bytes())
             for f in ("flax", "flax2")]
    assert_same_params(*trees)
  # And over to PyTorch's layout, where it equals the direct way.
  save_pipeline(loaded, tmp_path / "torch")
  save_pipeline(pipeline, tmp_path / "direct", dtype=dtype)
  assert_same_checkpoint(tmp_path / "direct", tmp_path / "torch")


def test_save_replaces_a_checkpoint_but_nothing_else(pipeline, copy, tmp_path):
  (copy / "README.md").write_text("mine")
  changed = {"unet": jax.tree.map(lambda x: jnp.asarray(x) + 1, pipeline.params["unet"])}
  save_pipeline(pipeline, copy, format="flax", params=changed)
  assert not (copy / UNET).exists() and (copy / "README.md").read_text() == "mine"
  assert_same_params(load_pipeline(copy).params, {**pipeline.params, **changed})
  assert [p.name for p in tmp_path.iterdir()] == ["copy"]  # no temporary files left
  other = tmp_path / "other"
  other.mkdir()
  (other / "thesis.tex").write_text("")
  with pytest.raises(UserError, match="not a checkpoint"):
    save_pipeline(pipeline, other)
  # As a process leaves it that was killed while it replaced the components.
  (copy / "model_index.json").unlink()
  (copy / UNFINISHED).touch()
  with pytest.raises(UserError, match="no model_index.json"):
    load_pipeline(copy)
  save_pipeline(pipeline, copy)
  assert_same_params(load_pipeline(copy).params, pipeline.params)
  assert not (copy / UNFINISHED).exists()
  with pytest.raises(ValueError, match="vae"):
    save_pipeline(pipeline, tmp_path / "new", params={"vae": pipeline.params["unet"]})


def test_float16_overflow_is_an_error(pipeline, tmp_path):
  params = jax.tree.map(np.copy, pipeline.params["unet"])
  params["conv_in"]["bias"][0] = 1e6
  with pytest.raises(UserError, match="conv_in/bias does not fit float16"):
    save_pipeline(pipeline, tmp_path / "new", params={"unet": params}, dtype="float16")
  assert not any(tmp_path.iterdir())


def test_fixture_depends_on_its_seed_only(folder, pipeline, tmp_path):
  make_pipeline_dir(tmp_path / "same")
  assert_same_checkpoint(folder, tmp_path / "same")
  other = load_pipeline(make_pipeline_dir(tmp_path / "other", 1, image_size=32))
  assert other.latent_shape == pipeline.latent_shape == (8, 8, 4)
  assert not np.array_equal(other.params["unet"]["conv_in"]["kernel"],
                            pipeline.params["unet"]["conv_in"]["kernel"])


@pytest.mark.parametrize("path, name", [
    ("conv_in/kernel", "conv_in.weight"),
    ("time_embedding/linear_1/bias", "time_embedding.linear_1.bias"),
    ("up_blocks_1/attentions_2/transformer_blocks_0/attn1/to_out_0/kernel",
     "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0.weight"),
    ("mid_block/attentions_0/transformer_blocks_0/ff/net_0/proj/bias",
     "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.bias"),
    ("down_blocks_0/downsamplers_0/conv/kernel", "down_blocks.0.downsamplers.0.conv.weight"),
    ("text_model/encoder/layers/0/mlp/fc1/kernel", "text_model.encoder.layers.0.mlp.fc1.weight"),
])
def test_names(path, name):
  assert names.torch_name(path) == name


# Others load what we write.


@pytest.fixture(scope="module")
def ours(pipeline):
  """Our own numbers: inputs, conditions, prediction, image."""
  x = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
  ids = pipeline.tokenizer(PROMPTS)
  cond = jax.jit(pipeline.encode_prompts)(pipeline.text_params, {"text_encoder": ids})
  out = jax.jit(pipeline.denoise)({"params": pipeline.params["unet"]}, x, jnp.array(321), cond)
  images = jax.jit(lambda p, z: decode_images(pipeline.vae, p, z))(pipeline.params["vae"], x)
  return x, ids, np.asarray(cond["text"]), np.asarray(out), np.asarray(images)


def test_export_loads_in_pytorch_diffusers_and_agrees(pipeline, ours, tmp_path):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  save_pipeline(pipeline, tmp_path / "export")
  theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "export")
  x, ids, text, out, images = ours
  tokens = theirs.tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt")
  np.testing.assert_array_equal(tokens.input_ids.numpy(), ids)
  z = torch.from_numpy(x).permute(0, 3, 1, 2)
  with torch.no_grad():
    states = theirs.text_encoder(tokens.input_ids)[0]
    prediction = theirs.unet(z, 321, states).sample
    decoded = theirs.vae.decode(z / 0.5).sample
  nhwc = lambda y: y.permute(0, 2, 3, 1).numpy()
  np.testing.assert_allclose(text, states.numpy(), atol=1e-5)
  np.testing.assert_allclose(out, nhwc(prediction), atol=1e-5)
  np.testing.assert_allclose(images, np.clip(nhwc(decoded) / 2 + 0.5, 0, 1), atol=1e-5)
  theirs.set_progress_bar_config(disable=True)
  image = theirs("a red apple", num_inference_steps=2, output_type="np").images
  assert image.shape == (1, 16, 16, 3)


def test_flax_export_loads_in_flax_diffusers_and_agrees(pipeline, ours, tmp_path):
  diffusers = pytest.importorskip("diffusers")
  if not hasattr(diffusers, "FlaxStableDiffusionPipeline"):
    pytest.skip("this version of diffusers has no Flax classes")
  save_pipeline(pipeline, tmp_path / "export", format="flax")
  theirs, params = diffusers.FlaxStableDiffusionPipeline.from_pretrained(tmp_path / "export")
  x, ids, text, out, _ = ours
  for model in ("unet", "vae", "text_encoder"):
    assert_same_params(pipeline.params[model], jax.tree.map(np.asarray, params[model]))
  states = theirs.text_encoder(ids, params=params["text_encoder"])[0]
  np.testing.assert_allclose(text, states, atol=1e-5)
  prediction = jax.jit(lambda p, *args: theirs.unet.apply({"params": p}, *args).sample)(
      params["unet"], x.transpose(0, 3, 1, 2), jnp.array(321), text)
  # The Flax class computes the tanh form of GELU.
  np.testing.assert_allclose(out, np.transpose(prediction, (0, 2, 3, 1)), atol=1e-3)


@pytest.mark.parametrize("model, changes, culprit", [
    ("unet", {"norm_num_groups": 16}, "norm_num_groups"),
    ("vae", {"shift_factor": 0.1}, "shift_factor"),
])
def test_what_flax_would_get_wrong_is_refused(copy, tmp_path, model, changes, culprit):
  edit_json(copy / model / "config.json", **changes)
  with pytest.raises(UserError, match=culprit):
    save_pipeline(load_pipeline(copy), tmp_path / "flax", format="flax")


# Errors.


def fails(path, *parts):
  with pytest.raises(UserError) as error:
    load_pipeline(path)
  message = str(error.value)
  assert "\n" not in message
  for part in parts:
    assert part in message, message


def test_not_a_checkpoint(tmp_path):
  fails(tmp_path, str(tmp_path), "model_index.json")
  fails(tmp_path / "nowhere", "not a directory")
  (tmp_path / "file").write_text("")
  fails(tmp_path / "file", "neither a directory nor a checkpoint file")


def test_hub_ids(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  fails("no-such-org/model", "not a directory", "huggingface_hub")
  monkeypatch.undo()

  def offline(*args, **kwargs):
    raise ConnectionError("no route to host\nmany more lines")

  pytest.importorskip("huggingface_hub")
  monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
  fails("no-such-org/model", "not a directory", "download failed: no route to host")


def test_half_precision_is_downloaded_only_where_there_is_nothing_else(monkeypatch, folder,
                                                                        copy):
  hub = pytest.importorskip("huggingface_hub")
  asked = []

  def download(name, allow_patterns, ignore_patterns):
    asked.append("*.fp16*" in ignore_patterns)
    assert {"transformer/*", "unet/*", "text_encoder_3/*", "tokenizer_3/*"} <= {*allow_patterns}
    return str(copy if asked[-1] else folder)
  monkeypatch.setattr(hub, "snapshot_download", download)
  load_pipeline("an-org/model")
  assert asked == [True]
  (copy / UNET).unlink()
  load_pipeline("an-org/model")
  assert asked == [True, True, False]


def test_missing_parts(copy):
  (copy / "vae" / "config.json").unlink()
  fails(copy, str(copy / "vae" / "config.json"))
  shutil.rmtree(copy / "vae")
  fails(copy, str(copy / "vae"), "missing")


@pytest.mark.parametrize("changes, parts", [
    ({"_class_name": "FluxPipeline"}, ["FluxPipeline"]),
    ({"unet": ["diffusers", "UNet3D"]}, ["unet", "UNet3D"]),
    ({"text_encoder": [None, None]}, ["text_encoder", "missing"]),
])
def test_unsupported_index(copy, changes, parts):
  edit_json(copy / "model_index.json", **changes)
  fails(copy, "model_index.json", *parts)


def test_unusable_json(copy):
  edit_json(copy / "unet" / "config.json", act_fn="mish")
  fails(copy, str(copy), "act_fn", "mish")
  (copy / "unet" / "config.json").write_text("{")
  fails(copy, str(copy / "unet" / "config.json"), "JSON")


def test_truncated_and_corrupt_weights(copy, pipeline):
  content = (copy / UNET).read_bytes()
  for broken in (content[:-100], content[:5], b"", b"\xff" * 1000):
    (copy / UNET).write_bytes(broken)
    fails(copy, str(copy / UNET), "truncated or corrupt safetensors file")
  (copy / UNET).unlink()
  fails(copy, str(copy / "unet"), "no weights")
  (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
  fails(copy, "diffusion_pytorch_model.bin: pickled weights are refused")
  (copy / f"{UNET}.index.json").write_text("[]")
  fails(copy, f"{UNET}.index.json: not a safetensors index")
  (copy / f"{UNET}.index.json").unlink()
  flax = copy / "unet" / "diffusion_flax_model.msgpack"
  content = serialization.msgpack_serialize(pipeline.params["unet"])
  for broken in (content[:-100], content[:5], b"", b"\xff" * 1000):
    flax.write_bytes(broken)
    fails(copy, str(flax))


def test_tensors_that_do_not_fit(copy):
  tensors = read(copy / UNET)
  del tensors["conv_in.weight"]
  tensors["conv_out.bias"] = np.zeros(3, np.float32)
  tensors["conv_norm_out.bias"] = np.zeros(32, np.int32)
  tensors["surprise.weight"] = np.zeros(3, np.float32)
  write(copy / UNET, tensors)
  fails(copy, f"{copy / UNET}: tensors do not fit config.json", "1 missing: conv_in.weight",
        "1 unexpected: surprise.weight",
        "conv_out.bias (3,) instead of (4,)", "1 wrong dtype: conv_norm_out.bias int32")


def test_bad_arguments(pipeline, tmp_path):
  with pytest.raises(UserError, match="format"):
    save_pipeline(pipeline, tmp_path / "new", format="onnx")
  with pytest.raises(UserError, match="dtype"):
    save_pipeline(pipeline, tmp_path / "new", dtype="int8")


def test_neither_torch_nor_diffusers_is_imported(folder):
  code = ("import sys; from jaxalign.convert import load_pipeline; load_pipeline(sys.argv[1]); "
          "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)")
  subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
