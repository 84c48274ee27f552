"""The embedded models' autoencoder, from drawings and signs.

  python -m jaxalign.emoji.artwork --output=runs/drawings
  python -m jaxalign.launch --config=configs/pretrain_emoji_vae.py

Argument after a colon: `smoke` for three steps of a tiny one.
"""
from jaxalign.config import recipes
from jaxalign.pretrain import config as pretrain


def get_config(arg=""):
  recipes.split_argument(arg, ("emoji", "smoke"))
  config = pretrain.default("emoji_vae", "pretrain_emoji_vae:" + (arg or "emoji"))
  config.optim.lr, config.optim.muon, config.optim.b2 = 1.5e-3, 4e-3, 0.98
  config.optim.warmup, config.optim.decay_steps, config.optim.ema = 40, 2200, 0.995
  config.task.batch, config.task.encoded = 24, 4
  config.train.steps, config.train.look_every, config.train.checkpoint_every = 2240, 150, 50
  if arg == "smoke":
    config.task.widths, config.task.batch = (8, 8, 8, 8), 8
    config.train.steps, config.train.look_every, config.train.checkpoint_every = 3, 2, 2
    config.train.log_every = 1
  return config
