"""RAM on the embedded emoji model (or, by argument, on something else).

  python -m jaxalign.launch --config=configs/ram.py

Arguments after a colon:
  emoji    the embedded model, reward scene_clip as a black box (default); not measured
  emoji_sd3    the same on the embedded transformer, a flow; not measured
  signs    words on signs, reward ocr, judge ocr_judge; not measured
  smoke, smoke_sd3    random-weight fixtures, a UNet and a flow-matching transformer, three
           updates, for tests
  sd15, sd35    Stable Diffusion 1.x, Stable Diffusion 3.5 medium at 512 px, settings ours, as the
           published ones could not be read; not measured. Give --config.model.path and
           --config.reward.names
"""
from jaxalign.config import recipes


def get_config(arg="emoji"):
  size, _ = recipes.split_argument(arg, (*recipes.WITH_SIGNS, *recipes.SMOKE, "sd15", "sd35"))
  config = recipes.default("ram", "ram:" + (arg or "emoji"))
  recipes.make_forward_process(config, size)
  return config
