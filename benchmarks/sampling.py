"""Guided sampling of one checkpoint: jaxalign beside PyTorch diffusers, taking turns.

  python benchmarks/sampling.py [--checkpoint=DIR] [--batch=32] [--steps=20] [--repeats=5]

Both draw the same batch with DDIM (eta 0), guidance 3, float32, text encoding and decoding
included, from the same prompts. Compilation and warm-up are not timed; medians over the repeats are
printed.
"""
import os
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from jaxalign.convert import load_pipeline
from jaxalign.devices import sharding
from jaxalign.sampling import Conditioning, Schedule, guided_output, make_sampler, rollout

ROOT = pathlib.Path(__file__).resolve().parent.parent
_CHECKPOINT = flags.DEFINE_string("checkpoint", str(ROOT / "jaxalign/assets/emoji"),
                                   "diffusers directory")
_BATCH = flags.DEFINE_integer("batch", 32, "images per call")
_STEPS = flags.DEFINE_integer("steps", 20, "denoising steps")
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed calls of each")
GUIDANCE = 3.0


def ours(path, prompts, steps):
  pipeline = load_pipeline(path)
  schedule = Schedule.from_config(pipeline.scheduler_config)
  sampler = make_sampler(schedule, steps, eta=0.0)
  output_fn = guided_output(pipeline.denoise, GUIDANCE)
  mesh = sharding.make_mesh(-1, 1, 1)
  params = jax.device_put({**pipeline.text_params, "vae": pipeline.params["vae"],
                           "base": pipeline.variables}, sharding.replicated(mesh))

  @jax.jit
  def draw(params, ids, uncond_ids, key):
    conditioning = Conditioning(pipeline.encode_prompts(params, ids),
                                pipeline.encode_prompts(params, uncond_ids))
    trajectory = rollout(output_fn, params["base"], sampler, conditioning, key,
                         jnp.arange(len(prompts)), pipeline.latent_shape)
    return pipeline.decode_images(params["vae"], trajectory.final)
  ids, uncond = jax.device_put(
      (pipeline.tokenize(prompts), pipeline.tokenize([""] * len(prompts))),
      sharding.batch_sharding(mesh))
  return lambda i: np.asarray(draw(params, ids, uncond, jax.random.key(i)))


def theirs(path, prompts, steps):
  import torch
  from diffusers import StableDiffusionPipeline
  torch.set_num_threads(os.cpu_count())
  pipeline = StableDiffusionPipeline.from_pretrained(path, torch_dtype=torch.float32)
  pipeline.set_progress_bar_config(disable=True)
  size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
  return lambda i: pipeline(
      prompts, num_inference_steps=steps, guidance_scale=GUIDANCE, height=size, width=size,
      generator=torch.Generator().manual_seed(i), output_type="np").images


def main(argv):
  del argv
  sharding.use_cores()                     # as the commands do; PyTorch takes all cores as well
  prompts = ["a cat face on a red background"] * _BATCH.value
  draws = {"jaxalign": ours(_CHECKPOINT.value, prompts, _STEPS.value),
           "PyTorch diffusers": theirs(_CHECKPOINT.value, prompts, _STEPS.value)}
  seconds = {name: [] for name in draws}
  for i in range(-1, _REPEATS.value):
    for name, draw in draws.items():
      begun = time.perf_counter()
      images = draw(i + 1)
      assert images.shape[0] == _BATCH.value and np.isfinite(images).all()
      if i >= 0:
        seconds[name].append(time.perf_counter() - begun)
  print(f"batch {_BATCH.value}, {_STEPS.value} steps, guidance {GUIDANCE}, "
        f"{jax.devices()[0].platform} with {os.cpu_count()} cores, float32")
  for name, values in seconds.items():
    median = statistics.median(values)
    print(f"{name:20s} {median:7.2f} s a batch ({min(values):.2f} to {max(values):.2f})"
          f" {_BATCH.value / median:8.2f} images/s")


if __name__ == "__main__":
  sys.exit(app.run(main))
