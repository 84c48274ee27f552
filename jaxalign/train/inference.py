"""The loop of methods that train no weights: each image's noise is what changes.

It shares folder, checkpoints, metrics, evaluation and summary with `train/loop.py`, and its base is
the same: the images of the held-out prompts from the evaluation's noise. `train.steps` updates of
all images make up a run; the outcome of the last one is scored as well.
"""
import contextlib
import dataclasses
import pathlib
import shutil
import time

import jax

from jaxalign import methods
from jaxalign.config.schema import Config
from jaxalign.data.prompts import read_prompts
from jaxalign.devices import processes, rng
from jaxalign.methods import best_of_n
from jaxalign.rewards import keep_answers
from jaxalign.storage.checkpoint import Checkpointer
from jaxalign.train import alarm, steps
from jaxalign.train.bar import Work
from jaxalign.train.evaluation import Evaluator, calibrated, compare, describe
from jaxalign.train.experiment import build
from jaxalign.train.report import (
  before_and_after,
  finish,
  judge_progress,
  peak_bytes,
  save_pictures,
  spread,
  take_finished,
  watch_metrics,
  write_product,
)
from jaxalign.train.search import Search, means
from jaxalign.train.workdir import Workdir


def run(cfg: Config, path: pathlib.Path, devices=None, on_step=None, on_look=None) -> dict:
  """Runs, or continues, `cfg` in the folder `path`; returns the summary. See `train.run`.

  Raises:
    UserError: the config, a file or a reward is at fault; checkpoints written before stay.
  """
  with contextlib.ExitStack() as stack:      # closes files and finishes writing whatever happens
    return _run(cfg, path, devices, stack, on_step, on_look)


def _run(cfg, path, devices, stack, on_step, on_look) -> dict:
  # ------------------------------------------------------------------ workdir
  say = processes.say
  prompts = read_prompts("data.eval_prompts", cfg.data.eval_prompts)[:cfg.eval.prompts or None]
  workdir = Workdir(path, cfg, {"data.eval_prompts": prompts})
  finished = take_finished(workdir.path, cfg)
  if finished:
    return finished

  # ------------------------------------------------------------------ models, reward, mesh
  started = time.monotonic()
  exp = build(cfg, devices)
  method = methods.make(cfg.method_name, exp.models, cfg.method, cfg.optim)
  workdir.create()
  stack.callback(workdir.close)
  for scorer in (exp.reward, exp.judge):
    keep_answers(scorer, workdir.path)
  search = Search(exp, method, prompts)
  total = search.total
  held = sum(a.nbytes for a in jax.tree.leaves(search.state)) / 2**20
  cut = exp.pipeline.cut(prompts)
  if cut:
    say(cut)
  say(f"{cfg.recipe}: {total} images, {cfg.eval.samples} of each of {len(prompts)} prompts of "
      f"data.eval_prompts, {held:.0f} MiB of noise and moments on the devices; nothing is trained, "
      f"so data.prompts is not read; mesh "
      f"{dict(exp.mesh.shape)} on {exp.mesh.devices.flat[0].platform}")

  # ------------------------------------------------------------------ base model
  evaluate = Evaluator(exp)
  workdir.keep_prompts(prompts, prompts)
  images_of = lambda noise, label: evaluate(None, prompts, cfg.eval.samples, noise=noise,
                                            label=label)
  base = workdir.cached("base", lambda: images_of(search.product(), "base model"))
  base_again = workdir.cached("base_again", lambda: images_of(
      search.fresh(rng.EVAL_FLOOR), "base model, other noise"))
  raw, exp = exp.reward.weights, calibrated(exp, base)
  evaluate.adopt(exp)
  base, base_again = (s.reweighted(raw, exp.reward.weights) for s in (base, base_again))
  method = methods.make(cfg.method_name, exp.models, cfg.method, cfg.optim)
  search.adopt(exp, method)
  say(f"base model: reward {base.scores['reward'].mean():.4f}, judge "
      f"{base.scores['judge'].mean():.4f}")

  # ------------------------------------------------------------------ resume
  checkpoints = Checkpointer(workdir.path / "checkpoints", cfg.train.keep)
  stack.callback(checkpoints.close)
  # `last` is the step after which the run ends, one after that at which all images were at rest.
  progress = {**steps.begin(float(base.scores["judge"].mean())), "last": 0}
  step, saved = steps.resume(cfg, workdir, checkpoints, search.state, progress)
  if step:
    search.state = saved
  workdir.open_metrics(step, cfg.log.to, on_step)

  # ------------------------------------------------------------------ optimisation
  if not step:
    save_pictures(workdir, "samples/step_000000.png", base, prompts, cfg)
  say(search.compile())

  def report(step, seconds, values, look):
    values = means(values, total, step)
    if values.get("train/active") == 0 and not progress["last"]:
      progress["last"] = step + 1
    values.update(look())
    workdir.log(step, seconds, values)
    return values

  def look(step):
    """The evaluation of this step: what it adds to the log; judges progress."""
    samples = images_of(search.product(), f"watching step {step}")
    workdir.keep("watch", samples)
    if on_look is not None and processes.is_main():
      on_look(step, samples, prompts)
    save_pictures(workdir, f"samples/step_{step:06d}.png", samples, prompts, cfg)
    seen = watch_metrics(samples, base)
    progress.update(judge_progress(cfg, progress, step, seen))
    logged, after = alarm.look(cfg, progress, step, samples, base)
    progress.update(after)
    return {**seen, **logged}

  def ended(step):
    if not progress["last"] or step < progress["last"]:
      return ""
    return f"no image improved for {cfg.method.patience} steps (method.patience)"

  step = steps.take(cfg, workdir, checkpoints, progress, step, advance=search.step, report=report,
                    look=look, content=lambda: search.state, ended=ended,
                    work=Work(total, search.operations, tuple(exp.mesh.devices.flat)))

  # ------------------------------------------------------------------ product
  begun = time.monotonic()
  means(search.step(step), total, step + 1)      # scores what the last update made
  progress["seconds"] = round(progress["seconds"] + time.monotonic() - begun, 3)
  noise = search.product()
  tuned = images_of(noise, "result")
  workdir.keep("tuned", tuned.reweighted(exp.reward.weights, raw))     # as the base's is kept
  save_pictures(workdir, f"samples/step_{step:06d}.png", tuned, prompts, cfg)
  rows = spread(len(prompts), cfg.log.grid_prompts)
  before_and_after(workdir, base, tuned, prompts, rows)
  best_step = search.best_step()
  if processes.is_main():
    write_product(workdir.path / "product", prompts, noise, best_step, base, tuned)

  # ------------------------------------------------------------------ summary
  cost = {name: (step + 1) * count for name, count in method.cost(total).items()}
  summary = {
      "recipe": cfg.recipe, "steps": step, "images": total, "seconds": progress["seconds"],
      "total_seconds": round(time.monotonic() - started, 1),
      "device": f"{exp.mesh.devices.flat[0].platform} x{exp.mesh.size}",
      "stopped": progress["stopped"], "alarms": progress["alarms"], "base": describe(base),
      "tuned": compare(tuned, base, base_again),
      "cost": {**cost, "equal_candidates": best_of_n.equal_candidates(exp.models, cost, total),
               "update_bytes": search.update_bytes, "peak_bytes": peak_bytes(exp)},
  }
  if getattr(cfg.method, "rival", False):
    summary["best_of_n"] = run_rival(cfg, path, devices, summary["cost"]["equal_candidates"])
    summary["total_seconds"] = round(time.monotonic() - started, 1)
  finish(workdir, cfg, summary)
  if "best_of_n" in summary:
    rival = summary["best_of_n"]
    say(f"best of {rival['candidates']} at the same cost: reward {rival['reward']['mean']:.4f} ± "
        f"{rival['reward'].get('sem', float('nan')):.4f}, judge {rival['judge']['mean']:.4f} ± "
        f"{rival['judge'].get('sem', float('nan')):.4f}, in {rival['seconds']:.0f} s")
  return summary


def run_rival(cfg: Config, path: pathlib.Path, devices, candidates: int) -> dict:
  """Best of so many for the same images, as a run of its own in the folder `best_of_n`."""
  folder = path / "best_of_n"
  rival = dataclasses.replace(
      cfg, recipe=f"{cfg.recipe} (best of n)", method_name="best_of_n", method=best_of_n.Config(),
      train=dataclasses.replace(cfg.train, steps=max(1, candidates - 1), patience=0),
      eval=dataclasses.replace(cfg.eval, every=0))
  workdir = Workdir(folder, rival)
  workdir.create()
  if processes.is_main():
    shutil.copytree(path / "evaluations", folder / "evaluations", dirs_exist_ok=True,
                    ignore=lambda _, names: [n for n in names if not n.startswith("base")])
  processes.barrier("base copied")
  workdir.close()
  result = run(rival, folder, devices)
  return {"candidates": result["steps"] + 1, "seconds": result["seconds"], **result["tuned"]}
