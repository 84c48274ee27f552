"""Is it noise? PRNO and its rivals against closed forms, published sizes and known blind spots."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.methods.shared.noise import (
  LN2,
  concentration,
  detection_limit,
  kl_from_start,
  norm_score,
  permutations,
  prno,
  prno_per_vector,
  spectrum_score,
)
from jaxalign.sampling import make_sampler
from jaxalign.testing import analytic

BIG = 51 * 64 * 64 * 4       # all noise of 50 steps of Stable Diffusion 1.5: D = 835,584


@pytest.fixture(scope="module")
def big():
  """One normal draw of D numbers, two permutations, and the regulariser in the published form."""
  generator = np.random.default_rng(0)
  z = generator.standard_normal(BIG).astype(np.float32)
  orders = jnp.asarray([generator.permutation(BIG) for _ in range(2)])
  look = jax.jit(lambda z: prno(z[None], orders))
  return z, lambda z: jax.tree.map(lambda a: float(a[0]), look(jnp.asarray(z, jnp.float32)))


def regularizer(result):
  """The published `reg`, whose floor is `4 ln 2`."""
  return 4 * LN2 - result.score


def test_genuine_noise(big):
  """Published range of three draws: 2.80 to 3.73; the second moment is never suspicious."""
  z, look = big
  result = look(z)
  assert 4 * LN2 <= regularizer(result) < 6
  assert result.p > 0.1 and result.second_hinge == 0


@pytest.mark.parametrize("factor, low, high", [(0.995, 2.77, 4.5), (0.993, 4.5, 9.5),
                                               (0.99, 11, 20), (0.98, 60, 75)])
def test_shrunk_noise(big, factor, low, high):
  """3.2, 6.8, 15 and 67 in the reference draws; a draw's own M2 moves that by a few nats."""
  z, look = big
  assert low < regularizer(look(factor * z)) < high


def test_shifted_noise(big):
  """A shift by 0.01 adds `2 m 0.01^2 / 2 = 20.9` nats, less cross terms of the draw's own mean."""
  z, look = big
  centred = z - z.reshape(-1, 4).mean(0).repeat(1)[None].repeat(BIG // 4, 0).ravel()
  natural = lambda z: float(concentration(jnp.asarray(z)[None], 4)[0][0])
  assert natural(centred + 0.01) == pytest.approx(-BIG // 4 * 0.01 ** 2 / 2, rel=1e-2)
  assert look(z + 0.01).p < 1e-2 and look(z + 0.02).p < 1e-6


@pytest.mark.parametrize("factor, published", [(0.995, 0.80), (0.993, 0.14), (0.99, 1e-3),
                                               (0.98, 6e-15)])
def test_second_bound_of_shrunk_noise(big, factor, published):
  """p2 is `2 exp(-m / 2 (sqrt(1 + M2) - 1 - sqrt(k / m))^2)` with M2 from `1 - factor^2` on.

  A draw's own extreme eigenvalue adds up to `2 sqrt(k / m)` (the edge of the Wishart law). The
  published mean over permutations, of another draw, lies in the same range.
  """
  m = BIG // 4
  spread = math.sqrt(4 / m)
  low, high = (min(1.0, 2 * math.exp(-m / 2 * max(math.sqrt(1 + off) - 1 - spread, 0) ** 2))
               for off in (1 - factor ** 2 + 2 * spread, 1 - factor ** 2))
  z, _ = big
  found = min(1.0, 2 * math.exp(float(concentration(jnp.asarray(factor * z)[None], 4)[1][0])))
  assert low <= found <= high and low <= published <= high


@pytest.mark.parametrize("shift, published", [(0.003, 0.97), (0.005, 0.37), (0.01, 6e-4)])
def test_first_bound_of_shifted_noise(big, shift, published):
  """log p1 is `-(D (shift + g)^2 + X) / 2k`, g the draw's mean and X chi squared, 3 degrees.

  X is below 16.3 in 999 of 1000 draws, |g| below 2.6 / sqrt(D) in 99 of 100.
  """
  bound = lambda mean, chi: min(1.0, 2 * math.exp(-(BIG * mean ** 2 + chi) / 8))
  z, _ = big
  g = float(z.mean(dtype=np.float64))
  found = min(1.0, 2 * math.exp(float(concentration(jnp.asarray(z + shift)[None], 4)[0][0])))
  assert bound(shift + g, 16.3) <= found <= bound(shift + g, 0.0) * (1 + 1e-3)
  far = 2.6 / math.sqrt(BIG)
  assert bound(shift + far, 16.3) <= published <= bound(shift - far, 0.0)


@pytest.mark.parametrize("kind, log_p", [
    ("zeros", (1, 0)), ("ones", (0, 0)), ("doubled", (1, 0)), ("signs", (1, 1))])
def test_both_bounds_of_gross_violations(big, kind, log_p):
  """Which of p1, p2 is 1 (to the draw's own moments) and which is 0, in natural order."""
  z, _ = big
  found = concentration(jnp.asarray({
      "zeros": 0 * z, "ones": 0 * z + 1, "doubled": np.repeat(z[:BIG // 2], 2),
      "signs": np.sign(z)}[kind], jnp.float32)[None], 4)
  for value, alive in zip(found, log_p):
    assert float(value[0]) > -4 if alive else float(value[0]) < -1000


def test_gross_violations(big):
  z, look = big
  assert regularizer(look(0 * z)) == pytest.approx(3.5e4, rel=0.02)
  assert regularizer(look(0 * z + 1)) == pytest.approx(4.2e5, rel=0.02)
  doubled = regularizer(look(np.repeat(z[:BIG // 2], 2)))       # each pixel twice
  assert doubled == pytest.approx(1.8e4, rel=0.02)
  repeated = look(np.tile(z[:BIG // 51], 51))                   # one vector at every step
  assert 20 < regularizer(repeated) < 120 and repeated.p_min < 1e-6 < repeated.p


def test_blind_spots(big):
  """Signs pass, and so does a strong pattern in one of 51 vectors; looking at each finds it."""
  z, look = big
  assert regularizer(look(np.sign(z))) < 6
  vectors = z.reshape(51, 64, 64, 4).copy()
  wave = np.sin(2 * np.pi * np.arange(64) / 64)[:, None, None] * np.ones((64, 64, 4))
  vectors[0] += 60 * wave / np.linalg.norm(wave)
  assert regularizer(look(vectors.ravel())) < 6
  seen = spectrum_score(jnp.asarray(np.stack([z.reshape(vectors.shape)[:1], vectors[:1]])))
  assert seen[0] > -60 and seen[1] < -500


@pytest.mark.parametrize("vectors, size, limit, shrink, shift, drift, nats", [
    (51, 16384, 0.01395, 0.9930, 0.0026, 108, 5829), (1, 16384, 0.1018, 0.9478, 0.0184, 41, 834),
    (51, 65536, 0.00696, 0.9965, 0.0013, 153, 11638), (1, 65536, 0.0503, 0.9745, 0.0092, 57, 1647),
    (5, 16384, 0.0449, 0.9773, 0.0082, 61, 1839)])
def test_detection_limits(vectors, size, limit, shrink, shift, drift, nats):
  size *= vectors
  found = detection_limit(size, 4)
  assert found == pytest.approx(limit, rel=5e-3)
  assert math.sqrt(1 - found) == pytest.approx(shrink, abs=6e-5)
  assert math.sqrt(8 * LN2 / (size // 4) / 4) == pytest.approx(shift, abs=6e-5)
  assert 0.5 * found * size == pytest.approx(nats, rel=2e-3)
  assert math.sqrt(found * size) == pytest.approx(drift, abs=0.6)


def test_smaller_blocks_see_more():
  assert detection_limit(BIG, 2) == pytest.approx(0.0080, abs=5e-5)
  assert detection_limit(BIG, 2) < detection_limit(BIG, 4) < detection_limit(BIG, 16)


# Closed forms at small sizes.


def design(count, block):
  """`count` blocks with mean 0 and second moment I, exactly."""
  corners = np.asarray([[1 - 2 * (i >> j & 1) for j in range(block)] for i in range(2 ** block)])
  return np.tile(corners, (count // 2 ** block, 1)).astype(np.float32).ravel()


@pytest.mark.parametrize("scale", [0.5, 0.9, 1.0, 1.1, 2.0])
def test_second_moment_of_a_design(scale):
  count = 64
  log_p1, log_p2 = concentration(scale * jnp.asarray(design(count, 4))[None], 4)
  excess = max(math.sqrt(1 + abs(scale ** 2 - 1)) - 1 - math.sqrt(4 / count), 0)
  assert log_p1[0] == pytest.approx(0, abs=1e-6)
  assert log_p2[0] == pytest.approx(-count / 2 * excess ** 2, abs=1e-4)


@pytest.mark.parametrize("delta", [0.3, 1.0])
def test_constants(delta):
  """M1 = delta sqrt(k); M2 = |k delta^2 - 1| if k delta^2 >= 2, else 1. 7 of 263 are left out."""
  log_p1, log_p2 = concentration(jnp.full((1, 259), delta), 4)
  assert log_p1[0] == pytest.approx(-64 * delta ** 2 / 2, rel=1e-5)
  off = 4 * delta ** 2 - 1 if 4 * delta ** 2 >= 2 else 1
  assert log_p2[0] == pytest.approx(-32 * (math.sqrt(1 + off) - 1 - 0.25) ** 2, rel=1e-4)


def test_symmetries():
  z = np.random.default_rng(1).standard_normal((64, 4)) * 1.5 + 0.2
  turn = np.linalg.qr(np.random.default_rng(2).standard_normal((4, 4)))[0]
  value = lambda a: np.asarray(concentration(jnp.asarray(a, jnp.float32).reshape(1, -1), 4))[:, 0]
  for other in (-z, z[::-1], z @ turn):
    np.testing.assert_allclose(value(other), value(z), rtol=1e-4)


def test_gradient():
  """`-mean / k` and `-s d / sqrt(1 + M2) u u^T z`; exactly 0 inside the hinge, finite at 0."""
  z = np.random.default_rng(3).standard_normal((64, 4)) * [1.0, 1.0, 1.0, 2.0] + 0.5
  z = jnp.asarray(z, jnp.float32).reshape(1, -1)
  gradient = [np.asarray(jax.grad(lambda z: concentration(z, 4)[i][0])(z)).reshape(64, 4)
              for i in range(2)]
  blocks = np.asarray(z, np.float64).reshape(64, 4)
  np.testing.assert_allclose(gradient[0], np.tile(-blocks.mean(0) / 4, (64, 1)), rtol=1e-4)
  values, vectors = np.linalg.eigh(blocks.T @ blocks / 64 - np.eye(4))
  top = np.abs(values).argmax()
  u, off = vectors[:, top], abs(values[top])
  slope = (math.sqrt(1 + off) - 1 - 0.25) / math.sqrt(1 + off) * np.sign(values[top])
  np.testing.assert_allclose(gradient[1], -slope * np.outer(blocks @ u, u), rtol=1e-3, atol=1e-5)

  orders = jnp.asarray(np.stack([np.arange(256)[::-1]]))
  at = jax.jit(jax.grad(lambda z: prno(z, orders).score[0]))
  assert not np.any(at(jnp.asarray(design(64, 4))[None]))
  for bad in (jnp.zeros((1, 256)), jnp.ones((1, 256))):
    assert np.isfinite(at(bad)).all()


def test_ascent_restores_noise_up_to_the_hinge():
  """From 0.8 z the regulariser alone leads back to where it sees nothing, and stops there."""
  start = 0.8 * np.random.default_rng(4).standard_normal(4096).astype(np.float32)
  orders = jnp.asarray([np.random.default_rng(5).permutation(4096) for _ in range(2)])
  gradient = jax.jit(jax.grad(lambda z: prno(z[None], orders).score[0]))
  z = jnp.asarray(start)
  for _ in range(300):
    z = z + 0.2 * gradient(z)
  assert prno(z[None], orders).score[0] > -0.05
  limit = detection_limit(4096, 4)
  assert 1 - limit < float(jnp.square(z).mean()) < 1


def test_orders_are_permutations():
  orders = np.asarray(permutations(jax.random.key(0), 3, 50))
  assert (np.sort(orders) == np.arange(50)).all() and len({tuple(o) for o in orders}) == 3


def test_each_vector_on_its_own():
  z = np.random.default_rng(6).standard_normal((2, 3, 256)).astype(np.float32)
  z[1, 2] = 3.0
  orders = permutations(jax.random.key(0), 2, 256)
  together = prno_per_vector(jnp.asarray(z), orders)
  apart = np.asarray([prno(jnp.asarray(z[:, v]), orders).score for v in range(3)])
  np.testing.assert_allclose(together.score, apart.mean(0), rtol=1e-5)
  assert apart[2, 1] < -100 and together.p[1] < together.p[0]


def test_norm_score():
  """0 at `|z| = sqrt(d - 1)`, and the log-density of a chi variable elsewhere, but for its norm."""
  unit = np.ones(16) / 4
  at = lambda r: float(norm_score(jnp.asarray(r * unit, jnp.float32)[None, None])[0])
  assert at(math.sqrt(15)) == pytest.approx(0, abs=1e-4) and at(3.0) < 0 > at(5.0)
  assert at(3.0) - at(5.0) == pytest.approx(15 * math.log(3 / 5) - (9 - 25) / 2, abs=1e-4)
  assert np.isfinite(jax.grad(lambda z: norm_score(z)[0])(jnp.zeros((1, 1, 16)))).all()


def test_drift():
  z = jnp.ones((2, 3, 4))
  np.testing.assert_allclose(kl_from_start(z, 0 * z), [6.0, 6.0])


def test_spectrum_score():
  """About -1/2 a ring for noise (2000 draws, 4 standard errors), far below for blurred noise."""
  z = np.random.default_rng(7).standard_normal((2000, 1, 8, 8, 4)).astype(np.float32)
  score = np.asarray(spectrum_score(jnp.asarray(z)))
  rings = 7                                        # round(|f|) of an 8 x 8 grid: 0 .. 6
  # The lowest ring has 4 coefficients only: E = n (ln(n/2) - digamma(n/2)) / 2, 0.54 and not 0.5.
  error = float(score.std()) / 2000 ** 0.5
  assert score.mean() == pytest.approx(-0.5 * rings, abs=0.12 + 4 * error)
  blurred = (z + np.roll(z, 1, 2)) / 2 ** 0.5      # as long as before, but not white
  assert spectrum_score(jnp.asarray(blurred)).max() < score.min()


@pytest.mark.parametrize("options, last", [({"eta": 1.0}, 6), ({"eta": 0.0}, 1),
                                           ({"final": "clean"}, 5)])
def test_vectors_without_effect_are_left_out(options, last):
  from jaxalign.methods.shared.noise import live_vectors
  sampler = make_sampler(analytic.SD_SCHEDULE, 5, **options)
  np.testing.assert_array_equal(live_vectors(sampler, "all"), np.arange(last))
  np.testing.assert_array_equal(live_vectors(sampler, "first"), [0])
