"""B2-DiffuRL on the embedded emoji model (or, by argument, on something else).

  python -m jaxalign.launch --config=configs/b2_diffurl.py
  python -m jaxalign.launch --config=configs/b2_diffurl.py:sd15 --config.model.path=DIR \\
      --config.reward.names="('clip_score:DIR',)"

Arguments after a colon, separated by commas:
  emoji    the embedded model, yes/no reward scene (default); not measured
  emoji_sd3    the same on the embedded transformer, a flow; not measured
  signs    words on signs, reward ocr_exact, judge ocr_judge (docs/signs.md)
  smoke, smoke_sd3    random-weight fixtures, a UNet and a flow-matching transformer, three
           updates, for tests
  sd15     Stable Diffusion 1.x at 512 px on 8 accelerators; not measured
  sd35     Stable Diffusion 3.5 medium at 512 px: the adapter and the optimiser of flow_grpo
           (`recipes.make_sd35`), the rest ours, for want of anything published; not measured.
           Give --config.model.path and --config.reward.names
  b2_paper, b2_code    method presets, see docs/methods/b2_diffurl.md
"""
from jaxalign.config import recipes
from jaxalign.methods.b2_diffurl import PRESETS


def get_config(arg="emoji"):
  size, presets = recipes.split_argument(
      arg, (*recipes.WITH_SIGNS, *recipes.SMOKE, "sd15", "sd35"), PRESETS)
  config = recipes.default("b2_diffurl", "b2_diffurl:" + (arg or "emoji"))
  if size in recipes.WITH_SIGNS:
    recipes.make_embedded(config, size)
    config.reward.names = ("ocr_exact",) if size == "signs" else ("scene",)
    config.sample.batch, config.sample.steps, config.sample.guidance = 128, 8, 1.0
    config.method.group, config.method.interval_stages = 8, 60
    # As in ddpo.py: with uniform weights the last steps' densities drown what decides the image.
    config.method.step_weights = "even"
    config.train.steps, config.train.checkpoint_every, config.eval.every = 80, 15, 15
    config.train.patience = 0                   # the judge is reported, and stops nothing
    config.optim.lr, config.optim.warmup, config.optim.decay_steps = 5e-4, 4, 156
  elif size in recipes.SMOKE:
    recipes.make_smoke(config, size)
    config.method.interval_stages = 2
  else:
    # The published stage of 256 roots and 100 stages, as eight times as many updates of 32 roots:
    # 128,000 samples, as there. Its reward is the CLIP score, which the user names.
    config.model.path, config.model.lora_rank = "", 4        # --config.model.path=DIR
    config.reward.names = ("jpeg_compressibility",)
    config.data.prompts, config.data.eval_prompts = (
        "jaxalign:animal_activities_train", "jaxalign:animal_activities_heldout")
    config.sample.batch, config.sample.steps, config.sample.guidance = 160, 20, 5.0
    config.method.interval_stages, config.method.history = 800, 64
    config.optim.lr, config.optim.b2, config.optim.weight_decay = 1e-4, 0.999, 1e-4
    config.optim.accumulate = 4
    config.train.steps, config.train.checkpoint_every, config.eval.every = 800, 40, 80
    config.train.patience = 0                   # the judge knows emoji scenes only
    config.eval.batch = 16
    if size == "sd35":
      recipes.make_sd35(config)
  for preset in presets:
    config.method.update(PRESETS[preset])
  if size in recipes.SMOKE:
    config.method.group = 4                     # of its eight trajectories
  elif config.sample.batch % config.method.group:
    config.sample.batch = 32 * config.method.group    # a preset's group: as many roots as :sd15
  # Clip ranges are per latent element; the method's and the presets' are for 64x64x4.
  config.method.clip_range *= 16384 / recipes.LATENTS[size]
  return config
