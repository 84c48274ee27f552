"""Networks as formulas of their weights, in place of real ones: their programs are made at once.

All else of a run is as it is: states of the same trees, sampling, looks, files.
"""
import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import pretrain
from jaxalign.models.stable_diffusion import StableDiffusionPipeline
from jaxalign.rewards import REWARDS, Reward
from jaxalign.storage.files import whole_folder
from jaxalign.train import experiment


def replace(folder) -> None:
  """In this process; `folder` keeps the pipeline once it is made."""
  StableDiffusionPipeline.denoise = _denoise
  StableDiffusionPipeline.encode_prompts = _encode_prompts
  StableDiffusionPipeline.encode_images = _encode_images
  StableDiffusionPipeline.decode_images = _decode_images
  REWARDS["scene_judge"] = f"{__name__}:judge"
  make, kept = experiment.open_pipeline, folder / "pipeline.pickle"

  def opened(*args):
    if not kept.exists():
      kept.write_bytes(pickle.dumps(make(*args)))
    return pickle.loads(kept.read_bytes())
  experiment.open_pipeline = opened
  load = pretrain.load
  pretrain.load = lambda name: types.SimpleNamespace(Config=load(name).Config, make=lines)


def _denoise(self, variables, x_t, t, cond):
  policy = jax.tree.leaves(variables.get("lora", variables["params"]))[:2]
  bias = variables["params"]["conv_in"]["bias"]
  own = jnp.tanh(policy[0].sum() + policy[1].sum() + bias.sum())
  return x_t * (0.5 + 0.4 * own) + 0.1 * cond["text"].mean((1, 2))[:, None, None, None]


def _encode_prompts(self, params, ids):
  table = params["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"]
  return {"text": table[ids["text_encoder"]]}


def _encode_images(self, params, images):
  b, height, width, _ = images.shape
  h, w, c = self.latent_shape
  small = images.reshape(b, h, height // h, w, width // w, 3).mean((2, 4, 5))
  return jnp.repeat(small[..., None], c, axis=-1) + params["encoder"]["conv_in"]["bias"].mean()


def _decode_images(self, params, latents, clamp=True):
  images = 0.5 + 0.2 * latents[..., :3] + params["decoder"]["conv_in"]["bias"].mean()
  images = images.repeat(self.vae.factor, 1).repeat(self.vae.factor, 2)
  return images.clip(0, 1) if clamp else images


def judge() -> Reward:
  features = lambda params, images: images[:, ::8, ::8].reshape(len(images), -1) * params["scale"]
  score = lambda params, images, prepared: features(params, images).mean(-1)
  return Reward("scene_judge", {"scale": np.ones((), np.float32)}, lambda prompts: {}, score,
                features=features)


def lines(cfg) -> pretrain.Task:
  """Lines through points."""
  init = lambda key: {"kernel": jax.random.normal(key, (8, 4)), "bias": jnp.zeros(4)}
  apply = lambda params, x: x @ params["kernel"] + params["bias"][None]

  def draw(tables, key):
    x = jax.random.normal(key, (cfg.batch, 8))
    return {"x": x, "y": jnp.sin(x @ tables["kernel"])}

  def loss(params, batch):
    error = jnp.square(apply(params, batch["x"]) - batch["y"]).mean()
    return error, {"train/loss": error}

  def look(params, thorough):
    x = np.linspace(-1, 1, 2 * 2 * 8 * 8 * 8, dtype=np.float32).reshape(2, 2, 8, 8, 8)
    images = (x @ params["kernel"] + params["bias"])[..., :3].clip(0, 1)
    return pretrain.Look({"eval/mean": float(images.mean())}, images, ("a", "b"))

  def save(params, folder, record):
    with whole_folder(folder, last="record.json") as new:
      np.savez(new / "weights.npz", **params)
      (new / "record.json").write_text(repr(record))
  return pretrain.Task(init, {"kernel": np.ones((8, 4), np.float32)}, draw, loss, look, save)
