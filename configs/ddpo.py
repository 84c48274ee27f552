"""DDPO on the embedded emoji model (or, by argument, on something else).

  python -m jaxalign.launch --config=configs/ddpo.py
  python -m jaxalign.launch --config=configs/ddpo.py:sd15 --config.model.path=DIR

Arguments after a colon:
  emoji    the embedded model, yes/no reward scene (default); not measured
  emoji_sd3    the same on the embedded transformer, a flow; not measured
  signs    words on signs, reward ocr_exact, judge ocr_judge (docs/signs.md)
  smoke, smoke_sd3    random-weight fixtures, a UNet and a flow-matching transformer, three
           updates, for tests
  sd15     Stable Diffusion 1.x at 512 px on 8 accelerators; not measured
  sdxl     the same for Stable Diffusion XL at 1024 px in bfloat16, with the clip range for latents
           four times as large; nothing is published
  sd35     Stable Diffusion 3.5 medium at 512 px with the settings of yifan123/flow_grpo for
           PickScore (config/grpo.py; see `recipes.make_sd35`): 48 groups of 24 images, two
           optimiser steps an update, clip range 1e-4, advantages by the mean of the group. Unlike
           there, the spread is the group's, no KL is added, and the unconditional branch has a
           gradient; not measured. Give --config.model.path and --config.reward.names
  style    on the embedded model, the reward of configs/nabla_gfn.py, used as a black box; not
           measured
"""
from jaxalign.config import recipes


def get_config(arg="emoji"):
  size, words = recipes.split_argument(
      arg, (*recipes.WITH_SIGNS, *recipes.SMOKE, "sd15", "sdxl", "sd35"), ("style",))
  config = recipes.default("ddpo", "ddpo:" + (arg or "emoji"))
  if size in recipes.WITH_SIGNS:
    recipes.make_embedded(config, size)
    # Without guidance and in few steps a trajectory is cheap, and what the method lacks is samples.
    config.sample.batch, config.sample.steps, config.sample.guidance = 128, 8, 1.0
    config.method.group, config.method.min_count = 4, 4
    config.method.minibatches = 2
    config.method.clip_range = 1.6e-3           # 1.6 nats a step in 1,024 latent elements
    # With uniform weights the densities of the last steps drown what decides the image: in the
    # first world (docs/first_world) the reward then rises a third as far.
    config.method.step_weights = "even"
    config.train.steps, config.train.checkpoint_every, config.eval.every = 60, 15, 15
    config.optim.lr, config.optim.warmup, config.optim.decay_steps = 1e-3, 4, 118
    if words:
      config.reward.names = ("soft_style_3d",)
    else:
      config.reward.names = ("ocr_exact",) if size == "signs" else ("scene",)
      config.train.patience = 0                 # the judge is reported, and stops nothing
      config.optim.lr = 5e-4
  elif size in recipes.SMOKE:
    recipes.make_smoke(config, size)
    config.method.minibatches, config.method.inner_epochs, config.method.min_count = 2, 2, 2
    config.method.clip_range = 6.4e-3
  else:
    # The published setting for JPEG compressibility, in batches of half its size: 25,600 samples
    # and 400 optimiser steps of 64, as there. History: about 16 rewards of each of 45 animals.
    config.model.path, config.model.lora_rank = "", 4        # --config.model.path=DIR
    config.reward.names = ("jpeg_compressibility",)
    config.data.prompts, config.data.eval_prompts = (
        "jaxalign:animals_train", "jaxalign:animals_heldout")
    config.sample.batch, config.sample.steps, config.sample.guidance = 128, 50, 5.0
    config.method.minibatches, config.method.history = 2, 6
    config.optim.lr, config.optim.b2, config.optim.weight_decay = 3e-4, 0.999, 1e-4
    config.optim.accumulate = 8
    config.train.steps, config.train.checkpoint_every, config.eval.every = 200, 20, 20
    config.train.patience = 0                   # the judge knows emoji scenes only
    config.eval.batch = 16
    if size == "sdxl":
      config.model.dtype, config.model.remat = "bfloat16", "block"
      config.method.clip_range /= 4             # of the mean over latent elements
      config.optim.accumulate = 16
    if size == "sd35":
      recipes.make_sd35(config)
      config.sample.batch, config.method.group, config.method.minibatches = 1152, 24, 2
      config.method.advantage, config.method.clip_range = "group_z", 1e-4
      config.optim.accumulate = 3
  return config
