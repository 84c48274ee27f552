"""Supervised fine-tuning on the preferred images of pairs: what preference losses must beat.

  python -m jaxalign.launch --config=configs/sft.py
  python -m jaxalign.launch --config=configs/sft.py:sd15 --config.model.path=DIR \
      --config.data.pairs=DIR --config.data.prompts=FILE --config.data.eval_prompts=FILE

Arguments after a colon:
  emoji    the embedded model on the 3-D drawings of the shipped pairs (default); not measured
  emoji_sd3    the same on the embedded transformer, a flow; not measured
  r0, r1, r2, r3    the embedded model on pairs at a growing distance from what it draws, made by
           `python -m jaxalign.emoji.mismatch --scenario=r0 --output=runs/pairs/r0.parquet`
  smoke, smoke_sd3    random-weight fixtures, a UNet and a flow-matching transformer, three
           updates, for tests
  sd15     Stable Diffusion 1.x at 512 px on Pick-a-Pic v2, published settings, all of the UNet
           trained; not measured
  sdxl     the same for SDXL; not measured
  sd35     Stable Diffusion 3.5 medium at 512 px on Pick-a-Pic v2, an adapter on attention and the
           optimiser of flow_grpo (`recipes.make_sd35`), the rest ours, for want of anything
           published; not measured
"""
from jaxalign.config import recipes
from jaxalign.emoji.recipes import MISMATCH, PAIR_SIZES, make_pairs


def get_config(arg="emoji"):
  size, _ = recipes.split_argument(arg, PAIR_SIZES)
  config = recipes.default("sft", "sft:" + (arg or "emoji"))
  if size in recipes.EMBEDDED or size in MISMATCH:
    make_pairs(config, size)
    config.sample.batch = 64                # as many images per update as the others have
    config.optim.lr = 2e-3
  elif size in recipes.SMOKE:
    recipes.make_smoke(config, size)
    config.data.pairs = "jaxalign:fixture"
  else:
    recipes.make_pick_a_pic(config)
    config.method.prompt_dropout = 0.2
    config.optim.lr, config.optim.warmup = 1e-9, 500
    if size == "sd35":
      recipes.make_sd35(config)
      config.sample.kind, config.sample.eta, config.sample.steps = "ddim", 0.0, 28
      config.sample.batch = 256
  return config
