"""The optimiser of pretraining: AdamW, or Muon for kernels and AdamW for the rest.

Muon (Jordan et al. 2024) moves a matrix along its momentum with all singular values set to one,
which needs fewer pictures than AdamW here. A convolution's kernel is a matrix from its window's
inputs to its outputs.
"""
import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxalign.config import schema
from jaxalign.config.fields import NonNegative
from jaxalign.methods.shared.optimizer import learning_rate

# Inputs and outputs of a network are no hidden matrices, nor is anything that is looked up; what
# scales and shifts a transformer's tokens ("linear") starts at zero, and Muon knows no small step.
_BY_ADAM = ("conv_in", "conv_out", "pos_embed", "proj_out", "linear")


@dataclasses.dataclass(frozen=True)
class OptimConfig(schema.OptimConfig):
  """Keys of the `optim` group: those of the methods' optimiser, and one more.

  Attributes:
    muon: learning rate of Muon for hidden kernels, in units of AdamW's (an update has root mean
      square 0.2 times the rate); 0 leaves all to AdamW.
  """
  muon: NonNegative = 0.0


def _which(tree):
  """"muon" for the kernels that it moves, "adam" for all else."""
  def of(path, leaf):
    del leaf
    names = [key.key for key in path]
    hidden = names[-1] == "kernel" and not set(names) & set(_BY_ADAM)
    return "muon" if hidden else "adam"
  return jax.tree_util.tree_map_with_path(of, tree)


# Of an odd polynomial that, applied five times, takes singular values in (0, 1] to about one; the
# first is its slope at zero (Jordan et al. 2024).
_SLOPE, _CUBIC, _QUINTIC = 3.4445, -4.7750, 2.0315
_BLOCKS = (3, 2)           # how many of the five in a row work on the Gram matrix


def orthogonal(x):
  """`x [n, m]` f32 with its singular values near one, by five steps of Newton-Schulz.

  A step is `x -> (s I + c A + q A^2) x` with `A = x x^T` of the short side. Where the other side is
  at least twice as long, the polynomials of a block are multiplied first, since A follows from
  the last A; small singular values lose digits in that, so that x takes part between the blocks.
  """
  tall = x.shape[0] >= x.shape[1]
  left = int(not tall)
  gram = lambda x: jax.lax.dot_general(x, x, (((left,), (left,)), ((), ())))
  times = (lambda factor, x: x @ factor) if tall else jnp.matmul
  x = x / (jnp.linalg.norm(x) + 1e-8)
  if max(x.shape) < 2 * min(x.shape):
    for _ in range(sum(_BLOCKS)):
      a = gram(x)
      x = _SLOPE * x + times(_CUBIC * a + _QUINTIC * (a @ a), x)
    return x
  for steps in _BLOCKS:
    a, product = gram(x), None
    for step in range(steps):
      factor = _SLOPE * jnp.eye(len(a)) + _CUBIC * a + _QUINTIC * (a @ a)
      product = factor if product is None else factor @ product
      if step < steps - 1:
        a = factor @ (a @ factor)
    x = times(product, x)
  return x


def _orthogonal_leaves(leaves):
  """`orthogonal` of each, outputs last; those of one shape in a loop, which is one program."""
  groups = collections.defaultdict(list)
  for index, leaf in enumerate(leaves):
    groups[leaf.shape].append(index)
  out = list(leaves)
  for shape, indices in groups.items():
    # Not `vmap`: a CPU takes one product after the other faster than all at once.
    made = jax.lax.map(orthogonal, jnp.stack(
        [leaves[index].reshape(-1, shape[-1]) for index in indices]))
    for index, matrix in zip(indices, made):
      out[index] = matrix.reshape(shape)
  return out


def _scale_by_muon(beta: float = 0.95) -> optax.GradientTransformation:
  """`optax.contrib.scale_by_muon`, with its state, and root mean squares of 0.2; all leaves."""
  def update(gradient, state, params=None):
    del params
    mu = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.mu, gradient)
    count = optax.safe_increment(state.count)
    correct = lambda count: 1 - beta ** count.astype(jnp.float32)
    ahead = jax.tree.map(lambda m, g: beta * (m / correct(count + 1))
                         + (1 - beta) * (g / correct(count)), mu, gradient)
    leaves, treedef = jax.tree.flatten(ahead)
    size = lambda a: 0.2 * math.sqrt(max(a.size // a.shape[-1], a.shape[-1]))
    leaves = [size(leaf) * leaf for leaf in _orthogonal_leaves(leaves)]
    return jax.tree.unflatten(treedef, leaves), state._replace(count=count, mu=mu)
  return optax.GradientTransformation(contrib.scale_by_muon().init, update)


def _muon(rate, weight_decay: float) -> optax.GradientTransformation:
  """`optax.contrib.muon` with `consistent_rms` 0.2 in less than half its time on a CPU.

  Its state is the same, the parts that have no leaves here too, and so are checkpoints.
  """
  chain = optax.chain(_scale_by_muon(), optax.identity(), optax.add_decayed_weights(weight_decay),
                      optax.scale_by_learning_rate(rate))
  return optax.partition({"muon": chain, "adam": optax.adamw(rate)},
                         lambda tree: jax.tree.map(lambda _: "muon", tree))


def make_optimizer(cfg: OptimConfig) -> optax.GradientTransformation:
  """Clipping, then AdamW or Muon, with warm-up and cosine decay; norms and biases don't decay."""
  clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
  decays = lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
  adam = optax.adamw(learning_rate(cfg), cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay,
                     mask=decays)
  if not cfg.muon:
    return optax.chain(clip, adam)
  muon = _muon(learning_rate(dataclasses.replace(cfg, lr=cfg.muon)), cfg.weight_decay)
  return optax.chain(clip, optax.partition({"adam": adam, "muon": muon}, _which))
