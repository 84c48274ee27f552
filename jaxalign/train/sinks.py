"""Where a run's numbers go beside metrics.jsonl: the services that `log.to` names, and callbacks.

Each keeps what it has on disk in the run's folder, unless its own environment variables say
otherwise. They get the config as config.json has it, without credentials.
"""
import hashlib
import os
import pathlib
import time
from collections.abc import Callable
from typing import Protocol

from flax import traverse_util
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from jaxalign.devices import processes
from jaxalign.errors import UserError

PROJECT = "jaxalign"


class Sink(Protocol):
  """Gets the numbers of each step, and of looks under the step's number once more."""

  def add(self, step: int, values: dict[str, float]) -> None: ...

  def close(self) -> None: ...


class TensorBoard:
  """Event files, written at once: no thread has anything to say when a disk is full.

  `WHERE/tensorboard`; of files that are there already, steps from the next one on are not shown any
  more.
  """

  def __init__(self, folder: pathlib.Path, config: dict, step: int):
    del config
    folder = folder / "tensorboard"
    folder.mkdir(parents=True, exist_ok=True)
    self._file = EventsWriter(str(folder / "events"))
    self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

  def add(self, step: int, values: dict[str, float]) -> None:
    for name, value in values.items():
      self._write(step=step, summary=scalar(name, value))

  def _write(self, **content) -> None:
    self._file.write_event(Event(wall_time=time.time(), **content))
    self._file.flush()

  def close(self) -> None:
    self._file.close()


class WeightsAndBiases:
  """One W&B run a folder, which a resumed run continues; offline unless somebody is logged in."""

  def __init__(self, folder: pathlib.Path, config: dict, step: int):
    del step
    import wandb
    mode = os.environ.get("WANDB_MODE") or _wandb_mode()
    self._run = wandb.init(
        project=PROJECT, name=folder.name, id=_identity(folder), resume="allow", mode=mode,
        dir=str(folder), config=config,
        settings=wandb.Settings(silent=True, console="off"))

  def add(self, step: int, values: dict[str, float]) -> None:
    self._run.log(values, step=step)

  def close(self) -> None:
    self._run.finish()


class MLflow:
  """A run of the experiment `jaxalign`, where MLFLOW_TRACKING_URI says or in `WHERE/mlflow.db`."""

  def __init__(self, folder: pathlib.Path, config: dict, step: int):
    del step
    from mlflow import MlflowClient
    uri = os.environ.get("MLFLOW_TRACKING_URI") or (
        f"sqlite:///{(folder / 'mlflow.db').resolve()}")
    self._client = MlflowClient(tracking_uri=uri)
    found = self._client.get_experiment_by_name(PROJECT)
    experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
    tag = _identity(folder)
    old = self._client.search_runs([experiment], f"tags.jaxalign = '{tag}'", max_results=1)
    run = old[0] if old else self._client.create_run(
        experiment, run_name=folder.name, tags={"jaxalign": tag})
    self._id = run.info.run_id
    if not old:
      for key, value in traverse_util.flatten_dict(config, sep=".").items():
        self._client.log_param(self._id, key, str(value)[:500])

  def add(self, step: int, values: dict[str, float]) -> None:
    for name, value in values.items():
      self._client.log_metric(self._id, name, value, step=step)

  def close(self) -> None:
    self._client.set_terminated(self._id)


class Trackio:
  """A run of the project `jaxalign`, in TRACKIO_DIR or `WHERE/trackio`."""

  def __init__(self, folder: pathlib.Path, config: dict, step: int):
    del step
    os.environ.setdefault("TRACKIO_DIR", str((folder / "trackio").resolve()))   # read on import
    import trackio
    self._trackio = trackio
    trackio.init(project=PROJECT, name=f"{folder.name}-{_identity(folder)}", config=config,
                 resume="allow")

  def add(self, step: int, values: dict[str, float]) -> None:
    self._trackio.log(values, step=step)

  def close(self) -> None:
    self._trackio.finish()


class Callback:
  """A function of step and numbers."""

  def __init__(self, function: Callable[[int, dict[str, float]], None]):
    self.add = function

  def close(self) -> None:
    pass


KINDS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow,
         "trackio": Trackio}


class Careful:
  """A service that may fail, which is said once and costs the run nothing."""

  def __init__(self, name: str, sink: Sink):
    self._name, self._sink = name, sink

  def add(self, step: int, values: dict[str, float]) -> None:
    self._try(lambda: self._sink.add(step, values))

  def close(self) -> None:
    self._try(lambda: self._sink.close())

  def _try(self, act) -> None:
    if self._sink is None:
      return
    try:
      act()
    except Exception as error:       # each service has kinds of its own
      processes.say(f"log.to: {self._name} failed and gets no more numbers: {_line(error)}")
      self._sink = None


def open_sinks(names: tuple[str, ...], folder: pathlib.Path, config: dict, step: int) -> list[Sink]:
  """The services of `log.to`, of a run that has taken `step` steps.

  Raises:
    UserError: one is not installed, or refuses.
  """
  found = []
  for name in names:
    try:
      sink = KINDS[name](folder, config, step)
    except ImportError as error:
      raise UserError(f"log.to has {name!r}, which is not installed ({error}): pip install "
                      f"{name}") from error
    except OSError:
      raise
    except Exception as error:
      raise UserError(f"log.to has {name!r}, which refuses: {_line(error)}") from error
    # A disk that is full ends a run in one line; event files are on the run's own.
    found.append(sink if name == "tensorboard" else Careful(name, sink))
  return found


def _identity(folder: pathlib.Path) -> str:
  """Of the run in this folder, the same when it is resumed."""
  return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]


def _wandb_mode() -> str:
  """Online where a key is at hand; W&B would ask for one."""
  netrc = pathlib.Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
  known = os.environ.get("WANDB_API_KEY") or (
      netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="replace"))
  return "online" if known else "offline"


def _line(error: Exception) -> str:
  return " ".join(str(error).split())[:200] or type(error).__name__
