"""Configs: typed defaults, recipes as ConfigDicts, validated frozen dataclasses.

A recipe's `get_config(arg)` starts from `default(method)`, a locked ConfigDict with every key, and
sets what it wants otherwise; the command line overrides single keys; `parse` turns the result into
dataclasses that check types, ranges and batch algebra. No other place has defaults.
"""
import dataclasses
import importlib.util
import json
import pathlib
import typing
from typing import Annotated, Any, Literal

import ml_collections

from jaxalign import methods
from jaxalign.errors import UserError
from jaxalign.fields import Count, NonNegative, Range, Whole, check
from jaxalign.methods.optimizer import OptimConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The pretrained model and what of it is trained.

  Attributes:
    path: diffusers directory or hub id; `jaxalign:emoji` is the embedded model, `jaxalign:fixture`
      a random-weight one for tests.
    unet: weights in place of those of `path`'s UNet, such as a one-step generator's for SDXL: a
      file (safetensors; a PyTorch pickle is read with `weights_only`) or a folder. Empty: its own.
    teacher: a second model of the same architecture, for methods that compare with one
      (Diff-Instruct*); empty is the model itself.
    adapter: "lora", or "full" for all weights of the UNet.
    lora_rank, lora_targets: width of the adapter, and which layers have one: "attention", "ff",
      "conv".
    lora: a LoRA file to start from, in diffusers' layout (PEFT's names or the older ones): a
      safetensors file, or a folder with `pytorch_lora_weights.safetensors`. Where adapter is "lora"
      it is the policy's start, of the same rank and targets, and the reference is the model without
      it; else, and for methods that train no weights, it is merged into the model. Empty is none.
    dtype: compute dtype, "float32" or "bfloat16". What is trained is float32 always; kernels of
      frozen networks lie in the dtype they compute in.
    remat: "none", or "block" to keep less activation memory in gradients.
  """
  path: str = "jaxalign:emoji"
  unet: str = ""
  teacher: str = ""
  adapter: Literal["lora", "full"] = "lora"
  lora_rank: Count = 16
  lora_targets: tuple[Literal["attention", "ff", "conv"], ...] = ("attention",)
  lora: str = ""
  dtype: Literal["float32", "bfloat16"] = "float32"
  remat: Literal["none", "block"] = "none"

  def __post_init__(self):
    check("model", self)
    if self.adapter == "lora" and not self.lora_targets:
      raise UserError("model.lora_targets is empty, so model.adapter='lora' would train nothing")


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """What is maximised: a weighted sum.

  Attributes:
    names: built-in names, `NAME:WHERE` for published weights (docs/rewards.md), or
      `path/to/file.py:function`, or the URL of a scorer behind HTTP.
    weights: one factor a name.
  """
  names: tuple[str, ...] = ("emoji_clip",)
  weights: tuple[float, ...] = (1.0,)

  def __post_init__(self):
    check("reward", self)
    if not self.names:
      raise UserError("reward.names is empty")
    if len(self.names) != len(self.weights):
      raise UserError(f"reward.weights has {len(self.weights)} values for {len(self.names)} names")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Prompts, one a line: text files, or `jaxalign:NAME` for a file shipped with the package.

  Attributes:
    prompts: drawn uniformly in training.
    eval_prompts: held out; base and tuned model are compared on these.
    pairs: what preference methods train on instead of `prompts`, see `jaxalign.data.pairs`: a
      Parquet file or a folder of them, a JSONL file, a folder with winner/ and loser/,
      `jaxalign:emoji`, or `jaxalign:fixture` for tests. Empty for other methods.
    ties: "drop" pairs without a preference, or "soft": train on them with a target of one half.
    cache: a folder where encoded pairs and captions stay for other runs, found again by the content
      of images, captions and encoders. Empty: each run encodes for itself, in its own folder.
  """
  prompts: str = "jaxalign:emoji_train"
  eval_prompts: str = "jaxalign:emoji_heldout"
  pairs: str = ""
  ties: Literal["drop", "soft"] = "drop"
  cache: str = ""

  def __post_init__(self):
    check("data", self)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """The sampler, in training and in evaluation.

  Attributes:
    batch: trajectories per update, over all devices; pairs, for preference methods.
    steps: denoising steps T. guidance: classifier-free guidance scale, 1 is off.
    kind: "ddim", "ddpm", or "one_step" for one-step generators (steps 1, guidance 1). eta: ddim's
      noise in [0, 1]. variance: ddpm's, "small" or "large". timestep: where a one-step generator is
      told that its noise lies, 1 to 999; 0 takes the checkpoint's.
    spacing: "leading", "trailing", "linspace", or empty for the checkpoint's.
    final: "alpha0" (stochastic last step), "one", or empty for the checkpoint's.
    height, width: of the images in pixels; 0 for the size the checkpoint was made for.
  """
  batch: Count = 16
  steps: Count = 20
  guidance: NonNegative = 3.0
  kind: Literal["ddim", "ddpm", "one_step"] = "ddim"
  timestep: Whole = 0
  eta: NonNegative = 1.0
  variance: Literal["small", "large"] = "small"
  spacing: Literal["", "leading", "trailing", "linspace"] = ""
  final: Literal["", "alpha0", "one"] = "alpha0"
  height: Whole = 0
  width: Whole = 0

  def __post_init__(self):
    check("sample", self)
    if self.kind == "one_step" and (self.steps != 1 or self.guidance != 1.0):
      raise UserError(f"sample.kind='one_step' has sample.steps=1 and sample.guidance=1.0, not "
                      f"{self.steps} and {self.guidance}")
    if self.timestep and self.kind != "one_step":
      raise UserError(f"sample.timestep={self.timestep} is for sample.kind='one_step'")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Length of the run and what is kept of it.

  Attributes:
    steps: updates in all. max_seconds: training stops after this much training time; 0 is no limit.
    checkpoint_every: updates between checkpoints. keep: how many of them are retained.
    keep_best: export the checkpoint with the best judge score on watched prompts, not the last one.
    patience: stop after this many evaluations in a row whose judge score is `tolerance` standard
      errors below the base model's; 0 is never.
    tolerance: see patience.
  """
  steps: Count = 48
  max_seconds: NonNegative = 0.0
  checkpoint_every: Count = 12
  keep: Count = 2
  keep_best: bool = False
  patience: Whole = 2
  tolerance: NonNegative = 2.0

  def __post_init__(self):
    check("train", self)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices per mesh axis; `data=-1` takes all that the others leave."""
  data: Annotated[int, Range(-1)] = -1
  fsdp: Count = 1
  tensor: Count = 1

  def __post_init__(self):
    check("mesh", self)
    if self.data == 0:
      raise UserError("mesh.data=0 is below 1, and not -1")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Evaluation, always on the same prompts and noise.

  Attributes:
    prompts, samples: the first so many held-out prompts, and samples of each (0 prompts: all).
    every: updates between the short evaluations that watch the run; 0 is never.
    watch_prompts, watch_samples: size of those; on training prompts, so that what they select stays
      apart from what is reported.
    batch: samples per device program.
    judge: held-out scorer, never optimised; its features measure diversity.
    path_kl: whether the tuned model's path KL to the base is measured (as many denoiser calls
      again).
  """
  prompts: Whole = 32
  samples: Annotated[int, Range(2)] = 8
  every: Whole = 12
  watch_prompts: Count = 16
  watch_samples: Annotated[int, Range(2)] = 4
  batch: Count = 64
  judge: str = "emoji_judge"
  path_kl: bool = True

  def __post_init__(self):
    check("eval", self)


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """What is written beside metrics.jsonl.

  Attributes:
    tensorboard: also write event files. grid_prompts: rows of the sample pictures.
  """
  tensorboard: bool = True
  grid_prompts: Count = 8

  def __post_init__(self):
    check("log", self)


@dataclasses.dataclass(frozen=True)
class Config:
  """A run, resolved and checked. `method` is the `Config` of the method's module."""
  recipe: str
  method_name: str
  seed: int
  model: ModelConfig
  method: Any
  reward: RewardConfig
  data: DataConfig
  sample: SampleConfig
  train: TrainConfig
  optim: OptimConfig
  mesh: MeshConfig
  eval: EvalConfig
  log: LogConfig

  def __post_init__(self):
    check_seed(self.seed)
    if self.data.pairs and not self.reads_pairs:
      raise UserError(f"data.pairs={self.data.pairs}: method.name={self.method_name!r} trains on "
                      "prompts and would not read it")
    if self.data.cache and not self.reads_pairs:
      raise UserError(f"data.cache={self.data.cache}: method.name={self.method_name!r} reads no "
                      "pairs, which are all that is kept there")
    if self.train.keep_best and self.method_name in methods.AT_INFERENCE:
      raise UserError(f"train.keep_best=True chooses among policies, and method.name="
                      f"{self.method_name!r} trains none")
    if self.sample.batch % self.group:
      raise UserError(f"sample.batch={self.sample.batch} does not divide into groups of "
                      f"method.group={self.group}")
    if self.sample.batch // self.group % self.parts:
      what = f"sample.batch={self.sample.batch}"
      if self.group > 1:
        what += f" in groups of method.group={self.group}"
      raise UserError(f"{what} does not divide into method.minibatches x optim.accumulate = "
                      f"{self.parts} parts")

  @property
  def parts(self) -> int:
    """Micro-batches that `sample.batch` is cut into."""
    return getattr(self.method, "minibatches", 1) * self.optim.accumulate

  @property
  def group(self) -> int:
    """Trajectories of each prompt in a batch, side by side; they stay in one micro-batch."""
    return getattr(self.method, "group", 1)

  @property
  def trains_all(self) -> bool:
    """Whether all weights of the UNet are trained."""
    return self.model.adapter == "full" and self.method_name not in methods.AT_INFERENCE

  @property
  def merges_lora(self) -> bool:
    """Whether `model.lora` becomes part of the base model, for want of an adapter that trains."""
    return bool(self.model.lora) and (self.model.adapter != "lora"
                                      or self.method_name in methods.AT_INFERENCE)

  @property
  def reads_pairs(self) -> bool:
    """Whether the method trains on preference pairs: nothing is sampled and scored in training."""
    return getattr(self.method, "reads_pairs", False)

  def check_devices(self, shards: int) -> None:
    """Raises UserError unless every batch divides over `shards` shards of the batch axis."""
    for key, size in (("sample.batch", self.sample.batch), ("eval.batch", self.eval.batch)):
      if size % shards:
        raise UserError(f"{key}={size} does not divide over {shards} devices "
                        "(mesh.data x mesh.fsdp)")
    part = self.sample.batch // self.group // self.parts
    if part % shards:
      left = "trajectories" if self.group == 1 else f"groups of method.group={self.group}"
      raise UserError(f"sample.batch={self.sample.batch} in {self.parts} parts (method.minibatches "
                      f"x optim.accumulate) leaves {part} {left} for {shards} devices")

  def to_dict(self) -> dict:
    """Nested plain values, as written to config.json."""
    out = dataclasses.asdict(self)
    out["method"] = {"name": out.pop("method_name"), **out["method"]}
    return json.loads(json.dumps(out))


GROUPS = {f.name: f.type for f in dataclasses.fields(Config) if f.name not in (
    "recipe", "method_name", "seed", "method")}


def default(method: str, recipe: str = "") -> ml_collections.ConfigDict:
  """Locked ConfigDict with all keys of a run of `method`, at their defaults."""
  as_dict = lambda cls: {f.name: f.default for f in dataclasses.fields(cls)}
  tree = {name: as_dict(cls) for name, cls in GROUPS.items()}
  tree["method"] = {"name": method, **as_dict(methods.load(method).Config)}
  config = ml_collections.ConfigDict({"recipe": recipe or method, "seed": 0, **tree})
  return config.lock()


def completed(values: dict) -> dict:
  """What an older version wrote as config.json, with the defaults of keys that it did not know."""
  known = json.loads(default(values["method"]["name"]).to_json())
  return {**values, **{name: {**group, **values.get(name, {})}
                       for name, group in known.items() if isinstance(group, dict)}}


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


def make_smoke(config: ml_collections.ConfigDict) -> None:
  """Shrinks a recipe to seconds: random weights, rule reward, three updates, tiny evaluations."""
  config.model.path = "jaxalign:fixture"
  config.model.lora_rank = 4
  config.reward.names, config.reward.weights = ("brightness",), (1.0,)
  config.sample.batch, config.sample.steps = 8, 4
  config.train.steps, config.train.checkpoint_every = 3, 1
  config.eval.prompts, config.eval.samples, config.eval.batch = 4, 2, 8
  config.eval.watch_prompts, config.eval.watch_samples, config.eval.every = 2, 2, 2
  config.log.grid_prompts = 2


# Pairs at a growing distance from the model -> the reward that tells how much of them was learned.
MISMATCH = {"r0": "emoji_clip", "r1": "emoji_clip", "r2": "emoji_clip", "r3": "grayness"}
PAIR_SIZES = ("emoji", *MISMATCH, "smoke", "sd15", "sdxl")   # arguments of preference recipes


def make_emoji_pairs(config: ml_collections.ConfigDict, size: str = "emoji") -> None:
  """A preference recipe on the embedded model, and what is measured of it.

  `emoji` has the shipped pairs, two vendors' drawings; `r0` to `r3` those that
  `python -m jaxalign.pretrain.mismatch` writes.
  """
  shipped = size == "emoji"
  config.data.pairs = "jaxalign:emoji" if shipped else f"runs/pairs/{size}.parquet"
  config.reward.names = ("emoji_twemoji" if shipped else MISMATCH[size],)
  config.sample.batch = 32
  config.train.steps, config.train.checkpoint_every, config.eval.every = 240, 60, 60
  config.train.patience = 0                 # the judge's own taste is not what pairs teach
  config.optim.lr, config.optim.warmup, config.optim.decay_steps = 5e-4, 10, 230


def make_pick_a_pic(config: ml_collections.ConfigDict) -> None:
  """Full fine-tuning on Pick-a-Pic v2 at the published size: 2048 pairs, 2000 updates."""
  config.model.path = ""                    # --config.model.path=DIR
  config.model.adapter, config.model.dtype, config.model.remat = "full", "bfloat16", "block"
  config.data.pairs = ""                    # --config.data.pairs=DIR, its Parquet files
  config.sample.batch, config.optim.accumulate = 2048, 32
  config.sample.steps, config.sample.guidance = 50, 7.5
  config.optim.b2, config.optim.weight_decay = 0.999, 1e-2
  config.train.steps, config.train.checkpoint_every, config.eval.every = 2000, 500, 500
  config.train.patience = 0                 # the judge knows emoji only
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
                  method=build_group(methods.load(name).Config, "method", method), **groups)
  # Not of every `Config`: `jaxalign.evaluate` optimises nothing, and may report any reward.
  judge = config.eval.judge
  if judge in config.reward.names and not config.reads_pairs:
    raise UserError(f"reward.names has {judge!r}, the judge (eval.judge), which must never be "
                    "optimised: name another judge")
  return config


def recipe_path(name: str) -> str:
  """`jaxalign:NAME[:ARG]` -> file of the shipped recipe, with `:ARG` kept; others unchanged."""
  if not name.startswith("jaxalign:"):
    return name
  recipe, _, arg = name.removeprefix("jaxalign:").partition(":")
  spec = importlib.util.find_spec("jaxalign.configs")
  folders = [pathlib.Path(p) for p in (spec.submodule_search_locations if spec else ())]
  folders.append(pathlib.Path(__file__).resolve().parent.parent / "configs")
  for folder in folders:
    path = folder / f"{recipe}.py"
    if path.is_file():
      return f"{path}:{arg}" if arg else str(path)
  known = sorted({p.stem for f in folders if f.is_dir() for p in f.glob("[a-z]*.py")})
  raise UserError(f"--config={name}: no recipe {recipe!r}; there are {', '.join(known)}")


def check_seed(seed) -> None:
  """Raises UserError unless the config key `seed` is an int in [0, 2**32)."""
  if type(seed) is not int:
    raise UserError(f"config key seed={seed!r} is of type {type(seed).__name__}, not int")
  if not 0 <= seed < 2 ** 32:                  # JAX takes 32 bits and drops the others unsaid
    raise UserError(f"seed={seed} is outside [0, 2**32)")


def load_recipe(name: str) -> ml_collections.ConfigDict:
  """The ConfigDict of a recipe: `FILE.py[:ARG]`, or `jaxalign:NAME[:ARG]` for a shipped one.

  Raises:
    UserError: there is no such recipe.
  """
  file, _, arg = recipe_path(name).partition(".py:")
  file = pathlib.Path(file if file.endswith(".py") else f"{file}.py")
  if not file.is_file():
    raise UserError(f"recipe {name}: no such file")
  spec = importlib.util.spec_from_file_location(file.stem, file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*[arg] * bool(arg))


def build_group(cls, group: str, values: dict):
  """`cls(**values)`, a config group from plain values; unknown and missing keys are UserErrors."""
  fields = typing.get_type_hints(cls)
  for key in values:
    if key not in fields:
      known = ", ".join(sorted(fields))
      raise UserError(f"config key {group}.{key} is unknown; {group} has {known}")
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
