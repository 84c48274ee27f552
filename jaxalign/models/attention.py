"""Attention: the plain form, or a fused kernel that holds no `[L, M]` matrix in memory."""
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxalign.devices.sharding import BATCH, batch_shards

# Below so many tokens the matrix is small, and XLA's own attention as fast.
LONG = 1024


def attend(q, k, v, heads: int):
  """Multi-head attention `[B, L, D], [B, M, D], [B, M, D] -> [B, L, D]`, softmax in f32.

  On GPUs cuDNN's kernel where it can run, on TPUs the Pallas one of JAX for long sequences. The
  platform is that of the mesh that `sharding.on_mesh` set, which may be one to compile for only.
  Several TPUs without such a mesh take the plain form: nothing says how to split the kernel.
  """
  q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
  target, head_size = platform(), q.shape[-1]
  splits = not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1
  if target == "tpu" and splits and flash_block(q.shape[1], k.shape[1]):
    out = tpu_flash(q, k, v)
  else:
    # cuDNN's fused kernel has these limits on every supported GPU.
    fused = (target == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16)
             and head_size <= 128 and head_size % 8 == 0)
    out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn" if fused else "xla")
  return out.reshape(*out.shape[:2], -1)


def platform() -> str:
  """"cpu", "gpu" or "tpu": of the mesh in force, else JAX's default."""
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  if device is None:
    return jax.default_backend()
  kind = device.device_kind
  return "tpu" if kind.startswith("TPU") else "cpu" if kind.lower() == "cpu" else "gpu"


def flash_block(queries: int, keys: int) -> int | None:
  """Tokens per block of the Pallas kernel; None where it does not pay or would not divide."""
  if min(queries, keys) < LONG:
    return None
  return next((b for b in (512, 256, 128) if queries % b == keys % b == 0), None)


def tpu_flash(q, k, v):
  """`[B, L, H, d], [B, M, H, d], [B, M, H, d] -> [B, L, H, d]` by JAX's flash attention for TPUs.

  XLA cannot split the kernel over chips: each is given its own rows and heads here.
  """
  from jax.experimental.pallas.ops.tpu import flash_attention as kernel
  b = flash_block(q.shape[1], k.shape[1])
  blocks = kernel.BlockSizes(
      block_q=b, block_k_major=b, block_k=b, block_b=1, block_q_major_dkv=b, block_k_major_dkv=b,
      block_k_dkv=b, block_q_dkv=b, block_k_major_dq=b, block_k_dq=b, block_q_dq=b)

  def local(*qkv):
    out = kernel.flash_attention(*(x.swapaxes(1, 2) for x in qkv), block_sizes=blocks,
                                 sm_scale=q.shape[-1] ** -0.5)
    return out.swapaxes(1, 2)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return local(q, k, v)
  spec = P(BATCH[0] if q.shape[0] % batch_shards(mesh) == 0 else None, None,
           "tensor" if q.shape[2] % mesh.shape["tensor"] == 0 else None, None)
  return jax.shard_map(local, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)
