"""The classifier of crops that tells whether a picture is the scene that its caption asks for.

  python -m jaxalign.emoji.artwork --output=runs/drawings
  python -m jaxalign.launch --config=configs/pretrain_scene_check.py

It needs an autoencoder of 64 pixels, as `configs/pretrain_emoji_vae.py` makes it.

Arguments after a colon:
  scene_check    new weights (default)
  smoke          three steps of a tiny one
"""
from jaxalign.config import recipes
from jaxalign.pretrain import config as pretrain


def get_config(arg="scene_check"):
  size, _ = recipes.split_argument(arg, ("scene_check", "smoke"))
  config = pretrain.default("scene_check", "pretrain_scene_check:" + size)
  config.seed = 3
  config.optim.lr, config.optim.b2, config.optim.weight_decay = 2e-3, 0.98, 0.05
  config.optim.warmup, config.optim.decay_steps, config.optim.ema = 50, 1550, 0.995
  config.train.steps, config.train.look_every, config.train.checkpoint_every = 1600, 200, 100
  if size == "smoke":
    config.task.widths, config.task.dim, config.task.batch, config.task.subjects = (8,), 8, 4, 4
    config.task.images = 64
    config.train.steps, config.train.checkpoint_every, config.train.log_every = 3, 2, 1
  return config
