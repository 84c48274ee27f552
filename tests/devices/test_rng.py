"""Random streams: distinct names, stable values, noise that belongs to a sample."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.devices import rng

GOLDEN_STREAM = [4175052666, 3236562588]
GOLDEN_SAMPLES = [[1725592898, 2541593772], [1764126341, 611865144], [853725271, 2527406063]]
GOLDEN_NORMAL = [[-0.4575647, -3.0172935], [0.3252682, -0.9077389], [-0.0534469, -1.8037192]]


def test_stream_names_do_not_collide():
  assert len(set(rng.STREAMS)) == len(rng.STREAMS)
  assert len({zlib.crc32(name.encode()) for name in rng.STREAMS}) == len(rng.STREAMS)


def test_every_name_constant_is_listed():
  names = {v for k, v in vars(rng).items() if k.isupper() and isinstance(v, str)}
  assert names == set(rng.STREAMS)


def test_streams_differ_by_name_step_and_root():
  keys = [
    rng.stream(jax.random.key(seed), name, step)
    for seed in (0, 1)
    for name in rng.STREAMS
    for step in (0, 1, 2)
  ]
  data = {tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in keys}
  assert len(data) == len(keys)


def test_stream_is_the_same_with_a_traced_step():
  root = jax.random.key(3)
  traced = jax.jit(lambda i: jax.random.key_data(rng.stream(root, rng.UPDATE, i)))(7)
  np.testing.assert_array_equal(traced, jax.random.key_data(rng.stream(root, rng.UPDATE, 7)))


def test_golden_values():
  """A change of these numbers breaks resuming a run and comparing it with an older one."""
  key = rng.stream(jax.random.key(0), rng.ROLLOUT, 5)
  np.testing.assert_array_equal(jax.random.key_data(key), GOLDEN_STREAM)
  keys = rng.per_sample(key, jnp.asarray([0, 1, 1000]))
  np.testing.assert_array_equal(jax.random.key_data(keys), GOLDEN_SAMPLES)
  np.testing.assert_allclose(rng.normal_per_sample(keys, (2,), 3), GOLDEN_NORMAL, rtol=0, atol=1e-6)


def test_noise_of_a_sample_is_its_own():
  key = jax.random.key(1)
  draw = lambda ids, k=0: np.asarray(
    rng.normal_per_sample(rng.per_sample(key, jnp.asarray(ids)), (3, 2), k)
  )
  whole = draw([0, 1, 2, 3, 4])
  np.testing.assert_array_equal(draw([4, 2]), whole[[4, 2]])
  assert not np.any(whole[0] == whole[1])
  assert not np.any(whole == draw([0, 1, 2, 3, 4], 1))


def test_noise_is_standard_normal():
  """4096 x 4 draws: mean within 4 standard errors of 0, variance of 1, rows uncorrelated."""
  keys = rng.per_sample(jax.random.key(2), jnp.arange(4096))
  x = np.asarray(rng.normal_per_sample(keys, (4,)), np.float64)
  assert abs(x.mean()) < 4 / np.sqrt(x.size)
  assert abs(x.var() - 1) < 4 * np.sqrt(2 / x.size)
  assert abs((x[1:] * x[:-1]).mean()) < 4 / np.sqrt(x.size)
