"""Samplers on linear paths: golden numbers, each computed independently in f64, and PyTorch parity.

Moments are propagated through the table for N(0.7, 0.5), whose exact output is affine.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.sampling import (
    Conditioning,
    Schedule,
    differentiable_rollout,
    guided_output,
    make_sampler,
    replay,
    rollout,
)
from jaxalign.testing import analytic

pytestmark = pytest.mark.usefixtures("compile_quickly")

MEAN, VAR = 0.7, 0.5
FLOW = Schedule.flow()
SD3 = Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
NOTHING = Conditioning({}, {})


def one_step_of(schedule, sigma, sigma_next, **options):
  """The transition between two levels of a flow, taken from a sampler that stops at both."""
  steps = round(1 / (sigma - sigma_next))
  s = make_sampler(schedule, steps, spacing="linspace", final="clean", **options)
  k = int(np.argmin(np.abs(s.sigma - sigma)))
  assert (s.sigma[k], s.sigma_next[k]) == pytest.approx((sigma, sigma_next), abs=1e-12)
  return s, k


def test_ddim_on_a_flow():
  s, k = one_step_of(FLOW, 1.0, 0.75)
  assert (s.std[k], s.x_coef[k], s.out_coef[k]) == pytest.approx((0.75, 0.25, 0.25), abs=1e-12)
  s, k = one_step_of(FLOW, 0.5, 0.25)
  assert s.std[k] ** 2 == pytest.approx(0.0555556, abs=5e-8)
  assert (s.x_coef[k], s.out_coef[k], s.lam[k]) == pytest.approx((5 / 6, 1 / 3, 6.0), abs=1e-9)
  assert s.rate[k] == pytest.approx(6 * s.std[k]) and s.memoryless


@pytest.mark.parametrize("kind", ["ddim", "flow_sde", "dance_sde", "cps"])
@pytest.mark.parametrize("schedule, spacing", [(FLOW, "linspace"), (SD3, ""), (SD3, "linspace")])
def test_without_noise_every_kind_is_eulers_step(kind, schedule, spacing):
  for steps in (1, 2, 9):
    s = make_sampler(schedule, steps, kind=kind, eta=0.0, spacing=spacing, final="clean")
    np.testing.assert_allclose(s.x_coef, 1.0, atol=1e-12)
    np.testing.assert_allclose(s.out_coef, s.sigma - s.sigma_next, atol=1e-12)
    assert not s.std.any() and np.isinf(s.lam).all() and np.isinf(s.rate).all()


def in_path_coefficients(kind, eta, sigma, sigma_next):
  """`a, b, std` of one flow transition, from the equations: a second writing of the table."""
  d, alpha, alpha_next = sigma_next - sigma, 1 - sigma, 1 - sigma_next
  if kind in ("flow_sde", "dance_sde"):
    s = eta
    if kind == "flow_sde":
      s = eta * np.sqrt(sigma / (1 - (sigma_next if sigma == 1 else sigma)))
    # dx = [u + s^2 / (2 sigma) (x + (1 - sigma) u)] d sigma + s dW
    return 1 + s**2 * d / (2 * sigma), -(d + s**2 * d * alpha / (2 * sigma)), s * np.sqrt(-d)
  if kind == "cps":
    std = sigma_next * np.sin(eta * np.pi / 2)
  else:
    std = eta * sigma_next * np.sqrt(1 - (alpha * sigma_next / (alpha_next * sigma)) ** 2)
  c = np.sqrt(sigma_next**2 - std**2)
  # alpha' (x - sigma u) + c (x + alpha u)
  return alpha_next + c, alpha_next * sigma - c * alpha, std


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("kind, eta", [
    ("flow_sde", 0.7), ("dance_sde", 0.3), ("cps", 0.8), ("ddim", 1.0), ("ddim", 0.4)])
def test_table_of_every_kind(kind, eta, shift):
  for steps in (2, 8, 25):
    s = make_sampler(FLOW, steps, kind=kind, eta=eta, shift=shift)
    even = 1 - np.arange(steps + 1) / steps
    sigma = shift * even / (1 + (shift - 1) * even)
    np.testing.assert_allclose(np.append(s.sigma, 0), sigma, atol=1e-12)
    np.testing.assert_allclose(s.timesteps, 1000 * sigma[:-1], atol=1e-9)
    expected = [in_path_coefficients(kind, eta, a, b) for a, b in zip(sigma[:-1], sigma[1:])]
    np.testing.assert_allclose(np.stack([s.x_coef, s.out_coef, s.std], 1), expected, atol=1e-12)
    if kind == "flow_sde":          # b is -d (1 + eta^2 / 2), lam a function of the level alone
      np.testing.assert_allclose(s.out_coef[1:], -np.diff(sigma)[1:] * (1 + eta**2 / 2))
      np.testing.assert_allclose(
          s.lam[1:], (1 + eta**2 / 2) * (1 - sigma[1:-1]) / (eta**2 * sigma[1:-1]))
      first = s.x_coef[0], s.out_coef[0], s.std[0]
      assert first == pytest.approx((1 - eta**2 / 2, 1 - sigma[1], eta), abs=1e-12)


def test_printed_numbers_of_the_flow_sampler():
  """Flow-GRPO's chain of eight steps at eta 0.7; Flow-CPS' at 0.8; DanceGRPO's at 0.3."""
  s = make_sampler(FLOW, 8, kind="flow_sde", eta=0.7)
  np.testing.assert_allclose(s.std[[0, 4, 7]], [0.7, 0.2474874, 0.0935414], atol=5e-8)
  np.testing.assert_allclose(s.lam[[0, 3, 7]], [0.2551020, 1.524490, 17.78571], rtol=3e-7)
  np.testing.assert_allclose(s.rate[[0, 3, 7]], [0.1785714, 0.4870818, 1.663701], rtol=3e-7)
  s = make_sampler(FLOW, 8, kind="flow_sde", eta=0.7, shift=3.0)
  np.testing.assert_allclose(s.x_coef[[1, 4, 7]], [0.706, 0.895, 0.895], atol=1e-9)
  np.testing.assert_allclose(s.lam[[1, 4, 7]], [0.1209913, 0.8469388, 5.928571], rtol=4e-7)
  s = make_sampler(FLOW, 8, kind="cps", eta=0.8)
  rows = np.stack([s.x_coef, s.out_coef, s.std], 1)[[0, 4, 7]]
  np.testing.assert_allclose(rows, [
      [0.3953899, 0.125, 0.8321745], [0.7408814, 0.2545593, 0.3566462], [1, 0.125, 0]], atol=5e-8)
  s = make_sampler(FLOW, 8, kind="dance_sde", eta=0.3, shift=3.0)
  rows = np.stack([s.x_coef, s.out_coef, s.std], 1)[[0, 7]]
  np.testing.assert_allclose(rows, [
      [0.9979545, 0.0454545, 0.0639602], [0.955, 0.3315, 0.1643168]], atol=5e-8)


def test_the_last_step():
  """`ode` takes its noise away; `noisy` ends at the shifted level of 0.001, with some."""
  options = dict(kind="flow_sde", eta=0.7, shift=3.0)
  clean, ode, noisy = (make_sampler(FLOW, 8, final=final, **options)
                       for final in ("clean", "ode", "noisy"))
  np.testing.assert_array_equal(clean.std[:-1], ode.std[:-1])
  assert clean.std[-1] > 0 == ode.std[-1] and ode.sigma_next[-1] == clean.sigma_next[-1] == 0
  assert (ode.x_coef[-1], ode.out_coef[-1]) == pytest.approx((1.0, ode.sigma[-1]))
  assert noisy.sigma_next[-1] == pytest.approx(0.003 / 1.002) and np.all(noisy.std > 0)
  assert noisy.next_timesteps[-1] == pytest.approx(1000 * 0.003 / 1.002)
  ddim = make_sampler(FLOW, 8, final="noisy")
  assert np.all(ddim.std > 0) and make_sampler(FLOW, 8).std[-1] == 0


# ---- moments ------------------------------------------------------------------------------------


def propagated(schedule, sampler):
  """Mean and variance at the end of a chain from N(0, 1) noise, by the exact output of N(m, v)."""
  mean, var = 0.0, sampler.input_scale ** 2
  for k in range(sampler.steps):
    alpha, sigma = sampler.alpha[k], sampler.sigma[k]
    total = alpha**2 * VAR + sigma**2
    if schedule.is_flow:             # E[eps - x_0 | x]
      slope, offset = (sigma - alpha * VAR) / total, -MEAN - (sigma - alpha * VAR) / total * (
          alpha * MEAN)
    else:                            # E[eps | x]
      slope, offset = sigma / total, -sigma / total * alpha * MEAN
    gain = sampler.x_coef[k] - sampler.out_coef[k] * slope
    mean, var = (gain * mean - sampler.out_coef[k] * offset, gain**2 * var + sampler.std[k] ** 2)
  return mean, var


@pytest.mark.parametrize("options, expected", [
    (dict(steps=1000, eta=0.0), 0.498669), (dict(steps=1000, eta=0.0, shift=3.0), 0.497746),
    (dict(steps=200, eta=1.0), 0.485897), (dict(steps=200, eta=1.0, shift=3.0), 0.472798),
    (dict(steps=8, eta=0.0), 0.357550), (dict(steps=8, eta=0.0, shift=3.0), 0.279735),
    (dict(steps=8, kind="flow_sde", eta=0.7), 0.455376),
    (dict(steps=8, kind="flow_sde", eta=0.7, shift=3.0), 0.357500),
    (dict(steps=8, kind="dance_sde", eta=0.3), 0.371367),
    (dict(steps=8, kind="dance_sde", eta=1.0, shift=3.0), 0.421434),
    (dict(steps=8, eta=1.0), 0.285831), (dict(steps=8, kind="cps", eta=0.8), 0.243052),
    (dict(steps=8, kind="cps", eta=0.8, shift=3.0), 0.200705),
    (dict(steps=1000, kind="flow_sde", eta=0.7, shift=3.0), 0.500133),
    (dict(steps=1000, kind="cps", eta=0.8), 0.324843),       # which keeps no marginals
])
def test_moments_of_flow_chains(options, expected):
  """The mean is exact on every grid; variances to the last printed digit."""
  mean, var = propagated(FLOW, make_sampler(FLOW, **options))
  assert mean == pytest.approx(MEAN, abs=1e-9) and var == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind, eta, expected", [
    ("ddim", 0.0, 0.301654), ("flow_sde", 0.7, 0.373056), ("cps", 0.8, 0.210426)])
def test_moments_on_the_grid_of_sd3(kind, eta, expected):
  mean, var = propagated(SD3, make_sampler(SD3, 10, kind=kind, eta=eta, final="clean"))
  assert mean == pytest.approx(MEAN, abs=1e-9) and var == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind, eta, expected", [
    ("flow_sde", 0.7, 0.455376), ("cps", 0.8, 0.243052)])
def test_rollouts_of_a_flow_have_these_moments(kind, eta, expected):
  """20000 samples of the chain itself, 4.5 standard errors."""
  data = analytic.Mixture(np.ones(1), np.asarray([[MEAN]]), np.asarray([VAR]))
  models = analytic.make_models(
      data, analytic.linear_reward([1.0]), steps=8, schedule=FLOW, kind=kind, eta=eta)
  n = 20000
  x = np.asarray(jax.jit(lambda: models.rollout(
      None, models.frozen, analytic.make_batch(n), jax.random.key(2)).final)(), np.float64)
  assert abs(x.mean() - MEAN) < 4.5 * np.sqrt(expected / n)
  assert abs(x.var() - expected) < 4.5 * expected * np.sqrt(2 / n)


def test_one_unit_is_as_good_as_another():
  """The same network as eps, v, x_0 and u makes the same step, and the same score of a ratio."""
  s = {name: dataclasses.replace(analytic.SD_SCHEDULE, prediction=name)
       for name in ("epsilon", "v_prediction", "sample")}
  rng = np.random.default_rng(3)
  x, eps, other = rng.normal(size=(3, 5)).astype(np.float32)
  found = {}
  for name, schedule in s.items():
    sampler = make_sampler(schedule, 10, eta=0.6)
    k = 6
    alpha, sigma = sampler.alpha[k], sampler.sigma[k]
    out = {"epsilon": lambda e: e, "sample": lambda e: (x - sigma * e) / alpha,
           "v_prediction": lambda e: (e - sigma * x) / alpha}[name]
    found[name] = (sampler.x_coef[k] * x - sampler.out_coef[k] * out(eps),
                   sampler.lam[k] * (out(eps) - out(other)), sampler.clean(k, x, out(eps)))
    assert np.sign(sampler.lam[k]) == (-1 if name == "sample" else 1)
  for name in ("v_prediction", "sample"):
    for a, b in zip(found[name], found["epsilon"]):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# ---- where the network starts from noise alone --------------------------------------------------


SD2 = dict(_class_name="DDIMScheduler", num_train_timesteps=1000, beta_start=0.00085,
           beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
           rescale_betas_zero_snr=True, prediction_type="v_prediction",
           timestep_spacing="trailing", set_alpha_to_one=False)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr(prediction):
  """alpha 0 -> any: `mean = sigma' x - alpha' o` for v without noise; all of it finite."""
  schedule = Schedule.from_config({**SD2, "prediction_type": prediction})
  assert schedule.alphas[-1] == 0 and schedule.sigmas[-1] == 1
  assert schedule.alphas[0] == pytest.approx(np.sqrt(1 - 0.00085))
  s = make_sampler(schedule, 10, eta=0.0)
  assert s.timesteps[0] == 999
  if prediction == "v_prediction":
    assert (s.x_coef[0], s.out_coef[0]) == pytest.approx((s.sigma_next[0], s.alpha_next[0]))
  for eta in (0.0, 1.0):
    s = make_sampler(schedule, 10, eta=eta)
    assert all(np.isfinite(getattr(s, name)).all() for name in ("x_coef", "out_coef", "std"))
  x, out = jnp.ones((2, 3)), 0.3 * jnp.ones((2, 3))
  for estimate in (schedule.to_x0(out, x, 999), schedule.to_eps(out, x, 999)):
    assert np.isfinite(estimate).all()


def test_zero_terminal_snr_matches_pytorch():
  diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
  theirs = diffusers.DDIMScheduler.from_config(SD2)
  theirs.set_timesteps(10)
  schedule = Schedule.from_config(SD2)
  sampler = make_sampler(schedule, 10, eta=0.0)
  np.testing.assert_array_equal(sampler.timesteps, theirs.timesteps.numpy())
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 5)).astype(np.float32)
  for k, t in enumerate(theirs.timesteps):
    out = rng.normal(size=x.shape).astype(np.float32)
    after = theirs.step(torch.tensor(out), t, torch.tensor(x), eta=0.0).prev_sample.numpy()
    np.testing.assert_allclose(sampler.mean(k, x, out), after, atol=2e-5)
    x = after


# ---- FlowMatchEulerDiscreteScheduler ------------------------------------------------------------


def test_levels_of_sd3():
  """Training levels, and four steps of its scheduler: the small end is shifted twice."""
  np.testing.assert_allclose(SD3.times[[1000, 999, 501, 1]] / 1000,
                             [1, 0.99966639, 0.75074929, 0.0029940120], atol=5e-9)
  s = make_sampler(SD3, 4, eta=0.0)
  np.testing.assert_allclose(np.append(s.sigma, s.sigma_next[-1]),
                             [1, 0.8576923, 0.60215056, 0.0089285718, 0], atol=3e-8)
  np.testing.assert_allclose(s.timesteps[-1], 8.9285717, atol=3e-6)
  assert make_sampler(SD3, 1, eta=0.0).sigma.tolist() == [1.0]


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_euler_matches_pytorch(steps):
  diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
  theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
  theirs.set_timesteps(steps)
  s = make_sampler(SD3, steps, eta=0.0)
  np.testing.assert_allclose(s.timesteps, theirs.timesteps.numpy(), rtol=3e-7)
  x = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
  for k, t in enumerate(theirs.timesteps):
    out = np.random.default_rng(k).normal(size=x.shape).astype(np.float32)
    after = theirs.step(torch.tensor(out), t, torch.tensor(x)).prev_sample.numpy()
    np.testing.assert_allclose(s.mean(k, x, out), after, atol=1e-6)
    x = after


@pytest.mark.parametrize("key, value", [
    ("use_dynamic_shifting", True), ("invert_sigmas", True), ("shift_terminal", 0.02),
    ("use_karras_sigmas", True), ("use_exponential_sigmas", True), ("use_beta_sigmas", True),
    ("stochastic_sampling", True), ("shift", 0.0), ("num_train_timesteps", 500)])
def test_what_a_flow_cannot_honour_is_refused_by_name(key, value):
  with pytest.raises(UserError, match=rf"scheduler_config\.json: {key}"):
    Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", key: value})


def test_other_schedulers_of_flows_are_refused():
  with pytest.raises(UserError, match="FlowMatchHeunDiscreteScheduler"):
    Schedule.from_config({"_class_name": "FlowMatchHeunDiscreteScheduler"})
  with pytest.raises(UserError, match="DPMSolverMultistepScheduler"):
    Schedule.from_config({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True})


@pytest.mark.parametrize("schedule, options, message", [
    (FLOW, dict(kind="ddpm"), "sample.kind='ddpm' is for variance-preserving"),
    (FLOW, dict(spacing="leading"), "sample.spacing='leading'"),
    (FLOW, dict(kind="cps", eta=1.5), "sample.eta=1.5"),
    (Schedule.flow(spacing="shifted_twice"), dict(final="noisy"), "sample.final='noisy' ends at"),
    (analytic.SD_SCHEDULE, dict(kind="flow_sde"), "sample.kind='flow_sde' is for flow"),
    (analytic.SD_SCHEDULE, dict(kind="cps"), "sample.kind='cps' is for flow"),
    (analytic.SD_SCHEDULE, dict(shift=3.0), "sample.shift=3.0 is for flow"),
    (analytic.SD_SCHEDULE, dict(spacing="shifted_twice"), "sample.spacing='shifted_twice'"),
])
def test_what_belongs_to_the_other_path_is_refused(schedule, options, message):
  with pytest.raises(UserError, match=message):
    make_sampler(schedule, 8, **options)


def test_times_of_training():
  """Logit-normal, then shifted: the median is the shifted half; uniform whole times otherwise."""
  t = np.asarray(SD3.draw_t(jax.random.key(0), (40000,)), np.float64) / 1000
  u = t / (3 - 2 * t)                              # shifted back
  z = np.log(u / (1 - u))
  assert abs(z.mean()) < 4.5 / 200 and abs(z.var() - 1) < 4.5 * np.sqrt(2 / 40000)
  t = np.asarray(analytic.SD_SCHEDULE.draw_t(jax.random.key(0), (40000,)))
  assert np.all(t == np.round(t)) and t.min() == 0 and t.max() == 999
  assert abs(t.mean() - 499.5) < 4.5 * 288.7 / 200


@pytest.mark.parametrize("timestep", [1000, 750])
def test_one_step_students_of_flows(timestep):
  """`x - sigma u`; the checkpoint may name the time."""
  s = make_sampler(FLOW, 1, kind="one_step", timestep=timestep)
  sigma = timestep / 1000
  assert (s.timesteps[0], s.x_coef[0], s.out_coef[0]) == pytest.approx((timestep, 1.0, sigma))
  named = Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler",
                                "one_step_timestep": timestep})
  assert make_sampler(named, 1, kind="one_step").sigma[0] == pytest.approx(sigma)
  with pytest.raises(UserError, match="one-step generator"):
    make_sampler(named, 4)


# ---- the second-order multistep sampler ---------------------------------------------------------


def dpm2_by_hand(schedule, sampler, output_of, x):
  """DPM-Solver++(2M) in f64, by its own equations in log-SNR and clean estimates."""
  levels = list(zip(sampler.alpha, sampler.sigma)) + [
      (sampler.alpha_next[-1], sampler.sigma_next[-1])]
  clean_before, h_before = None, None
  for k, ((a, s), (a2, s2)) in enumerate(zip(levels[:-1], levels[1:])):
    out = output_of(k, x)
    clean = {"flow": lambda: x - s * out, "epsilon": lambda: (x - s * out) / a}[
        schedule.prediction]()
    with np.errstate(divide="ignore"):
      h = (np.log(a2) - np.log(s2)) - (np.log(a) - np.log(s))
    d = clean
    if clean_before is not None and np.isfinite(h) and np.isfinite(h_before):
      d = clean + (clean - clean_before) * h / h_before / 2
    x = s2 / s * x - a2 * np.expm1(-h) * d
    clean_before, h_before = clean, h
  return x


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_dpm2(path):
  """Against its own equations, through `rollout`, `differentiable_rollout` and `replay`."""
  data = analytic.Mixture(np.ones(1), np.asarray([[MEAN]]), np.asarray([VAR]))
  schedule = analytic.PATHS[path]["schedule"]
  models = analytic.make_models(
      data, analytic.linear_reward([1.0]), steps=7, schedule=schedule, kind="dpm2", final="clean")
  s, base = models.sampler, models.combine(None, models.frozen["base"])
  assert s.second_order and not s.std.any() and s.correction[0] == s.correction[-1] == 0
  slope, offset = analytic.gaussian_line(schedule, s.alpha, s.sigma, MEAN, VAR)
  output = guided_output(models.denoise, 1.0)
  whole = rollout(output, base, s, NOTHING, jax.random.key(0), jnp.arange(5), (1,))
  expected = dpm2_by_hand(schedule, s, lambda k, x: slope[k] * x + offset[k],
                          np.asarray(whole.latents[0], np.float64))
  np.testing.assert_allclose(whole.final, expected, atol=3e-5)
  final, _ = differentiable_rollout(output, base, s, NOTHING, whole.latents[0], whole.noise)
  np.testing.assert_allclose(final, whole.final, atol=1e-5)
  if path == "flow":    # even levels: nearer to where the ODE ends than as many steps of Euler's
    ode = MEAN + np.sqrt(VAR) * np.asarray(whole.latents[0], np.float64)
    euler = make_sampler(schedule, 7, eta=0.0, final="clean")
    first = rollout(output, base, euler, NOTHING, jax.random.key(0), jnp.arange(5), (1,)).final
    error = lambda x: np.abs(np.asarray(x) - ode).max()
    assert error(whole.final) < 0.6 * error(first)

  params = jax.tree.map(lambda a: a + 0.1, models.init_policy(None, None))
  of_policy = lambda params, x, t, fixed: models.output(params, fixed, x, t, NOTHING)
  fixed = {"base": models.frozen["base"]}
  for last in (7, 4):        # a chain that starts later has no estimate before its first step
    run = rollout(of_policy, params, s, fixed, jax.random.key(0), jnp.arange(5), (1,),
                  start=7 - last)
    latents = run.latents[7 - last:]
    plain = jax.grad(lambda p: jnp.sin(differentiable_rollout(
        of_policy, p, s, fixed, latents[0], jnp.zeros((last, 5, 1)), start=7 - last)[0]).sum())
    again = jax.grad(lambda p: jnp.sin(replay(
        of_policy, s, p, fixed, latents, jnp.ones(last, bool))).sum())
    for a, b in zip(jax.tree.leaves(plain(params)), jax.tree.leaves(again(params))):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_dpm2_matches_pytorch():
  """DPMSolverMultistepScheduler with flow sigmas of our own grid, and on the SD schedule."""
  diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
  config = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012,
                beta_schedule="scaled_linear", algorithm_type="dpmsolver++", solver_order=2,
                timestep_spacing="trailing", final_sigmas_type="zero")
  theirs = diffusers.DPMSolverMultistepScheduler.from_config(config)
  theirs.set_timesteps(12)
  schedule = dataclasses.replace(analytic.SD_SCHEDULE, spacing="trailing", final="clean")
  s = make_sampler(schedule, 12, kind="dpm2")
  np.testing.assert_array_equal(s.timesteps, theirs.timesteps.numpy())
  data = np.random.default_rng(5)
  x = data.normal(size=(3, 4)).astype(np.float32)
  noise = data.normal(size=(12, 3, 4)).astype(np.float32)
  y = torch.tensor(x)
  for k, t in enumerate(theirs.timesteps):
    y = theirs.step(torch.tensor(noise[k]), t, y).prev_sample
  fixed = jnp.asarray(noise)
  times = jnp.asarray(s.timesteps, jnp.float32)
  output = lambda params, x, t, cond: fixed[jnp.argmax(times == t)]
  ours, _ = differentiable_rollout(output, None, s, None, jnp.asarray(x), jnp.zeros((12, 3, 4)))
  np.testing.assert_allclose(ours, y.numpy(), rtol=2e-4, atol=2e-4)
