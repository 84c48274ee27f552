"""Digests of arrays, computed where the arrays lie: the same on any devices and any mesh."""
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxalign.devices import processes, sharding

_SEEDS = 0x9e3779b9, 0x7f4a7c15


def digests(tree) -> dict[str, str]:
  """`{path: "dtype[shape] digest"}` of a tree of arrays; 16 hexadecimal digits each.

  Any change of one element changes the digest, and of more all but one in 2**64. All processes must
  call this, as arrays may be split over them.
  """
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  sums = processes.fetch([_sums(leaf) for _, leaf in leaves])      # all are under way at once
  return {sharding.path_of(path): f"{described(leaf)} {int(high):08x}{int(low):08x}"
          for (path, leaf), (high, low) in zip(leaves, sums)}


def described(leaf) -> str:
  """`float32[2,3]`."""
  return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


@jax.jit
def _sums(a):
  """`[2]` uint32: sums over elements of what a bijection, another at each place, makes of them."""
  if a.dtype == jnp.bool_:
    a = a.astype(jnp.uint8)
  word = jnp.dtype(f"uint{8 * a.dtype.itemsize}")
  bits = lax.bitcast_convert_type(a, word).astype(jnp.uint32)
  place = jnp.zeros(a.shape, jnp.uint32)
  for axis, size in enumerate(a.shape):        # no reshape: it would gather what is split
    place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, a.shape, axis)
  return jnp.stack([jnp.sum(_mixed(bits ^ _mixed(place ^ jnp.uint32(seed))), dtype=jnp.uint32)
                    for seed in _SEEDS])


def _mixed(x):
  """MurmurHash3's finaliser, a bijection of 32 bits (Appleby 2011, public domain)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85ebca6b)
  x = (x ^ (x >> 13)) * jnp.uint32(0xc2b2ae35)
  return x ^ (x >> 16)
