"""ReFL: the reward's gradient through one denoising step, taken late in the sampler.

  python -m jaxalign.launch --config=configs/refl.py

Arguments after a colon:
  emoji    the embedded model, reward soft_style_3d (default); not measured
  emoji_sd3    the same on the embedded transformer, a flow; not measured
  smoke, smoke_sd3    random-weight fixtures, a UNet and a flow-matching transformer, three
           updates, for tests
  sd15     published settings for Stable Diffusion 1.x, all weights of the UNet trained; not
           measured here. Give --config.model.path, --config.reward.names and
           --config.data.prompts; the target of 2 is in units of ImageReward
  sd35     Stable Diffusion 3.5 medium at 512 px: the adapter and the optimiser of flow_grpo
           (`recipes.make_sd35`), the rest ours, for want of anything published; not measured.
           Give --config.model.path and the same
"""
from jaxalign.config import recipes


def get_config(arg="emoji"):
  size, _ = recipes.split_argument(arg, (*recipes.EMBEDDED, *recipes.SMOKE, "sd15", "sd35"))
  config = recipes.default("refl", "refl:" + (arg or "emoji"))
  if size in recipes.EMBEDDED:
    recipes.make_embedded(config, size)
    config.reward.names = ("soft_style_3d",)    # that of nabla_gfn.py
    config.train.steps, config.train.checkpoint_every, config.eval.every = 36, 12, 12
    config.optim.lr, config.optim.warmup, config.optim.decay_steps = 5e-4, 4, 32
  elif size in recipes.SMOKE:
    recipes.make_smoke(config, size)
    config.method.window = 2               # of its four steps
  else:
    config.model.path = ""                  # --config.model.path=DIR
    config.train.patience = 0               # the judge knows emoji scenes only
    config.model.adapter, config.model.remat = "full", "block"
    config.method.objective, config.method.target, config.method.weight = "hinge", 2.0, 1e-3
    config.method.window = 10
    config.sample.batch, config.sample.steps, config.sample.guidance = 64, 40, 1.0
    config.sample.kind = "ddpm"
    config.optim.accumulate, config.optim.ema = 4, 0.9999
    config.optim.lr, config.optim.b2, config.optim.weight_decay = 1e-5, 0.999, 1e-2
    config.train.steps, config.train.checkpoint_every, config.eval.every = 100, 25, 25
    config.eval.batch = 8
    if size == "sd35":
      recipes.make_sd35(config)
      config.sample.kind, config.sample.eta, config.sample.guidance = "ddim", 0.0, 4.5
      config.method.window = 3              # of ten steps
      config.optim.ema = 0.0
  return config
