"""Attention: the plain form, or a fused kernel that holds no `[L, M]` matrix in memory."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxalign.devices.sharding import BATCH, batch_shards

# Below so many tokens the matrix is small, and XLA's own attention as fast.
LONG = 1024
# A bias of the scores that leaves a key no weight, and that float16 can still hold.
MASKED = -3000.0


def attend(q, k, v, heads: int, key_bias=None):
  """Multi-head attention `[B, L, D], [B, M, D], [B, M, D] -> [B, L, D]`, softmax in f32.

  On GPUs cuDNN's kernel where it can run, on TPUs the Pallas one of JAX for long sequences. The
  platform is that of the mesh that `sharding.on_mesh` set, which may be one to compile for only.
  Several TPUs without such a mesh take the plain form: nothing says how to split the kernel.

  Args:
    q, k, v: as above; `heads` divides D.
    key_bias: `[B, M]` f32, added to every score of a key: log n makes it count as n equal keys,
      minus infinity as none. No gradient flows into it.
  """
  q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
  target, size = platform(), q.shape[-1]
  splits = not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1
  if key_bias is not None:
    key_bias = jax.lax.stop_gradient(key_bias.astype(jnp.float32))
  # cuDNN's fused kernel has these limits on every supported GPU.
  fused = (target == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and size % 8 == 0
           and size <= (128 if key_bias is None else 120))
  if target == "tpu" and splits and flash_block(q.shape[1], k.shape[1]):
    out = tpu_flash(q, k, v, key_bias)
  elif fused:
    if key_bias is not None:
      q, k, v = with_bias(q, k, v, key_bias)
    out = jax.nn.dot_product_attention(q, k, v, scale=size ** -0.5, implementation="cudnn")
    out = out[..., :size]
  else:
    bias = None if key_bias is None else key_bias[:, None, None]
    plain = heads_first if target == "cpu" and q.dtype == jnp.float32 else functools.partial(
        jax.nn.dot_product_attention, implementation="xla")
    out = plain(q, k, v, bias)
  return out.reshape(*out.shape[:2], -1)


def heads_first(q, k, v, bias=None):
  """`jax.nn.dot_product_attention` of `[B, L, H, d]` f32 arrays; `bias [B, 1, 1, M]`.

  With the heads moved forward once, every product is one of matrices as they lie in memory: the
  gradient takes CPUs three fifths of the time that it takes where products transpose for their own.
  """
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  scores = jnp.einsum("bhld,bhmd->bhlm", q * np.float32(q.shape[-1] ** -0.5), k)
  if bias is not None:
    scores = scores + bias
  return jnp.einsum("bhlm,bhmd->bhld", jax.nn.softmax(scores), v).swapaxes(1, 2)


def with_bias(q, k, v, key_bias):
  """`q, k, v [B, L, H, d]` with `key_bias [B, M]` inside, for kernels that take none.

  Three more features, one in the query and the bias in the key, in pieces that bfloat16 holds
  exactly; then zeros up to a width that the kernels take. Scores are to be scaled by the old
  `d ** -0.5`, and the output's features beyond d dropped.
  """
  size = q.shape[-1]
  rest, pieces = jnp.maximum(key_bias, MASKED) * size ** 0.5, []
  for _ in range(3):
    pieces.append(jax.lax.reduce_precision(rest, 8, 7))
    rest = rest - pieces[-1]
  pieces = jnp.stack(pieces, axis=-1)[:, :, None]
  pieces = jnp.broadcast_to(pieces, (*k.shape[:3], 3)).astype(k.dtype)
  step = 8 if size + 3 <= 128 else 128
  fill = lambda x: jnp.pad(x, [(0, 0)] * 3 + [(0, -(-(size + 3) // step) * step - x.shape[-1])])
  q = jnp.concatenate([q, jnp.ones((*q.shape[:3], 3), q.dtype)], axis=-1)
  return fill(q), fill(jnp.concatenate([k, pieces], axis=-1)), fill(v)


def platform() -> str:
  """"cpu", "gpu" or "tpu": of the mesh in force, else JAX's default."""
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  if device is None:
    return jax.default_backend()
  kind = device.device_kind
  return "tpu" if kind.startswith("TPU") else "cpu" if kind.lower() == "cpu" else "gpu"


def flash_block(queries: int, keys: int) -> int | None:
  """Tokens per block of the Pallas kernel; None where it does not pay.

  The widest that divides both lengths, or else to whose multiple both can be padded with a tenth
  more at most.
  """
  if min(queries, keys) < LONG:
    return None
  fits = lambda b, more: all(-n % b <= more * n for n in (queries, keys))
  return next((b for more in (0, 0.1) for b in (512, 256, 128) if fits(b, more)), 128)


def tpu_flash(q, k, v, key_bias=None):
  """`[B, L, H, d], [B, M, H, d], [B, M, H, d] -> [B, L, H, d]` by JAX's flash attention for TPUs.

  XLA cannot split the kernel over chips: each is given its own rows and heads here. `key_bias` as
  in `attend`; lengths that the block does not divide are padded, and the keys among it masked.
  """
  from jax.experimental.pallas.ops.tpu import flash_attention as kernel
  (B, queries, heads, size), keys = q.shape, k.shape[1]
  b = flash_block(queries, keys)
  if keys % b and key_bias is None:
    key_bias = jnp.zeros((B, keys), jnp.float32)
  pad = lambda x, n, value=0.0: jnp.pad(
      x, [(0, 0), (0, -n % b)] + [(0, 0)] * (x.ndim - 2), constant_values=value)
  q, k, v = pad(q, queries), pad(k, keys), pad(v, keys)
  if key_bias is not None:
    q, k, v = with_bias(q, k, v, pad(key_bias, keys, MASKED))
  blocks = kernel.BlockSizes(
      block_q=b, block_k_major=b, block_k=b, block_b=1, block_q_major_dkv=b, block_k_major_dkv=b,
      block_k_dkv=b, block_q_dkv=b, block_k_major_dq=b, block_k_dq=b, block_q_dq=b)

  def local(*qkv):
    out = kernel.flash_attention(*(x.swapaxes(1, 2) for x in qkv), block_sizes=blocks,
                                 sm_scale=size ** -0.5)
    return out.swapaxes(1, 2)
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:
    spec = P(BATCH[0] if B % batch_shards(mesh) == 0 else None, None,
             "tensor" if heads % mesh.shape["tensor"] == 0 else None, None)
    local = jax.shard_map(local, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
  return local(q, k, v)[:, :queries, :, :size]
