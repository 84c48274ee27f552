"""`python -m tests.faults [KIND ..] [--seeds=A:B] [--minutes=M] [--log=FILE]`: the campaigns.

Without a KIND all of them. The log has one line a seed; seeds that it has are not run again, so the
same command goes on where it was ended, by Ctrl-C or by its minutes. The exit status is 1 if there
was a fault. A seed alone: `python -m tests.faults json --seeds=17:18 --log=/dev/null`.
"""
import argparse
import collections
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]


def run(kind: str, seeds: list[int], until: float, log) -> None:
  """One process after the other: whoever dies, or hangs, is replaced and its seed is a fault."""
  while seeds and time.monotonic() < until:
    said = tempfile.TemporaryFile("w+", errors="replace")     # a pipe would fill up, and block
    child = subprocess.Popen([sys.executable, str(HERE / "child.py"), kind, *map(str, seeds)],
                             stdout=subprocess.PIPE, stderr=said, text=True)
    at = None

    def end_of_said() -> str:
      said.seek(max(said.seek(0, os.SEEK_END) - 2000, 0))
      return said.read()
    try:
      for line in child.stdout:
        try:
          row = json.loads(line)
        except ValueError:
          continue
        at = row["seed"] if "result" not in row else None
        if at is None:
          log({"kind": kind, **row})
          seeds = seeds[1:]
        if time.monotonic() > until:
          break
      else:
        child.wait()
        if at is None and seeds:
          raise SystemExit(f"{kind}: could not begin: {end_of_said()}")
        if at is not None:
          log({"kind": kind, "seed": at,
               "result": f"died, status {child.returncode}: {end_of_said()}"})
          seeds = seeds[1:]
    finally:
      child.kill()
      child.wait()
      said.close()


def main() -> int:
  from campaigns import KINDS
  from kills import Kills
  kinds = {**KINDS, "kills": Kills}
  parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
  parser.add_argument("kinds", nargs="*", help=", ".join(kinds))
  parser.add_argument("--seeds", default="", help="A:B; by default as many as a kind has")
  parser.add_argument("--minutes", type=float, default=1e9, help="of all kinds together")
  parser.add_argument("--log", default="runs/faults.jsonl", type=pathlib.Path)
  args = parser.parse_args()
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))        # ends what was started, too
  until = time.monotonic() + 60 * args.minutes
  rows = []
  if args.log.is_file():
    rows = [json.loads(line) for line in args.log.read_text().splitlines()]
  args.log.parent.mkdir(parents=True, exist_ok=True)
  with args.log.open("a") as file:
    def log(row):
      rows.append(row)
      file.write(json.dumps(row) + "\n")
      file.flush()
      if row["result"] not in ("accepted", "refused"):
        print(f"{row['kind']} {row['seed']}: {row['result']}", flush=True)
    for kind in args.kinds or kinds:
      first, last = map(int, args.seeds.split(":")) if args.seeds else (0, kinds[kind].count)
      done = {row["seed"] for row in rows if row["kind"] == kind}
      run(kind, [seed for seed in range(first, last) if seed not in done], until, log)
      mine = [row for row in rows if row["kind"] == kind]
      counts = collections.Counter(
          row["result"] if row["result"] in ("accepted", "refused") else "fault" for row in mine)
      slowest = max((row.get("seconds", 0) for row in mine), default=0)
      more = collections.Counter()
      for row in mine:
        more.update(row.get("counts", {}))
      print(f"{kind}: {len(mine)} seeds, {dict(counts)}, slowest {slowest:.1f} s "
            f"{dict(more) or ''}", flush=True)
  return int(any(row["result"] not in ("accepted", "refused") for row in rows))


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  sys.exit(main())
