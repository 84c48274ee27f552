"""Autoencoder: parity with PyTorch diffusers, tree paths, size, scaled latents."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import waves
from jaxalign.convert import names
from jaxalign.errors import UserError
from jaxalign.models.pipeline import random_params
from jaxalign.models.vae import AutoencoderKL, decode_images, encode_images

pytestmark = pytest.mark.usefixtures("compile_quickly")

SMALL = dict(block_out_channels=[16, 32], layers_per_block=1, norm_num_groups=8,
             down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
             scaling_factor=0.7, shift_factor=0.1)
FULL = dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
# Of Stable Diffusion 3: no 1x1 convolutions around 16 channels.
SMALL16 = dict(SMALL, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
FULL16 = dict(FULL, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)


@functools.cache
def shapes_of(vae):
  image = jnp.zeros((1, vae.factor, vae.factor, 3))
  return jax.eval_shape(vae.init, jax.random.key(0), image)["params"]


@pytest.fixture(scope="module")
def small():
  vae = AutoencoderKL.from_config(SMALL)
  params = random_params(shapes_of(vae), 0)
  rng = np.random.default_rng(0)
  return vae, params, rng.uniform(size=(2, 12, 12, 3)).astype(np.float32)


@pytest.mark.parametrize("config", [SMALL, SMALL16, dict(SMALL, use_post_quant_conv=False)],
                         ids=["sd1", "sd3", "one_convolution"])
def test_encode_and_decode_equal_pytorch(config, small):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  vae, images = AutoencoderKL.from_config(config), small[2]
  params = random_params(shapes_of(vae), 0)
  flat = traverse_util.flatten_dict(params, sep="/")
  model = diffusers.AutoencoderKL(**config).eval()
  model.load_state_dict({names.new_vae_name(names.torch_name(p)):
                         torch.from_numpy(names.to_torch(p, x)) for p, x in flat.items()})
  x = torch.from_numpy(images).permute(0, 3, 1, 2)
  nhwc = lambda y: y.permute(0, 2, 3, 1).numpy()
  with torch.no_grad():
    posterior = model.encode(2 * x - 1).latent_dist
    decoded = model.decode(posterior.mean).sample
  encode = jax.jit(lambda p, x: vae.apply({"params": p}, x, method="encode"))
  mean, logvar = encode(params, 2 * images - 1)
  np.testing.assert_allclose(mean, nhwc(posterior.mean), atol=1e-5, rtol=0)
  np.testing.assert_allclose(logvar, nhwc(posterior.logvar), atol=1e-5, rtol=0)

  latents = jax.jit(lambda p, x: encode_images(vae, p, x))(params, images)
  np.testing.assert_allclose(latents, (mean - 0.1) * 0.7, atol=1e-6)
  ours = jax.jit(lambda p, z: decode_images(vae, p, z))(params, latents)
  np.testing.assert_allclose(ours, np.clip(nhwc(decoded) / 2 + 0.5, 0, 1), atol=1e-5, rtol=0)


def test_posterior_noise_is_scaled_with_the_latents(small):
  vae, params, images = small
  noise = np.random.default_rng(1).standard_normal((2, 6, 6, 4)).astype(np.float32)
  mean, logvar = vae.apply({"params": params}, 2 * images - 1, method="encode")
  latents = encode_images(vae, params, images, noise)
  np.testing.assert_allclose(latents, (mean + np.exp(logvar / 2) * noise - 0.1) * 0.7, atol=1e-5)


@pytest.mark.parametrize("config", [SMALL, FULL], ids=["small", "full"])
def test_tree_equals_that_of_the_flax_class(config):
  diffusers = pytest.importorskip("diffusers")
  if not hasattr(diffusers, "FlaxAutoencoderKL"):
    pytest.skip("this version of diffusers has no Flax classes")
  config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
  theirs = diffusers.FlaxAutoencoderKL(**{k: v for k, v in config.items() if k != "shift_factor"})
  theirs = jax.eval_shape(theirs.init_weights, jax.random.key(0))
  flatten = lambda tree: {k: v.shape for k, v in traverse_util.flatten_dict(tree, sep="/").items()}
  assert flatten(shapes_of(AutoencoderKL.from_config(config))) == flatten(theirs)


@pytest.mark.parametrize("config, count", [(FULL, 83_653_863), (FULL16, 83_819_683)],
                         ids=["sd1", "sd3"])
def test_full_size(config, count):
  shapes = jax.tree.leaves(shapes_of(AutoencoderKL.from_config(config)))
  assert sum(leaf.size for leaf in shapes) == count


def test_golden():
  """Without quant convolutions: decoded from scaled latents, and the posterior of an image."""
  vae = AutoencoderKL.from_config(dict(
      block_out_channels=[8, 12], layers_per_block=1, norm_num_groups=4, latent_channels=16,
      down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
      scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False))
  params = waves.parameters(shapes_of(vae))
  image, mean, logvar = waves.golden("vae")
  decoded = jax.jit(lambda p, z: decode_images(vae, p, z, clamp=False))(
      params, waves.inputs("latents", 1, 16, 3, 4))
  np.testing.assert_allclose(2 * decoded - 1, image, rtol=0, atol=1e-5 * np.abs(image).max())
  got = jax.jit(lambda p, x: vae.apply({"params": p}, x, method="encode"))(
      params, waves.inputs("image", 1, 3, 6, 8))
  np.testing.assert_allclose(got[0], mean, rtol=0, atol=1e-5 * np.abs(mean).max())
  np.testing.assert_allclose(got[1], logvar, rtol=0, atol=1e-5 * np.abs(logvar).max())


def test_bf16_decodes_to_clamped_f32(small):
  vae, params, _ = small
  half = AutoencoderKL.from_config(SMALL, dtype="bfloat16")
  z = np.random.default_rng(2).standard_normal((1, 4, 4, 4)).astype(np.float32) * 3
  exact, out = (jax.jit(lambda p, z: decode_images(model, p, z))(params, z)
                for model in (vae, half))
  assert out.dtype == jnp.float32 and out.min() >= 0 and out.max() <= 1
  assert np.abs(out - exact).max() < 0.05


@pytest.mark.parametrize("key, value", [
    ("act_fn", "relu"), ("mid_block_add_attention", False), ("use_quant_conv", 1),
    ("latents_mean", [0.0]), ("_class_name", "VQModel"), ("norm_num_groups", 5),
    ("down_block_types", ["AttnDownEncoderBlock2D"] * 2),
])
def test_unsupported_config_names_key(key, value):
  with pytest.raises(UserError, match=key):
    AutoencoderKL.from_config({**SMALL, key: value})


def test_remat_changes_neither_output_nor_tree_nor_gradient(small):
  vae, params, images = small
  rematted = AutoencoderKL.from_config(SMALL, remat="block")
  assert jax.tree.structure(shapes_of(rematted)) == jax.tree.structure(params)
  latents = encode_images(vae, params, images)
  loss = lambda model: jax.jit(jax.value_and_grad(
      lambda z: jnp.square(decode_images(model, params, z, clamp=False)).sum()))
  value, gradient = loss(vae)(latents)
  again, gradient_again = loss(rematted)(latents)
  np.testing.assert_allclose(again, value, rtol=1e-6)
  np.testing.assert_allclose(gradient_again, gradient, atol=1e-5 * np.abs(gradient).max())
  assert "remat" in str(jax.make_jaxpr(loss(rematted))(latents))
