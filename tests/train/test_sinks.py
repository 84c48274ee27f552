"""Services that get a run's numbers, each in its real library, writing to disk."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

import runs
from jaxalign.config.recipes import completed, parse
from jaxalign.errors import UserError
from jaxalign.train import sinks
from jaxalign.train.workdir import Workdir

SECRET = "hunter2secret"
CONFIG = {"seed": 3, "reward": {"names": [f"http://me:{SECRET}@host/score"]}}


def write(folder, name, config=CONFIG):
  """Two steps, closed; then a third by a resumed run."""
  folder.mkdir(exist_ok=True)
  for step, rows in ((0, (1, 2)), (2, (3,))):
    sink, = sinks.open_sinks((name,), folder, config, step)
    for k in rows:
      sink.add(k, {"train/reward": k / 8, "eval/judge": k / 4})
    sink.close()
  return folder


def in_process(code, folder, **env):
  """Runs `code` in a process of its own: these libraries leave threads and settings behind."""
  program = (f"import json, sys; sys.path[:0] = {sys.path!r}\n"
             "from test_sinks import *\nfolder = pathlib.Path(sys.argv[1])\n" + code)
  clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "MLFLOW", "TRACKIO"))}
  done = subprocess.run(
      [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=300,
      cwd=folder, env={**clean, "PYTHONPATH": os.pathsep.join(
          [str(pathlib.Path(__file__).parent), *filter(None, sys.path)]),
                       "HOME": str(folder), **env})
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


def test_wandb_offline(tmp_path):
  pytest.importorskip("wandb", exc_type=ImportError)
  in_process("write(folder / 'run', 'wandb')", tmp_path)
  names = [p.name for p in (tmp_path / "run" / "wandb").iterdir() if p.name.startswith("offline")]
  assert len(names) == 2 and len({name.rpartition("-")[2] for name in names}) == 1  # one run's id
  content = b"".join(p.read_bytes() for p in (tmp_path / "run").rglob("*.wandb"))
  assert content.count(b"train/reward") >= 3 and b"eval/judge" in content


def test_mlflow(tmp_path):
  pytest.importorskip("mlflow", exc_type=ImportError)
  pytest.importorskip("sqlalchemy")                      # mlflow-skinny has none
  out = in_process("""
write(folder / "run", "mlflow")
from mlflow import MlflowClient
client = MlflowClient(tracking_uri=f"sqlite:///{(folder / 'run' / 'mlflow.db').resolve()}")
found = client.search_runs([client.get_experiment_by_name("jaxalign").experiment_id])
assert len(found) == 1, found
run = found[0]
history = client.get_metric_history(run.info.run_id, "train/reward")
print(json.dumps([[(m.step, m.value) for m in history], run.data.params["seed"],
                  run.info.run_name]))
""", tmp_path)
  history, seed, name = json.loads(out.splitlines()[-1])
  assert history == [[1, 1 / 8], [2, 2 / 8], [3, 3 / 8]] and (seed, name) == ("3", "run")


def test_trackio(tmp_path):
  pytest.importorskip("trackio", exc_type=ImportError)
  in_process("write(folder / 'run', 'trackio')", tmp_path)
  files = [p for p in (tmp_path / "run" / "trackio").rglob("*") if p.is_file()]
  content = b"".join(p.read_bytes() for p in files)
  assert b"train/reward" in content and not list(tmp_path.glob("run/tensorboard"))


def test_tensorboard(tmp_path):
  write(tmp_path / "run", "tensorboard")
  files = list((tmp_path / "run" / "tensorboard").iterdir())
  assert b"train/reward" in b"".join(file.read_bytes() for file in files)


def test_credentials_are_in_no_config_that_a_service_gets(tmp_path, monkeypatch):
  seen = []
  monkeypatch.setitem(sinks.KINDS, "wandb", lambda folder, config, step: seen.append(config))
  cfg = runs.smoke(reward__names=(f"http://me:{SECRET}@host/score",), log__to=("wandb",))
  workdir = Workdir(tmp_path / "run", cfg)
  workdir.create()
  workdir.open_metrics(0, cfg.log.to)
  workdir.close()
  assert seen and SECRET not in json.dumps(seen) and "***@host" in json.dumps(seen)


def test_a_service_that_fails_costs_the_run_nothing(tmp_path, monkeypatch, capsys):
  class Broken:
    def __init__(self, *args):
      self.closed = 0

    def add(self, step, values):
      raise ConnectionError("no route\nto host")

    def close(self):
      raise RuntimeError("never reached")
  monkeypatch.setitem(sinks.KINDS, "mlflow", Broken)
  sink, = sinks.open_sinks(("mlflow",), tmp_path, CONFIG, 0)
  for step in (1, 2):
    sink.add(step, {"a": 1.0})
  sink.close()
  said = capsys.readouterr().out
  assert said.count("log.to: mlflow failed and gets no more numbers: no route to host") == 1


def test_one_that_is_not_there_or_refuses_is_one_line(tmp_path, monkeypatch):
  def missing(*args):
    raise ImportError("No module named 'trackio'")

  def refuses(*args):
    raise ValueError("no\nproject")
  monkeypatch.setitem(sinks.KINDS, "trackio", missing)
  monkeypatch.setitem(sinks.KINDS, "wandb", refuses)
  with pytest.raises(UserError, match="log.to has 'trackio', which is not installed.*pip install"):
    sinks.open_sinks(("trackio",), tmp_path, CONFIG, 0)
  with pytest.raises(UserError, match="log.to has 'wandb', which refuses: no project"):
    sinks.open_sinks(("wandb",), tmp_path, CONFIG, 0)
  with pytest.raises(UserError, match="log.to"):
    runs.smoke(log__to=("comet",))


@pytest.mark.parametrize("old, new", [(True, ("tensorboard",)), (False, ())])
def test_older_runs_said_tensorboard_yes_or_no(old, new):
  values = runs.smoke().to_dict()
  values["log"] = {"tensorboard": old, "grid_prompts": 8}
  assert parse(completed(values)).log.to == new


def test_callbacks_get_every_step_and_the_pictures_of_every_look():
  import jax

  from jaxalign.train import loop
  steps, looks = [], []
  cfg = runs.smoke()
  with runs.sharing(cfg, None):
    loop.run(cfg, runs.FOLDER / "callbacks", jax.devices()[:1],
             on_step=lambda step, values: steps.append((step, values)),
             on_look=lambda step, samples, prompts: looks.append((step, samples, prompts)))
  assert [step for step, _ in steps] == [1, 2, 3] and "train/reward" in steps[0][1]
  (step, samples, prompts), = looks
  assert step == 2 and len(prompts) == len(samples.images) == cfg.eval.watch_prompts
  assert samples.scores["reward"].shape == (cfg.eval.watch_prompts, cfg.eval.watch_samples)


def test_the_library_runs_what_the_command_does(tmp_path, monkeypatch):
  import jaxalign
  from jaxalign import train
  seen = []
  monkeypatch.setattr(train, "run", lambda cfg, path, **kw: seen.append((cfg, path, kw)) or {})
  jaxalign.run("jaxalign:nabla_gfn:smoke")
  config = jaxalign.load_recipe("jaxalign:ddpo:smoke")
  config.train.steps = 2
  jaxalign.run(config, tmp_path, on_step=print)
  assert seen[0][0].recipe == "nabla_gfn:smoke" and seen[0][1] == "runs/nabla_gfn-smoke"
  assert seen[1][0].train.steps == 2 and seen[1][1:] == (tmp_path, {"on_step": print,
                                                                    "on_look": None})
