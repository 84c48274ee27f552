"""Single-file checkpoints: what we write diffusers reads bit for bit, and so do we."""
import dataclasses
import functools
import json
import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxalign.convert import load_pipeline, save_pipeline
from jaxalign.convert.single import UNET, VAE, scheduler_of
from jaxalign.errors import UserError
from jaxalign.models.pipeline import Pipeline
from jaxalign.models.tokenizer import Tokenizer
from jaxalign.models.unet import UNet2DConditionModel
from jaxalign.sampling import Schedule
from jaxalign.testing.fixture import (
  make_pipeline_dir,
  make_sd3_configs,
  make_t5_tokenizer,
  make_tokenizer,
)
from jaxalign.train.restore import load_tuned

ABSENT = [None, None]
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
             num_train_timesteps=1000, steps_offset=1, clip_sample=False, set_alpha_to_one=False)
FAMILIES = ("sd1", "sd2", "sdxl", "sd3")


def text(width, layers, act, kind="CLIPTextModel", projection=32):
  return dict(architectures=[kind], vocab_size=49408, hidden_size=width, intermediate_size=96,
              num_hidden_layers=layers, num_attention_heads=width // 64, hidden_act=act,
              max_position_embeddings=77, projection_dim=projection, bos_token_id=49406,
              eos_token_id=49407, pad_token_id=1)


def configs_of(family):
  """Small ones, within what single files can say."""
  crosses = family != "sdxl"
  down = ["CrossAttnDownBlock2D" if crosses else "DownBlock2D",
          "DownBlock2D" if crosses else "CrossAttnDownBlock2D"]
  unet = dict(_class_name="UNet2DConditionModel", sample_size=64, block_out_channels=[64, 128],
              layers_per_block=1, down_block_types=down,
              up_block_types=[kind.replace("Down", "Up") for kind in reversed(down)],
              cross_attention_dim=64 if family == "sd1" else 128, attention_head_dim=8)
  if family != "sd1":
    unet |= dict(use_linear_projection=True, attention_head_dim=[1, 2])
  vae = dict(_class_name="AutoencoderKL", block_out_channels=[32, 64], layers_per_block=1,
             down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
             sample_size=512, latent_channels=4, scaling_factor=0.18215)
  index = dict(_class_name="StableDiffusionPipeline", unet=["diffusers", "UNet2DConditionModel"],
               vae=["diffusers", "AutoencoderKL"], scheduler=["diffusers", "DDIMScheduler"],
               text_encoder=["transformers", "CLIPTextModel"],
               tokenizer=["transformers", "CLIPTokenizer"], safety_checker=ABSENT,
               feature_extractor=ABSENT, requires_safety_checker=False)
  scheduler = dict(_class_name="DDIMScheduler", prediction_type="epsilon", **BETAS)
  made = dict(model_index=index, unet=unet, vae=vae, scheduler=scheduler)
  if family == "sd1":
    return made | dict(text_encoder=text(64, 2, "quick_gelu"))
  if family == "sd2":
    scheduler["prediction_type"] = "v_prediction"
    return made | dict(text_encoder=text(128, 23, "gelu"))
  projected = "CLIPTextModelWithProjection"
  second = text(128, 2, "gelu", projected)
  if family == "sdxl":
    unet |= dict(cross_attention_dim=64 + 128, transformer_layers_per_block=[1, 2],
                 addition_embed_type="text_time", addition_time_embed_dim=8,
                 projection_class_embeddings_input_dim=32 + 6 * 8, sample_size=128)
    vae |= dict(scaling_factor=0.13025, sample_size=1024)
    scheduler["rescale_betas_zero_snr"], scheduler["prediction_type"] = True, "v_prediction"
    del index["safety_checker"], index["requires_safety_checker"]
    index |= dict(_class_name="StableDiffusionXLPipeline", force_zeros_for_empty_prompt=True,
                  text_encoder_2=["transformers", projected],
                  tokenizer_2=["transformers", "CLIPTokenizer"], image_encoder=ABSENT)
    return made | dict(text_encoder=text(64, 2, "quick_gelu"), text_encoder_2=second)
  del made["unet"], index["unet"], index["safety_checker"], index["requires_safety_checker"]
  index |= dict(_class_name="StableDiffusion3Pipeline", text_encoder=["transformers", projected],
                transformer=["diffusers", "SD3Transformer2DModel"], image_encoder=ABSENT,
                text_encoder_2=["transformers", projected], text_encoder_3=ABSENT,
                tokenizer_2=["transformers", "CLIPTokenizer"], tokenizer_3=ABSENT,
                scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
  return made | dict(
      text_encoder=text(64, 2, "quick_gelu", projected, projection=64), text_encoder_2=second,
      vae=vae | dict(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609,
                     sample_size=1024, use_quant_conv=False, use_post_quant_conv=False),
      scheduler=dict(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000,
                     shift=3.0),
      transformer=dict(_class_name="SD3Transformer2DModel", sample_size=12, patch_size=2,
                       in_channels=16, out_channels=16, num_layers=2, num_attention_heads=2,
                       attention_head_dim=16, caption_projection_dim=32, joint_attention_dim=256,
                       pooled_projection_dim=64 + 32, pos_embed_max_size=6, qk_norm="rms_norm",
                       dual_attention_layers=[0]))


@functools.cache
def tokenizer(pad="<|endoftext|>"):
  return Tokenizer.of_clip(pad)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Family -> a random pipeline, its single file."""
  @functools.cache
  def make(family):
    second = {} if family in ("sd1", "sd2") else {"tokenizer_2": tokenizer("!")}
    pipeline = Pipeline.build(configs_of(family), {
        "tokenizer": tokenizer("!" if family == "sd2" else "<|endoftext|>"), **second})
    if family == "sd3":                          # what its files leave out
      pipeline.params["text_encoder"]["text_projection"]["kernel"] = np.eye(64, dtype=np.float32)
    file = tmp_path_factory.mktemp(family) / f"{family}.safetensors"
    save_pipeline(pipeline, file, format="single")
    return pipeline, file
  return make


def equal(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for x, y in zip(*map(jax.tree.leaves, (left, right))):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("family", FAMILIES)
def test_we_read_it_bit_for_bit(made, family):
  pipeline, file = made(family)
  found = load_tuned(file)                       # as `--checkpoint` does
  equal(found.params, pipeline.params)
  for name, network in pipeline.networks.items():
    own, other = (n.config._asdict() if isinstance(n.config, tuple)
                  else dataclasses.asdict(n.config) for n in (network, found.networks[name]))
    for key in own.keys() - ({"projection_dim"} if "proj" not in str(type(network)).lower()
                             else set()) - {"sample_size"}:
      assert own[key] == other[key], (name, key)
  ids = pipeline.tokenize(["a red cat", ""])
  jax.tree.map(np.testing.assert_array_equal, found.tokenize(["a red cat", ""]), ids)
  ours, theirs = (Schedule.from_config(p.scheduler_config) for p in (pipeline, found))
  assert ours.prediction == theirs.prediction
  np.testing.assert_array_equal(ours.alphas, theirs.alphas)
  outline = load_pipeline(file, shapes_only=True)
  assert jax.tree.map(lambda a: a.shape, outline.params) == jax.tree.map(np.shape, found.params)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_it_bit_for_bit(made, family, tmp_path):
  torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
  pipeline, file = made(family)
  save_pipeline(pipeline, tmp_path / "folder")
  kind = getattr(diffusers, type(pipeline).__name__)
  options = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3" else {}
  single = kind.from_single_file(str(file), config=str(tmp_path / "folder"), local_files_only=True,
                                 torch_dtype=torch.float32, **options)
  folder = kind.from_pretrained(tmp_path / "folder", **options)
  for name in pipeline.networks:
    ours, theirs = (getattr(p, name).state_dict() for p in (single, folder))
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for key in ours:
      assert torch.equal(ours[key], theirs[key]), (name, key)


def test_names_are_those_of_published_files(made):
  """Some of every module's, as the original code has them."""
  names = {family: set(safetensors.numpy.load_file(made(family)[1])) for family in FAMILIES}
  block = UNET + "output_blocks.3.1.transformer_blocks.0.attn2.to_out.0.weight"
  assert block in names["sd1"] and VAE + "decoder.up.0.block.0.nin_shortcut.weight" in names["sd1"]
  assert "cond_stage_model.transformer.text_model.final_layer_norm.bias" in names["sd1"]
  assert {"cond_stage_model.model.transformer.resblocks.23.ln_1.weight", "v_pred"} <= names["sd2"]
  assert {"conditioner.embedders.1.model.text_projection", "ztsnr", "v_pred",
          "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias",
          UNET + "label_emb.0.0.weight"} <= names["sdxl"]
  assert {UNET + "joint_blocks.0.x_block.attn2.qkv.weight", UNET + "pos_embed",
          "text_encoders.clip_g.transformer.text_projection.weight"} <= names["sd3"]
  assert not any("text_projection" in name for name in names["sd1"] | names["sd2"])


@pytest.mark.parametrize("said, mark, tensors, prediction", [
    ("", None, (), "epsilon"), ("v", None, (), "v_prediction"), ("eps", 0.2, (), "epsilon"),
    ("", 0.2, (), "v_prediction"), ("", 0.01, (), "epsilon"),
    ("", None, ("v_pred",), "v_prediction"),
])
def test_marks_of_the_prediction(said, mark, tensors, prediction):
  mark = None if mark is None else np.asarray([mark, -mark] * 8)
  config = scheduler_of("sd2", dict.fromkeys(tensors, (0,)), {}, said, mark)
  assert config["prediction_type"] == prediction and not config["rescale_betas_zero_snr"]
  spec = scheduler_of("sdxl", {"ztsnr": (0,)}, {"modelspec.prediction_type": "v"}, "", None)
  assert spec["prediction_type"] == "v_prediction" and spec["rescale_betas_zero_snr"]


def test_configuration_beside_the_file(made, tmp_path):
  file = tmp_path / "old.safetensors"
  safetensors.numpy.save_file(safetensors.numpy.load_file(made("sd1")[1]), file)
  assert load_pipeline(file, shapes_only=True).scheduler_config["prediction_type"] == "epsilon"
  file.with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
  assert load_pipeline(file, shapes_only=True).scheduler_config["prediction_type"] == "v_prediction"


def test_a_denoiser_in_the_original_names(made, tmp_path):
  """`model.unet`: the whole file, its denoiser alone, and that without a prefix."""
  pipeline, file = made("sd1")
  make = lambda tensors, name: safetensors.numpy.save_file(tensors, tmp_path / name)
  save_pipeline(pipeline, tmp_path / "folder", dtype="float32")
  tensors = safetensors.numpy.load_file(file)
  unet = {name: x + 1 for name, x in tensors.items() if name.startswith(UNET)}
  make({**tensors, **unet}, "whole.safetensors")
  make(unet, "unet.safetensors")
  make({name.removeprefix(UNET): x for name, x in unet.items()}, "bare.safetensors")
  shifted = jax.tree.map(lambda x: x + np.float32(1), pipeline.params["unet"])
  for name in ("whole", "unet", "bare"):
    found = load_pipeline(tmp_path / "folder", unet=str(tmp_path / f"{name}.safetensors"))
    equal(found.params["unet"], shifted)
    equal(found.params["vae"], pipeline.params["vae"])
  with pytest.raises(UserError,
                     match="a denoiser without text encoders and autoencoder; .* model.unet"):
    load_pipeline(tmp_path / "unet.safetensors")


def test_half_precision_and_compiled_names(made, tmp_path):
  pipeline, file = made("sd1")
  save_pipeline(pipeline, tmp_path / "half.safetensors", format="single", dtype="float16")
  tensors = safetensors.numpy.load_file(tmp_path / "half.safetensors")
  assert {str(x.dtype) for x in tensors.values()} == {"float16"}
  compiled = {name.replace(UNET, f"{UNET}_orig_mod."): x for name, x in tensors.items()}
  safetensors.numpy.save_file(compiled | {"model_ema.decay": np.ones(1, "f4"),
                                          "betas": np.ones(1000, "f4")},
                              tmp_path / "compiled.safetensors")
  found = load_pipeline(tmp_path / "compiled.safetensors")
  for x, y in zip(*(jax.tree.leaves(p.params) for p in (found, pipeline))):
    np.testing.assert_array_equal(x, y.astype(np.float16).astype(np.float32))


def test_scales_of_float8_count_in_every_network(made, tmp_path):
  """Of text encoder and autoencoder too, where a name more than is known stops nobody."""
  _, file = made("sd1")
  tensors = safetensors.numpy.load_file(file)
  keys = [UNET + "out.2.weight", VAE + "decoder.conv_out.weight",
          "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"]
  scaled = {key.replace(".weight", ".scale_weight"): np.asarray(0.5, "f4") for key in keys}
  doubled = {key: 2 * tensors[key] for key in keys}                # as float8 they would be rounded
  safetensors.numpy.save_file({**tensors, **doubled, **scaled, "scaled_fp8": np.zeros(0, "f4")},
                              tmp_path / "scaled.safetensors")
  equal(load_pipeline(tmp_path / "scaled.safetensors").params, load_pipeline(file).params)


def test_t5_needs_its_tokenizer(made, tmp_path, capsys):
  configs = configs_of("sd3")
  configs["model_index"] |= dict(text_encoder_3=["transformers", "T5EncoderModel"],
                                 tokenizer_3=["transformers", "T5TokenizerFast"])
  configs["text_encoder_3"] = make_sd3_configs(make_tokenizer(), t5=True)["text_encoder_3"] | {
      "d_model": 256}
  pipeline = Pipeline.build(configs, {"tokenizer": tokenizer(), "tokenizer_2": tokenizer("!"),
                                      "tokenizer_3": make_t5_tokenizer()})
  pipeline.params["text_encoder"]["text_projection"]["kernel"] = np.eye(64, dtype=np.float32)
  file = tmp_path / "sd35.safetensors"
  save_pipeline(pipeline, file, format="single")
  without = load_pipeline(file)
  assert "text_encoder_3" not in without.networks
  assert f"{file}: its T5 is left out" in capsys.readouterr().err
  pipeline.tokenizers["tokenizer_3"].save(tmp_path / "tokenizer_3")
  found = load_pipeline(file)
  equal(found.params, pipeline.params)
  assert not capsys.readouterr().err


def change(file, tmp_path, edit):
  tensors = edit(safetensors.numpy.load_file(file))
  safetensors.numpy.save_file(tensors, tmp_path / "changed.safetensors")
  return tmp_path / "changed.safetensors"


IN = UNET + "input_blocks.0.0.weight"


@pytest.mark.parametrize("edit, words", [
    (lambda t: {k: x for k, x in t.items() if VAE not in k}, ["has no autoencoder", "model.unet"]),
    (lambda t: t | {"control_model.a": np.ones(1, "f4")}, ["a ControlNet"]),
    (lambda t: t | {"edm_mean": np.ones(1, "f4")}, ["EDM's levels"]),
    (lambda t: {"model.diffusion_model.double_blocks.0.a": np.ones(1, "f4")}, ["Flux"]),
    (lambda t: {"lora_unet_a.lora_up.weight": np.ones(1, "f4")}, ["a LoRA; model.lora"]),
    (lambda t: {"conditioner.embedders.0.model.a": np.ones(1, "f4")}, ["the refiner of SDXL"]),
    (lambda t: {"a": np.ones(1, "f4")}, ["not a single-file checkpoint of Stable Diffusion"]),
    (lambda t: t | {IN: np.ones((64, 9, 3, 3), "f4")}, ["in_channels = 9: an inpainting UNet"]),
    (lambda t: t | {IN: np.full_like(t[IN], np.nan)}, ["conv_in.weight", "not finite"]),
    (lambda t: {k: x for k, x in t.items() if k != IN}, ["it lacks", IN]),
    (lambda t: {k: x for k, x in t.items() if k != UNET + "out.2.bias"}, ["1 missing: conv_out"]),
    (lambda t: t | {UNET + "input_blocks.1.1.more": np.ones(1, "f4")}, ["1 unexpected"]),
])
def test_files_that_cannot_be_read(made, tmp_path, edit, words):
  file = change(made("sd1")[1], tmp_path, edit)
  with pytest.raises(UserError) as error:
    load_pipeline(file)
  message = str(error.value)
  assert all(word in message for word in (str(file), *words)) and "\n" not in message, message


def test_what_is_no_file_of_weights(tmp_path):
  for name, content, word in (("a.txt", b"a", "neither a directory nor"),
                              ("b.safetensors", b"\xff" * 99, "corrupt"),
                              ("c.safetensors", b"version https://git-lfs.github.com/spec/v1\n",
                               "git-lfs pointer")):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / name)) + f".*{word}"):
      load_pipeline(tmp_path / name)


def test_models_that_readers_would_take_for_others(made, tmp_path):
  tiny = load_pipeline(make_pipeline_dir(tmp_path / "tiny"))
  wide = UNet2DConditionModel.from_config(configs_of("sd1")["unet"] | {"attention_head_dim": 4})
  for pipeline, word in (
      (tiny, "would not know this model .*norm_num_groups"),
      (dataclasses.replace(made("sd1")[0], networks={
          **made("sd1")[0].networks, "unet": wide}),
       "a single file says nothing of unet's attention_head_dim, which readers take for .*8, 8"),
      (dataclasses.replace(made("sd1")[0], configs={
          **made("sd1")[0].configs, "scheduler": dict(configs_of("sd1")["scheduler"],
                                                      beta_end=0.02)}), "scheduler's beta_end")):
    with pytest.raises(UserError, match=word):
      save_pipeline(pipeline, tmp_path / "out.safetensors", format="single")
    assert not (tmp_path / "out.safetensors").exists()
  with pytest.raises(UserError, match="ends in .safetensors"):
    save_pipeline(made("sd1")[0], tmp_path / "out", format="single")


def test_clips_vocabulary(tmp_path):
  """The shipped merges make the published ids."""
  ids = tokenizer()(["a photo of a cat"])[0]
  assert ids[:8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
  assert tokenizer("!")(["hi!"])[0][:5].tolist() == [49406, 1883, 0, 49407, 0]
  assert tokenizer().vocab_size == 49408 and json.loads(
      tokenizer()._files["vocab.json"])["<|endoftext|>"] == 49407
