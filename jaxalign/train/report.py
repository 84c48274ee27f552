"""What a run says: rows of metrics, pictures, a verdict on its progress, the table at the end."""
import json
import os
import pathlib
import resource
import shlex

import jax
import numpy as np
from PIL import Image

from jaxalign import metrics, viz
from jaxalign.config.places import python
from jaxalign.config.schema import Config
from jaxalign.devices import callbacks, processes
from jaxalign.errors import UserError
from jaxalign.reports.page import plain_sentence, write_report
from jaxalign.reports.reading import Run, read_summary
from jaxalign.rewards import check_scores, mixture
from jaxalign.storage.files import whole_folder
from jaxalign.train import alarm
from jaxalign.train.experiment import Experiment


def spread(count: int, most: int) -> np.ndarray:
  """At most `most` indices below `count`, evenly apart: files list similar prompts side by side."""
  return np.linspace(0, count - 1, min(most, count)).round().astype(int)


def log_step(workdir, exp, step, seconds, outcome, look) -> dict[str, float]:
  """Fetches, checks, logs and returns a finished step's numbers, and what `look()` adds to them.

  Args:
    outcome: values, rewards `{term: [B]}` and prompts `[B]`.
  """
  values, terms, prompts = outcome
  values = {name: float(v) for name, v in jax.device_get(values).items()}
  terms = jax.device_get(terms)
  callbacks.check()
  values.update(callbacks.numbers())
  terms = {name: check_scores(name, v, prompts) for name, v in terms.items()}
  for name, scores in terms.items():
    values["train/reward" if len(terms) == 1 else f"train/reward/{name}"] = float(scores.mean())
  if len(terms) > 1:
    values.update(shares_of(exp, terms, prompts))
  bad = [name for name, value in values.items() if not np.isfinite(value)]
  if bad:
    file = workdir.path / "non_finite.json"
    workdir.write_json(file.name, {"step": step, "values": {n: str(v) for n, v in values.items()},
                                   "prompts": prompts})
    raise UserError(f"step {step}: {', '.join(bad)} is not finite (batch in {file}); lower "
                    "optim.lr, or the method's strength, in another --workdir; the checkpoints of "
                    "this one are sound")
  values.update(look())
  workdir.log(step, seconds, values)
  return values


def shares_of(exp, terms, prompts) -> dict[str, float]:
  """What each term of a mixture decides: `train/share/NAME`, see `mixture.shares`."""
  groups = mixture.compared(exp.config.group, np.unique(prompts, return_inverse=True)[1])
  terms = mixture.comparable(exp.config.reward.normalise, terms, groups)
  found = mixture.shares(exp.reward.weights, terms, groups)
  return {f"train/share/{name}": share for name, share in found.items()}


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


def write_product(folder: pathlib.Path, prompts, noise, best_step, base, tuned) -> None:
  """Images as PNG, their noise as npz, and `instances.jsonl`, a line for each."""
  with whole_folder(folder, last="instances.jsonl") as new:
    for name in ("images", "noise"):
      (new / name).mkdir()
    samples, lines = tuned.images.shape[1], []
    for i, z in enumerate(noise):
      p, k = divmod(i, samples)
      name = f"{p:04d}_{k:02d}"
      Image.fromarray(tuned.images[p, k]).save(new / "images" / f"{name}.png")
      np.savez(new / "noise" / f"{name}.npz", noise=z, prompt=prompts[p])
      scores = {f"{score}_{when}": float(s.scores[score][p, k]) for score in base.scores
                for when, s in (("before", base), ("after", tuned))}
      lines.append(json.dumps({"prompt": prompts[p], "sample": k, "image": f"images/{name}.png",
                               "noise": f"noise/{name}.npz", "step": int(best_step[i]), **scores}))
    (new / "instances.jsonl").write_text("".join(line + "\n" for line in lines))


def read_finished(path: pathlib.Path, cfg: Config) -> dict | None:
  """The summary of a run that needs nothing more, or None."""
  summary = read_summary(path)
  if summary is None:
    return None
  more_time = summary["stopped"].startswith("train.max_seconds") and (
      not cfg.train.max_seconds or summary["seconds"] < cfg.train.max_seconds)
  more_time |= cfg.train.alarm in ("off", "warn") and summary["stopped"].startswith(alarm.STOPPED)
  done = summary["steps"] >= cfg.train.steps or (summary["stopped"] and not more_time)
  return summary if done else None


def take_finished(path: pathlib.Path, cfg: Config) -> dict | None:
  """`read_finished`, said; makes up for the report of a run that was killed in writing it."""
  summary, report = read_finished(path, cfg), path / "report.html"
  if summary:
    if processes.is_main() and not report.exists() and os.access(path, os.W_OK):
      write_report([path], report)
    processes.say(f"{path}: this run is finished; see {path / 'summary.json'}")
  return summary


def peak_bytes(exp: Experiment) -> int:
  """Peak memory: of the busiest device where it counts, else of this process."""
  stats = [d.memory_stats() or {} for d in exp.mesh.local_devices]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  return max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def finish(workdir, cfg: Config, summary: dict) -> None:
  """Writes `summary.json` and `report.html`, and says what came of the run and what to do next."""
  workdir.write_json("summary.json", summary)
  processes.say(summary_table(summary))
  if processes.is_main():
    run, = write_report([workdir.path], workdir.path / "report.html")
    processes.say(closing(workdir.path, cfg, run))


def closing(path: pathlib.Path, cfg: Config, run: Run) -> str:
  """The last lines of a run: what it means, where it is, how to see and to use it."""
  lines = [plain_sentence(run), f"see it:     {path / 'report.html'}"]
  if cfg.at_inference:
    return "\n".join([*lines, f"pictures:   {path / 'product' / 'images'}"])
  prompt = shlex.quote(run.prompts[0]) if run.prompts else "FILE"
  kind = json.loads((path / "export" / "model_index.json").read_text())["_class_name"]
  sample = cfg.sample
  own = f"num_inference_steps={sample.steps}, guidance_scale={sample.guidance:g}"
  if sample.kind == "ddim" and kind.startswith("StableDiffusion") and "3" not in kind:
    own += f", eta={sample.eta:g}"
  return "\n".join([
      *lines, f"draw more:  {shlex.quote(python())} -m jaxalign.sample "
      f"--checkpoint={shlex.quote(str(path))} --prompts={prompt} --output=out",
      f"diffusers:  {kind}.from_pretrained({str(path / 'export')!r})(prompt, {own})"])


_pm = lambda d: f"{d['mean']:.4f} ± {d.get('sem', float('nan')):.4f}"


def results_table(base: dict | None, tuned: dict) -> str:
  """Scores of two models side by side, or, without a base model, of one."""
  if base is None:
    return "\n".join(f"{name:16s}{_pm(value):>20s}" for name, value in tuned.items())
  lines = [f"{'':16s}{'base':>20s}{'tuned':>20s}{'change':>24s}"]
  for name, value in tuned.items():
    if name in ("fd_to_base", "kl_to_base"):
      continue
    change = value["change"]
    in_std = name == "reward" and "mean_in_std" in change
    stds = f" ({change['mean_in_std']:+.2f} std)" if in_std else ""
    columns = _pm(base[name]), _pm(value), _pm(change)
    lines.append(f"{name:16s}" + "".join(f"{c:>20s}" for c in columns) + stds)
  return "\n".join(lines)


def summary_table(summary: dict) -> str:
  """The comparison that a person wants to read at the end."""
  tuned = summary["tuned"]
  lines = [results_table(summary["base"], tuned)]
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
    lines.append(f"path KL to base {_pm(tuned['kl_to_base'])} nats")
  lines.append(f"{summary['steps']} steps in {summary['seconds']:.0f} s of training, "
               f"{summary['total_seconds']:.0f} s in all on {summary['device']}")
  return "\n".join(lines)
