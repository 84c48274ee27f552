"""DAS: particles of each image that follow the reward's gradient; nothing is trained.

  python -m jaxalign.launch --config=configs/das.py

Arguments after a colon, separated by commas:
  emoji    the embedded model, 48 images of four particles, reward scene_clip (default); not
           measured
  emoji_sd3    the same on the embedded transformer, a flow; not measured
  smoke, smoke_sd3    random-weight fixtures, a UNet and a flow-matching transformer, four steps,
           for tests
  sd15     Stable Diffusion 1.x, four particles, 50 steps; not measured. Give --config.model.path
           and --config.reward.names
  sd35     Stable Diffusion 3.5 medium at 512 px, four particles, 28 memoryless steps; not measured.
           Give the same
  release  method preset, see docs/methods/particles.md
"""
from jaxalign.config import recipes
from jaxalign.methods.das import PRESETS


def get_config(arg="emoji"):
  size, presets = recipes.split_argument(
      arg, (*recipes.EMBEDDED, *recipes.SMOKE, "sd15", "sd35"), PRESETS)
  config = recipes.default("das", "das:" + (arg or "emoji"))
  recipes.make_at_inference(config, size)
  if size in ("sd15", "sd35"):
    config.model.remat = "block"
  for preset in presets:
    config.method.update(PRESETS[preset])
  config.train.steps = config.train.checkpoint_every = config.sample.steps
  return config
