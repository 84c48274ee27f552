"""`jaxalign.inspect`: what a file is, and what to do with it; never a traceback."""
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxalign.convert import load_pipeline, save_adapter
from jaxalign.convert.inspection import inspect
from jaxalign.convert.single import UNET
from jaxalign.errors import UserError
from jaxalign.inspect import main
from jaxalign.models import lora
from jaxalign.models.stable_diffusion import StableDiffusionPipeline
from jaxalign.testing.fixture import make_pipeline_dir, make_sd3_pipeline_dir

PAIR = {"lora_unet_a.lora_down.weight": np.ones((4, 768), "f2"),
        "lora_unet_a.lora_up.weight": np.ones((8, 4), "f2")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return make_pipeline_dir(tmp_path_factory.mktemp("fixture") / "model")


def write(file, tensors, metadata=None):
  safetensors.numpy.save_file(tensors, file, metadata=metadata)
  return file


def test_a_directory(folder, tmp_path):
  lines = inspect(folder)
  assert "StableDiffusionPipeline" in lines["what"] and lines["prediction"] == "epsilon"
  assert lines["dtype"] == "float32" and lines["missing"] == "nothing"
  assert "images of 16 x 16" in lines["sizes"] and f"model.path={folder}" in lines["use"]
  assert inspect(make_sd3_pipeline_dir(tmp_path / "sd3"))["prediction"] == "flow"
  copy = shutil.copytree(folder, tmp_path / "copy")
  (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
  assert inspect(copy)["missing"] == "weights of vae"
  shutil.rmtree(copy / "tokenizer")
  assert "tokenizer: component is missing" in inspect(copy)["missing"]
  assert "one network, UNet2DConditionModel" in inspect(copy / "unet")["what"]
  assert "a UNet alone" in inspect(copy / "unet" / "diffusion_pytorch_model.safetensors")["what"]


def test_adapters(folder, tmp_path):
  params = load_pipeline(folder).params["unet"]
  tree = jax.device_get(lora.init(jax.random.key(0), params, 4,
                                  StableDiffusionPipeline.lora_targets))
  for style, word, alpha in (("peft", "PEFT's", "4"), ("kohya", "kohya's", "4")):
    lines = inspect(save_adapter(tree, tmp_path / style, style=style))
    assert word in lines["what"] and lines["rank"] == f"4; alpha {alpha}"
    assert "model.lora=" in lines["use"] and "layers of " in lines["layers"]
  key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
  sdxl = {f"{key}.lora_down.weight": np.ones((8, 2048), "f2"),
          f"{key}.lora_up.weight": np.ones((640, 8), "f2"), f"{key}.alpha": np.ones((), "f2")}
  lines = inspect(write(tmp_path / "sdxl.safetensors", sdxl))
  assert "Stable Diffusion XL" in lines["what"] and lines["rank"] == "8; alpha 1"
  lines = inspect(write(tmp_path / "loha.safetensors", {"a.hada_w1_a": np.ones(1, "f4")}))
  assert "a LoHa" in lines["what"] and "not supported" in lines["use"]
  (tmp_path / "peft2").mkdir()
  write(tmp_path / "peft2" / "adapter_model.safetensors", {
      "base_model.model.x.lora_A.weight": np.ones((2, 2), "f4")})
  (tmp_path / "peft2" / "adapter_config.json").write_text('{"lora_alpha": 7}')
  assert inspect(tmp_path / "peft2")["rank"] == "2; alpha 7"


@pytest.mark.parametrize("tensors, what", [
    ({"conditioner.embedders.0.model.a": 1}, "the refiner of SDXL"),
    ({f"{UNET}input_blocks.0.0.weight": 1}, "a denoiser without text encoders"),
    ({f"{UNET}double_blocks.0.a": 1}, "Flux"), ({"decoder.a": 1}, "an autoencoder alone"),
    ({"input_blocks.0.0.weight": 1}, "a UNet alone"), ({"strange": 1}, "unknown kind"),
    ({}, "none"), ({"control_model.a": 1}, "a ControlNet"),
])
def test_other_files(tmp_path, tensors, what):
  file = write(tmp_path / "a.safetensors", {name: np.ones(1, "f4") for name in tensors})
  lines = inspect(file)
  assert what in lines["what"] and lines["use"] and len(lines) <= 10
  assert all("\n" not in text for text in lines.values())


def test_files_that_are_no_weights(tmp_path, capsys):
  for name, content, word in (("a.ckpt", b"PK", "pickle"),
                              ("a.txt", b"a cat", "no file of weights"),
                              ("a.json", b'{"weight_map": {}}', "the index of a network"),
                              ("b.json", b"{}", "a JSON file")):
    (tmp_path / name).write_bytes(content)
    assert word in inspect(tmp_path / name)["what"]
  (tmp_path / "empty").mkdir()
  assert "nothing in it" in inspect(tmp_path / "empty")["use"]
  pointer = b"version https://git-lfs.github.com/spec/v1\n"
  for name, content, word in (("c.safetensors", pointer, "git-lfs pointer"),
                              ("d.safetensors", b"\xff" * 50, "corrupt"),
                              ("e.json", b"[" * 100000, "not valid JSON"),
                              ("nowhere", None, "no such file")):
    if content:
      (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path / name}: .*{word}"):
      inspect(tmp_path / name)


def test_command(folder, tmp_path, capsys):
  main(["inspect", str(write(tmp_path / "a.safetensors", PAIR))])
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith("what        a LoRA with kohya's names") and len(lines) <= 10
  assert lines[-1].startswith("use         python -m jaxalign.launch")
  for argv in ([], ["a", "b"]):
    with pytest.raises(UserError):
      main(["inspect", *argv])
  capsys.readouterr()
  main(["inspect", "--help"])
  assert "FILE-or-DIR" in capsys.readouterr().out


def test_errors_name_the_command(folder, tmp_path):
  for path in (tmp_path, write(tmp_path / "a.safetensors", PAIR)):
    with pytest.raises(UserError, match=f"python -m jaxalign.inspect {path}$"):
      load_pipeline(path)
  copy = shutil.copytree(folder, tmp_path / "copy")
  file = copy / "unet" / "diffusion_pytorch_model.safetensors"
  for content in (b"\xff" * 90, None):
    if content:
      file.write_bytes(content)
    else:
      write(file, PAIR)
    with pytest.raises(UserError, match=f"python -m jaxalign.inspect {file}$"):
      load_pipeline(copy)
