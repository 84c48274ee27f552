"""FK steering: particles of each image, resampled by what they promise; nothing is trained.

  python -m jaxalign.launch --config=configs/fk_steering.py

Arguments after a colon, separated by commas:
  emoji    the embedded model, 48 images of eight particles, reward scene_clip (default); not
           measured
  emoji_sd3    the same on the embedded transformer, a flow; not measured
  signs    words on signs, reward ocr, judge ocr_judge; not measured
  smoke, smoke_sd3    random-weight fixtures, a UNet and a flow-matching transformer, three points,
           for tests
  sd15     Stable Diffusion 1.x, four particles, 50 steps; not measured. Give --config.model.path
           and --config.reward.names
  sd35     Stable Diffusion 3.5 medium at 512 px, four particles, 28 memoryless steps; not measured.
           Give the same
  release  method preset, see docs/methods/particles.md
"""
from jaxalign.config import recipes
from jaxalign.methods.fk_steering import PRESETS


def get_config(arg="emoji"):
  size, presets = recipes.split_argument(
      arg, (*recipes.WITH_SIGNS, *recipes.SMOKE, "sd15", "sd35"), PRESETS)
  config = recipes.default("fk_steering", "fk_steering:" + (arg or "emoji"))
  for preset in presets:
    config.method.update(PRESETS[preset])
  recipes.make_at_inference(config, size)
  if size in recipes.WITH_SIGNS:
    config.method.particles = 8
  elif size in recipes.SMOKE:
    config.method.points = 2                    # of its four steps
  config.train.steps = config.train.checkpoint_every = config.method.points + 1
  return config
