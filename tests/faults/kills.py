"""Runs that are killed at random moments, again and again, and end as one that never was.

A seed is a run of a recipe that is killed up to four times, each time in the process that continues
it: at a random one of the calls by which it changes files in its folder, or a moment later, in what
it does then (a compilation, a step, a look, a write by a thread of its own). Then it goes on to its
end, and everything that it left is compared with an unbroken run: to the bit.
"""
import collections
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading

HERE = pathlib.Path(__file__).resolve().parent
KILLS = 4
# What they do: training with looks and an export, a black box, images at inference, pretraining.
RECIPES = ("nabla_gfn", "ddpo", "dno", "pretrain_emoji_vae")
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}


class Kills:
  count, limit = 50, 1800.0

  def __init__(self, folder: pathlib.Path):
    self._folder, self.counts, self._unbroken = folder, collections.Counter(), {}
    if not (folder / "artwork.npz").exists():
      import numpy as np

      import worlds
      np.savez(folder / "artwork.npz", **worlds.drawings()._asdict())

  def _process(self, recipe: str, run: pathlib.Path, at: int, delay: float) -> tuple[int, dict]:
    """Status of a process that continues a run, and what it noted: the changes that it has made."""
    note = self._folder / "note.json"
    note.write_text("{}")
    done = subprocess.run(
        [sys.executable, str(HERE / "kills.py"), recipe, str(run), str(at), str(delay), str(note),
         str(self._folder / "artwork.npz")], capture_output=True, text=True)
    if done.returncode not in (0, -signal.SIGKILL) or "Traceback" in done.stderr:
      raise AssertionError(f"{recipe}: status {done.returncode}: {done.stderr[-1500:]}")
    return done.returncode, json.loads(note.read_text())

  def unbroken(self, recipe: str) -> tuple[dict, list[str]]:
    """What a run leaves that is not killed, and where each of its changes was."""
    if recipe not in self._unbroken:
      run = self._folder / f"unbroken_{recipe}"
      _, note = self._process(recipe, run, 10 ** 9, 0)
      self._unbroken[recipe] = result(run), note["paths"]
    return self._unbroken[recipe]

  def __call__(self, seed: int) -> str:
    rnd, recipe = random.Random(seed), RECIPES[seed % len(RECIPES)]
    expected, places = self.unbroken(recipe)
    phases = collections.defaultdict(list)
    for number, place in enumerate(places, 1):
      phases[place].append(number)
    run = self._folder / f"killed_{seed}"
    moments = []
    for _ in range(KILLS):
      # Checkpoints have most changes; each phase is to have as many kills. Later processes find
      # work done, so that theirs come earlier.
      at = rnd.choice(phases[rnd.choice(sorted(phases))])
      at = -(-at // rnd.randrange(1, 2 + len(moments)))
      delay = rnd.choice((0, 0, rnd.uniform(0, 3)))
      status, note = self._process(recipe, run, at, delay)
      moments.append((at, round(delay, 2), note))
      if status == 0:
        break
      self.counts["kills"] += 1
      where = note.get("path", "?").split("/")[0]
      self.counts[f"{recipe} {where}{' later' if delay else ''}"] += 1
    self._process(recipe, run, 10 ** 9, 0)
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


def child(recipe: str, run: str, at: int, delay: float, note: str, artwork: str) -> None:
  """Continues the run, and kills itself at its change number `at`, or `delay` seconds later."""
  folder, paths = os.path.realpath(run), []
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
      name = os.path.relpath(str(path), folder)
      paths.append(name.split("/")[0])
      if len(paths) == at:
        written = json.dumps({"event": event, "path": name})
        file = os.open(note, os.O_WRONLY | os.O_TRUNC)
        os.write(file, written.encode())
        os.close(file)
        if delay:
          threading.Timer(delay, die).start()
        else:
          die()
  from jaxalign import train
  from jaxalign.config import recipes
  from jaxalign.pretrain import loop
  from jaxalign.pretrain.config import parse
  config = recipes.load_recipe(f"jaxalign:{recipe}:smoke")
  sys.addaudithook(audit)
  path = pathlib.Path(folder)
  if "task" in config:
    config.task.artwork = artwork
    config.train.checkpoint_every = 1
    loop.run(parse(config), path)
  else:
    config.mesh.data, config.train.steps, config.train.patience = 1, 3, 0
    config.eval.every, config.log.to = 1, ()
    train.run(recipes.parse(config), path)
  pathlib.Path(note).write_text(json.dumps({"paths": paths}))


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
  child(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5], sys.argv[6])
