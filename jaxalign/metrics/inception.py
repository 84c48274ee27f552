"""The Inception network of FID: images to 2,048 features.

Inception v3 as it was published in TensorFlow in 2015, which differs from torchvision's in its
pooling: averages leave the border's padding out, and the last block takes a maximum. Parameter
paths are those of `pt_inception-2015-12-05`, the port that PyTorch's FID programs share.

Szegedy et al. 2016, "Rethinking the Inception Architecture" (arXiv 1512.00567); Heusel et al. 2017
(arXiv 1706.08500).
"""
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.convert.clip import read_weights

SIZE = 299


class Conv(nn.Module):
  """Convolution without bias, fixed batch normalisation, ReLU."""
  features: int
  kernel: tuple[int, int] = (1, 1)
  stride: int = 1
  same: bool = True

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(self.features, self.kernel, (self.stride,) * 2, "SAME" if self.same else "VALID",
                use_bias=False, name="conv")(x)
    return nn.relu(BatchNorm(name="bn")(x))


class BatchNorm(nn.Module):
  """Normalisation by stored statistics."""

  @nn.compact
  def __call__(self, x):
    of = lambda name, init: self.param(name, init, (x.shape[-1],))
    scale, bias = of("scale", nn.initializers.ones), of("bias", nn.initializers.zeros)
    mean, var = of("running_mean", nn.initializers.zeros), of("running_var", nn.initializers.ones)
    factor = scale * jax.lax.rsqrt(var + 1e-3)
    return x * factor[None, None, None] + (bias - mean * factor)[None, None, None]


def _average(x):
  return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _maximum(x, stride: int):
  return nn.max_pool(x, (3, 3), (stride, stride), "SAME" if stride == 1 else "VALID")


class Mixed(nn.Module):
  """Branches side by side, each a chain of `(name, features, kernel, stride)`.

  A chain may end in a tuple of two convolutions, which both read what comes before. `pool` is what
  the last branch begins with; its convolution, if any, is `branch_pool`.
  """
  branches: tuple
  pool: str = "average"
  pool_features: int = 0

  @nn.compact
  def __call__(self, x):
    def conv(spec, h):
      name, features, *rest = spec
      kernel, stride = (*rest, *((1, 1), 1)[len(rest):])
      return Conv(features, kernel, stride, same=stride == 1, name=f"branch{name}")(h)
    out = []
    for chain in self.branches:
      h = x
      for spec in chain:
        if isinstance(spec[0], tuple):
          h = jnp.concatenate([conv(part, h) for part in spec], -1)
        else:
          h = conv(spec, h)
      out.append(h)
    h = {"average": _average, "maximum": lambda x: _maximum(x, 1),
         "halve": lambda x: _maximum(x, 2)}[self.pool](x)
    out.append(conv(("_pool", self.pool_features), h) if self.pool_features else h)
    return jnp.concatenate(out, -1)


def _a(pool_features):
  return dict(pool_features=pool_features, branches=(
      (("1x1", 64),),
      (("5x5_1", 48), ("5x5_2", 64, (5, 5))),
      (("3x3dbl_1", 64), ("3x3dbl_2", 96, (3, 3)), ("3x3dbl_3", 96, (3, 3)))))


def _b():
  return dict(pool="halve", branches=(
      (("3x3", 384, (3, 3), 2),),
      (("3x3dbl_1", 64), ("3x3dbl_2", 96, (3, 3)), ("3x3dbl_3", 96, (3, 3), 2))))


def _c(width):
  row, column = (1, 7), (7, 1)
  return dict(pool_features=192, branches=(
      (("1x1", 192),),
      (("7x7_1", width), ("7x7_2", width, row), ("7x7_3", 192, column)),
      (("7x7dbl_1", width), ("7x7dbl_2", width, column), ("7x7dbl_3", width, row),
       ("7x7dbl_4", width, column), ("7x7dbl_5", 192, row))))


def _d():
  return dict(pool="halve", branches=(
      (("3x3_1", 192), ("3x3_2", 320, (3, 3), 2)),
      (("7x7x3_1", 192), ("7x7x3_2", 192, (1, 7)), ("7x7x3_3", 192, (7, 1)),
       ("7x7x3_4", 192, (3, 3), 2))))


def _e(pool):
  both = lambda name: ((f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1)))
  return dict(pool=pool, pool_features=192, branches=(
      (("1x1", 320),),
      (("3x3_1", 384), both("3x3_2")),
      (("3x3dbl_1", 448), ("3x3dbl_2", 384, (3, 3)), both("3x3dbl_3"))))


BLOCKS = {"5b": _a(32), "5c": _a(64), "5d": _a(64), "6a": _b(), "6b": _c(128), "6c": _c(160),
          "6d": _c(160), "6e": _c(192), "7a": _d(), "7b": _e("average"), "7c": _e("maximum")}


class Inception(nn.Module):
  """`[B, 299, 299, 3]` from `fit` -> `[B, 2048]`, averaged over the last 8x8 positions."""
  FEATURES = 2048

  @nn.compact
  def __call__(self, x):
    x = Conv(32, (3, 3), 2, same=False, name="Conv2d_1a_3x3")(x)
    x = Conv(32, (3, 3), same=False, name="Conv2d_2a_3x3")(x)
    x = _maximum(Conv(64, (3, 3), name="Conv2d_2b_3x3")(x), 2)
    x = Conv(80, name="Conv2d_3b_1x1")(x)
    x = _maximum(Conv(192, (3, 3), same=False, name="Conv2d_4a_3x3")(x), 2)
    for name, block in BLOCKS.items():
      x = Mixed(**block, name=f"Mixed_{name}")(x)
    return x.mean((1, 2))


def load_inception(file):
  """Parameters out of `pt_inception-2015-12-05-6726825d.pth`, or the same as safetensors.

  Raises:
    UserError: the file is missing or holds something else.
  """
  shapes = jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
  keep = lambda tensors: {name: x for name, x in tensors.items() if not name.startswith(
      ("fc.", "AuxLogits.")) and not name.endswith("num_batches_tracked")}
  return read_weights(pathlib.Path(file), "inception", shapes["params"], keep)


def fit(images):
  """`[B, H, W, 3]` in [0, 1], any size -> `[B, 299, 299, 3]` in [-1, 1].

  Scaled bilinearly without antialiasing, as PyTorch's FID programs do.
  """
  x = jax.image.resize(images, (images.shape[0], SIZE, SIZE, 3), "linear", antialias=False)
  return 2 * x - 1
