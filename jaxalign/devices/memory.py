"""Sizes that no machine like this one can hold, refused by name before anything allocates them."""
import math
import os

import jax

from jaxalign.errors import UserError

MOST = 2 ** 31           # images of a run have int32 numbers


def check_fits(key: str, count: int, shape: tuple[int, ...], itemsize: int = 4) -> None:
  """Raises UserError if `count` arrays of `shape` alone are more than all memory of this machine.

  Args:
    key: the config key or flag that says how many, with its value. itemsize: bytes of an element.
  """
  if count >= MOST:
    raise UserError(f"{key}: {count} images are more than a run can number ({MOST - 1})")
  need, have = count * math.prod(shape) * itemsize, total()
  if need > have:
    raise UserError(f"{key}: {count} images of {' x '.join(map(str, shape))} alone take "
                    f"{need / 2**30:,.0f} GiB, and all memory here is {have / 2**30:,.0f} GiB")


def total() -> int:
  """Bytes of memory of this process's devices and host."""
  devices = sum((device.memory_stats() or {}).get("bytes_limit", 0)
                for device in jax.local_devices() if device.platform != "cpu")
  return devices + os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
