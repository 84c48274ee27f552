"""The battery of `network_battery`, on transformers; a file of its own runs beside the other's."""
from network_battery import Battery


class TestTransformers(Battery):
  family = "transformer"
