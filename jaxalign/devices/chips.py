"""Published figures of accelerators."""
from typing import NamedTuple


class Chip(NamedTuple):
  """Published figures of one chip: bytes of memory, bf16 FLOP/s, bytes/s of memory and of links."""
  memory: float
  flops: float
  bandwidth: float
  links: float


GIB = 2 ** 30
# Cloud TPU documentation, system architecture pages; links: interchip Gbit/s over eight.
CHIPS = {"v4": Chip(32 * GIB, 275e12, 1228e9, 300e9), "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9),
         "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9), "v6e": Chip(32 * GIB, 918e12, 1640e9, 448e9)}
# What JAX calls a device -> dense bf16 FLOP/s; of GPUs from NVIDIA's data sheets.
_FLOPS = {"TPU v4": CHIPS["v4"].flops, "TPU v5 lite": CHIPS["v5e"].flops,
          "TPU v5e": CHIPS["v5e"].flops, "TPU v5": CHIPS["v5p"].flops,
          "TPU v5p": CHIPS["v5p"].flops, "TPU v6 lite": CHIPS["v6e"].flops,
          "TPU v6e": CHIPS["v6e"].flops, "NVIDIA A100": 312e12, "NVIDIA H100 PCIe": 756e12,
          "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA L4": 121e12,
          "NVIDIA L40S": 362e12}


def peak(devices) -> float | None:
  """bf16 FLOP/s of all these devices together; None if one is not known, as CPUs are not."""
  each = [_flops(device.device_kind) for device in devices]
  return None if None in each else sum(each)


def _flops(kind: str) -> float | None:
  """The longest name that `kind` is, or begins with as a word: an A100-SXM4-80GB is an A100."""
  fits = [name for name in _FLOPS if f"{kind} ".startswith((f"{name} ", f"{name}-"))]
  return _FLOPS[max(fits, key=len)] if fits else None
