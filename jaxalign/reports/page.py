"""The page itself: one HTML file with all that it shows in it, for a browser without a network."""
import functools
import importlib.resources
import json
import pathlib
import shlex
from html import escape

import numpy as np
from scipy.special import stdtrit

from jaxalign import metrics
from jaxalign.reports import charts, verdict
from jaxalign.reports.gallery import make_gallery
from jaxalign.reports.reading import Run, read_run
from jaxalign.storage.files import whole

COSTS = {
    "denoiser_forward": "denoiser evaluations", "denoiser_backward": "of them differentiated",
    "decodes": "latents decoded", "reward_queries": "images scored",
    "reward_gradients": "of them differentiated", "equal_candidates": "candidates of best-of-N",
    "update_bytes": "memory of the compiled update", "peak_bytes": "peak memory"}


def write_report(folders: list[pathlib.Path], output: pathlib.Path) -> list[Run]:
  """Writes the page of the runs in `folders` to `output`; the file appears whole or not at all.

  Raises:
    UserError: a folder holds no such run, or is damaged.
  """
  runs = [read_run(folder) for folder in folders]
  with whole(output) as file:
    file.write_text(page(runs), encoding="utf-8")
  return runs


def page(runs: list[Run], stamp: str | None = None) -> str:
  """The whole page. `stamp`: of a page that is served and reloads itself when the stamp changes."""
  title = " against ".join(run.recipe for run in runs[:2]) + (" and others" if runs[2:] else "")
  live = f' data-stamp="{escape(stamp)}"' if stamp else ""
  policy = ("default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
            "script-src 'unsafe-inline'" + ("; connect-src 'self'" if stamp else ""))
  sections = [_head(runs), _paired(runs), _pairs(runs), _numbers(runs), _curves(runs),
              _trade_offs(runs), _cost(runs), _settings(runs)]
  return f"""<!doctype html>
<html lang="en"{live}>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{_asset("report.css")}</style>
</head>
<body>
{"".join(f"{section}{chr(10)}" for section in sections if section)}<footer>Written by \
<code>python -m jaxalign.report</code>. What the numbers mean: docs/metrics.md.</footer>
<script>
{_asset("report.js")}</script>
</body>
</html>
"""


@functools.cache
def _asset(name: str) -> str:
  return (importlib.resources.files("jaxalign.reports") / "page" / name).read_text("utf-8")


def _section(title: str, *content: str) -> str:
  body = "".join(content)
  return f"<section>\n<h2>{title}</h2>\n{body}\n</section>" if body else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
  """Cells are HTML; those of all but the first column that begin with a digit or sign stand right.
  """
  if not rows:
    return ""
  cell = lambda text: (f'<td class="n">{text}</td>' if text[:1] in "+-−0123456789" and text
                       else f"<td>{text}</td>")
  lines = "".join(f"<tr><th scope=\"row\">{row[0]}</th>{''.join(map(cell, row[1:]))}</tr>"
                  for row in rows)
  heads = "".join(f'<th scope="col">{text}</th>' for text in head)
  return (f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>'
          "</div>")


def _chip(series: int) -> str:
  return f'<span class="chip s{series % charts.COLOURS}" aria-hidden="true"></span>'


def _legend(runs) -> str:
  if len(runs) == 1:
    return ""
  return '<p class="legend">' + "".join(
      f"<span>{_chip(k)}<b>{escape(run.name)}</b></span>" for k, run in enumerate(runs)) + "</p>"


# The parts of the page, from top to bottom.


def _state(run: Run) -> str:
  if run.summary:
    s = run.summary
    why = f", stopped: {s['stopped']}" if s["stopped"] else ""
    return (f"{run.recipe}, {s['steps']} steps, {_duration(s['seconds'])} of training on "
            f"{s['device']}{why}")
  last = run.rows[-1]["step"] if run.rows else 0
  return (f"{run.recipe}, not finished: step {last} of {run.config['train']['steps']}; pictures "
          "and numbers are those of the last look, on training prompts")


def plain_sentence(run: Run) -> str:
  """What the page says first, without its colours."""
  return verdict.sentence(_clauses(run)) if run.result else "Nothing to compare yet."


def _clauses(run: Run) -> list[verdict.Clause]:
  base, tuned = run.result
  return verdict.clauses(base, tuned, run.measured, run.limits)


def _sentence(run: Run) -> str:
  if run.result is None:
    return "Nothing to compare yet."
  first, *others = _clauses(run)
  first = verdict.Clause(first.subject, first.text[:1].upper() + first.text[1:], first.tone)
  return "; ".join(f'<span class="{part.tone}">{escape(part.text)}</span>'
                   for part in (first, *others)) + "."


def _head(runs: list[Run]) -> str:
  rules = ("<details><summary>How this sentence is made</summary>"
           f"<pre>{escape(verdict.RULES)}</pre></details>")
  if len(runs) == 1:
    return (f'<header><p class="kicker">{escape(_state(runs[0]))}</p><h1>{_sentence(runs[0])}</h1>'
            f"{rules}</header>")
  lines = "".join(f'<li>{_chip(k)}<b>{escape(run.name)}</b>: {_sentence(run)}'
                  f'<br><span class="note">{escape(_state(run))}</span></li>'
                  for k, run in enumerate(runs))
  return f'<header><h1>{len(runs)} runs</h1><ul class="verdicts">{lines}</ul>{rules}</header>'


def _numbers(runs: list[Run]) -> str:
  rows = []
  for k, run in enumerate(runs):
    if run.result is None:
      continue
    base, tuned = run.result
    chip = f"{_chip(k)} " if len(runs) > 1 else ""
    for name, now in tuned.items():
      if "change" not in now:
        continue
      change = now["change"]
      spreads = f" ({change['mean_in_std']:+.2f} spreads)" if "mean_in_std" in change else ""
      kept = f" ({now['ratio_to_base']:.0%} of base)" if "ratio_to_base" in now else ""
      rows.append([f"{chip}{escape(name)}", _pm(base[name]), _pm(now), _pm(change, "+") + spreads
                   + kept, verdict.errors_of(change)])
    if "fd_to_base" in tuned:
      fd = tuned["fd_to_base"]
      rows.append([f"{chip}Frechet distance", f"{fd['floor']:.4g} to itself",
                   f"{fd['distance']:.4g}", "", ""])
    if "kl_to_base" in tuned:
      rows.append([f"{chip}path KL, nats", "0", _pm(tuned["kl_to_base"]), "", ""])
  return _section("Numbers", '<p class="note">Base and tuned model on the same prompts and noise, '
                  "± standard error over prompts.</p>" if rows else "",
                  _table(["", "base", "tuned", "change", "change in errors"], rows))


def _paired(runs: list[Run]) -> str:
  """Every run against the first, where both have drawn from the same noise."""
  first, rows = runs[0], []
  for k, run in enumerate(runs[1:], 1):
    if run.tuned is None or not run.same_noise(first):
      rows.append([f"{_chip(k)} {escape(run.name)}", "other prompts, noise or base model than "
                   f"{escape(first.name)}: not to be compared picture by picture"])
      continue
    cells = [f"{_chip(k)} {escape(run.name)}"]
    for name in ("reward", "judge"):
      cells.append(interval(metrics.paired_difference(run.tuned.scores[name],
                                                      first.tuned.scores[name]),
                            len(run.base.images)))
    now, then = (metrics.pairwise_diversity(r.tuned.features)["per_prompt"] for r in (run, first))
    cells.append(interval(metrics.clustered_mean((now - then)[:, None]), len(now)))
    rows.append(cells)
  note = ('<p class="note">Difference on the same prompts and noise, 95 % interval over prompts '
          "(Student's t).</p>")
  table = _table(["", "reward", "judge", "diversity"], rows)
  return _section(f"Against {escape(first.name)}", note + table if rows else "")


def interval(change: dict, prompts: int) -> str:
  """`+0.012 [−0.003, +0.027]`, or the mean alone where one prompt gives no error."""
  mean = f"{change['mean']:+.4f}"
  if "sem" not in change or prompts < 2:
    return mean
  half = float(stdtrit(prompts - 1, 0.975)) * change["sem"]
  return f"{mean} [{change['mean'] - half:+.4f}, {change['mean'] + half:+.4f}]"


def _pairs(runs: list[Run]) -> str:
  alike = [runs[0], *(run for run in runs[1:] if run.tuned is not None
                      and run.same_noise(runs[0]))]
  gallery = make_gallery(alike)
  if gallery is None:
    return _section("Before and after", '<p class="note">This run has kept no pictures.</p>')
  options = lambda chosen: "".join(
      f'<option value="{k}"{" selected" if k == chosen else ""}>{escape(name)}</option>'
      for k, name in enumerate(gallery.names))
  choose = ""
  if len(alike) > 1:
    choose = (f'<label>Left <select id="left">{options(0)}</select></label>'
              f'<label>Right <select id="right">{options(len(gallery.names) - 1)}</select></label>')
  return _section(
      "Before and after", f'<p class="note">{gallery.rule} Same prompt, same noise; drag, or use '
      "the arrow keys on a picture.</p>",
      '<div class="controls" id="controls" hidden><label>Order <select id="sort">'
      '<option value="gain">largest gain first</option><option value="loss">largest loss first'
      '</option><option value="judge">largest loss of the judge first</option>'
      f'<option value="prompt">as drawn</option></select></label>{choose}'
      '<label>All sliders <input type="range" id="all" min="0" max="100" value="50"></label></div>',
      f'<ol id="pairs" data-names="{escape(json.dumps(gallery.names))}">{gallery.cards}</ol>',
      '<button class="more" id="more" hidden>Show more</button>')


def _curves(runs: list[Run]) -> str:
  drawn = []
  for title, key, label in (
      ("Reward of the looks", "eval/reward_change", "change of the reward"),
      ("Judge of the looks", "eval/judge_change", "change of the judge")):
    content = []
    for k, run in enumerate(runs):
      rows = [row for row in run.rows if key in row]
      if rows:
        content.append(charts.Line(
            run.name, [0, *(r["step"] for r in rows)], [0.0, *(r[key] for r in rows)],
            [0.0, *(r.get(f"{key}_sem", 0.0) for r in rows)], k))
    drawn.append(charts.lines(f"{title}, ± standard error", "step", label, content))
  diversity = []
  for k, run in enumerate(runs):
    rows = [row for row in run.rows if "eval/diversity" in row]
    start = [(0, run.watch_diversity)] if rows and run.watch_diversity else []
    points = [*start, *((r["step"], r["eval/diversity"]) for r in rows)]
    diversity.append(charts.Line(run.name, [p[0] for p in points], [p[1] for p in points],
                                 series=k))
  drawn.append(charts.lines("Diversity of the looks", "step", "distance in [0, 2]", diversity))
  for title, key, label in (
      ("Reward of the training batches", "train/reward", "mean reward"),
      ("Loss", "loss/total", "loss"), ("Path KL of the training batches", "train/path_kl", "nats"),
      ("Pairs with a positive margin", "train/margin_accuracy", "share")):
    content = []
    for k, run in enumerate(runs):
      rows = [row for row in run.rows if np.isfinite(row.get(key, np.nan))]
      content.append(charts.Line(run.name, [r["step"] for r in rows], [r[key] for r in rows],
                                 series=k, faint=True))
    drawn.append(charts.lines(title, "step", label, content, zero=False))
  drawn = "".join(drawn)
  return _section("Curves", _legend(runs), f'<div class="charts">{drawn}</div>' if drawn else "")


def _trade_offs(runs: list[Run]) -> str:
  """Reward against what was not optimised: looks and results, and the best of both worlds."""
  plots = []
  for title, label, look, end, up in (
      ("Reward against diversity", "diversity, % of base", _look_diversity, _end_diversity, True),
      ("Reward against the judge", "change of the judge",
       lambda run, row: row.get("eval/judge_change"), _end_judge, True),
      ("Reward against path KL", "path KL to the base, nats",
       lambda run, row: row.get("train/path_kl"), _end_kl, False)):
    points = []
    for k, run in enumerate(runs):
      for row in run.rows:
        x = look(run, row)
        if x is not None and "eval/reward_change" in row:
          points.append(charts.Point(f"{run.name}, step {row['step']}", x,
                                     row["eval/reward_change"], series=k, end=False))
      if run.finished and (found := end(run.summary["tuned"])) is not None:
        reward = run.summary["tuned"]["reward"]["change"]
        points.append(charts.Point(f"{run.name}, result", found[0], reward["mean"], found[1],
                                   reward.get("sem", 0.0), k))
    results = [p for p in points if p.end]
    front = charts.front(results if len(results) > 1 else points, up)
    plots.append(charts.scatter(title, label, "change of the reward", points, front))
  plots = "".join(plots)
  return _section(
      "Trade-offs", _legend(runs), '<p class="note">Large: results on held-out prompts with '
      "standard errors. Small: looks on training prompts. Dashed: the Pareto front, points that no "
      f'other surpasses in both.</p><div class="charts">{plots}</div>' if plots else "")


def _look_diversity(run, row):
  found = row.get("eval/diversity")
  return 100 * found / run.watch_diversity if found and run.watch_diversity else None


def _end_diversity(tuned):
  found = tuned["diversity"]
  scale = found["ratio_to_base"] / found["mean"] if found["mean"] else 0.0
  return 100 * found["ratio_to_base"], 100 * scale * found["change"].get("sem", 0.0)


def _end_judge(tuned):
  return tuned["judge"]["change"]["mean"], tuned["judge"]["change"].get("sem", 0.0)


def _end_kl(tuned):
  found = tuned.get("kl_to_base")
  return found and (found["mean"], found.get("sem", 0.0))


def _cost(runs: list[Run]) -> str:
  done = [run for run in runs if run.summary]
  rows = [["training"] + [_duration(run.summary["seconds"]) for run in done],
          ["the whole command"] + [_duration(run.summary["total_seconds"]) for run in done]]
  for key, meaning in COSTS.items():
    values = [run.summary["cost"].get(key) for run in done]
    if any(values):
      rows.append([f"{meaning} <small><code>{key}</code></small>"] + [
          "" if v is None else _bytes(v) if key.endswith("bytes") else f"{v:,}" for v in values])
  head = ["", *(escape(run.name) for run in done)]
  return _section("Cost", _table(head, rows) if done else "")


def _settings(runs: list[Run]) -> str:
  parts = []
  for k, run in enumerate(runs):
    title = f"<h3>{_chip(k)} {escape(run.name)}</h3>" if len(runs) > 1 else ""
    if run.changed is None:
      text = '<p class="note">No shipped recipe has this name; config.json holds all keys.</p>'
    elif run.changed:
      text = _table(["key", "here", "recipe"], [
          [f"<code>{escape(key)}</code>", f"<code>{escape(repr(a))}</code>",
           f"<code>{escape(repr(b))}</code>"] for key, (a, b) in run.changed.items()])
    else:
      text = '<p class="note">Exactly the shipped recipe.</p>'
    versions = ", ".join(f"{name} {value}" for name, value in run.environment.items()
                         if name != "git")
    if "git" in run.environment:
      versions += f", revision {run.environment['git'][:12]}"
    parts.append(f"{title}{text}<p>To repeat it:</p><pre>{escape(command(run))}</pre>"
                 f'<p class="note">{escape(versions)}</p>')
  return _section("Settings", *parts)


def command(run: Run) -> str:
  """The command that repeats the run, in a folder of its own."""
  recipe = f"jaxalign:{run.recipe}" if run.changed is not None else f"configs/{run.recipe}.py"
  words = ["python", "-m", "jaxalign.launch", f"--config={recipe}"]
  for key, (value, _) in (run.changed or {}).items():
    if key != "recipe":
      text = str(tuple(value)) if isinstance(value, list) else str(value)
      words.append(f"--config.{key}={text}")
  return " ".join(map(shlex.quote, [*words, f"--workdir=runs/{run.name}-again"]))


def _pm(found: dict, sign: str = "") -> str:
  error = f" ± {found['sem']:.4f}" if "sem" in found else ""
  return f"{found['mean']:{sign}.4f}{error}"


def _duration(seconds: float) -> str:
  if seconds < 120:
    return f"{seconds:.0f} s"
  minutes = round(seconds / 60)
  return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _bytes(count: float) -> str:
  unit, size = ("GiB", 2 ** 30) if count >= 2 ** 30 else ("MiB", 2 ** 20)
  return f"{count / size:.1f} {unit}"
