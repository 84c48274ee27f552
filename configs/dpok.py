"""DPOK on the embedded emoji model (or, by argument, on something else).

  python -m jaxalign.launch --config=configs/dpok.py

Arguments after a colon, separated by commas:
  emoji    the embedded model, reward scene_clip as a black box (default); not measured
  emoji_sd3    the same on the embedded transformer, a flow; not measured
  signs    words on signs, reward ocr, judge ocr_judge; not measured
  smoke, smoke_sd3    random-weight fixtures, a UNet and a flow-matching transformer, three
           updates, for tests
  sd15     Stable Diffusion 1.x at 512 px: sampler, adapter and rate as published, batches ours (no
           buffer of old transitions); not measured. Give --config.model.path and
           --config.reward.names
  sd35     Stable Diffusion 3.5 medium at 512 px: the adapter and the optimiser of flow_grpo
           (`recipes.make_sd35`), the rest ours; not measured. Give the same
  paper, release    method presets, see docs/methods/dpok.md
"""
from jaxalign.config import recipes
from jaxalign.methods.dpok import PRESETS


def get_config(arg="emoji"):
  size, presets = recipes.split_argument(
      arg, (*recipes.WITH_SIGNS, *recipes.SMOKE, "sd15", "sd35"), PRESETS)
  config = recipes.default("dpok", "dpok:" + (arg or "emoji"))
  if size in recipes.WITH_SIGNS:
    recipes.make_embedded(config, size)
    # As in ddpo.py.
    config.sample.batch, config.sample.steps, config.sample.guidance = 128, 8, 1.0
    config.method.step_weights = "even"
    config.train.steps, config.train.checkpoint_every, config.eval.every = 60, 15, 15
    config.optim.lr, config.optim.warmup, config.optim.decay_steps = 1e-3, 4, 118
  elif size in recipes.SMOKE:
    recipes.make_smoke(config, size)
  else:
    config.model.path, config.model.lora_rank = "", 4        # --config.model.path=DIR
    config.sample.batch, config.sample.steps, config.sample.guidance = 64, 50, 7.5
    config.optim.lr, config.optim.b2, config.optim.clip_norm = 1e-5, 0.999, 0.1
    config.optim.accumulate = 4
    config.train.steps, config.train.checkpoint_every, config.eval.every = 1000, 50, 50
    config.train.patience = 0                   # the judge knows emoji scenes only
    config.eval.batch = 16
    if size == "sd35":
      recipes.make_sd35(config)
      config.sample.final = "noisy"
  for preset in presets:
    config.method.update(PRESETS[preset])
  # Clip ranges are per latent element: 1.6 nats a step; the published one is for 64x64x4.
  config.method.clip_range = 1e-4 * 16384 / recipes.LATENTS[size]
  return config
