"""docs/atlas.md and its pictures, from the rows."""
import pathlib
import re

import numpy as np

from benchmarks.atlas import plane
from benchmarks.atlas.entries import ENTRIES
from benchmarks.atlas.laboratory import PATHS, Entry

NAMES = {"vp": "variance-preserving path", "flow": "flow"}


def gained(row: dict) -> float:
  """How much of the exact tilt's rise of the reward a row has."""
  return (row["reward"] - row["base_reward"]) / (row["tilt_reward"] - row["base_reward"])


def holds_on_the_plane(entry: Entry, rows: list[dict]) -> bool:
  """Whether the rows are what the entry's limit says, by the rule that the page states."""
  rises, last = [gained(row) for row in rows], rows[-1]
  if entry.limit in ("tilt", "tilt given the noise"):
    return all(0.7 < g < 1.2 for g in rises) and all(
        r["kl"] - r["floor"] < 0.35 * r["base_kl"] for r in rows[1:])
  if entry.limit == "first-order tilt":
    return all(0.3 < g < 1.3 for g in rises) and all(r["kl"] < 1.5 * r["base_kl"] for r in rows)
  if entry.limit == "mode":
    return last["mass"][1] > 0.8 and rises[-1] > 1.3 and last["kl"] > 2 * rows[0]["floor"]
  return max(r["kl"] - 2 * r["floor"] for r in rows) > 0.05


def holds_on_the_line(row: dict) -> bool | None:
  """Whether the measured law is theory's: within 3 errors and 0.03."""
  if not row["own"]:
    return None
  return all(abs(m - o) < 3 * e + 0.03 for m, o, e in zip(row["measured"], row["own"],
                                                          row["error"]))


def verdict(held) -> str:
  return {True: "yes", False: "no", None: "-"}[held]


def short(number: float) -> str:
  for size, unit in ((1e6, " M"), (1e3, " k")):
    if number >= size:
      return f"{number / size:.3g}{unit}"
  return f"{number:.0f}"


def read_row(cells: list[str]) -> dict:
  """What `holds_on_the_plane` needs, of the cells of a row of the page."""
  numbers = lambda text: [float(n) for n in re.findall(r"-?\d+\.\d+", text)]
  kl, floor = numbers(cells[2])
  gain, base_kl = numbers(cells[5])
  return {"kl": kl, "floor": floor, "base_kl": base_kl, "mass": numbers(cells[3])[:3],
          "reward": gain, "base_reward": 0.0, "tilt_reward": 1.0}


def cells_of_row(entry: Entry, row: dict) -> list[str]:
  """A row of the plane as the page has it."""
  masses = lambda values: " ".join(f"{v:.2f}" for v in values)
  return [
      entry.name, f"{row['strength']:g}", f"{row['kl']:.3f} ({row['floor']:.3f})",
      f"{masses(row['mass'])} ({masses(row['tilt_mass'])})",
      f"{row['reward']:.2f} ± {row['reward_error']:.2f} ({row['tilt_reward']:.2f})",
      f"{gained(row):.2f} ({row['base_kl']:.3f})",
      "" if row["path_kl"] is None else f"{row['path_kl']:.2f}",
      short(row["rewards"]), short(row["network"])]


def table_of_the_plane(found: dict, path: str) -> list[str]:
  return ["| method | strength | KL to the tilt (floor) | plain, twice, cliff (tilt) | reward "
          "(tilt) | gained (KL of the base) | path KL | rewards asked | network calls |",
          "|---|---|---|---|---|---|---|---|---|",
          *(f"| {' | '.join(cells_of_row(entry, row))} |" for entry in ENTRIES
            for row in found.get(("plane", path, entry.name), []))]


def table_of_the_line(found: dict, path: str) -> list[str]:
  lines = ["| method | scale | base | exact tilt | its own by theory | measured | agrees |",
           "|---|---|---|---|---|---|---|"]
  pair = lambda law: f"{law[0]:.3f}, {law[1]:.3f}" if law else ""
  for entry in ENTRIES:
    row = found.get(("line", path, entry.name))
    if not row:
      continue
    measured = ", ".join(f"{m:.3f} ± {e:.3f}" for m, e in zip(row["measured"], row["error"]))
    lines.append(f"| {entry.name} | {row['scale']:g} | {pair(row['base'])} | {pair(row['tilt'])} | "
                 f"{pair(row['own'])} | {measured} | {verdict(holds_on_the_line(row))} |")
  return lines


def summary(found: dict) -> list[str]:
  lines = ["| method | converges to | plane, VP | plane, flow | line, VP | line, flow | |",
           "|---|---|---|---|---|---|---|"]
  for entry in ENTRIES:
    of = lambda world: [found.get((world, path, entry.name)) for path in PATHS]
    on_plane = [verdict(rows and holds_on_the_plane(
        entry, [read_row(cells_of_row(entry, row)) for row in rows])) for rows in of("plane")]
    on_line = [verdict(row and holds_on_the_line(row)) for row in of("line")]
    lines.append(f"| {entry.name} | {entry.limit} | {' | '.join(on_plane + on_line)} | "
                 f"{entry.sentence} |")
  return lines


def write(root, found: dict, seconds: float) -> None:
  """`docs/atlas.md` and `docs/images/atlas_*.png` under `root`."""
  there = lambda world: [path for path in PATHS if any(key[:2] == (world, path) for key in found)]
  for path in there("plane"):
    draw(root / "docs" / "images" / f"atlas_{path}.png", found, path)
  reading = pathlib.Path(__file__).with_name("reading.md").read_text()
  missing = [f"{world} on the {NAMES[path]}: {' / '.join(names)}" for world in ("plane", "line")
             for path in PATHS if (names := [entry.name for entry in ENTRIES
                                             if (world, path, entry.name) not in found])]
  text = [reading.format(minutes=f"{seconds / 60:.0f}").strip(), "",
          *(["Not computed yet: " + "; ".join(missing) + ".", ""] if missing else []),
          "## What each converges to", "", *summary(found)]
  for path in there("plane"):
    text += ["", f"## The plane on the {NAMES[path]}", "",
             f"![samples](images/atlas_{path}.png)", "", *table_of_the_plane(found, path)]
  for path in there("line"):
    text += ["", f"## The line on the {NAMES[path]}", "", *table_of_the_line(found, path)]
  (root / "docs" / "atlas.md").write_text("\n".join(text) + "\n")


def draw(file, found: dict, path: str) -> None:
  """Where the samples of every method are: of the middle strength, or after all of the training."""
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  panels = [("base", plane.target(path, "noisy", 0.0).cells),
            ("exact tilt", plane.target(path, "noisy", 1.0).cells)]
  for entry in ENTRIES:
    rows = found.get(("plane", path, entry.name))
    if not rows:
      continue
    panels.append((entry.name, np.asarray(rows[2 if entry.strength == "length" else 1]["cells"])))
  columns = 7
  figure, axes = plt.subplots(-(-len(panels) // columns), columns,
                              figsize=(columns * 1.5, -(-len(panels) // columns) * 1.7))
  side = len(plane.EDGES) - 1
  for axis in axes.flat:
    axis.axis("off")
  for axis, (name, cells) in zip(axes.flat, panels):
    axis.imshow(np.sqrt(cells.reshape(side, side).T), origin="lower", cmap="magma_r")
    axis.set_title(name, fontsize=8)
  figure.tight_layout(pad=0.4)
  file.parent.mkdir(exist_ok=True)
  figure.savefig(file, dpi=80)
  plt.close(figure)
