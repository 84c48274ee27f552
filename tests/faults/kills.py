"""Runs that are killed at random moments, again and again, and end as one that never was.

A seed is a run of a recipe that is killed up to eight times, each time in the process that
continues it: at a random one of the changes that it makes in its folder, or a moment later, in what
it does then (a compilation, a step, a look, a write by a thread of its own). Then it goes on to its
end, and everything that it left is compared with an unbroken run: to the bit.

Processes are forked from one that has imported everything and run nothing, and compile what the
cache of the tests lacks; networks are formulas (see `light`). Else a kill costs half a minute.
"""
import collections
import gc
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback

KILLS = 8
# Training with looks and an export: on a reward's gradient, on scores of a black box, on pairs;
# images at inference; pretraining.
RECIPES = ("nabla_gfn", "ddpo", "mapo", "dno", "pretrain_emoji_vae")
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}
LONGEST = 3.0          # seconds after a change


class Kills:
  count, limit = 30, 7200.0

  def __init__(self, folder: pathlib.Path):
    self._folder, self.counts, self._unbroken = folder, collections.Counter(), {}
    import grain  # noqa: F401
    import jax
    import light  # noqa: F401
    from jax._src import xla_bridge

    from jaxalign.train import inference, loop  # noqa: F401
    assert not xla_bridge.backends_are_initialized()     # its threads would not be in a fork
    gc.freeze()                                          # nor copied there for being looked at
    jax.config.update("jax_compilation_cache_dir",
                      str(pathlib.Path(tempfile.gettempdir()) / "jaxalign-test-cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

  def _process(self, recipe: str, run: pathlib.Path, place: str = "", number: int = 0,
               delay: float = 0.0) -> tuple[bool, dict]:
    """Whether a process that continues a run was killed, and what it noted: its changes.

    Args:
      place, number: it kills itself at its change of this number in this part of the folder;
      delay: or as many seconds later.
    """
    note, said = self._folder / "note.json", self._folder / "said.txt"
    note.write_text("{}")
    pid = os.fork()
    if not pid:
      file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
      os.dup2(file, 1)
      os.dup2(file, 2)
      status = 1
      try:
        child(recipe, run, place, number, delay, note)
        status = 0
      except BaseException:
        traceback.print_exc()
      finally:
        os._exit(status)
    try:
      _, status, used = os.wait4(pid, 0)
    except BaseException:
      os.kill(pid, signal.SIGKILL)
      os.waitpid(pid, 0)
      raise
    self.counts["CPU seconds"] += round(used.ru_utime + used.ru_stime, 1)
    status, text = os.waitstatus_to_exitcode(status), said.read_text(errors="replace")
    if status not in (0, -signal.SIGKILL) or "Traceback" in text:
      raise AssertionError(f"{recipe}: status {status}: {text[-1500:]}")
    return status != 0, json.loads(note.read_text())

  def unbroken(self, recipe: str) -> tuple[dict, list]:
    """What a run leaves that is not killed, and `(place, seconds to the next change)` of each
    change."""
    if recipe not in self._unbroken:
      run = self._folder / f"unbroken_{recipe}"
      _, note = self._process(recipe, run)
      times = note["times"] + [note["times"][-1]]
      gaps = [later - now for now, later in zip(times, times[1:])]
      self._unbroken[recipe] = result(run), list(zip(note["places"], gaps))
    return self._unbroken[recipe]

  def moments(self, rnd: random.Random, changes: list) -> list:
    """Where to kill one process after the other: `(place, number, delay)` in a run's order.

    Checkpoints have most changes; each part of the folder is to have as many kills.
    """
    numbers = collections.defaultdict(list)
    for number, (place, _) in enumerate(changes):
      numbers[place].append(number)
    chosen = sorted(rnd.choice(numbers[rnd.choice(sorted(numbers))]) for _ in range(KILLS))
    found, before = [], {}
    for at in chosen:
      place, gap = changes[at]
      # Changes of this part since the last kill, more or less: what was done is not done again.
      since = sum(number <= at for number in numbers[place]) - before.get(place, 0)
      before = {name: sum(number <= at for number in all) for name, all in numbers.items()}
      delay = rnd.choice((0.0, rnd.uniform(0, min(gap, LONGEST))))
      found.append((place, rnd.randint(1, max(since, 1)), delay))
    return found

  def __call__(self, seed: int) -> str:
    rnd, recipe = random.Random(seed), RECIPES[seed % len(RECIPES)]
    expected, changes = self.unbroken(recipe)
    run = self._folder / f"killed_{seed}"
    moments = []
    for moment in self.moments(rnd, changes):
      killed, note = self._process(recipe, run, *moment)
      moments.append((moment, note.get("path")))
      if not killed:                    # it found less to do, and ended
        break
      self.counts["kills"] += 1
      self.counts[f"{recipe}: {moment[0]}{' later' if moment[2] else ''}"] += 1
    self._process(recipe, run)
    found = result(run)
    for key in expected.keys() | found.keys():
      if expected.get(key) != found.get(key):
        raise AssertionError(f"{recipe} {moments}: {key} is {str(found.get(key))[:300]} and not "
                             f"{str(expected.get(key))[:300]}")
    left = [str(p.relative_to(run)) for p in run.rglob("*")
            if p.name.startswith((".partial", ".unfinished")) or "orbax-checkpoint-tmp" in p.name]
    if left:
      raise AssertionError(f"{recipe} {moments}: left behind {left}")
    shutil.rmtree(run)
    return "accepted"


def result(run: pathlib.Path) -> dict:
  """Everything of a run that does not tell how long it took."""
  rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  out = {"metrics": [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]}
  summary = json.loads((run / "summary.json").read_text())
  for key in ("seconds", "total_seconds", "cost", "best_of_n"):
    summary.pop(key, None)
  out["summary"] = summary
  for file in sorted(run.rglob("*")):
    name = str(file.relative_to(run))
    if name.startswith(("export", "product", "samples", "evaluations")) and file.is_file() and (
        file.suffix not in (".json", ".jsonl")):
      out[name] = hashlib.sha256(file.read_bytes()).hexdigest()
  for folder in sorted((run / "checkpoints").iterdir()):
    if folder.name.isdecimal():
      out[f"checkpoint {folder.name}"] = json.loads(
          (folder / "digests" / "metadata").read_text())["arrays"]
  return out


def child(recipe: str, run: pathlib.Path, place: str, number: int, delay: float,
          note: pathlib.Path) -> None:
  """Continues the run, and kills itself at its change `number` of `place`, or `delay` s later."""
  folder, places, times = os.path.realpath(run), [], []
  lock = threading.Lock()

  def die():
    os.kill(os.getpid(), signal.SIGKILL)

  def audit(event, args):
    if event == "open":
      if not (isinstance(args[1], str) and set(args[1]) & set("wax+") or
              isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
        return
    elif event not in CHANGES:
      return
    path = args[0]
    if not isinstance(path, (str, os.PathLike)) or not str(path).startswith(folder + "/"):
      return
    with lock:
      # What is to be whole has this process's own name first.
      name = re.sub(r"(^|/)\.partial\..*?\.\d+\.", r"\1", os.path.relpath(str(path), folder))
      places.append(name.split("/")[0])
      times.append(time.monotonic())
      if places[-1] == place and places.count(place) == number:
        written = json.dumps({"event": event, "path": name})
        file = os.open(note, os.O_WRONLY | os.O_TRUNC)
        os.write(file, written.encode())
        os.close(file)
        if delay:
          threading.Timer(delay, die).start()
        else:
          die()
  import light

  from jaxalign import train
  from jaxalign.config import recipes
  from jaxalign.pretrain import loop
  from jaxalign.pretrain.config import parse
  light.replace(note.parent)
  config = recipes.load_recipe(f"jaxalign:{recipe}:smoke")
  sys.addaudithook(audit)
  if "task" in config:
    config.train.checkpoint_every = 1
    loop.run(parse(config), pathlib.Path(folder))
  else:
    config.mesh.data, config.train.steps, config.train.patience = 1, 3, 0
    config.eval.every, config.log.to = 1, ()
    if recipe == "ddpo":
      config.reward.names = ("jpeg_compressibility",)
    train.run(recipes.parse(config), pathlib.Path(folder))
  # Whole, as a kill that is later than the run's end may come now.
  whole = note.with_suffix(".whole")
  whole.write_text(json.dumps({"places": places, "times": times}))
  whole.replace(note)
