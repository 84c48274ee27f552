"""A quick slice of every campaign on damaged input; the whole is `python -m tests.faults`.

A seed that was a fault once is a fault for ever: it is added to `ONCE`.
"""
import campaigns
import pytest

SEEDS = {"pictures": 300, "json": 150, "parquet": 100, "safetensors": 60, "lora": 100, "http": 20,
         "commands": 60, "processes": 1, "checkpoints": 10}
ONCE = {"json": (299, 998), "http": (19,), "commands": (673, 1249), "lora": (7, 35, 50, 271, 329)}
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def test_every_kind_has_a_slice():
  assert SEEDS.keys() == campaigns.KINDS.keys()


@pytest.mark.parametrize("name", SEEDS)
def test_damaged_input_is_used_or_refused_in_one_line(tmp_path, name):
  kind = campaigns.KINDS[name](tmp_path)
  seeds = [*range(SEEDS[name]), *ONCE.get(name, ())]
  found = {seed: kind(seed) for seed in seeds}
  assert set(found.values()) <= {"accepted", "refused"}
  assert "refused" in found.values()             # else nothing was damaged
