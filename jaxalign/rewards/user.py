"""The user's own reward: a function in a Python file, named in the config as `file.py:function`.

The parameter names say which of the three kinds it is:

  def my_score(images, prompts):   # black box: uint8 numpy [B,H,W,3] and B prompts -> [B] numbers
  def my_score(images, prepared):  # JAX: f32 [B,H,W,3] in [0,1] -> [B], compiled, differentiated
  def my_score(pixels, prompts):   # PyTorch: f32 [B,3,H,W] in [0,1] -> [B], differentiated there

A JAX reward that needs the prompt reads it from `prepared`, which the file's own optional
`prepare(prompts)` makes on the host: a dict of numpy arrays, first axis the prompts.
The file is run as it stands: it is trusted code, named explicitly by the user.
"""
import dataclasses
import inspect
import pathlib

import jax

from jaxalign.config import source
from jaxalign.devices import callbacks
from jaxalign.errors import UserError
from jaxalign.rewards import HostReward, Reward
from jaxalign.rewards.settings import read_settings

_FORMS = ("write it as `def f(images, prompts)` for a black box on uint8 images, "
          "`def f(images, prepared)` for a differentiable JAX reward on images in [0, 1], or "
          "`def f(pixels, prompts)` or `def f(pixels, prompts, network)` for one in PyTorch")


@dataclasses.dataclass(frozen=True)
class Settings:
  """What may follow `#` where a function is not PyTorch's.

  Attributes:
    name: in logs. timeout: seconds that a black box may take for the images of one call.
  """
  name: str = ""
  timeout: float = 600.0

  def __post_init__(self):
    if not 0 < self.timeout <= callbacks.PATIENCE:
      raise UserError(f"timeout={self.timeout:g} is outside (0, {callbacks.PATIENCE:g}]")


def load_user_reward(spec: str) -> Reward | HostReward:
  """The reward that `path/to/file.py:function` names; a relative path is from the working folder.

  Settings may follow a `#`: of PyTorch those of `pytorch.Settings`, of others those above.

  Raises:
    UserError: missing file or function, a file that fails to run, or none of the three forms. Also
      raised later by the reward itself when the user's function raises.
  """
  full, (spec, _, settings) = spec, spec.partition("#")
  path, _, function = spec.rpartition(":")
  module = _run_file(pathlib.Path(path))
  f = getattr(module, function, None)
  if not inspect.isroutine(f):
    raise UserError(f"reward.names: {path} has no function '{function}'")
  parameters = list(inspect.signature(f).parameters)
  if parameters[:1] == ["pixels"]:
    if parameters not in (["pixels", "prompts"], ["pixels", "prompts", "network"]):
      raise UserError(f"reward.names: {spec} takes ({', '.join(parameters)}): {_FORMS}")
    from jaxalign.rewards import pytorch
    return pytorch.pytorch_reward(spec, read_settings(full, settings, pytorch.Settings), module, f)
  settings = read_settings(full, settings, Settings)
  if parameters == ["images", "prompts"]:
    return HostReward(spec, _in_time(_guarded(f, spec, path), spec, settings.timeout),
                      "set by the user's function")
  if parameters == ["images", "prepared"]:
    score = _guarded(f, spec, path)
    prepare = getattr(module, "prepare", None)
    prepare = _guarded(prepare, f"{path}:prepare", path) if prepare else lambda prompts: {}
    return Reward(spec, {}, prepare, lambda params, images, prepared: score(images, prepared),
                  "set by the user's function")
  raise UserError(f"reward.names: {spec} takes ({', '.join(parameters)}): {_FORMS}")


def _run_file(path):
  if not path.is_file():
    raise UserError(f"reward.names: no file {path}")
  try:
    return source.run_file(path)
  except KeyboardInterrupt:
    raise
  except BaseException as e:
    raise UserError(f"reward.names: {path} failed to run{source.line_in(e, path)}: "
                    f"{source.one_line(e)}") from e


def _guarded(f, spec, path):
  """`f`, with whatever it raises turned into one line that points into the user's file."""
  def call(*args):
    try:
      return f(*args)
    except KeyboardInterrupt:
      raise
    except BaseException as e:           # also `sys.exit`, which is not to end the run as if done
      hint = ("; use jax.numpy and no Python `if` on values, or take `prompts` for a black box"
              if isinstance(e, jax.errors.JAXTypeError) else "")
      raise UserError(f"reward.names: {spec} raised{source.line_in(e, path)} "
                      f"{source.one_line(e)}{hint}") from e
  return call


def _in_time(f, spec, timeout):
  """`f` in a thread that is left behind if it hangs, or after Ctrl-C."""
  def call(*args):
    try:
      return callbacks.in_thread(lambda: f(*args), timeout)
    except TimeoutError as e:
      raise UserError(f"reward.names: {spec} took longer than {timeout:g} s; allow more with "
                      "#timeout=") from e
  return call
