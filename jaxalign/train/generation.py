"""Pictures of a pipeline: the same ones for the same prompts, number of each and seed."""
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxalign.config.schema import SampleConfig
from jaxalign.devices import memory, rng, sharding
from jaxalign.models.pipeline import Pipeline
from jaxalign.sampling import Conditioning, Schedule, guided_output, make_sampler, rollout


def generate(pipeline: Pipeline, prompts: list[str], n: int = 4, *, seed: int = 0,
             negative_prompt: str = "", sample: SampleConfig | None = None,
             batch: int = 32) -> np.ndarray:
  """Images `[P, n, H, W, 3]` uint8; image (p, i) depends on prompt, p * n + i and seed only."""
  images = np.concatenate(list(batches(pipeline, prompts, n, seed=seed, sample=sample, batch=batch,
                                       negative_prompt=negative_prompt)))
  return images.reshape((len(prompts), n) + images.shape[1:])


def batches(pipeline: Pipeline, prompts: list[str], n: int, *, seed: int, negative_prompt: str,
            sample: SampleConfig | None, batch: int) -> Iterator[np.ndarray]:
  """The images of `generate` in order, `[B, H, W, 3]` at a time: whoever has seen them may let go.

  A batch is spread over all devices.

  Raises:
    UserError: at once, of sizes that no machine can hold.
  """
  programs = _programs(pipeline, sample or SampleConfig())
  total = len(prompts) * n
  memory.check_fits(f"--n={n} for {len(prompts)} prompts", total, (), itemsize=0)
  memory.check_fits(f"--batch={batch}", min(batch, total), (*programs[0].image_size, 3))
  return _drawn(programs, prompts, n, seed, negative_prompt, batch)


def _drawn(programs, prompts, n, seed, negative_prompt, batch) -> Iterator[np.ndarray]:
  pipeline, encode, draw = programs
  mesh = sharding.make_mesh(-1, 1, 1)
  everywhere, rows_apart = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  text = jax.device_put(pipeline.text_params, everywhere)
  params = jax.device_put({"base": pipeline.variables, "decoder": pipeline.params["vae"]},
                          everywhere)
  key = jax.device_put(rng.stream(jax.random.key(seed), rng.EVAL), everywhere)
  total = len(prompts) * n
  batch = -(-min(batch, total) // mesh.size) * mesh.size
  uncond = encode(text, pipeline.tokenize([negative_prompt] * batch))
  with tqdm(total=total, desc="sampling", unit="img") as bar:
    for start in range(0, total, batch):
      ids = np.arange(start, start + batch, dtype=np.int32)
      rows = [prompts[i] for i in np.minimum(ids, total - 1) // n]    # the last batch is filled up
      cond = encode(text, pipeline.tokenize(rows))
      inputs = jax.device_put((Conditioning(cond, uncond), ids), rows_apart)
      yield np.asarray(draw(params, inputs[0], key, inputs[1]))[:total - start]
      bar.update(min(batch, total - start))


@functools.lru_cache(maxsize=4)     # a notebook that calls `generate` again compiles nothing again
def _programs(pipeline: Pipeline, sample: SampleConfig):
  """The pipeline at the size of its images, and jitted `encode(text params, token ids)` and
  `draw(params, conditioning, key, ids)`."""
  pipeline = pipeline.resized(sample.height, sample.width)
  schedule = Schedule.from_config(pipeline.scheduler_config)
  sampler = make_sampler(schedule, **sample.transitions)
  output_fn = guided_output(pipeline.denoise, sample.guidance)

  def draw(params, conditioning, key, ids):
    trajectory = rollout(output_fn, params["base"], sampler, conditioning, key, ids,
                         pipeline.latent_shape)
    images = pipeline.decode_images(params["decoder"], trajectory.final)
    return (images * 255).round().astype(jnp.uint8)
  return pipeline, jax.jit(pipeline.encode_prompts), jax.jit(draw)
