"""What every method converges to, where the truth is known: makes docs/atlas.md and its pictures.

  python -m benchmarks.atlas [--only=NAME;NAME] [--page]

Rows are kept in `.cache/atlas`, so that a run that was stopped goes on, and one after a change of
an entry computes that entry's rows only. A change of the code asks for `--fresh`.
"""
import argparse
import dataclasses
import hashlib
import json
import pathlib
import time

import jax
from tqdm import tqdm

from benchmarks.atlas import line, page, plane
from benchmarks.atlas.entries import ENTRIES
from benchmarks.atlas.laboratory import PATHS

ROOT = pathlib.Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "atlas"
WORLDS = {"plane": plane.rows, "line": line.row}


def kept(world: str, path: str, entry) -> pathlib.Path:
  """The file of a row: other keys of the entry, another file."""
  plain = dataclasses.replace(entry, limit="", sentence="")
  digest = hashlib.sha256(repr((world, path, plain)).encode()).hexdigest()[:12]
  return CACHE / f"{world}_{path}_{entry.name.replace(', ', '-').replace(' ', '_')}_{digest}.json"


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", default="", help="names of entries; computes these, no page")
  parser.add_argument("--page", action="store_true",
                      help="compute nothing: the page of the rows there are")
  parser.add_argument("--fresh", action="store_true", help="compute rows that are kept, too")
  args = parser.parse_args()
  CACHE.mkdir(parents=True, exist_ok=True)
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(CACHE / "programs"))
  wanted = args.only.split(";") if args.only else [entry.name for entry in ENTRIES]
  jobs = [(world, path, entry) for path in PATHS for world in WORLDS for entry in ENTRIES
          if entry.name in wanted]
  found, seconds = {}, 0.0
  with tqdm(jobs, unit="row") as bar:
    for world, path, entry in bar:
      bar.set_postfix_str(f"{entry.name}, {world}, {path}")
      file = kept(world, path, entry)
      if args.page and not file.exists():
        continue
      if args.fresh or not file.exists():
        # What runs for less time than its compilation takes is compiled quickly.
        jax.config.update("jax_disable_most_optimizations", world == "line")
        begun = time.process_time()
        rows = WORLDS[world](entry, path)
        content = {"seconds": time.process_time() - begun, "rows": rows}
        file.write_text(json.dumps(content))
      content = json.loads(file.read_text())
      found[world, path, entry.name] = content["rows"]
      seconds += content["seconds"]
  if args.only:
    print(json.dumps({" ".join(key): [
        {k: v for k, v in row.items() if k != "cells"} for row in (
            rows if isinstance(rows, list) else [rows])] for key, rows in found.items()}, indent=1))
  else:
    page.write(ROOT, found, seconds)


if __name__ == "__main__":
  main()
