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

from jaxalign.config import recipes, schema
from jaxalign.config.command import Flags, run_command
from jaxalign.config.places import checkpoint_path
from jaxalign.data.prompts import read_prompts
from jaxalign.errors import UserError
from jaxalign.storage.files import whole

_FLAGS = Flags()
_CHECKPOINT = _FLAGS.define("string", "checkpoint", None, "Run folder or checkpoint directory.")
_BASE = _FLAGS.define("string", "base", None, "Model to compare with; that of the run by default.")
_PROMPTS = _FLAGS.define("string", "prompts", None, "Text file with one prompt a line.")
_OUTPUT = _FLAGS.define("string", "output", None, "JSON file to write.")
_SAMPLES = _FLAGS.define("integer", "samples", 8, "Images per prompt.", lower_bound=2)
_REWARD = _FLAGS.define("multi_string", "reward", None, "A reward, as in reward.names; once for "
                        "each of several, which are summed. Those of the run by default.")
_JUDGE = _FLAGS.define("string", "judge", None, "Held-out scorer, whose features measure "
                       "diversity; that of the run, else scene_judge.")
_SEED = _FLAGS.define_seed("Of the noise.")
_STEPS = _FLAGS.define("integer", "steps", None,
                        "Denoising steps; those of the run, else 20 (28 on a flow).")
_GUIDANCE = _FLAGS.define("float", "guidance", None,
                           "Guidance scale; that of the run, else 3 (7 on a flow).")
_ETA = _FLAGS.define("float", "eta", None,
                      "Noise of the sampler; that of the run, else 1 (0 on a flow).")
_BATCH = _FLAGS.define("integer", "batch", None, "Images per device program; those of the run "
                       "(eval.batch), else 64.", lower_bound=1)
_DTYPE = _FLAGS.define("enum", "dtype", None, ["float32", "bfloat16"],
                       "What networks compute in; that of the run, else float32.")


def main(argv) -> None:
  del argv
  checkpoint, output = checkpoint_path(_CHECKPOINT.value), pathlib.Path(_OUTPUT.value)
  prompts = read_prompts("--prompts", _PROMPTS.value)
  _check_output(output)
  # These take seconds, which a wrong flag need not.
  import jax

  from jaxalign.devices import callbacks, rng, sharding
  from jaxalign.train.evaluation import Evaluator, compare, describe
  from jaxalign.train.experiment import build
  from jaxalign.train.opening import own_sampler
  from jaxalign.train.report import results_table
  from jaxalign.train.restore import check_comparable, load_tuned, reference, run_config
  callbacks.be_patient()                         # a reward may be PyTorch
  sharding.use_cores()
  cfg = run_config(checkpoint) if checkpoint.is_dir() else None
  tuned = load_tuned(checkpoint)
  base_path = _BASE.value or (cfg.model.path if cfg else None)
  if cfg is None:
    cfg = dataclasses.replace(recipes.parse(recipes.default("nabla_gfn")),
                              sample=own_sampler(tuned))
  cfg = _with_flags(cfg)
  own = None
  if cfg.model.lora and not cfg.merges_lora and not _BASE.value:
    own = reference(cfg)
  # As many of this machine's devices as divide the batches, however many the run had.
  shards = math.gcd(len(jax.devices()), cfg.eval.batch, cfg.sample.batch // cfg.group // cfg.parts)
  # Whole weights as the policy: any two models of one architecture can stand beside each other.
  model = dataclasses.replace(
      cfg.model, path=base_path or str(checkpoint), adapter="full", teacher="",
      lora=cfg.model.lora if cfg.merges_lora else "")
  if _BASE.value:                    # what was put into the run's own model is no part of this one
    model = dataclasses.replace(model, unet="", lora="")
  cfg = dataclasses.replace(cfg, model=model, mesh=schema.MeshConfig(shards))
  exp = build(cfg, pipeline=own)
  if base_path is not None:
    check_comparable(base_path, exp.pipeline, checkpoint, tuned)
  evaluate = Evaluator(exp)

  def draw(model, label, **kw):
    policy = jax.device_put(model.weights, sharding.param_shardings(model.weights, exp.mesh))
    return evaluate(policy, prompts, _SAMPLES.value, label=label, **kw)
  if base_path is None:
    result = {"tuned": describe(draw(tuned, "model"))}
  else:
    first = draw(exp.pipeline, "base")
    again = draw(exp.pipeline, "base, other noise", stream=rng.EVAL_FLOOR)
    now = draw(tuned, "tuned", path_kl=cfg.eval.path_kl)
    result = {"base": describe(first), "tuned": compare(now, first, again)}
  print(results_table(result.get("base"), result["tuned"]))
  text = json.dumps(result, indent=2)
  try:
    with whole(output) as file:
      file.write_text(text + "\n")
  except OSError as error:
    print(text)                              # what took so long is not lost with a full disk
    raise UserError(f"--output={output}: {error}") from error
  print(f"all numbers in {output}")


def _check_output(output: pathlib.Path) -> None:
  """UserError unless that file can be written, before minutes are spent on its content."""
  if not output.parent.is_dir():
    raise UserError(f"--output={output}: no such folder")
  if output.is_dir():
    raise UserError(f"--output={output}: is a folder; name a file")
  if not os.access(output.parent, os.W_OK):
    raise UserError(f"--output={output}: {output.parent} cannot be written")


def _with_flags(cfg: schema.Config) -> schema.Config:
  """The config with what the command line chooses."""
  given = lambda **flags: {name: flag.value for name, flag in flags.items()
                           if flag.value is not None}
  reward = cfg.reward
  if _REWARD.value:
    reward = schema.RewardConfig(tuple(_REWARD.value), (1.0,) * len(_REWARD.value))
  return dataclasses.replace(
      cfg, seed=_SEED.value, reward=reward,
      data=dataclasses.replace(cfg.data, eval_prompts=_PROMPTS.value),
      model=dataclasses.replace(cfg.model, **given(dtype=_DTYPE)),
      sample=dataclasses.replace(
          cfg.sample, **given(steps=_STEPS, guidance=_GUIDANCE, eta=_ETA)),
      eval=dataclasses.replace(cfg.eval, **given(judge=_JUDGE, batch=_BATCH)))


if __name__ == "__main__":
  sys.exit(run_command(main, _FLAGS, required=("checkpoint", "prompts", "output")))
