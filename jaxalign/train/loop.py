"""The one loop: it owns data, devices, scoring, checkpoints, metrics, evaluation and stopping.

It knows no method by name. Order: workdir, models, base evaluation, state, resume, training, final
evaluation, export, summary.
"""
import contextlib
import functools
import pathlib
import time

import jax
import jax.numpy as jnp

from jaxalign import methods
from jaxalign.config.schema import Config
from jaxalign.convert import save_pipeline
from jaxalign.data.pairs import open_pairs
from jaxalign.data.prompts import draw_prompts, read_sets
from jaxalign.devices import processes, rng, sharding
from jaxalign.errors import UserError
from jaxalign.rewards import keep_answers
from jaxalign.storage.checkpoint import Checkpointer
from jaxalign.train import alarm, steps
from jaxalign.train.bar import Work
from jaxalign.train.evaluation import Evaluator, calibrated, compare, describe, exact_tilt
from jaxalign.train.experiment import build
from jaxalign.train.pairs import PairTable
from jaxalign.train.policy import movement, policy_weights
from jaxalign.train.programs import Programs
from jaxalign.train.report import (
  before_and_after,
  finish,
  judge_progress,
  log_step,
  peak_bytes,
  save_pictures,
  spread,
  take_finished,
  watch_metrics,
)
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
  pair_files = open_pairs(cfg.data.pairs, cfg.data.ties) if cfg.reads_pairs else None
  sets = read_sets(cfg.data.prompts, cfg.data.eval_prompts, cfg.eval.prompts,
                   pair_files.captions if pair_files else ())
  train_prompts, eval_prompts = sets.training, sets.evaluation
  if pair_files and sets.held_out:
    pair_files = pair_files.without(sets.held_out)
  contents = {"data.prompts": train_prompts, "data.eval_prompts": eval_prompts}
  if cfg.reads_pairs:
    contents["data.pairs"] = [pair_files.digest()]
  workdir = Workdir(path, cfg, contents)
  finished = take_finished(workdir.path, cfg)
  if finished:
    return finished

  # ------------------------------------------------------------------ models, reward, mesh
  started = time.monotonic()
  exp = build(cfg, devices)
  methods.make(cfg.method_name, exp.models, cfg.method, cfg.optim)   # refuses what it cannot
  # Made only now, so that a config that is refused leaves no folder behind.
  workdir.create()
  stack.callback(workdir.close)
  for scorer in (exp.reward, exp.judge):
    keep_answers(scorer, workdir.path)
  say(f"{cfg.recipe}: {sets}")
  say(f"mesh {dict(exp.mesh.shape)} on {exp.mesh.devices.flat[0].platform}")
  evaluate = Evaluator(exp)
  root = jax.random.key(cfg.seed)
  untouched = jax.jit(exp.models.init_policy)(rng.stream(root, rng.INIT),
                                              {"base": exp.frozen["base"]})
  untouched = jax.device_put(untouched, sharding.param_shardings(untouched, exp.mesh))

  moved = movement(cfg, untouched, exp.models.frozen["base"]["params"])

  # ------------------------------------------------------------------ base model
  watched = [train_prompts[i] for i in spread(len(train_prompts), cfg.eval.watch_prompts)]
  workdir.keep_prompts(eval_prompts, watched)
  watch = lambda policy, label: evaluate(policy, watched, cfg.eval.watch_samples, label=label,
                                         path_kl=bool(cfg.alarm.path_kl))
  held_out = lambda policy, label, **kw: evaluate(policy, eval_prompts, cfg.eval.samples,
                                                  label=label, **kw)
  base_watch = workdir.cached("base_watch", lambda: watch(untouched, "base model, watched prompts"))
  base = workdir.cached("base", lambda: held_out(untouched, "base model, held-out prompts"))
  base_again = workdir.cached("base_again", lambda: held_out(
      untouched, "base model, other noise", stream=rng.EVAL_FLOOR))
  raw, exp = exp.reward.weights, calibrated(exp, base_watch)
  evaluate.adopt(exp)
  base_watch, base, base_again = (
      samples.reweighted(raw, exp.reward.weights) for samples in (base_watch, base, base_again))
  reward_std = exp.models.reward_std
  if reward_std == 0 and not cfg.reads_pairs:
    raise UserError(f"reward.names={cfg.reward.names}: gives every sample of a prompt the same "
                    "score, so there is nothing to align")
  say(f"base model: reward {base.scores['reward'].mean():.4f} (within-prompt std "
      f"{reward_std:.4f}), judge {base.scores['judge'].mean():.4f}")

  # ------------------------------------------------------------------ data, method and state
  pairs = None
  if cfg.reads_pairs:
    pairs = PairTable(exp, pair_files, workdir.path)
    say(f"{len(pair_files)} preference pairs of {len(set(pairs.prompts))} captions")
  row_prompts = pairs.prompts if pairs else train_prompts
  cut = exp.pipeline.cut([*train_prompts, *eval_prompts, *row_prompts])
  if cut:
    say(cut)
  table = pairs.shared if pairs else exp.prompt_table(train_prompts)

  def prepare(strength):
    weaker = alarm.weakened(cfg, strength)
    method = methods.make(cfg.method_name, exp.models, weaker.method, weaker.optim)
    return method, Programs(exp, method, table, root, pairs)
  method, programs = prepare(1.0)
  state = programs.init()
  n_trainable = sum(a.size for a in jax.tree.leaves(method.product(state)))
  say(f"{n_trainable:,} trainable parameters")

  # ------------------------------------------------------------------ resume
  checkpoints = Checkpointer(workdir.path / "checkpoints", cfg.train.keep)
  stack.callback(checkpoints.close)
  sound = None                           # the last look without an alarm, to go back to
  if cfg.train.alarm == "rollback":
    sound = Checkpointer(workdir.path / "sound")
    stack.callback(sound.close)
  best = untouched if cfg.train.keep_best else None      # the policy with the best judge score
  untouched = None                       # as large as the model, where all of it is trained
  content = lambda: {"method": state, **({"best": best} if cfg.train.keep_best else {})}
  progress = {**steps.begin(float(base_watch.scores["judge"].mean())), "update_bytes": 0}
  step, saved = steps.resume(cfg, workdir, checkpoints, content(), progress)
  if step:
    state, best = saved["method"], saved.get("best")
  if progress["strength"] != 1.0:
    method, programs = prepare(progress["strength"])
  workdir.open_metrics(step, cfg.log.to, on_step)

  # ------------------------------------------------------------------ training
  if not step:
    save_pictures(workdir, "samples/step_000000.png", base_watch, watched, cfg)

  def compile_programs():
    if step >= cfg.train.steps or progress["stopped"]:
      return
    say(programs.compile(state))
    progress["update_bytes"] = programs.update_bytes
    if not programs.read_base:           # where all weights are trained, no look reads it either
      jax.tree.map(lambda a: a.delete(), exp.frozen["base"]["params"])

  def place_base():
    if not programs.read_base:
      params = exp.models.frozen["base"]
      exp.frozen["base"] = exp.put(params, sharding.param_shardings(params, exp.mesh))

  def advance(step):
    nonlocal state
    if pairs:
      ids = pairs.draw(step, cfg.sample.batch)
    else:
      ids = draw_prompts(cfg.seed, step, len(train_prompts), cfg.sample.batch, cfg.group)
    experience, terms, rewards = programs.collect(state, step, ids, row_prompts)
    state, values = programs.update(state, experience, rewards, step)
    return values, terms, [row_prompts[i] for i in ids]

  def look(step):
    """The short evaluation of this step: what it adds to the log; judges progress."""
    nonlocal best
    samples = watch(method.product(state), f"watching step {step}")
    workdir.keep("watch", samples)
    if on_look is not None and processes.is_main():
      on_look(step, samples, watched)
    save_pictures(workdir, f"samples/step_{step:06d}.png", samples, watched, cfg)
    seen = watch_metrics(samples, base_watch)
    progress.update(judge_progress(cfg, progress, step, seen))
    logged, after = alarm.look(cfg, progress, step, samples, base_watch,
                               lambda: moved(method.product(state)))
    quiet = len(after["alarms"]) == len(progress["alarms"])
    progress.update(after)
    if cfg.train.keep_best and progress["best_step"] == step:
      best = jax.tree.map(jnp.copy, method.product(state))   # the state itself is donated
    if sound is not None and quiet:
      sound.forget_from(step)
      sound.save(step, content(), progress)
    return {**seen, **logged}

  def go_back():
    """The state of the last look without an alarm, and weaker programs to go on with."""
    nonlocal method, programs, state, best, step
    place_base()
    step, good = 0, steps.begin(float(base_watch.scores["judge"].mean()))
    if sound.latest_step():
      saved, good = sound.restore(content())
      state, best, step = saved["method"], saved.get("best"), sound.restored
    else:
      state = programs.init()
      best = jax.tree.map(jnp.copy, method.product(state)) if cfg.train.keep_best else None
    progress.update(alarm.rolled_back(cfg, progress, good))
    say(f"back at step {step}, with {progress['strength']:g} of the strength")
    method, programs = prepare(progress["strength"])
    checkpoints.forget_from(step)
    if step:
      checkpoints.save(step, content(), progress)
    workdir.open_metrics(step, cfg.log.to, on_step)

  devices = tuple(exp.mesh.devices.flat)
  while True:
    compile_programs()
    step = steps.take(cfg, workdir, checkpoints, progress, step, advance=advance, look=look,
                      content=content, report=functools.partial(log_step, workdir, exp),
                      work=Work(cfg.sample.batch, programs.operations, devices))
    if not alarm.to_roll_back(cfg, progress):
      break
    go_back()

  # ------------------------------------------------------------------ final evaluation and export
  place_base()                           # path KL reads it
  policy, policy_step = method.product(state), step
  if cfg.train.keep_best:
    samples = watch(policy, "watching the last step")
    if samples.scores["judge"].mean() <= progress["best_judge"]:
      policy, policy_step = best, progress["best_step"]
  tuned = held_out(policy, "tuned model, held-out prompts", path_kl=cfg.eval.path_kl)
  workdir.keep("tuned", tuned.reweighted(exp.reward.weights, raw))     # as the base's is kept
  if not cfg.eval.every or step % cfg.eval.every:          # else the last look drew them
    save_pictures(workdir, f"samples/step_{step:06d}.png",
                  watch(method.product(state), "last step, watched prompts"), watched, cfg)
  rows = spread(len(eval_prompts), cfg.log.grid_prompts)
  before_and_after(workdir, base, tuned, eval_prompts, rows)
  weights = policy_weights(cfg, processes.fetch(policy), exp.pipeline.weights)
  if processes.is_main():
    save_pipeline(exp.pipeline.with_weights(weights), workdir.path / "export", dtype="float32")

  # ------------------------------------------------------------------ summary
  updates = {name: step * count for name, count in method.cost(cfg.sample.batch).items()}
  if not cfg.reads_pairs:                                  # scoring the collected images
    updates["decodes"] += step * cfg.sample.batch
    updates["reward_queries"] += step * cfg.sample.batch
  summary = {
      "recipe": cfg.recipe, "steps": step, "exported_step": policy_step,
      "seconds": progress["seconds"],
      "total_seconds": round(time.monotonic() - started, 1),
      "device": f"{exp.mesh.devices.flat[0].platform} x{exp.mesh.size}",
      "stopped": progress["stopped"], "alarms": progress["alarms"],
      "trainable_parameters": int(n_trainable),
      "base": describe(base), "tuned": compare(tuned, base, base_again),
      "cost": {**updates, "update_bytes": progress.get("update_bytes", 0),
               "peak_bytes": peak_bytes(exp)},
  }
  if method.tilt is not None:
    summary["exact_tilt"] = exact_tilt(float(method.tilt(state)), base, base_again)
  finish(workdir, cfg, summary)
  return summary
