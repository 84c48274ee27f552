"""The embedded model: UNet and text encoder, from scenes and the autoencoder.

  python -m jaxalign.launch --config=configs/pretrain_emoji_vae.py
  python -m jaxalign.launch --config=configs/pretrain_emoji.py

Arguments after a colon:
  emoji    new weights (default)
  smoke    three steps of a tiny one
"""
from jaxalign.config import recipes
from jaxalign.pretrain import config as pretrain


def get_config(arg="emoji"):
  size, _ = recipes.split_argument(arg, ("emoji", "smoke"))
  config = pretrain.default("emoji", "pretrain_emoji:" + size)
  config.optim.lr, config.optim.muon, config.optim.b2 = 1.5e-3, 4e-3, 0.98
  config.optim.weight_decay, config.optim.ema = 1e-2, 0.998
  config.optim.warmup, config.optim.decay_steps = 100, 9000
  config.train.steps, config.train.look_every, config.train.checkpoint_every = 9200, 500, 100
  if size == "smoke":
    config.task.widths, config.task.batch = (32, 32), 8
    config.task.text_width, config.task.text_layers, config.task.subjects = 32, 1, 4
    config.train.steps, config.train.look_every, config.train.checkpoint_every = 3, 2, 2
    config.train.log_every = 1
  return config
