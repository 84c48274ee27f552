"""What a config key may hold, said by the type of its dataclass field.

  @dataclasses.dataclass(frozen=True)
  class Config:
    steps: Count = 10
    kind: Literal["ddim", "ddpm"] = "ddim"

    def __post_init__(self):
      check("sample", self)
"""
import dataclasses
import math
import typing
from typing import Annotated, Literal

from jaxalign.errors import UserError


@dataclasses.dataclass(frozen=True)
class Range:
  """Numbers from `low` on and, where `high` is finite, below it."""
  low: float
  high: float = math.inf


MOST = 2 ** 31           # the devices count in 32 bits
Count = Annotated[int, Range(1, MOST)]
Whole = Annotated[int, Range(0, MOST)]
Pixels = Annotated[int, Range(0, 2 ** 16)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]     # 1 excluded, as for decay rates


def check(group: str, config) -> None:
  """Checks types, choices and ranges of all fields of a dataclass.

  Raises:
    UserError: names the first key at fault as `group.key`, and what it may be.
  """
  for name, kind in typing.get_type_hints(type(config), include_extras=True).items():
    _check_value(f"{group}.{name}" if group else name, kind, getattr(config, name))


def _check_value(key: str, kind, value) -> None:
  if typing.get_origin(kind) is Annotated:
    kind, *limits = typing.get_args(kind)
    _check_value(key, kind, value)
    for limit in limits:
      if kind is int and value >= limit.high:
        raise UserError(f"{key}={value} is above {limit.high - 1}")
      if kind is not int and limit.high < math.inf and not limit.low <= value < limit.high:
        raise UserError(f"{key}={value} is outside [{limit.low}, {limit.high})")
      if value < limit.low:
        raise UserError(f"{key}={value} is below {limit.low}")
  elif typing.get_origin(kind) is Literal:
    if value not in typing.get_args(kind):
      raise UserError(f"{key}={value!r} is not one of {typing.get_args(kind)}")
  elif typing.get_origin(kind) is tuple and isinstance(value, tuple):
    for i, item in enumerate(value):
      _check_value(f"{key}[{i}]", typing.get_args(kind)[0], item)
  elif kind is float and type(value) in (int, float):
    if not math.isfinite(value):
      raise UserError(f"config key {key}={value!r} is not a finite number")
  elif isinstance(kind, type) and type(value) is not kind or typing.get_origin(kind) is tuple:
    wanted = kind.__name__ if isinstance(kind, type) else str(kind)
    raise UserError(f"config key {key}={value!r} is of type {type(value).__name__}, not {wanted}")
