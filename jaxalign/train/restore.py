"""From a run, finished or not, or any checkpoint directory to a pipeline with tuned weights."""
import dataclasses
import json
import pathlib

import jax
import numpy as np

from jaxalign import methods
from jaxalign.config import recipes, schema
from jaxalign.config.places import checkpoint_path
from jaxalign.convert import load_pipeline
from jaxalign.data.prompts import some_prompt
from jaxalign.devices import rng
from jaxalign.errors import UserError
from jaxalign.models.pipeline import Pipeline
from jaxalign.reports.reading import read_summary
from jaxalign.storage.checkpoint import Checkpointer
from jaxalign.train.experiment import build, gather
from jaxalign.train.opening import open_pipeline
from jaxalign.train.policy import adapters_of, policy_weights, starting_adapter


def run_config(checkpoint: pathlib.Path) -> schema.Config | None:
  """Config of the run in `checkpoint`, or None if that is no run's folder."""
  file = checkpoint / "config.json"
  if (checkpoint / "model_index.json").exists() or not file.exists():
    return None
  try:
    return recipes.parse(recipes.completed(json.loads(file.read_text())["config"]))
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise UserError(f"{file}: not the config of a run ({error})") from error


def load_tuned(checkpoint: pathlib.Path, dtype: str | None = None) -> Pipeline:
  """The pipeline of a diffusers directory or single file, of a run, or of its latest checkpoint.

  Args:
    dtype: what it computes in, "float32" or "bfloat16"; None for the run's, else "float32".
  Raises:
    UserError: the directory is none of these, or damaged.
  """
  cfg = run_config(checkpoint_path(checkpoint))
  if cfg is None:
    return load_pipeline(checkpoint, dtype=dtype or "float32")
  if cfg.at_inference:
    raise UserError(f"--checkpoint={checkpoint}: a run of {cfg.method_name} tunes no weights; its "
                    f"images and their noise are in {checkpoint / 'product'}")
  if dtype:
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dtype=dtype))
  if _summary(checkpoint):
    return load_pipeline(checkpoint / "export", dtype=cfg.model.dtype)
  exp, policy = _policy(checkpoint, cfg)
  return exp.pipeline.with_weights(policy_weights(cfg, policy, exp.pipeline.weights))


def load_adapters_of(checkpoint: pathlib.Path) -> tuple[dict, str]:
  """The LoRA factors of a run: network -> tree, and the name of the denoiser among them.

  Those that it has tuned, of its export or its latest checkpoint. And of each text encoder those
  that `model.lora` has for it, which the run's images owe as much to; empty where it has none.

  Raises:
    UserError: the directory is not that of a run with `model.adapter="lora"`, or damaged.
  """
  cfg = run_config(checkpoint) if checkpoint.is_dir() else None
  if cfg is None or cfg.at_inference or cfg.model.adapter != "lora":
    raise UserError(f"--checkpoint={checkpoint}: not the folder of a run that trains an adapter "
                    "(model.adapter=lora), so there is none to export")
  exp, policy = _policy(checkpoint, cfg)
  start = adapters_of(cfg, exp.pipeline) if cfg.model.lora else {}
  name = exp.pipeline.denoiser_name
  return {name: policy, **{other: start.get(other, {})
                           for other in exp.pipeline.text_encoders}}, name


def reference(cfg: schema.Config) -> Pipeline:
  """The base model of a run whose policy started from `model.lora`.

  As in the run it has the adapter's part of the text encoders, but not that of the denoiser.
  """
  opened = open_pipeline(cfg.model.path, cfg.model.dtype, unet=cfg.model.unet)
  return starting_adapter(cfg, opened)[0]


def check_comparable(base_path: str, base: Pipeline, checkpoint: pathlib.Path,
                      tuned: Pipeline) -> None:
  """UserError unless the two models differ in the weights of their denoisers only."""
  shapes = lambda tree: jax.tree.map(lambda a: a.shape, tree)
  if type(base) is not type(tuned) or shapes(base.weights) != shapes(tuned.weights):
    raise UserError(f"--base={base_path}: its {base.denoiser_name} has another architecture than "
                    f"{checkpoint}")
  for name in sorted({*base.networks, *tuned.networks} - {base.denoiser_name}):
    mine, theirs = (pipeline.params.get(name) for pipeline in (base, tuned))
    if shapes(mine) != shapes(theirs) or not all(
        jax.tree.leaves(jax.tree.map(np.array_equal, mine, theirs))):
      raise UserError(f"--base={base_path}: its {name} differs from that of {checkpoint}; the two "
                      "are compared with one, so evaluate each alone")


def _summary(checkpoint: pathlib.Path) -> dict | None:
  """The summary of a run; None if it has none, or has gone on for more steps since."""
  summary, folder = read_summary(checkpoint), checkpoint / "checkpoints"
  latest = Checkpointer(folder).latest_step() if folder.is_dir() else None
  return summary if summary and (latest or 0) <= summary["steps"] else None


def _policy(checkpoint: pathlib.Path, cfg: schema.Config):
  """`(Experiment, policy)` of a run's latest checkpoint, on the host."""
  if not (checkpoint / "checkpoints").is_dir():
    raise UserError(f"--checkpoint={checkpoint}: this run has no checkpoint yet")
  # On one device, whatever the run itself has.
  cfg = dataclasses.replace(cfg, mesh=schema.MeshConfig(1))
  exp = build(cfg, jax.devices()[:1])
  table = exp.prompt_table(some_prompt(cfg.data.prompts, cfg.data.eval_prompts)[:1])
  zeros = np.zeros(cfg.sample.batch, np.int32)
  method = methods.make(cfg.method_name, exp.models, cfg.method, cfg.optim)
  key = rng.stream(jax.random.key(cfg.seed), rng.INIT)
  like = {"method": jax.eval_shape(
      lambda frozen: method.init(key, frozen, gather(table, zeros, zeros)), exp.frozen)}
  if cfg.train.keep_best:
    like["best"] = method.product(like["method"])
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), like)
  saved, _ = Checkpointer(checkpoint / "checkpoints").restore(like)
  best, summary = cfg.train.keep_best, _summary(checkpoint)
  if best and summary:                                  # the last step may have been the best
    best = summary["exported_step"] != summary["steps"]
  policy = saved["best"] if best else method.product(saved["method"])
  return exp, jax.device_get(policy)
