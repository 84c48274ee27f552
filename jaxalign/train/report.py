"""What a run says: rows of metrics, pictures, a verdict on its progress, the table at the end."""
import json
import pathlib
import resource

import jax
import numpy as np
from PIL import Image

from jaxalign import metrics, viz
from jaxalign.config.schema import Config
from jaxalign.devices import callbacks, processes
from jaxalign.errors import UserError
from jaxalign.rewards import check_scores
from jaxalign.storage.files import whole_folder
from jaxalign.train.experiment import Experiment


def spread(count: int, most: int) -> np.ndarray:
  """At most `most` indices below `count`, evenly apart: files list similar prompts side by side."""
  return np.linspace(0, count - 1, min(most, count)).round().astype(int)


def log_step(workdir, size, bar, step, seconds, outcome, look) -> None:
  """Fetches, checks and logs the numbers of a finished step, and what `look()` adds to them.

  Args:
    size: images or pairs of a batch. outcome: values, rewards `{term: [B]}` and prompts `[B]`.
  """
  values, terms, prompts = outcome
  values = {name: float(v) for name, v in jax.device_get(values).items()}
  terms = jax.device_get(terms)
  callbacks.check()
  values.update(callbacks.numbers())
  terms = {name: check_scores(name, v, prompts) for name, v in terms.items()}
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


# What every summary has, and of which type.
_SUMMARY = {"recipe": str, "steps": int, "seconds": (int, float), "total_seconds": (int, float),
            "device": str, "stopped": str, "base": dict, "tuned": dict, "cost": dict}


def read_summary(folder: pathlib.Path) -> dict | None:
  """The summary of the run in `folder`; None if it has none.

  Raises:
    UserError: the file is damaged.
  """
  file = folder / "summary.json"
  try:
    summary = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return None
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{file}: not the summary of a run ({error}); delete it, and the run's command "
                    "makes it anew") from error
  for key, kind in _SUMMARY.items():
    if not isinstance(summary, dict) or not isinstance(summary.get(key), kind):
      raise UserError(f"{file}: not the summary of a run ({key} is missing or of another type); "
                      "delete it, and the run's command makes it anew")
  return summary


def read_finished(path: pathlib.Path, cfg: Config) -> dict | None:
  """The summary of a run that needs nothing more, or None."""
  summary = read_summary(path)
  if summary is None:
    return None
  more_time = summary["stopped"].startswith("train.max_seconds") and (
      not cfg.train.max_seconds or summary["seconds"] < cfg.train.max_seconds)
  done = summary["steps"] >= cfg.train.steps or (summary["stopped"] and not more_time)
  return summary if done else None


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
