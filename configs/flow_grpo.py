"""Flow-GRPO and its relatives on the embedded emoji model (or, by argument, on something else).

  python -m jaxalign.launch --config=configs/flow_grpo.py

Arguments after a colon, separated by commas:
  emoji    the embedded model, a UNet, on which `ddim` with eta 1 has the part of the SDE; reward
           scene_clip as a black box (default); not measured
  emoji_sd3    the same on the embedded transformer, a flow; not measured
  signs    words on signs, reward ocr, judge ocr_judge (docs/signs.md)
  smoke, smoke_sd3    random-weight fixtures, a UNet and a flow-matching transformer, three
           updates, for tests
  sd15     Stable Diffusion 1.x at 512 px, settings ours; not measured. Give --config.model.path and
           --config.reward.names
  sd35     Stable Diffusion 3.5 medium at 512 px with the settings of yifan123/flow_grpo
           (`recipes.make_sd35`): 48 groups of 24 images, two optimiser steps an update; not
           measured. Give the same
  flow_grpo_fast, dance, mix, flow_grpo_tilt    the relatives, with their samplers on flow models;
           see docs/methods/flow_grpo.md
"""
from jaxalign.config import recipes
from jaxalign.methods.flow_grpo import PRESETS

# kind, eta and steps of the sampler, on flow models.
SAMPLERS = {"flow_grpo_fast": ("cps", 0.8, 10), "dance": ("dance_sde", 0.3, 16),
            "mix": ("flow_sde", 0.7, 25), "flow_grpo_tilt": ("flow_sde", 0.7, 10)}


def get_config(arg="emoji"):
  size, presets = recipes.split_argument(
      arg, (*recipes.WITH_SIGNS, *recipes.SMOKE, "sd15", "sd35"), PRESETS)
  config = recipes.default("flow_grpo", "flow_grpo:" + (arg or "emoji"))
  if size in recipes.WITH_SIGNS:
    recipes.make_embedded(config, size)
    config.sample.batch, config.sample.steps, config.sample.guidance = 128, 8, 1.0
    config.method.step_weights = "even"           # as in ddpo.py
    config.train.steps, config.train.checkpoint_every, config.eval.every = 60, 15, 15
    config.optim.lr, config.optim.warmup, config.optim.decay_steps = 1e-3, 4, 118
  elif size in recipes.SMOKE:
    recipes.make_smoke(config, size)
    config.method.group = 4
  else:
    config.model.path, config.model.lora_rank = "", 4        # --config.model.path=DIR
    config.sample.batch, config.sample.steps, config.sample.guidance = 128, 20, 5.0
    config.optim.lr, config.optim.b2, config.optim.weight_decay = 3e-4, 0.999, 1e-4
    config.optim.accumulate = 8
    config.train.steps, config.train.checkpoint_every, config.eval.every = 200, 20, 20
    config.train.patience = 0                   # the judge knows emoji scenes only
    config.eval.batch = 16
    if size == "sd35":
      recipes.make_sd35(config)
      config.sample.batch, config.method.group, config.optim.accumulate = 1152, 24, 3
  if size in ("emoji_sd3", "signs", "sd35", "smoke_sd3"):
    config.sample.kind, config.sample.eta = "flow_sde", 0.7
    for preset in presets:
      config.sample.kind, config.sample.eta, steps = SAMPLERS[preset]
      if size == "sd35":
        config.sample.steps = steps
        if preset == "flow_grpo_fast":
          config.sample.guidance = 1.0
  for preset in presets:
    config.method.update(PRESETS[preset])
  # Clip ranges are per latent element; the published ones are for 64x64x16.
  config.method.clip_range *= 65536 / recipes.LATENTS[size]
  return config
