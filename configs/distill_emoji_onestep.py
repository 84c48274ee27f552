"""Distils the embedded model into a one-step generator: Diff-Instruct* without a reward (SIM).

  python -m jaxalign.launch --config=configs/distill_emoji_onestep.py

Its export is shipped as `jaxalign:emoji_onestep` (`python -m jaxalign.pretrain.onestep`), where
configs/diff_instruct_star.py starts. Argument after a colon: emoji (default; the generator's card
says what it took), or smoke: random-weight fixture, three updates.
"""
from jaxalign.config import recipes


def get_config(arg="emoji"):
  size, _ = recipes.split_argument(arg, ("emoji", "smoke"))
  config = recipes.default("diff_instruct_star", "distill_emoji_onestep:" + size)
  if size == "smoke":
    recipes.make_smoke(config)
  else:
    config.model.adapter = "full"
    config.data.prompts = "jaxalign:emoji_captions"
    config.sample.batch = 32
    config.train.steps, config.train.checkpoint_every, config.eval.every = 200, 50, 100
    config.train.patience = 0                   # a generator begins far below its teacher
    config.method.assistant_steps, config.method.assistant_lr = 1, 3e-4
    config.optim.lr, config.optim.warmup, config.optim.ema = 3e-4, 20, 0.98
  config.sample.kind, config.sample.steps, config.sample.guidance = "one_step", 1, 1.0
  config.sample.timestep = 625
  config.method.reward, config.eval.path_kl = 0.0, False
  return config
