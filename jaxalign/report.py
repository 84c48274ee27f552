"""Command line: `python -m jaxalign.report --runs=DIR[,DIR...] [--output=report.html] [--live]`.

A run as one page that opens from disk: what happened in a sentence, before and after of the same
prompt and noise, curves, trade-offs, cost, settings. Several runs stand side by side, with paired
differences to the first. Finished runs have theirs in `report.html` already. `--live` serves the
page on this machine, renewed whenever the runs look at their pictures, until Ctrl-C.
"""
import pathlib
import sys

from jaxalign.config.command import Flags, run_command
from jaxalign.errors import UserError
from jaxalign.reports import live, page

_FLAGS = Flags()
_RUNS = _FLAGS.define("list", "runs", [], "Folders of runs, the one to compare with first.")
_OUTPUT = _FLAGS.define("string", "output", "report.html", "HTML file to write.")
_LIVE = _FLAGS.define("bool", "live", False, "Serve the page instead, while the runs go on.")
_PORT = _FLAGS.define("integer", "port", 8766, "Of --live; 0 for any that is free.",
                      lower_bound=0, upper_bound=65535)


def main(argv) -> None:
  del argv
  folders = [pathlib.Path(run) for run in _RUNS.value if run]
  if not folders:
    raise UserError("--runs is empty: name the folder of a run, such as runs/nabla_gfn-emoji")
  if _LIVE.value:
    live.serve(folders, _PORT.value)
    return
  output = pathlib.Path(_OUTPUT.value)
  if output.is_dir() or not output.parent.is_dir():
    raise UserError(f"--output={output}: name a file in a folder that is there")
  for run in page.write_report(folders, output):
    print(f"{run.name}: {page.plain_sentence(run)}")
  print(f"{output}, {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
  sys.exit(run_command(main, _FLAGS, required=("runs",)))
