"""`--dry_run`: what a run would be, without running it."""
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import methods
from jaxalign.config.schema import Config
from jaxalign.data.pairs import open_pairs
from jaxalign.data.prompts import read_prompts, read_sets
from jaxalign.devices import rng, sharding
from jaxalign.rewards import Reward
from jaxalign.train.experiment import Experiment, build, gather, placed_shapes, stored
from jaxalign.train.plan import held, outlined, table_shapes


def describe(cfg: Config, devices=None) -> str:
  """Resolved config, data, parameters and bytes, sharding table, and FLOPs of an update.

  Args:
    devices: of the mesh; all of JAX by default, and so those of the run, if `train.start_devices`
      was called.
  Raises:
    UserError: what the run itself would refuse: a key or a file of the config, its prompts.
  """
  at_inference = cfg.at_inference
  pairs = open_pairs(cfg.data.pairs, cfg.data.ties) if cfg.reads_pairs else None
  if at_inference:
    held_out = read_prompts("data.eval_prompts", cfg.data.eval_prompts)[:cfg.eval.prompts or None]
    prompts = []
  else:
    sets = read_sets(cfg.data.prompts, cfg.data.eval_prompts, cfg.eval.prompts,
                     pairs.captions if pairs else ())
    held_out, prompts = sets.evaluation, sets.training
    pairs = pairs and pairs.without(sets.held_out)
  exp = build(cfg, devices)
  models = exp.models
  method = methods.make(cfg.method_name, models, cfg.method, cfg.optim)
  for scorer in (exp.reward, exp.judge):
    if isinstance(scorer, Reward):
      scorer.prepare(prompts + held_out)           # refuses prompts that it cannot score
  # From here on only shapes, so that nothing more is placed on the devices.
  outline = dataclasses.replace(exp, put=placed_shapes)
  images = len(held_out) * cfg.eval.samples if at_inference else cfg.sample.batch
  state = (_search_state(outline, method, held_out, images) if at_inference
           else outlined(outline, method, prompts).state_shapes())

  lines = [json.dumps(cfg.to_dict(), indent=2), "", _data(cfg, prompts, held_out, pairs)]
  cut = exp.pipeline.cut(prompts + held_out + list(pairs.captions if pairs else ()))
  lines += [cut, ""] if cut else [""]
  lines += _sizes(exp, state, at_inference)
  lines += ["", f"mesh {dict(exp.mesh.shape)} on {exp.mesh.devices.flat[0].platform}"]
  if exp.mesh.size > 1:                              # on one device nothing is split
    lines[-1] += f"; {exp.pipeline.denoiser_name} parameters by partition:"
    lines += sharding.sharding_table(models.frozen["base"]["params"], exp.mesh)

  cond = jax.tree.map(lambda a: a[:1], exp.embed([""]))
  x = jnp.zeros((1,) + models.latent_shape)
  flops = lambda f, *args: (jax.jit(f).lower(*args).cost_analysis() or {}).get("flops", 0.0)
  forward = flops(lambda base, cond: models.denoise(
      models.combine(None, base), x, jnp.zeros(1, jnp.int32), cond), models.frozen["base"], cond)
  decode = flops(models.decode, models.frozen["decoder"], x)
  cost = dict(method.cost(images))
  differentiated = images * bool(cost["denoiser_backward"]) if at_inference else cost["decodes"]
  if not at_inference and not cfg.reads_pairs:           # scoring the collected images
    cost["decodes"] += images
    cost["reward_queries"] += images
  total = (forward * (cost["denoiser_forward"] + 2 * cost["denoiser_backward"])
           + decode * (cost["decodes"] + 2 * differentiated))
  # At inference what the last update made is scored by one more pass.
  passes = cfg.train.steps + at_inference
  lines += ["",
            f"one denoiser forward {forward / 1e9:.3f} GFLOP, one decode {decode / 1e9:.3f} GFLOP",
            f"per update of {images:,} {'pairs' if pairs else 'images'}: "
            + ", ".join(f"{v:,} {k}" for k, v in cost.items()),
            f"per update {total / 1e12:.3f} TFLOP (a backward pass counted as two forward ones, "
            f"the reward network not counted); {passes} updates "
            f"{total * passes / 1e12:.2f} TFLOP"]
  return "\n".join(lines)


def _data(cfg: Config, prompts, held_out, pairs) -> str:
  """What the run reads, in a line."""
  if not prompts:
    return (f"{len(held_out)} prompts of data.eval_prompts, {cfg.eval.samples} images of each; "
            "nothing is trained, so data.prompts is not read")
  text = f"{len(prompts)} training prompts, {len(held_out)} held-out ones"
  return text if pairs is None else f"{len(pairs)} preference pairs; watched on {text}"


def _search_state(exp: Experiment, method: methods.Method, prompts: list[str], images: int):
  """The state of all images of a search, the last batch filled up, as `Programs.state_shapes`."""
  size = exp.config.sample.batch
  zeros = np.zeros(size, np.int32)
  init = lambda frozen, table: method.init(
      rng.stream(jax.random.key(exp.config.seed), rng.EVAL), frozen, gather(table, zeros, zeros))
  rows, batches = sharding.batch_sharding(exp.mesh), -(-images // size)
  one = jax.eval_shape(init, exp.frozen, table_shapes(exp, prompts))
  return jax.tree.map(
      lambda a: jax.ShapeDtypeStruct((batches * size, *a.shape[1:]), a.dtype, sharding=rows)
      if a.ndim else jax.ShapeDtypeStruct((batches,), a.dtype,
                                          sharding=sharding.replicated(exp.mesh)), one)


def _sizes(exp: Experiment, state, at_inference: bool) -> list[str]:
  """A line for each tree that lies on the devices: numbers in it, bytes in all and on a device."""
  names = {"base": exp.pipeline.denoiser_name, "decoder": "vae"}
  store = functools.partial(stored, dtype=exp.config.model.dtype)
  text = jax.eval_shape(store, exp.pipeline.text_params)
  text = placed_shapes(text, sharding.param_shardings(text, exp.mesh))
  trained = {"trainable": "policy (trained)", "policy": "policy (trained)",
             "optimizer": "optimiser", "ema": "average"}
  trees = {**{names.get(name, name): tree for name, tree in exp.frozen.items()},
           **{name.replace("_", " "): tree for name, tree in text.items()},
           "judge": exp.judge_params["judge"]}
  if exp.observer is not exp.judge:
    trees["features"] = exp.judge_params["observer"]
  own = {name if at_inference else trained.get(name, name.replace("_", " ")): tree
         for name, tree in state.items()}
  lines = [f"{'on the devices':24s}{'numbers':>15s}{'MiB':>11s}{'MiB on each':>14s}"]
  for heading, part in (("", trees), ("state of all images:" if at_inference else "state:", own)):
    lines += [heading] if heading else []
    for name, tree in part.items():
      leaves = jax.tree.leaves(tree)
      size = sum(leaf.size for leaf in leaves)
      total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
      lines.append(f"{name:24s}{size:>15,}{total / 2**20:>11.2f}{held(tree) / 2**20:>14.2f}")
  return lines
