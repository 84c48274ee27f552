"""Diff-Instruct* against closed forms: Gaussian generators, exact scores, quadrature."""
import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.methods import diff_instruct_star as di
from jaxalign.methods.optimizer import OptimConfig
from jaxalign.sampling import Guided, make_sampler
from jaxalign.testing import analytic
from tests import runs

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(60)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
Z, E = (jnp.asarray(a.reshape(-1, 1), jnp.float32) for a in np.meshgrid(NODES, NODES))
W = jnp.asarray(np.outer(WEIGHTS, WEIGHTS).reshape(-1), jnp.float32)


def gaussian_eps(mean, var, s):
  """Noise estimate of `x_t ~ N(mean, var)`: minus s times the score."""
  return lambda x: s * (x - mean) / var


def gradient(cfg, mu, S, *, m=0.0, tau=1.0, a=0.8, s=0.5, curvature=0.0):
  """Expected gradient in (mu, S) of the pseudo-loss, plus reward -curvature (x - 1)^2 / 2."""
  P, Q = a**2 * S**2 + s**2, a**2 * tau**2 + s**2
  own, ref = gaussian_eps(a * mu, P, s), gaussian_eps(a * m, Q, s)
  point = di.Point(E, *(jnp.full(len(E), value) for value in (a, s, 1.0)))

  def loss(params):
    x_0 = params[0] + params[1] * Z
    value, _ = di.pseudo_loss(cfg, x_0, point, own, lambda x: Guided(ref(x), None, ref(x)))
    return (W * (value + 0.5 * curvature * jnp.square(x_0[:, 0] - 1))).sum()
  return np.asarray(jax.grad(loss)(jnp.asarray([mu, S], jnp.float32)))


def config(**values):
  return di.Config(**{"space": "score", "guidance": 1.0, "reward": 0.0, **values})


@pytest.mark.parametrize(("values", "expected"), [
    (dict(divergence="kl"), (0.503371, -0.367873)),
    (dict(divergence="l2"), (2.095632, -3.063058)),
    (dict(divergence="l2", gradient="full"), (1.131170, -2.358210)),
    (dict(divergence="pseudo_huber", kappa=1.0), (0.688377, -0.880463)),
    (dict(divergence="pseudo_huber", kappa=1.0, gradient="full"), (0.371569, -0.677858)),
    (dict(divergence="pseudo_huber", kappa=10.0), (0.103900, -0.151280)),
])
def test_gradients_of_one_gaussian(values, expected):
  np.testing.assert_allclose(gradient(config(**values), 0.7, 0.6), expected, rtol=2e-3)


def test_detached_field_is_no_gradient_and_the_others_are():
  def curl(**values):
    field = lambda mu, S: gradient(config(**values), mu, S, a=1.0)
    h = 1e-2
    return ((field(0.7, 0.6 + h)[0] - field(0.7, 0.6 - h)[0])
            - (field(0.7 + h, 0.6)[1] - field(0.7 - h, 0.6)[1])) / (2 * h)
  np.testing.assert_allclose(curl(divergence="l2"), -3.61193, rtol=1e-2)
  assert abs(curl(divergence="l2", gradient="full")) < 2e-2
  assert abs(curl(divergence="kl")) < 2e-2


def fixed_point(field, start=(0.6, 0.8)):
  """Root of a gradient field, by Newton steps with differences."""
  x = np.asarray(start, np.float64)
  for _ in range(25):
    value = field(*x)
    jacobian = np.stack([(field(*(x + d)) - field(*(x - d))) / 2e-2
                         for d in (np.array([1e-2, 0]), np.array([0, 1e-2]))], 1)
    x = x - np.linalg.solve(jacobian, value)
  return x


@pytest.mark.parametrize(("values", "s2", "expected"), [
    (dict(divergence="kl"), 0.25, (0.5556, 0.5528)),
    (dict(divergence="l2", gradient="full"), 0.25, (0.4386, 0.8286)),
    (dict(divergence="l2"), 0.25, (0.3753, 0.8434)),
    (dict(divergence="l2", gradient="full"), 1.0, (0.6667, 0.3933)),
    (dict(divergence="l2"), 1.0, (0.5528, 0.4859)),
])
def test_optimum_with_a_reward_at_one_level(values, s2, expected):
  field = lambda mu, S: gradient(config(**values), mu, S, a=1.0, s=s2**0.5, curvature=1.0)
  np.testing.assert_allclose(fixed_point(field, expected + np.array([0.03, -0.02])), expected,
                             atol=2e-3)


def test_kl_collapses_at_high_noise_where_score_divergences_do_not():
  """At sigma 1 the reward's pull on the spread exceeds what a KL holds: its slope at S = 0."""
  slope = lambda **values: gradient(config(**values), 2 / 3, 0.05, a=1.0, s=1.0, curvature=1.0)[1]
  assert slope(divergence="kl") > 0
  assert slope(divergence="l2", gradient="full") < 0 and slope(divergence="l2") < 0


def test_over_all_levels_the_full_gradient_finds_the_tilted_law():
  """Weighted by half d(sigma^2), l2 is the KL of clean samples: optimum N(1/2, 1/2)."""
  levels = analytic.SD_SCHEDULE.alphas_cumprod
  points = {}
  for mode, expected in (("full", (0.5, 0.707107)), ("detached", (0.428526, 0.738500))):
    cfg = config(divergence="l2", gradient=mode, weight="half_dsigma2", t_min=0, t_max=999)
    weights = di.time_weights(cfg, levels) / 1000

    def field(mu, S, cfg=cfg, weights=weights):
      total = np.array([mu - 1, S])                  # of the reward -(x - 1)^2 / 2
      # Closed forms of 5.1 stand in for a thousand quadratures; their equality is tested above.
      a2, s2 = levels, 1 - levels
      P, Q = a2 * S**2 + s2, a2 + s2
      if cfg.gradient == "full":
        each = 2 * a2 * mu / Q**2, 2 * a2 * S * (1 / Q**2 - 1 / P**2)
      else:
        each = 2 * a2 * mu / (P * Q), 4 * a2 * S * (P - Q) / (P**2 * Q)
      return total + np.array([(weights * e).sum() for e in each])
    points[mode] = fixed_point(field)
    np.testing.assert_allclose(points[mode], expected, atol=0.012)
  assert abs(points["full"][1] - points["detached"][1]) > 0.02


def test_kl_guidance_inside_equals_outside_and_pseudo_huber_does_not():
  key = jax.random.key(0)
  x_0, noise, cond, uncond = (jax.random.normal(k, (5, 3)) for k in jax.random.split(key, 4))
  point = di.Point(noise, *(jnp.full(5, value) for value in (0.8, 0.6, 1.0)))
  scale = 4.0
  reference = lambda x: Guided(x * cond, x * uncond, x * (uncond + scale * (cond - uncond)))

  def slope(divergence, inside):
    cfg = config(divergence=divergence, guidance=scale, guidance_in=inside)
    return jax.grad(lambda x: di.pseudo_loss(cfg, x, point, lambda x: 0.3 * x, reference)[0].sum())(
        x_0)
  np.testing.assert_allclose(slope("kl", True), slope("kl", False), atol=1e-5)
  gap = slope("pseudo_huber", True) - slope("pseudo_huber", False)
  assert float(jnp.abs(gap).max()) > 0.1


def test_pseudo_huber_is_bounded_and_tends_to_l2():
  x_0 = jnp.asarray([[3.0, -2.0]])
  point = di.Point(jnp.asarray([[0.1, 0.4]]), jnp.ones(1), jnp.ones(1), jnp.ones(1))
  ref = lambda x: Guided(0.5 * x, None, 0.5 * x)
  loss = lambda cfg: di.pseudo_loss(cfg, x_0, point, lambda x: 2 * x, ref)[0]
  wide = loss(config(kappa=1e4))
  np.testing.assert_allclose(wide * 2 * 1e4 * 2**0.5, loss(config(divergence="l2")), rtol=1e-4)


# --- the method ---------------------------------------------------------------------------------


def one_step_models(mixture, reward, timestep=625):
  models = analytic.make_models(mixture, reward, policy=analytic.mlp(analytic.SD_SCHEDULE, 1),
                                flow=analytic.mlp(analytic.SD_SCHEDULE, 1))
  return dataclasses.replace(models, sampler=make_sampler(
      models.schedule, 1, kind="one_step", timestep=timestep))


def train(models, cfg, optim, steps, batch=256):
  method = di.make(models, cfg, optim)
  rows = analytic.make_batch(batch)
  state = jax.jit(lambda key: method.init(key, models.frozen, rows))(jax.random.key(0))

  @jax.jit
  def step(state, key):
    experience = method.collect(state, models.frozen, rows, jax.random.fold_in(key, 0))
    return method.update(state, models.frozen, experience, None, jax.random.fold_in(key, 1))
  metrics = None
  for i in range(steps):
    state, metrics = step(state, jax.random.key(i + 1))
  draws = method.collect(state, models.frozen, analytic.make_batch(4096), jax.random.key(10**6))
  return state, metrics, np.asarray(draws["final"])[:, 0]


MIXTURE = analytic.Mixture(np.ones(1), np.array([[0.8]]), np.array([0.25]))


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["pseudo_huber", "l2", "kl"])
def test_distils_a_gaussian_into_one_step(divergence):
  """The untrained generator is too narrow; distilled it has the teacher's mean and spread."""
  models = one_step_models(MIXTURE, analytic.linear_reward([1.0]))
  cfg = di.Config(divergence=divergence, guidance=1.0, reward=0.0, assistant_steps=3,
                  assistant_lr=3e-3, kappa=0.3)
  optim = OptimConfig(lr=2e-3, decay_steps=3000, ema=0.99)
  _, _, before = train(models, cfg, optim, 0)
  assert before.std() < 0.35
  _, metrics, after = train(models, cfg, optim, 3000)
  assert abs(after.mean() - 0.8) < 0.06 and abs(after.std() - 0.5) < 0.06
  assert float(metrics["train/cotangent_ratio"]) == 0


@pytest.mark.slow
def test_linear_reward_shifts_the_mean_by_what_the_closed_form_says():
  """l2, several levels: shift `alpha / E_t[2 w a^2 / Q^2]`, w = s^2 in eps space; spread kept."""
  cfg = di.Config(divergence="l2", guidance=1.0, ratio=False, assistant_steps=5, assistant_lr=3e-3)
  abar = analytic.SD_SCHEDULE.alphas_cumprod[cfg.t_min:cfg.t_max + 1]
  Q = abar * 0.25 + 1 - abar
  wanted = 0.3
  cfg = dataclasses.replace(cfg, reward=float(wanted * (2 * (1 - abar) * abar / Q**2).mean()))
  models = one_step_models(MIXTURE, analytic.linear_reward([1.0]))
  frozen = jax.tree.map(np.asarray, models.frozen)
  optim = OptimConfig(lr=1e-3, decay_steps=2000, ema=0.99)
  _, metrics, tuned = train(models, cfg, optim, 2000)
  assert abs(tuned.mean() - 0.8 - wanted) < 0.08 and abs(tuned.std() - 0.5) < 0.08
  assert float(metrics["train/alpha"]) == pytest.approx(cfg.reward)
  chex.assert_trees_all_equal(frozen, jax.tree.map(np.asarray, models.frozen))


def test_warmup_trains_the_assistant_only_and_k_counts_its_steps():
  models = one_step_models(MIXTURE, analytic.linear_reward([1.0]))
  method = di.make(models, di.Config(warmup=1, assistant_steps=2, guidance=1.0), OptimConfig())
  rows = analytic.make_batch(8)
  state = method.init(jax.random.key(0), models.frozen, rows)
  experience = method.collect(state, models.frozen, rows, jax.random.key(1))
  first, _ = method.update(state, models.frozen, experience, None, jax.random.key(2))
  chex.assert_trees_all_equal(first["policy"], state["policy"])
  assert float(jnp.abs(first["assistant"]["w3"]).max()) > 0
  counts = [leaf for leaf in jax.tree.leaves(first["assistant_optimizer"])
            if leaf.dtype == jnp.int32]
  assert counts and all(int(count) == 2 for count in counts)
  second, _ = method.update(first, models.frozen, experience, None, jax.random.key(3))
  assert float(jnp.abs(second["policy"]["w3"]).max()) > 0


def test_one_step_sampler_is_the_clean_estimate():
  sampler = make_sampler(analytic.SD_SCHEDULE, 1, kind="one_step", timestep=399)
  abar = analytic.SD_SCHEDULE.alphas_cumprod[399]
  z, eps = jnp.full((2, 3), 0.5), jnp.full((2, 3), -0.2)
  np.testing.assert_allclose(
      sampler.mean(0, z, eps), (0.5 + 0.2 * np.sqrt(1 - abar)) / np.sqrt(abar) * np.ones((2, 3)),
      rtol=1e-6)
  assert sampler.std[0] == 0 and sampler.steps == 1
  with pytest.raises(UserError, match="sample.timestep"):
    make_sampler(analytic.SD_SCHEDULE, 1, kind="one_step")


def test_mistakes_name_their_key():
  models = analytic.make_models(MIXTURE, analytic.linear_reward([1.0]))
  with pytest.raises(UserError, match="one_step"):
    di.make(models, di.Config(), OptimConfig())
  models = one_step_models(MIXTURE, (None, None))
  with pytest.raises(UserError, match="black-box"):
    di.make(models, di.Config(), OptimConfig())
  with pytest.raises(UserError, match="t_max"):
    di.make(models, di.Config(reward=0.0, t_max=1000), OptimConfig())
  with pytest.raises(UserError, match="kappa"):
    di.Config(kappa=0.0)
  with pytest.raises(UserError, match="t_min"):
    di.Config(t_min=900, t_max=100)
  for key, value in (("sample__steps", 2), ("sample__guidance", 3.0)):
    with pytest.raises(UserError, match="one_step"):
      runs.smoke("diff_instruct_star", **{key: value})


# --- through the loop ---------------------------------------------------------------------------


def test_smoke_run_writes_a_generator_that_samples_in_one_step(tmp_path):
  from jaxalign import sample
  from jaxalign.convert import load_pipeline
  from jaxalign.train import run
  from jaxalign.train.experiment import own_sampler
  cfg = runs.smoke("diff_instruct_star", train__checkpoint_every=2)
  summary = run(cfg, tmp_path / "run")
  assert summary["steps"] == 3 and summary["cost"]["reward_gradients"] == 3 * cfg.sample.batch
  pipeline = load_pipeline(tmp_path / "run" / "export")
  assert pipeline.scheduler_config["one_step_timestep"] == 625
  own = own_sampler(pipeline)
  assert (own.kind, own.steps, own.guidance) == ("one_step", 1, 1.0)
  images = sample.generate(pipeline, ["a cat on a red background"], 2, sample=own)
  assert images.shape == (1, 2, 32, 32, 3)


def test_a_generator_is_not_its_own_teacher():
  """One that says so itself, or weights in place of the UNet's; a multi-step model may be."""
  from jaxalign.train.experiment import build

  def method(name="diff_instruct_star", **overrides):
    cfg = runs.smoke(name, **overrides)
    exp = build(cfg, jax.devices()[:1])
    return di.make(exp.models, cfg.method, cfg.optim)
  one = dict(model__path="jaxalign:emoji_onestep", sample__timestep=0)
  with pytest.raises(UserError, match="model.teacher is empty"):
    method(**one)
  unet = str(runs.ROOT / "jaxalign" / "assets" / "emoji_onestep" / "unet")
  with pytest.raises(UserError, match="model.teacher is empty"):
    method(model__path="jaxalign:emoji", model__unet=unet)
  method(**one, model__teacher="jaxalign:emoji")
  method("distill_emoji_onestep")


@pytest.mark.slow
def test_other_recipes_run(tmp_path):
  from jaxalign.train import run
  assert run(runs.smoke("diff_instruct_pp"), tmp_path / "pp")["steps"] == 3
  summary = run(runs.smoke("distill_emoji_onestep"), tmp_path / "distil")
  assert summary["steps"] == 3 and summary["cost"]["reward_gradients"] == 0
  with pytest.raises(UserError, match="model.teacher"):
    run(runs.smoke("diff_instruct_star", model__teacher="jaxalign:emoji"), tmp_path / "teacher")
