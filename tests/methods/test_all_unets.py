"""The battery of `network_battery`, on unets; a file of its own runs beside the other's.

One method; the others are slow: a program of a unet takes twice as long to compile as one of a
transformer, where all methods run.
"""
import pytest
from battery import METHODS
from network_battery import Battery, one_by_one

ALWAYS = {"nabla_gfn"}
name = one_by_one([pytest.param(method, marks=[pytest.mark.slow] * (method not in ALWAYS))
                   for method in METHODS])


class TestUnets(Battery):
  family = "unet"
