"""Diff-Instruct*: a reward for a one-step generator, held by a divergence of scores.

  python -m jaxalign.launch --config=configs/diff_instruct_star.py

Arguments after a colon, joined by commas:
  emoji    the shipped generator, distilled from the embedded model by
           configs/distill_emoji_onestep.py; reward scene_clip (default); not measured
  smoke, smoke_sd3    random-weight fixtures, a UNet and a flow-matching transformer, three
           updates, for tests
  sdxl     a one-step SDXL generator (DMD2), told timestep 399, with SDXL as teacher; the published
           scale of guidance. Learning rates, batch and kappa were not published: those here are
           first guesses, not measured
  sd35     the same for a one-step generator of Stable Diffusion 3.5 medium at 512 px, told pure
           noise, with the multi-step model as teacher; all of it ours, not measured
  exact    the full gradient; sim: no reward; diff_instruct_pp: KL in place of pseudo-Huber
"""
from jaxalign.config import recipes
from jaxalign.methods.diff_instruct_star import PRESETS


def get_config(arg="emoji"):
  size, presets = recipes.split_argument(arg, ("emoji", *recipes.SMOKE, "sdxl", "sd35"), PRESETS)
  config = recipes.default("diff_instruct_star", "diff_instruct_star:" + (arg or "emoji"))
  if size in recipes.SMOKE:
    recipes.make_smoke(config, size)
    config.sample.timestep = 625
    config.method.assistant_steps = 2
  elif size == "sd35":
    recipes.make_sd35(config)
  config.sample.kind, config.sample.steps, config.sample.guidance = "one_step", 1, 1.0
  config.eval.path_kl = False
  if size == "emoji":
    config.model.path = "jaxalign:emoji_onestep"
    config.model.teacher, config.model.adapter = "jaxalign:emoji", "full"
    config.sample.batch = 32
    config.method.warmup, config.method.assistant_steps = 10, 3
    config.method.assistant_lr = 3e-4
    config.optim.lr, config.optim.warmup = 1e-4, 5
    config.train.steps, config.train.checkpoint_every, config.eval.every = 40, 10, 10
  elif size == "sdxl":
    config.model.path = config.model.teacher = ""        # both SDXL's DIR; model.unet=FILE
    config.model.dtype, config.model.remat, config.model.lora_rank = "bfloat16", "block", 64
    config.sample.timestep, config.sample.batch = 399, 64
    config.method.guidance, config.method.warmup = 7.5, 200
    config.method.assistant_lr = 1e-4
    config.optim.lr = 1e-5
    config.train.steps, config.train.checkpoint_every, config.eval.every = 5000, 250, 250
    config.train.patience = 0                   # the judge knows emoji scenes only
    config.eval.batch = 16
  elif size == "sd35":
    config.model.teacher = ""                   # as model.path; model.unet=FILE
    config.model.lora_rank, config.sample.timestep, config.sample.batch = 64, 1000, 64
    config.method.guidance, config.method.warmup = 4.5, 200
    config.method.assistant_lr = 1e-4
    config.optim.lr = 1e-5
    config.train.steps, config.train.checkpoint_every, config.eval.every = 5000, 250, 250
  for preset in presets:
    config.method.update(PRESETS[preset])
  return config
