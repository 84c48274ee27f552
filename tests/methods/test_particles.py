"""FK steering, DAS and SVDD against closed forms of the chain, through the methods' own updates."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import methods
from jaxalign.config.schema import OptimConfig
from jaxalign.errors import UserError
from jaxalign.methods import das, svdd
from jaxalign.methods import fk_steering as fk
from jaxalign.methods.shared import particles
from jaxalign.methods.shared.noise import draw, generate
from jaxalign.testing import analytic

KEY = jax.random.key(2)
GAUSSIAN = analytic.Mixture(np.ones(1), np.asarray([[0.7]]), np.asarray([0.5]))
REWARDS = {"L": analytic.linear_reward([1.0]), "Q": analytic.quadratic_reward([2.0])}
CHAINS = {"vp": {}, "flow": dict(schedule=analytic.FLOW_SCHEDULE, final="noisy")}
# Mean and variance of the tilt of the chain's own law; log Z.
TARGET = {("L", "vp"): (1.805630, .369599, 3.753695), ("Q", "vp"): (1.382033, .175265, -1.581030),
          ("L", "flow"): (1.861871, .387524), ("Q", "flow"): (1.398540, .179196)}
slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)      # more of the same
EVERY = dict(points=20, first=0.0, last=0.95)


def world(reward="L", steps=20, path="vp"):
  return analytic.make_models(GAUSSIAN, REWARDS[reward], steps=steps, **CHAINS[path])


@functools.cache
def finished(reward, size=3000, module=fk, path="vp", **options):
  """Final particles `[B, K]`, weights, log Z, the product's image `[B]`, the state; whole runs."""
  models, batch = world(reward, path=path), analytic.make_batch(size)
  cfg = module.Config(**{"beta": 3.0, "beta_unit": "raw", **options})
  method = module.make(models, cfg, OptimConfig())

  def step(state, key):
    experience = dict(method.collect(state, models.frozen, batch, key))
    rewards = None
    if "images" in experience:
      rewards = models.score(models.frozen["reward"], experience.pop("images"), {})
    return method.update(state, models.frozen, experience, rewards, key)[0], None

  @jax.jit
  def run():
    state = method.init(KEY, models.frozen, batch)
    updates = cfg.points + 1 if module is fk else models.sampler.steps + 1
    state, _ = jax.lax.scan(step, state, jax.random.split(jax.random.key(5), updates))
    image = generate(models, models.frozen, method.product(state), batch["conditioning"])
    return state, image
  state, image = run()
  f64 = lambda a: np.asarray(a, np.float64)
  x = f64(state["x"])[..., 0]
  weights = f64(jax.nn.softmax(state.get("log_w", jnp.zeros(x.shape)), 1))
  return x, weights, f64(state.get("log_z", jnp.zeros(size))), f64(image)[:, 0], state


def options_of(points, k, **more):
  return dict(particles=k, **{"end": dict(points=1, first=0.0, last=0.0, potential="diff", ess=0.0),
                              "every": EVERY, "four": dict(points=5, first=0.0, last=0.8)}[points],
              **more)


def assert_bias(reward, path, bias, x, weights):
  """Of the weighted mean, against a simulated value whose own error is at most 0.002."""
  means = (weights * x).sum(1)
  error = means.std() / np.sqrt(len(means))
  assert abs(means.mean() - TARGET[reward, path][0] - bias) < 4 * error + 0.003 and error < 0.012


@pytest.mark.parametrize("reward, points, k, bias", [
    slow("L", "end", 4, -.608), slow("L", "every", 4, -.328), slow("L", "every", 16, -.088),
    slow("L", "four", 4, -.421), slow("L", "four", 16, -.141), slow("Q", "end", 4, -.198),
    slow("Q", "every", 4, -.035), ("Q", "four", 4, -.086), slow("Q", "four", 16, -.0129)])
def test_bias_of_the_weighted_mean(reward, points, k, bias):
  assert_bias(reward, "vp", bias, *finished(reward, **options_of(points, k))[:2])


@pytest.mark.slow
@pytest.mark.parametrize("reward, points, k, bias", [
    ("L", "end", 4, -.643), ("L", "every", 4, -.343), ("L", "every", 16, -.094),
    ("L", "four", 4, -.455), ("Q", "every", 4, -.034), ("Q", "four", 4, -.087)])
def test_bias_on_a_flow(reward, points, k, bias):
  assert_bias(reward, "flow", bias, *finished(reward, path="flow", **options_of(points, k))[:2])


@pytest.mark.slow
@pytest.mark.parametrize("reward, potential", [
    ("L", "diff"), ("Q", "max"), ("L", "max"), ("Q", "diff"), ("L", "plain")])
def test_the_normaliser_is_unbiased(reward, potential):
  """E[Z^] = Z exactly, whatever the potential, resampling by effective size included."""
  more = dict(potential=potential, ess=0.5 if potential == "diff" else 2.0)
  _, _, log_z, _, _ = finished(reward, size=8_000, **options_of("four", 16, **more))
  ratio = np.exp(log_z - TARGET[reward, "vp"][2])
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


def same_up_to_rounding(image, base):
  """Two programs that draw the same samples: XLA may order the sums of each in its own way."""
  np.testing.assert_allclose(image, np.asarray(base, np.float64)[:, 0], rtol=1e-6, atol=1e-6)


def test_one_particle_is_the_base():
  models, batch = world(), analytic.make_batch(50)
  base = generate(models, models.frozen, draw(models, KEY, batch["sample_ids"]),
                  batch["conditioning"])
  _, _, _, image, _ = finished("L", size=50, particles=1)
  same_up_to_rounding(image, base)


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
  index = np.asarray(particles.systematic(jnp.broadcast_to(log_w[None], (1000, 4)), u))
  copies = (index[..., None] == np.arange(4)).sum(1)
  assert np.all((copies == np.floor(4 * weights)) | (copies == np.ceil(4 * weights)))
  np.testing.assert_allclose(copies.mean(0), 4 * weights, atol=2e-3)
  equal = particles.systematic(jnp.zeros((7, 4)), jnp.linspace(0, 0.99, 7))
  np.testing.assert_array_equal(equal, np.broadcast_to(np.arange(4), (7, 4)))
  certain = particles.systematic(jnp.asarray([[-jnp.inf, 3.0, -jnp.inf]]), jnp.asarray([0.7]))
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
  experience = dict(method.collect(new, models.frozen, batch, KEY))
  experience.pop("images")
  _, metrics = method.update(new, models.frozen, experience, jnp.arange(6.0), KEY)
  assert all(np.isfinite(value).all() for value in metrics.values())


def test_refused():
  with pytest.raises(UserError, match=r"method\.first=0\.9 is above method\.last=0\.5"):
    fk.Config(first=0.9, last=0.5)
  with pytest.raises(UserError, match=r"method\.points=9 do not fit"):
    fk.make(world(steps=5), fk.Config(points=9), OptimConfig())
  models = analytic.make_models(GAUSSIAN, REWARDS["L"], steps=5, eta=0.0)
  with pytest.raises(UserError, match="'fk_steering' needs noise at every step"):
    methods.make("fk_steering", models, fk.Config(), OptimConfig())
  assert dataclasses.replace(fk.Config(), points=3).interval_stages == 4


# ---- DAS -----------------------------------------------------------------------------------------


def guided(reward, path="vp", k=4, size=3000, **options):
  return finished(reward, size, das, path, particles=k, **{"temper": "none", **options})


EXP = dict(temper="exp", gamma=0.04)


@pytest.mark.parametrize("reward, path, k, options, bias", [
    ("L", "vp", 4, {}, -.038), slow("L", "vp", 16, {}, -.0090), slow("Q", "vp", 4, {}, .048),
    slow("Q", "vp", 16, {}, .0149), slow("L", "vp", 4, EXP, -.171), slow("L", "vp", 16, EXP, -.053),
    slow("Q", "vp", 4, EXP, -.0125), slow("L", "flow", 4, {}, -.040),
    slow("L", "flow", 16, {}, -.012), ("Q", "flow", 4, {}, .049), slow("Q", "flow", 16, {}, .014)])
def test_bias_of_guided_particles(reward, path, k, options, bias):
  assert_bias(reward, path, bias, *guided(reward, path, k, **options)[:2])


@pytest.mark.parametrize("reward, k, options", [
    ("L", 4, {}), slow("Q", 4, {}), slow("Q", 4, EXP), slow("L", 4, {"guide_cap": 0.3}),
    slow("Q", 16, {"guide_cap": 0.1, "ess": 2.0})])
def test_the_normaliser_of_guided_particles_is_unbiased(reward, k, options):
  """Whatever gradient and tempering are: the strongest test of their weights."""
  size = 3000 if not options and reward == "L" else 20_000
  log_z = guided(reward, k=k, size=size, **options)[2]
  ratio = np.exp(log_z - TARGET[reward, "vp"][2])
  error = ratio.std() / np.sqrt(len(ratio))
  assert abs(ratio.mean() - 1) < 4.5 * error and error < 0.06


def test_the_result_of_guided_particles_is_replayed():
  """The plain sampler makes the image that was scored, of the noise that holds the gradients."""
  x, _, _, image, state = guided("L")
  np.testing.assert_allclose(np.abs(x - image[:, None]).min(1), 0, atol=5e-5)
  np.testing.assert_allclose(image, state["best_reward"], atol=5e-5)
  assert image.mean() == pytest.approx(TARGET["L", "vp"][0] - .038, abs=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["L", "Q"])
def test_adaptive_tempering_tends_to_the_tilt(reward):
  x, weights, *_ = guided(reward, k=64, size=1000, temper="adaptive")
  assert (weights * x).sum(1).mean() == pytest.approx(TARGET[reward, "vp"][0], abs=0.03)


def test_tempering():
  lam = das.tempering(das.Config(), 20)
  assert lam[0] == 0 and np.all(np.diff(lam) > 0) and lam[-2] == pytest.approx(1)
  assert das.tempering(das.Config(gamma=0.0372), 20)[-2] == pytest.approx(1, abs=2e-3)
  log_w, gain = jnp.zeros((3, 4)), jnp.asarray([[0.0, 3, 6, 9], [0, 20, 21, 1], [1, 1, 1, 1]])
  found = das.furthest(log_w, gain, jnp.asarray([0.0, 0.01, 0.0]), 0.5)
  share = np.asarray(particles.effective_share(found[:, None] * gain))
  np.testing.assert_allclose(share, [0.5, 0.5, 1.0], atol=1e-3)
  assert np.all(share[:2] < 0.5) and found[1] < found[0] < found[2] == 1


def test_guided_particles_that_die():
  """Only those whose reward is a number count, and where none is they go on."""
  models, batch = world(), analytic.make_batch(2)
  score = lambda p, x, _: jnp.where(jnp.arange(6) == 1, x[:, 0], jnp.nan)
  models = dataclasses.replace(models, score=score)
  method = das.make(models, das.Config(particles=3, ess=2.0), OptimConfig())
  state = method.init(KEY, models.frozen, batch)
  for _ in range(2):
    state, metrics = method.update(state, models.frozen, {"batch": batch}, None, KEY)
  np.testing.assert_array_equal(state["noise"][0, :, 0], jnp.broadcast_to(
      state["noise"][0, 1, 0], (3, 1)))
  assert np.isfinite(state["x"]).all() and np.isfinite(metrics["train/log_z"]).all()


# ---- SVDD ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward, select, m, mean, variance", [
    ("Q", "softmax", 4, 1.392, .189), slow("Q", "softmax", 16, 1.516, .162),
    slow("Q", "softmax", 64, 1.538, .156), slow("L", "argmax", 4, 3.19, .18),
    slow("L", "argmax", 16, 4.97, .11)])
def test_svdd_ends_elsewhere(reward, select, m, mean, variance):
  """Softmax on clean estimates tends to another law than the tilt, argmax out of the model."""
  *_, image, state = finished(reward, 4000, svdd, candidates=m, select=select)
  assert image.mean() == pytest.approx(mean, abs=4 * np.sqrt(variance / 4000) + 0.006)
  assert image.var() == pytest.approx(variance, rel=0.1)
  models = world(reward)
  again = models.score(models.frozen["reward"], jnp.asarray(image, jnp.float32)[:, None], {})
  np.testing.assert_allclose(again, state["best_reward"], atol=1e-4)


def test_one_candidate_is_the_base():
  models, batch = world(), analytic.make_batch(50)
  base = generate(models, models.frozen, draw(models, KEY, batch["sample_ids"]),
                  batch["conditioning"])
  *_, image, _ = finished("L", 50, svdd, candidates=1)
  same_up_to_rounding(image, base)


@pytest.mark.slow
def test_the_last_step_may_be_plain():
  """Then the result is the first of the last candidates, whatever the others are worth."""
  run = lambda last: finished("L", 200, svdd, candidates=4, select="argmax", last_step=last)[3]
  plain, best = run(False), run(True)
  assert np.all(best >= plain - 1e-6) and 0.5 < (best > plain + 1e-6).mean() < 0.9
