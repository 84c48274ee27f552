"""Pairs at a chosen distance from the model."""
import numpy as np
import pytest

from jaxalign.data.pairs import open_pairs
from jaxalign.emoji import mismatch, quality
from jaxalign.errors import UserError
from jaxalign.rewards.rules import grayness

CAPTIONS = ["a cat on a red background", "a dog on a blue background"] * 8


@pytest.fixture
def drawn(monkeypatch):
  """Stands in for the sampler: noise that depends on the seed and the guidance."""
  def draw(pipeline, captions, seed=0, label="", guidance=3.0):
    generator = np.random.default_rng([seed, int(guidance)])
    return generator.uniform(size=(len(captions), 64, 64, 3)).astype(np.float32)
  monkeypatch.setattr(quality, "draw", draw)


def test_votes_follow_the_reward():
  generator = np.random.default_rng(0)
  gap = generator.standard_normal(20_000)
  won = mismatch.vote(gap, np.zeros_like(gap), generator)
  expected = 1 / (1 + np.exp(-mismatch.SHARPNESS * gap / gap.std()))
  assert abs(won.mean() - 0.5) < 0.02
  for low, high in ((-2, -1), (-1, 0), (0, 1), (1, 2)):
    inside = (gap > low) & (gap < high)
    assert abs(won[inside].mean() - expected[inside].mean()) < 0.03


def test_winners_and_losers_of_each_scenario(drawn):
  base = quality.draw(None, CAPTIONS, 0)
  make = lambda scenario, strength=1.0: mismatch.make_pairs(None, CAPTIONS, scenario, strength, 0)
  winners, losers = make("r0")
  other = quality.draw(None, CAPTIONS, 1)
  assert all(np.array_equal(w, b) != np.array_equal(w, o) for w, b, o in zip(winners, base, other))
  np.testing.assert_allclose(winners + losers, base + other, atol=1e-6)
  np.testing.assert_array_equal(make("r1")[0], quality.draw(None, CAPTIONS, 1, guidance=6.0))
  winners, losers = make("r2")
  np.testing.assert_array_equal(winners, base)
  assert 0 <= losers.min() and losers.max() <= 1 and np.abs(losers - base).mean() > 0.1
  winners, losers = make("r3")
  np.testing.assert_array_equal(losers, base)
  np.testing.assert_allclose(grayness().score({}, winners, {}), 1.0, atol=1e-6)
  np.testing.assert_array_equal(make("r3", 0.0)[0], base)
  np.testing.assert_allclose(make("r3", 0.5)[0], (base + winners) / 2, atol=1e-6)


def test_pairs_are_read_as_they_were_written(drawn, tmp_path):
  import pyarrow as pa
  import pyarrow.parquet as pq
  winners, losers = mismatch.make_pairs(None, CAPTIONS, "r3", 1.0, 0)
  pq.write_table(pa.Table.from_pylist(mismatch.rows_of(CAPTIONS, winners, losers)),
                 tmp_path / "r3.parquet")
  pairs = open_pairs(str(tmp_path / "r3.parquet"), "drop")
  assert pairs.captions == CAPTIONS
  for i in range(4):                               # the preferred image comes first
    np.testing.assert_allclose(pairs.images(i, 64, 64)["pixels"] / 255,
                               np.stack([winners[i], losers[i]]), atol=0.5 / 255 + 1e-6)


def test_mismatch_refuses_what_makes_no_pairs(tmp_path):
  for flag in ("--pairs=0", "--strength=1.5"):
    with pytest.raises(UserError, match=flag):
      mismatch.main(["--scenario=r0", f"--output={tmp_path / 'r0.parquet'}", flag])
