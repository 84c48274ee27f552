"""Flow-GRPO, its relatives and DPOK against closed forms, through the methods' own functions."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import methods
from jaxalign.config.schema import OptimConfig
from jaxalign.errors import UserError
from jaxalign.methods import dpok, flow_grpo
from jaxalign.methods.shared import policy_gradient as pg
from jaxalign.methods.shared.advantages import centred_as
from jaxalign.sampling import Conditioning, guided_output, make_sampler, noisy_within, rollout
from jaxalign.testing import analytic

KEY = jax.random.key(11)
MEAN, VAR = 0.7, 0.5
GAUSSIAN = analytic.Mixture(np.ones(1), np.asarray([[MEAN]]), np.asarray([VAR]))
FLOW = analytic.FLOW_SCHEDULE
LINEAR = analytic.linear_reward([1.0])
slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)      # more of the same
DESCENT = OptimConfig(lr=1e6, eps=1e6, b1=0.0, clip_norm=0.0)


def models_of(reward=LINEAR, data=GAUSSIAN, steps=8, **options):
  options = {**dict(schedule=FLOW, kind="flow_sde", eta=0.7, final="clean"), **options}
  return analytic.make_models(data, reward, steps=steps, **options)


def gains(sampler, schedule=FLOW):
  """Slopes of the reference's steps, and the products A_{k+1} of those that follow."""
  slope, _ = analytic.gaussian_line(schedule, sampler.alpha, sampler.sigma, MEAN, VAR)
  gain = sampler.x_coef - sampler.out_coef * slope
  return gain, np.append(np.cumprod(gain[::-1])[::-1][1:], 1.0)


# ---- ratios and KL -------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, shift", [(2, 1.0), (8, 3.0), (25, 1.0)])
def test_ratios(steps, shift):
  """cps = 2 std^2 density; guard = -b mean(z du), the density's direction; all 0 at theta = old."""
  sampler = make_sampler(FLOW, steps, kind="flow_sde", eta=0.7, final="clean", shift=shift)
  k = jnp.arange(steps)
  out, old, z = (jax.random.normal(jax.random.key(i), (steps, 3, 2)) for i in range(3))
  of = lambda form, out=out: pg.log_ratio(sampler, k, out, old, z, form)
  np.testing.assert_allclose(of("cps"), 2 * sampler.std ** 2 * of("density"), rtol=1e-5)
  np.testing.assert_allclose(of("guard"), -sampler.out_coef * (z * (out - old)).mean((1, 2)),
                             rtol=1e-4, atol=1e-6)
  for form in ("density", "cps", "guard"):
    assert np.all(of(form, old) == 0)
  slope = lambda form: jax.grad(lambda o: of(form, o).sum())(old)
  np.testing.assert_allclose(slope("guard"), slope("density") * sampler.std[:, None, None],
                             rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind, eta", [("flow_sde", 0.7), ("cps", 0.8), ("dance_sde", 0.3)])
def test_forms_of_the_kl(kind, eta):
  """Against two Gaussians; the published one has |d| besides, that of DPOK nothing of the step."""
  sampler = make_sampler(FLOW, 8, kind=kind, eta=eta, final="noisy")
  k, size = jnp.arange(8), 6
  out, ref, x = (jax.random.normal(jax.random.key(i), (8, size)) for i in range(3))
  gap = np.asarray(sampler.mean(k, x, out) - sampler.mean(k, x, ref), np.float64)
  exact = (gap ** 2).sum(1) / (2 * sampler.std ** 2) / size
  np.testing.assert_allclose(pg.step_kl(sampler, k, out, ref), exact, rtol=2e-3)
  np.testing.assert_allclose(pg.step_kl(sampler, k, out, ref, "flow_grpo"),
                             (sampler.sigma - sampler.sigma_next) * exact, rtol=2e-3)
  np.testing.assert_allclose(pg.step_kl(sampler, k, out, ref, "dpok"),
                             ((out - ref) ** 2).mean(1), rtol=1e-5)


# ---- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("window, reach, variance", [
    ((0, 8), .42502, .45538), ((0, 4), .41490, .45928), ((1, 5), .37582, .44685),
    ((2, 6), .28203, .41854), ((4, 8), .14117, .38578), ((0, 1), .22883, .41419)])
def test_reach_of_a_window(window, reach, variance):
  """What a linear reward can move the end by, and the variance there, T = 8, eta 0.7."""
  whole = make_sampler(FLOW, 8, kind="flow_sde", eta=0.7, final="clean")
  sampler = noisy_within(FLOW, whole, *window)
  std = np.asarray(sampler.std, np.float64)
  assert np.all((std > 0) == ((np.arange(8) >= window[0]) & (np.arange(8) < window[1])))
  plain = dataclasses.replace(sampler, x_coef=np.asarray(sampler.x_coef, np.float64),
                              out_coef=np.asarray(sampler.out_coef, np.float64))
  gain, after = gains(plain)
  got = (after ** 2 * std ** 2).sum()
  assert got == pytest.approx(reach, abs=2e-5)
  assert got + np.prod(gain) ** 2 == pytest.approx(variance, abs=2e-5)


def test_steps_outside_a_window_are_eulers():
  """Through `rollout`, one compiled program for all windows."""
  models = models_of()
  run = guided_output(models.denoise, 1.0)
  variables, batch = models.combine(None, models.frozen["base"]), analytic.make_batch(4)
  traces = []

  @jax.jit
  def sampled(start, stop):
    traces.append(start)
    inside = noisy_within(FLOW, models.sampler, start, stop)
    return rollout(run, variables, inside, batch["conditioning"], KEY, batch["sample_ids"],
                   (1,)).latents
  whole = rollout(run, variables, models.sampler, batch["conditioning"], KEY, batch["sample_ids"],
                  (1,)).latents
  np.testing.assert_allclose(sampled(0, 8), whole, rtol=1e-5)
  euler = rollout(run, variables, make_sampler(FLOW, 8, eta=0.0, final="clean"),
                  batch["conditioning"], KEY, batch["sample_ids"], (1,)).latents
  np.testing.assert_allclose(sampled(3, 3), euler, atol=1e-5)
  np.testing.assert_allclose(sampled(5, 7)[:6], euler[:6], atol=1e-5)
  assert len(traces) == 1


def test_windows_of_the_relatives():
  """MixGRPO's passes every start, Fast's stays in the first half, the last step may be left out."""
  at = lambda cfg, steps, stage: np.asarray(pg.interval(cfg, steps, stage, jax.random.fold_in(
      KEY, stage)))
  mix = flow_grpo.Config(**flow_grpo.PRESETS["mix"])
  assert [tuple(at(mix, 25, 25 * i)) for i in (0, 1, 21, 30)] == [(0, 4), (1, 5), (21, 25),
                                                                  (21, 25)]
  fast = flow_grpo.Config(**flow_grpo.PRESETS["flow_grpo_fast"])
  seen = {tuple(at(fast, 10, i)) for i in range(60)}
  assert seen == {(0, 3), (1, 4), (2, 5)}
  assert tuple(at(flow_grpo.Config(), 10, 0)) == (0, 9)


@pytest.mark.parametrize("preset", ["flow_grpo_fast", "flow_grpo_tilt", slow(""), slow("dance"),
                                    slow("mix")])
def test_steps_outside_the_window_have_no_gradient(preset):
  """Nor a NaN where there is no noise, the last step among them; others have one."""
  options = {**flow_grpo.PRESETS.get(preset, {}), "group": 4, "minibatches": 1}
  cfg = flow_grpo.Config(**options)
  models = models_of(final="ode", steps=10)
  assert models.sampler.std[-1] == 0
  method = pg.make(models, cfg, DESCENT)
  batch = analytic.make_batch(32)
  state = method.init(KEY, models.frozen, batch)
  start, stop = np.asarray(state["interval"])
  assert stop <= 9
  experience = jax.jit(method.collect)(state, models.frozen, batch, KEY)
  new, metrics = jax.jit(method.update)(
      state, models.frozen, experience, experience["final"][:, 0], KEY)
  moved = np.asarray(new["policy"]["bias"] - state["policy"]["bias"])[:10, 0]
  inside = (np.arange(10) >= start) & (np.arange(10) < stop)
  assert np.all((moved != 0) == inside) and np.isfinite(moved).all()
  assert all(np.isfinite(v) for v in metrics.values())
  noisy = np.asarray(experience["noise"][..., 0] != 0).any(0)
  assert noisy.all()                                    # drawn, and multiplied by no deviation
  if cfg.noise == "interval":
    euler = models.schedule, np.asarray(experience["latents"])[..., 0]
    step = models.sampler.sigma_next - models.sampler.sigma
    x, u = euler[1], np.asarray(experience["out"])[..., 0]
    for k in np.flatnonzero(~inside[:9]):
      np.testing.assert_allclose(x[:, k + 1], x[:, k] + step[k] * u[:, k], atol=1e-5)


def test_flat_groups_change_nothing():
  """By the spread of the batch, rewards that are equal within every group are worth nothing."""
  models, cfg = models_of(), flow_grpo.Config(group=4, kl=0.0)
  method = pg.make(models, cfg, DESCENT)
  batch = analytic.make_batch(16)
  state = method.init(KEY, models.frozen, batch)
  experience = jax.jit(method.collect)(state, models.frozen, batch, KEY)
  rewards = jnp.repeat(jnp.arange(4.0), 4)
  new, _ = jax.jit(method.update)(state, models.frozen, experience, rewards, KEY)
  for a, b in zip(jax.tree.leaves(new["policy"]), jax.tree.leaves(state["policy"])):
    np.testing.assert_array_equal(a, b)
  adv = pg.advantages(cfg, jnp.asarray([1.0, 2, 3, 6, 5, 5, 5, 5]), None)
  np.testing.assert_allclose(adv[:4], (np.asarray([1, 2, 3, 6]) - 3) / np.std(
      [1, 2, 3, 6, 5, 5, 5, 5], ddof=1), rtol=1e-5)


def test_the_unconditional_branch_can_be_left_out():
  """The gradient is then w times the conditional's, where it was w cond - (w - 1) uncond."""
  plain = models_of()
  models = dataclasses.replace(
      plain, guidance=3.0,
      denoise=lambda v, x, t, cond: plain.denoise(v, x, t, cond) * cond["scale"][:, None])
  batch = dict(analytic.make_batch(16), conditioning=Conditioning(
      {"scale": jnp.ones(16)}, {"scale": jnp.full(16, 0.5)}))
  moved = {}
  for detach in (False, True):
    method = pg.make(models, pg.Config(advantage="batch", history=0, detach_uncond=detach), DESCENT)
    state = method.init(KEY, models.frozen, batch)
    experience = jax.jit(method.collect)(state, models.frozen, batch, KEY)
    new, _ = jax.jit(method.update)(
        state, models.frozen, experience, experience["noise"].sum((1, 2)), KEY)
    moved[detach] = np.asarray(new["policy"]["bias"])[:8, 0]
  np.testing.assert_allclose(moved[True], moved[False] * 3 / (3 - 2 * 0.5), rtol=1e-4)


def test_sdes_are_refused_on_unets():
  for kind in ("flow_sde", "dance_sde", "cps"):
    with pytest.raises(UserError, match=f"kind='{kind}' is for flow-matching models; 'ddim'"):
      make_sampler(analytic.SD_SCHEDULE, 8, kind=kind)


# ---- fixed points --------------------------------------------------------------------------------


def trained(models, cfg, *, updates=400, batch=512, lr=0.03, score=lambda x: x[:, 0]):
  """The policy after so many updates of a decaying rate."""
  method = pg.make(models, cfg, OptimConfig(lr=lr, clip_norm=0.0, decay_steps=updates))
  rows = analytic.make_batch(batch)

  def step(state, i):
    key = jax.random.fold_in(KEY, i)
    experience = method.collect(state, models.frozen, rows, key)
    return method.update(state, models.frozen, experience, score(experience["final"]), key)
  state = method.init(KEY, models.frozen, rows)
  state, metrics = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(updates)))(state)
  return method, method.product(state), jax.tree.map(lambda a: float(a[-50:].mean()), metrics)


def moments(models, policy, noise=None):
  """Mean and variance of the output of an affine policy's chain."""
  s = models.sampler
  std = s.std if noise is None else np.where(noise, s.std, 0)
  slope, offset = analytic.gaussian_line(models.schedule, s.alpha, s.sigma, MEAN, VAR)
  slope = slope + np.asarray(policy["slope"], np.float64)[:-1, 0]
  offset = offset + np.asarray(policy["bias"], np.float64)[:-1, 0]
  m, v = 0.0, 1.0
  for a, b, c, d, e in zip(s.x_coef, s.out_coef, slope, offset, std):
    m, v = (a - b * c) * m - b * d, (a - b * c) ** 2 * v + e ** 2
  return m, v


def constants(models):
  """The policy of a bias a step, which is all that a linear reward asks for."""
  policy = analytic.affine_per_step(models.sampler, 1)
  only_bias = lambda variables: (None if variables is None else
                                 dict(variables, slope=jax.lax.stop_gradient(variables["slope"])))
  return dataclasses.replace(
      models, denoise=lambda v, x, t, cond: models.denoise(
          dict(v, policy=only_bias(v["policy"])), x, t, cond)), policy


@pytest.mark.parametrize("window, reach, variance", [slow((0, 8), .42502, .455376),
                                                     ((0, 4), .41490, .459279)])
def test_flow_grpo_tilt_reaches_what_its_noise_does(window, reach, variance):
  """R = x, Lam = 1 / kl = 2: a shift of Lam times the reach, and the variance of the chain."""
  models, _ = constants(models_of())
  length = (window[1] - window[0]) / 8
  whole = length == 1
  cfg = flow_grpo.Config(**{**flow_grpo.PRESETS["flow_grpo_tilt"], "group": 64, "minibatches": 1,
                            "kl": 0.5, "kl_unit": "raw", "interval_first": length,
                            "interval": "full" if whole else "early", "clip_range": 10.0,
                            "noise": "all" if whole else "interval"})
  method, policy, metrics = trained(models, cfg)
  sampler = noisy_within(FLOW, models.sampler, *window)
  chain = dataclasses.replace(models, sampler=dataclasses.replace(
      models.sampler, **{name: np.asarray(getattr(sampler, name), np.float64)
                         for name in ("x_coef", "out_coef", "std")}))
  m, v = moments(chain, policy)
  base, _ = moments(chain, models.init_policy(KEY, models.frozen))
  assert m - base == pytest.approx(2 * reach, rel=0.02)
  assert v == pytest.approx(variance, abs=1e-4)
  assert metrics["train/path_kl"] == pytest.approx(2 ** 2 * reach / 2, rel=0.04)
  assert (method.tilt is not None) == whole and (not whole or method.tilt({}) == 2.0)


def dpok_config(**options):
  return dpok.Config(**{**dict(group=64, minibatches=1, kl=1.0, kl_unit="raw", clip_range=10.0),
                        **options})


@pytest.mark.parametrize("size", [slow(1), 4])
def test_dpok_shifts_by_the_inverse_of_kl(size):
  """R = x, kl 1/3, VP of 20 steps: shift 1.102615, path KL 1.653923; of each dimension alike."""
  data = analytic.Mixture(np.ones(1), np.full((1, size), MEAN), np.asarray([VAR]))
  models, _ = constants(analytic.make_models(
      data, analytic.linear_reward(np.ones(size)), steps=20))
  method, policy, metrics = trained(models, dpok_config(kl=1 / 3), updates=500,
                                    score=lambda x: x.sum(1))
  base = moments(models, models.init_policy(KEY, models.frozen))[0]
  shifts = [moments(models, {n: p[:, i:i + 1] for n, p in policy.items()})[0] - base
            for i in range(size)]
  assert np.mean(shifts) == pytest.approx(1.102615, rel=0.02)
  assert metrics["train/path_kl"] == pytest.approx(1.653923 * size, rel=0.04)
  assert method.tilt({}) == pytest.approx(3.0)


@pytest.mark.slow
@pytest.mark.parametrize("kl_gradient, mean, variance", [
    ("full", 1.380216, 0.187785), ("local", 1.278318, 0.203287)])
def test_the_two_gradients_of_a_curved_reward(kl_gradient, mean, variance):
  """R = -(x - 2)^2 / 2, kl 1/3, VP of 20 steps: what the published gradient leaves out."""
  policy = analytic.affine_per_step(make_sampler(analytic.SD_SCHEDULE, 20), 1, MEAN)
  models = analytic.make_models(GAUSSIAN, LINEAR, steps=20, policy=policy)
  _, trained_policy, _ = trained(
      models, dpok_config(kl=1 / 3, kl_gradient=kl_gradient), updates=1500, lr=0.02,
      score=lambda x: -0.5 * jnp.square(x[:, 0] - 2))
  s = models.sampler
  centre = MEAN * np.append(s.alpha, s.alpha_next[-1])[:, None]
  plain = {"slope": trained_policy["slope"],
           "bias": trained_policy["bias"] - trained_policy["slope"] * centre}
  m, v = moments(models, plain)
  assert m == pytest.approx(mean, abs=6e-3) and v == pytest.approx(variance, abs=3e-3)


def test_the_published_form_has_another_fixed_point():
  """R = x, VP of 50 steps: 0.1097274 / (2 kl), as no step's own factor is in it."""
  s = make_sampler(analytic.SD_SCHEDULE, 50)
  _, after = gains(s, analytic.SD_SCHEDULE)
  # Stationary: b_k A_{k+1} = 2 kl |d_k| with the squared difference of outputs, of each step alike.
  assert (s.out_coef ** 2 * after ** 2).sum() == pytest.approx(0.1097274, abs=1e-6)
  models = analytic.make_models(GAUSSIAN, LINEAR, steps=50)
  cfg = dpok_config(kl=0.2, kl_form="dpok", kl_gradient="local")
  k = 30
  delta = -s.out_coef[k] * after[k] / (2 * cfg.kl)
  rows = {"out_ref": jnp.zeros((1, 1))}
  slope = jax.grad(lambda d: cfg.kl * pg.step_kl(models.sampler, jnp.asarray([k]), d,
                                                 rows["out_ref"], cfg.kl_form).sum())(
      jnp.full((1, 1), delta))
  assert float(slope[0, 0]) == pytest.approx(-s.out_coef[k] * after[k], rel=1e-5)


def test_a_cost_to_come_is_centred_like_a_reward():
  values = jax.random.normal(KEY, (12,))
  for mode in ("group_loo", "group_center"):
    cfg = pg.Config(group=4, advantage=mode)
    np.testing.assert_allclose(centred_as(cfg, values), pg.advantages(cfg, values, None), rtol=1e-5,
                               atol=1e-6)
  np.testing.assert_allclose(centred_as(pg.Config(), values), values - values.mean(), rtol=1e-5)


def test_at_the_reference_the_kl_has_no_gradient():
  """The first update is that of no KL, whichever gradient."""
  models, batch = models_of(), analytic.make_batch(32)
  moved = {}
  for name, kl, which in (("none", 0.0, "local"), ("local", 0.5, "local"), ("full", 0.5, "full")):
    cfg = pg.Config(group=4, advantage="group_loo", history=0, kl=kl, kl_gradient=which)
    method = pg.make(models, cfg, DESCENT)
    state = method.init(KEY, models.frozen, batch)
    experience = jax.jit(method.collect)(state, models.frozen, batch, KEY)
    new, metrics = jax.jit(method.update)(
        state, models.frozen, experience, experience["final"][:, 0], KEY)
    moved[name] = np.asarray(new["policy"]["bias"])
  np.testing.assert_allclose(moved["local"], moved["none"], rtol=1e-5, atol=1e-9)
  np.testing.assert_allclose(moved["full"], moved["none"], rtol=1e-5, atol=1e-9)
  assert float(metrics["train/path_kl"]) < 1e-9


def test_refused():
  with pytest.raises(UserError, match=r"method\.kl=0\.0 .* configs/ddpo\.py"):
    dpok.Config(kl=0.0)
  with pytest.raises(UserError, match=r"method\.kl_gradient='full' takes means"):
    pg.Config(group=4, select="pairs", kl=0.1, kl_gradient="full", advantage="group_z")
  with pytest.raises(UserError, match=r"method\.interval_within=0\.2 has no room"):
    flow_grpo.Config(interval="random", interval_first=0.5, interval_within=0.2)
  with pytest.raises(UserError, match="'dpok' needs noise at every step"):
    methods.make("dpok", models_of(final="ode"), dpok.Config(), OptimConfig())
  with pytest.raises(UserError, match="need noise at every step but the last"):
    methods.make("flow_grpo", models_of(kind="ddim", eta=0.0), flow_grpo.Config(), OptimConfig())
