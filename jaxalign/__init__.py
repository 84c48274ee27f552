"""Aligns pretrained text-to-image diffusion models with rewards and preferences."""


def run(config, path=None, *, on_step=None, on_look=None) -> dict:
  """Runs a recipe, or continues it, and returns its summary: `python -m jaxalign.launch` in Python.

    import jaxalign
    config = jaxalign.load_recipe("jaxalign:nabla_gfn")
    config.train.steps = 20
    summary = jaxalign.run(config, "runs/mine", on_step=lambda step, values: print(step, values))

  Args:
    config: of `load_recipe`, or a recipe's name.
    path: folder of the run; runs/RECIPE by default.
    on_step: `(step, values)`, called with the numbers that metrics.jsonl gets, in process 0.
    on_look: `(step, samples, prompts)`, called every `eval.every` steps with pictures, scores and
      features (`train.evaluation.Samples`) of P prompts.
  Raises:
    errors.UserError: the config, a file or a reward is at fault.
  """
  from jaxalign import train
  from jaxalign.config import recipes
  cfg = recipes.parse(load_recipe(config) if isinstance(config, str) else config)
  path = path or f"runs/{cfg.recipe.replace(':', '-')}"
  return train.run(cfg, path, on_step=on_step, on_look=on_look)


def load_recipe(name: str):
  """The ConfigDict of a recipe, `FILE.py[:ARG]`, or `jaxalign:NAME[:ARG]` for a shipped one."""
  from jaxalign.config import recipes
  return recipes.load_recipe(name)
