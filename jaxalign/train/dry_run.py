"""`--dry_run`: what a run would be, without running it."""
import json

import jax
import jax.numpy as jnp

from jaxalign import methods, sharding
from jaxalign.configs_lib import Config
from jaxalign.train.experiment import build


def describe(cfg: Config) -> str:
  """Resolved config, parameter counts and bytes, sharding table, and FLOPs of an update."""
  exp = build(cfg)
  models = exp.models
  method = methods.load(cfg.method_name).make(models, cfg.method, cfg.optim)
  policy = jax.eval_shape(models.init_policy, jax.random.key(0), models.frozen)
  size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  counts = {"policy (trained)": policy, "unet": models.frozen["base"],
            "vae": models.frozen["decoder"],
            **{name.replace("_", " "): tree for name, tree in exp.pipeline.text_params.items()},
            "reward": models.frozen["reward"]}
  lines = [json.dumps(cfg.to_dict(), indent=2), ""]
  for name, tree in counts.items():
    lines.append(f"{name:20s}{size(tree):>15,} parameters {4 * size(tree) / 2**20:>10.1f} MiB")
  lines += ["", f"mesh {dict(exp.mesh.shape)}; UNet parameters by partition:"]
  lines += sharding.sharding_table(models.frozen["base"], exp.mesh)

  cond = jax.tree.map(lambda a: a[:1], exp.prompt_table([""])["cond"])
  x = jnp.zeros((1,) + models.latent_shape)
  flops = lambda f, *args: (jax.jit(f).lower(*args).cost_analysis() or {}).get("flops", 0.0)
  forward = flops(lambda base, cond: models.denoise(
      models.combine(None, base), x, jnp.zeros(1, jnp.int32), cond), models.frozen["base"], cond)
  decode = flops(models.decode, models.frozen["decoder"], x)
  cost = method.cost(cfg.sample.batch)
  total = (forward * (cost["denoiser_forward"] + 2 * cost["denoiser_backward"])
           + decode * (cfg.sample.batch * (not cfg.reads_pairs) + 3 * cost["decodes"]))
  lines += ["",
            f"one denoiser forward {forward / 1e9:.3f} GFLOP, one decode {decode / 1e9:.3f} GFLOP",
            "per update: " + ", ".join(f"{v:,} {k}" for k, v in cost.items()),
            f"per update {total / 1e12:.3f} TFLOP (a backward pass counted as two forward ones, "
            f"the reward network not counted); {cfg.train.steps} updates "
            f"{total * cfg.train.steps / 1e12:.2f} TFLOP"]
  return "\n".join(lines)
