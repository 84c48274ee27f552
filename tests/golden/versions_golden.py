"""Golden numbers of a sample that no version of JAX and others may change.

  PYTHONPATH=.:tests python tests/golden/versions_golden.py     writes the JSON file beside it

To be run with the versions of constraints.txt.
"""
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import runs
from jaxalign.convert import load_pipeline
from jaxalign.sampling import Conditioning, Schedule, guided_output, make_sampler, rollout

FILE = pathlib.Path(__file__).with_suffix(".json")
PROMPTS = ["a taco on a blue background", "two cats, naïve ones!"]
STEPS = 6


def sampled() -> np.ndarray:
  """Images `[2, 16, 16, 3]` (every second pixel) of a noisy sampler, its noise drawn by JAX."""
  pipeline = load_pipeline(runs.ROOT / "jaxalign" / "assets" / "emoji")
  sampler = make_sampler(Schedule.from_config(pipeline.scheduler_config), STEPS, eta=1.0)
  output_fn = guided_output(pipeline.denoise, 3.0)

  @jax.jit
  def draw(params, ids, uncond):
    cond, none = (pipeline.encode_prompts(params["text"], x) for x in (ids, uncond))
    latents = rollout(output_fn, params["unet"], sampler, Conditioning(cond, none),
                      jax.random.key(0), jnp.arange(2), pipeline.latent_shape).final
    return pipeline.decode_images(params["vae"], latents)[:, ::2, ::2]
  params = {"text": pipeline.text_params, "unet": pipeline.variables, "vae": pipeline.params["vae"]}
  return np.asarray(draw(params, pipeline.tokenize(PROMPTS), pipeline.tokenize(["", ""])))


def main():
  golden = {"sampled": sampled().round(6).tolist()}
  FILE.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
  main()
