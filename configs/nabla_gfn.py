"""nabla-GFlowNet on the embedded emoji model (or, by argument, on something else).

  python -m jaxalign.launch --config=configs/nabla_gfn.py

Arguments after a colon, separated by commas:
  emoji    the embedded model, reward emoji_clip (default)
  smoke    random-weight fixture, three updates, for tests
  paper, release, no_flow, final_latent    method presets, see docs/methods/nabla_gfn.md
"""
from jaxalign import configs_lib
from jaxalign.methods.nabla_gfn import PRESETS


def get_config(arg="emoji"):
  size, presets = configs_lib.split_argument(arg, ("emoji", "smoke"), PRESETS)
  config = configs_lib.default("nabla_gfn", "nabla_gfn:" + (arg or "emoji"))
  if size == "emoji":
    # Taken through perturbed latents, the reward's gradient keeps more of what the images of a
    # prompt share, which is what a policy can learn.
    config.method.beta = 14.0
    config.method.perturbations, config.method.perturb_std = 2, 0.8
    config.train.steps, config.train.checkpoint_every, config.eval.every = 64, 16, 32
    config.optim.lr, config.optim.warmup, config.optim.decay_steps = 2e-3, 5, 59
  else:
    configs_lib.make_smoke(config)
  for preset in presets:
    config.method.update(PRESETS[preset])
  if size == "smoke":
    config.method.strata = 2       # of its four steps
  return config
