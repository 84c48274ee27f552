"""Best of N: of N = train.steps + 1 samples of each image the one that scores best.

  python -m jaxalign.launch --config=configs/best_of_n.py
  python -m jaxalign.launch --config=configs/best_of_n.py --config.train.steps=99

The images are those of configs/dno.py, and N is set so that the denoiser is called as often: three
samples for each update of that recipe, and three for its last score.

Arguments after a colon:
  emoji    the embedded model, reward scene_clip (default); not measured
  emoji_sd3    the same on the embedded transformer, a flow; not measured
  signs    words on signs, reward ocr, judge ocr_judge; not measured
  smoke, smoke_sd3    random-weight fixtures, a UNet and a flow-matching transformer, four
           candidates, for tests
  sd15, sdxl, sd35    beside those of configs/dno.py; not measured here. Give --config.model.path
           and --config.reward.names
"""
from jaxalign.config import recipes


def get_config(arg="emoji"):
  size, _ = recipes.split_argument(
      arg, (*recipes.WITH_SIGNS, *recipes.SMOKE, "sd15", "sdxl", "sd35"))
  config = recipes.default("best_of_n", "best_of_n:" + (arg or "emoji"))
  recipes.make_at_inference(config, size)
  if size in recipes.WITH_SIGNS:
    config.train.steps, config.train.checkpoint_every = 3 * (20 + 1) - 1, 21
  elif size not in recipes.SMOKE:
    config.train.steps, config.train.checkpoint_every = 3 * (100 + 1) - 1, 100
  return config
