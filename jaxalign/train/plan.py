"""`--plan=TOPOLOGY`: what a run would need on a TPU slice or a GPU that is not there.

Every program of the recipe is compiled for the slice by libtpu, from shapes alone: XLA's own buffer
assignment says what a chip holds, its cost analysis what it computes. For a GPU, of which no
compiler can be had without one, the same program is compiled for one chip of a v5p, whose attention
needs no matrix of scores either; its buffers are an estimate of the GPU's.
"""
import dataclasses
import math
import os
import re
import time

import jax
import numpy as np

from jaxalign import methods
from jaxalign.config.schema import Config
from jaxalign.data.prompts import read_prompts
from jaxalign.devices import processes, sharding
from jaxalign.devices.chips import CHIPS, GIB, Chip
from jaxalign.errors import UserError
from jaxalign.train.experiment import Experiment, build
from jaxalign.train.opening import open_pipeline
from jaxalign.train.pairs import PairTable
from jaxalign.train.programs import Programs, operations

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8}


@dataclasses.dataclass(frozen=True)
class Need:
  """What one program needs, per chip.

  Attributes:
    arguments, outputs, temporary, code: bytes; `outputs` without those that reuse an argument.
      Where the compiler refused, it said how much temporary memory it wanted, and nothing else.
    flops, traffic, collective: operations of matrix products and convolutions, bytes to and from
      memory, bytes between chips.
    seconds: that compiling took.
  """
  arguments: int
  outputs: int
  temporary: int
  code: int
  flops: float
  traffic: float
  collective: float
  seconds: float

  @property
  def bytes(self) -> int:
    return self.arguments + self.outputs + self.temporary + self.code

  def roofline(self, chip: Chip) -> float:
    """Seconds that the slowest of arithmetic, memory and links takes.

    Arithmetic is exact; memory traffic is scaled from XLA's figure, and that of another compile of
    the same program may be smaller.
    """
    return float(np.max([self.flops / chip.flops, self.traffic / chip.bandwidth,
                         self.collective / chip.links]))           # nan if one is unknown


def plan(cfg: Config, target: str, thorough: bool = False) -> str:
  """The plan as text.

  Args:
    target: `v4`, `v5e`, `v5p` or `v6e` with a topology, as `v5e:4x4`; or `gpu:80`, a GPU of 80 GB.
    thorough: compile for a TPU as a run there does, minutes for each pass through a UNet of Stable
      Diffusion. Else XLA is asked for its least effort, which takes a tenth of that and tends to
      assign more temporary memory (docs/scale.md).
  Raises:
    UserError: the target is unknown or libtpu missing; or a key or file of the config is at fault.
  """
  chip, devices = find_chips(target)
  if cfg.at_inference:
    raise UserError(f"--plan: method.name={cfg.method_name!r} trains no weights; only training is "
                    "planned")
  exp, state, needs = compiled(cfg, devices, target, thorough)
  lines = [describe(cfg, target, chip, exp, state, needs, thorough), "",
           *advice(cfg, chip, exp, needs)]
  for _ in range(2):        # memory is not quite proportional to samples: the second try knows how
    smaller = with_micro_batches(cfg, chip, exp, needs)
    if smaller is None:
      break
    _, _, again = compiled(smaller, devices, target, thorough, ("update",))
    cfg, needs = smaller, {**needs, **again}
    fits = again["update"].bytes <= chip.memory
    lines.append(
        f"--config.optim.accumulate={cfg.optim.accumulate}: update needs "
        f"{again['update'].bytes / GIB:.2f} GiB with micro-batches of "
        f"{cfg.sample.batch // cfg.parts} samples and {'fits' if fits else 'does not fit'} "
        f"(compiled in {again['update'].seconds:.0f} s).")
    if fits:
      break
  return "\n".join(lines)


def compiled(cfg: Config, devices, target: str, thorough: bool, only=()):
  """The run's `Experiment`, shapes of its state and the `Need` of each program, or of `only`."""
  exp = build(cfg, devices, open_pipeline(cfg.model.path, cfg.model.dtype, cfg.model.remat,
                                          shapes_only=True))
  method = methods.make(cfg.method_name, exp.models, cfg.method, cfg.optim)
  prompts = [] if cfg.reads_pairs else read_prompts("data.prompts", cfg.data.prompts)
  programs = outlined(exp, method, prompts)
  state = programs.state_shapes()
  needs = {}
  with processes.progress(total=2, desc="tracing", unit="program", leave=False) as bar:
    traced = programs.traced(state)
    for name in only or list(traced):
      bar.set_description(f"compiling {name} for {target}")
      bar.refresh()
      needs[name] = measure(traced.pop(name), exp.mesh.size, thorough, held((exp.frozen, state)))
      bar.update()
  return exp, state, needs


def find_chips(target: str):
  """Figures of the chip, and devices to compile for."""
  kind, _, size = target.partition(":")
  if kind == "gpu":
    if not size.isdecimal() or not int(size):
      raise UserError(f"--plan={target}: write gpu:80 for a GPU of 80 GB")
    return Chip(int(size) * 1e9, math.nan, math.nan, math.nan), described_chips(
        f"--plan={target}", "v5p:1x1x1", chips_per_host_bounds=[1, 1, 1])
  if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", size):
    raise UserError(f"--plan={target}: write {', '.join(f'{name}:4x4' for name in CHIPS)} "
                    "(v4 and v5p have three dimensions), or gpu:80")
  return CHIPS[kind], described_chips(f"--plan={target}", target)


def described_chips(flag: str, topology: str, **options):
  """Devices of a TPU slice that is not there, for its compiler."""
  # This machine is no TPU: do not look for one, do not say that none was found, and share the
  # compiler with other processes.
  for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
                      ("TPU_ACCELERATOR_TYPE", "v5litepod-4"), ("TPU_MIN_LOG_LEVEL", "3"),
                      ("TPU_WORKER_HOSTNAMES", "localhost"), ("TPU_STDERR_LOG_LEVEL", "3")):
    os.environ.setdefault(name, value)
  from jax.experimental import topologies
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
  except Exception as error:                              # libtpu's own kinds
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"{flag}: no compiler for it ({reason}); `pip install libtpu` brings one, "
                    "which no TPU is needed for") from error


def outlined(exp: Experiment, method: methods.Method, prompts: list[str]) -> Programs:
  """The programs of a run, of whose data there are only shapes.

  Args:
    prompts: the run's own, as a reward may take no others; not asked where pairs are read.
  """
  pairs = PairShapes(exp) if exp.config.reads_pairs else None
  return Programs(exp, method, pairs.shared if pairs else table_shapes(exp, prompts),
                  jax.random.key(exp.config.seed), pairs)


def table_shapes(exp: Experiment, prompts: list[str]) -> dict:
  """`Experiment.prompt_table` with shapes where that holds embeddings."""
  return {"cond": embedded(exp, len(prompts)), "uncond": embedded(exp, 1),
          **exp.prepared(prompts)}


def embedded(exp: Experiment, prompts: int):
  """Shapes of the embeddings of so many prompts."""
  ids = {name: jax.ShapeDtypeStruct((prompts, *row.shape[1:]), row.dtype)
         for name, row in exp.pipeline.tokenize([""]).items()}
  return jax.eval_shape(exp.encode, exp.pipeline.text_params, ids)


class PairShapes:
  """Stands in for `PairTable`: what its batches look like."""
  gather = staticmethod(PairTable.gather)

  def __init__(self, exp: Experiment):
    self._exp, self.shared = exp, {"uncond": embedded(exp, 1)}

  def rows(self, ids) -> dict:
    latents = jax.ShapeDtypeStruct((len(ids), 2, *self._exp.models.latent_shape), np.float32)
    return {"cond": embedded(self._exp, len(ids)),
            "pairs": {"latents": latents, "label": jax.ShapeDtypeStruct((len(ids),), np.float32),
                      "origin": jax.ShapeDtypeStruct((len(ids), 2, 4), np.int32)}}


def measure(traced, chips: int, thorough: bool, resident: int) -> Need:
  """Compiles a program and asks XLA what it needs on each of so many chips; see `plan`.

  `resident`: bytes of its arguments that a chip holds anyway, for a program that is refused.

  XLA counts the body of a loop once. Operations are therefore counted here, and its figure for
  memory traffic is scaled as its figure for operations would have to be.
  """
  begun = time.monotonic()
  flops = operations(traced.jaxpr.jaxpr) / chips
  quick = {} if thorough else {"exec_time_optimization_effort": -1.0}
  try:
    compiled = traced.lower().compile(compiler_options=quick)
  except jax.errors.JaxRuntimeError as error:
    return refused(str(error), resident, flops, time.monotonic() - begun)
  seconds = time.monotonic() - begun
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  seen = max(cost.get("flops", 0.0), 0.0)
  traffic = max(cost.get("bytes accessed", 0.0), 0.0) * max(flops / seen if seen else 1.0, 1.0)
  return Need(
      arguments=memory.argument_size_in_bytes,
      outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
      temporary=memory.temp_size_in_bytes, code=memory.generated_code_size_in_bytes,
      flops=flops, traffic=traffic,
      collective=collective_bytes(compiled.as_text()), seconds=seconds)


def refused(message: str, resident: int, flops: float, seconds: float) -> Need:
  """The need of a program that the compiler would not finish, since no chip's memory holds it.

  Raises:
    UserError: that was for another reason.
  """
  found = re.search(r"HLO temporaries \((\d+(?:\.\d+)?)([KMG])\)", message)
  if not found:
    raise UserError(f"--plan: the compiler refused the program: {message}")
  temporary = int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[found[2]])
  return Need(arguments=resident, outputs=0, temporary=temporary, code=0, flops=flops,
              traffic=math.nan, collective=math.nan, seconds=seconds)


def collective_bytes(hlo: str) -> float:
  """Bytes that the collectives of a compiled module give out, those in loops as often as they run.

  How often is what XLA notes, or else the number in the loop's condition.
  """
  computations, name, entry = {}, None, None
  for line in hlo.splitlines():
    head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
    if head:
      name = head[2]
      computations[name] = []
      entry = name if head[1] else entry
    elif name:
      computations[name].append(line)

  def total(name) -> float:
    out = 0.0
    for line in computations.get(name, ()):
      found = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) (\w[\w\-]*)\(", line)
      if not found:
        continue
      kind = found[2].removesuffix("-start")
      if kind in COLLECTIVES:
        out += shape_bytes(found[1])
      elif found[2] == "while":
        body = re.search(r"body=%?([\w.\-]+)", line)
        noted = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        condition = re.search(r"condition=%?([\w.\-]+)", line)
        numbers = [noted[1]] if noted else re.findall(
            r"s32\[\]\S* constant\((\d+)\)", "\n".join(computations.get(condition[1], ())))
        out += total(body[1]) * max(map(int, numbers), default=1)
      elif found[2] in ("fusion", "call"):
        called = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", line)
        out += total(called[1]) if called else 0.0
    return out
  return total(entry)


def shape_bytes(text: str) -> int:
  """Bytes of an HLO shape, tuples summed: `(f32[2,3]{1,0}, bf16[4])` is 32."""
  return sum(BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
             for kind, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text))


def held(tree) -> int:
  """Bytes per chip of a tree of placed shapes."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * _itemsize(leaf)
             for leaf in jax.tree.leaves(tree))


def _itemsize(leaf) -> int:
  return 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize


def describe(cfg: Config, target: str, chip: Chip, exp: Experiment, state, needs,
             thorough: bool) -> str:
  """The table of measured `needs`."""
  gib = lambda n: f"{n / GIB:.2f}"
  optimizer = {k: v for k, v in state.items() if "optimizer" in k}
  rest = {k: v for k, v in state.items() if k not in optimizer}
  lines = [f"{cfg.recipe} on {target}: mesh {dict(exp.mesh.shape)}, batch {cfg.sample.batch}, "
           f"compute {cfg.model.dtype}, remat {cfg.model.remat}", "",
           f"per chip, GiB (it has {gib(chip.memory)}):",
           f"  frozen networks   {gib(held(exp.frozen)):>8s}",
           f"  trained weights   {gib(held(rest)):>8s}",
           f"  optimiser         {gib(held(optimizer)):>8s}", "",
           "program    arguments   outputs   temporary      all   fits      GFLOP   collective MiB"
           "   roofline ms   MFU at most   compiled in"]
  for name, need in needs.items():
    bound = need.roofline(chip)
    mfu = need.flops / chip.flops / bound if bound > 0 else math.nan
    number = lambda value, form: "" if math.isnan(value) else format(value, form)
    lines.append(f"{name:9s}{gib(need.arguments):>11s}{gib(need.outputs):>10s}"
                 f"{gib(need.temporary):>12s}{gib(need.bytes):>9s}"
                 f"{'yes' if need.bytes <= chip.memory else 'NO':>7s}{need.flops / 1e9:>11.1f}"
                 f"{number(need.collective / 2**20, '.2f'):>17s}{number(1e3 * bound, '.3f'):>14s}"
                 f"{number(100 * mfu, '.1f') or '-':>12s} %{need.seconds:>11.0f} s")
  if target.startswith("gpu"):
    lines += ["", "Estimated from XLA's buffers for one TPU chip, which are padded to its tiles."]
  elif not thorough:
    lines += ["", "Compiled with XLA's least effort; --plan_thorough compiles as a run does, which "
              "takes ten times as long and may find room for less temporary memory."]
  return "\n".join(lines)


def advice(cfg: Config, chip: Chip, exp: Experiment, needs) -> list[str]:
  """What to change where a program does not fit, the first thing that would do first."""
  name, worst = max(needs.items(), key=lambda item: item[1].bytes)
  if worst.bytes <= chip.memory:
    return [f"Fits, with {(chip.memory - worst.bytes) / GIB:.2f} GiB to spare."]
  fixed, moving = worst.arguments + worst.code, worst.temporary + worst.outputs
  if fixed > 0.9 * chip.memory:
    devices = exp.mesh.size
    return [f"Parameters alone do not leave room: split them, --config.mesh.fsdp={devices}."
            if exp.mesh.shape["fsdp"] < devices else
            "Parameters alone do not leave room, split over all chips: take a larger slice, or "
            "--config.model.adapter=lora."]
  if cfg.model.remat == "none" and name == "update":
    return ["Activations do not fit: --config.model.remat=block keeps fewer of them."]
  if getattr(cfg.method, "serial", True) is False:
    return ["Activations do not fit: --config.method.serial=True takes reward gradients one after "
            "the other."]
  if name == "update" and cfg.sample.batch // cfg.parts > smallest(cfg, exp):
    return ["Activations do not fit: smaller micro-batches would do, by --config.optim.accumulate, "
            "or a smaller --config.sample.batch."]
  if name == "collect" and cfg.sample.batch > smallest(cfg, exp):
    fits = int(cfg.sample.batch * 0.95 * (chip.memory - fixed) / moving)
    return [f"Samples are drawn all at once: about {max(fits, 1)} of them would fit "
            f"(--config.sample.batch, and more --config.train.steps)."]
  return ["Not even one sample per chip fits: take a chip with more memory, or "
          "--config.mesh.tensor=2."]


def smallest(cfg: Config, exp: Experiment) -> int:
  """Samples of the smallest micro-batch."""
  return sharding.batch_shards(exp.mesh) * cfg.group


def with_micro_batches(cfg: Config, chip: Chip, exp: Experiment, needs) -> Config | None:
  """The config with as many micro-batches as its update seems to need; None where that is no help.

  Temporary memory is taken as proportional to the samples.
  """
  need = needs["update"]
  part, least = cfg.sample.batch // cfg.parts, smallest(cfg, exp)
  if need.bytes <= chip.memory or part <= least or cfg.model.remat == "none":
    return None
  room = 0.95 * (chip.memory - need.arguments - need.code)
  wanted = max(int(part * room / (need.temporary + need.outputs)), least)
  sizes = [size for size in range(least, part, least) if part % size == 0 and size <= wanted]
  if not sizes:
    return None
  return dataclasses.replace(cfg, optim=dataclasses.replace(
      cfg.optim, accumulate=cfg.optim.accumulate * part // max(sizes)))
