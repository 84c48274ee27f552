"""LPIPS: how different two images look, by the features of AlexNet or VGG-16.

  d(a, b) = sum_l mean_hw sum_c w_lc (f_lc(a) / |f_l(a)| - f_lc(b) / |f_l(b)|)^2

f_l are the activations of five layers, w_l >= 0 the published heads. Zhang et al. 2018, "The
Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (arXiv 1801.03924), equation 1,
version 0.1 of the weights.
"""
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.convert.clip import read_weights
from jaxalign.errors import UserError

SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)       # of pixels in [-1, 1]
SCALE = np.array([0.458, 0.448, 0.450], np.float32)


class Layer(NamedTuple):
  """A convolution with ReLU: its place in torchvision's `features`, and what comes before it.

  `pool`: size of the max pooling before it, of stride 2, or 0. `read`: LPIPS reads its output.
  """
  index: int
  features: int
  kernel: int = 3
  stride: int = 1
  pad: int = 1
  pool: int = 0
  read: bool = True


NETWORKS = {
    "alex": (Layer(0, 64, 11, 4, 2), Layer(3, 192, 5, 1, 2, pool=3), Layer(6, 384, pool=3),
             Layer(8, 256), Layer(10, 256)),
    "vgg": (Layer(0, 64, read=False), Layer(2, 64),
            Layer(5, 128, pool=2, read=False), Layer(7, 128),
            Layer(10, 256, pool=2, read=False), Layer(12, 256, read=False), Layer(14, 256),
            Layer(17, 512, pool=2, read=False), Layer(19, 512, read=False), Layer(21, 512),
            Layer(24, 512, pool=2, read=False), Layer(26, 512, read=False), Layer(28, 512)),
}


class Features(nn.Module):
  """`[B, H, W, 3]` in [0, 1] -> the activations that LPIPS reads, a list of `[B, h, w, c]`."""
  network: str

  @nn.compact
  def __call__(self, images):
    x, out = (2 * images - 1 - SHIFT[None, None, None]) / SCALE[None, None, None], []
    for layer in NETWORKS[self.network]:
      if layer.pool:
        x = nn.max_pool(x, (layer.pool,) * 2, (2, 2))
      x = nn.relu(nn.Conv(layer.features, (layer.kernel,) * 2, layer.stride, layer.pad,
                          name=f"features_{layer.index}")(x))
      if layer.read:
        out.append(x)
    return out


def load_lpips(network: str, weights, heads) -> dict:
  """Parameters for `lpips`.

  Args:
    network: "alex" or "vgg".
    weights: torchvision's classifier, such as `alexnet-owt-7be5be79.pth`, or safetensors.
    heads: LPIPS's own, `alex.pth` or `vgg.pth` of version 0.1, or safetensors.
  Raises:
    UserError: no such network, or a file is missing or holds something else.
  """
  if network not in NETWORKS:
    raise UserError(f"--network={network}: there are {', '.join(NETWORKS)}")
  module = Features(network)
  shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
  widths = [layer.features for layer in NETWORKS[network] if layer.read]
  head_shapes = {f"lin{i}": {"kernel": jax.ShapeDtypeStruct((1, 1, width, 1), jnp.float32)}
                 for i, width in enumerate(widths)}
  ours = lambda tensors: {k.replace("features.", "features_").replace(".model.1", ""): x
                          for k, x in tensors.items() if not k.startswith("classifier.")}
  found = {"features": read_weights(weights, network, shapes, ours),
           "heads": read_weights(heads, "lpips", head_shapes, ours)}
  if any((head["kernel"] < 0).any() for head in found["heads"].values()):
    raise UserError(f"{heads}: has negative weights, with which LPIPS is no distance")
  return found


def lpips(network: str, params: dict, a, b):
  """Distances `[B]` >= 0 of images `a` and `b`, `[B, H, W, 3]` in [0, 1], at least 32 pixels."""
  unit = lambda f: f / (jnp.linalg.norm(f, axis=-1, keepdims=True) + 1e-10)
  total = jnp.zeros(a.shape[0])
  of = lambda x: Features(network).apply({"params": params["features"]}, x)
  for i, (fa, fb) in enumerate(zip(of(a), of(b), strict=True)):
    head = params["heads"][f"lin{i}"]["kernel"][0, 0, :, 0]
    total += (jnp.square(unit(fa) - unit(fb)) @ head).mean((1, 2))
  return total
