"""A text-to-image model: its networks, its parameters and what is needed to write it back.

How the parts of a model work together is its family's business. A family is a file of this folder
with a subclass of `Pipeline`, named as the `_class_name` in the `model_index.json` of its
checkpoints; nobody else asks which family a model is of.
"""
import dataclasses
import functools
import importlib
import math
import pkgutil
import re
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxalign import models
from jaxalign.errors import UserError
from jaxalign.models.tokenizer import Tokenizer
from jaxalign.models.vae import AutoencoderKL, decode_images, encode_images


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


@functools.cache
def families() -> dict[str, type["Pipeline"]]:
  """`_class_name` of a checkpoint -> the subclass of `Pipeline` that is its family."""
  found = {}
  for file in pkgutil.iter_modules(models.__path__):
    module = importlib.import_module(f"{models.__name__}.{file.name}")
    found |= {name: kind for name, kind in vars(module).items()
              if isinstance(kind, type) and issubclass(kind, Pipeline) and kind is not Pipeline
              and kind.__module__ == module.__name__}
  return dict(sorted(found.items()))


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
  """Static networks beside their parameters. Compared and hashed by identity.

  Build with `Pipeline.build` (new weights) or `jaxalign.convert.load_pipeline` (a checkpoint); both
  give an object of the checkpoint's family. Networks, tokenizers and JSON files are known by their
  folder in a checkpoint.

  Attributes:
    networks: Linen modules, that is descriptions without weights: the denoiser, "vae" and the text
      encoders, in the order in which these are joined.
    tokenizers: `tokenizer(prompts) -> [B, L]` int32, one for each text encoder.
    params: one nested dict of numpy arrays for each of `networks`, f32 but for `as_stored`.
    configs: the JSON files as read: "model_index", "scheduler", and those of `networks`.
    size: height and width of the images in pixels; None for those the checkpoint was made for.
    stored: network -> parameter path ("a/b/kernel") -> `Stored`; empty for new weights.
    extras: network -> tensors of the file that are not parameters, such as position ids.

  What a family says of itself:
    denoiser_name: the denoiser's folder.
    components: folders of a checkpoint, and the classes that each may be of (None: any).
    optional: those of them that a checkpoint may lack.
    as_stored: networks so large that their parameters stay in the dtype of the file.
    formats: what checkpoints can be written as, see `save_pipeline`.
    lora_targets: what an adapter may cover -> pattern of the paths of those layers.
    starts_at_zero: pattern of the denoiser's parameters that are zero before it is trained, so that
      it predicts nothing at first.
  """
  networks: dict[str, nn.Module]
  tokenizers: dict[str, Tokenizer]
  params: dict[str, Any]
  configs: dict[str, dict]
  size: tuple[int, int] | None = None
  stored: dict[str, dict[str, Stored]] = dataclasses.field(default_factory=dict)
  extras: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)

  denoiser_name: ClassVar[str]
  components: ClassVar[dict[str, tuple[str, ...] | None]]
  optional: ClassVar[tuple[str, ...]] = ()
  as_stored: ClassVar[tuple[str, ...]] = ()
  formats: ClassVar[tuple[str, ...]] = ("diffusers",)
  lora_targets: ClassVar[dict[str, str]]
  starts_at_zero: ClassVar[str]

  @staticmethod
  def build(configs: dict[str, dict], tokenizers: dict[str, Tokenizer], params=None, *,
            seed: int = 0, dtype="float32", remat: str = "none") -> "Pipeline":
    """Pipeline from JSON configs, with `params`, or where None with random ones from `seed`.

    Raises:
      UserError: a config describes a network that is not supported, or the denoiser takes something
        else than the text encoders give.
    """
    name = configs["model_index"]["_class_name"].removeprefix("Flax")
    family = families()[name]
    pipeline = family(family.make_networks(configs, jnp.dtype(dtype), remat), tokenizers, params,
                      configs)
    pipeline.check_widths()
    if params is None:
      params = random_params(pipeline.param_shapes(), seed)
    return dataclasses.replace(pipeline, params=params)

  # What a family provides.

  @classmethod
  def make_networks(cls, configs: dict[str, dict], dtype, remat: str) -> dict[str, nn.Module]:
    """`networks` of these JSON files; UserError for what is not supported."""
    raise NotImplementedError

  def check_widths(self) -> None:
    """UserError unless the denoiser takes what the text encoders give."""
    raise NotImplementedError

  def denoise(self, variables, x_t, t, cond):
    """The denoiser: prediction `[B, h, w, c]` f32 at time `t` (`[]` or `[B]`).

    Args:
      variables: as the property of this name; with `"lora"` where there is an adapter.
      x_t: `[B, h, w, c]` noisy scaled latents.
      t: 0 to 999 or, in flow models, 1000; the larger the noisier.
      cond: as `encode_prompts` returns it.
    """
    raise NotImplementedError

  def encode_prompts(self, params, ids) -> dict:
    """What `denoise` takes as `cond`; every leaf has B as leading axis and is f32.

    Args:
      params: as `text_params`.
      ids: as `tokenize` returns them.
    """
    raise NotImplementedError

  def small(self) -> tuple[Callable, Callable]:
    """A small network on the denoiser's inputs, whose output starts at zero, for latents like ours.

    Returns:
      `init(key) -> params` and `apply(params, x_t, t, cond) -> [B, h, w, c]` f32.
    """
    raise NotImplementedError

  @property
  def pixel_step(self) -> int:
    """Height and width of an image are multiples of so many pixels."""
    return self.vae.factor

  @property
  def buffers(self) -> dict[str, dict[str, np.ndarray]]:
    """`extras` of a checkpoint that is written, with those that new weights lack."""
    return self.extras

  @property
  def constants(self) -> dict[str, Any]:
    """Collections beside `"params"` that the denoiser reads and nobody trains, at `image_size`."""
    return {}

  def with_origin(self, cond, origin):
    """`cond`, said to be of images with `origin [B, 4]`: height and width, crop's top and left.

    In pixels, as `jaxalign.data.pairs` gives it; for families that are told of it.
    """
    del origin
    return cond

  def tokenize(self, prompts: list[str]) -> dict[str, np.ndarray]:
    """Token ids `[B, L]` int32 for each text encoder, what `encode_prompts` takes."""
    return {name: self.tokenizers[name.replace("text_encoder", "tokenizer")](prompts)
            for name in self.text_encoders}

  def cut(self, prompts: list[str]) -> str:
    """A line about those prompts whose ends no text encoder reads; "" if there are none."""
    tokenizer = max(self.tokenizers.values(), key=lambda tokenizer: tokenizer.length)
    # Cleaning makes no text twice as long, and a token takes a byte: most need no look.
    counts = {prompt: len(tokenizer.tokens(prompt)) for prompt in dict.fromkeys(prompts)
              if 2 * len(prompt.encode("utf-8", "replace")) > tokenizer.length - 2}
    long = [prompt for prompt, count in counts.items() if count > tokenizer.length]
    if not long:
      return ""
    shown = long[0] if len(long[0]) <= 60 else f"{long[0][:60]}..."
    return (f"{len(long)} of {len(set(prompts))} prompts are cut to {tokenizer.length} tokens, "
            f"what this model reads; the first of them has {counts[long[0]]}: {shown!r}")

  def encode_images(self, params, images):
    """Scaled latents `[B, h, w, c]` of `images [B, H, W, 3]` in [0, 1]; `params` of "vae"."""
    return encode_images(self.vae, params, images)

  def decode_images(self, params, latents, clamp: bool = True):
    """Images `[B, H, W, 3]` f32 of scaled `latents [B, h, w, c]`, in [0, 1] if clamped."""
    return decode_images(self.vae, params, latents, clamp)

  def export_configs(self, format: str) -> dict[str, dict]:
    """The JSON files of a checkpoint that is written as `format`, of which we carry all parts.

    Raises:
      UserError: the classes of that format would compute something else.
    """
    prefix = "Flax" if format == "flax" else ""
    renamed = lambda name: prefix + name.removeprefix("Flax")
    configs = {name: dict(config) for name, config in self.configs.items()}
    index = configs["model_index"]
    for config in configs.values():
      if "_class_name" in config:
        config["_class_name"] = renamed(config["_class_name"])
    for name in configs.keys() - {"model_index"}:
      index[name] = [index[name][0], renamed(index[name][1])]
    # What we neither need nor carry is declared absent, here and by the families.
    return configs | {"model_index": {
        **index, "feature_extractor": [None, None], "image_encoder": [None, None]}}

  # The rest is the same for all.

  @property
  def denoiser(self) -> nn.Module:
    return self.networks[self.denoiser_name]

  @property
  def vae(self) -> AutoencoderKL:
    return self.networks["vae"]

  @property
  def tokenizer(self) -> Tokenizer:
    """The first text encoder's."""
    return self.tokenizers["tokenizer"]

  @property
  def text_encoders(self) -> tuple[str, ...]:
    """Names of the text encoders, in the order in which their states are joined."""
    return tuple(name for name in self.networks if name.startswith("text_encoder"))

  @property
  def scheduler_config(self) -> dict:
    """The parsed `scheduler/scheduler_config.json`."""
    return self.configs["scheduler"]

  @property
  def weights(self):
    """The denoiser's parameters."""
    return self.params[self.denoiser_name]

  def with_weights(self, weights) -> "Pipeline":
    """The same with other parameters of the denoiser."""
    return dataclasses.replace(self, params={**self.params, self.denoiser_name: weights})

  @property
  def variables(self) -> dict[str, Any]:
    """What `denoise` reads: the denoiser's parameters, and its constants."""
    return {"params": self.weights, **self.constants}

  @property
  def text_params(self) -> dict[str, Any]:
    """The part of `params` that `encode_prompts` reads."""
    return {name: self.params[name] for name in self.text_encoders}

  @property
  def is_outline(self) -> bool:
    """Whether `params` are shapes."""
    return isinstance(jax.tree.leaves(self.weights)[0], jax.ShapeDtypeStruct)

  @property
  def image_size(self) -> tuple[int, int]:
    """Height and width of the images in pixels."""
    return self.size or (self.denoiser.config.sample_size * self.vae.factor,) * 2

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """`(h, w, c)` of the latents of images of `image_size`."""
    height, width = self.image_size
    factor = self.vae.factor
    return height // factor, width // factor, self.denoiser.config.in_channels

  def resized(self, height: int, width: int) -> "Pipeline":
    """The same for images of that many pixels; 0 stands for the checkpoint's own size.

    Raises:
      UserError: not a whole number of latents; names the config key.
    """
    own = dataclasses.replace(self, size=None).image_size
    for key, pixels in (("height", height), ("width", width)):
      if pixels % self.pixel_step:
        raise UserError(f"sample.{key}={pixels} is not a multiple of {self.pixel_step}, as the "
                        "images of this model are")
    return dataclasses.replace(self, size=(height or own[0], width or own[1]))

  def adapter_targets(self, names) -> dict[str, str]:
    """Patterns of `lora_targets` by name, as `lora.init` takes them.

    Raises:
      UserError: this family has no such layers.
    """
    for name in names:
      if name not in self.lora_targets:
        raise UserError(f"model.lora_targets: this model's {self.denoiser_name} has no {name!r}, "
                        f"only {', '.join(self.lora_targets)}")
    return {name: self.lora_targets[name] for name in names}

  def init(self, key) -> dict:
    """New f32 parameters of the denoiser to train from, jittable."""
    params = self.denoiser.init(key, *self.denoiser.example_inputs())["params"]
    flat = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict(
        {path: jnp.zeros_like(leaf) if re.search(self.starts_at_zero, path) else leaf
         for path, leaf in flat.items()}, sep="/")

  def param_shapes(self) -> dict[str, Any]:
    """The trees of `jax.ShapeDtypeStruct` that `params` must have; computes nothing."""
    key = jax.random.key(0)
    # The smallest image: every level of the autoencoder needs at least one pixel.
    image = jnp.zeros((1, self.vae.factor, self.vae.factor, self.vae.config.in_channels))
    inputs = {self.denoiser_name: self.denoiser.example_inputs(), "vae": (image,),
              **{name: (jnp.zeros((1, 2), jnp.int32),) for name in self.text_encoders}}
    return {name: jax.eval_shape(network.init, key, *inputs[name])["params"]
            for name, network in self.networks.items()}
