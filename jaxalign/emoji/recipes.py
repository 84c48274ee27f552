"""What preference recipes set for the embedded world."""
import ml_collections

from jaxalign.config import recipes

# Pairs at a growing distance from the model -> the reward that tells how much of them was learned.
MISMATCH = {"r0": "scene_clip", "r1": "scene_clip", "r2": "scene_clip", "r3": "grayness"}
# Arguments of preference recipes.
PAIR_SIZES = (*recipes.EMBEDDED, *MISMATCH, "smoke", "smoke_sd3", "sd15", "sdxl", "sd35")


def make_pairs(config: ml_collections.ConfigDict, size: str) -> None:
  """A preference recipe on the embedded model, and what is measured of it.

  `emoji` has the shipped pairs, 3-D drawings preferred to flat ones; `r0` to `r3` those that
  `python -m jaxalign.emoji.mismatch` writes.
  """
  shipped = size in recipes.EMBEDDED
  if shipped:
    recipes.make_embedded(config, size)
  config.data.pairs = "jaxalign:emoji" if shipped else f"runs/pairs/{size}.parquet"
  config.reward.names = ("style_3d" if shipped else MISMATCH[size],)
  config.sample.batch = 32
  config.train.steps, config.train.checkpoint_every, config.eval.every = 240, 60, 60
  config.train.patience = 0                 # the judge's own taste is not what pairs teach
  config.optim.lr, config.optim.warmup, config.optim.decay_steps = 5e-4, 10, 230
