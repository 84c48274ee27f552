"""Digests: every bit counts, and nothing but the numbers and their places."""
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.devices.sharding import make_mesh
from jaxalign.storage.digest import digests


def test_each_bit_of_each_dtype_counts():
  rng = np.random.default_rng(0)
  for dtype in ("float32", "bfloat16", "int32", "uint8", "float16"):
    a = np.asarray(jnp.asarray(rng.standard_normal((3, 5)), dtype))
    bits = a.view(f"u{a.dtype.itemsize}")
    seen = {digests({"a": a})["a"]}
    for bit in range(8 * a.dtype.itemsize):
      changed = bits.copy()
      changed[rng.integers(3), rng.integers(5)] ^= bits.dtype.type(1 << bit)
      seen.add(digests({"a": changed.view(a.dtype)})["a"])
    assert len(seen) == 1 + 8 * a.dtype.itemsize
  flags = np.zeros(4, bool)
  assert len({digests({"a": np.roll(flags | [1, 0, 0, 0], i)})["a"] for i in range(4)}) == 4


def test_places_shapes_and_types_count():
  a = np.arange(6, dtype=np.float32)
  other = [a[::-1], a.reshape(2, 3), a.reshape(3, 2), a.astype(np.int32), np.float32(1),
           -a * 0.0, a * 0.0, np.zeros((0, 3), np.float32), np.float32(np.nan)]
  found = {digests({"a": x})["a"] for x in (a, *other)}
  assert len(found) == 1 + len(other)
  assert digests({"p": {"a": a}})["p/a"].startswith("float32[6] ")


def test_the_same_wherever_the_array_lies():
  x = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
  found = {digests({"x": x})["x"]}
  for spec in (P(), P("fsdp", "tensor"), P(("data", "fsdp", "tensor"))):
    found.add(digests({"x": jax.device_put(x, NamedSharding(make_mesh(2, 2, 2), spec))})["x"])
  assert len(found) == 1
