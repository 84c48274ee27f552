"""A text-to-image model: its networks, its parameters and what is needed to write it back."""
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import UserError
from jaxalign.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from jaxalign.models.tokenizer import Tokenizer
from jaxalign.models.unet import UNet2DConditionModel
from jaxalign.models.vae import AutoencoderKL


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
    params: one nested dict of numpy f32 arrays for each name in `networks`.
    configs: the JSON files as read: "model_index", "scheduler", and those of `networks`.
    text_encoder_2, tokenizer_2: the second text encoder and its tokenizer in Stable Diffusion XL;
      None elsewhere.
    size: height and width of the images in pixels; None for those the checkpoint was made for.
    stored: model name -> parameter path ("a/b/kernel") -> `Stored`; empty for new weights.
    extras: model name -> tensors of the file that are not parameters, such as position ids.
  """
  unet: UNet2DConditionModel
  vae: AutoencoderKL
  text_encoder: CLIPTextModel
  tokenizer: Tokenizer
  params: dict[str, Any]
  configs: dict[str, dict]
  text_encoder_2: CLIPTextModelWithProjection | None = None
  tokenizer_2: Tokenizer | None = None
  size: tuple[int, int] | None = None
  stored: dict[str, dict[str, Stored]] = dataclasses.field(default_factory=dict)
  extras: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)

  @classmethod
  def build(cls, configs: dict[str, dict], tokenizer: Tokenizer, params=None, *,
            tokenizer_2: Tokenizer | None = None, seed: int = 0, dtype="float32",
            remat: str = "none") -> "Pipeline":
    """Pipeline from JSON configs, with `params`, or where None with random ones from `seed`.

    Where `configs` has a "text_encoder_2", it is Stable Diffusion XL, and has a `tokenizer_2`.

    Raises:
      UserError: a config describes a network that is not supported, or the UNet takes something
        else than the text encoders give.
    """
    second = None
    if "text_encoder_2" in configs:
      second = CLIPTextModelWithProjection.from_config(configs["text_encoder_2"], jnp.dtype(dtype))
    pipeline = cls(UNet2DConditionModel.from_config(configs["unet"], dtype=dtype, remat=remat),
                   AutoencoderKL.from_config(configs["vae"], dtype=dtype, remat=remat),
                   CLIPTextModel.from_config(configs["text_encoder"], dtype=jnp.dtype(dtype)),
                   tokenizer, params, configs, second, tokenizer_2)
    pipeline._check_widths()
    if params is None:
      params = random_params(pipeline.param_shapes(), seed)
    return dataclasses.replace(pipeline, params=params)

  @property
  def scheduler_config(self) -> dict:
    """The parsed `scheduler/scheduler_config.json`."""
    return self.configs["scheduler"]

  @property
  def text_encoders(self) -> tuple[str, ...]:
    """Names of the text encoders, in the order in which their states are joined."""
    return ("text_encoder", "text_encoder_2") if self.text_encoder_2 else ("text_encoder",)

  @property
  def networks(self) -> tuple[str, ...]:
    """Names of all networks, and so the keys of `params`."""
    return ("unet", "vae", *self.text_encoders)

  @property
  def image_size(self) -> tuple[int, int]:
    """Height and width of the images in pixels."""
    return self.size or (self.unet.config.sample_size * self.vae.factor,) * 2

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """`(h, w, c)` of the latents of images of `image_size`."""
    height, width = self.image_size
    return height // self.vae.factor, width // self.vae.factor, self.unet.config.in_channels

  def resized(self, height: int, width: int) -> "Pipeline":
    """The same for images of that many pixels; 0 stands for the checkpoint's own size.

    Raises:
      UserError: not a whole number of latents; names the config key.
    """
    factor, own = self.vae.factor, self.unet.config.sample_size * self.vae.factor
    for key, pixels in (("height", height), ("width", width)):
      if pixels % factor:
        raise UserError(f"sample.{key}={pixels} is not a multiple of {factor}, the pixels of this "
                        "model's autoencoder per latent")
    return dataclasses.replace(self, size=(height or own, width or own))

  def _check_widths(self) -> None:
    """UserError unless the UNet takes what the text encoders give."""
    config, towers = self.unet.config, [getattr(self, name).config for name in self.text_encoders]
    widths = [tower.hidden_size for tower in towers]
    if sum(widths) != config.cross_attention_dim:
      raise UserError(f"unet/config.json: cross_attention_dim = {config.cross_attention_dim}, but "
                      f"the states of {' and '.join(self.text_encoders)} are "
                      f"{' + '.join(map(str, widths))} wide")
    kind = "text_time" if self.text_encoder_2 else None
    if config.addition_embed_type != kind:
      raise UserError(f"unet/config.json: addition_embed_type = {config.addition_embed_type!r}, "
                      f"which with {' and '.join(self.text_encoders)} is {kind!r}")
    if kind:
      taken, times = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
      if towers[1].projection_dim + 6 * times != taken:
        raise UserError(f"unet/config.json: projection_class_embeddings_input_dim = {taken} is not "
                        f"the projection_dim of text_encoder_2, {towers[1].projection_dim}, plus 6 "
                        f"times addition_time_embed_dim, {times}")

  def param_shapes(self) -> dict[str, Any]:
    """The trees of `jax.ShapeDtypeStruct` that `params` must have; computes nothing."""
    key = jax.random.key(0)
    # The smallest image: every level of the autoencoder needs at least one pixel.
    image = jnp.zeros((1, self.vae.factor, self.vae.factor, self.vae.config.in_channels))
    inputs = {"unet": self.unet.example_inputs(), "vae": (image,),
              **{name: (jnp.zeros((1, 2), jnp.int32),) for name in self.text_encoders}}
    return {name: jax.eval_shape(getattr(self, name).init, key, *inputs[name])["params"]
            for name in self.networks}

  def denoise(self, variables, x_t, t, cond):
    """The denoiser: prediction `[B, h, w, c]` f32 at train timestep `t` (`[]` or `[B]`).

    Args:
      variables: `{"params": unet tree}`, and `"lora"` where there is an adapter.
      x_t: `[B, h, w, c]` noisy scaled latents.
      t: 0 to 999, 999 noisiest.
      cond: as `encode_prompts` returns it.
    """
    return self.unet.apply(variables, x_t, t, cond["text"], cond.get("added"))

  def tokenize(self, prompts: list[str]) -> dict[str, np.ndarray]:
    """Token ids `[B, L]` int32 for each text encoder, what `encode_prompts` takes."""
    ids = {"text_encoder": self.tokenizer(prompts)}
    return {**ids, "text_encoder_2": self.tokenizer_2(prompts)} if self.tokenizer_2 else ids

  @property
  def text_params(self) -> dict[str, Any]:
    """The part of `params` that `encode_prompts` reads."""
    return {name: self.params[name] for name in self.text_encoders}

  def encode_prompts(self, params, ids) -> dict:
    """What `denoise` takes as `cond`; every leaf has B as leading axis and is f32.

    Args:
      params: as `text_params`.
      ids: as `tokenize` returns them.
    Returns:
      `{"text": [B, L, D]}`: states after the last layer and its norm. For Stable Diffusion XL the
      states before the last layer of both encoders side by side, and `"added"`: `text_embeds
      [B, P]`, the second encoder's projection, and `time_ids [B, 6]`: original height and width,
      top and left of the crop, target height and width, in pixels: here an uncropped image of
      `image_size`; to be replaced where images of other sizes are trained on. There the empty
      prompt gives zeros for both embeddings, as the null condition of these checkpoints is
      (`force_zeros_for_empty_prompt`).
    """
    outs = [getattr(self, name).apply({"params": params[name]}, ids[name])
            for name in self.text_encoders]
    if self.text_encoder_2 is None:
      return {"text": outs[0].last_hidden_state.astype(jnp.float32)}
    text = jnp.concatenate([out.penultimate for out in outs], axis=-1).astype(jnp.float32)
    pooled = outs[1].projected.astype(jnp.float32)
    if self.configs["model_index"].get("force_zeros_for_empty_prompt", True):
      empty = ids["text_encoder"][:, 1] == self.tokenizer.eos_id       # right after the start token
      text = jnp.where(empty[:, None, None], 0.0, text)
      pooled = jnp.where(empty[:, None], 0.0, pooled)
    size = jnp.asarray(self.image_size, jnp.float32)
    time_ids = jnp.concatenate([size, jnp.zeros(2), size])
    time_ids = jnp.broadcast_to(time_ids[None], (text.shape[0], 6))
    return {"text": text, "added": {"text_embeds": pooled, "time_ids": time_ids}}
