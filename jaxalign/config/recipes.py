"""Recipes: ConfigDicts with every key, from typed defaults to validated dataclasses.

A recipe's `get_config(arg)` starts from `default(method)`, a locked ConfigDict with every key, and
sets what it wants otherwise; the command line overrides single keys; `parse` turns the result into
the dataclasses of `schema`. No other place has defaults.
"""
import dataclasses
import importlib.util
import json
import os
import pathlib
import typing

import ml_collections

from jaxalign.config import registry, source
from jaxalign.config.credentials import hidden
from jaxalign.config.nearest import suggestion
from jaxalign.config.schema import GROUPS, OLD_FINALS, Config
from jaxalign.errors import UserError


def default(method: str, recipe: str = "") -> ml_collections.ConfigDict:
  """Locked ConfigDict with all keys of a run of `method`, at their defaults."""
  as_dict = lambda cls: {f.name: f.default for f in dataclasses.fields(cls)}
  tree = {name: as_dict(cls) for name, cls in GROUPS.items()}
  tree["method"] = {"name": method, **as_dict(registry.load_method(method).Config)}
  config = ml_collections.ConfigDict({"recipe": recipe or method, "seed": 0, **tree})
  return config.lock()


def completed(values: dict) -> dict:
  """What an older version wrote as config.json, with defaults and names of keys that are new."""
  known = json.loads(default(values["method"]["name"]).to_json())
  values = {**values, **{name: {**group, **values.get(name, {})}
                         for name, group in known.items() if isinstance(group, dict)}}
  final, log = values["sample"]["final"], dict(values["log"])
  if "tensorboard" in log and not log.pop("tensorboard"):
    log["to"] = []
  return {**values, "log": log,
          "sample": {**values["sample"], "final": OLD_FINALS.get(final, final)}}


def split_argument(arg: str, sizes: tuple[str, ...], presets=()) -> tuple[str, list[str]]:
  """`"smoke,release"` -> `("smoke", ["release"])`; the first size is the default.

  Raises:
    UserError: a word that is neither a size nor a preset.
  """
  words = [word for word in (arg or "").split(",") if word]
  for word in words:
    if word not in sizes and word not in presets:
      known = ", ".join((*sizes, *presets))
      raise UserError(f"recipe argument {word!r} is unknown; there are {known}")
  chosen = [word for word in words if word in sizes]
  return (chosen or [sizes[0]])[-1], [word for word in words if word in presets]


EMBEDDED = ("emoji", "emoji_sd3")
WITH_SIGNS = (*EMBEDDED, "signs")
SMOKE = {"smoke": "jaxalign:fixture", "smoke_sd3": "jaxalign:fixture_sd3"}
# Latent elements of a picture, of which densities and clip ranges are means.
LATENTS = {**dict.fromkeys(WITH_SIGNS, 1024), **dict.fromkeys(SMOKE, 256), "sd15": 16384,
           "sd35": 65536}


def make_embedded(config: ml_collections.ConfigDict, size: str) -> None:
  """The embedded model of this name: `emoji`, a UNet, or a transformer of a flow.

  `signs` letters words, which networks read that others trained: one is the reward, one the judge.
  """
  config.model.path = f"jaxalign:{size}"
  if size != "emoji":
    config.sample.spacing = "linspace"      # the checkpoint's own grid ends in a clean image
  if size == "signs":
    config.data.prompts, config.data.eval_prompts = "jaxalign:signs_train", "jaxalign:signs_heldout"
    config.reward.names = ("ocr",)
    config.eval.judge, config.eval.features = "ocr_judge", "scene_judge"
    config.eval.prompts, config.eval.samples = 128, 2
    config.train.patience = 0               # the judge is reported, and stops nothing
    config.alarm.drift = 4.0                # sound runs: 1.4 at most; DRaFT, which smears, 6 to 14


def make_smoke(config: ml_collections.ConfigDict, size: str = "smoke") -> None:
  """Shrinks a recipe to seconds: random weights, rule reward, three updates, tiny evaluations."""
  config.model.path = SMOKE[size]
  if size == "smoke_sd3":
    config.sample.spacing = "linspace"      # the checkpoint's own grid ends in a clean image
  config.model.lora_rank = 4
  config.reward.names, config.reward.weights = ("brightness",), (1.0,)
  config.sample.batch, config.sample.steps = 8, 4
  config.train.steps, config.train.checkpoint_every = 3, 1
  config.eval.prompts, config.eval.samples, config.eval.batch = 4, 2, 8
  config.eval.watch_prompts, config.eval.watch_samples, config.eval.every = 2, 2, 2
  config.log.grid_prompts = 2


def make_sd35(config: ml_collections.ConfigDict) -> None:
  """Stable Diffusion 3.5 medium at 512 px, as yifan123/flow_grpo trains it.

  From that project's config/grpo.py: LoRA on attention of rank 32 (its alpha of 64 doubles the
  adapter; here alpha is the rank), ten steps of its SDE on the checkpoint's levels with noise 0.7,
  guidance 4.5, AdamW of 3e-4 with weight decay 1e-4 and a clipped norm of 1. Flow-Factory has the
  same but for noise 0.8. Dtype, remat and evaluation are ours.
  """
  config.model.path = ""                    # --config.model.path=DIR
  config.model.adapter, config.model.lora_rank = "lora", 32
  config.model.dtype, config.model.remat = "bfloat16", "block"
  config.sample.height = config.sample.width = 512
  config.sample.kind, config.sample.eta, config.sample.final = "flow_sde", 0.7, ""
  config.sample.steps, config.sample.guidance = 10, 4.5
  config.optim.lr, config.optim.b2, config.optim.weight_decay = 3e-4, 0.999, 1e-4
  config.optim.clip_norm, config.optim.warmup, config.optim.decay_steps = 1.0, 0, 0
  config.train.patience = 0                 # the judge knows emoji scenes only
  config.eval.batch = 16


def make_forward_process(config: ml_collections.ConfigDict, size: str) -> None:
  """Sizes of NFT, AWM and RAM: endpoints of a deterministic sampler without guidance.

  `sd35` is NFT's published size; `emoji` and `sd15` are ours.
  """
  config.sample.kind, config.sample.steps, config.sample.guidance = "dpm2", 10, 1.0
  if size in SMOKE:
    make_smoke(config, size)
    config.method.group, config.method.levels = 4, 2
    return
  config.sample.batch, config.method.minibatches = 64, 2
  config.train.steps, config.train.checkpoint_every, config.eval.every = 60, 15, 15
  config.optim.lr, config.optim.warmup = 3e-4, 4
  if size in WITH_SIGNS:
    make_embedded(config, size)
    if size == "signs":                       # many words a batch, of which few are right at first
      config.model.adapter = "full"
      config.sample.batch, config.sample.steps, config.method.levels = 256, 8, 2
      config.train.steps = 45
    return
  config.train.patience, config.eval.batch = 0, 16          # the judge knows emoji scenes only
  if size == "sd35":
    make_sd35(config)
    config.sample.kind, config.sample.guidance, config.sample.batch = "dpm2", 1.0, 1152
    config.method.group, config.method.minibatches, config.optim.accumulate = 24, 1, 6
  else:
    config.model.path = ""                    # --config.model.path=DIR
    config.model.remat, config.sample.steps = "block", 20
    config.optim.accumulate = 4


def make_at_inference(config: ml_collections.ConfigDict, size: str) -> None:
  """Sizes of what trains no weight (DNO, best-of-N, particles): images of few prompts."""
  config.train.patience = 0                     # the judge is reported, and stops nothing
  config.eval.every = 0
  if size in WITH_SIGNS:
    make_embedded(config, size)
    config.eval.prompts, config.eval.samples, config.eval.batch = 24, 2, 48
  elif size in SMOKE:
    make_smoke(config, size)
  else:
    config.model.path = ""                      # --config.model.path=DIR
    config.model.dtype = "bfloat16"
    config.data.eval_prompts = "jaxalign:animals_train"
    config.sample.batch, config.sample.steps, config.sample.guidance = 1, 50, 5.0
    if size == "sd35":
      make_sd35(config)
      config.sample.kind, config.sample.eta, config.sample.steps = "ddim", 1.0, 28
      config.sample.spacing, config.sample.final = "linspace", "noisy"
    config.eval.prompts, config.eval.samples, config.eval.batch = 45, 2, 2


def make_pick_a_pic(config: ml_collections.ConfigDict) -> None:
  """Full fine-tuning on Pick-a-Pic v2 at the published size: 2048 pairs, 2000 updates."""
  config.model.path = ""                    # --config.model.path=DIR
  config.model.adapter, config.model.dtype, config.model.remat = "full", "bfloat16", "block"
  config.data.pairs = ""                    # --config.data.pairs=DIR, its Parquet files
  config.sample.batch, config.optim.accumulate = 2048, 32
  config.sample.steps, config.sample.guidance = 50, 7.5
  config.optim.b2, config.optim.weight_decay = 0.999, 1e-2
  config.train.steps, config.train.checkpoint_every, config.eval.every = 2000, 500, 500
  config.train.patience = 0                 # the judge knows emoji scenes only
  config.eval.batch = 16


def parse(config: ml_collections.ConfigDict | dict) -> Config:
  """ConfigDict, or the content of config.json, -> checked dataclasses.

  Raises:
    UserError: an unknown or missing key, a wrong type, a value out of range; names the key.
  """
  tree = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
  for key in ("recipe", "seed", "method", *GROUPS):
    if key not in tree:
      raise UserError(f"config key {key} is missing")
  for key in tree:
    if key not in ("recipe", "seed", "method", *GROUPS):
      raise UserError(f"config key {key} is unknown")
  method = dict(tree["method"])
  name = method.pop("name", None)
  groups = {key: build_group(cls, key, tree[key]) for key, cls in GROUPS.items()}
  config = Config(recipe=tree["recipe"], method_name=name, seed=tree["seed"],
                  method=build_group(registry.load_method(name).Config, "method", method), **groups)
  # Not of every `Config`: `jaxalign.evaluate` optimises nothing, and may report any reward.
  judge, plain = config.eval.judge, lambda name: name.partition("#")[0]     # without its settings
  if plain(judge) in map(plain, config.reward.names) and not config.reads_pairs:
    raise UserError(f"reward.names has {hidden(judge)!r}, the judge (eval.judge), which must never "
                    "be optimised: name another judge")
  return config


def recipe_path(name: str) -> str:
  """`jaxalign:NAME[:ARG]` -> file of the shipped recipe, with `:ARG` kept; others unchanged."""
  if not name.startswith("jaxalign:"):
    return name
  recipe, _, arg = name.removeprefix("jaxalign:").partition(":")
  known = shipped_recipes()
  if recipe not in known:
    raise UserError(f"--config={name}: no recipe {recipe!r}{suggestion(recipe, known)}; there are "
                    f"{', '.join(known)}")
  return f"{known[recipe]}:{arg}" if arg else str(known[recipe])


def shipped_recipes() -> dict[str, pathlib.Path]:
  """Name -> file of the recipes that come with the package, in order of names."""
  spec = importlib.util.find_spec("jaxalign.configs")
  folders = [pathlib.Path(p) for p in (spec.submodule_search_locations if spec else ())]
  folders.append(pathlib.Path(__file__).resolve().parents[2] / "configs")
  found = {file.stem: file for folder in reversed(folders) if folder.is_dir()
           for file in folder.glob("[a-z]*.py")}
  return dict(sorted(found.items()))


def split_recipe(name: str) -> tuple[pathlib.Path, str]:
  """`FOLDER/FILE.py:ARG` -> file and argument, "" if none; a folder may be called `x.py` too."""
  file, found, arg = name.rpartition(".py:")
  return (pathlib.Path(f"{file}.py"), arg) if found else (pathlib.Path(name), "")


def load_recipe(name: str) -> ml_collections.ConfigDict:
  """The ConfigDict of a recipe: `FILE.py[:ARG]`, or `jaxalign:NAME[:ARG]` for a shipped one.

  Raises:
    UserError: there is no such recipe, or it fails to run; names its line.
  """
  file, arg = split_recipe(recipe_path(name))
  if file.suffix != ".py" or not file.is_file():
    raise UserError(f"recipe {name}: no such file (in {os.getcwd()})")
  try:
    config = source.run_file(file).get_config(*[arg] * bool(arg))
  except UserError:
    raise
  except KeyboardInterrupt:
    raise
  except BaseException as error:         # `sys.exit` in it is not to pass for a finished run
    raise UserError(f"recipe {file} failed{source.line_in(error, file)}: "
                    f"{source.one_line(error)}") from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(f"recipe {file}: get_config returned {type(config).__name__}, not a ConfigDict")
  return config


def changed(config: dict) -> dict[str, tuple] | None:
  """What a run's config has otherwise than the shipped recipe of its name.

  Args:
    config: as in config.json; keys that it has not are passed over.
  Returns:
    `group.key` (or `seed`) -> (the run's value, the recipe's), in order; None if no recipe of that
    name is shipped.
  """
  try:
    shipped = parse(load_recipe(f"jaxalign:{config['recipe']}")).to_dict()
  except UserError:
    return None                                                # of the user's own

  def flat(tree):
    for group, values in tree.items():
      yield from ({group: values} if not isinstance(values, dict) else {
          f"{group}.{key}": value for key, value in values.items()}).items()
  then = dict(flat(shipped))
  return {key: (value, then.get(key)) for key, value in flat(config) if value != then.get(key)}


def build_group(cls, group: str, values: dict):
  """`cls(**values)`, a config group from plain values; unknown and missing keys are UserErrors."""
  fields = typing.get_type_hints(cls)
  for key in values:
    if key not in fields:
      known = ", ".join(sorted(fields))
      keys = [f"{name}.{k}" for name, kind in {**GROUPS, group: cls}.items()
              for k in typing.get_type_hints(kind)]
      raise UserError(f"config key {group}.{key} is unknown{suggestion(f'{group}.{key}', keys)}; "
                      f"{group} has {known}")
  for key in fields:
    if key not in values:
      raise UserError(f"config key {group}.{key} is missing")
  return cls(**{key: _as_field(kind, values[key]) for key, kind in fields.items()})


def _as_field(kind, value):
  """JSON and command lines write lists for tuples and 1 for 1.0; `fields.check` does the rest."""
  if kind is float and type(value) is int:
    return float(value)
  if typing.get_origin(kind) is tuple and isinstance(value, (tuple, list)):
    return tuple(_as_field(typing.get_args(kind)[0], item) for item in value)
  return value
