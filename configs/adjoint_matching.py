"""Adjoint Matching on the embedded emoji model (or, by argument, on something else).

  python -m jaxalign.launch --config=configs/adjoint_matching.py

Arguments after a colon, separated by commas:
  emoji    the embedded model, reward soft_style_3d (default); not measured
  emoji_sd3    the same on the embedded transformer, a flow; not measured
  signs    words on signs, reward soft_word, judge ocr_judge (docs/signs.md)
  smoke, smoke_sd3    random-weight fixtures, a UNet and a flow-matching transformer, three
           updates, for tests
  sd15     Stable Diffusion 1.x at 512 px: all weights trained, 50 steps and the optimiser as
           published; not measured. Give --config.model.path and --config.reward.names
  sd35     Stable Diffusion 3.5 medium at 512 px: the adapter and the optimiser of flow_grpo
           (`recipes.make_sd35`) on a memoryless sampler, the rest ours; not measured. Give the same
  release  method preset, see docs/methods/adjoint_matching.md
"""
from jaxalign.config import recipes
from jaxalign.methods.adjoint_matching import PRESETS


def get_config(arg="emoji"):
  size, presets = recipes.split_argument(
      arg, (*recipes.WITH_SIGNS, *recipes.SMOKE, "sd15", "sd35"), PRESETS)
  config = recipes.default("adjoint_matching", "adjoint_matching:" + (arg or "emoji"))
  for preset in presets:
    config.method.update(PRESETS[preset])
  if size in recipes.WITH_SIGNS:
    recipes.make_embedded(config, size)
    config.reward.names = ("soft_style_3d",)    # that of nabla_gfn.py
    config.sample.batch = 16
    config.method.perturbations, config.method.perturb_std = 1, 0.2
    config.train.steps, config.train.checkpoint_every, config.eval.every = 64, 16, 16
    config.optim.lr, config.optim.warmup, config.optim.decay_steps = 2e-3, 5, 59
    if not presets:
      config.method.beta = 14.0                 # that of nabla_gfn.py
    if size == "signs":                         # letters that a rule reads; two networks judge
      config.reward.names, config.model.adapter = ("soft_word",), "full"
      config.sample.batch, config.sample.guidance, config.sample.steps = 32, 1.0, 10
      config.train.steps, config.optim.lr, config.optim.decay_steps = 80, 5e-4, 80
  elif size in recipes.SMOKE:
    recipes.make_smoke(config, size)
    config.method.strata = 2
  else:
    config.model.path, config.model.adapter, config.model.remat = "", "full", "block"
    config.sample.batch, config.sample.steps, config.sample.guidance = 32, 50, 7.5
    config.optim.lr, config.optim.b2, config.optim.clip_norm = 3e-6, 0.95, 0.0
    config.optim.warmup, config.optim.accumulate = 20, 4
    config.train.steps, config.train.checkpoint_every, config.eval.every = 1000, 50, 50
    config.train.patience = 0                   # the judge knows emoji scenes only
    config.eval.batch = 16
    if size == "sd35":
      recipes.make_sd35(config)
      config.sample.kind, config.sample.eta, config.sample.final = "ddim", 1.0, "noisy"
      config.sample.spacing = "linspace"        # of SD3's own grid the last level is nearly clean
      config.sample.steps = 20
  return config
