"""Where arrays live: the device mesh and the rules that place parameters on it.

Three mesh axes: `data` (batch), `fsdp` (batch, and parameters split over it), `tensor` (wide kernel
dimensions). Parameters are placed by ordered regexes on their path; the same rules place optimiser
moments and averages, whose paths end alike. Adapters are small and replicate.
"""
import contextlib
import functools
import os
import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# First match on the end of the path wins. A dimension that its axis does not divide is replicated.
PARAM_RULES = (
    (r"(^|/)(a|b)$", P()),                      # factors of adapters
    (r"(to_q|to_k|to_v|q_proj|k_proj|v_proj|query|key|value)/kernel$", P("fsdp", "tensor")),
    (r"(to_out_0|to_add_out|out_proj|proj_attn|net_2|fc2|SelfAttention/o|wo)/kernel$",
     P("tensor", "fsdp")),
    (r"(net_0/proj|fc1|SelfAttention/[qkv]|wi_\d|norm\w*/linear)/kernel$", P("fsdp", "tensor")),
    (r"(conv\w*|patch_embedding|pos_embed/proj|proj_in|proj_out)/kernel$",
     P(None, None, None, "fsdp")),
    (r"(linear_\d|time_emb_proj|context_embedder|visual_projection|text_projection|proj\w*)"
     r"/kernel$", P("fsdp", None)),
    (r"(token_embedding|position_embedding|shared)/embedding$", P("fsdp", None)),
    (r"(bias|scale|class_embedding|logit_scale|relative_attention_bias/embedding|pos_embed)$", P()),
)


def make_mesh(data: int, fsdp: int, tensor: int, devices=None) -> Mesh:
  """Mesh over the first `data x fsdp x tensor` devices; `data=-1` takes all that are left.

  Raises:
    UserError: the device count does not allow it; names the mesh keys.
  """
  devices = jax.devices() if devices is None else devices
  if data == -1:
    data = max(len(devices) // (fsdp * tensor), 1)
  size = data * fsdp * tensor
  if size > len(devices):
    raise UserError(f"mesh.data x mesh.fsdp x mesh.tensor = {size}, but there are {len(devices)} "
                    "devices")
  return Mesh(np.asarray(devices[:size]).reshape(data, fsdp, tensor), AXES)


def use_cores(fits=lambda count: None) -> None:
  """Makes a device of every core where the CPU is the only platform; XLA alone fills about one.

  To be called before anything runs on a device; does nothing after.

  Args:
    fits: `(number of devices) -> None`, raises UserError where the batch does not divide; then
      fewer cores are used.
  """
  if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
    return                                                 # the user has said how many
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  for count in range(min(cores, 8), 1, -1):                # beyond, rows per device are too few
    with contextlib.suppress(UserError):
      fits(count)
      with contextlib.suppress(RuntimeError):              # a device is in use already
        jax.config.update("jax_num_cpu_devices", count)
      return


def on_mesh(fn, mesh: Mesh):
  """`fn`, traced with `mesh` in force, for kernels that are split over it by hand."""
  @functools.wraps(fn)
  def run(*args, **kwargs):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return fn(*args, **kwargs)
  return run


def batch_shards(mesh: Mesh) -> int:
  """Number of parts that the batch axis is split into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def spec_for(path: str, shape, mesh: Mesh, rules=PARAM_RULES) -> P:
  """Partition of a parameter; unmatched and indivisible dimensions replicate."""
  for pattern, spec in rules:
    if re.search(pattern, path):
      # Rules are written for the full rank; a Dense kernel in a conv rule keeps its last axis.
      axes = tuple(spec)[-len(shape):] if shape else ()
      return P(*(axis if axis and size % mesh.shape[axis] == 0 else None
                 for axis, size in zip(axes, shape)))
  return P()


def path_of(key_path) -> str:
  """`a/b/kernel` of a pytree key path."""
  name = lambda k: getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))
  return "/".join(str(name(k)) for k in key_path)


def param_shardings(tree, mesh: Mesh, rules=PARAM_RULES):
  """NamedSharding for every leaf of a tree of arrays or ShapeDtypeStructs."""
  return jax.tree_util.tree_map_with_path(
      lambda p, leaf: NamedSharding(mesh, spec_for(path_of(p), leaf.shape, mesh, rules)), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Leading axis over all batch shards."""
  return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def sharding_table(tree, mesh: Mesh) -> list[str]:
  """One line per distinct (shape, partition) of a parameter tree, for `--dry_run`."""
  rows: dict = {}
  for p, leaf in jax.tree_util.tree_leaves_with_path(tree):
    path = path_of(p)
    spec = spec_for(path, leaf.shape, mesh)
    pattern = re.sub(r"_\d+", "_*", path)
    rows.setdefault((pattern, tuple(leaf.shape), str(spec)), []).append(path)
  return [f"{len(paths):4d} x {pattern:75s} {str(shape):22s} {spec}"
          for (pattern, shape, spec), paths in rows.items()]
