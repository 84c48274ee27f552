"""A text-to-image model: its networks, its parameters and what is needed to write it back."""
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.clip import CLIPTextModel
from jaxalign.models.tokenizer import Tokenizer
from jaxalign.models.unet import UNet2DConditionModel
from jaxalign.models.vae import AutoencoderKL

MODELS = ("unet", "vae", "text_encoder")


@dataclasses.dataclass(frozen=True)
class Stored:
  """How a tensor lies on disk: its name in the file and its dtype, such as "float16"."""
  name: str
  dtype: str


def random_params(shapes, seed: int):
  """New numpy f32 parameters for a tree of `jax.ShapeDtypeStruct`.

  Kernels are normal with variance 1 / fan-in, embeddings normal with 0.02, norms start as the
  identity. Drawn by numpy: the same on every device, without compiling a program per network.
  """
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    kind = path[-1].key
    if kind in ("scale", "bias"):
      return np.full(leaf.shape, float(kind == "scale"), np.float32)
    std = 0.02 if kind == "embedding" else math.prod(leaf.shape[:-1]) ** -0.5
    return (std * rng.standard_normal(leaf.shape)).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
  """Static networks beside their parameters. Compared and hashed by identity.

  Build with `Pipeline.build` (new weights) or `jaxalign.convert.load_pipeline` (a checkpoint).

  Attributes:
    unet, vae, text_encoder: Linen modules, that is descriptions without weights.
    tokenizer: `tokenizer(prompts) -> [B, L]` int32.
    params: `{"unet", "vae", "text_encoder"}`, nested dicts of numpy f32 arrays.
    configs: the JSON files as read: "model_index", "scheduler", "unet", "vae", "text_encoder".
    stored: model name -> parameter path ("a/b/kernel") -> `Stored`; empty for new weights.
    extras: model name -> tensors of the file that are not parameters, such as position ids.
  """
  unet: UNet2DConditionModel
  vae: AutoencoderKL
  text_encoder: CLIPTextModel
  tokenizer: Tokenizer
  params: dict[str, Any]
  configs: dict[str, dict]
  stored: dict[str, dict[str, Stored]] = dataclasses.field(default_factory=dict)
  extras: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)

  @classmethod
  def build(cls, configs: dict[str, dict], tokenizer: Tokenizer, params=None, *, seed: int = 0,
            dtype="float32", remat: str = "none") -> "Pipeline":
    """Pipeline from JSON configs, with `params`, or where None with random ones from `seed`.

    Raises:
      UserError: a config describes a network that is not supported.
    """
    pipeline = cls(UNet2DConditionModel.from_config(configs["unet"], dtype=dtype, remat=remat),
                   AutoencoderKL.from_config(configs["vae"], dtype=dtype),
                   CLIPTextModel.from_config(configs["text_encoder"], dtype=jnp.dtype(dtype)),
                   tokenizer, params, configs)
    if params is None:
      params = random_params(pipeline.param_shapes(), seed)
    return dataclasses.replace(pipeline, params=params)

  @property
  def scheduler_config(self) -> dict:
    """The parsed `scheduler/scheduler_config.json`."""
    return self.configs["scheduler"]

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """`(h, w, c)` of the latents the checkpoint was made for."""
    config = self.unet.config
    return config.sample_size, config.sample_size, config.in_channels

  def param_shapes(self) -> dict[str, Any]:
    """The trees of `jax.ShapeDtypeStruct` that `params` must have; computes nothing."""
    key = jax.random.key(0)
    # The smallest image: every level of the autoencoder needs at least one pixel.
    image = jnp.zeros((1, self.vae.factor, self.vae.factor, self.vae.config.in_channels))
    inputs = {"unet": self.unet.example_inputs(), "vae": (image,),
              "text_encoder": (jnp.zeros((1, 2), jnp.int32),)}
    return {name: jax.eval_shape(getattr(self, name).init, key, *inputs[name])["params"]
            for name in MODELS}

  def denoise(self, variables, x_t, t, cond):
    """The denoiser: prediction `[B, h, w, c]` f32 at train timestep `t` (`[]` or `[B]`).

    Args:
      variables: `{"params": unet tree}`, and `"lora"` where there is an adapter.
      x_t: `[B, h, w, c]` noisy scaled latents.
      t: 0 to 999, 999 noisiest.
      cond: as `encode_prompts` returns it.
    """
    return self.unet.apply(variables, x_t, t, cond["text"], cond.get("added"))

  def encode_prompts(self, params_text, ids) -> dict:
    """Token ids `[B, L]` -> `{"text": [B, L, D]}` f32, what `denoise` takes as `cond`."""
    out = self.text_encoder.apply({"params": params_text}, ids)
    return {"text": out.last_hidden_state.astype(jnp.float32)}
