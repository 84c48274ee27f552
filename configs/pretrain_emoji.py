"""The embedded model of scenes: denoiser and text encoders, from drawings and the autoencoder.

  python -m jaxalign.launch --config=configs/pretrain_emoji_vae.py
  python -m jaxalign.launch --config=configs/pretrain_emoji.py

Arguments after a colon:
  emoji       a UNet in Stable Diffusion's layout (default)
  emoji_sd3   a transformer in Stable Diffusion 3's
  smoke, smoke_sd3   three steps of tiny ones
"""
from jaxalign.config import recipes
from jaxalign.pretrain import config as pretrain


def get_config(arg="emoji"):
  size, _ = recipes.split_argument(arg, ("emoji", "emoji_sd3", "smoke", "smoke_sd3"))
  flow = size.endswith("_sd3")
  config = pretrain.default("emoji_sd3" if flow else "emoji", "pretrain_emoji:" + size)
  config.optim.lr, config.optim.muon, config.optim.b2 = 1.5e-3, 4e-3, 0.98
  config.optim.weight_decay, config.optim.ema = 1e-2, 0.998
  config.optim.warmup, config.optim.decay_steps = 100, 4900
  config.train.steps, config.train.look_every, config.train.checkpoint_every = 5000, 500, 100
  if size.startswith("smoke"):
    if flow:
      config.task.width, config.task.layers, config.task.text_layers = 32, 2, 2
    else:
      config.task.widths, config.task.text_layers = (32, 32), 1
    config.task.batch, config.task.text_width, config.task.subjects = 8, 32, 4
    config.train.steps, config.train.look_every, config.train.checkpoint_every = 3, 2, 2
    config.train.log_every = 1
  return config
