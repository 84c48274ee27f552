"""The one loop: it owns data, devices, scoring, checkpoints, metrics, evaluation and stopping.

It knows no method by name. Order: workdir, models, base evaluation, state, resume, training, final
evaluation, export, summary.
"""
import contextlib
import dataclasses
import functools
import json
import pathlib
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign import methods, metrics, viz
from jaxalign.config import registry
from jaxalign.config.schema import Config
from jaxalign.convert import save_pipeline
from jaxalign.data.pairs import open_pairs
from jaxalign.devices import processes, rng, sharding
from jaxalign.errors import UserError
from jaxalign.rewards import HostReward, check_scores, weighted_sum
from jaxalign.storage.checkpoint import Checkpointer
from jaxalign.train import steps
from jaxalign.train.evaluation import Evaluator, compare, describe, exact_tilt
from jaxalign.train.experiment import (
  Experiment,
  build,
  gather,
  placed_shapes,
  policy_weights,
  read_prompts,
)
from jaxalign.train.pairs import PairTable
from jaxalign.train.workdir import Workdir


def run(cfg: Config, path: pathlib.Path, devices=None) -> dict:
  """Runs, or continues, `cfg` in the folder `path`; returns the summary.

  Raises:
    UserError: the config, a file or a reward is at fault; checkpoints written before stay.
  """
  with contextlib.ExitStack() as stack:      # closes files and finishes writing whatever happens
    return _run(cfg, path, devices, stack)


def _run(cfg, path, devices, stack) -> dict:
  # ------------------------------------------------------------------ workdir
  say = processes.say
  train_prompts = read_prompts("data.prompts", cfg.data.prompts)
  eval_prompts = read_prompts("data.eval_prompts", cfg.data.eval_prompts)
  eval_prompts = eval_prompts[:cfg.eval.prompts or None]
  pair_files = open_pairs(cfg.data.pairs, cfg.data.ties) if cfg.reads_pairs else None
  method_module = registry.load_method(cfg.method_name)
  workdir = Workdir(path, cfg, {"data.prompts": train_prompts, "data.eval_prompts": eval_prompts})
  finished = read_finished(workdir.path, cfg)
  if finished:
    say(f"{path}: this run is finished; see {path / 'summary.json'}")
    return finished

  # ------------------------------------------------------------------ models, reward, mesh
  started = time.monotonic()
  exp = build(cfg, devices)
  method_module.make(exp.models, cfg.method, cfg.optim)    # refuses what it cannot train
  # Made only now, so that a config that is refused leaves no folder behind.
  workdir.create()
  stack.callback(workdir.close)
  say(f"{cfg.recipe}: {len(train_prompts)} training prompts, {len(eval_prompts)} held-out ones; "
      f"mesh {dict(exp.mesh.shape)} on {exp.mesh.devices.flat[0].platform}")
  evaluate = Evaluator(exp)
  root = jax.random.key(cfg.seed)
  untouched = jax.jit(exp.models.init_policy)(rng.stream(root, rng.INIT),
                                              {"base": exp.frozen["base"]})
  untouched = jax.device_put(untouched, sharding.param_shardings(untouched, exp.mesh))

  # ------------------------------------------------------------------ base model
  watched = [train_prompts[i] for i in spread(len(train_prompts), cfg.eval.watch_prompts)]
  watch = lambda policy, label: evaluate(policy, watched, cfg.eval.watch_samples, label=label)
  held_out = lambda policy, label, **kw: evaluate(policy, eval_prompts, cfg.eval.samples,
                                                  label=label, **kw)
  base_watch = workdir.cached("base_watch", lambda: watch(untouched, "base model, watched prompts"))
  base = workdir.cached("base", lambda: held_out(untouched, "base model, held-out prompts"))
  base_again = workdir.cached("base_again", lambda: held_out(
      untouched, "base model, other noise", stream=rng.EVAL_FLOOR))
  reward_std = metrics.within_prompt_std(base_watch.scores["reward"])
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
  models = dataclasses.replace(exp.models, reward_std=reward_std)
  method = method_module.make(models, cfg.method, cfg.optim)
  programs = Programs(exp, method, pairs.shared if pairs else exp.prompt_table(train_prompts), root,
                      pairs)
  state = programs.init()
  n_trainable = sum(a.size for a in jax.tree.leaves(method.product(state)))
  say(f"{n_trainable:,} trainable parameters")

  # ------------------------------------------------------------------ resume
  checkpoints = Checkpointer(workdir.path / "checkpoints", cfg.train.keep)
  stack.callback(checkpoints.close)
  best = untouched if cfg.train.keep_best else None      # the policy with the best judge score
  untouched = None                       # as large as the model, where all of it is trained
  content = lambda: {"method": state, **({"best": best} if cfg.train.keep_best else {})}
  progress = {**steps.begin(float(base_watch.scores["judge"].mean())), "update_bytes": 0}
  step, saved = steps.resume(cfg, workdir, checkpoints, content(), progress)
  if step:
    state, best = saved["method"], saved.get("best")
  workdir.open_metrics(step, cfg.log.tensorboard)

  # ------------------------------------------------------------------ training
  if not step:
    save_pictures(workdir, "samples/step_000000.png", base_watch, watched, cfg)
  if step < cfg.train.steps and not progress["stopped"]:
    say(programs.compile(state))
    progress["update_bytes"] = programs.update_bytes
    if not programs.read_base:           # where all weights are trained, no look reads it either
      jax.tree.map(lambda a: a.delete(), exp.frozen["base"])

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
    save_pictures(workdir, f"samples/step_{step:06d}.png", samples, watched, cfg)
    seen = watch_metrics(samples, base_watch)
    progress.update(judge_progress(cfg, progress, step, seen))
    if cfg.train.keep_best and progress["best_step"] == step:
      best = jax.tree.map(jnp.copy, method.product(state))   # the state itself is donated
    return seen

  step = steps.take(cfg, workdir, checkpoints, progress, step, advance=advance, look=look,
                    content=content, report=functools.partial(report, workdir, cfg.sample.batch))

  # ------------------------------------------------------------------ final evaluation and export
  if not programs.read_base:             # path KL does
    base_params = exp.models.frozen["base"]
    exp.frozen["base"] = exp.put(base_params, sharding.param_shardings(base_params, exp.mesh))
  policy, policy_step = method.product(state), step
  if cfg.train.keep_best:
    samples = watch(policy, "watching the last step")
    if samples.scores["judge"].mean() <= progress["best_judge"]:
      policy, policy_step = best, progress["best_step"]
  tuned = held_out(policy, "tuned model, held-out prompts", path_kl=cfg.eval.path_kl)
  workdir.keep("tuned", tuned)
  if not cfg.eval.every or step % cfg.eval.every:          # else the last look drew them
    save_pictures(workdir, f"samples/step_{step:06d}.png",
                  watch(method.product(state), "last step, watched prompts"), watched, cfg)
  rows = spread(len(eval_prompts), cfg.log.grid_prompts)
  before_and_after(workdir, base, tuned, eval_prompts, rows)
  weights = policy_weights(cfg, processes.fetch(policy), exp.pipeline.params["unet"])
  if processes.is_main():
    save_pipeline(exp.pipeline, workdir.path / "export", params={"unet": weights}, dtype="float32")

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
      "stopped": progress["stopped"], "trainable_parameters": int(n_trainable),
      "base": describe(base), "tuned": compare(tuned, base, base_again),
      "cost": {**updates, "update_bytes": progress.get("update_bytes", 0),
               "peak_bytes": peak_bytes(exp)},
  }
  if method.tilt is not None:
    summary["exact_tilt"] = exact_tilt(float(method.tilt(state)), base, base_again)
  workdir.write_json("summary.json", summary)
  say(summary_table(summary))
  return summary


class Programs:
  """The compiled parts of a step: collect and score, then update. Nothing in the loop compiles."""

  def __init__(self, exp: Experiment, method: methods.Method, table, root,
               pairs: PairTable | None = None):
    self._exp, self._method, self._root = exp, method, root
    # What a batch is made of: ids of prompts, whose rows of `table` are gathered on the devices, or
    # pairs, gathered on the host.
    self._rows, self._gather = (pairs.rows, pairs.gather) if pairs else (lambda ids: ids, gather)
    self._batch = sharding.batch_sharding(exp.mesh)
    self._replicated = sharding.replicated(exp.mesh)
    self._table = exp.put(table, self._replicated)
    ids = np.arange(exp.config.sample.batch, dtype=np.int32)
    self._ids, self._example = exp.put_batch(ids), self._put(ids)
    self._collect = self._update = None
    # Known once compiled: bytes of one device; whether a step reads the base model.
    self.update_bytes, self.read_base = 0, True

  def init(self):
    """The initial state, made on the devices where it stays."""
    shardings = jax.tree.map(lambda s: s.sharding, self.state_shapes())
    return jax.jit(self._make_state, out_shardings=shardings)(
        self._exp.frozen, self._table, self._example, self._ids)

  def _make_state(self, frozen, table, rows, ids):
    key = rng.stream(self._root, rng.INIT)
    return self._method.init(key, frozen, self._gather(table, rows, ids))

  def state_shapes(self):
    """The state as `jax.ShapeDtypeStruct`s that say where it lies; computes nothing."""
    shapes = jax.eval_shape(
        self._make_state, self._exp.frozen, self._table, self._example, self._ids)
    shardings = jax.tree_util.tree_map_with_path(
        lambda p, s: self._batch if sharding.path_of(p).startswith("replay/") else s,
        sharding.param_shardings(shapes, self._exp.mesh))
    return placed_shapes(shapes, shardings)

  def _put(self, ids):
    return self._exp.put_batch(self._rows(ids))

  def compile(self, state) -> str:
    """Compiles both programs ahead of time for this state; returns a line about it."""
    begun = time.monotonic()
    with processes.progress(total=2, desc="compiling", unit="program", leave=False) as bar:
      programs, self.read_base = [], False
      for traced in self.traced(state).values():
        self.read_base |= reads(traced, 1, "base")
        programs.append(traced.lower().compile())
        bar.update()
    self._collect, self._update = programs
    processes.barrier("compiled")
    self.update_bytes = needed_bytes(self._update)
    return (f"compiled in {time.monotonic() - begun:.0f} s, update needs "
            f"{self.update_bytes / 2**20:.0f} MiB")

  def traced(self, state) -> dict[str, jax.stages.Traced]:
    """The programs "collect" and "update" for this state (arrays or shapes), not compiled yet."""
    exp, method = self._exp, self._method

    def collect(state, frozen, table, rows, sample_ids, key):
      experience = method.collect(state, frozen, self._gather(table, rows, sample_ids), key)
      if "final" not in experience:
        return experience, {}
      images = exp.models.decode(frozen["decoder"], experience["final"])
      if isinstance(exp.reward, HostReward):
        return experience, (images * 255).round().astype(np.uint8)
      return experience, exp.reward.terms(frozen["reward"], images, experience["batch"]["prepared"])

    def update(state, frozen, experience, rewards, key):
      state, values = method.update(state, frozen, experience, rewards, key)
      # Finite losses can leave parameters that are not; such a state must never be saved.
      return state, {**values, "train/policy_norm": optax.tree.norm(method.product(state))}

    key = jax.eval_shape(lambda: rng.stream(self._root, rng.ROLLOUT))
    on_batch = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=self._batch)
    # Images to be scored here stay apart; scores are small, and every process reads all of them.
    on_host = isinstance(exp.reward, HostReward)
    collect = jax.jit(collect, out_shardings=(
        self._batch, self._batch if on_host else self._replicated)).trace(
            state, exp.frozen, self._table, self._example, self._ids, key)
    experience = jax.tree.map(on_batch, collect.out_info[0])
    rewards = (on_batch(jax.ShapeDtypeStruct(self._ids.shape, np.float32))
               if "final" in experience else None)
    shardings = jax.tree.map(lambda a: a.sharding, state)
    update = jax.jit(update, donate_argnums=0, out_shardings=(shardings, self._replicated)).trace(
        state, exp.frozen, experience, rewards, key)
    return {"collect": collect, "update": update}

  def collect(self, state, step: int, ids, prompts):
    """Experience, `{term: [B]}` and rewards `[B]` of one batch; `{}` and None if none are scored.

    Args:
      ids: `[B]` int32, indices of prompts, or of pairs. prompts: the prompt of every index.
    """
    key = rng.stream(self._root, rng.ROLLOUT, step)
    experience, scored = self._collect(
        state, self._exp.frozen, self._table, self._put(ids), self._ids, key)
    if "final" not in experience:
      return experience, {}, None
    reward = self._exp.reward
    if isinstance(reward, HostReward):
      scored = processes.by_rows(reward.terms, processes.fetch(scored),
                                 [prompts[i] for i in ids])
    rewards = processes.put(weighted_sum(reward.weights, scored), self._batch)
    return experience, scored, rewards

  def update(self, state, experience, rewards, step: int):
    key = rng.stream(self._root, rng.UPDATE, step)
    return self._update(state, self._exp.frozen, experience, rewards, key)


def reads(traced: jax.stages.Traced, argument: int, name: str) -> bool:
  """Whether a program reads the entry `name` of its argument of that number, a dict."""
  jaxpr, keys = traced.jaxpr.jaxpr, jax.tree_util
  entry = lambda path: path[:2] == (keys.SequenceKey(argument), keys.DictKey(name))
  own = {id(var) for (path, _), var in zip(
      keys.tree_leaves_with_path(traced.args_info[0]), jaxpr.invars, strict=True) if entry(path)}
  used = [*jaxpr.outvars, *(var for equation in jaxpr.eqns for var in equation.invars)]
  return any(id(var) in own for var in used)


def spread(count: int, most: int) -> np.ndarray:
  """At most `most` indices below `count`, evenly apart: files list similar prompts side by side."""
  return np.linspace(0, count - 1, min(most, count)).round().astype(int)


def draw_prompts(seed: int, step: int, count: int, size: int, group: int = 1) -> np.ndarray:
  """`[size]` int32 prompt indices of a step, each `group` times side by side.

  Prompts do not repeat while there are enough of them.
  """
  generator, wanted = np.random.default_rng([seed, step]), size // group
  parts = [generator.permutation(count) for _ in range(-(-wanted // count))]
  return np.repeat(np.concatenate(parts)[:wanted], group).astype(np.int32)


def report(workdir, size, bar, step, seconds, outcome, look) -> None:
  """Fetches, checks and logs the numbers of a finished step, and what `look()` adds to them.

  Args:
    size: images or pairs of a batch. outcome: values, rewards `{term: [B]}` and prompts `[B]`.
  """
  values, terms, prompts = outcome
  values = {name: float(v) for name, v in jax.device_get(values).items()}
  terms = {name: check_scores(name, v, prompts) for name, v in jax.device_get(terms).items()}
  for name, scores in terms.items():
    values["train/reward" if len(terms) == 1 else f"train/reward/{name}"] = float(scores.mean())
  bad = [name for name, value in values.items() if not np.isfinite(value)]
  if bad:
    file = workdir.path / "non_finite.json"
    workdir.write_json(file.name, {"step": step, "values": {n: str(v) for n, v in values.items()},
                                   "prompts": prompts})
    raise UserError(f"step {step}: {', '.join(bad)} is not finite (batch in {file}); lower "
                    "optim.lr, or the method's strength, in another --workdir; the checkpoints of "
                    "this one are sound")
  workdir.log(step, seconds, {**values, **look()})
  bar.n = step
  shown = {name.split("/")[1]: f"{values[name]:.4f}"
           for name in ("train/reward", "train/margin_accuracy") if name in values}
  if "train/path_kl" in values:
    shown["KL"] = f"{values['train/path_kl']:.2f}"
  shown["img/s"] = f"{step * size / max(seconds, 1e-9):.1f}"
  bar.set_postfix(shown)


def watch_metrics(samples, base) -> dict[str, float]:
  """What the short evaluations log, each beside its paired change from the base."""
  out = {}
  for name, value in samples.scores.items():
    change = metrics.paired_difference(value, base.scores[name])
    out[f"eval/{name}"] = float(value.mean())
    out[f"eval/{name}_change"] = change["mean"]
    if "sem" in change:
      out[f"eval/{name}_change_sem"] = change["sem"]
  out["eval/diversity"] = metrics.pairwise_diversity(samples.features)["mean"]
  return out


def judge_progress(cfg: Config, progress: dict, step: int, seen: dict) -> dict:
  """Best judge score so far, and whether the judge has been below the base for too long."""
  progress = dict(progress)
  if seen["eval/judge"] > progress["best_judge"]:
    progress.update(best_judge=seen["eval/judge"], best_step=step)
  low = seen["eval/judge_change"] < -cfg.train.tolerance * seen.get("eval/judge_change_sem", 0.0)
  progress["below_base"] = progress["below_base"] + 1 if low else 0
  if cfg.train.patience and progress["below_base"] >= cfg.train.patience:
    progress["stopped"] = (f"the judge was below the base model at {cfg.train.patience} "
                           "evaluations in a row (train.patience)")
  return progress


def save_pictures(workdir, name, samples, prompts, cfg) -> None:
  rows = spread(len(prompts), cfg.log.grid_prompts)
  if processes.is_main():
    viz.save_grid(samples.images[rows], workdir.path / name, row_labels=[prompts[i] for i in rows])


def before_and_after(workdir, base, tuned, prompts, rows) -> None:
  if processes.is_main():
    viz.before_after(base.images[rows, :4], tuned.images[rows, :4], [prompts[i] for i in rows],
                     workdir.path / "samples" / "before_after.png")


def read_finished(path: pathlib.Path, cfg: Config) -> dict | None:
  """The summary of a run that needs nothing more, or None."""
  file = path / "summary.json"
  if not file.exists():
    return None
  summary = json.loads(file.read_text())
  more_time = summary["stopped"].startswith("train.max_seconds") and (
      not cfg.train.max_seconds or summary["seconds"] < cfg.train.max_seconds)
  done = summary["steps"] >= cfg.train.steps or (summary["stopped"] and not more_time)
  return summary if done else None


def needed_bytes(compiled) -> int:
  """Bytes of one device that a compiled program takes, by XLA's own buffer assignment."""
  memory = compiled.memory_analysis()
  if memory is None:                      # some backends do not say
    return 0
  return (memory.argument_size_in_bytes + memory.output_size_in_bytes
          - memory.alias_size_in_bytes + memory.temp_size_in_bytes)


def peak_bytes(exp: Experiment) -> int:
  """Peak memory: of the busiest device where it counts, else of this process."""
  stats = [d.memory_stats() or {} for d in exp.mesh.local_devices]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  return max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summary_table(summary: dict) -> str:
  """The comparison that a person wants to read at the end."""
  lines = [f"{'':16s}{'base':>20s}{'tuned':>20s}{'change':>24s}"]
  pm = lambda d: f"{d['mean']:.4f} ± {d.get('sem', float('nan')):.4f}"
  for name, tuned in summary["tuned"].items():
    if name in ("fd_to_base", "kl_to_base"):
      continue
    change = tuned["change"]
    in_std = name == "reward" and "mean_in_std" in change
    stds = f" ({change['mean_in_std']:+.2f} std)" if in_std else ""
    columns = pm(summary["base"][name]), pm(tuned), pm(change)
    lines.append(f"{name:16s}" + "".join(f"{c:>20s}" for c in columns) + stds)
  tuned = summary["tuned"]
  lines.append(f"diversity kept: {100 * tuned['diversity']['ratio_to_base']:.1f} % of base")
  if "exact_tilt" in summary and "diversity" in summary["exact_tilt"]:
    tilt = summary["exact_tilt"]
    kept = tilt["diversity"]["mean"] / summary["base"]["diversity"]["mean"]
    lines[-1] += (f"; the exact tilt would keep {100 * kept:.1f} % and reach reward "
                  f"{tilt['reward']['mean']:.4f} (effective samples per prompt "
                  f"{tilt['ess']['mean']:.1f})")
  if "fd_to_base" in tuned:
    lines.append(f"Frechet distance to base {tuned['fd_to_base']['distance']:.4f} "
                 f"(base to itself {tuned['fd_to_base']['floor']:.4f})")
  if "kl_to_base" in tuned:
    lines.append(f"path KL to base {pm(tuned['kl_to_base'])} nats")
  lines.append(f"{summary['steps']} steps in {summary['seconds']:.0f} s of training, "
               f"{summary['total_seconds']:.0f} s in all on {summary['device']}")
  return "\n".join(lines)
