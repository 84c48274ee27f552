"""One kind of campaign in a process of its own: `child.py KIND SEED..`; a line of JSON a seed.

The process ends by itself, without a word, where a seed hangs or takes too much memory.
"""
import contextlib
import faulthandler
import json
import os
import pathlib
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]
MOST_SECONDS, MOST_BYTES = 10.0, 2 * 2 ** 30


def watch_memory() -> None:
  """Ends the process at once: what allocates may never come back."""
  page = os.sysconf("SC_PAGE_SIZE")
  while True:
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * page
    if used > MOST_BYTES:
      print(f"{used / 2**30:.1f} GiB of memory", file=sys.stderr, flush=True)
      os._exit(77)
    time.sleep(0.02)


class Hang(BaseException):
  """A seed takes too long."""


def hang(*_):
  raise Hang


def one(kind, seed: int) -> dict:
  limit = getattr(kind, "limit", MOST_SECONDS)
  begun = time.monotonic()
  faulthandler.dump_traceback_later(3 * limit, exit=True)      # in native code no signal is seen
  signal.setitimer(signal.ITIMER_REAL, limit)
  try:
    result = kind(seed)
  except Hang:
    result = f"hangs for more than {limit:g} s"
  except BaseException as error:
    where = [f"{f.name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-6:]]
    result = f"{type(error).__name__}: {str(error)[:1500]} at {where}"
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.cancel_dump_traceback_later()
  row = {"seed": seed, "result": result, "seconds": round(time.monotonic() - begun, 2),
         "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
  counts = getattr(kind, "counts", None)
  if counts:
    row["counts"] = dict(counts)
    counts.clear()
  return row


def main() -> None:
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  from campaigns import KINDS
  from kills import Kills
  channel = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)                         # what campaigns print is not for the runner
  signal.signal(signal.SIGALRM, hang)
  with tempfile.TemporaryDirectory(prefix="jaxalign-faults-") as folder:
    kind = {**KINDS, "kills": Kills}[sys.argv[1]](pathlib.Path(folder).resolve())
    if not isinstance(kind, Kills):
      with contextlib.suppress(Exception):
        kind(-1)                        # imports and compiles what all need
    threading.Thread(target=watch_memory, daemon=True).start()
    for seed in map(int, sys.argv[2:]):
      print(json.dumps({"seed": seed}), file=channel, flush=True)
      print(json.dumps(one(kind, seed)), file=channel, flush=True)
  os._exit(0)                           # whatever threads are left behind


if __name__ == "__main__":
  main()
