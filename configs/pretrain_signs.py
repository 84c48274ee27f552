"""The embedded model of words: a transformer that letters signs, and its text encoders.

  python -m jaxalign.launch --config=configs/pretrain_emoji_vae.py
  python -m jaxalign.launch --config=configs/pretrain_signs.py

Argument after a colon: `smoke` for three steps of a tiny one.
"""
from jaxalign.config import recipes
from jaxalign.pretrain import config as pretrain


def get_config(arg="signs"):
  size, _ = recipes.split_argument(arg, ("signs", "smoke"))
  config = pretrain.default("signs", "pretrain_signs:" + size)
  config.task.width, config.task.layers = 160, 4          # all models together: 60 MB
  config.optim.lr, config.optim.muon, config.optim.b2 = 1.5e-3, 4e-3, 0.98
  config.optim.weight_decay, config.optim.ema = 1e-2, 0.998
  config.optim.warmup, config.optim.decay_steps = 100, 3800
  config.train.steps, config.train.look_every, config.train.checkpoint_every = 4000, 250, 100
  if size == "smoke":
    config.task.width, config.task.layers, config.task.text_layers = 32, 2, 2
    config.task.batch, config.task.text_width = 8, 32
    config.train.steps, config.train.look_every, config.train.checkpoint_every = 3, 2, 2
    config.train.log_every = 1
  return config
