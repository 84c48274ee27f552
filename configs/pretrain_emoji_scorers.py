"""The embedded scorers `emoji_clip` and `emoji_judge`, from drawings and captions.

  python -m jaxalign.emoji.drawings --output=runs/drawings
  python -m jaxalign.launch --config=configs/pretrain_emoji_scorers.py:emoji_clip
  python -m jaxalign.launch --config=configs/pretrain_emoji_scorers.py:emoji_judge

They see 32 pixels. The first needs an autoencoder of that size: the shipped one, or
--config.task.vae=DIR. The shipped scorers were trained with that of version 0 of the model. A
second argument after a comma, `smoke`: three steps of a tiny one.
"""
from jaxalign.config import recipes
from jaxalign.pretrain import config as pretrain


def get_config(arg="emoji_clip"):
  task, smoke = recipes.split_argument(arg, ("emoji_clip", "emoji_judge"), ("smoke",))
  config = pretrain.default(task, "pretrain_emoji_scorers:" + ",".join([task, *smoke]))
  clip = task == "emoji_clip"
  config.seed = 1 if clip else 2
  config.optim.lr, config.optim.b2, config.optim.weight_decay = 1e-3 if clip else 2e-3, 0.98, 0.05
  config.optim.warmup, config.optim.decay_steps, config.optim.ema = 50, 950, 0.995
  if smoke:
    config.task.names, config.task.images = 4, 64
    if clip:
      config.task.width, config.task.text_layers, config.task.layers = 16, 1, 1
    else:
      config.task.widths, config.task.dim, config.task.text_width = (8, 8), 16, 16
    config.train.steps, config.train.checkpoint_every, config.train.log_every = 3, 2, 1
  return config
