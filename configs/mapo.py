"""MaPO on preference pairs: for the embedded emoji model, one artist's style.

  python -m jaxalign.launch --config=configs/mapo.py
  python -m jaxalign.launch --config=configs/mapo.py:sd15 --config.model.path=DIR \
      --config.data.pairs=DIR --config.data.prompts=FILE --config.data.eval_prompts=FILE

Arguments after a colon, joined by commas:
  emoji    the embedded model on shipped pairs, 3-D drawings preferred to flat ones (default);
           not measured
  emoji_sd3    the same on the embedded transformer, a flow; not measured
  r0, r1, r2, r3    the embedded model on pairs at a growing distance from what it draws, made by
           `python -m jaxalign.emoji.mismatch --scenario=r0 --output=runs/pairs/r0.parquet`
  smoke, smoke_sd3    random-weight fixtures, a UNet and a flow-matching transformer, three
           updates, for tests
  sd15     Stable Diffusion 1.x at 512 px, all of the UNet trained, with the hyperparameters that
           were published for SDXL; not measured
  sdxl     published settings for SDXL on Pick-a-Pic v2; not measured
  sd35     Stable Diffusion 3.5 medium at 512 px on Pick-a-Pic v2, an adapter on attention and the
           optimiser of flow_grpo (`recipes.make_sd35`), the rest ours, for want of anything
           published; not measured
  release, paper_power, paper_scaled    the objective of the released code, and two readings of the
           paper's equation 11, at beta = 8
"""
from jaxalign.config import recipes
from jaxalign.emoji.recipes import MISMATCH, PAIR_SIZES, make_pairs
from jaxalign.methods.mapo import PRESETS


def get_config(arg="emoji"):
  size, presets = recipes.split_argument(arg, PAIR_SIZES, PRESETS)
  config = recipes.default("mapo", "mapo:" + (arg or "emoji"))
  if size in recipes.EMBEDDED or size in MISMATCH:
    make_pairs(config, size)
    # Chosen in the first world (docs/first_world): margins of its model then have std 1.8, and with
    # a weight of 0.1 the reward stays at +0.25.
    config.method.logit_scale, config.method.weight = 200.0, 0.3
  elif size in recipes.SMOKE:
    recipes.make_smoke(config, size)
    config.data.pairs = "jaxalign:fixture"
  else:
    recipes.make_pick_a_pic(config)
    config.optim.lr, config.optim.decay_steps = 1e-7, 2000
    if size == "sd35":
      recipes.make_sd35(config)
      config.sample.kind, config.sample.eta, config.sample.steps = "ddim", 0.0, 28
      config.sample.batch = 256
    if not presets:
      presets = ["paper_power"]
  for name in presets:
    config.method.update(PRESETS[name])
  return config
