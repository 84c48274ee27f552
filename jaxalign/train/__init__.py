"""Runs: the loop of the methods that train, and that of those that work at inference."""
import pathlib

import jax

from jaxalign.config.recipes import load_recipe, parse
from jaxalign.config.schema import Config
from jaxalign.devices import callbacks, processes, sharding
from jaxalign.errors import UserError


def start_devices(cfg: Config, devices=None) -> None:
  """Joins the other processes of a run, and makes its devices where that is to be done.

  To be called before anything runs on a device.

  Args:
    devices: those of the run, if somebody else has chosen them.
  Raises:
    UserError: see `processes.start`.
  """
  callbacks.forget()
  if any(".py:" in name for name in cfg.reward.names + (cfg.eval.judge,)):
    callbacks.be_patient()                       # it may be PyTorch
  processes.start()
  if (devices is None and not processes.several() and cfg.mesh.data == -1
      and cfg.mesh.fsdp == cfg.mesh.tensor == 1):
    sharding.use_cores(cfg.check_devices)


def run(cfg: Config, path, devices=None, on_step=None, on_look=None) -> dict:
  """Runs, or continues, `cfg` in the folder `path`; returns the summary.

  Args:
    on_step: `(step, values)`, called with what each row of metrics.jsonl gets, in process 0.
    on_look: `(step, samples, prompts)`, called with the pictures of each look (`Samples`).

  Raises:
    UserError: the config, a file, a reward or the disk is at fault; checkpoints written before
      stay.
  """
  # Both import from this package.
  from jaxalign.train import inference, loop
  start_devices(cfg, devices)
  jax.config.update("jax_threefry_partitionable", True)
  module = inference if cfg.at_inference else loop
  if cfg.eval.judge == "scene_judge" and not cfg.model.path.startswith("jaxalign:"):
    processes.say("eval.judge='scene_judge' knows emoji scenes only; for other pictures name one "
                  "that knows them, such as --config.eval.judge=clip_score:DIR (docs/rewards.md)")
  try:
    summary = module.run(cfg, pathlib.Path(path), devices, on_step, on_look)
    # Process 0 alone writes results; a scheduler may end the run when any of the others exits.
    processes.barrier("results written")
    return summary
  except OSError as error:               # a full disk, a folder that went away
    raise UserError(f"{error}; what --workdir={path} holds is sound, and the same command goes on "
                    "from its last checkpoint") from error


def run_recipe(name: str, path, seed: int = 0, **overrides) -> dict:
  """Runs a recipe, or reads the summary of its finished run in the folder `path`.

  Args:
    name: as `recipes.load_recipe` takes it.
    overrides: `group__key=value`, as `--config.group.key=value` of the command.
  """
  config = load_recipe(name)
  config.seed = seed
  for key, value in overrides.items():
    group, _, key = key.partition("__")
    config[group][key] = value
  return run(parse(config), path)
