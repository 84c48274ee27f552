"""The battery of `network_battery`, on transformers; a file of its own runs beside the other's."""
import pytest
from battery import COUSINS, METHODS
from network_battery import Battery


@pytest.mark.usefixtures("compile_quickly")
class TestTransformers(Battery):
  family = "transformer"

  @pytest.fixture(params=[
      pytest.param(name, marks=[pytest.mark.slow] * (name in COUSINS)) for name in METHODS])
  def name(self, request):
    return request.param
