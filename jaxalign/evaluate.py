"""Command line: `python -m jaxalign.evaluate --checkpoint=DIR --prompts=FILE --output=FILE.json`.

Scores a model on prompts; with a base model (`--base=DIR`, or a run's own) also compares the two on
the same noise: paired changes, diversity kept, Frechet distance with its floor, path KL.
"""
import dataclasses
import json
import math
import os
import pathlib
import sys

import jax

from jaxalign import configs_lib, rng, sharding
from jaxalign.command import Flags, run_command
from jaxalign.errors import UserError
from jaxalign.train.evaluation import Evaluator, compare, describe
from jaxalign.train.experiment import build, own_sampler, read_prompts
from jaxalign.train.restore import load_tuned, run_config

_FLAGS = Flags()
_CHECKPOINT = _FLAGS.define("string", "checkpoint", None, "Run folder or checkpoint directory.")
_BASE = _FLAGS.define("string", "base", None, "Model to compare with; that of the run by default.")
_PROMPTS = _FLAGS.define("string", "prompts", None, "Text file with one prompt a line.")
_OUTPUT = _FLAGS.define("string", "output", None, "JSON file to write.")
_SAMPLES = _FLAGS.define("integer", "samples", 8, "Images per prompt.", lower_bound=2)
_REWARD = _FLAGS.define("list", "reward", None, "Reward names; those of the run by default.")
_SEED = _FLAGS.define("integer", "seed", 0, "Of the noise.")


def main(argv) -> None:
  del argv
  sharding.use_cores()
  checkpoint, output = pathlib.Path(_CHECKPOINT.value), pathlib.Path(_OUTPUT.value)
  prompts = read_prompts("--prompts", _PROMPTS.value)
  if not output.parent.is_dir():
    raise UserError(f"--output={output}: no such folder")
  cfg = run_config(checkpoint) if checkpoint.is_dir() else None
  tuned = load_tuned(checkpoint)
  base_path = _BASE.value or (cfg.model.path if cfg else None)
  if cfg is None:
    cfg = dataclasses.replace(configs_lib.parse(configs_lib.default("nabla_gfn")),
                              sample=own_sampler(tuned))
  reward = cfg.reward
  if _REWARD.value:
    reward = configs_lib.RewardConfig(tuple(_REWARD.value), (1.0,) * len(_REWARD.value))
  # As many of this machine's devices as divide the batches, however many the run had.
  shards = math.gcd(len(jax.devices()), cfg.eval.batch, cfg.sample.batch // cfg.group // cfg.parts)
  merged = cfg.model.lora if cfg.merges_lora and not _BASE.value else ""
  # Whole weights as the policy: any two models of one architecture can stand beside each other.
  cfg = dataclasses.replace(
      cfg, seed=_SEED.value, reward=reward, mesh=configs_lib.MeshConfig(shards),
      model=dataclasses.replace(cfg.model, path=base_path or str(checkpoint), adapter="full",
                                lora=merged))
  exp = build(cfg)
  evaluate = Evaluator(exp)

  def policy(unet):
    return jax.device_put(unet, sharding.param_shardings(unet, exp.mesh))
  draw = lambda unet, label, **kw: evaluate(
      policy(unet), prompts, _SAMPLES.value, label=label, **kw)
  if base_path is None:
    result = {"tuned": describe(draw(tuned.params["unet"], "model"))}
  else:
    base = exp.pipeline.params
    shapes = lambda tree: jax.tree.map(lambda a: a.shape, tree)
    if shapes(base["unet"]) != shapes(tuned.params["unet"]):
      raise UserError(f"--base={base_path}: its UNet has another architecture than {checkpoint}")
    first = draw(base["unet"], "base")
    again = draw(base["unet"], "base, other noise", stream=rng.EVAL_FLOOR)
    now = draw(tuned.params["unet"], "tuned", path_kl=cfg.eval.path_kl)
    result = {"base": describe(first), "tuned": compare(now, first, again)}
  partial = output.with_name(f".{output.name}.partial")
  partial.write_text(json.dumps(result, indent=2) + "\n")
  os.replace(partial, output)
  print(json.dumps(result, indent=2))


if __name__ == "__main__":
  sys.exit(run_command(main, _FLAGS, required=("checkpoint", "prompts", "output")))
