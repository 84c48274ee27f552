"""Low-rank adapters as plain trees: `{module path...: {"a", "b"}}`, mirrored on the parameters.

Pass the tree as the `"lora"` collection, `model.apply({"params": p, "lora": tree}, ...)`, or
`merge` it into the parameters. The scale alpha / rank of other libraries is part of the factors
here, that is alpha == rank.
"""
import re
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxalign.errors import UserError


def init(key, params, rank: int, targets: Mapping[str, str]):
  """New adapter: `a` Gaussian with standard deviation 1/rank (PEFT's "gaussian"), `b` zero.

  The network's output does not change until `b` moves.

  Args:
    key: random key; a factor depends on it and on its own path only.
    params: parameter tree of the network (arrays or `jax.ShapeDtypeStruct`).
    rank: inner width, >= 1.
    targets: name -> pattern of the paths it covers, such as `down_blocks_0/resnets_0/conv1`; see
      `Pipeline.adapter_targets`.
  Returns:
    Nested dict of `a [..., in, rank]` and `b [rank, out]`, f32.
  Raises:
    UserError: a target that this network has no layer for.
  """
  tree = {}
  flat = traverse_util.flatten_dict(params, sep="/")
  for target, pattern in targets.items():
    paths = [p.removesuffix("/kernel") for p in sorted(flat) if p.endswith("/kernel")]
    paths = [p for p in paths if re.search(pattern, p)]
    if not paths:
      raise UserError(f"model.lora_targets: {target!r} matches no layer of this network")
    for path in paths:
      shape = flat[f"{path}/kernel"].shape
      path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
      tree[f"{path}/a"] = jax.random.normal(path_key, (*shape[:-1], rank), jnp.float32) / rank
      tree[f"{path}/b"] = jnp.zeros((rank, shape[-1]), jnp.float32)
  return traverse_util.unflatten_dict(tree, sep="/")


def layers(flat) -> list[str]:
  """Paths that have an adapter, sorted, of its flat tree (`PATH/a`, `PATH/b`).

  Sorted, as of a set each process has an order of its own, and a sum over it another last bit.
  """
  return sorted({name.rsplit("/", 1)[0] for name in flat})


def distance(one, other) -> float:
  """Frobenius norm of the difference between what two adapters of the same layers add to them.

  From Gram matrices of the factors, `|A B|^2 = sum (A^T A) * (B B^T)`, on the host in f64; no
  product of a layer's size is made.
  """
  one, other = (traverse_util.flatten_dict(tree, sep="/") for tree in (one, other))
  total = 0.0
  for path in layers(one):
    pick = lambda factor: [np.asarray(tree[f"{path}/{factor}"], np.float64)
                           for tree in (one, other)]
    a = np.concatenate(pick("a"), -1)
    a, (b, c) = a.reshape(-1, a.shape[-1]), pick("b")
    b = np.concatenate([b, -c])
    total += ((a.T @ a) * (b @ b.T)).sum()
  return float(np.sqrt(max(total, 0.0)))               # rounding may go below


def merge(params, lora):
  """Parameters with the adapter added to its kernels; the other leaves are shared, not copied.

  Raises:
    ValueError: the adapter has a layer that the parameters lack.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  factors = traverse_util.flatten_dict(lora, sep="/")
  for path in layers(factors):
    kernel = f"{path}/kernel"
    if kernel not in flat:
      raise ValueError(f"lora: {path} is not a layer of these parameters")
    # In f32 whatever the device's default, since the result replaces a master copy.
    flat[kernel] = flat[kernel] + jnp.einsum("...ir,ro->...io", factors[f"{path}/a"],
                                             factors[f"{path}/b"], precision="highest")
  return traverse_util.unflatten_dict(flat, sep="/")
