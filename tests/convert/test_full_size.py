"""Stable Diffusion 1.5 at its real size, with random weights: there, compared, and back again."""
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import families
from jaxalign.convert import load_pipeline, save_pipeline
from jaxalign.models.vae import decode_images
from jaxalign.sampling import Conditioning, Schedule, guided_output, make_sampler, rollout

PIXELS, GUIDANCE, STEPS = 256, 5.0, 2
COUNTS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}


def write(folder):
  """The published architecture; the words are the fixture's, the embedding has room for all."""
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  words = families.tokenizers()["clip"]
  words.save(folder / "words")
  levels = 4
  diffusers.StableDiffusionPipeline(
      unet=diffusers.UNet2DConditionModel(
          sample_size=64, cross_attention_dim=768, attention_head_dim=8),
      vae=diffusers.AutoencoderKL(
          block_out_channels=[128, 256, 512, 512], layers_per_block=2, sample_size=512,
          down_block_types=["DownEncoderBlock2D"] * levels,
          up_block_types=["UpDecoderBlock2D"] * levels),
      text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(
          hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
          eos_token_id=words.eos_id, bos_token_id=words.bos_id, pad_token_id=words.pad_id)),
      tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "words"),
      scheduler=diffusers.DDIMScheduler(
          **families.BETAS, steps_offset=1, clip_sample=False, set_alpha_to_one=False),
      safety_checker=None, feature_extractor=None, requires_safety_checker=False,
  ).save_pretrained(folder / "sd15")
  return folder / "sd15"


def theirs(path, latents):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  pipeline = diffusers.StableDiffusionPipeline.from_pretrained(path)
  return pipeline(["a cat"], height=PIXELS, width=PIXELS, num_inference_steps=STEPS,
                  guidance_scale=GUIDANCE, output_type="np",
                  latents=torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())).images


def ours(pipeline, latents):
  schedule = Schedule.from_config(pipeline.scheduler_config)
  output = guided_output(pipeline.denoise, GUIDANCE)
  sampler = make_sampler(schedule, STEPS, eta=0.0, final="")
  encode = jax.jit(pipeline.encode_prompts)

  @jax.jit
  def draw(params, latents, conditioning):
    final = rollout(output, {"params": params["unet"]}, sampler, conditioning, jax.random.key(0),
                    jnp.arange(1), pipeline.latent_shape, x_init=latents).final
    return decode_images(pipeline.vae, params["vae"], final)
  conditioning = Conditioning(*(encode(pipeline.text_params, pipeline.tokenize(prompts))
                                for prompts in (["a cat"], [""])))
  return np.asarray(draw({k: pipeline.params[k] for k in ("unet", "vae")}, latents, conditioning))


@pytest.mark.slow
def test_full_size_sd15_equals_pytorch_and_comes_back(tmp_path, capsys):
  clock = time.monotonic()
  seconds = {}

  def done(what):
    nonlocal clock
    seconds[what], clock = round(time.monotonic() - clock, 1), time.monotonic()

  path = write(tmp_path)
  done("write")
  latents = np.random.default_rng(0).standard_normal((1, 32, 32, 4)).astype(np.float32)
  expected = theirs(path, latents)
  done("PyTorch")
  pipeline = load_pipeline(path).resized(PIXELS, PIXELS)
  done("load")
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  assert {name: count(tree) for name, tree in pipeline.params.items()} == COUNTS
  images = ours(pipeline, latents)
  done("sample, with compilation")
  save_pipeline(pipeline, tmp_path / "again")
  done("save")
  again = theirs(tmp_path / "again", latents)
  done("PyTorch again")
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
  with capsys.disabled():
    print(f"\nseconds {seconds}, peak memory {peak:.1f} GiB, largest difference of a pixel "
          f"{np.abs(images - expected).max():.1e}, spread of pixels {expected.std():.2e}")
  np.testing.assert_array_equal(again, expected)
  np.testing.assert_allclose(images, expected, atol=1e-4, rtol=0)
