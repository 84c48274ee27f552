"""Golden numbers of the embedded model that no version of Python, JAX or its relatives may change.

  python versions_golden.py [--training]      writes versions_golden.json beside this file

To be run with the versions of constraints.txt; without `--training`, which takes minutes, the
numbers of that stay as they are.
"""
import json
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.convert import load_pipeline
from jaxalign.sampling import Conditioning, Schedule, guided_output, make_sampler, rollout

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
FILE = pathlib.Path(__file__).with_suffix(".json")
PROMPTS = ["a taco on a blue background", "two cats, naïve ones!"]
STEPS = 6
# The warm-up of the default run, and three steps in which the policy moves away from the base.
TRAINING = ["--config=configs/nabla_gfn.py", "--config.train.steps=8", "--config.eval.every=0",
            "--config.eval.prompts=8", "--config.eval.samples=4", "--config.eval.watch_prompts=2",
            "--config.eval.watch_samples=2", "--config.eval.path_kl=False",
            "--config.log.tensorboard=False"]


def sampled() -> np.ndarray:
  """Images `[2, 16, 16, 3]` (every second pixel) of a noisy sampler, its noise drawn by JAX."""
  pipeline = load_pipeline(ROOT / "jaxalign" / "assets" / "emoji")
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


def trained(folder: pathlib.Path) -> dict:
  """Change of each score, `{"mean", "sem"}`, that the command `TRAINING` brings, in a new process.

  Raises:
    CalledProcessError: it failed.
  """
  subprocess.run([sys.executable, "-m", "jaxalign.launch", *TRAINING, f"--workdir={folder}"],
                 cwd=ROOT, check=True)
  tuned = json.loads((folder / "summary.json").read_text())["tuned"]
  return {name: {key: tuned[name]["change"][key] for key in ("mean", "sem")}
          for name in ("reward", "judge", "diversity")}


def main():
  golden = json.loads(FILE.read_text()) if FILE.exists() else {}
  golden["sampled"] = sampled().round(6).tolist()
  if "--training" in sys.argv:
    with tempfile.TemporaryDirectory() as folder:
      golden["trained"] = trained(pathlib.Path(folder) / "run")
  FILE.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
  main()
