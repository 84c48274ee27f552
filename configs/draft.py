"""DRaFT: the reward's gradient through the last steps of the sampler.

  python -m jaxalign.launch --config=configs/draft.py

Arguments after a colon, separated by commas:
  emoji    the embedded model, reward soft_style_3d, gradients through the last 5 of 20 steps
           (default); not measured
  emoji_sd3    the same on the embedded transformer, a flow; not measured
  signs    words on signs, through all of eight steps, reward soft_word, judge ocr_judge
           (docs/signs.md)
  smoke, smoke_sd3    random-weight fixtures, a UNet and a flow-matching transformer, three
           updates, for tests
  sd15     published settings for Stable Diffusion 1.x, small-scale runs; not measured here. Give
           --config.model.path, --config.reward.names and --config.data.prompts
  sdxl     the same for Stable Diffusion XL in bfloat16, for which nothing is published
  sd35     Stable Diffusion 3.5 medium at 512 px: the adapter and the optimiser of flow_grpo
           (`recipes.make_sd35`), the rest ours, for want of anything published; not measured.
           Give --config.model.path, --config.reward.names and
           --config.data.prompts
  full, one, lv    DRaFT through all steps, DRaFT-1, DRaFT-LV
"""
from jaxalign.config import recipes
from jaxalign.methods.draft import PRESETS


def get_config(arg="emoji"):
  size, presets = recipes.split_argument(
      arg, (*recipes.WITH_SIGNS, *recipes.SMOKE, "sd15", "sdxl", "sd35"), PRESETS)
  config = recipes.default("draft", "draft:" + (arg or "emoji"))
  if size in recipes.WITH_SIGNS:
    recipes.make_embedded(config, size)
    config.reward.names = ("soft_style_3d",)    # that of nabla_gfn.py
    config.method.backprop_steps = 5
    config.train.steps, config.train.checkpoint_every, config.eval.every = 36, 12, 12
    config.optim.lr, config.optim.warmup, config.optim.decay_steps = 5e-4, 4, 32
    if size == "signs":                         # letters that a rule reads; two networks judge
      config.reward.names, config.model.adapter = ("soft_word",), "full"
      config.sample.guidance, config.sample.steps, config.method.backprop_steps = 1.0, 8, 8
      config.sample.batch = 32
      config.train.steps, config.optim.decay_steps = 48, 48
  elif size in recipes.SMOKE:
    recipes.make_smoke(config, size)
    config.method.backprop_steps = 2       # of its four steps
  else:
    config.model.path = ""                  # --config.model.path=DIR
    config.train.patience = 0               # the judge knows emoji scenes only
    config.model.lora_rank, config.model.remat = 8, "block"
    if size == "sdxl":
      config.model.dtype = "bfloat16"
    config.method.backprop_steps = 10
    config.sample.batch, config.sample.steps, config.sample.guidance = 4, 50, 7.5
    config.sample.eta, config.sample.final = 0.0, ""
    config.optim.lr, config.optim.b2, config.optim.weight_decay = 4e-4, 0.999, 0.1
    config.train.steps, config.train.checkpoint_every, config.eval.every = 2000, 100, 100
    config.eval.batch = 8
    if size == "sd35":
      recipes.make_sd35(config)
      config.sample.kind, config.sample.eta = "ddim", 0.0           # Euler's method
      config.method.backprop_steps = 2      # of ten
  for preset in presets:
    config.method.update(PRESETS[preset])
  return config
