"""Command line: `python -m jaxalign.launch --config=configs/RECIPE.py[:ARG] [--config.KEY=VALUE]`.

Aligns a model as a recipe says; the same command again continues the run. `--config=jaxalign:NAME`
takes a shipped recipe from anywhere, `--config=help[:NAME]` explains every key.
"""
import pathlib
import sys

from ml_collections import config_flags

from jaxalign.config import explain, recipes
from jaxalign.config.command import Flags, exit_status, run_command
from jaxalign.config.registry import load_method, need
from jaxalign.errors import UserError

_FLAGS = Flags()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe: a file, or jaxalign:NAME for a shipped one; :ARG chooses a variant.",
    lock_config=True, flag_values=_FLAGS)
_WORKDIR = _FLAGS.define("string", "workdir", None, "Folder of the run; runs/RECIPE by default.")
_DRY_RUN = _FLAGS.define("bool", "dry_run", False,
                         "Print config, parameters, sharding and cost; run nothing.")
_PLAN = _FLAGS.define("string", "plan", None, "Compile for `v5e:4x4` or another TPU slice, or "
                      "estimate for a GPU of 80 GB, `gpu:80`; print what it needs, run nothing.")
_THOROUGH = _FLAGS.define("bool", "plan_thorough", False, "Compile a --plan as a run does, ten "
                          "times as long, in place of XLA's least effort.")


def main(argv) -> None:
  del argv
  _own_data(_CONFIG.value)
  if "task" in _CONFIG.value:
    return _pretrain(_CONFIG.value)
  cfg = recipes.parse(_CONFIG.value)
  from jaxalign import train  # takes seconds, which a wrong flag need not
  if _DRY_RUN.value:
    from jaxalign.devices import processes
    from jaxalign.train.dry_run import describe
    train.start_devices(cfg)           # as the run does: the mesh is to be its own
    processes.say(describe(cfg))
    return
  if _PLAN.value:
    from jaxalign.train.plan import plan
    print(plan(cfg, _PLAN.value, _THOROUGH.value))
    return
  train.run(cfg, _workdir(cfg))


def _own_data(config) -> None:
  """Whoever names prompts or pairs of their own, and none to be judged by, is judged by some of
  these: the recipe's are of another world."""
  given = dict(arg.removeprefix("--config.").split("=", 1) for arg in sys.argv
               if arg.startswith("--config.data.") and "=" in arg)
  own = {key for key in ("data.prompts", "data.pairs")
         if not given.get(key, "jaxalign:").startswith("jaxalign:")}
  if "task" in config or "data.eval_prompts" in given or not own:
    return
  if need(load_method(config.method.name).Config, "at_inference"):
    return                                             # reads neither
  if "data.prompts" not in given:
    config.data.prompts = ""
  config.data.eval_prompts = ""


def _pretrain(config) -> None:
  from jaxalign.pretrain import loop
  from jaxalign.pretrain.config import parse
  if _DRY_RUN.value:
    raise UserError("--dry_run: is for methods; a pretraining recipe has no policy to describe")
  if _PLAN.value:
    raise UserError("--plan: is for methods, not for pretraining recipes")
  cfg = parse(config)
  loop.run(cfg, _workdir(cfg))


def _workdir(cfg) -> pathlib.Path:
  return pathlib.Path(_WORKDIR.value or pathlib.Path("runs") / cfg.recipe.replace(":", "-"))


if __name__ == "__main__":
  asked = explain.wanted(sys.argv)
  if asked is not None:
    sys.exit(exit_status(lambda: print(explain.explain(asked))))
  sys.exit(run_command(main, _FLAGS, required=("config",)))
