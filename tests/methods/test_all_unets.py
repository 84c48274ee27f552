"""The battery of `network_battery`, on unets; a file of its own runs beside the other's."""
from network_battery import Battery


class TestUnets(Battery):
  family = "unet"
