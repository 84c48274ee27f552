"""Markdown table of finished runs, from their summary.json.

  python benchmarks/summarize.py RUN_FOLDER [RUN_FOLDER ...]
"""
import json
import pathlib
import sys

ROWS = (
    ("reward, base", lambda s: pm(s["base"]["reward"])),
    ("reward, tuned", lambda s: pm(s["tuned"]["reward"])),
    ("reward, paired change", lambda s: change(s, "reward")),
    ("in within-prompt std of the base", lambda s: in_std(s["tuned"]["reward"]["change"])),
    ("judge, paired change", lambda s: change(s, "judge")),
    ("background colour right, base / tuned", lambda s: (
        f"{s['base']['color_accuracy']['mean']:.3f} / {s['tuned']['color_accuracy']['mean']:.3f}")),
    ("diversity kept", lambda s: f"{100 * s['tuned']['diversity']['ratio_to_base']:.1f} %"),
    ("diversity kept by the exact tilt", lambda s: tilt(s)),
    ("Fréchet distance to base (floor)", lambda s: (
        f"{s['tuned']['fd_to_base']['distance']:.4f} ({s['tuned']['fd_to_base']['floor']:.4f})")),
    ("path KL to base, nats", lambda s: pm(s["tuned"]["kl_to_base"], 2)),
    ("updates, seconds of training, in all", lambda s: (
        f"{s['steps']}, {s['seconds']:.0f}, {s['total_seconds']:.0f}")),
    ("reward queries, with gradient", lambda s: (
        f"{s['cost']['reward_queries']}, {s['cost']['reward_gradients']}")),
)


def pm(value, digits=4):
  return f"{value['mean']:.{digits}f} ± {value['sem']:.{digits}f}"


def change(summary, name):
  value = summary["tuned"][name]["change"]
  return f"{value['mean']:+.4f} ± {value['sem']:.4f} ({value['mean'] / value['sem']:.1f} SE)"


def in_std(value):
  return f"{value['mean_in_std']:+.2f} ± {value['sem_in_std']:.2f}"


def tilt(summary):
  exact = summary["exact_tilt"]
  if "diversity" not in exact:
    return "no estimate (one sample holds all the weight)"
  kept = exact["diversity"]["mean"] / summary["base"]["diversity"]["mean"]
  return f"{100 * kept:.1f} % ({exact['ess']['mean']:.1f} effective samples)"


def main():
  folders = [pathlib.Path(p) for p in sys.argv[1:]]
  seeds = [json.loads((f / "config.json").read_text())["config"]["seed"] for f in folders]
  runs = [json.loads((f / "summary.json").read_text()) for f in folders]
  print("| | " + " | ".join(f"seed {seed}" for seed in seeds) + " |")
  print("|---" * (len(runs) + 1) + "|")
  for name, cell in ROWS:
    print(f"| {name} | " + " | ".join(cell(run) for run in runs) + " |")


if __name__ == "__main__":
  main()
