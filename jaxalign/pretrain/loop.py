"""The loop of pretraining: any `Task`, one optimiser, figures and pictures on the way.

It shares the folder of a run, its checkpoints and its log with the loop of the methods, not its
order: there is no base model to compare with, no reward and no policy.
"""
import contextlib
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jaxalign import pretrain, viz
from jaxalign.devices import rng, sharding
from jaxalign.errors import UserError
from jaxalign.methods.shared.optimizer import ema_update
from jaxalign.pretrain.config import PretrainConfig
from jaxalign.pretrain.optimizer import make_optimizer
from jaxalign.storage.checkpoint import Checkpointer
from jaxalign.train.workdir import Workdir


def run(cfg: PretrainConfig, path: pathlib.Path, devices=None) -> dict:
  """Trains, or goes on training, in the folder `path`; writes the asset to `path/export`.

  A batch is spread over all devices.

  Returns:
    The summary: steps, seconds, device, and the figures of the last, thorough look.
  Raises:
    UserError: the config or a file is at fault, or the loss is not finite; checkpoints stay.
  """
  if devices is None:
    sharding.use_cores(cfg.check_devices)
  jax.config.update("jax_threefry_partitionable", True)
  try:
    with contextlib.ExitStack() as stack:    # closes files and finishes writing whatever happens
      return _run(cfg, path, devices, stack)
  except OSError as error:                   # a full disk, a folder that went away
    raise UserError(f"{error}; what --workdir={path} holds is sound, and the same command goes on "
                    "from its last checkpoint") from error


def _run(cfg, path, devices, stack) -> dict:
  workdir = Workdir(path, cfg)
  summary_file = path / "summary.json"
  if summary_file.exists():
    try:
      summary = json.loads(summary_file.read_text())
      done = summary["steps"] >= cfg.train.steps
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
      raise UserError(f"{summary_file}: not the summary of a run ({error}); delete it, and the "
                      "run's command makes it anew") from error
    if done:
      tqdm.write(f"{path}: this run is finished; see {summary_file}")
      return summary
  mesh = sharding.make_mesh(-1, 1, 1, devices)
  cfg.check_devices(mesh.size)
  task = pretrain.load(cfg.task_name).make(cfg.task)
  workdir.create()
  stack.callback(workdir.close)

  optimizer = make_optimizer(cfg.optim)
  root = jax.random.key(cfg.seed)
  everywhere = sharding.replicated(mesh)
  tables = jax.device_put(task.tables, everywhere)

  def init(key):
    params = task.init(key)
    average = jax.tree.map(jnp.copy, params) if cfg.optim.ema else {}
    return {"params": params, "optimizer": optimizer.init(params), "average": average}

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=everywhere)
  def update(state, tables, step):
    batch = task.draw(tables, rng.stream(root, rng.UPDATE, step))
    batch = jax.lax.with_sharding_constraint(batch, sharding.batch_sharding(mesh))
    # The barrier keeps XLA from drawing images anew inside the network's own loops.
    batch = jax.lax.optimization_barrier(batch)
    grads, metrics = jax.grad(task.loss, has_aux=True)(state["params"], batch)
    updates, opt = optimizer.update(grads, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    average = state["average"]
    if cfg.optim.ema:
      average = ema_update(average, params, cfg.optim.ema, step + 1)
    metrics["train/grad_norm"] = optax.tree.norm(grads)
    return {"params": params, "optimizer": opt, "average": average}, metrics

  # Jitted, so that no two leaves share a buffer.
  state = jax.jit(init, out_shardings=everywhere)(rng.stream(root, rng.INIT))
  product = lambda: jax.device_get(state["average"] if cfg.optim.ema else state["params"])
  count = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
  tqdm.write(f"{cfg.recipe}: {count:,} parameters")

  checkpoints = Checkpointer(workdir.path / "checkpoints", cfg.train.keep)
  stack.callback(checkpoints.close)
  step, before = 0, 0.0
  if checkpoints.latest_step():
    state, progress = checkpoints.restore(state)
    step, before = checkpoints.restored, progress["seconds"]
  checkpoints.tidy()
  if step:
    tqdm.write(f"resumed at step {step}")
  workdir.open_metrics(step, ("tensorboard",))

  clock, pending = time.monotonic(), None

  def settle(extra=()):
    """Fetches and logs the last line that is due, while the next step runs."""
    nonlocal pending
    if pending is None:
      return
    at, seconds, values = pending
    values = {name: float(value) for name, value in jax.device_get(values).items()}
    bad = [name for name, value in values.items() if not np.isfinite(value)]
    if bad:
      raise UserError(f"step {at}: {', '.join(bad)} is not finite; lower optim.lr in another "
                      "--workdir; the checkpoints of this one are sound")
    workdir.log(at, seconds, values | dict(extra))
    bar.set_postfix({name.split("/")[1]: f"{value:.4f}" for name, value in values.items()})
    pending = None

  def look(thorough=False):
    seen = task.look(product(), thorough)
    if seen.images is not None:
      viz.save_grid(seen.images, workdir.path / "samples" / f"step_{step:06d}.png",
                    row_labels=list(seen.labels))
    return seen.figures

  with tqdm(total=cfg.train.steps, initial=step, desc=cfg.recipe, unit="step") as bar:
    while step < cfg.train.steps:
      state, values = update(state, tables, jnp.int32(step))
      settle()
      step += 1
      bar.update()
      last = step == cfg.train.steps
      seconds = before + time.monotonic() - clock
      if step % cfg.train.log_every == 0 or step % cfg.train.look_every == 0 or last:
        pending = step, seconds, values
      if step % cfg.train.look_every == 0 and not last:
        settle(look())
        clock, before = time.monotonic(), seconds      # looking is not training time
      if step % cfg.train.checkpoint_every == 0 or last:
        settle()                                       # a state that went wrong is never saved
        checkpoints.save(step, state, {"seconds": seconds})
        before, clock = seconds, time.monotonic()
  checkpoints.wait()
  figures = look(thorough=True)
  summary = {"recipe": cfg.recipe, "steps": step, "seconds": round(before, 1),
             "device": f"{jax.default_backend()} x{mesh.size}", "parameters": count,
             "figures": figures}
  task.save(product(), workdir.path / "export", {
      "recipe": cfg.recipe, "steps": step, "seconds": summary["seconds"], "figures": figures})
  workdir.write_json("summary.json", summary)
  tqdm.write(json.dumps(summary, indent=2))
  return summary
