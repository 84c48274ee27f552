"""The battery of `network_battery`, on transformers; a file of its own runs beside the other's."""
import pytest
from battery import COUSINS, METHODS
from network_battery import Battery, one_by_one

name = one_by_one([pytest.param(method, marks=[pytest.mark.slow] * (method in COUSINS))
                   for method in METHODS])


@pytest.mark.usefixtures("compile_quickly")
class TestTransformers(Battery):
  family = "transformer"
