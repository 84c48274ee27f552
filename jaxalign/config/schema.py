"""What a run's config holds: one frozen dataclass a group, which checks types, ranges and choices.

`Config` checks what no single group can: batch algebra, and what the method needs.
"""
import dataclasses
import json
from typing import Annotated, Any, Literal

from jaxalign.config import registry
from jaxalign.config.credentials import hidden
from jaxalign.config.fields import (
  MOST,
  Count,
  Fraction,
  NonNegative,
  Pixels,
  Range,
  Whole,
  check,
)
from jaxalign.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The pretrained model and what of it is trained.

  Attributes:
    path: diffusers directory or hub id; `jaxalign:emoji` is the embedded model, `jaxalign:fixture`
      a random-weight one for tests.
    unet: weights in place of those of `path`'s denoiser, such as a one-step generator's for SDXL: a
      file (safetensors; a PyTorch pickle is read with `weights_only`) or a folder. Empty: its own.
    teacher: a second model of the same architecture, for methods that compare with one
      (Diff-Instruct*); empty is the model itself.
    adapter: "lora", or "full" for all weights of the denoiser.
    lora_rank, lora_targets: width of the adapter, and which layers have one: "attention", "ff",
      and in UNets "conv".
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
      `path/to/file.py:function`, the URL of a scorer behind HTTP, or `vlm:URL` of a judge.
    weights: one factor a name.
    normalise: what the weights are factors of: scores as they are ("none"), over their standard
      deviation within a prompt on the base model ("std"), or places among the samples of a prompt
      in the batch, -1 to 1 ("rank"; of the batch where it has one of each).
  """
  names: tuple[str, ...] = ("scene_clip",)
  weights: tuple[float, ...] = (1.0,)
  normalise: Literal["none", "std", "rank"] = "none"

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
    prompts: drawn uniformly in training; empty, with pairs, for their captions.
    eval_prompts: held out; base and tuned model are compared on these. Empty: a tenth of `prompts`,
      which training then leaves out.
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


OLD_FINALS = {"alpha0": "noisy", "one": "clean"}


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """The sampler, in training and in evaluation.

  Attributes:
    batch: trajectories per update, over all devices; pairs, for preference methods.
    steps: denoising steps T. guidance: classifier-free guidance scale; up to 1 is off.
    kind: "ddim", "dpm2" (deterministic, second order), "ddpm" (variance-preserving models);
      "flow_sde", "dance_sde", "cps" (flow-matching models); or "one_step" for one-step generators
      (steps 1, guidance 1). eta: noise of ddim and cps in [0, 1], of the SDEs >= 0. variance:
      ddpm's, "small" or "large". timestep: where a one-step generator is told that its noise lies,
      1 to 999 (1000 on a flow); 0 takes the checkpoint's.
    spacing: "leading", "trailing", "linspace", on a flow "linspace", "shifted_twice"; or empty for
      the checkpoint's. shift: of a flow's levels; 0 takes the checkpoint's.
    final: "noisy" (stochastic last step, to the smallest level of noise), "clean", "ode" (clean,
      and no noise in the last step), or empty for the checkpoint's. "alpha0" and "one" are older
      names of the first two.
    height, width: of the images in pixels; 0 for the size the checkpoint was made for.
  """
  batch: Count = 16
  steps: Count = 20
  guidance: NonNegative = 3.0
  kind: Literal["ddim", "ddpm", "one_step", "flow_sde", "dance_sde", "cps", "dpm2"] = "ddim"
  timestep: Whole = 0
  eta: NonNegative = 1.0
  variance: Literal["small", "large"] = "small"
  spacing: Literal["", "leading", "trailing", "linspace", "shifted_twice"] = ""
  shift: NonNegative = 0.0
  final: Literal["", "noisy", "clean", "ode"] = "noisy"
  height: Pixels = 0
  width: Pixels = 0

  def __post_init__(self):
    object.__setattr__(self, "final", OLD_FINALS.get(self.final, self.final))
    check("sample", self)
    if self.kind == "one_step" and (self.steps != 1 or self.guidance != 1.0):
      raise UserError(f"sample.kind='one_step' has sample.steps=1 and sample.guidance=1.0, not "
                      f"{self.steps} and {self.guidance}")
    if self.timestep and self.kind != "one_step":
      raise UserError(f"sample.timestep={self.timestep} is for sample.kind='one_step'")

  @property
  def transitions(self) -> dict:
    """What `sampling.make_sampler` makes the transitions of, beside the schedule."""
    return {name: getattr(self, name) for name in (
        "steps", "kind", "eta", "spacing", "final", "variance", "timestep", "shift")}


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
    alarm: what to do when a look shows signs that the run cheats its reward, see the group `alarm`:
      "warn", "stop", "rollback" to the last look without, at a lower strength; "off" is not to look
      for any.
  """
  steps: Count = 48
  max_seconds: NonNegative = 0.0
  checkpoint_every: Count = 12
  keep: Count = 2
  keep_best: bool = False
  patience: Whole = 2
  tolerance: NonNegative = 2.0
  alarm: Literal["off", "warn", "stop", "rollback"] = "warn"

  def __post_init__(self):
    check("train", self)


@dataclasses.dataclass(frozen=True)
class AlarmConfig:
  """When a look counts as a sign that the run cheats its reward (docs/alarm.md).

  Attributes:
    errors: standard errors, clustered by prompt, from which on a change counts.
    diversity: share of the base's diversity below which a run is said to collapse; 0 is off.
    saturation: growth of the share of saturated values in pictures; 0 is off.
    roughness: factor on the finest-grain share of the pictures' variance; 0 is off.
    drift: how far features of pictures may move, in what the base's own noise moves them; 0 is off.
    path_kl: nats per image; 0 is off, else each look makes as many denoiser calls again.
    weights: how far weights may move from where they started, in norms of the base's; 0 is off.
    rollbacks: how often `train.alarm="rollback"` goes back before the run ends.
    weaker: factor on the method's strength (on optim.lr, where it has none) at each of these.
  """
  errors: NonNegative = 3.0
  diversity: Fraction = 0.6
  saturation: Fraction = 0.1
  roughness: NonNegative = 1.5
  drift: NonNegative = 0.0
  path_kl: NonNegative = 0.0
  weights: NonNegative = 0.25
  rollbacks: Whole = 2
  weaker: Fraction = 0.5

  def __post_init__(self):
    check("alarm", self)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """Keys of the `optim` group.

  Attributes:
    lr: AdamW learning rate of the policy, reached after `warmup` optimiser steps.
    warmup: optimiser steps over which the rate grows linearly to `lr`; 0 begins with it.
    decay_steps: cosine decay of the rate to 0 over this many optimiser steps after the warm-up; 0
      is off and keeps the rate. A method may take several optimiser steps per update.
    b1, b2: moment decays. eps: added to the root of the second moment; one that is large beside the
      gradients makes AdamW plain momentum with rate `lr / eps`. weight_decay: decoupled.
    clip_norm: of the global gradient norm; 0 is off.
    accumulate: micro-batches per update; their gradients are averaged in f32.
    ema: decay of the policy's moving average in (0, 1), warmed up; 0 is off and exports raw
      weights.
  """
  lr: NonNegative = 3e-4
  b1: Fraction = 0.9
  b2: Fraction = 0.99
  eps: NonNegative = 1e-8
  weight_decay: NonNegative = 0.0
  clip_norm: NonNegative = 1.0
  warmup: Whole = 0
  decay_steps: Whole = 0
  accumulate: Count = 1
  ema: Fraction = 0.0

  def __post_init__(self):
    check("optim", self)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices per mesh axis.

  Attributes:
    data: over which batches are split; -1 takes all that the others leave.
    fsdp: over which parameters are split too. tensor: over which heads and channels are.
  """
  data: Annotated[int, Range(-1, MOST)] = -1
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
    judge: held-out scorer, never optimised.
    features: scorer whose features measure diversity; empty: the judge, if it has any.
    path_kl: whether the tuned model's path KL to the base is measured (as many denoiser calls
      again).
  """
  prompts: Whole = 32
  samples: Annotated[int, Range(2, MOST)] = 8
  every: Whole = 12
  watch_prompts: Count = 16
  watch_samples: Annotated[int, Range(2, MOST)] = 4
  batch: Count = 64
  judge: str = "scene_judge"
  features: str = ""
  path_kl: bool = True

  def __post_init__(self):
    check("eval", self)


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """What is written beside metrics.jsonl.

  Attributes:
    to: who else gets the numbers: "tensorboard", and what is installed of "wandb", "mlflow" and
      "trackio" (docs/metrics.md).
    grid_prompts: rows of the sample pictures.
  """
  to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ("tensorboard",)
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
  alarm: AlarmConfig
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
    if self.train.keep_best and self.at_inference:
      raise UserError(f"train.keep_best=True chooses among policies, and method.name="
                      f"{self.method_name!r} trains none")
    if self.reward.normalise == "rank" and (self.reads_pairs or self.at_inference
                                            or registry.need(self.method, "reward_gradients")):
      raise UserError("reward.normalise='rank' is for methods that are given scores of a batch, "
                      f"not for method.name={self.method_name!r}; set 'std'")
    if self.train.alarm == "rollback" and self.at_inference:
      raise UserError("train.alarm='rollback' goes back to an earlier policy, and method.name="
                      f"{self.method_name!r} trains none: 'stop' ends the run")
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
    return registry.need(self.method, "minibatches") * self.optim.accumulate

  @property
  def group(self) -> int:
    """Trajectories of each prompt in a batch, side by side; they stay in one micro-batch."""
    return registry.need(self.method, "group")

  @property
  def at_inference(self) -> bool:
    """Whether the method trains no weights, and each image's noise is its product."""
    return registry.need(self.method, "at_inference")

  @property
  def trains_all(self) -> bool:
    """Whether all weights of the denoiser are trained."""
    return self.model.adapter == "full" and not self.at_inference

  @property
  def merges_lora(self) -> bool:
    """Whether `model.lora` becomes part of the base model, for want of an adapter that trains."""
    return bool(self.model.lora) and (self.model.adapter != "lora" or self.at_inference)

  @property
  def reads_pairs(self) -> bool:
    """Whether the method trains on preference pairs: nothing is sampled and scored in training."""
    return registry.need(self.method, "reads_pairs")

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
    """Nested plain values, as written to config.json; without credentials."""
    out = dataclasses.asdict(self)
    out["method"] = {"name": out.pop("method_name"), **out["method"]}
    out["reward"]["names"] = hidden(self.reward.names)
    out["eval"]["judge"] = hidden(self.eval.judge)
    return json.loads(json.dumps(out))


SEEDS = 2 ** 32          # JAX takes 32 bits and drops the others unsaid
GROUPS = {f.name: f.type for f in dataclasses.fields(Config) if f.name not in (
    "recipe", "method_name", "seed", "method")}


def check_seed(seed) -> None:
  """Raises UserError unless the config key `seed` is an int in [0, 2**32)."""
  if type(seed) is not int:
    raise UserError(f"config key seed={seed!r} is of type {type(seed).__name__}, not int")
  if not 0 <= seed < SEEDS:
    raise UserError(f"seed={seed} is outside [0, 2**32)")
