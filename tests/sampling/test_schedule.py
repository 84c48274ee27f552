"""Schedules and transition tables: tables of the method spec, scipy, and PyTorch parity."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxalign.errors import UserError
from jaxalign.sampling import Schedule, make_sampler
from jaxalign.sampling.schedule import PREDICTIONS
from jaxalign.testing.analytic import SD_SCHEDULE

FLOW = Schedule.flow()
TRAINED = PREDICTIONS[:3]     # of variance-preserving schedules

SD_CONFIG = dict(
  _class_name="DDIMScheduler",
  num_train_timesteps=1000,
  beta_start=0.00085,
  beta_end=0.012,
  beta_schedule="scaled_linear",
  clip_sample=False,
)


def test_stable_diffusion_table():
  """lam_k and std_k of the 50-step sampler as printed in the reference, and their closed forms."""
  sampler = make_sampler(SD_SCHEDULE, 50)
  expected = {
    981: (1.128, 0.454),
    781: (1.121, 0.391),
    581: (1.200, 0.323),
    381: (1.493, 0.252),
    181: (2.53, 0.177),
    81: (4.84, 0.132),
    21: (82.9, 0.0395),
    1: (48.6, 0.0207),
  }
  np.testing.assert_array_equal(sampler.timesteps, np.arange(981, 0, -20))
  np.testing.assert_array_equal(sampler.next_timesteps, np.append(np.arange(961, 0, -20), 0))
  for t, (lam, std) in expected.items():
    k = int(np.flatnonzero(sampler.timesteps == t)[0])
    # One unit of the last printed digit.
    assert sampler.lam[k] == pytest.approx(lam, abs=10.0 ** -len(str(lam).split(".")[1]))
    assert sampler.std[k] == pytest.approx(std, abs=1e-3 if std > 0.1 else 1e-4)
  assert sampler.alpha_next[-1] ** 2 == pytest.approx(0.99915, abs=1e-8)
  # Closed forms of the eta = 1 transition.
  abar, abar_next = sampler.alpha**2, sampler.alpha_next**2
  alpha = abar / abar_next
  np.testing.assert_allclose(sampler.x_coef, alpha**-0.5, rtol=1e-12)
  np.testing.assert_allclose(
    sampler.std**2, (1 - abar_next) / (1 - abar) * (1 - alpha), rtol=1e-12
  )
  np.testing.assert_allclose(
    sampler.lam, np.sqrt(1 - abar) / np.sqrt(alpha) / (1 - abar_next), rtol=1e-9
  )


def test_chain_of_a_gaussian_keeps_the_marginals_in_the_limit():
  """1000 steps of the exact score of N(0.7, 0.5) end at the marginal of abar_0 within 1 %."""
  sampler = make_sampler(SD_SCHEDULE, 1000, spacing="trailing")
  mean, var = 0.0, 1.0
  for k in range(999):
    slope = sampler.sigma[k] / (sampler.alpha[k] ** 2 * 0.5 + sampler.sigma[k] ** 2)
    gain = sampler.x_coef[k] - sampler.out_coef[k] * slope
    mean = gain * mean + sampler.out_coef[k] * slope * sampler.alpha[k] * 0.7
    var = gain**2 * var + sampler.std[k] ** 2
  assert mean == pytest.approx(0.7, rel=0.01) and var == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("final", ["noisy", "clean"])
def test_transition_has_the_marginal_of_the_next_level(eta, final):
  """With the true eps, `x_{k+1} = sqrt(abar') x_0 + sqrt(1 - abar') eps'`: what defines DDIM."""
  s = make_sampler(SD_SCHEDULE, 20, eta=eta, final=final)
  np.testing.assert_allclose(s.x_coef * s.alpha, s.alpha_next, rtol=1e-12)
  noise = s.x_coef * s.sigma - s.out_coef
  np.testing.assert_allclose(noise**2 + s.std**2, s.sigma_next**2, atol=1e-12)
  assert np.all(np.isinf(s.lam) == (s.std == 0))
  assert (s.std == 0).sum() == (20 if eta == 0 else final == "clean")


def test_log_prob_matches_scipy():
  sampler = make_sampler(SD_SCHEDULE, 10)
  rng = np.random.default_rng(0)
  k = np.asarray([0, 4, 9, 9])
  mean = rng.normal(size=(4, 3, 2)).astype(np.float32)
  x = (mean + sampler.std[k][:, None, None] * rng.normal(size=(4, 3, 2))).astype(np.float32)
  expected = scipy.stats.norm.logpdf(
    x.astype(np.float64), mean.astype(np.float64), sampler.std[k][:, None, None]
  ).sum((1, 2))
  np.testing.assert_allclose(
    sampler.log_prob(jnp.asarray(k), x, mean), expected, rtol=2e-5, atol=1e-4
  )
  for row, step in enumerate(k):
    np.testing.assert_allclose(
      sampler.log_prob(int(step), x, mean)[row], expected[row], rtol=2e-5, atol=1e-4
    )


def test_log_prob_is_zero_where_deterministic():
  sampler = make_sampler(SD_SCHEDULE, 10, final="clean")
  x = jnp.ones((2, 3))
  assert np.all(np.asarray(sampler.log_prob(9, x, x)) == 0)
  grad = jax.grad(lambda m: sampler.log_prob(9, x, m).sum())(x + 1)
  assert np.all(np.asarray(grad) == 0)


def network_output(prediction, x_0, eps, alpha, sigma):
  """The table of outputs, written down again."""
  return {"epsilon": eps, "sample": x_0, "v_prediction": alpha * eps - sigma * x_0,
          "flow": eps - x_0}[prediction]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_estimates_from_the_output(prediction):
  """Clean and noise estimates of a perfect output, and its target; also between whole times."""
  schedule = FLOW if prediction == "flow" else dataclasses.replace(
      SD_SCHEDULE, prediction=prediction)
  rng = np.random.default_rng(1)
  x_0, eps = rng.normal(size=(2, 4, 5)).astype(np.float32)
  t = np.asarray([20, 500, 999, 321.5], np.float32)
  alpha, sigma = (np.interp(t, np.arange(len(a)), a)[:, None]
                  for a in (schedule.alphas, schedule.sigmas))
  for got, expected in zip(schedule.levels(t), (alpha, sigma)):
    np.testing.assert_allclose(got, expected[:, 0], rtol=2e-6)
  x_t = schedule.add_noise(x_0, eps, t)
  np.testing.assert_allclose(x_t, alpha * x_0 + sigma * eps, atol=1e-6)
  truth = network_output(prediction, x_0, eps, alpha, sigma)
  np.testing.assert_allclose(schedule.target(x_0, eps, t), truth, atol=1e-6)
  out = jnp.asarray(truth, jnp.float32)
  # v's rotation undoes the noising on the unit circle, which chords between whole times leave.
  # eps: x_0 is recovered at alpha_999 = 0.07, where rounding is amplified 15 times.
  np.testing.assert_allclose(schedule.to_eps(out, x_t, t), eps, atol=1e-5)
  np.testing.assert_allclose(schedule.to_x0(out, x_t, t), x_0, atol=1e-5)


def parity(torch_scheduler, config, kind, prediction, steps, eta, step_options, sampler_options):
  """Runs one trajectory through PyTorch and checks each of our steps from PyTorch's own x_k."""
  torch = pytest.importorskip("torch")
  scheduler = torch_scheduler.from_config(config)
  scheduler.set_timesteps(steps)
  schedule = Schedule.from_config(config)
  sampler = make_sampler(schedule, steps, kind=kind, eta=eta, **sampler_options)
  np.testing.assert_array_equal(sampler.timesteps, scheduler.timesteps.numpy())
  rng = np.random.default_rng(2)
  x = rng.normal(size=(2, 3, 4)).astype(np.float32)
  for k, t in enumerate(sampler.timesteps):
    # A prediction as a network makes it: eps of unit size, in the network's own parametrisation.
    eps = rng.normal(size=x.shape).astype(np.float32)
    alpha, sigma = schedule.alphas[int(t)], schedule.sigmas[int(t)]
    out = {"epsilon": eps, "sample": (x - sigma * eps) / alpha,
           "v_prediction": (eps - sigma * x) / alpha}[prediction].astype(np.float32)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(k))
    expected = scheduler.step(
      torch.tensor(out), torch.tensor(int(t)), torch.tensor(x), **step_options(k, noise)
    ).prev_sample.numpy()
    ours = (
      sampler.mean(k, x, out) + sampler.at("std", k) * noise.numpy()
    )
    np.testing.assert_allclose(ours, expected, atol=1e-5, err_msg=f"step {k}, t={t}")
    x = expected / max(1.0, np.abs(expected).std())


@pytest.mark.parametrize("alpha_one", [False, True])
@pytest.mark.parametrize("prediction", TRAINED)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
  "spacing, offset, steps", [("leading", 1, 50), ("leading", 0, 7), ("trailing", 0, 20)]
)
def test_ddim_parity(spacing, offset, steps, eta, prediction, alpha_one):
  diffusers = pytest.importorskip("diffusers")
  torch = pytest.importorskip("torch")
  config = dict(
    SD_CONFIG,
    timestep_spacing=spacing,
    steps_offset=offset,
    prediction_type=prediction,
    set_alpha_to_one=alpha_one,
  )
  parity(
    diffusers.DDIMScheduler,
    config,
    "ddim",
    prediction,
    steps,
    eta,
    lambda k, noise: dict(eta=eta, variance_noise=torch.as_tensor(noise)) if eta else {},
    {},
  )


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("prediction", TRAINED)
@pytest.mark.parametrize(
  "spacing, offset, steps", [("leading", 1, 50), ("leading", 0, 10), ("trailing", 0, 7)]
)
def test_ddpm_parity(spacing, offset, steps, prediction, variance):
  """The PyTorch scheduler always ends at abar = 1, and adds no noise at t = 0."""
  diffusers = pytest.importorskip("diffusers")
  torch = pytest.importorskip("torch")
  config = dict(
    SD_CONFIG,
    timestep_spacing=spacing,
    steps_offset=offset,
    prediction_type=prediction,
    variance_type=f"fixed_{variance}",
  )
  parity(
    diffusers.DDPMScheduler,
    config,
    "ddpm",
    prediction,
    steps,
    0.0,
    lambda k, noise: dict(generator=torch.Generator().manual_seed(k)),
    dict(final="clean", variance=variance),
  )


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 30, 50, 1000])
def test_timesteps_match_pytorch(spacing, steps):
  diffusers = pytest.importorskip("diffusers")
  scheduler = diffusers.DDIMScheduler.from_config(
    dict(SD_CONFIG, timestep_spacing=spacing, steps_offset=0)
  )
  scheduler.set_timesteps(steps)
  sampler = make_sampler(
    dataclasses.replace(SD_SCHEDULE, steps_offset=0), steps, spacing=spacing
  )
  np.testing.assert_array_equal(sampler.timesteps, scheduler.timesteps.numpy())


def test_ddpm_small_equals_ddim_eta_one():
  a, b = (make_sampler(SD_SCHEDULE, 25, kind=kind, eta=1.0) for kind in ("ddpm", "ddim"))
  for name in ("x_coef", "out_coef", "std", "lam"):
    np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_from_config_reads_the_conventions():
  schedule = Schedule.from_config(dict(SD_CONFIG, steps_offset=1, set_alpha_to_one=False))
  np.testing.assert_allclose(schedule.alphas, SD_SCHEDULE.alphas, rtol=1e-12)
  assert (schedule.prediction, schedule.steps_offset, schedule.spacing, schedule.final) == (
    "epsilon",
    1,
    "leading",
    "noisy",
  )
  linear = Schedule.from_config(dict(
    _class_name="PNDMScheduler", beta_start=1e-4, beta_end=0.02, beta_schedule="linear"))
  assert linear.final == "clean" and linear.steps_offset == 0
  assert linear.alphas[0] ** 2 == pytest.approx(1 - 1e-4)
  trained = Schedule.from_config({"_class_name": "FlaxDDIMScheduler", "trained_betas": [0.1, 0.2]})
  np.testing.assert_allclose(trained.alphas**2, [0.9, 0.72])


@pytest.mark.parametrize(
  "config, word",
  [
    (dict(beta_schedule="squaredcos_cap_v2"), "beta_schedule"),
    (dict(prediction_type="flow"), "prediction_type"),
    (dict(rescale_betas_zero_snr=True), "prediction_type='epsilon'"),
    (dict(thresholding=True), "thresholding"),
    (dict(clip_sample=True), "clip_sample"),
    (dict(_class_name="EDMEulerScheduler"), "_class_name='EDMEulerScheduler' is not supported"),
    (dict(_class_name="EDMDPMSolverMultistepScheduler"), "_class_name='EDMDPMSolver"),
    (dict(_class_name=None), "_class_name='None'"),
    (dict(beta_start=None), "beta_start of DDIMScheduler missing, and not guessed"),
    (dict(beta_end=None, beta_schedule=None), "beta_end, beta_schedule of DDIM"),
    (dict(beta_start="a"), "beta_start='a'"),
    (dict(beta_end=float("nan")), "beta_end=nan"),
    (dict(num_train_timesteps=10**9), "num_train_timesteps=1000000000"),
    (dict(trained_betas=[0.1, 2.0]), "trained_betas"),
    (dict(trained_betas="abc"), "trained_betas"),
    (dict(timestep_type="continuous"), "timestep_type='continuous'"),
  ],
)
def test_from_config_refuses_what_it_cannot_honour(config, word):
  with pytest.raises(UserError, match=f"scheduler_config.json: .*{word}"):
    Schedule.from_config({**SD_CONFIG, **config})


@pytest.mark.parametrize(
  "options, key",
  [
    (dict(steps=0), "sample.steps"),
    (dict(steps=1001), "sample.steps"),
    (dict(steps=10, eta=1.5), "sample.eta"),
    (dict(steps=10, eta=-0.1), "sample.eta"),
    (dict(steps=10, kind="euler"), "sample.kind"),
    (dict(steps=10, spacing="x"), "sample.spacing"),
    (dict(steps=10, final="zero"), "sample.final"),
    (dict(steps=10, kind="ddpm", variance="learned"), "sample.variance"),
  ],
)
def test_bad_sampler_options_name_their_key(options, key):
  with pytest.raises(UserError, match=key):
    make_sampler(SD_SCHEDULE, **options)
