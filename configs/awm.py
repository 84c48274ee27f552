"""Advantage-weighted matching on the embedded emoji model (or, by argument, on something else).

  python -m jaxalign.launch --config=configs/awm.py

Arguments after a colon, separated by commas:
  emoji    the embedded model, reward scene_clip as a black box (default); not measured
  emoji_sd3    the same on the embedded transformer, a flow; not measured
  signs    words on signs, reward ocr, judge ocr_judge (docs/signs.md)
  smoke, smoke_sd3    random-weight fixtures, a UNet and a flow-matching transformer, three
           updates, for tests
  sd15     Stable Diffusion 1.x at 512 px, settings ours, for want of published ones; not measured.
           Give --config.model.path and --config.reward.names
  sd35     Stable Diffusion 3.5 medium at 512 px as published, but for the sampler (ten
           deterministic steps of second order, where there are 14 of another solver) and 48 groups
           in place of 72; not measured. Give the same
  release  method preset, see docs/methods/forward_process.md
"""
from jaxalign.config import recipes
from jaxalign.methods.awm import PRESETS


def get_config(arg="emoji"):
  size, presets = recipes.split_argument(
      arg, (*recipes.WITH_SIGNS, *recipes.SMOKE, "sd15", "sd35"), PRESETS)
  config = recipes.default("awm", "awm:" + (arg or "emoji"))
  for preset in presets:
    config.method.update(PRESETS[preset])
  recipes.make_forward_process(config, size)
  return config
