"""Model families: networks, samples and exports equal PyTorch's diffusers; errors name the file."""
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

import families
from jaxalign.convert import load_pipeline, save_pipeline
from jaxalign.errors import UserError
from jaxalign.models.vae import decode_images, encode_images
from jaxalign.sampling import Conditioning, Schedule, guided_output, make_sampler, rollout

FAMILIES = ("sd2", "turbo", "sdxl")
PROMPTS = ["a red apple on a blue background", "zebra !"]
GUIDANCE, STEPS = 5.0, 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Family -> its folder, written when first asked for."""
  return functools.cache(lambda name: families.write(tmp_path_factory.mktemp("families"), name))


@pytest.fixture(scope="module")
def loaded(folders):
  """Family -> our pipeline and PyTorch's."""
  diffusers = pytest.importorskip("diffusers")

  def load(name):
    theirs = diffusers.DiffusionPipeline.from_pretrained(folders(name))
    theirs.set_progress_bar_config(disable=True)
    return load_pipeline(folders(name)), theirs
  return functools.cache(load)


@pytest.fixture
def copy(folders, tmp_path):
  return shutil.copytree(folders("sdxl"), tmp_path / "copy")


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nchw(x):
  return pytest.importorskip("torch").from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def nhwc(y):
  return y.permute(0, 2, 3, 1).numpy()


def close(ours, theirs):
  np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


def encode(pipeline, prompts):
  return jax.jit(pipeline.encode_prompts)(pipeline.text_params, pipeline.tokenize(prompts))


def their_cond(theirs, prompts):
  """What PyTorch's pipeline gives its UNet for prompts, and where none is given."""
  torch = pytest.importorskip("torch")
  with torch.no_grad():
    if hasattr(theirs, "text_encoder_2"):
      return theirs.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=True)
    return theirs.encode_prompt(prompts, "cpu", 1, True)


def sample(pipeline, latents, sampler, guidance=GUIDANCE):
  """Images `[B, H, W, 3]` from given latents and `PROMPTS`."""
  output = guided_output(pipeline.denoise, guidance)
  conditioning = Conditioning(encode(pipeline, PROMPTS), encode(pipeline, [""] * len(PROMPTS)))

  @jax.jit
  def draw(params, latents, conditioning):
    final = rollout(output, {"params": params["unet"]}, sampler, conditioning, jax.random.key(0),
                    jnp.arange(len(PROMPTS)), pipeline.latent_shape, x_init=latents).final
    return decode_images(pipeline.vae, params["vae"], final)
  return draw(pipeline.params, latents, conditioning)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_encoders_equal_pytorch(loaded, family):
  pipeline, theirs = loaded(family)
  for name in pipeline.text_encoders:
    tokenizer = getattr(theirs, name.replace("text_encoder", "tokenizer"))
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="np")
    np.testing.assert_array_equal(pipeline.tokenize(PROMPTS)[name], tokens.input_ids)
  cond, null = encode(pipeline, PROMPTS), encode(pipeline, [""] * 2)
  states, null_states, *pooled = their_cond(theirs, PROMPTS)
  close(cond["text"], states)
  close(null["text"], null_states)
  assert ("added" in cond) == (family == "sdxl")
  if family == "sdxl":
    close(cond["added"]["text_embeds"], pooled[0])
    close(null["added"]["text_embeds"], pooled[1])
    assert not np.any(null["text"]) and not np.any(null["added"]["text_embeds"])
    np.testing.assert_array_equal(cond["added"]["time_ids"], [[16, 16, 0, 0, 16, 16]] * 2)


def test_folders_of_transformers_5_have_the_same_tokens(folders, copy):
  """There, a tokenizer is `tokenizer.json` alone; OpenCLIP's is padded with "!"."""
  transformers = pytest.importorskip("transformers")
  for name in ("tokenizer", "tokenizer_2"):
    fast = transformers.CLIPTokenizerFast.from_pretrained(copy / name)
    shutil.rmtree(copy / name)
    fast.save_pretrained(copy / name)
    for old in ("vocab.json", "merges.txt", "special_tokens_map.json"):
      (copy / name / old).unlink(missing_ok=True)
  prompts = [*PROMPTS, "", "two cats, naïve ones!!", "word " * 30]
  ours, before = (load_pipeline(folder).tokenize(prompts) for folder in (copy, folders("sdxl")))
  assert ours.keys() == before.keys() and len(ours) == 2
  for name, ids in ours.items():
    np.testing.assert_array_equal(ids, before[name])
  assert not np.array_equal(*ours.values())


def test_null_condition_is_the_encoded_empty_prompt_where_the_checkpoint_says_so(copy):
  index = copy / "model_index.json"
  index.write_text(json.dumps({**json.loads(index.read_text()),
                               "force_zeros_for_empty_prompt": False}))
  assert np.abs(encode(load_pipeline(copy), [""])["text"]).max() > 0.1


@pytest.mark.parametrize("family", FAMILIES[::2])
def test_unet_and_autoencoder_equal_pytorch(loaded, family):
  torch = pytest.importorskip("torch")
  pipeline, theirs = loaded(family)
  x, t = normal(2, 8, 6, 4), np.array([7, 901])
  cond = encode(pipeline, PROMPTS)
  out = jax.jit(pipeline.denoise)({"params": pipeline.params["unet"]}, x, t, cond)
  added = {k: torch.from_numpy(np.array(v)) for k, v in cond.get("added", {}).items()}
  images = np.random.default_rng(1).uniform(size=(2, 12, 8, 3)).astype(np.float32)
  latents = jax.jit(functools.partial(encode_images, pipeline.vae))(pipeline.params["vae"], images)
  decoded = jax.jit(functools.partial(decode_images, pipeline.vae))(pipeline.params["vae"], x)
  with torch.no_grad():
    close(out, nhwc(theirs.unet(nchw(x), torch.from_numpy(t),
                                torch.from_numpy(np.array(cond["text"])),
                                added_cond_kwargs=added).sample))
    close(latents, 0.5 * nhwc(theirs.vae.encode(nchw(2 * images - 1)).latent_dist.mean))
    close(decoded, np.clip(nhwc(theirs.vae.decode(nchw(x) / 0.5).sample) / 2 + 0.5, 0, 1))


# SD 2.x's directory has DDIM; XL's and Turbo's have Euler's method, which ends in a clean image.
@pytest.mark.parametrize("family, size", [("sd2", (16, 16)), ("sdxl", (24, 16))])
def test_guided_sample_equals_that_of_pytorch(loaded, family, size):
  pipeline, theirs = loaded(family)
  pipeline = pipeline.resized(*size)
  assert pipeline.latent_shape == (size[0] // 2, size[1] // 2, 4)
  latents = normal(2, *pipeline.latent_shape)
  sampler = make_sampler(Schedule.from_config(pipeline.scheduler_config), STEPS, eta=0.0,
                         final="clean" if family == "sdxl" else "")
  images = theirs(PROMPTS, height=size[0], width=size[1], num_inference_steps=STEPS,
                  guidance_scale=GUIDANCE, latents=nchw(latents), output_type="np").images
  close(sample(pipeline, latents, sampler), images)


@pytest.mark.slow
def test_turbo_in_one_step_equals_pytorch(loaded):
  """The spacing of the checkpoint puts the only step at 999."""
  diffusers = pytest.importorskip("diffusers")
  pipeline, theirs = loaded("turbo")
  latents = normal(2, 8, 8, 4)
  schedule = Schedule.from_config(pipeline.scheduler_config)
  sampler = make_sampler(schedule, 1, eta=0.0, final="clean")
  assert sampler.timesteps.tolist() == [999]
  ours = sample(pipeline, latents, sampler, guidance=1.0)
  one_step = make_sampler(schedule, 1, kind="one_step", timestep=999)
  np.testing.assert_array_equal(ours, sample(pipeline, latents, one_step, guidance=1.0))
  # Euler's method starts from less than unit variance, sqrt(1 - abar).
  scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config, clip_sample=False)
  theirs = type(theirs)(**{**theirs.components, "scheduler": scheduler},
                        requires_safety_checker=False)
  theirs.set_progress_bar_config(disable=True)
  images = theirs(PROMPTS, num_inference_steps=1, guidance_scale=0.0, latents=nchw(latents),
                  output_type="np").images
  close(ours, images)


@pytest.mark.slow
def test_one_step_xl(folders, loaded):
  """The generator is told 399 and given unit variance; its weights lie over the directory's."""
  torch = pytest.importorskip("torch")
  base, theirs = loaded("sdxl")
  other = families.write(folders("sdxl").parent / "other", "sdxl", seed=1)
  weights = other / "unet" / "diffusion_pytorch_model.safetensors"
  pipeline = load_pipeline(folders("sdxl"), unet=str(weights))
  for a, b in zip(*(jax.tree.leaves(p.text_params) for p in (pipeline, base))):
    np.testing.assert_array_equal(a, b)
  again = load_pipeline(folders("sdxl"), unet=str(weights.parent))
  with safetensors.safe_open(weights, "pt") as tensors:
    torch.save({name: tensors.get_tensor(name) for name in tensors.keys()}, other / "unet.bin")
  pickled = load_pipeline(folders("sdxl"), unet=str(other / "unet.bin"))
  for a, b, c in zip(*(jax.tree.leaves(p.params["unet"]) for p in (pipeline, again, pickled))):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)

  schedule = Schedule.from_config(pipeline.scheduler_config)
  latents = normal(2, 8, 8, 4)
  images = sample(pipeline, latents, make_sampler(schedule, 1, kind="one_step", timestep=399), 1.0)
  unet = type(theirs.unet).from_pretrained(other / "unet")
  states, _, pooled, _ = their_cond(theirs, PROMPTS)
  with torch.no_grad():
    z = nchw(latents)
    eps = unet(z, 399, states, added_cond_kwargs={
        "text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)}).sample
    abar = float(theirs.scheduler.alphas_cumprod[399])
    x = (z - (1 - abar) ** 0.5 * eps) / abar ** 0.5
    decoded = theirs.vae.decode(x / 0.5).sample
  close(images, np.clip(nhwc(decoded) / 2 + 0.5, 0, 1))


@pytest.mark.parametrize("family", FAMILIES[::2])
def test_export_is_what_was_read_and_loads_in_pytorch(folders, loaded, family, tmp_path):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  pipeline, theirs = loaded(family)
  save_pipeline(pipeline, tmp_path / "export")
  for file in folders(family).rglob("*.safetensors"):
    mine = tmp_path / "export" / file.relative_to(folders(family))
    with safetensors.safe_open(file, "np") as a, safetensors.safe_open(mine, "np") as b:
      # transformers 5 drops what begins all names of a text encoder, and reads both.
      drop = 0 if set(a.keys()) & set(b.keys()) else len("text_model.")
      assert set(a.keys()) == {name[drop:] for name in b.keys()}
      for name in b.keys():
        np.testing.assert_array_equal(a.get_tensor(name[drop:]), b.get_tensor(name))
  other = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "export")
  assert type(other) is type(theirs)
  other.set_progress_bar_config(disable=True)
  draw = lambda pipeline: pipeline(
      PROMPTS[0], num_inference_steps=1, output_type="np",
      generator=torch.Generator().manual_seed(0)).images
  np.testing.assert_array_equal(draw(other), draw(theirs))


def test_saving_another_family_over_a_checkpoint_leaves_no_second_encoder(copy, folders):
  save_pipeline(load_pipeline(folders("sd2")), copy)
  assert not (copy / "text_encoder_2").exists() and not (copy / "tokenizer_2").exists()
  assert load_pipeline(copy).text_encoders == ("text_encoder",)


# Errors.


def edit(file, **changes):
  file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def fails(path, *parts, **options):
  with pytest.raises(UserError) as error:
    load_pipeline(path, **options)
  message = str(error.value)
  assert "\n" not in message
  for part in parts:
    assert part in message, message


def test_unsupported_class(copy):
  edit(copy / "model_index.json", _class_name="StableDiffusionXLInpaintPipeline")
  fails(copy, str(copy / "model_index.json"),
        "'StableDiffusionXLInpaintPipeline' is not supported (only ")


def test_missing_tower(copy):
  shutil.rmtree(copy / "text_encoder_2")
  fails(copy, str(copy / "text_encoder_2"), "missing")
  edit(copy / "model_index.json", text_encoder_2=[None, None])
  fails(copy, str(copy / "model_index.json"), "text_encoder_2", "missing")


@pytest.mark.parametrize("changes, parts", [
    ({"cross_attention_dim": 2048}, ["cross_attention_dim = 2048", "24 + 40"]),
    ({"projection_class_embeddings_input_dim": 60},
     ["projection_class_embeddings_input_dim = 60", "text_encoder_2, 20"]),
    ({"addition_embed_type": None}, ["addition_embed_type = None", "text_time"]),
])
def test_text_encoders_that_do_not_fit_the_unet(copy, changes, parts):
  edit(copy / "unet" / "config.json", **changes)
  fails(copy, str(copy), "unet/config.json", *parts)


def test_autoencoder_in_float16_is_refused_where_it_overflows(folders):
  fails(folders("sdxl"), "AutoencoderKL", "force_upcast", "float16", dtype="float16")
  assert load_pipeline(folders("sdxl"), dtype="bfloat16").vae.dtype == jnp.bfloat16


def test_named_unet_that_cannot_be_used(folders, tmp_path):
  fails(folders("sd2"), str(tmp_path / "none"), "no such file", unet=str(tmp_path / "none"))
  (tmp_path / "unet.zip").write_bytes(b"")
  fails(folders("sd2"), "unet.zip", "not a weight file", unet=str(tmp_path / "unet.zip"))
  (tmp_path / "unet.bin").write_bytes(b"text")
  fails(folders("sd2"), "unet.bin", "state dict", unet=str(tmp_path / "unet.bin"))
  fails(folders("sd2"), "tensors do not fit config.json", unet=str(folders("sdxl") / "unet"))


def test_flax_has_no_such_export(folders, tmp_path):
  with pytest.raises(UserError, match="flax is not written for StableDiffusionXLPipeline"):
    save_pipeline(load_pipeline(folders("sdxl")), tmp_path / "flax", format="flax")


def test_size_that_is_no_whole_number_of_latents(loaded):
  with pytest.raises(UserError, match=r"sample\.width=17 is not a multiple of 2"):
    loaded("sd2")[0].resized(16, 17)
