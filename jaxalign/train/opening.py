"""Opening a model by name: shipped ones, architectures without weights, directories, hub ids."""
import functools
import tempfile

from jaxalign.config.places import ASSETS
from jaxalign.config.schema import SampleConfig
from jaxalign.convert import load_pipeline
from jaxalign.errors import UserError
from jaxalign.models.architectures import ARCHITECTURES, architecture
from jaxalign.models.pipeline import Pipeline
from jaxalign.models.tokenizer import Tokenizer
from jaxalign.sampling import Schedule


def open_pipeline(path: str, dtype: str = "float32", remat: str = "none", unet: str = "",
                  shapes_only: bool = False) -> Pipeline:
  """`jaxalign:NAME`, a diffusers directory or a hub id -> Pipeline.

  Names are those of the models shipped, `fixture` and `fixture_sd3` with random weights, and of
  `ARCHITECTURES`, which have no weights and are for `shapes_only`.
  `unet` names weights that take the place of the denoiser's; for `shapes_only` see `load_pipeline`.
  """
  load = functools.partial(load_pipeline, unet=unet, dtype=dtype, remat=remat,
                           shapes_only=shapes_only)
  if not path:
    raise UserError("model.path is empty: name a diffusers directory or a hub id")
  if path in ("jaxalign:fixture", "jaxalign:fixture_sd3"):
    from jaxalign.testing import fixture
    make = (fixture.make_pipeline_dir if path == "jaxalign:fixture"
            else fixture.make_sd3_pipeline_dir)
    with tempfile.TemporaryDirectory() as folder:
      return load(make(f"{folder}/fixture", image_size=32))
  if path.startswith("jaxalign:"):
    name = path.removeprefix("jaxalign:")
    if name in ARCHITECTURES:
      if not shapes_only:
        raise UserError(f"model.path={path}: an architecture without weights, for --plan only")
      return architecture(name, Tokenizer.load(ASSETS / "emoji" / "tokenizer"), shapes_only=True,
                          dtype=dtype, remat=remat)
    folder = ASSETS / name
    if not folder.is_dir():
      raise UserError(f"model.path={path}: no model of this name is shipped")
    return load(folder)
  return load(path)


def own_sampler(pipeline: Pipeline) -> SampleConfig:
  """How a checkpoint is sampled where no run says so.

  One step for a one-step generator; Euler's method on the checkpoint's levels on a flow, with the
  steps and the guidance that diffusers' pipeline has.
  """
  schedule = Schedule.from_config(pipeline.scheduler_config)
  if schedule.one_step is not None:
    return SampleConfig(kind="one_step", steps=1, guidance=1.0)
  if schedule.is_flow:
    return SampleConfig(steps=28, guidance=7.0, eta=0.0, final="")
  return SampleConfig()
