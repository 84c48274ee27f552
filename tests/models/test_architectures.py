"""Published architectures: their parts fit together and have the published parameter counts."""
import jax
import jax.numpy as jnp
import pytest

from jaxalign.models.architectures import ARCHITECTURES
from jaxalign.models.clip import CLIPTextModelWithProjection
from jaxalign.models.mmdit import SD3Transformer2DModel
from jaxalign.models.t5 import T5EncoderModel
from jaxalign.models.vae import AutoencoderKL


def size(module, *inputs):
  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", ["sd3_medium", "sd35_medium", "sd35_large"])
def test_stable_diffusion_3(name):
  configs = ARCHITECTURES[name]
  transformer = SD3Transformer2DModel.from_config(configs["transformer"]).config
  vae = AutoencoderKL.from_config(configs["vae"])
  first, second = (CLIPTextModelWithProjection.from_config(configs[key])
                   for key in ("text_encoder", "text_encoder_2"))
  third = T5EncoderModel.from_config(configs["text_encoder_3"], "bfloat16")
  assert transformer.in_channels == vae.config.latent_channels
  assert transformer.sample_size * vae.factor == configs["vae"]["sample_size"]
  assert (first.config.hidden_size + second.config.hidden_size
          <= transformer.joint_attention_dim == third.config.d_model)
  assert (first.config.projection_dim + second.config.projection_dim
          == transformer.pooled_projection_dim)
  if name == "sd3_medium":                                 # the same in all three
    ids = jnp.zeros((1, 2), jnp.int32)
    assert size(first, ids) == 123_650_304
    assert size(second, ids) == 694_659_840
    assert size(third, ids) == 4_762_310_656
    assert size(vae, jnp.zeros((1, 8, 8, 3))) == 83_819_683
