"""The fixture model on disk, and as it is read."""
import pytest

from jaxalign.convert import load_pipeline
from jaxalign.testing.fixture import make_pipeline_dir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return make_pipeline_dir(tmp_path_factory.mktemp("fixture") / "pipeline")


@pytest.fixture(scope="module")
def pipeline(folder):
  return load_pipeline(folder)
