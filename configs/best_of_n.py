"""Best of N: of N = train.steps + 1 samples of each image the one that scores best.

  python -m jaxalign.launch --config=configs/best_of_n.py
  python -m jaxalign.launch --config=configs/best_of_n.py --config.train.steps=99

The images are those of configs/dno.py, and N is set so that the denoiser is called as often: three
samples for each update of that recipe, and three for its last score.

Arguments after a colon:
  emoji    the embedded model, reward emoji_style (default), see docs/results.md
  smoke, smoke_sd3    random-weight fixtures, a UNet and a flow-matching transformer, four
           candidates, for tests
  sd15, sdxl, sd35    beside those of configs/dno.py; not measured here. Give --config.model.path
           and --config.reward.names
"""
from jaxalign.config import recipes


def get_config(arg="emoji"):
  size, _ = recipes.split_argument(arg, ("emoji", *recipes.SMOKE, "sd15", "sdxl", "sd35"))
  config = recipes.default("best_of_n", "best_of_n:" + (arg or "emoji"))
  config.train.patience = 0                     # the judge is reported, and stops nothing
  config.eval.every = 0
  if size == "emoji":
    config.data.eval_prompts = "jaxalign:emoji_styles_heldout"
    config.reward.names = ("emoji_style",)
    config.eval.prompts, config.eval.samples, config.eval.batch = 24, 2, 48
    config.train.steps, config.train.checkpoint_every = 3 * (20 + 1) - 1, 21
  elif size in recipes.SMOKE:
    recipes.make_smoke(config, size)
  else:
    config.model.path = ""                      # --config.model.path=DIR
    config.model.dtype = "bfloat16"
    config.data.eval_prompts = "jaxalign:animals_train"
    config.sample.batch, config.sample.steps, config.sample.guidance = 1, 50, 5.0
    config.train.steps, config.train.checkpoint_every = 3 * (100 + 1) - 1, 100
    if size == "sd35":
      recipes.make_sd35(config)
      config.sample.kind, config.sample.eta, config.sample.steps = "ddim", 1.0, 28
      config.sample.spacing, config.sample.final = "linspace", "noisy"
    config.eval.prompts, config.eval.samples, config.eval.batch = 45, 2, 2
  return config
