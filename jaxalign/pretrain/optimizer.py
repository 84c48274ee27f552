"""The optimiser of pretraining: AdamW, or Muon for kernels and AdamW for the rest.

Muon (Jordan et al. 2024) moves a matrix along its momentum with all singular values set to one,
which needs fewer pictures than AdamW here. A convolution's kernel is a matrix from its window's
inputs to its outputs.
"""
import dataclasses

import jax
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


def _matrices(tree):
  """What Muon orthogonalises of each leaf; None where it is AdamW's."""
  def of(path, leaf):
    names = [key.key for key in path]
    hidden = names[-1] == "kernel" and not set(names) & set(_BY_ADAM)
    return contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1) if (
        hidden) else None
  return jax.tree_util.tree_map_with_path(of, tree)


def make_optimizer(cfg: OptimConfig) -> optax.GradientTransformation:
  """Clipping, then AdamW or Muon, with warm-up and cosine decay; norms and biases don't decay."""
  clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
  decays = lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
  adam = optax.adamw(learning_rate(cfg), cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay,
                     mask=decays)
  if not cfg.muon:
    return optax.chain(clip, adam)
  muon = contrib.muon(
      learning_rate(dataclasses.replace(cfg, lr=cfg.muon)), weight_decay=cfg.weight_decay,
      consistent_rms=0.2, muon_weight_dimension_numbers=_matrices)
  which = lambda tree: jax.tree.map(
      lambda matrix, _: "adam" if matrix is None else "muon", _matrices(tree), tree,
      is_leaf=lambda leaf: leaf is None or isinstance(leaf, contrib.MuonDimensionNumbers))
  return optax.chain(clip, optax.partition({"adam": adam, "muon": muon}, which))
