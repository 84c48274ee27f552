"""Diff-Instruct* against closed forms: Gaussian generators, exact scores, quadrature."""
import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import methods
from jaxalign.config.schema import OptimConfig
from jaxalign.errors import UserError
from jaxalign.methods import diff_instruct_star as di
from jaxalign.sampling import Guided, Schedule, make_sampler
from jaxalign.testing import analytic
from tests import runs

pytestmark = pytest.mark.usefixtures("compile_quickly")

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
  """The table has six decimals; sums of 3600 nodes in f32 add 2e-6 of the largest."""
  np.testing.assert_allclose(gradient(config(**values), 0.7, 0.6), expected, rtol=2e-5)


@pytest.mark.parametrize(("alpha", "expected"), [
    (0.5, (0.055233, -0.115147)), (1.0, (0.102326, -0.149563)), (1.2, (0.121163, -0.163330))])
def test_sid_is_half_of_l2_in_x0_space(alpha, expected):
  """SiD's loss has no factor 2; its alpha is `1 - gradient_alpha / 2`: 1 detached, 1/2 full."""
  cfg = config(divergence="l2", space="x0", gradient="alpha", gradient_alpha=2 * (1 - alpha))
  found = gradient(cfg, 0.7, 0.6) / 2
  np.testing.assert_allclose(found, expected, rtol=2e-5)
  named = {1.0: "detached", 0.5: "full"}.get(alpha)
  if named:
    other = dataclasses.replace(cfg, gradient=named, gradient_alpha=0.0)
    np.testing.assert_allclose(gradient(other, 0.7, 0.6) / 2, found, rtol=1e-6)


def test_alpha_goes_from_detached_to_full_in_a_straight_line():
  for values in (dict(divergence="l2"), dict(divergence="pseudo_huber", kappa=1.0)):
    at = lambda **more: gradient(config(**values, **more), 0.7, 0.6)
    low, high = at(gradient="detached"), at(gradient="full")
    np.testing.assert_allclose(at(gradient="alpha", gradient_alpha=0.3), low + 0.3 * (high - low),
                               rtol=2e-5)
    np.testing.assert_array_equal(at(gradient="alpha"), low)


def world(mu=0.7, S=0.6, m=0.0, tau=1.0, a=0.8, s=0.5):
  """Point, assistant and reference of section 5.1: own law N(mu, S^2), data N(m, tau^2)."""
  own = gaussian_eps(a * mu, a**2 * S**2 + s**2, s)
  ref = gaussian_eps(a * m, a**2 * tau**2 + s**2, s)
  point = di.Point(E, *(jnp.full(len(E), value) for value in (a, s, 1.0)))
  return point, own, lambda x: Guided(ref(x), None, ref(x))


def test_residual_is_orthogonal_to_any_function_of_x_t():
  """`E[y . r] = 0`: the pseudo-loss of l2 is zero at the generator that the assistant knows."""
  point, own, reference = world()
  loss, _ = di.pseudo_loss(config(divergence="l2"), 0.7 + 0.6 * Z, point, own, reference)
  assert abs(float((W * loss).sum())) < 1e-5
  lagging = gaussian_eps(0.8 * 0.2, 0.4804, 0.5)
  loss, _ = di.pseudo_loss(config(divergence="l2"), 0.7 + 0.6 * Z, point, lagging, reference)
  assert abs(float((W * loss).sum())) > 0.1


def test_what_the_full_gradient_adds_is_no_loss_of_its_own():
  """The divergence alone pushes the mean away from the data where P < Q: the wrong sign."""
  at = lambda mode: gradient(config(divergence="l2", gradient=mode), 0.7, 0.6)
  naive = at("full") - at("detached")
  np.testing.assert_allclose(naive, (-0.964462, 0.704847), rtol=5e-5)
  assert naive[0] < 0 < at("detached")[0] and naive[0] < 0 < at("full")[0]


def test_networks_must_see_the_generator_move():
  """With both behind a stop-gradient, eps-form residuals leave nothing, and x_0-form ones the KL.

  The x_0 form, `r = (a / s^2) (x0_psi - x_0)`, is then `(2 / s^2)` times Diff-Instruct.
  """
  a, s = 0.8, 0.5
  point, own, reference = world()
  params = jnp.asarray([0.7, 0.6])
  x_of = lambda p: p[0] + p[1] * Z
  stop = jax.lax.stop_gradient
  blind = lambda f: lambda x: jax.tree.map(stop, f(x))

  def slope(loss):
    return np.asarray(jax.grad(lambda p: (W * loss(x_of(p))).sum())(params))
  cfg = config(divergence="l2")
  trap = slope(lambda x: di.pseudo_loss(cfg, x, point, blind(own), blind(reference))[0])
  np.testing.assert_array_equal(trap, 0)

  def x0_form(x):
    x_t = stop(a * x + s * E)
    y = (reference(x_t).combined - own(x_t)) / s
    clean = (x_t - s * own(x_t)) / a
    return -2 * (y * (a / s**2) * (clean - x)).sum(-1)
  np.testing.assert_allclose(slope(x0_form), (4.02697, -2.94299), rtol=2e-5)
  kl = slope(lambda x: di.pseudo_loss(config(divergence="kl"), x, point, own, reference)[0])
  np.testing.assert_allclose(slope(x0_form), 2 / s**2 * kl, rtol=2e-5)


def plane(n):
  """Nodes `z, e [N, 2]` and weights of a four-dimensional Gauss-Hermite rule."""
  nodes, weights = np.polynomial.hermite_e.hermegauss(n)
  grid = np.stack([g.ravel() for g in np.meshgrid(*[nodes] * 4, indexing="ij")], 1)
  weight = np.prod(np.stack([g.ravel() for g in np.meshgrid(
      *[weights / weights.sum()] * 4, indexing="ij")], 1), 1)
  return (jnp.asarray(a, jnp.float32) for a in (grid[:, :2], grid[:, 2:], weight))


@pytest.mark.parametrize(("values", "mean", "spread", "divergence"), [
    (dict(divergence="kl"), (0.445318, -0.397566),
     ((-0.146710, -0.067840), (-0.049860, -0.317127)), 1.010545),
    (dict(divergence="l2"), (1.502871, -2.173940),
     ((-0.823018, -0.269059), (-0.101287, -3.012790)), 1.010545),
    (dict(divergence="l2", gradient="full"), (1.325097, -1.503654),
     ((-0.729229, -0.168415), (0.022227, -2.395726)), 1.010545),
    (dict(divergence="pseudo_huber", kappa=0.5**0.5), (0.541980, -0.717210),
     ((-0.248265, -0.122466), (-0.096640, -0.883627)), 0.395578)])
def test_gradients_of_a_gaussian_in_the_plane(values, mean, spread, divergence):
  """Published with kappa = 1 for the whole vector: ours is per root of its size."""
  a, s, mu = 0.8, 0.5, np.asarray([0.5, -0.3])
  S, cov = np.asarray([[0.8, 0.2], [0.0, 0.5]]), np.asarray([[1.0, 0.3], [0.3, 0.7]])
  root = values["divergence"] == "pseudo_huber"
  z, e, w = plane(16 if root else 6)
  eps = lambda mean, var: lambda x: s * (x - jnp.asarray(mean, jnp.float32)[None]) @ jnp.asarray(
      np.linalg.inv(var), jnp.float32)
  own = eps(a * mu, a**2 * S @ S.T + s**2 * np.eye(2))
  ref = eps(0 * mu, a**2 * cov + s**2 * np.eye(2))
  point = di.Point(e, *(jnp.full(len(e), value) for value in (a, s, 1.0)))

  def loss(mu, S):
    value, (distance, _) = di.pseudo_loss(config(**values), mu[None] + z @ S.T, point, own,
                                          lambda x: Guided(ref(x), None, ref(x)))
    return (w * value).sum(), (w * distance).sum()
  (to_mean, to_spread), found = jax.grad(loss, (0, 1), has_aux=True)(
      jnp.asarray(mu, jnp.float32), jnp.asarray(S, jnp.float32))
  # Six nodes are exact but for f32; the root of pseudo-Huber is no polynomial.
  atol = 2e-4 if root else 1e-5
  np.testing.assert_allclose(to_mean, mean, atol=atol)
  np.testing.assert_allclose(to_spread, spread, atol=atol)
  np.testing.assert_allclose(found, divergence, atol=atol)


def test_weights_of_time_and_sample():
  """`edm` is EDM's lambda with unit data; `dmd_norm` divides by `mean |x_0 - x0_ref|`, constant."""
  levels = analytic.SD_SCHEDULE.training_levels
  sigma = levels[1] / levels[0]
  np.testing.assert_allclose(di.time_weights(config(weight="edm"), *levels),
                             (sigma**2 + 1) / sigma**2, rtol=1e-9)
  assert (di.time_weights(config(weight="dmd_norm"), *levels) == 1).all()
  key = jax.random.key(1)
  x_0, noise = jax.random.normal(key, (2, 5, 3))
  a, s = 0.8, 0.6
  point = di.Point(noise, *(jnp.full(5, value) for value in (a, s, 1.0)))
  reference = lambda x: Guided(0.2 * x, None, 0.4 * x)
  slope = lambda weight: jax.grad(lambda x: di.pseudo_loss(
      config(divergence="l2", space="x0", weight=weight), x, point, lambda x: 0.7 * x,
      reference)[0].sum())(x_0)
  x_t = a * np.asarray(x_0) + s * np.asarray(noise)
  apart = np.abs(np.asarray(x_0) - (x_t - s * 0.4 * x_t) / a).mean(1, keepdims=True)
  np.testing.assert_allclose(slope("dmd_norm"), slope("constant") / apart, rtol=1e-5)


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


def over_levels(cfg, schedule=analytic.SD_SCHEDULE):
  """`(mu, S) -> (gradient, mean divergence)` of the method's own loss, over its training levels.

  The losses of l2 are quadratic in z and e, for which six nodes are exact. Data N(0, 1).
  """
  nodes, node_weights = np.polynomial.hermite_e.hermegauss(6)
  node_weights = np.outer(node_weights, node_weights).ravel() / node_weights.sum()**2
  used = np.arange(cfg.t_min, cfg.t_max + 1)
  t, z, e = (a.ravel() for a in np.meshgrid(used, nodes, nodes, indexing="ij"))
  rows = jnp.asarray(np.tile(node_weights / len(used), len(used)), jnp.float32)
  z, e = (jnp.asarray(a, jnp.float32)[:, None] for a in (z, e))
  levels = schedule.training_levels
  weights = jnp.asarray(di.time_weights(cfg, *levels)[t], jnp.float32)
  a, s = (jnp.asarray(level[t], jnp.float32) for level in levels)
  point = di.Point(e, a, s, weights)
  column = lambda v: v[:, None]
  teacher = lambda x: column(s / (a**2 + s**2)) * x

  @jax.jit
  def both(own, params):
    P = a**2 * own[1]**2 + s**2
    assistant = lambda x: column(s) * (x - column(a) * own[0]) / column(P)
    total = lambda p: di.pseudo_loss(cfg, p[0] + p[1] * z, point, assistant,
                                     lambda x: Guided(teacher(x), None, teacher(x)))

    def loss(p):
      value, (distance, _) = total(p)
      return (rows * value).sum(), (rows * weights * distance).sum()
    return jax.grad(loss, has_aux=True)(params)

  def at(mu, S):
    here = jnp.asarray([mu, S], jnp.float32)
    slope, distance = both(here, here)
    return np.asarray(slope, np.float64), float(distance)
  return at


def test_over_all_levels_l2_is_the_kl_of_clean_samples():
  """`KL(N(0.7, 0.36) || N(0, 1)) = 0.4358256`, and its gradient, as an integral over levels.

  Levels end at sigma 0.03 and 14.6, not 0 and infinity, and `half F d(sigma^2)` beyond them is 0.16
  and 0.26 %; of the gradient in the mean it is 0.5 %.
  """
  cfg = config(divergence="l2", gradient="full", weight="half_dsigma2", t_min=0, t_max=999)
  slope, divergence = over_levels(cfg)(0.7, 0.6)
  assert divergence == pytest.approx(0.4358256, rel=5e-3)
  np.testing.assert_allclose(slope, (0.7, 0.6 - 1 / 0.6), rtol=1e-2)


def test_the_default_levels_leave_out_a_part_of_the_kl():
  cfg = config(divergence="l2", gradient="full", weight="half_dsigma2")
  assert (cfg.t_min, cfg.t_max) == (20, 979)
  assert over_levels(cfg)(0.7, 0.6)[1] == pytest.approx(0.4198, abs=5e-4)          # of 0.4358


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_over_the_levels_of_a_flow_l2_is_the_same_kl(shift):
  """Its weights are of levels, not of times: `half F d(sigma^2)` outside of them is 0.1 %."""
  cfg = config(divergence="l2", gradient="full", weight="half_dsigma2", t_min=10, t_max=990)
  slope, divergence = over_levels(cfg, Schedule.flow(shift))(0.7, 0.6)
  assert divergence == pytest.approx(0.4358256, rel=5e-3)
  np.testing.assert_allclose(slope, (0.7, 0.6 - 1 / 0.6), rtol=1e-2)


def test_over_the_levels_of_a_flow_the_full_gradient_finds_the_tilted_law():
  of_levels = over_levels(config(divergence="l2", gradient="full", weight="half_dsigma2", t_min=10,
                                 t_max=990), analytic.FLOW_SCHEDULE)
  field = lambda mu, S: np.array([mu - 1, S]) + of_levels(mu, S)[0]
  np.testing.assert_allclose(fixed_point(field), (0.5, 0.707107), atol=2e-3)


def test_over_all_levels_the_full_gradient_finds_the_tilted_law():
  """Weighted by half d(sigma^2), l2 is the KL of clean samples: optimum N(1/2, 1/2)."""
  points = {}
  for mode, expected in (("full", (0.5, 0.707107)), ("detached", (0.428526, 0.738500))):
    of_levels = over_levels(config(divergence="l2", gradient=mode, weight="half_dsigma2", t_min=0,
                                   t_max=999))
    field = lambda mu, S, of_levels=of_levels: np.array([mu - 1, S]) + of_levels(mu, S)[0]
    points[mode] = fixed_point(field)                  # with the reward -(x - 1)^2 / 2
    np.testing.assert_allclose(points[mode], expected, atol=2e-3)
  assert abs(points["full"][1] - points["detached"][1]) > 0.02


@pytest.mark.parametrize(("divergence", "inside", "expected"), [
    ("kl", True, 2.0 * 0.7), ("l2", True, 2.0 * 0.7), ("kl", False, 2.0 * 0.7),
    ("l2", False, 0.7 + (2.0 - 1) * 0.7 * 0.89 / 2)])
def test_optimum_with_guidance(divergence, inside, expected):
  """Teacher N(0.7, 1) with condition, N(0, 1) without, scale 2: guided it is N(1.4, 1).

  Outside, l2 stops at `m + (scale - 1) m Q / 2`, Q = 0.89, with the generator's spread at 1.
  """
  a, s, m = 0.8, 0.5, 0.7
  Q = a**2 + s**2
  cond, uncond = gaussian_eps(a * m, Q, s), gaussian_eps(0.0, Q, s)
  reference = lambda x: Guided(cond(x), uncond(x), uncond(x) + 2.0 * (cond(x) - uncond(x)))
  point = di.Point(E, *(jnp.full(len(E), value) for value in (a, s, 1.0)))
  cfg = config(divergence=divergence, guidance=2.0, guidance_in=inside)

  def slope(mu):
    own = gaussian_eps(a * mu, Q, s)
    return float(jax.grad(lambda mu: (W * di.pseudo_loss(cfg, mu + Z, point, own, reference)[0]
                                      ).sum())(jnp.float32(mu)))
  low, high = slope(0.0), slope(2.0)                    # linear in mu
  assert -2.0 * low / (high - low) == pytest.approx(expected, abs=2e-5)


def test_a_stale_assistant_makes_the_kl_drift_without_bound():
  """Its gradient is `a^2 (nu - m) / Q` wherever the generator is; with a fresh one it is not."""
  a, s, nu = 0.8, 0.5, 0.3
  Q = a**2 + s**2
  stale, ref = gaussian_eps(a * nu, Q, s), gaussian_eps(0.0, Q, s)
  point = di.Point(E, *(jnp.full(len(E), value) for value in (a, s, 1.0)))
  slope = lambda mu: float(jax.grad(lambda mu: (W * di.pseudo_loss(
      config(divergence="kl"), mu + Z, point, stale, lambda x: Guided(ref(x), None, ref(x)))[0]
      ).sum())(jnp.float32(mu)))
  for mu in (-2.0, 0.0, 5.0):
    assert slope(mu) == pytest.approx(a**2 * nu / Q, rel=2e-5)


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


def one_step_models(mixture, reward, timestep=625, schedule=analytic.SD_SCHEDULE):
  net = analytic.mlp(schedule, 1)
  models = analytic.make_models(mixture, reward, policy=net, flow=net, schedule=schedule)
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
  # The square's gradient fades as the spread comes right, so that it takes twice as long.
  steps = 6000 if divergence == "l2" else 3000
  optim = OptimConfig(lr=2e-3, decay_steps=steps, ema=0.99)
  _, _, before = train(models, cfg, optim, 0)
  assert before.std() < 0.35
  _, metrics, after = train(models, cfg, optim, steps)
  assert abs(after.mean() - 0.8) < 0.06 and abs(after.std() - 0.5) < 0.06
  assert float(metrics["train/cotangent_ratio"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("schedule, timestep", [
    (analytic.SD_SCHEDULE, 625), (analytic.FLOW_SCHEDULE, 900)])
def test_linear_reward_shifts_the_mean_by_what_the_closed_form_says(schedule, timestep):
  """l2, several levels: shift `alpha / E_t[2 w a^2 / Q^2]`, w = s^2 in eps space; spread kept."""
  cfg = di.Config(divergence="l2", guidance=1.0, ratio=False, assistant_steps=5, assistant_lr=3e-3)
  a2, s2 = np.square(schedule.training_levels[:, cfg.t_min:cfg.t_max + 1])
  Q = a2 * 0.25 + s2
  wanted = 0.3
  cfg = dataclasses.replace(cfg, reward=float(wanted * (2 * s2 * a2 / Q**2).mean()))
  models = one_step_models(MIXTURE, analytic.linear_reward([1.0]), timestep, schedule)
  frozen = jax.tree.map(np.asarray, models.frozen)
  optim = OptimConfig(lr=1e-3, decay_steps=2000, ema=0.99)
  _, metrics, tuned = train(models, cfg, optim, 2000)
  assert abs(tuned.mean() - 0.8 - wanted) < 0.08 and abs(tuned.std() - 0.5) < 0.08
  assert float(metrics["train/alpha"]) == pytest.approx(cfg.reward)
  chex.assert_trees_all_equal(frozen, jax.tree.map(np.asarray, models.frozen))


@pytest.mark.parametrize("schedule", [analytic.SD_SCHEDULE, analytic.FLOW_SCHEDULE])
def test_warmup_trains_the_assistant_only_and_k_counts_its_steps(schedule):
  models = one_step_models(MIXTURE, analytic.linear_reward([1.0]), schedule=schedule)
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


def test_ratio_sets_the_reward_by_the_norms_of_the_gradients_in_x_0():
  """At the first update `alpha = reward |u| / |v|`, with |v| by hand and |u| from the same draws.

  For `R = w . x` every sample's cotangent is -w / B. |u| follows from raw alpha: there the ratio
  that is reported is `alpha |v| / |u|`.
  """
  models = one_step_models(MIXTURE, analytic.linear_reward([1.5]))
  rows, metrics = analytic.make_batch(64), {}
  for name, values in (("ratio", dict(reward=0.7)), ("raw", dict(reward=2.0, ratio=False))):
    method = di.make(models, di.Config(guidance=1.0, assistant_steps=2, **values), OptimConfig())
    state = method.init(jax.random.key(0), models.frozen, rows)
    experience = method.collect(state, models.frozen, rows, jax.random.key(1))
    _, metrics[name] = jax.jit(method.update)(state, models.frozen, experience, None,
                                              jax.random.key(2))
  to_reward = 1.5 / 64 * 8                                   # |(w / B, ..)| over 64 samples
  to_data = 2.0 * to_reward / float(metrics["raw"]["train/cotangent_ratio"])
  assert float(metrics["raw"]["train/alpha"]) == 2.0
  assert float(metrics["ratio"]["train/cotangent_ratio"]) == pytest.approx(0.7, rel=1e-6)
  assert float(metrics["ratio"]["train/alpha"]) == pytest.approx(0.7 * to_data / to_reward,
                                                                 rel=1e-5)


@pytest.mark.slow
def test_presets_and_guidance_outside_through_the_method():
  """One update of each, from the same draws; the teacher's mean moves by 0.5 with the condition."""
  models = one_step_models(MIXTURE, analytic.linear_reward([1.0]))
  exact = models.denoise
  alpha = lambda x, t: models.schedule.levels(jnp.broadcast_to(t, x.shape[:1]))[0][:, None]
  models = dataclasses.replace(models, denoise=lambda v, x, t, c: (
      exact(v, x, t, c) - alpha(x, t) / np.sqrt(2) * c["shift"]))
  rows = analytic.make_batch(64)
  shift = lambda value: {"shift": jnp.full((64, 1), value)}
  rows["conditioning"] = rows["conditioning"]._replace(cond=shift(0.5), uncond=shift(0.0))

  def first(models=models, **values):
    method = di.make(models, di.Config(assistant_steps=2, **values), OptimConfig(lr=1e-2))
    state = method.init(jax.random.key(0), models.frozen, rows)
    experience = method.collect(state, models.frozen, rows, jax.random.key(1))
    new, metrics = jax.jit(method.update)(state, models.frozen, experience, None,
                                          jax.random.key(2))
    assert np.isfinite(jax.tree.leaves(metrics)).all()
    assert float(jnp.abs(new["policy"]["w3"]).max()) > 0
    return {name: float(value) for name, value in metrics.items()}
  default, plain = first(), first(guidance=1.0)
  full = first(**di.PRESETS["exact"])
  assert full["train/divergence"] == pytest.approx(default["train/divergence"], rel=1e-5)
  assert abs(full["train/alpha"] / default["train/alpha"] - 1) > 1e-3      # another gradient
  sim = first(dataclasses.replace(models, score=None), **di.PRESETS["sim"])
  assert sim["train/cotangent_ratio"] == 0 and "train/reward_scored" not in sim
  assert sim["train/score_gap"] == pytest.approx(default["train/score_gap"], rel=1e-5)
  # Outside, y is the unguided difference, and the rest is a term of its own.
  outside = first(guidance_in=False)
  assert outside["train/score_gap"] == pytest.approx(plain["train/score_gap"], rel=1e-5)
  assert abs(outside["train/alpha"] / plain["train/alpha"] - 1) > 1e-2
  assert abs(outside["train/alpha"] / default["train/alpha"] - 1) > 1e-2
  kl = [first(guidance_in=inside, **di.PRESETS["diff_instruct_pp"]) for inside in (True, False)]
  assert kl[0]["train/grad_norm"] == pytest.approx(kl[1]["train/grad_norm"], rel=1e-4)


def test_sampled_and_differentiated_generator_agree():
  """An update takes the outputs of `collect` for those that its gradient is of."""
  models = one_step_models(MIXTURE, analytic.linear_reward([1.0]))
  method = di.make(models, di.Config(guidance=1.0), OptimConfig())
  rows = analytic.make_batch(8)
  state = method.init(jax.random.key(0), models.frozen, rows)
  state["policy"] = jax.tree.map(lambda a: a + 0.1, state["policy"])
  experience = method.collect(state, models.frozen, rows, jax.random.key(1))
  sampler = models.sampler
  prediction = models.denoise(models.combine(state["policy"], models.frozen["base"]),
                              experience["z"], 625, {})
  np.testing.assert_allclose(
      experience["final"], sampler.mean(0, experience["z"], prediction), rtol=1e-6)


@pytest.mark.slow
def test_scale_of_a_generators_input(tmp_path):
  """A checkpoint says how long its input is; every draw of it is, and exports say so too."""
  import json

  from jaxalign.convert import load_pipeline, save_pipeline
  from jaxalign.methods.shared import noise
  from jaxalign.testing.fixture import make_pipeline_dir
  folder = make_pipeline_dir(tmp_path / "fixture")
  file = folder / "scheduler" / "scheduler_config.json"
  keys = {"one_step_timestep": 625, "one_step_input_scale": 0.9286}
  file.write_text(json.dumps(json.loads(file.read_text()) | keys))
  for format in ("diffusers", "flax"):
    pipeline = load_pipeline(folder)
    save_pipeline(pipeline, tmp_path / format, format=format)
    schedule = Schedule.from_config(load_pipeline(tmp_path / format).scheduler_config)
    assert (schedule.one_step, schedule.one_step_scale) == (625, 0.9286)
  sampler = make_sampler(schedule, 1, kind="one_step")
  assert sampler.input_scale == 0.9286 and sampler.timesteps[0] == 625
  for bad in (0, -1.0, "sigma", None, True):
    with pytest.raises(UserError, match="one_step_input_scale"):
      Schedule.from_config(pipeline.scheduler_config | {"one_step_input_scale": bad})

  # A generator that does not look at its input scales what it passes on, so that coefficient and
  # scale of the input are one number.
  models = one_step_models(MIXTURE, analytic.linear_reward([1.0]))
  denoise = models.denoise
  models = dataclasses.replace(models, denoise=lambda v, x, t, c: jnp.where(
      jnp.broadcast_to(t, x.shape[:1])[:, None] == 625, 0.3, denoise(v, x, t, c)))
  plain, rows = models.sampler, analytic.make_batch(64)
  found = {}
  for name, changed in (("scale", dict(input_scale=0.5)), ("coef", dict(x_coef=plain.x_coef / 2))):
    models = dataclasses.replace(models, sampler=dataclasses.replace(plain, **changed))
    method = di.make(models, di.Config(guidance=1.0, assistant_steps=2), OptimConfig())
    state = method.init(jax.random.key(0), models.frozen, rows)
    experience = method.collect(state, models.frozen, rows, jax.random.key(1))
    _, metrics = method.update(state, models.frozen, experience, None, jax.random.key(2))
    drawn = noise.generate(models, models.frozen, noise.draw(models, jax.random.key(1),
                                                             rows["sample_ids"]),
                           rows["conditioning"])
    found[name] = {**metrics, "final": experience["final"], "drawn": drawn}
    np.testing.assert_allclose(drawn, experience["final"], rtol=1e-6)
    assert float(experience["z"].std()) == pytest.approx(
        1.0 if name == "coef" else 0.5, rel=4.5 / np.sqrt(128))
  chex.assert_trees_all_close(found["scale"], found["coef"], rtol=1e-5)


def test_one_step_sampler_is_the_clean_estimate():
  sampler = make_sampler(analytic.SD_SCHEDULE, 1, kind="one_step", timestep=399)
  abar = analytic.SD_SCHEDULE.alphas[399] ** 2
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
    methods.make("diff_instruct_star", models, di.Config(), OptimConfig())
  with pytest.raises(UserError, match="t_max"):
    di.make(models, di.Config(reward=0.0, t_max=1000), OptimConfig())
  flow = one_step_models(MIXTURE, (None, None), 1000, analytic.FLOW_SCHEDULE)
  for ends in (dict(t_min=0), dict(t_max=1000)):
    with pytest.raises(UserError, match="t_min=.* without noise or without data"):
      di.make(flow, di.Config(reward=0.0, **ends), OptimConfig())
  with pytest.raises(UserError, match="kappa"):
    di.Config(kappa=0.0)
  with pytest.raises(UserError, match="t_min"):
    di.Config(t_min=900, t_max=100)
  with pytest.raises(UserError, match="gradient_alpha=0.5 is for method.gradient='alpha'"):
    di.Config(gradient_alpha=0.5)
  for space in ("eps", "x0"):
    with pytest.raises(UserError, match="half_dsigma2"):
      di.Config(weight="half_dsigma2", space=space)
  with pytest.raises(UserError, match=r"method\.weight='karras' is not one of"):
    di.Config(weight="karras")
  for key, value in (("sample__steps", 2), ("sample__guidance", 3.0)):
    with pytest.raises(UserError, match="one_step"):
      runs.smoke("diff_instruct_star", **{key: value})


# --- through the loop ---------------------------------------------------------------------------


@pytest.mark.slow
def test_smoke_run_writes_a_generator_that_samples_in_one_step(tmp_path):
  from jaxalign.convert import load_pipeline
  from jaxalign.train import generation, run
  from jaxalign.train.opening import own_sampler
  cfg = runs.smoke("diff_instruct_star", train__checkpoint_every=2)
  summary = run(cfg, tmp_path / "run")
  assert summary["steps"] == 3 and summary["cost"]["reward_gradients"] == 3 * cfg.sample.batch
  pipeline = load_pipeline(tmp_path / "run" / "export")
  assert pipeline.scheduler_config["one_step_timestep"] == 625
  own = own_sampler(pipeline)
  assert (own.kind, own.steps, own.guidance) == ("one_step", 1, 1.0)
  images = generation.generate(pipeline, ["a cat on a red background"], 2, sample=own)
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
