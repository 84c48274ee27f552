"""Rewards in PyTorch, with gradients, inside the compiled step.

One call of PyTorch gives score and gradient, so the gradient is kept as the residual: `R` has the
derivative `ct * dR/dx`, and JAX never sees what is inside.

  images [B, H, W, 3], int32 numbers of prompts  -- rows split over `data` and `fsdp` -->
  bridge: one thread a process scores, differentiates, and answers NaN where that fails -->
  scores [B] and gradient [B, H, W, 3], packed as one array

The user's file says what is scored:

  def load(device): ...                        # once per device and dtype; optional
  def f(pixels, prompts[, network]): ...       # f32 [B, 3, H, W] in [0, 1] -> [B]
  def features(pixels[, network]): ...         # -> [B, D], for judges; optional

The bridge is JAX's callback, or torch2jax, which hands over the devices' own memory.

torch is imported here, and only when such a reward is asked for.
"""
import collections
import contextlib
import dataclasses
import functools
import inspect
import itertools
import os
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxalign.config import source
from jaxalign.devices import callbacks, processes, sharding
from jaxalign.errors import UserError
from jaxalign.rewards import HostReward, Reward
from jaxalign.rewards.trial import Trial, try_gradient, try_rows

# Under `jax.checkpoint`, keep what has this name, or PyTorch is asked twice; see `saving`.
RESIDUAL = "pytorch_reward"
# How far scores of a picture may lie apart, relative to the largest, for rounding alone.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 5e-3}
ON_GPU = 2e-3           # of float32 there, where convolutions round to TensorFloat-32
ROWS, SCORE, GRADIENT, FEATURES = ("data", "fsdp"), "score", "gradient", "features"

_NUMBERS = itertools.count()
_NETWORKS: dict[tuple, tuple[int, Any]] = {}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What follows `#` in `reward.names`, joined by `&`.

  Attributes:
    device: "cpu", "cuda" or "cuda:1". dtype: of the network's weights; pixels and answer are f32.
    batch: rows of one call of PyTorch; 0 is all of them.
    timeout: seconds that the scoring of one device's rows may take.
    name: in logs, in place of `file.py:function`. bridge: "callback" or "torch2jax".
  """
  device: str = "cpu"
  dtype: str = "float32"
  batch: int = 0
  timeout: float = 600.0
  name: str = ""
  bridge: str = "callback"

  def __post_init__(self):
    for key, values in (("dtype", TOLERANCE), ("bridge", _BRIDGES)):
      if getattr(self, key) not in values:
        raise UserError(f"{key}={getattr(self, key)} is none of {', '.join(values)}")
    if self.batch < 0 or not 0 < self.timeout <= callbacks.PATIENCE:
      raise UserError(f"batch={self.batch} and timeout={self.timeout:g}: 0 or more, and above 0")


class Scorer:
  """The user's functions, and the table of prompts that the numbers on the devices stand for.

  Attributes:
    name: `file.py:function`, for messages. rows: how many were scored so far, for tests.
    method: `method.name`, for messages. file: the user's.
  """

  def __init__(self, name: str, settings: Settings, module, function: Callable):
    self.name, self.settings, self.method, self.rows = name, settings, "", 0
    self._module, self._function = module, function
    self.file = pathlib.Path(module.__file__).resolve()
    self._prompts: dict[str, int] = {}
    self._table: list[str] = []
    self._meetings, self._lock = collections.Counter(), threading.Lock()
    self._number = next(_NUMBERS)              # alike in all processes, which make the same rewards
    self._width = 0
    self.features = getattr(module, "features", None)
    for f in (function, *([self.features] if self.features else [])):
      if "network" in inspect.signature(f).parameters and not hasattr(module, "load"):
        raise self._fault(f"{f.__name__} takes `network`, but there is no load(device) beside it")

  # ---------------------------------------------------------------- prompts

  def prepare(self, prompts: list[str]) -> dict[str, np.ndarray]:
    """Numbers of prompts in a table that only grows; processes ask alike, so theirs are the same.
    """
    for prompt in prompts:
      if prompt not in self._prompts:
        self._prompts[prompt] = len(self._table)
        self._table.append(prompt)
    return {"prompt": np.asarray([self._prompts[p] for p in prompts], np.int32)}

  # ---------------------------------------------------------------- PyTorch, in its thread

  def ask(self, images: np.ndarray, prompts: list[str], kind: str) -> np.ndarray:
    """Scores `[B]`, gradients `[B, H, W, 3]` behind scores `[B, 1+HW3]`, or features `[B, D]`.

    All f32. A picture that is not finite gives NaN, and is not shown to the user's function.

    Raises:
      UserError: what the user's function or its answer is at fault of, in one line. NoGradient.
        What `callbacks.in_thread` does, less TimeoutError.
    """
    import torch
    return self._ask(torch.from_numpy(np.array(images, np.float32)), prompts, kind).numpy()

  def _ask(self, images, prompts, kind):
    """As `ask`, of a tensor, and a tensor where that lies."""
    import torch
    # On a GPU the work is to come after what gives the images, so in the stream of this thread.
    stream = torch.cuda.current_stream(images.device) if images.is_cuda else None

    def work():
      with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
        return self._in_parts(images, prompts, kind)
    try:
      return callbacks.in_thread(work, self.settings.timeout)
    except TimeoutError as error:
      raise self._fault(f"took longer than {self.settings.timeout:g} s; allow more with "
                        "#timeout=") from error

  def _in_parts(self, images, prompts, kind):
    import torch
    finite = images.isfinite().all(3).all(2).all(1)
    images = torch.where(finite[:, None, None, None], images, 0.5)
    size = self.settings.batch or len(images)
    with self._lock:
      self.rows += len(images)
    out = torch.cat([self._once(images[i:i + size], prompts[i:i + size], kind)
                     for i in range(0, len(images), size)])
    out[~finite] = torch.nan
    return out

  def _once(self, images, prompts, kind):
    import torch
    x = images.to(self.settings.device).detach().requires_grad_(kind == GRADIENT)
    dtype = getattr(torch, self.settings.dtype)
    f = self.features if kind == FEATURES else self._function
    wanted = inspect.signature(f).parameters
    args = {"prompts": list(prompts), "network": self._network() if "network" in wanted else None}
    with self._guarded(f.__name__), torch.set_grad_enabled(kind == GRADIENT), torch.autocast(
        x.device.type, dtype, enabled=dtype != torch.float32):
      # A copy of the user's own, and no leaf, so that writing into it is no fault.
      args["pixels"] = x.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
      answer = f(*(args[name] for name in wanted))
      self._check(f.__name__, answer, x, kind, prompts)
      values = answer.float()
      if kind != GRADIENT:
        return values.detach().to(images.device)
      if not answer.requires_grad:
        raise NoGradient
      gradient = torch.autograd.grad(values.sum(), x, allow_unused=True)[0]
    if gradient is None:
      raise NoGradient
    self._check_finite(f"{f.__name__} has the gradient", gradient, prompts)
    packed = torch.cat([values.detach()[:, None], gradient.reshape(len(x), -1)], 1)
    return packed.to(images.device)

  def _check(self, function, answer, x, kind, prompts) -> None:
    import torch
    if not isinstance(answer, torch.Tensor):
      raise self._fault(f"{function} returned {type(answer).__name__}, not a tensor")
    if answer.device.type != x.device.type:
      raise self._fault(f"{function} returned a tensor on {answer.device}, not on {x.device}")
    shape, wanted = tuple(answer.shape), "B, D" if kind == FEATURES else "B"
    if shape[:1] != (len(x),) or len(shape) != 1 + (kind == FEATURES):
      raise self._fault(f"{function} returned shape {shape}, not [{wanted}] for B = {len(x)} "
                        "pictures")
    if answer.dtype.is_complex:
      raise self._fault(f"{function} returned dtype {answer.dtype}, not real numbers")
    self._check_finite(f"{function} returned", answer.detach(), prompts)

  def _check_finite(self, what, values, prompts) -> None:
    bad = ~values.isfinite().reshape(len(values), -1)
    if bad.any():
      i = int(bad.any(1).nonzero()[0])
      value = float(values[i].flatten()[bad[i]][0])
      raise self._fault(f"{what} {value} for prompt {prompts[i]!r}")

  def _network(self):
    """What `load` returned, made once per device and dtype and shared by the file's functions."""
    import torch
    device, dtype = self.settings.device, self.settings.dtype
    key, made = (self.file, device, dtype), self.file.stat().st_mtime_ns
    if key not in _NETWORKS or _NETWORKS[key][0] != made:
      with self._guarded("load"):
        network = self._module.load(torch.device(device))
        for module in _modules(network):
          module.eval().requires_grad_(False).to(getattr(torch, dtype))
      _NETWORKS[key] = made, network
    return _NETWORKS[key][1]

  def _guarded(self, function: str):
    return _Guard(self, function)

  def _fault(self, what: str) -> UserError:
    return UserError(f"reward.names: {self.name}: {what}")

  # ---------------------------------------------------------------- inside a program

  def width(self, shape: tuple[int, ...]) -> int:
    """Numbers of `features` for pictures `[H, W, 3]`."""
    if not self._width:
      self._width = self.ask(np.full((1, *shape), 0.5, np.float32), [""], FEATURES).shape[1]
    return self._width

  def answer(self, kind, width, meeting, images, numbers, shard):
    """Asked by a bridge: `[..., B, width]` f32, NaN wherever that cannot be had. Never raises.

    Args:
      meeting: shards of each process, where all of them answer together; 0 where one does alone.
      images: `[..., B, H, W, 3]`. numbers: `[..., B]`, of prompts. shard: which part of the rows.
        Tensors, as is the answer, where the images lie.
    """
    import torch
    out = torch.full((*images.shape[:-3], width), torch.nan, device=images.device)
    try:
      try:
        if not callbacks.ended():
          rows = images.reshape(-1, *images.shape[-3:])
          prompts = [self._table[i] if kind != FEATURES else "" for i in numbers.flatten().tolist()]
          out.copy_(self._ask(rows, prompts, kind).reshape(out.shape))
      except (callbacks.Ended, KeyboardInterrupt):
        pass
      except NoGradient:
        callbacks.record(str(self._fault("gives no gradient for these pictures")))
      except UserError as error:
        callbacks.record(str(error))
      if meeting:
        part = int(shard.flatten()[0]) % meeting
        with self._lock:
          self._meetings[part] += 1
          count = self._meetings[part]
        callbacks.meet(f"reward{self._number}/{part}", count)
    except BaseException as error:             # also of ours: whatever it is, collectives must end
      callbacks.record(str(self._fault(source.one_line(error))))
    return out.fill_(torch.nan) if callbacks.ended() else out


class NoGradient(Exception):
  """The answer does not depend on the pixels in a way that PyTorch could differentiate."""


class _Guard:
  """Turns whatever the user's code raises into one line that names function, line and way out."""

  def __init__(self, scorer: Scorer, function: str):
    self._scorer, self._function = scorer, function

  def __enter__(self):
    return self

  def __exit__(self, kind, error, _):
    if error is None or isinstance(error, (UserError, NoGradient)):
      return
    scorer, text = self._scorer, source.one_line(error)
    memory = isinstance(error, MemoryError) or "memory" in text.lower()
    hint = "; score fewer pictures at a time with #batch=" if memory else ""
    raise scorer._fault(f"{self._function} raised{source.line_in(error, scorer.file)} {text}"
                        f"{hint}") from error


def pytorch_reward(name: str, settings: Settings, module, function: Callable) -> Reward:
  """A PyTorch function as a `Reward`, to be made ready by its `opened`.

  Args:
    name: `file.py:function`. module: the user's, with `load` and `features` where there are any.
  Raises:
    UserError: torch or the device is missing, or `load`.
  """
  try:
    import torch
  except ImportError as error:
    raise UserError(f"reward.names: {name} needs PyTorch: pip install jaxalign[torch]") from error
  try:
    device = torch.device(settings.device)
  except RuntimeError as error:
    raise UserError(f"reward.names: {name}: device={settings.device} is no device") from error
  if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
    raise UserError(f"reward.names: {name}: device={settings.device}, but PyTorch sees "
                    f"{torch.cuda.device_count()} GPUs; leave it out for the CPU")
  if device.type not in ("cpu", "cuda"):
    raise UserError(f"reward.names: {name}: device={settings.device} is neither cpu nor cuda")
  callbacks.begin()
  scorer = Scorer(name, settings, module, function)
  score = lambda params, images, prepared: _score(scorer, images, prepared["prompt"])
  features = (lambda params, images: _features(scorer, images)) if scorer.features else None
  reward = Reward(name, {}, scorer.prepare, score, "set by the user's function", features=features)
  return dataclasses.replace(reward, opened=functools.partial(_opened, reward, scorer))


def saving(policy: Callable | None = None) -> Callable:
  """A policy for `jax.checkpoint` around a reward: as `policy`, and PyTorch is asked once."""
  mine = jax.checkpoint_policies.save_only_these_names(RESIDUAL)
  return jax.checkpoint_policies.save_from_both_policies(policy, mine) if policy else mine


def _opened(reward: Reward, scorer: Scorer, trial: Trial) -> Reward | HostReward:
  """The reward after its trial: as it is, or a black box where it has no gradient."""
  scorer.method = trial.method
  if trial.outline:
    processes.say(f"reward.names: {scorer.name} is PyTorch, of which nothing is planned: a stub of "
                  "the same shapes stands in for it")
    return dataclasses.replace(
        reward, score=lambda params, images, prepared: images.mean((1, 2, 3)),
        features=scorer.features and (lambda params, images: images.mean((1, 2))))
  settings = scorer.settings
  on_gpu = settings.dtype == "float32" and settings.device != "cpu"
  score = lambda images, prompts: scorer.ask(images, prompts, SCORE)

  def gradient(images, prompts):
    try:
      return scorer.ask(images, prompts, GRADIENT)[:, 1:].reshape(images.shape)
    except NoGradient:
      return None
  if settings.bridge == "torch2jax":
    _build_torch2jax(scorer)
  begun = time.monotonic()
  try_rows(scorer.name, score, trial, ON_GPU if on_gpu else TOLERANCE[settings.dtype])
  differentiable = trial.gradient and try_gradient(scorer.name, score, gradient, trial)
  compiled = differentiable or not trial.gradient
  processes.say(f"reward.names: {scorer.name} in PyTorch on {settings.device}, {settings.dtype}, "
                f"tried in {time.monotonic() - begun:.1f} s"
                + (_BRIDGES[settings.bridge].said if compiled else ""))
  if compiled:
    return dataclasses.replace(reward, differentiable=bool(differentiable))
  return HostReward(reward.name, lambda images, prompts: scorer.ask(
      images.astype(np.float32) / 255, list(prompts), SCORE), reward.range)


def _modules(value, seen: set[int] | None = None, depth: int = 4):
  """The modules in what `load` returned: itself, or in its items and attributes."""
  import torch
  seen = set() if seen is None else seen
  if id(value) in seen or not depth:
    return
  seen.add(id(value))
  if isinstance(value, torch.nn.Module):
    yield value
  elif isinstance(value, dict):
    for item in value.values():
      yield from _modules(item, seen, depth - 1)
  elif isinstance(value, (list, tuple, set)):
    for item in value:
      yield from _modules(item, seen, depth - 1)
  elif hasattr(value, "__dict__") and not inspect.isroutine(value) and not inspect.ismodule(value):
    for item in vars(value).values():
      yield from _modules(item, seen, depth - 1)


# ------------------------------------------------------------------ what JAX sees


def _score(scorer: Scorer, images, numbers):
  # The mesh is asked for now, as derivatives may be traced where it is not in force any more.
  return _differentiable(scorer, jax.sharding.get_abstract_mesh(), images, numbers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(scorer, mesh, images, numbers):
  return _call(scorer, mesh, SCORE, 1, images, numbers)[:, 0]


def _forward(scorer, mesh, images, numbers):
  packed = _call(scorer, mesh, GRADIENT, 1 + images[0].size, images, numbers)
  packed = checkpoint_name(packed, RESIDUAL)
  return packed[:, 0], packed[:, 1:].reshape(images.shape).astype(images.dtype)


def _backward(scorer, mesh, gradient, ct):
  return ct[:, None, None, None].astype(gradient.dtype) * gradient, None


_differentiable.defvjp(_forward, _backward)


def _features(scorer: Scorer, images):
  mesh, width = jax.sharding.get_abstract_mesh(), scorer.width(images.shape[1:])
  return _call(scorer, mesh, FEATURES, width, images, jnp.zeros(len(images), jnp.int32))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _call(scorer, mesh, kind, width, images, numbers):
  """`[B, width]` f32 by a call for each part of the rows, or by one for all of them.

  Packed, since two results under `shard_map` go astray (jax-ml/jax#30619).
  """
  images = images.astype(jnp.float32)

  def ask(meeting, images, numbers, shard):
    shape = jax.ShapeDtypeStruct((len(images), width), np.float32)
    answer = functools.partial(scorer.answer, kind, width, meeting)
    return _BRIDGES[scorer.settings.bridge].call(answer, shape, images, numbers, shard)
  shards = 1 if mesh.empty else sharding.batch_shards(mesh)
  if mesh.empty or mesh.size == 1 or len(images) % shards:
    return ask(0, images, numbers, np.int32(0))
  replicas = mesh.size // shards
  meeting = 0
  if processes.several() and not jax.local_device_count() % replicas:
    meeting = jax.local_device_count() // replicas

  def local(images, numbers):
    shard = jax.lax.axis_index(ROWS)
    if replicas == 1:
      return ask(meeting, images, numbers, shard)
    out = jax.lax.cond(jax.lax.axis_index("tensor") == 0, functools.partial(ask, meeting),
                       lambda *_: jnp.zeros((len(images), width), jnp.float32),
                       images, numbers, shard)
    return jax.lax.psum(out, "tensor")
  return jax.shard_map(local, mesh=mesh, in_specs=(P(ROWS),) * 2, out_specs=P(ROWS),
                       check_vma=False)(images, numbers)


@_call.defjvp
def _no_more_derivatives(scorer, mesh, kind, width, primals, tangents):
  asked = f"method.name={scorer.method!r} asks" if scorer.method else "the method asks"
  raise UserError(f"reward.names: {scorer.name}: PyTorch gives first derivatives, and {asked} for "
                  "second ones; write the reward in JAX")


# ------------------------------------------------------------------ bridges


def _by_callback(answer: Callable, shape, *args):
  """`answer(*tensors)` inside a program, its arguments copied to the host."""
  def on_host(*args):
    import torch
    return answer(*(torch.from_numpy(np.array(arg)) for arg in args)).numpy()
  return jax.pure_callback(on_host, shape, *args, vmap_method="broadcast_all")


def _by_torch2jax(answer: Callable, shape, *args):
  """The same on the devices' own memory: nothing goes by the host."""
  from wrap_torch2jax import torch2jax
  return torch2jax(answer, *args, output_shapes=shape, depth=0, vmap_method="broadcast_all")(*args)


def _build_torch2jax(scorer: Scorer) -> None:
  """Compiles torch2jax for this PyTorch and JAX, or finds that in its cache.

  Raises:
    UserError: it, or what compiles it, is missing; or it does not work on these devices.
  """
  import torch
  fault = lambda what: scorer._fault(f"bridge=torch2jax {what}; leave it out for the callback")
  device, local = torch.device(scorer.settings.device), jax.local_devices()
  if processes.several():
    raise fault("makes a program in each process that the others do not know")
  if {"cuda": "gpu"}.get(device.type, device.type) != local[0].platform:
    raise fault(f"hands over what lies on JAX's devices, {local[0].platform}, and device={device} "
                "is elsewhere")
  if device.type == "cuda" and (len(local) > 1 or device.index):
    raise fault(f"serves the first GPU alone, and JAX has {len(local)}")
  try:
    import wrap_torch2jax
  except ImportError as error:
    raise fault("needs its package: pip install jaxalign[torch2jax]") from error
  compiler = os.environ.get("CXX", "c++")
  if not shutil.which(compiler):
    raise fault(f"needs a C++ compiler, and there is no {compiler}")
  try:
    with contextlib.redirect_stdout(sys.stderr):         # it says when it begins to compile
      wrap_torch2jax.compile_and_import_module()
  except Exception as error:
    raise fault(f"does not compile ({source.one_line(error)})") from error


@dataclasses.dataclass(frozen=True)
class _Bridge:
  """How a program calls PyTorch: `call(answer, shape, *arrays)`; `said` is for the log."""
  call: Callable
  said: str


_BRIDGES = {
    "callback": _Bridge(
        _by_callback, "; JAX keeps no program that calls it, so each run compiles anew"),
    "torch2jax": _Bridge(
        _by_torch2jax, ", called by torch2jax; its programs have new names in each run, which "
        "compiles them anew"),
}
