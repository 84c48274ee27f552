"""Rewards that need no network: brightness, grayness, JPEG size."""
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from jaxalign.rewards import HostReward, Reward

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # Rec. 601, as in JPEG


def brightness() -> Reward:
  """Mean luma (Rec. 601) of the image, in [0, 1].

  Linear, so its tilted target is known, and nothing but the caller's clamp to [0, 1] bounds it:
  pixels that have reached white stop giving gradient there, and an image that was decoded without
  the clamp can score above 1.
  """
  def score(params, images, prepared):
    return (images * _LUMA[None, None, None]).sum(-1).mean((1, 2))

  return Reward("brightness", {}, lambda prompts: {}, score, "[0, 1] mean luma")


def grayness() -> Reward:
  """1 minus the mean over pixels of the largest minus the smallest channel; 1 has no colour."""
  def score(params, images, prepared):
    return 1 - (images.max(-1) - images.min(-1)).mean((1, 2))

  return Reward("grayness", {}, lambda prompts: {}, score, "[0, 1]; 1 has no colour")


def jpeg_compressibility() -> HostReward:
  """Minus the size in kB (1000 bytes) of the image as JPEG at quality 95 (Black et al. 2023)."""
  return HostReward("jpeg_compressibility", lambda images, prompts: -_jpeg_kilobytes(images),
                    "below 0, kB")


def jpeg_incompressibility() -> HostReward:
  """The size in kB (1000 bytes) of the image as JPEG at quality 95 (Black et al. 2023)."""
  return HostReward("jpeg_incompressibility", lambda images, prompts: _jpeg_kilobytes(images),
                    "above 0, kB")


def _jpeg_kilobytes(images):
  """`[B]` f32 from `[B,H,W,3]` uint8; Pillow encodes outside the interpreter lock."""
  def size(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=95)
    return buffer.tell() / 1000

  with ThreadPoolExecutor() as pool:
    return np.array(list(pool.map(size, images)), np.float32)
