"""AlignProp: the reward's gradient through a random number of the sampler's steps.

  python -m jaxalign.launch --config=configs/alignprop.py

Arguments after a colon:
  emoji    the embedded model, reward soft_style_3d (default); not measured
  emoji_sd3    the same on the embedded transformer, a flow; not measured
  smoke, smoke_sd3    random-weight fixtures, a UNet and a flow-matching transformer, three
           updates, for tests
  sd15     published settings for Stable Diffusion 1.x and an aesthetic score that aims at 10; not
           measured here. Give --config.model.path, --config.reward.names and --config.data.prompts
  sd35     Stable Diffusion 3.5 medium at 512 px: the adapter and the optimiser of flow_grpo
           (`recipes.make_sd35`), the rest ours, for want of anything published; not measured.
           Give --config.model.path and the same
"""
from jaxalign.config import recipes


def get_config(arg="emoji"):
  size, _ = recipes.split_argument(arg, (*recipes.EMBEDDED, *recipes.SMOKE, "sd15", "sd35"))
  config = recipes.default("alignprop", "alignprop:" + (arg or "emoji"))
  if size in recipes.EMBEDDED:
    recipes.make_embedded(config, size)
    config.reward.names = ("soft_style_3d",)    # that of nabla_gfn.py
    config.train.steps, config.train.checkpoint_every, config.eval.every = 36, 12, 12
    config.optim.lr, config.optim.warmup, config.optim.decay_steps = 5e-4, 4, 32
  elif size in recipes.SMOKE:
    recipes.make_smoke(config, size)
  else:
    config.model.path = ""                  # --config.model.path=DIR
    config.train.patience = 0               # the judge knows emoji scenes only
    config.model.lora_rank, config.model.remat = 4, "block"
    config.method.truncation = "per_step"
    config.method.objective, config.method.target, config.method.weight = "absolute", 10.0, 0.01
    config.sample.batch, config.sample.steps, config.sample.guidance = 128, 50, 7.5
    config.sample.eta, config.sample.final = 0.0, ""
    config.optim.accumulate, config.optim.clip_norm = 8, 5.0
    config.optim.lr, config.optim.b2, config.optim.weight_decay = 1e-3, 0.999, 0.1
    config.train.steps, config.train.checkpoint_every, config.eval.every = 14, 2, 2
    config.eval.batch = 8
    if size == "sd35":
      recipes.make_sd35(config)
      config.sample.kind, config.sample.eta = "ddim", 0.0           # Euler's method
      config.sample.batch, config.optim.accumulate = 64, 8
  return config
