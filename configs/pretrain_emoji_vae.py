"""The embedded model's autoencoder, from drawings.

  python -m jaxalign.emoji.drawings --output=runs/drawings
  python -m jaxalign.launch --config=configs/pretrain_emoji_vae.py

Argument after a colon: `smoke` for three steps of a tiny one.
"""
from jaxalign.config import recipes
from jaxalign.pretrain import config as pretrain


def get_config(arg=""):
  recipes.split_argument(arg, ("emoji", "smoke"))
  config = pretrain.default("emoji_vae", "pretrain_emoji_vae:" + (arg or "emoji"))
  config.optim.lr, config.optim.warmup, config.optim.ema = 1.5e-3, 100, 0.998
  config.train.steps, config.train.look_every = 1600, 400
  config.optim.decay_steps = 1500
  if arg == "smoke":
    config.task.widths, config.task.batch = (16, 16, 16), 8
    config.train.steps, config.train.look_every, config.train.checkpoint_every = 3, 2, 2
    config.train.log_every = 1
  return config
