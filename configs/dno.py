"""Direct noise optimisation: the noise of each image climbs the reward; no weight is trained.

  python -m jaxalign.launch --config=configs/dno.py
  python -m jaxalign.launch --config=configs/dno.py --config.data.eval_prompts=mine.txt
  python -m jaxalign.launch --config=configs/dno.py \\
      --config.reward.names="('jpeg_compressibility',)" --config.method.gradient=hybrid2

The images are those of the evaluation: `eval.samples` of each of the first `eval.prompts` of
`data.eval_prompts`; `data.prompts` is not read.

Arguments after a colon, separated by commas:
  emoji    the embedded model, reward scene_clip, and the best of N at the same cost beside it
           (default); not measured
  emoji_sd3    the same on the embedded transformer, a flow; not measured
  smoke, smoke_sd3    random-weight fixtures, a UNet and a flow-matching transformer, three
           updates, for tests
  sd15     published settings for Stable Diffusion 1.x on 45 animals; not measured here. Give
           --config.model.path and --config.reward.names
  sdxl     the same for Stable Diffusion XL
  sd35     the same for Stable Diffusion 3.5 medium at 512 px, 28 steps and guidance 4.5, for which
           nothing is published
  release  what the published scripts compute, see docs/methods/dno.md
"""
from jaxalign.config import recipes
from jaxalign.methods.dno import PRESETS


def get_config(arg="emoji"):
  size, presets = recipes.split_argument(
      arg, (*recipes.EMBEDDED, *recipes.SMOKE, "sd15", "sdxl", "sd35"), PRESETS)
  config = recipes.default("dno", "dno:" + (arg or "emoji"))
  config.optim.b2 = 0.999
  recipes.make_at_inference(config, size)
  if size in recipes.EMBEDDED:
    config.train.steps, config.train.checkpoint_every, config.eval.every = 20, 10, 10
    config.optim.lr = 1e-1
    config.method.rival, config.method.remat = True, "none"
  elif size in recipes.SMOKE:
    config.optim.lr = 2e-2
    config.method.rival, config.method.permutations, config.method.remat = True, 2, "none"
  else:
    config.model.remat = "block"
    if size == "sd35":
      config.optim.weight_decay = 0.0
    config.optim.lr = 1e-2                      # 1e-3 for rewards of pixel statistics
    config.train.steps, config.train.checkpoint_every, config.eval.every = 100, 25, 25
  for preset in presets:
    config.method.update(PRESETS[preset])
    config.optim.weight_decay = 0.01
  return config
