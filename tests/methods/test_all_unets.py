"""The battery of `network_battery`, on unets; a file of its own runs beside the other's.

One method; the others are slow: a program of a unet takes twice as long to compile as one of a
transformer, where all methods run.
"""
import pytest
from battery import METHODS
from network_battery import Battery

ALWAYS = {"nabla_gfn"}


class TestUnets(Battery):
  family = "unet"

  @pytest.fixture(params=[
      pytest.param(name, marks=[pytest.mark.slow] * (name not in ALWAYS)) for name in METHODS])
  def name(self, request):
    return request.param
