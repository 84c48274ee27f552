"""The loop of methods that train no weights: each image's noise is what changes.

It shares folder, checkpoints, metrics, evaluation and summary with `train/loop.py`, and its base is
the same: the images of the held-out prompts from the evaluation's noise. `train.steps` updates of
all images make up a run; the outcome of the last one is scored as well.
"""
import contextlib
import dataclasses
import json
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from PIL import Image

from jaxalign import methods
from jaxalign.config import registry
from jaxalign.config.schema import Config
from jaxalign.devices import processes, rng, sharding
from jaxalign.errors import UserError
from jaxalign.methods import best_of_n
from jaxalign.methods.noise import draw
from jaxalign.rewards import HostReward, weighted_sum
from jaxalign.storage.checkpoint import Checkpointer
from jaxalign.storage.files import whole
from jaxalign.train import steps
from jaxalign.train.evaluation import Evaluator, compare, describe
from jaxalign.train.experiment import Experiment, build, gather, read_prompts
from jaxalign.train.loop import (
  before_and_after,
  judge_progress,
  needed_bytes,
  peak_bytes,
  read_finished,
  save_pictures,
  spread,
  summary_table,
  watch_metrics,
)
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
  prompts = read_prompts("data.eval_prompts", cfg.data.eval_prompts)[:cfg.eval.prompts or None]
  workdir = Workdir(path, cfg, {"data.eval_prompts": prompts})
  finished = read_finished(workdir.path, cfg)
  if finished:
    say(f"{path}: this run is finished; see {path / 'summary.json'}")
    return finished

  # ------------------------------------------------------------------ models, reward, mesh
  started = time.monotonic()
  exp = build(cfg, devices)
  method = registry.load_method(cfg.method_name).make(exp.models, cfg.method, cfg.optim)
  workdir.create()
  stack.callback(workdir.close)
  search = Search(exp, method, prompts)
  total = search.total
  held = sum(a.nbytes for a in jax.tree.leaves(search.state)) / 2**20
  say(f"{cfg.recipe}: {total} images, {cfg.eval.samples} of each of {len(prompts)} prompts of "
      f"data.eval_prompts, {held:.0f} MiB of noise and moments on the devices; nothing is trained, "
      f"so data.prompts is not read; mesh "
      f"{dict(exp.mesh.shape)} on {exp.mesh.devices.flat[0].platform}")

  # ------------------------------------------------------------------ base model
  evaluate = Evaluator(exp)
  images_of = lambda noise, label: evaluate(None, prompts, cfg.eval.samples, noise=noise,
                                            label=label)
  base = workdir.cached("base", lambda: images_of(search.product(), "base model"))
  base_again = workdir.cached("base_again", lambda: images_of(
      search.fresh(rng.EVAL_FLOOR), "base model, other noise"))
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
  workdir.open_metrics(step, cfg.log.tensorboard)

  # ------------------------------------------------------------------ optimisation
  if not step:
    save_pictures(workdir, "samples/step_000000.png", base, prompts, cfg)
  say(search.compile())

  def report(bar, step, seconds, values, look):
    values = means(values, total, step)
    if values.get("train/active") == 0 and not progress["last"]:
      progress["last"] = step + 1
    workdir.log(step, seconds, {**values, **look()})
    bar.n = step
    shown = {name: f"{values[f'train/{key}']:.4f}" for name, key in (
        ("reward", "reward"), ("best", "best_reward")) if f"train/{key}" in values}
    bar.set_postfix({**shown, "img/s": f"{step * total / max(seconds, 1e-9):.2f}"})

  def look(step):
    """The evaluation of this step: what it adds to the log; judges progress."""
    samples = images_of(search.product(), f"watching step {step}")
    save_pictures(workdir, f"samples/step_{step:06d}.png", samples, prompts, cfg)
    seen = watch_metrics(samples, base)
    progress.update(judge_progress(cfg, progress, step, seen))
    return seen

  def ended(step):
    if not progress["last"] or step < progress["last"]:
      return ""
    return f"no image improved for {cfg.method.patience} steps (method.patience)"

  step = steps.take(cfg, workdir, checkpoints, progress, step, advance=search.step, report=report,
                    look=look, content=lambda: search.state, ended=ended)

  # ------------------------------------------------------------------ product
  begun = time.monotonic()
  means(search.step(step), total, step + 1)      # scores what the last update made
  progress["seconds"] = round(progress["seconds"] + time.monotonic() - begun, 3)
  noise = search.product()
  tuned = images_of(noise, "result")
  workdir.keep("tuned", tuned)
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
      "stopped": progress["stopped"], "base": describe(base),
      "tuned": compare(tuned, base, base_again),
      "cost": {**cost, "equal_candidates": best_of_n.equal_candidates(exp.models, cost, total),
               "update_bytes": search.update_bytes, "peak_bytes": peak_bytes(exp)},
  }
  if getattr(cfg.method, "rival", False):
    summary["best_of_n"] = run_rival(cfg, path, devices, summary["cost"]["equal_candidates"])
    summary["total_seconds"] = round(time.monotonic() - started, 1)
  workdir.write_json("summary.json", summary)
  say(summary_table(summary))
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
  Workdir(folder, rival).create()
  if processes.is_main():
    shutil.copytree(path / "evaluations", folder / "evaluations", dirs_exist_ok=True,
                    ignore=lambda _, names: [n for n in names if not n.startswith("base")])
  processes.barrier("base copied")
  result = run(rival, folder, devices)
  return {"candidates": result["steps"] + 1, "seconds": result["seconds"], **result["tuned"]}


class Search:
  """All images of a run, in batches of `sample.batch`: their state and the compiled update.

  `state` is one tree for each batch, by name. The last batch is filled up with its last image.
  """

  def __init__(self, exp: Experiment, method: methods.Method, prompts: list[str]):
    self._exp, self._method = exp, method
    self._root = jax.random.key(exp.config.seed)
    size, samples = exp.config.sample.batch, exp.config.eval.samples
    self.total = len(prompts) * samples
    ids = np.minimum(np.arange(-(-self.total // size) * size), self.total - 1).astype(np.int32)
    table = exp.prompt_table(prompts)
    self._prompts, self._batches = {}, {}
    for i in range(0, len(ids), size):
      name, rows = f"{i // size:05d}", ids[i:i + size]
      self._prompts[name] = [prompts[j // samples] for j in rows]
      self._batches[name] = exp.put_batch(gather(table, rows // samples, rows))
    self._draw = jax.jit(lambda key, ids: draw(exp.models, key, ids))
    self._product = jax.jit(method.product)
    self.state = self._init()
    self._step = self._collect = self._update = None

  def _init(self):
    key = rng.stream(self._root, rng.EVAL)
    make = lambda frozen, batch: self._method.init(key, frozen, batch)
    first = next(iter(self._batches.values()))
    init = jax.jit(make, out_shardings=self._shardings(
        jax.eval_shape(make, self._exp.frozen, first)))
    return {name: init(self._exp.frozen, batch) for name, batch in self._batches.items()}

  def _shardings(self, tree):
    mesh = self._exp.mesh
    rows, single = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    return jax.tree.map(lambda a: rows if a.ndim else single, tree)

  def compile(self) -> str:
    """Compiles the update ahead of time; returns a line about it."""
    begun, exp, method = time.monotonic(), self._exp, self._method
    name, batch = next(iter(self._batches.items()))
    state = self.state[name]
    key = rng.stream(self._root, rng.ROLLOUT)

    def collect(state, frozen, batch, key):
      experience = dict(method.collect(state, frozen, batch, key))
      images = experience.pop("images", None)
      if images is None or not isinstance(exp.reward, HostReward):
        return experience, images
      return experience, (images * 255).round().astype(jnp.uint8)

    def step(state, frozen, batch, collect_key, key):
      experience, images = collect(state, frozen, batch, collect_key)
      rewards = None
      if images is not None:
        count = images.shape[0] // batch["sample_ids"].shape[0]
        prepared = jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), batch["prepared"])
        rewards = exp.reward.score(frozen["reward"], images, prepared)
      return method.update(state, frozen, experience, rewards, key)

    placed = lambda tree: jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(
            exp.mesh, sharding.BATCH if s.ndim else sharding.P())), tree)
    lower = lambda f, donate, *args: jax.jit(f, donate_argnums=donate, out_shardings=(
        self._shardings(jax.eval_shape(f, *args)))).lower(*args)
    with processes.progress(total=1, desc="compiling", unit="program", leave=False):
      if isinstance(exp.reward, HostReward):
        experience, images = placed(jax.eval_shape(collect, state, exp.frozen, batch, key))
        self._collect = lower(collect, (), state, exp.frozen, batch, key).compile()
        rewards = placed(jax.ShapeDtypeStruct(images.shape[:1], np.float32))
        self._update = lower(method.update, 0, state, exp.frozen, experience, rewards,
                             key).compile()
      else:
        self._step = lower(step, 0, state, exp.frozen, batch, key, key).compile()
    processes.barrier("compiled")
    self.update_bytes = needed_bytes(self._step or self._update)
    return (f"compiled in {time.monotonic() - begun:.0f} s, update needs "
            f"{self.update_bytes / 2**20:.0f} MiB")

  def step(self, step: int) -> list[dict]:
    """One update of every image; returns the metrics `{name: [B]}` of each batch, not awaited."""
    keys = [rng.stream(self._root, name, step) for name in (rng.ROLLOUT, rng.UPDATE)]
    names, frozen, metrics = list(self._batches), self._exp.frozen, []
    collect = lambda name: self._collect(self.state[name], frozen, self._batches[name], keys[0])
    ahead = collect(names[0]) if self._collect else None
    for name, following in zip(names, [*names[1:], None]):
      if self._collect:
        (experience, images), ahead = ahead, collect(following) if following else None
        rewards = self._host_rewards(images, self._prompts[name])
        self.state[name], values = self._update(self.state[name], frozen, experience, rewards,
                                                keys[1])
      else:
        self.state[name], values = self._step(self.state[name], frozen, self._batches[name], *keys)
      metrics.append(values)
    return metrics

  def _host_rewards(self, images, prompts):
    reward, images = self._exp.reward, processes.fetch(images)
    rows = [prompt for prompt in prompts for _ in range(len(images) // len(prompts))]
    return self._exp.put_batch(weighted_sum(
        reward.weights, processes.by_rows(reward.terms, images, rows)))

  def _gathered(self, of) -> np.ndarray:
    """Rows of all images on the host, in order."""
    return np.concatenate([processes.fetch(of(name)) for name in self._batches])[:self.total]

  def product(self) -> np.ndarray:
    """The noise of every image, `[P * K, 1+T, h, w, c]` f32."""
    return self._gathered(lambda name: self._product(self.state[name]))

  def best_step(self) -> np.ndarray:
    """The update before which each image scored best, `[P * K]`."""
    return self._gathered(lambda name: self.state[name]["best_step"])

  def fresh(self, stream: str) -> np.ndarray:
    """Noise of every image from another stream."""
    key = rng.stream(self._root, stream)
    return self._gathered(lambda name: self._draw(key, self._batches[name]["sample_ids"]))


def means(metrics: list[dict], total: int, step: int) -> dict[str, float]:
  """Fetches per-image metrics and averages what is finite.

  Raises:
    UserError: no image has a finite reward.
  """
  metrics = processes.fetch(metrics)
  rows = {name: np.concatenate([part[name] for part in metrics])[:total]
          for name in metrics[0]}
  finite = {name: value[np.isfinite(value)] for name, value in rows.items()}
  if not finite["train/reward"].size:
    raise UserError(f"step {step}: the reward of every image is not a finite number; lower "
                    "optim.lr in another --workdir")
  return {name: float(value.mean()) for name, value in finite.items() if value.size}


def write_product(folder: pathlib.Path, prompts, noise, best_step, base, tuned) -> None:
  """Images as PNG, their noise as npz, and `instances.jsonl`, a line for each, written last."""
  for name in ("images", "noise"):
    (folder / name).mkdir(parents=True, exist_ok=True)
  samples, lines = tuned.images.shape[1], []
  for i, z in enumerate(noise):
    p, k = divmod(i, samples)
    name = f"{p:04d}_{k:02d}"
    Image.fromarray(tuned.images[p, k]).save(folder / "images" / f"{name}.png")
    np.savez(folder / "noise" / f"{name}.npz", noise=z, prompt=prompts[p])
    scores = {f"{score}_{when}": float(s.scores[score][p, k]) for score in base.scores
              for when, s in (("before", base), ("after", tuned))}
    lines.append(json.dumps({"prompt": prompts[p], "sample": k, "image": f"images/{name}.png",
                             "noise": f"noise/{name}.npz", "step": int(best_step[i]), **scores}))
  with whole(folder / "instances.jsonl") as file:
    file.write_text("".join(line + "\n" for line in lines))
