"""Where the seconds of a nabla-GFlowNet update go, on the default recipe.

  python benchmarks/update.py [--config=configs/nabla_gfn.py] [--repeats=3]

Times the loop's own two programs, and their ingredients compiled one by one at the same sizes.
"""
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from jaxalign import methods
from jaxalign.config import recipes
from jaxalign.data.prompts import read_prompts
from jaxalign.devices import rng
from jaxalign.train.experiment import build, gather
from jaxalign.train.programs import Programs

ROOT = pathlib.Path(__file__).resolve().parent.parent
_CONFIG = config_flags.DEFINE_config_file("config", str(ROOT / "configs/nabla_gfn.py"))
_REPEATS = flags.DEFINE_integer("repeats", 3, "timed calls of each")


def main(argv):
  del argv
  cfg = recipes.parse(_CONFIG.value)
  exp = build(cfg)
  models, frozen = exp.models, exp.frozen
  method = methods.make(cfg.method_name, models, cfg.method, cfg.optim)
  prompts = read_prompts("data.prompts", cfg.data.prompts)
  table, root = exp.prompt_table(prompts), jax.random.key(0)
  programs = Programs(exp, method, table, root)
  state = programs.init()
  print(programs.compile(state))
  ids = np.arange(cfg.sample.batch, dtype=np.int32) % len(prompts)

  def median(call):
    seconds = []
    for _ in range(_REPEATS.value + 1):
      begun = time.perf_counter()
      jax.block_until_ready(call())
      seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])

  collect = median(lambda: programs.collect(state, 0, ids, prompts))
  experience, _, rewards = programs.collect(state, 0, ids, prompts)

  def update():
    nonlocal state
    state, metrics = programs.update(state, experience, rewards, 0)
    return metrics
  whole = median(update)

  rows = cfg.sample.batch * cfg.method.strata
  batch = jax.jit(gather)(table, np.resize(ids, rows), np.arange(rows))
  x = jax.random.normal(rng.stream(root, rng.EVAL), (rows,) + models.latent_shape)
  t = jnp.full((rows,), 500)
  policy = method.product(state)
  run = lambda policy, frozen, x: models.output(policy, frozen, x, t, batch["conditioning"])
  value = lambda x, frozen: models.score(
      frozen["reward"], models.decode(frozen["decoder"], x), batch["prepared"]).sum()
  forward = jax.jit(run)
  to_policy = jax.jit(jax.grad(lambda p, f, x: jnp.square(run(p, f, x)).mean()))
  to_latent = jax.jit(jax.grad(lambda x, p, f: jnp.square(run(p, f, x)).mean()))
  reward = jax.jit(jax.grad(value))
  parts = {
      f"guided denoiser, {rows} rows": median(lambda: forward(policy, frozen, x)),
      "  with gradient to the policy": median(lambda: to_policy(policy, frozen, x)),
      "  with gradient to the latent": median(lambda: to_latent(x, policy, frozen)),
      "decoder and reward with gradient": median(lambda: reward(x, frozen)),
  }
  size = cfg.sample.batch
  print(f"{cfg.recipe} on {exp.mesh.devices.flat[0].platform} x{exp.mesh.size}, "
        f"{size} trajectories of {cfg.sample.steps} steps, {cfg.method.strata} + 1 transitions")
  print(f"{'collect and score':36s} {collect:6.2f} s  ({size / collect:.2f} images/s)")
  print(f"{'update':36s} {whole:6.2f} s")
  for name, seconds in parts.items():
    print(f"  {name:34s} {seconds:6.2f} s")
  print(f"{'step':36s} {collect + whole:6.2f} s")


if __name__ == "__main__":
  sys.exit(app.run(main))
