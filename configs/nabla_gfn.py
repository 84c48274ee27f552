"""nabla-GFlowNet on the embedded emoji model (or, by argument, on something else).

  python -m jaxalign.launch --config=configs/nabla_gfn.py

Arguments after a colon, separated by commas:
  emoji    the embedded model, reward soft_style_3d: drawings in 3-D (default)
  emoji_sd3    the same on the embedded transformer, a flow; not measured
  signs    words on signs, reward soft_word, judge ocr_judge (docs/signs.md)
  quick    the same in a quarter of the steps, with looks and evaluations of half the prompts or
           less: to see a run from its beginning to its report, not to measure anything
  smoke, smoke_sd3    random-weight fixtures, a UNet and a flow-matching transformer, three
           updates, for tests
  sd15     Stable Diffusion 1.x or 2.x: adapter, optimiser, sampler and trajectories per update of
           the published fast setting, our defaults of the method; not measured. Give
           --config.model.path, --config.reward.names and, for other prompts, --config.data
  sdxl     the same for Stable Diffusion XL, for which nothing is published
  sd35     Stable Diffusion 3.5 medium at 512 px: the adapter and the optimiser of flow_grpo
           (`recipes.make_sd35`), the rest ours, for want of anything published; not measured.
           Give --config.model.path and --config.reward.names
  paper, release, no_flow, final_latent    method presets, see docs/methods/nabla_gfn.md
"""
from jaxalign.config import recipes
from jaxalign.methods.nabla_gfn import PRESETS


def get_config(arg="emoji"):
  size, presets = recipes.split_argument(
      arg, (*recipes.WITH_SIGNS, "quick", *recipes.SMOKE, "sd15", "sdxl", "sd35"), PRESETS)
  config = recipes.default("nabla_gfn", "nabla_gfn:" + (arg or "emoji"))
  if size in (*recipes.WITH_SIGNS, "quick"):
    recipes.make_embedded(config, "emoji" if size == "quick" else size)
    # A house style: every drawing in 3-D, of which the base model draws few unless told to.
    config.reward.names = ("soft_style_3d",)
    config.model.lora_targets = ("attention", "ff")
    # A gradient taken at a perturbed estimate follows less of what no picture shows.
    config.method.beta, config.method.perturb_std, config.method.strata = 14.0, 0.2, 2
    config.sample.batch, config.sample.steps, config.sample.guidance = 32, 10, 2.0
    config.train.steps, config.train.checkpoint_every, config.eval.every = 48, 16, 16
    config.optim.lr, config.optim.warmup, config.optim.decay_steps = 2e-3, 5, 48
    config.eval.prompts, config.eval.samples = 128, 2
    config.eval.watch_prompts, config.eval.watch_samples = 32, 2
    if size == "signs":                         # letters that a rule reads; two networks judge
      config.reward.names, config.model.adapter = ("soft_word",), "full"
      config.method.gamma, config.sample.guidance = "one", 1.0
      config.train.steps, config.optim.lr, config.optim.decay_steps = 80, 5e-4, 80
    if size == "quick":
      config.train.steps, config.train.checkpoint_every, config.eval.every = 12, 12, 6
      config.optim.warmup, config.optim.decay_steps = 2, 12
      config.eval.prompts, config.eval.path_kl = 32, False
      config.eval.watch_prompts = 16
  elif size in recipes.SMOKE:
    recipes.make_smoke(config, size)
  else:
    config.model.path = ""                      # --config.model.path=DIR
    config.model.lora_rank = 8
    config.model.dtype, config.model.remat = "bfloat16", "block"
    config.data.prompts, config.data.eval_prompts = (
        "jaxalign:animals_train", "jaxalign:animals_heldout")
    config.method.strata, config.method.serial = 5, True
    config.sample.batch, config.sample.steps, config.sample.guidance = 32, 50, 5.0
    config.optim.lr, config.optim.weight_decay, config.optim.accumulate = 1e-3, 1e-4, 4
    config.optim.b2 = 0.999
    config.train.steps, config.train.checkpoint_every, config.eval.every = 400, 50, 50
    config.train.patience = 0                   # the judge knows emoji scenes only
    config.eval.batch = 8
    if size == "sd35":
      recipes.make_sd35(config)
      config.sample.kind, config.sample.eta, config.sample.steps = "ddim", 1.0, 20
      config.sample.spacing, config.sample.final = "linspace", "noisy"
  for preset in presets:
    config.method.update(PRESETS[preset])
  if size in recipes.SMOKE:
    config.method.strata = 2       # of its four steps
  elif size not in (*recipes.WITH_SIGNS, "quick"):
    config.method.minibatches = 1  # the batch is the fast setting's; those presets' is 16 times it
  return config
