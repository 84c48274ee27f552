"""Rewards with published weights on CLIP's towers: CLIPScore, PickScore, HPSv2, LAION aesthetic.

Each factory takes WHERE its weights lie, as `reward.names` has it after the colon:

  DIR          a directory in the layout of transformers' `CLIPModel`, tokenizer included, or a hub
               id of one
  DIR,WEIGHTS  the same with the weights of another directory or file, in transformers' or
               open_clip's names; for the aesthetic score, WEIGHTS is the file of its head

Prompts are embedded once, on the host, so the text tower is neither among `params` nor in the
program that scores. Images may have any size. Preprocessing is that of the reference
implementations in floating point, without their rounding to 8 bits, hence differentiable.
"""
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.convert.clip import Clip, load_clip, read_weights
from jaxalign.errors import UserError
from jaxalign.models.clip import unit
from jaxalign.rewards import Reward

# Widths and module numbers of the linear heads of the aesthetic score and of ImageReward; dropout,
# which takes the other numbers, is off.
HEAD_WIDTHS, HEAD_LAYERS = (1024, 128, 64, 16, 1), (0, 2, 4, 6, 7)


def resize(images, height: int, width: int):
  """`[B, H, W, 3]` -> `[B, height, width, 3]`: bicubic (a = -0.5), antialiased where it shrinks.

  The filter of Pillow and torchvision. Overshoot is kept: values may leave [0, 1] a little.
  """
  shape = (images.shape[0], height, width, images.shape[3])
  return jax.image.resize(images, shape, "cubic", antialias=True)


def crop(images, size: int, offset: Callable[[int], int] = lambda extra: round(extra / 2)):
  """The shorter side to `size` pixels, then the centre: `[B, size, size, 3]`.

  `offset` says where the crop begins, given by how many pixels the side is too long. Where that is
  odd, torchvision rounds half of it to the even number, transformers rounds down.
  """
  short = min(images.shape[1:3])
  x = resize(images, *(int(size * side / short) for side in images.shape[1:3]))
  top, left = (offset(side - size) for side in x.shape[1:3])
  return x[:, top:top + size, left:left + size]


def letterbox(images, size: int):
  """The longer side to `size` pixels, black bars beside the shorter: `[B, size, size, 3]`."""
  scale = size / max(images.shape[1:3])
  x = resize(images, *(round(side * scale) for side in images.shape[1:3]))
  bars = [size - side for side in x.shape[1:3]]
  return jnp.pad(x, ((0, 0), *((bar // 2, bar - bar // 2) for bar in bars), (0, 0)))


def clip_score(where: str) -> Reward:
  """Cosine of image and prompt, neither scaled nor clipped (Hessel et al. 2021 without w and max).

  Any CLIP: OpenAI's ViT-L/14, OpenCLIP's ViT-H/14.
  """
  return _cosine("clip_score", where, crop, "-1 to 1, cosine of image and prompt")


def pickscore(where: str) -> Reward:
  """PickScore v1, Kirstain et al. 2023: the cosine times exp(logit_scale), about 100."""
  floor = functools.partial(crop, offset=lambda extra: extra // 2)
  return _cosine("pickscore", where, floor, "logit, about 17 to 24", scaled=True)


def hpsv2(where: str, name: str = "hpsv2") -> Reward:
  """Human Preference Score v2, Wu et al. 2023: the cosine. v2.1 differs by its weights only."""
  return _cosine(name, where, letterbox, "-1 to 1, cosine of image and prompt, about 0.2 to 0.35",
                 cleaning="open_clip")


def hpsv2_1(where: str) -> Reward:
  """Human Preference Score v2.1; its values and those of v2 are not comparable."""
  return hpsv2(where, "hpsv2.1")


def aesthetic(where: str) -> Reward:
  """LAION's aesthetic predictor v2 on the CLIP ViT-L/14 embedding; ignores the prompt.

  Five linear layers without activations between them, trained on ratings from 1 to 10.
  """
  directory, file = split(where)
  if file is None:
    raise UserError(f"{where}: the aesthetic score needs the file of its head too, as DIR,WEIGHTS")
  clip = load_clip(directory)
  shapes = {"layers": head_shapes(clip.vision.config.projection_dim)}
  params = {"vision": clip.params["vision"], "head": read_weights(file, "head", shapes)["layers"]}
  embed = _embed_images(clip, crop)

  def score(params, images, prepared):
    return head(params["head"], embed(params["vision"], images))

  return Reward("aesthetic", params, lambda prompts: {}, score, "rating, about 1 to 10",
                features=_features(embed))


def head_shapes(width: int) -> dict:
  """Shapes of the parameters of a linear head on `width` features."""
  shapes, of = {}, lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  for layer, out in zip(HEAD_LAYERS, HEAD_WIDTHS):
    shapes[str(layer)] = {"kernel": of(width, out), "bias": of(out)}
    width = out
  return shapes


def head(params, x):
  """`[B, D] -> [B]`: linear layers without activations between them."""
  for layer in HEAD_LAYERS:
    weights = params[str(layer)]
    x = x @ weights["kernel"] + weights["bias"][None]
  return x[:, 0]


def split(where: str) -> tuple[str, str | None]:
  """`DIR` or `DIR,WEIGHTS` -> both parts."""
  directory, comma, weights = where.partition(",")
  if comma and not weights:
    raise UserError(f"{where}: no file after the comma")
  return directory, weights or None


def _embed_images(clip: Clip, fit):
  """`(params, images [B, H, W, 3] in [0, 1]) -> [B, D]` of length one."""
  size = clip.vision.config.image_size

  def embed(params, images):
    if images.ndim != 4 or images.shape[-1] != 3:
      raise ValueError(f"images: shape {images.shape} is not [B, H, W, 3]")
    mean, std = (jnp.asarray(x, jnp.float32)[None, None, None] for x in (clip.mean, clip.std))
    pixels = (fit(images.astype(jnp.float32), size) - mean) / std
    return unit(clip.vision.apply({"params": params}, pixels).projected)

  return embed


def _cosine(name: str, where: str, fit, span: str, scaled: bool = False,
            cleaning: str = "fast") -> Reward:
  """Cosine of image and prompt, times the exponential of the trained logit scale if `scaled`."""
  clip = load_clip(*split(where), cleaning)
  embed = _embed_images(clip, fit)
  embed_text = jax.jit(
      lambda params, ids: unit(clip.text.apply({"params": params}, ids).projected))

  def prepare(prompts):
    params, ids = jax.device_put(clip.params["text"]), clip.tokenizer(prompts)
    rows = [np.asarray(embed_text(params, ids[i:i + 64])) for i in range(0, len(ids), 64)]
    return {"text": np.concatenate(rows)}

  def score(params, images, prepared):
    image, text = embed(params["vision"], images), prepared["text"]
    if image.shape != text.shape:
      raise ValueError(f"{image.shape[0]} images but {text.shape[0]} prepared prompts")
    cosine = jnp.sum(image * text, axis=-1)
    return cosine * jnp.exp(params["logit_scale"]) if scaled else cosine

  params = {"vision": clip.params["vision"]}
  if scaled:
    params["logit_scale"] = clip.params["logit_scale"]
  return Reward(name, params, prepare, score, span, features=_features(embed))


def _features(embed):
  return lambda params, images: embed(params["vision"], images)
