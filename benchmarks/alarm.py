"""The alarm on four runs that are made to cheat and four sound ones: caught, and cried for nothing.

  python benchmarks/alarm.py FOLDER [NAME ...]

Makes the runs of RUNS (or those named) in FOLDER, each to its end with `train.alarm="warn"`, and
prints a table: when the alarm first cried and why, and the reward then and at the end. Finished
runs are read, others continued: it may be stopped at any time. Hours on a few cores.
"""
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve()
LOOK_OFTEN = {"eval__every": 4, "train__patience": 0, "log__to": ()}
RUNS = {                 # name -> (cheats, recipe, what differs from it)
    "draft-strong": (True, "draft:emoji", {"optim__lr": 1e-2}),
    "dno-free": (True, "dno:emoji", {"method__prno": 0.0, "method__prno_vector": 0.0,
                                     "method__min_p": 0.0, "method__rival": False,
                                     "optim__lr": 0.5}),
    "ddpo-brightness": (True, "ddpo:emoji", {"reward__names": ("brightness",), "optim__lr": 2e-3}),
    "draft-hole": (True, "draft:emoji", {"reward__names": (f"{HERE}:sharpness",),
                                         "optim__lr": 2e-3}),
    "nabla_gfn": (False, "nabla_gfn:emoji", {}),
    "draft": (False, "draft:emoji", {}),
    "ddpo": (False, "ddpo:emoji", {}),
    "dno": (False, "dno:emoji", {"method__rival": False}),
}


def sharpness(images, prepared):
  """A reward with a hole: asks for sharp edges, and is fullest of a pattern without any picture."""
  del prepared
  across = abs(images[:, 1:] - images[:, :-1]).mean((1, 2, 3))
  return across + abs(images[:, :, 1:] - images[:, :, :-1]).mean((1, 2, 3))


def row(name: str, cheats: bool, folder: pathlib.Path) -> str:
  summary = json.loads((folder / "summary.json").read_text())
  looks = {line["step"]: line["eval/reward_change"]
           for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
           if "eval/reward_change" in line}
  first = summary["alarms"][0] if summary["alarms"] else None
  when = f"step {first['step']}: {', '.join(first['signs'])}" if first else "never"
  before = looks[first["step"]] if first else max(looks.values())
  judge = summary["tuned"]["judge"]["change"]
  return (f"| {name} | {'cheats' if cheats else 'sound'} | {summary['steps']} | {when} | "
          f"{before:+.4f} | {looks[max(looks)]:+.4f} | {judge['mean']:+.4f} ± "
          f"{judge.get('sem', 0.0):.4f} | {summary['tuned']['diversity']['ratio_to_base']:.0%} |")


def main() -> None:
  from jaxalign.train import run_recipe
  folder = pathlib.Path(sys.argv[1])
  names = sys.argv[2:] or list(RUNS)
  for name in names:
    _, recipe, overrides = RUNS[name]
    run_recipe(f"jaxalign:{recipe}", folder / name, **{**LOOK_OFTEN, **overrides})
  print("| run | | steps | first alarm | reward then | reward at the end | judge | diversity |\n"
        "|---|---|---|---|---|---|---|---|")
  for name in names:
    print(row(name, RUNS[name][0], folder / name))


if __name__ == "__main__":
  main()
