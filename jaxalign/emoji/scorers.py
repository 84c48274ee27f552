"""The embedded scorers: how well a picture of a scene fits its caption.

`scene_clip` is the reward: CLIP's two towers, small. `scene_judge` never serves as one: another
architecture from another seed, trained on the same drawings, it tells real gain from a fooled
reward. It also gives the features for diversity and Frechet distance, and knows the three artists
apart. Both are trained by `configs/pretrain_scene_scorers.py`.
"""
import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from jaxalign.config.places import ASSETS
from jaxalign.errors import UserError
from jaxalign.models.clip import CLIPTextModelWithProjection, CLIPVisionModelWithProjection, unit
from jaxalign.models.layers import Conv, Dense, Downsample, ResnetBlock
from jaxalign.models.tokenizer import Tokenizer
from jaxalign.rewards import Reward
from jaxalign.storage.files import whole_folder


def _pixels(images, size: int):
  """`[B, H, W, 3]` in [0, 1] -> `[B, size, size, 3]` f32 in [-1, 1]; differentiable."""
  if images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(f"images: shape {images.shape} is not [B, H, W, 3]")
  images = images.astype(jnp.float32)
  if images.shape[1:3] != (size, size):
    images = jax.image.resize(images, (images.shape[0], size, size, 3), "linear")
  return images * 2 - 1


class SceneClip(nn.Module):
  """CLIP's text and vision towers; `config` has a `text_config` and a `vision_config`."""
  config: Any

  def setup(self):
    self.text = CLIPTextModelWithProjection.from_config(self.config["text_config"])
    self.vision = CLIPVisionModelWithProjection.from_config(self.config["vision_config"])

  def embed_images(self, images):
    """`[B, H, W, 3]` in [0, 1] -> `[B, D]` of length one."""
    return unit(self.vision(
        _pixels(images, self.config["vision_config"]["image_size"])).projected)

  def embed_text(self, input_ids):
    """`[B, L]` token ids -> `[B, D]` of length one."""
    return unit(self.text(input_ids).projected)

  def __call__(self, images, input_ids):
    return self.embed_images(images), self.embed_text(input_ids)


class JudgeImages(nn.Module):
  """Residual convolutions, `[B, S, S, 3]` in [-1, 1] -> features `[B, D]`."""
  widths: tuple[int, ...]
  dim: int

  @nn.compact
  def __call__(self, x):
    x = Conv(self.widths[0], stride=2, name="stem")(x)
    for i, width in enumerate(self.widths):
      x = ResnetBlock(width, 8, 1e-5, jnp.float32, name=f"block_{i}")(x)
      if i + 1 < len(self.widths):
        x = Downsample((1, 1), jnp.float32, name=f"down_{i}")(x)
    x = nn.silu(nn.GroupNorm(8, epsilon=1e-5, use_fast_variance=False, name="norm")(x))
    # Flat, not pooled: where the eyes are is what tells faces apart.
    return Dense(self.dim, name="out")(x.reshape(x.shape[0], -1))


class JudgeText(nn.Module):
  """A bag of neighbouring token pairs, `[B, L]` token ids -> `[B, D]`.

  Pairs, because a bag of single tokens cannot tell a red heart on yellow from a yellow one on red.
  """
  vocab_size: int
  eos_id: int
  width: int
  dim: int

  @nn.compact
  def __call__(self, input_ids):
    x = nn.Embed(self.vocab_size, self.width, embedding_init=nn.initializers.normal(0.5),
                 name="tokens")(input_ids)
    pairs = jnp.concatenate([x[:, :-1], x[:, 1:]], axis=-1)
    pairs = nn.gelu(Dense(2 * self.width, name="pairs")(pairs))
    # A pair counts until the first end token; what follows is padding.
    inside = (jnp.cumsum(input_ids == self.eos_id, axis=1) == 0)[:, :-1, None]
    x = jnp.sum(pairs * inside, axis=1) / jnp.maximum(jnp.sum(inside, axis=1), 1)
    x = nn.gelu(Dense(2 * self.width, name="hidden")(x))
    return Dense(self.dim, name="out")(x)


class SceneJudge(nn.Module):
  """Convolutional judge.

  `config`: `dim`, `widths`, `text_width`, `vocab_size`, `eos_token_id`, `image_size`, and the
  number of `styles`.
  """
  config: Any

  def setup(self):
    cfg = self.config
    self.images = JudgeImages(tuple(cfg["widths"]), cfg["dim"])
    self.text = JudgeText(cfg["vocab_size"], cfg["eos_token_id"], cfg["text_width"], cfg["dim"])
    self.match_head = Dense(cfg["dim"])
    self.style_head = Dense(cfg["styles"])

  def features(self, images):
    """`[B, H, W, 3]` in [0, 1] -> `[B, D]` of length one: what both heads read."""
    return unit(self.images(_pixels(images, self.config["image_size"])))

  def style(self, images):
    """Logits `[B, styles]` that the drawing is by this artist: Noto's, Twemoji's, Fluent 3D's."""
    return self.style_head(self.features(images))

  def embed_images(self, images):
    """`[B, H, W, 3]` in [0, 1] -> `[B, D]` of length one."""
    return unit(self.match_head(self.features(images)))

  def embed_text(self, input_ids):
    """`[B, L]` token ids -> `[B, D]` of length one."""
    return unit(self.text(input_ids))

  def __call__(self, images, input_ids):
    features = self.features(images)
    return (unit(self.match_head(features)), self.embed_text(input_ids),
            self.style_head(features))


SCORERS = {"scene_clip": SceneClip, "scene_judge": SceneJudge}


@dataclasses.dataclass(frozen=True)
class Judge(Reward):
  """A reward that also tells styles apart.

  Attributes:
    style: `(params, images [B,H,W,3] in [0,1]) -> [B, styles]` logits of the artists. Pure.
  """
  style: Callable[[Any, jax.Array], jax.Array] | None = None


def save_scorer(folder, config: dict, params, tokenizer: Tokenizer | None = None) -> None:
  """Writes an asset: `config.json`, `model.safetensors` (f16, paths joined by dots), tokenizer."""
  with whole_folder(folder, last="config.json") as new:
    if tokenizer:
      tokenizer.save(new)
    (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({name: np.ascontiguousarray(leaf, dtype=np.float16)
               for name, leaf in flatten_dict(params, sep=".").items()}, new / "model.safetensors")


def read_network(folder, names) -> tuple[dict, Any]:
  """Config and weights that `save_scorer` wrote; the config's `name` is one of `names`.

  Raises:
    UserError: a file is missing or unknown.
  """
  folder = pathlib.Path(folder)
  try:
    config = json.loads((folder / "config.json").read_text())
    flat = load_file(folder / "model.safetensors")
  except (OSError, ValueError) as error:
    raise UserError(f"{folder}: not a scorer: {error}") from error
  if config.get("name") not in names:
    raise UserError(f"{folder / 'config.json'}: name: {config.get('name')!r} is not one of "
                    f"{', '.join(names)}")
  return config, unflatten_dict({path: leaf.astype(np.float32) for path, leaf in flat.items()},
                                sep=".")


def load_scorer(folder) -> Reward:
  """The scorer in `folder`, as `save_scorer` writes it. Its score is a cosine in [-1, 1].

  Raises:
    UserError: a file is missing or unknown.
  """
  config, params = read_network(folder, SCORERS)
  name = config["name"]
  module, tokenizer = SCORERS[name](config["model"]), Tokenizer.load(folder)

  def apply(method):
    return lambda params, x: module.apply({"params": params}, x, method=method)

  def score(params, images, prepared):
    image, text = apply("embed_images")(params, images), apply("embed_text")(
        params, prepared["input_ids"])
    if image.shape != text.shape:
      raise ValueError(f"{image.shape[0]} images but {text.shape[0]} prepared prompts")
    return jnp.sum(image * text, axis=-1)

  fields = dict(name=name, params=params, prepare=lambda prompts: {"input_ids": tokenizer(prompts)},
                score=score, range="-1 to 1, cosine of image and caption")
  if SCORERS[name] is SceneJudge:
    return Judge(**fields, features=apply("features"), style=apply("style"))
  return Reward(**fields)


def scene_clip() -> Reward:
  """The shipped text-image scorer, made to be optimised."""
  return load_scorer(ASSETS / "scene_clip")


def scene_judge() -> Judge:
  """The shipped judge, made never to be optimised."""
  return load_scorer(ASSETS / "scene_judge")
