"""Command line: `python -m jaxalign.compare --runs=DIR,DIR,... --output=results.md`.

Puts finished runs side by side: one table for each task (a reward on held-out prompts, the base
model, and the pairs if it learns from such), one row for each recipe, means over seeds. A run is
read at its end, at equal reward queries and at equal time, the latter two from its logged curve.
Pictures lie beside the page, and so does `results.json`, what was read of every run so far: runs
that are named again replace their record, others stay.
"""
import importlib.util
import json
import math
import pathlib
import sys

import numpy as np

from jaxalign.config import recipes
from jaxalign.config.command import Flags, run_command
from jaxalign.errors import UserError
from jaxalign.storage.files import whole

_FLAGS = Flags()
_RUNS = _FLAGS.define("list", "runs", [], "Folders of finished runs; none draws the page anew.")
_OUTPUT = _FLAGS.define("string", "output", None, "Markdown file to write.")

COSTS = ("denoiser_forward", "denoiser_backward", "reward_queries", "reward_gradients")


def read_run(folder: pathlib.Path) -> dict:
  """The record of a finished run: what it is, its summary, and its curve.

  The curve has one entry for each evaluation on watched prompts: seconds of training, reward
  queries spent (a gradient is one of them), paired change of the reward, diversity.

  Raises:
    UserError: the folder holds no finished run.
  """
  try:
    config = json.loads((folder / "config.json").read_text())["config"]
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise UserError(f"--runs: {folder}: not a finished run: {error}") from error
  if "tuned" not in summary:
    raise UserError(f"--runs: {folder}: a pretraining run has nothing to compare")
  cost, steps = summary["cost"], max(summary["steps"], 1)
  # Without training, the outcome of the last step is scored as well.
  per_step = cost.get("reward_queries", 0) / (steps + ("images" in summary))
  curve = [{"seconds": line["seconds"], "queries": per_step * line["step"],
            "reward_change": line["eval/reward_change"], "diversity": line["eval/diversity"]}
           for line in lines if "eval/reward_change" in line]
  tuned, base = summary["tuned"], summary["base"]
  change = {key: tuned[key]["change"] for key in ("reward", "judge") if key in tuned}
  std, pairs = base["reward"].get("within_prompt_std"), config["data"].get("pairs", "")
  return {
      "recipe": label(summary["recipe"], config), "seed": config["seed"],
      "task": f"{' + '.join(config['reward']['names'])} on {config['data']['eval_prompts']}, from "
              f"{config['model']['path']}{pairs and ', pairs ' + pathlib.Path(pairs).stem}",
      "steps": summary["steps"], "seconds": summary["seconds"], "device": summary["device"],
      "reward_std": std, "change": change, "diversity": tuned["diversity"]["ratio_to_base"],
      "fd": tuned.get("fd_to_base"), "kl": tuned.get("kl_to_base", {}).get("mean"),
      "cost": {key: cost.get(key, 0) for key in COSTS}, "peak_bytes": cost["peak_bytes"],
      "update_bytes": cost.get("update_bytes", 0), "step_seconds": summary["seconds"] / steps,
      "curve": curve}


def label(recipe: str, config: dict) -> str:
  """The recipe, and what the run's config has otherwise than the shipped recipe of that name.

  Not what only watches a run (how often it saves, evaluates, logs), nor the task: reward, prompts
  and pairs.
  """
  changed = recipes.changed({**config, "recipe": recipe})
  watching = {"train.checkpoint_every", "train.keep", "eval.every", "eval.path_kl", "seed",
              "data.prompts", "data.eval_prompts", "data.pairs"}
  return " ".join([recipe, *(f"{key}={value[0]}" for key, value in (changed or {}).items()
                             if key not in watching
                             and key.split(".")[0] not in ("reward", "mesh", "log"))])


def over_seeds(values) -> tuple[float, float] | None:
  """Mean and standard error over seeds (nan for one), of those that were measured."""
  values = [v for v in values if v is not None]
  if not values:
    return None
  error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
  return float(np.mean(values)), float(error)


def change_of(rows: list[dict], score: str) -> tuple[float, float] | None:
  """A score's paired change: mean and error over seeds; of one seed, its error over prompts."""
  changes = [row["change"][score] for row in rows if score in row["change"]]
  if len(changes) == 1:
    return changes[0]["mean"], changes[0].get("sem", math.nan)
  return over_seeds([change["mean"] for change in changes])


def in_errors(rows: list[dict]) -> str:
  """The reward's paired change in its own clustered errors, lowest to highest of the seeds."""
  changes = [row["change"]["reward"] for row in rows]
  ratios = sorted(c["mean"] / c["sem"] for c in changes if c.get("sem"))
  if not ratios:
    return ""
  return "{:.1f}".format(ratios[0]) + (f" to {ratios[-1]:.1f}" if len(ratios) > 1 else "")


def at(record: dict, key: str, limit: float, value: str) -> float | None:
  """`value` of a record's curve where `key` reaches `limit`, linear in between.

  The curve starts at 0 of everything; None where it ends before the limit.
  """
  curve = record["curve"]
  if not curve or curve[-1][key] < limit * (1 - 1e-9):
    return None
  xs = [0.0, *(point[key] for point in curve)]
  ys = [0.0, *(point[value] for point in curve)]
  return float(np.interp(limit, xs, ys))


def _number(pair, form: str) -> str:
  if pair is None:
    return ""
  mean, error = pair
  return form.format(mean) + (
      "" if math.isnan(error) else " ± " + form.replace("+", "").format(error))


def undisturbed(records: list[dict]) -> list[dict]:
  """The records with the times of each recipe's fastest seed.

  An update costs every seed the same; what some took longer is other work on the machine.
  """
  fastest = {}
  for r in records:
    fastest[r["recipe"]] = min(r["step_seconds"], fastest.get(r["recipe"], math.inf))
  scaled = []
  for r in records:
    factor = fastest[r["recipe"]] / r["step_seconds"]
    scaled.append({
        **r, "seconds": r["seconds"] * factor, "step_seconds": fastest[r["recipe"]],
        "curve": [{**point, "seconds": point["seconds"] * factor} for point in r["curve"]]})
  return scaled


def table(records: list[dict]) -> list[str]:
  """Markdown lines of one task's table."""
  records = undisturbed(records)
  recipes = sorted({r["recipe"] for r in records})
  limits = {key: min((r["curve"][-1][key] for r in records if r["curve"] and r["curve"][-1][key]),
                     default=None) for key in ("queries", "seconds")}
  head = ["recipe", "seeds", "reward", "in std", "in SE", "judge", "diversity, % of base",
          "Frechet distance (floor)", "path KL, nats", "reward queries", "reward gradients",
          "seconds", "s per update", "update MiB", "peak MiB"]
  if limits["queries"]:
    head.append(f"reward at {limits['queries']:,.0f} queries")
  if limits["seconds"]:
    head.append(f"reward at {limits['seconds']:.0f} s")
  lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
  for recipe in recipes:
    rows = [r for r in records if r["recipe"] == recipe]
    of = lambda pick, form: _number(over_seeds([pick(r) for r in rows]), form)
    spent = lambda key: f"{np.mean([r['cost'][key] for r in rows]):,.0f}"
    floor = over_seeds([r["fd"] and r["fd"]["floor"] for r in rows])
    cells = [
        f"`{recipe}`", str(len(rows)), _number(change_of(rows, "reward"), "{:+.4f}"),
        of(lambda r: r["change"]["reward"]["mean"] / r["reward_std"] if r["reward_std"] else None,
           "{:+.2f}"),
        in_errors(rows), _number(change_of(rows, "judge"), "{:+.4f}"),
        of(lambda r: 100 * r["diversity"], "{:.1f}"),
        of(lambda r: r["fd"] and r["fd"]["distance"], "{:.4f}") + (
            f" ({floor[0]:.4f})" if floor else ""),
        of(lambda r: r["kl"], "{:.1f}"), spent("reward_queries"), spent("reward_gradients"),
        f"{np.mean([r['seconds'] for r in rows]):.0f}", f"{rows[0]['step_seconds']:.2f}",
        f"{max(r['update_bytes'] for r in rows) / 2**20:,.0f}",
        f"{max(r['peak_bytes'] for r in rows) / 2**20:,.0f}"]
    for key, limit in limits.items():
      if limit:
        cells.append(of(lambda r: at(r, key, limit, "reward_change"), "{:+.4f}"))
    lines.append("| " + " | ".join(cells) + " |")
  return lines


def draw(records: list[dict], title: str, path: pathlib.Path) -> None:
  """Reward over queries (if any were made), over time, and against diversity, as PNG."""
  records = undisturbed(records)
  import matplotlib
  matplotlib.use("Agg")
  from matplotlib import pyplot
  curves = {"queries": "reward queries", "seconds": "seconds of training"}
  if not any(point["queries"] for r in records for point in r["curve"]):
    del curves["queries"]
  recipes = sorted({r["recipe"] for r in records})
  figure, axes = pyplot.subplots(1, len(curves) + 1, layout="constrained",
                                 figsize=(5 * len(curves) + 5, 4.5 + 0.25 * len(recipes)))
  for recipe in recipes:
    rows, colour = [r for r in records if r["recipe"] == recipe], None
    for row in rows:
      points = [{"queries": 0.0, "seconds": 0.0, "reward_change": 0.0}, *row["curve"]]
      for axis, key in zip(axes, curves):
        line, = axis.plot([p[key] for p in points], [p["reward_change"] for p in points],
                          color=colour, label=None if colour else recipe)
        colour = line.get_color()
    axes[-1].errorbar([100 * r["diversity"] for r in rows],
                      [r["change"]["reward"]["mean"] for r in rows],
                      [r["change"]["reward"].get("sem", 0.0) for r in rows], fmt="o", color=colour)
  for axis, text in zip(axes, (*curves.values(), "diversity, % of base")):
    axis.set(xlabel=text, ylabel="change of the reward")
    axis.axhline(0, color="0.8", zorder=0)
  figure.suptitle(title)
  figure.legend(loc="outside lower left")
  path.parent.mkdir(parents=True, exist_ok=True)
  with whole(path) as file:
    figure.savefig(file, dpi=110)
  pyplot.close(figure)


def page(title: str, records: list[dict], folder: pathlib.Path) -> str:
  """The page's text; its pictures are written into `folder`."""
  lines = [f"# {title}", "",
           "Written by `python -m jaxalign.compare`; every number is read from the folders of runs "
           "(`results.json`).", "",
           "Reward and judge: paired change from the base model on held-out prompts, same noise. "
           "`in std`: the reward's change in standard deviations of the base model's reward within "
           "a prompt; `in SE`: in its standard error over prompts, lowest to highest of the seeds. "
           "Mean ± standard error over seeds; of a single seed, reward and judge have their error "
           "over prompts. A recipe is followed by the keys that a run had otherwise.", "",
           "Reward queries are images scored, reward gradients those of them that were "
           "differentiated. Times are those of a recipe's fastest seed: what others took longer "
           "was other work on the machine. `update MiB` is what XLA assigns one device for the "
           "compiled update, `peak MiB` what the whole process took on a CPU. The columns at the "
           "right read watched prompts, at the queries and the time that the cheapest run of the "
           "table spent; empty where a run logged no curve that far.", ""]
  for number, task in enumerate(sorted({r["task"] for r in records}), 1):
    rows = [r for r in records if r["task"] == task]
    devices = ", ".join(sorted({r["device"] for r in rows}))
    draw(rows, task, folder / f"task_{number}.png")
    lines += [f"## {task}", "", *table(rows), "", f"Devices: {devices}.", "",
              f"![curves]({folder.name}/task_{number}.png)", ""]
  return "\n".join(lines)


def main(argv) -> None:
  del argv
  if importlib.util.find_spec("matplotlib") is None:
    raise UserError("the page has curves: pip install 'jaxalign[notebooks]' brings matplotlib")
  output = pathlib.Path(_OUTPUT.value)
  if not output.name or output.is_dir():
    raise UserError(f"--output={output}: is a folder; name a file")
  folder = output.with_suffix("")
  kept = folder / "results.json"
  identity = lambda r: (r["recipe"], r["task"], r["seed"])
  try:
    records = json.loads(kept.read_text()) if kept.exists() else []
    sorted(map(identity, records))
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise UserError(f"{kept}: not of jaxalign.compare ({error}); delete it and name all --runs"
                    ) from error
  for run in _RUNS.value:
    new = read_run(pathlib.Path(run))
    records = [r for r in records if identity(r) != identity(new)] + [new]
  if not records:
    raise UserError(f"--runs is empty, and {kept} has no earlier ones")
  records.sort(key=identity)
  folder.mkdir(parents=True, exist_ok=True)
  with whole(kept) as file:
    file.write_text(json.dumps(records, indent=1) + "\n")
  text = page(output.stem.capitalize(), records, folder)
  with whole(output) as file:
    file.write_text(text)
  print(text)


if __name__ == "__main__":
  sys.exit(run_command(main, _FLAGS, required=("output",)))
