"""Frechet distance and path KL against closed forms."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from jaxalign.metrics import frechet_distance, frechet_with_floor, gaussian_path_kl


def _whitened(n, d, seed=0):
  """`[N,D]` whose sample mean and ddof-1 covariance are exactly 0 and I."""
  x = np.random.default_rng(seed).standard_normal((n, d))
  x = x - x.mean(0)
  return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T


def test_known_gaussians():
  x = _whitened(50, 3)
  scale, shift = np.array([1.0, 2.0, 0.5]), np.array([3.0, 0.0, -4.0])
  # Commuting covariances: |shift|^2 + sum (s - 1)^2.
  assert frechet_distance(x, x * scale + shift) == pytest.approx(25 + 1 + 0.25)
  assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)
  assert frechet_distance(x[:, :1], 3 * x[:, :1]) == pytest.approx(4)


def test_general_covariances_against_sqrtm():
  rng = np.random.default_rng(1)
  a = rng.standard_normal((200, 6)) @ rng.standard_normal((6, 6))
  b = rng.standard_normal((150, 6)) @ rng.standard_normal((6, 6)) + 1
  ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
  expected = (((a.mean(0) - b.mean(0)) ** 2).sum()
              + np.trace(ca + cb - 2 * np.real(scipy.linalg.sqrtm(ca @ cb))))
  assert frechet_distance(a, b) == pytest.approx(expected)
  assert frechet_distance(b, a) == pytest.approx(expected)
  rotation = np.linalg.qr(rng.standard_normal((6, 6)))[0]
  assert frechet_distance(a @ rotation + 7, b @ rotation + 7) == pytest.approx(expected)


def test_singular_covariance_stays_accurate():
  """Fewer samples than features: equal sets are at distance 0, orthogonal lines at tr A + tr B."""
  x = np.random.default_rng(2).standard_normal((10, 64))
  assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
  line = _whitened(20, 2)[:, :1]
  a, b = line * np.array([[1.0, 0.0]]), line * np.array([[0.0, 2.0]])
  assert frechet_distance(a, b) == pytest.approx(5)


def test_distance_with_floor():
  rng = np.random.default_rng(3)
  base_a, base_b = rng.standard_normal((2, 400, 8))
  still = frechet_with_floor(base_a, base_a, base_b)
  assert still["distance"] == still["floor"] > 0 and still["n"] == 400
  moved = frechet_with_floor(base_a + 1, base_a, base_b)
  assert moved["distance"] == pytest.approx(8, rel=0.2) and moved["floor"] == still["floor"]


def test_path_kl_is_the_sum_of_gaussian_kls():
  """KL(N(mu, s^2 I) || N(mu', s^2 I)) by Monte Carlo over the densities themselves."""
  rng = np.random.default_rng(4)
  sigma, lam = np.array([0.7, 0.2]), np.array([1.5, 3.0])
  delta = rng.standard_normal((2, 1, 3))  # [T,B,D]
  expected = 0
  for s, l, d in zip(sigma, lam, delta[:, 0]):
    move = -s ** 2 * l * d  # mu_tuned - mu_base
    x = move + s * rng.standard_normal((20_000, 3))
    log = lambda m: scipy.stats.norm.logpdf(x, m, s).sum(1)
    expected += (log(move) - log(np.zeros(3))).mean()
  got = gaussian_path_kl((delta ** 2).sum(-1), sigma, lam)
  assert got.shape == (1,) and got[0] == pytest.approx(expected, rel=0.05)


def test_path_kl_in_jax():
  args = jnp.ones((4, 3)), jnp.full(4, 0.5), jnp.full(4, 2.0)
  eager = gaussian_path_kl(*args)
  assert isinstance(eager, jax.Array)
  np.testing.assert_allclose(eager, 2.0)
  np.testing.assert_allclose(jax.jit(gaussian_path_kl)(*args), eager)
  np.testing.assert_allclose(gaussian_path_kl(0 * args[0], *args[1:]), 0)


@pytest.mark.parametrize("call", [
  lambda: frechet_distance(np.zeros((4, 2)), np.zeros((4, 3))),
  lambda: frechet_distance(np.zeros((1, 2)), np.zeros((4, 2))),
  lambda: frechet_distance(np.zeros((4, 65)), np.zeros((4, 65))),
  lambda: frechet_distance(np.full((4, 2), np.nan), np.zeros((4, 2))),
  lambda: frechet_with_floor(np.zeros((4, 2)), np.zeros((5, 2)), np.zeros((4, 2))),
  lambda: gaussian_path_kl(np.ones((4, 3)), np.ones(3), np.ones(4)),
  lambda: gaussian_path_kl(np.ones(4), np.ones(4), np.ones(4)),
])
def test_bad_shapes_and_values_raise(call):
  with pytest.raises(ValueError):
    call()
