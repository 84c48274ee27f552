"""FK steering against closed forms of the chain, through the method's own updates."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import methods
from jaxalign.config.schema import OptimConfig
from jaxalign.errors import UserError
from jaxalign.methods import fk_steering as fk
from jaxalign.methods.shared.noise import draw, generate
from jaxalign.testing import analytic

KEY = jax.random.key(2)
GAUSSIAN = analytic.Mixture(np.ones(1), np.asarray([[0.7]]), np.asarray([0.5]))
REWARDS = {"L": analytic.linear_reward([1.0]), "Q": analytic.quadratic_reward([2.0])}
TARGET = {"L": (1.805630, .369599, 3.753695), "Q": (1.382033, .175265, -1.581030)}
slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)      # more of the same
EVERY = dict(points=20, first=0.0, last=0.95)


def world(reward="L", steps=20):
  return analytic.make_models(GAUSSIAN, REWARDS[reward], steps=steps)


@functools.cache
def finished(reward, size=3000, **options):
  """Final particles `[B, K]`, weights, log Z, and the product's image `[B]`, of whole runs."""
  models, cfg = world(reward), fk.Config(**{"beta": 3.0, "beta_unit": "raw", **options})
  method, batch = fk.make(models, cfg, OptimConfig()), analytic.make_batch(size)

  def step(state, key):
    experience = dict(method.collect(state, models.frozen, batch, key))
    images = experience.pop("images")
    rewards = models.score(models.frozen["reward"], images, {})
    return method.update(state, models.frozen, experience, rewards, key)[0], None

  @jax.jit
  def run():
    state = method.init(KEY, models.frozen, batch)
    keys = jax.random.split(jax.random.key(5), cfg.points + 1)
    state, _ = jax.lax.scan(step, state, keys)
    image = generate(models, models.frozen, method.product(state), batch["conditioning"])
    return state, image
  state, image = run()
  f64 = lambda a: np.asarray(a, np.float64)
  weights = f64(jax.nn.softmax(state["log_w"], 1))
  return f64(state["x"])[..., 0], weights, f64(state["log_z"]), f64(image)[:, 0], state


def options_of(points, k, **more):
  return dict(particles=k, **{"end": dict(points=1, first=0.0, last=0.0, potential="diff", ess=0.0),
                              "every": EVERY, "four": dict(points=5, first=0.0, last=0.8)}[points],
              **more)


@pytest.mark.parametrize("reward, points, k, bias", [
    slow("L", "end", 4, -.608), slow("L", "every", 4, -.328), slow("L", "every", 16, -.088),
    slow("L", "four", 4, -.421), slow("L", "four", 16, -.141), slow("Q", "end", 4, -.198),
    slow("Q", "every", 4, -.035), ("Q", "four", 4, -.086), slow("Q", "four", 16, -.0129)])
def test_bias_of_the_weighted_mean(reward, points, k, bias):
  """Against simulated values whose own errors are at most 0.002."""
  x, weights, _, _, _ = finished(reward, **options_of(points, k))
  means = (weights * x).sum(1)
  error = means.std() / np.sqrt(len(means))
  assert abs(means.mean() - TARGET[reward][0] - bias) < 4 * error + 0.003 and error < 0.012


@pytest.mark.slow
@pytest.mark.parametrize("reward, potential", [
    ("L", "diff"), ("Q", "max"), ("L", "max"), ("Q", "diff"), ("L", "plain")])
def test_the_normaliser_is_unbiased(reward, potential):
  """E[Z^] = Z exactly, whatever the potential, resampling by effective size included."""
  more = dict(potential=potential, ess=0.5 if potential == "diff" else 2.0)
  _, _, log_z, _, _ = finished(reward, size=8_000, **options_of("four", 16, **more))
  ratio = np.exp(log_z - TARGET[reward][2])
  error = ratio.std() / np.sqrt(len(ratio))
  assert abs(ratio.mean() - 1) < 4.5 * error and error < 0.06


@pytest.mark.parametrize("reward, variance", [slow("L", .363), slow("Q", .181)])
def test_a_drawn_particle_has_the_tilts_law(reward, variance):
  """K = 16, every step: its image is made by the plain sampler from the noise that is the product.
  """
  x, _, _, image, state = finished(reward, **options_of("every", 16))
  assert image.var() == pytest.approx(variance, rel=0.1)
  np.testing.assert_allclose(np.abs(x - image[:, None]).min(1), 0, atol=2e-5)
  models = world(reward)
  reward_of = models.score(models.frozen["reward"], jnp.asarray(image, jnp.float32)[:, None], {})
  np.testing.assert_allclose(reward_of, state["best_reward"], atol=1e-4)


@pytest.mark.slow
def test_the_best_particle_is_not_the_tilt():
  """L, K = 4: mean 1.79, where the weighted mean is 1.48."""
  _, _, _, image, _ = finished("L", **options_of("every", 4, output="argmax_reward"))
  assert image.mean() == pytest.approx(1.79, abs=0.03)


def test_one_particle_is_the_base():
  models, batch = world(), analytic.make_batch(50)
  base = generate(models, models.frozen, draw(models, KEY, batch["sample_ids"]),
                  batch["conditioning"])
  _, _, _, image, _ = finished("L", size=50, particles=1)
  np.testing.assert_array_equal(image, np.asarray(base, np.float64)[:, 0])


def test_without_strength_lineages_stay():
  _, weights, log_z, _, state = finished("L", size=50, **options_of("every", 4, beta=0.0))
  np.testing.assert_allclose(weights, 0.25, rtol=1e-6)
  np.testing.assert_allclose(log_z, 0, atol=1e-5)
  models = world()
  first = fk.make(models, fk.Config(particles=4), OptimConfig()).init(
      KEY, models.frozen, analytic.make_batch(50))
  np.testing.assert_array_equal(state["noise"], first["noise"])


def test_systematic_resampling():
  """Each count is floor or ceil of K W, and K W on average; certain and equal weights as they are.
  """
  weights = np.asarray([0.5, 0.0, 0.15, 0.35])
  log_w = jnp.log(jnp.asarray(weights, jnp.float32))
  u = (jnp.arange(1000) + 0.5) / 1000
  index = np.asarray(fk.systematic(jnp.broadcast_to(log_w[None], (1000, 4)), u))
  copies = (index[..., None] == np.arange(4)).sum(1)
  assert np.all((copies == np.floor(4 * weights)) | (copies == np.ceil(4 * weights)))
  np.testing.assert_allclose(copies.mean(0), 4 * weights, atol=2e-3)
  equal = fk.systematic(jnp.zeros((7, 4)), jnp.linspace(0, 0.99, 7))
  np.testing.assert_array_equal(equal, np.broadcast_to(np.arange(4), (7, 4)))
  certain = fk.systematic(jnp.asarray([[-jnp.inf, 3.0, -jnp.inf]]), jnp.asarray([0.7]))
  np.testing.assert_array_equal(certain, [[1, 1, 1]])


def test_rewards_that_are_not_numbers():
  """Such particles die; a group of nothing else goes on as it was."""
  models, cfg = world(), fk.Config(particles=3, beta=3.0, beta_unit="raw", points=1)
  method, batch = fk.make(models, cfg, OptimConfig()), analytic.make_batch(2)
  state = method.init(KEY, models.frozen, batch)
  experience = dict(method.collect(state, models.frozen, batch, KEY))
  experience.pop("images")
  rewards = jnp.asarray([jnp.nan, 0.1, -jnp.inf, jnp.nan, jnp.nan, -jnp.inf])
  new, metrics = method.update(state, models.frozen, experience, rewards, KEY)
  np.testing.assert_array_equal(new["x"][0], np.broadcast_to(experience["x"][0, 1], (3, 1)))
  np.testing.assert_array_equal(new["x"][1], experience["x"][1])
  assert np.isfinite(metrics["train/log_z"]).all() and np.all(new["log_w"] == 0)


def test_refused():
  with pytest.raises(UserError, match=r"method\.first=0\.9 is above method\.last=0\.5"):
    fk.Config(first=0.9, last=0.5)
  with pytest.raises(UserError, match=r"method\.points=9 do not fit"):
    fk.make(world(steps=5), fk.Config(points=9), OptimConfig())
  models = analytic.make_models(GAUSSIAN, REWARDS["L"], steps=5, eta=0.0)
  with pytest.raises(UserError, match="'fk_steering' needs noise at every step"):
    methods.make("fk_steering", models, fk.Config(), OptimConfig())
  assert dataclasses.replace(fk.Config(), points=3).interval_stages == 4
