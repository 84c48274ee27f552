"""What judges scenes: `scene_clip`, `scene_judge`, and the classifier behind `scene`.

  python -m jaxalign.emoji.artwork --output=runs/drawings
  python -m jaxalign.launch --config=configs/pretrain_scene_scorers.py:scene_clip
  python -m jaxalign.launch --config=configs/pretrain_scene_scorers.py:scene_judge
  python -m jaxalign.launch --config=configs/pretrain_scene_scorers.py:scene_check

They need an autoencoder of 64 pixels, as `configs/pretrain_emoji_vae.py` makes it, for the looks of
half of the pictures. A second argument after a comma, `smoke`: three steps of a tiny one.
"""
from jaxalign.config import recipes
from jaxalign.pretrain import config as pretrain

STEPS = {"scene_clip": 1600, "scene_judge": 1600, "scene_check": 1200}
SEEDS = {"scene_clip": 3, "scene_judge": 4, "scene_check": 5}


def get_config(arg="scene_clip"):
  task, smoke = recipes.split_argument(arg, tuple(STEPS), ("smoke",))
  config = pretrain.default(task, "pretrain_scene_scorers:" + ",".join([task, *smoke]))
  config.seed = SEEDS[task]
  config.optim.lr = 1e-3 if task == "scene_clip" else 2e-3
  config.optim.b2, config.optim.weight_decay, config.optim.ema = 0.98, 0.05, 0.995
  config.optim.warmup, config.optim.decay_steps = 50, STEPS[task] - 50
  config.train.steps, config.train.look_every = STEPS[task], 200
  config.train.checkpoint_every = 100
  if smoke:
    config.task.batch, config.task.subjects, config.task.images = 4, 4, 64
    if task == "scene_clip":
      config.task.width, config.task.text_layers, config.task.layers = 16, 1, 1
    else:
      config.task.widths, config.task.dim = (8, 8), 16
    if task == "scene_judge":
      config.task.text_width = 16
    config.train.steps, config.train.checkpoint_every, config.train.log_every = 3, 2, 1
  return config
