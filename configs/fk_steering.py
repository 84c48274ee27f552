"""FK steering: particles of each image, resampled by what they promise; nothing is trained.

  python -m jaxalign.launch --config=configs/fk_steering.py

Arguments after a colon, separated by commas:
  emoji    the embedded model, 48 images of eight particles, reward emoji_style (default); not
           measured
  smoke, smoke_sd3    random-weight fixtures, a UNet and a flow-matching transformer, three points,
           for tests
  sd15     Stable Diffusion 1.x, four particles, 50 steps; not measured. Give --config.model.path
           and --config.reward.names
  sd35     Stable Diffusion 3.5 medium at 512 px, four particles, 28 memoryless steps; not measured.
           Give the same
  release  method preset, see docs/methods/fk_steering.md
"""
from jaxalign.config import recipes
from jaxalign.methods.fk_steering import PRESETS


def get_config(arg="emoji"):
  size, presets = recipes.split_argument(arg, ("emoji", *recipes.SMOKE, "sd15", "sd35"), PRESETS)
  config = recipes.default("fk_steering", "fk_steering:" + (arg or "emoji"))
  for preset in presets:
    config.method.update(PRESETS[preset])
  config.train.patience = 0                     # the judge is reported, and stops nothing
  config.eval.every = 0
  if size == "emoji":
    config.data.eval_prompts = "jaxalign:emoji_styles_heldout"
    config.reward.names = ("emoji_style",)
    config.method.particles = 8
    config.eval.prompts, config.eval.samples, config.eval.batch = 24, 2, 48
  elif size in recipes.SMOKE:
    recipes.make_smoke(config, size)
    config.method.points = 2                    # of its four steps
  else:
    config.model.path = ""                      # --config.model.path=DIR
    config.model.dtype = "bfloat16"
    config.data.eval_prompts = "jaxalign:animals_train"
    config.sample.batch, config.sample.steps, config.sample.guidance = 1, 50, 5.0
    if size == "sd35":
      recipes.make_sd35(config)
      config.sample.kind, config.sample.eta, config.sample.steps = "ddim", 1.0, 28
      config.sample.spacing, config.sample.final = "linspace", "noisy"
    config.eval.prompts, config.eval.samples, config.eval.batch = 45, 2, 2
  config.train.steps = config.train.checkpoint_every = config.method.points + 1
  return config
