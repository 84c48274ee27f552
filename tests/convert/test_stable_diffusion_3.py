"""Stable Diffusion 3: text, autoencoder, samples, files and adapters equal diffusers'; errors."""
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxalign.convert import load_adapter, load_pipeline, save_adapter, save_pipeline
from jaxalign.errors import UserError
from jaxalign.models import lora, mmdit
from jaxalign.models.pipeline import Pipeline
from jaxalign.sampling import Conditioning, Schedule, guided_output, make_sampler, rollout
from jaxalign.testing import fixture

PROMPTS = ["a red cat on a blue background", "zebra !"]
GUIDANCE, STEPS = 5.0, 8
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nchw(x):
  return pytest.importorskip("torch").from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def nhwc(y):
  return y.detach().permute(0, 2, 3, 1).numpy()


def close(ours, theirs, atol=1e-5):
  np.testing.assert_allclose(ours, theirs, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Whether T5 is there -> a checkpoint as PyTorch's diffusers has written it."""
  diffusers = pytest.importorskip("diffusers")

  def write(t5):
    root = tmp_path_factory.mktemp("sd3")
    fixture.make_sd3_pipeline_dir(root / "ours", seed=1, t5=t5)
    absent = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(root / "ours", **absent)
    theirs.save_pretrained(root / "theirs")
    return root / "theirs"
  return functools.cache(write)


@pytest.fixture(scope="module")
def loaded(folders):
  """Whether T5 is there -> our pipeline and PyTorch's."""
  return functools.cache(lambda t5: (load_pipeline(folders(t5)), torch_pipeline(folders(t5), t5)))


def torch_pipeline(folder, t5):
  diffusers = pytest.importorskip("diffusers")
  absent = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
  pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, **absent)
  pipeline.set_progress_bar_config(disable=True)
  return pipeline


def encode(pipeline, prompts):
  return jax.jit(pipeline.encode_prompts)(pipeline.text_params, pipeline.tokenize(prompts))


def sample(pipeline, latents, variables=None, steps=STEPS):
  """Images by Euler's method on the checkpoint's own levels."""
  schedule = Schedule.from_config(pipeline.scheduler_config)
  sampler = make_sampler(schedule, steps, eta=0.0)
  output = guided_output(pipeline.denoise, GUIDANCE)
  conditioning = Conditioning(encode(pipeline, PROMPTS), encode(pipeline, [""] * len(PROMPTS)))

  @jax.jit
  def draw(variables, decoder, latents, conditioning):
    final = rollout(output, variables, sampler, conditioning, jax.random.key(0),
                    jnp.arange(len(PROMPTS)), pipeline.latent_shape, x_init=latents).final
    return pipeline.decode_images(decoder, final)
  return draw(variables or pipeline.variables, pipeline.params["vae"], latents, conditioning)


def torch_sample(theirs, latents, steps=STEPS):
  height, width = (8 * side // 4 for side in latents.shape[1:3])
  return theirs(PROMPTS, height=height, width=width, num_inference_steps=steps,
                latents=nchw(latents), guidance_scale=GUIDANCE, output_type="np").images


@pytest.mark.parametrize("t5", [True, False])
def test_text_equals_diffusers(loaded, t5):
  torch = pytest.importorskip("torch")
  pipeline, theirs = loaded(t5)
  with torch.no_grad():
    states, null, pooled, null_pooled = theirs.encode_prompt(
        PROMPTS, None, None, device="cpu", do_classifier_free_guidance=True)
  for prompts, wanted, wanted_pooled in (
      (PROMPTS, states, pooled), ([""] * 2, null, null_pooled)):
    cond = encode(pipeline, prompts)
    close(cond["pooled"], wanted_pooled)
    if t5:
      gap = np.linalg.norm(cond["text"] - wanted.numpy()) / np.linalg.norm(wanted)
      assert gap < 1e-5
    else:                    # one zero vector stands for 256
      close(cond["text"][:, :-1], wanted[:, :fixture.LENGTH])
      assert not cond["text"][:, -1].any() and not wanted[:, fixture.LENGTH:].any()
      np.testing.assert_allclose(cond["key_bias"][:, -1], np.log(256), rtol=1e-6)


def test_autoencoder_equals_diffusers(loaded):
  torch = pytest.importorskip("torch")
  pipeline, theirs = loaded(False)
  images, z = np.random.default_rng(1).uniform(size=(2, 12, 8, 3)), normal(2, 6, 4, 16)
  images = images.astype(np.float32)
  config = theirs.vae.config
  with torch.no_grad():
    mean = nhwc(theirs.vae.encode(nchw(2 * images - 1)).latent_dist.mean)
    image = nhwc(theirs.vae.decode(nchw(z) / config.scaling_factor + config.shift_factor).sample)
  params = pipeline.params["vae"]
  close(jax.jit(pipeline.encode_images)(params, images),
        (mean - config.shift_factor) * config.scaling_factor)
  close(jax.jit(pipeline.decode_images)(params, z), np.clip(image / 2 + 0.5, 0, 1))


@pytest.mark.parametrize("t5, size", [(True, (16, 16)), (False, (24, 16))])
def test_guided_sample_equals_diffusers(loaded, t5, size):
  """Eight steps of Euler's method on levels that are shifted twice at their small end."""
  if not t5:
    pytest.importorskip("diffusers", "0.36", reason="before 0.36 a missing T5 is 77 rows, not 256")
  pipeline, theirs = loaded(t5)
  pipeline = pipeline.resized(*size)
  latents = normal(2, *pipeline.latent_shape)
  ours = sample(pipeline, latents)
  assert ours.shape == (2, *size, 3) and np.std(ours) > 0.1
  close(ours, torch_sample(theirs, latents), 1e-4)


def tensors(folder):
  """Every tensor of a checkpoint: file, name -> array."""
  found = {}
  for file in sorted(folder.rglob("*.safetensors")):
    with safetensors.safe_open(file, "np") as content:
      found |= {(str(file.relative_to(folder)), name): content.get_tensor(name)
                for name in content.keys()}
  return found


@pytest.mark.parametrize("t5", [True, False])
def test_saved_as_it_was_read(folders, loaded, t5, tmp_path):
  """Bit for bit, the position table too; and diffusers makes the same images of it."""
  pipeline, theirs = loaded(t5)
  save_pipeline(pipeline, tmp_path / "export")
  before, after = tensors(folders(t5)), tensors(tmp_path / "export")
  assert before.keys() == after.keys()
  assert (TRANSFORMER, "pos_embed.pos_embed") in after
  for key, x in before.items():
    np.testing.assert_array_equal(x, after[key], err_msg=str(key), strict=True)
  for name in ("model_index.json", "transformer/config.json", "vae/config.json"):
    before, after = (json.loads((path / name).read_text())
                     for path in (folders(t5), tmp_path / "export"))
    assert before == after, name
  latents = normal(2, 8, 8, 16)
  other = torch_pipeline(tmp_path / "export", t5)
  np.testing.assert_array_equal(torch_sample(other, latents, 2), torch_sample(theirs, latents, 2))


def test_shards_and_half_precision(loaded, tmp_path):
  """As published: shards with an index, and variants whose index is named in another way."""
  torch = pytest.importorskip("torch")
  pipeline, theirs = loaded(True)
  theirs.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
  assert (tmp_path / "shards" / f"{TRANSFORMER}.index.json").is_file()
  half = torch_pipeline(tmp_path / "shards", True).to(torch.float16)
  half.save_pretrained(tmp_path / "half", max_shard_size="60KB", variant="fp16")
  assert (tmp_path / "half" / f"{TRANSFORMER}.index.fp16.json").is_file()
  same = load_pipeline(tmp_path / "shards")
  jax.tree.map(np.testing.assert_array_equal, same.params, pipeline.params)
  halved = load_pipeline(tmp_path / "half")
  # Of T5 the file's own dtype stays in memory.
  kinds = {name: {str(x.dtype) for x in jax.tree.leaves(tree)}
           for name, tree in halved.params.items()}
  assert kinds.pop("text_encoder_3") >= {"float16"}
  assert set.union(*kinds.values()) == {"float32"}
  save_pipeline(halved, tmp_path / "again")
  before = {name: x for (_, name), x in tensors(tmp_path / "half" / "transformer").items()}
  after = {name: x for (_, name), x in tensors(tmp_path / "again" / "transformer").items()}
  assert before.keys() == after.keys()
  for name, x in before.items():
    np.testing.assert_array_equal(x, after[name], err_msg=name, strict=True)
  close(encode(halved, PROMPTS)["text"], encode(pipeline, PROMPTS)["text"], 2e-2)


def test_second_copy_of_t5s_embedding_is_dropped(folders, tmp_path):
  folder = shutil.copytree(folders(True), tmp_path / "copy")
  file = folder / "text_encoder_3" / "model.safetensors"
  own = safetensors.numpy.load_file(file)
  twice = own | {"encoder.embed_tokens.weight": own["shared.weight"]}
  safetensors.numpy.save_file(twice, file, metadata={"format": "pt"})
  assert load_pipeline(folder).params.keys() == load_pipeline(folders(True)).params.keys()
  twice["encoder.embed_tokens.weight"] = own["shared.weight"] + 1
  safetensors.numpy.save_file(twice, file, metadata={"format": "pt"})
  fails(folder, str(file), "unexpected", "encoder.embed_tokens.weight")


def test_t5_whose_output_is_zero_is_an_absent_one(folders, loaded, tmp_path):
  folder = shutil.copytree(folders(True), tmp_path / "copy")
  file = folder / "text_encoder_3" / "model.safetensors"
  own = safetensors.numpy.load_file(file)
  own["encoder.final_layer_norm.weight"] *= 0
  safetensors.numpy.save_file(own, file, metadata={"format": "pt"})
  pipeline = load_pipeline(folder)
  assert encode(pipeline, PROMPTS)["text"].shape[1] == fixture.LENGTH + 1
  latents = normal(2, 8, 8, 16)
  close(sample(pipeline, latents, steps=2), torch_sample(torch_pipeline(folder, True), latents, 2),
        1e-4)


def test_a_checkpoints_own_position_table_counts(folders, tmp_path):
  """Read, cropped for the image size, and never recomputed."""
  folder = shutil.copytree(folders(False), tmp_path / "copy")
  own = safetensors.numpy.load_file(folder / TRANSFORMER)
  table = normal(*own["pos_embed.pos_embed"].shape)
  safetensors.numpy.save_file({**own, "pos_embed.pos_embed": table}, folder / TRANSFORMER,
                              metadata={"format": "pt"})
  crop = load_pipeline(folder).resized(24, 8).constants["constants"]["pos_embed"]["pos_embed"]
  np.testing.assert_array_equal(crop, table.reshape(6, 6, -1)[:, 2:4])
  del own["pos_embed.pos_embed"]
  safetensors.numpy.save_file(own, folder / TRANSFORMER, metadata={"format": "pt"})
  pipeline = load_pipeline(folder)                   # diffusers computes it then, and so do we
  save_pipeline(pipeline, tmp_path / "export")
  np.testing.assert_array_equal(tensors(tmp_path / "export")[TRANSFORMER, "pos_embed.pos_embed"],
                                mmdit.position_table(pipeline.denoiser.config))


# Adapters.


def test_adapters_both_ways(folders, loaded, tmp_path):
  """PEFT's names with the prefix `transformer.`; all layers of both targets."""
  torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
  pipeline, _ = loaded(True)
  targets = pipeline.adapter_targets(("attention", "ff"))
  adapter = lora.init(jax.random.key(0), pipeline.weights, 3, targets)
  adapter = jax.tree.map(lambda a: np.asarray(a) + 0.1 * normal(*a.shape), adapter)
  file = save_adapter(adapter, tmp_path / "ours", pipeline.denoiser_name)
  with safetensors.safe_open(file, "np") as content:
    names = set(content.keys())
  assert all(name.startswith("transformer.transformer_blocks.") for name in names)
  assert not any("alpha" in name for name in names)
  latents = normal(2, 8, 8, 16)
  ours = sample(pipeline, latents, {**pipeline.variables, "lora": adapter}, steps=2)
  assert np.abs(ours - sample(pipeline, latents, steps=2)).max() > 0.02
  theirs = torch_pipeline(folders(True), True)
  theirs.load_lora_weights(tmp_path / "ours")
  close(torch_sample(theirs, latents, 2), ours, 1e-4)
  theirs.unload_lora_weights()

  theirs.transformer.add_adapter(peft.LoraConfig(
      r=2, lora_alpha=6, target_modules=["to_q", "add_k_proj", "to_add_out", "ff_context.net.2"]))
  with torch.no_grad():
    for name, parameter in theirs.transformer.named_parameters():
      if "lora" in name:
        parameter.copy_(torch.from_numpy(0.2 * normal(*parameter.shape)))
  theirs.save_lora_weights(tmp_path / "theirs", peft.get_peft_model_state_dict(theirs.transformer),
                           transformer_lora_adapter_metadata=dict(
                               theirs.transformer.peft_config["default"].to_dict()))
  found = load_adapter(tmp_path / "theirs", pipeline.weights, pipeline.denoiser_name)
  ours = sample(pipeline, latents, {**pipeline.variables, "lora": found}, steps=2)
  close(torch_sample(theirs, latents, 2), ours, 1e-4)


# Errors.


@pytest.fixture
def copy(folders, tmp_path):
  return shutil.copytree(folders(True), tmp_path / "copy")


def edit(file, **changes):
  file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def fails(path, *parts, **options):
  with pytest.raises(UserError) as error:
    load_pipeline(path, **options)
  message = str(error.value)
  assert "\n" not in message
  for part in parts:
    assert part in message, message


@pytest.mark.parametrize("file, changes, parts", [
    ("model_index.json", {"scheduler": ["diffusers", "EulerDiscreteScheduler"]},
     ["scheduler of class 'EulerDiscreteScheduler'", "FlowMatchEulerDiscreteScheduler"]),
    ("model_index.json", {"text_encoder_2": [None, None]}, ["'text_encoder_2' is missing"]),
    ("model_index.json", {"tokenizer_3": [None, None]}, ["text_encoder_3 needs its tokenizer_3"]),
    ("model_index.json", {"text_encoder_3": ["transformers", "UMT5EncoderModel"]},
     ["text_encoder_3 of class 'UMT5EncoderModel'"]),
    ("model_index.json", {"_class_name": "FlaxStableDiffusion3Pipeline"},
     ["_class_name 'FlaxStableDiffusion3Pipeline' is not supported (only "]),
    ("transformer/config.json", {"joint_attention_dim": 40}, ["joint_attention_dim = 40"]),
    ("transformer/config.json", {"joint_attention_dim": 80},
     ["joint_attention_dim = 80", "text_encoder_3 are 64 wide"]),
    ("transformer/config.json", {"pooled_projection_dim": 40},
     ["pooled_projection_dim = 40", "32 + 16"]),
    ("transformer/config.json", {"qk_norm": "layer_norm"}, ["qk_norm", "layer_norm"]),
    ("transformer/config.json", {"in_channels": 4, "out_channels": 4},
     ["in_channels = 4", "16 channels"]),
    ("text_encoder_3/config.json", {"feed_forward_proj": "relu"}, ["feed_forward_proj", "relu"]),
])
def test_config_that_is_not_supported(copy, file, changes, parts):
  edit(copy / file, **changes)
  fails(copy, str(copy), *parts)


@pytest.mark.parametrize("key, value", [("use_dynamic_shifting", True), ("shift_terminal", 0.02),
                                        ("use_karras_sigmas", True), ("invert_sigmas", True)])
def test_scheduler_that_is_not_supported(copy, key, value):
  edit(copy / "scheduler" / "scheduler_config.json", **{key: value})
  with pytest.raises(UserError, match=f"scheduler_config.json: {key}={value}"):
    Schedule.from_config(load_pipeline(copy).scheduler_config)


def test_files_and_sizes_that_cannot_be_used(copy, loaded, tmp_path):
  pipeline, _ = loaded(True)
  with pytest.raises(UserError, match=r"sample\.width=18 is not a multiple of 4"):
    pipeline.resized(16, 18)
  with pytest.raises(UserError, match=r"sample\.height=28 is more than 24.*pos_embed_max_size"):
    pipeline.resized(28, 16)
  with pytest.raises(UserError, match="flax .*StableDiffusion3Pipeline"):
    save_pipeline(pipeline, tmp_path / "flax", format="flax")
  with pytest.raises(UserError, match="transformer has no 'conv', only attention, ff"):
    pipeline.adapter_targets(("conv",))
  shutil.rmtree(copy / "text_encoder_3")
  fails(copy, str(copy / "text_encoder_3"), "missing")
  edit(copy / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
  assert load_pipeline(copy).text_encoders == ("text_encoder", "text_encoder_2")
  own = safetensors.numpy.load_file(copy / TRANSFORMER)
  own.pop("transformer_blocks.0.attn2.to_q.weight")
  safetensors.numpy.save_file(own, copy / TRANSFORMER)
  fails(copy, str(copy / TRANSFORMER), "1 missing", "transformer_blocks.0.attn2.to_q.weight")


def test_shift_is_a_number_in_what_is_written(tmp_path):
  """diffusers' pipeline adds it, and cannot add null."""
  tokenizer = fixture.make_tokenizer()
  configs = fixture.make_sd3_configs(tokenizer)
  del configs["vae"]["shift_factor"]
  own = {"tokenizer": tokenizer, "tokenizer_2": tokenizer}
  save_pipeline(Pipeline.build(configs, own), tmp_path / "new")
  assert json.loads((tmp_path / "new" / "vae" / "config.json").read_text())["shift_factor"] == 0.0
