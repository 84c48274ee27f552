"""MaPO, Diffusion-DPO and SFT against tables computed in extended precision, and on Gaussian data.

With data N(0, 1) and a policy that moves the mean by delta, `o_theta - o_ref = -c_t delta`, and the
residual of a perfect network is `-c_t x_0` and noise. `c_t = alpha sigma` for noise estimates, and
`sigma / (alpha^2 + sigma^2)` on a flow. So optima of the losses follow from one-dimensional
integrals.
"""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.config.registry import load_method
from jaxalign.config.schema import OptimConfig
from jaxalign.errors import UserError
from jaxalign.methods import FlowNet
from jaxalign.methods.diffusion_dpo import Config as DPOConfig
from jaxalign.methods.diffusion_dpo import dpo_loss
from jaxalign.methods.mapo import PRESETS, log_phi, mapo_loss, phi
from jaxalign.methods.mapo import Config as MaPOConfig
from jaxalign.methods.sft import Config as SFTConfig
from jaxalign.methods.shared import preference
from jaxalign.methods.shared.preference import denoising_errors, draw
from jaxalign.models.stable_diffusion_xl import StableDiffusionXLPipeline
from jaxalign.sampling import Schedule
from jaxalign.sampling.schedule import PREDICTIONS
from jaxalign.testing import analytic

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(5)
CODE = MaPOConfig()
ONE = jnp.ones(1)
DATA = analytic.Mixture(np.ones(1), np.zeros((1, 1)), np.ones(1))


LINEAR = Schedule.variance_preserving(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))    # of DDPM


def world(schedule=analytic.SD_SCHEDULE):
  """Models of N(0, 1) whose policy `{"delta": []}` is its mean."""
  def apply(params, x, t, cond):
    alpha, sigma = schedule.levels(jnp.broadcast_to(t, x.shape[:1]))
    c = sigma / (alpha**2 + sigma**2) if schedule.is_flow else alpha * sigma
    return -params["delta"] * c[:, None]
  policy = FlowNet(lambda key: {"delta": jnp.zeros(())}, apply)
  return analytic.make_models(DATA, analytic.linear_reward([1.0]), steps=4, policy=policy,
                              schedule=schedule)


# ---- the link -----------------------------------------------------------------------------------


@pytest.mark.parametrize("u, value, slope", [
    (0.0, 1.0, -0.5), (0.05, 0.9752083247, -0.4916673610), (0.1, 0.9508331945, -0.4833388869),
    (0.5, 0.7707470413, -0.4173549620), (1.0, 0.5819767069, -0.3386968873),
    (2.0, 0.3130352855, -0.2055131877), (5.0, 0.03391827453, -0.02736470949),
    (10.0, 4.540199101e-4, -4.086385325e-4)])
def test_phi(u, value, slope):
  found, gradient = jax.value_and_grad(phi)(u)
  np.testing.assert_allclose([found, gradient], [value, slope], rtol=1e-5)
  np.testing.assert_allclose(log_phi(u), math.log(value), atol=1e-6)


def test_phi_is_smooth_and_finite():
  """f64 formulas with expm1 where they are sound; across the joint at 0.2; up to 1e30."""
  u = np.concatenate([np.geomspace(1e-3, 60, 4001), [0.2 - 1e-6, 0.2, 0.2 + 1e-6]])
  u = u.astype(np.float32).astype(np.float64)
  exact = u / np.expm1(u)
  slope = exact * (1 - u - exact) / u
  found, gradient = jax.vmap(jax.value_and_grad(phi))(jnp.asarray(u, jnp.float32))
  np.testing.assert_allclose(found, exact, rtol=1e-5)
  # The f64 slope itself loses six digits at 1e-3 and more.
  np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=2e-6)
  for function in (phi, log_phi):
    huge = jax.vmap(jax.value_and_grad(function))(jnp.asarray([0, 1e-30, 79, 88, 89, 1e4, 1e30]))
    assert np.isfinite(huge).all()


# ---- MaPO ---------------------------------------------------------------------------------------


def both(cfg, error_w, error_l):
  """Loss, margin, and gradient to both errors, of a single pair."""
  def total(errors):
    value, metrics = mapo_loss(errors[:1], errors[1:], ONE, cfg=cfg)
    return value, metrics["train/margin"]
  (value, margin), gradient = jax.value_and_grad(total, has_aux=True)(
      jnp.asarray([error_w, error_l], jnp.float32))
  return float(margin), float(value), *map(float, gradient)


@pytest.mark.parametrize("errors, margin, value, grad_w, grad_l", [
    ((0.1, 0.1), 0, 0.169314718, 13.291684, -12.291684),
    ((0.1, 0.11), 2.45625403, 0.108227614, 2.94165354, -1.93836352),
    ((0.11, 0.1), -2.45625403, 0.363853017, 23.6033494, -22.6417145),
    ((0.1, 0.2), 24.3751302, 0.1, 1.0, -6.27e-10),
    ((0.2, 0.1), -24.3751302, 2.63751302, 25.1669443, -24.5833681),
    ((1.0, 1.0), 0, 1.06931472, 11.433874, -10.433874),
    ((0.1, 1000.0), 975.208325, 0.1, 1.0, 0.0),
    ((0.0, 0.0), 0, 0.0693147, 13.5, -12.5),
    ((1e-4, 2e-4), None, 0.0681709, 13.3433, -12.3431),
    ((0.05, 0.0), -12.448, 1.29479, None, -25.0)])
def test_mapo_code_table(errors, margin, value, grad_w, grad_l):
  """phi is near one, where f32 has steps of 6e-8; T = 1000 of that is 6e-5 in the margin."""
  found = both(CODE, *errors)
  for got, expected, rtol in zip(found, (margin, value, grad_w, grad_l), (1e-4, 2e-5, 2e-4, 2e-4)):
    if expected is not None:
      atol = 1e-4 if expected == margin else 1e-11
      assert got == pytest.approx(expected, rel=2e-3 if abs(got) < 1e-6 else rtol, abs=atol)


@pytest.mark.parametrize("errors", [(200.0, 0.1), (300.0, 300.0), (1e30, 0.1), (0.1, 1e30)])
@pytest.mark.parametrize("name", PRESETS)
def test_mapo_never_gives_nan(name, errors):
  found = both(MaPOConfig(**PRESETS[name]), *errors)
  assert np.isfinite(found).all() and found[1] >= 0


@pytest.mark.parametrize("link, beta, value, grad_w, grad_l", [
    ("power", 8, 0.1866434, 1.169806, -0.169806), ("power", 64, 0.1108304, 1.010088, -0.010088),
    ("power", 1024, 0.1006769, 1.0, 0.0), ("scaled", 8, 0.1866434, 1.241669, -0.241669),
    ("scaled", 64, 0.1108304, 1.241669, -0.241669), ("scaled", 1024, 0.1006769, 1.241669, -0.241669)
])
def test_mapo_paper_forms(link, beta, value, grad_w, grad_l):
  cfg = MaPOConfig(link=link, logit_scale=1.0, error_scale=1.0, weight=1 / beta, beta=float(beta))
  np.testing.assert_allclose(both(cfg, 0.1, 0.1)[1:], (value, grad_w, grad_l), rtol=1e-5, atol=1e-6)


def test_mapo_symmetries():
  error = jnp.asarray([[0.1, 0.12], [0.3, 0.2], [0.05, 0.06]])
  value = lambda w, l, cfg=CODE, label=1.0: mapo_loss(w, l, jnp.full(3, label), cfg=cfg)[0]
  w, l = error.T
  order = jnp.asarray([2, 0, 1])
  np.testing.assert_allclose(value(w[order], l[order]), value(w, l), rtol=1e-6)
  assert abs(value(w, l[order]) - value(w, l)) > 1e-3
  np.testing.assert_allclose(mapo_loss(l, w, jnp.ones(3), cfg=CODE)[1]["train/margin"],
                             -mapo_loss(w, l, jnp.ones(3), cfg=CODE)[1]["train/margin"], rtol=1e-6)
  sft = dataclasses.replace(CODE, weight=0.0)
  np.testing.assert_allclose(value(w, l, sft), w.mean(), rtol=1e-6)
  # A tie is the mean of both answers.
  np.testing.assert_allclose(value(w, l, label=0.5), (value(w, l) + value(l, w)) / 2, rtol=1e-5)
  equal, metrics = mapo_loss(w, w, jnp.ones(3), cfg=CODE)
  np.testing.assert_allclose(equal, w.mean() + 0.1 * math.log(2), rtol=1e-6)
  assert metrics["train/margin_accuracy"] == 0.5


# ---- Diffusion-DPO ------------------------------------------------------------------------------


def test_dpo_at_the_reference():
  error = jnp.asarray([[0.1, 0.2], [0.3, 0.1]])
  total = lambda e: dpo_loss(*(e - error).T, jnp.ones(2), beta=5000.0)
  (value, metrics), gradient = jax.value_and_grad(total, has_aux=True)(error)
  assert float(value) == pytest.approx(math.log(2), rel=1e-6)
  assert metrics["train/margin_accuracy"] == 0.5
  np.testing.assert_allclose(gradient, [[1250 / 2, -1250 / 2]] * 2, rtol=1e-6)    # mean over two


def test_dpo_by_hand():
  value = lambda w, l, ref=(0.1, 0.1), beta=5000.0: float(dpo_loss(
      *(jnp.full(1, v, jnp.float32) - r for v, r in zip((w, l), ref)), ONE, beta=beta)[0])
  # 1e-3 at 0.1 is exact to 1e-5 in f32.
  assert value(0.099, 0.1) == pytest.approx(0.0788897, rel=1e-4)
  assert value(0.099, 0.1, beta=1e-9) == pytest.approx(math.log(2), rel=1e-6)
  # What both networks find hard cancels; in MaPO, without a reference, it does not.
  assert value(0.599, 0.1, ref=(0.6, 0.1)) == pytest.approx(0.0788897, rel=1e-3)
  assert abs(both(CODE, 0.599, 0.1)[0] - both(CODE, 0.099, 0.1)[0]) > 10


def test_dpo_keeps_the_digits_of_a_small_change():
  """Of errors of 100 f32 knows 4e-6, 0.01 nats at this beta; of their change, 1e-7 of itself."""
  models = dataclasses.replace(
      world(analytic.FLOW_SCHEDULE), combine=lambda policy, base: policy,
      denoise=lambda policy, x, t, cond: 10.0 + 0 * x + (policy["delta"] if policy else 0.0))
  latents = np.random.default_rng(0).standard_normal((1, 2, 64)).astype(np.float32)
  latents[:, 0] += 1
  rows = {"latents": jnp.asarray(latents), "noise": jnp.zeros((1, 1, 64)), "t": jnp.zeros(1),
          "cond": {}, "origin": jnp.zeros((1, 1, 4)), "label": ONE}
  delta = 2.0 ** -10
  margin = -5000 * delta * np.subtract(*latents[0].astype(np.float64).mean(-1))
  _, metrics = preference.loss(
      models, DPOConfig(beta=5000.0), {"delta": delta}, models.frozen, rows)
  assert margin < -4 and float(metrics["train/margin"]) == pytest.approx(margin, abs=1e-4)
  np.testing.assert_allclose(
      metrics["train/ref_error_w"], np.square(10 + latents[0, 0]).mean(), rtol=1e-6)


# ---- optima on Gaussian data --------------------------------------------------------------------


def normal_nodes(n):
  nodes, weights = np.polynomial.hermite_e.hermegauss(n)
  return nodes, weights / weights.sum()


def stationary(total, low, high):
  """The root of an increasing derivative, by bisection."""
  slope = jax.jit(jax.grad(total))
  for _ in range(22):
    middle = (low + high) / 2
    low, high = (low, middle) if slope(jnp.float32(middle)) > 0 else (middle, high)
  return (low + high) / 2


def dpo_optimum(a, latents, noise, t, weights, schedule=analytic.SD_SCHEDULE):
  models = world(schedule)
  rows = {"latents": jnp.asarray(latents, jnp.float32)[..., None], "t": jnp.asarray(t),
          "noise": jnp.asarray(noise, jnp.float32)[..., None], "cond": {},
          "origin": jnp.zeros((1, 1, 4))}
  label = jax.nn.sigmoid(a * (rows["latents"][:, 0, 0] - rows["latents"][:, 1, 0]))
  weights = jnp.asarray(weights, jnp.float32)
  errors = lambda policy: denoising_errors(models, models.combine(policy, models.frozen["base"]),
                                           rows)
  each = jax.vmap(lambda e, ref, label: dpo_loss(
      *(e - ref)[:, None], label[None], beta=1.0)[0])
  return stationary(lambda delta: (
      weights * each(errors({"delta": delta}), errors(None), label)).sum(), 0.0, 40.0)


def shared_noise_optimum(a, t, schedule):
  """beta delta* of the population with uniform `t`, by quadrature over x_w - x_l."""
  gap, weight = normal_nodes(40)
  gap = math.sqrt(2) * gap
  latents = np.stack([gap, -gap], 1) / 2
  return dpo_optimum(a, np.tile(latents, (len(t), 1)), np.full((len(t) * 40, 1), 0.3),
                     np.repeat(t, 40), np.tile(weight, len(t)) / len(t), schedule)


@pytest.mark.parametrize("schedule, a, expected", [
    *((analytic.SD_SCHEDULE, a, value) for a, value in (
        (0.25, 1.375729), (0.5, 2.818956), (1.0, 6.016388), (2.0, 13.771648))),
    *((LINEAR, a, value) for a, value in (
        (0.25, 1.412879), (0.5, 2.906579), (1.0, 6.277679), (2.0, 14.826291)))])
def test_dpo_optimum_with_shared_noise(schedule, a, expected):
  """On every second timestep."""
  found = shared_noise_optimum(a, np.arange(0, 1000, 2), schedule)
  assert found == pytest.approx(expected, rel=2e-3)


def test_dpo_optimum_at_one_timestep_and_for_weak_rewards():
  """`a / c^2` at a single t, which is 4a near abar = 1/2; `a E c^2 / E c^4` for small a."""
  abar = analytic.SD_SCHEDULE.alphas**2
  t = int(np.abs(abar - 0.5).argmin())
  found = shared_noise_optimum(1.0, np.asarray([t]), analytic.SD_SCHEDULE)
  assert found == pytest.approx(1 / (abar[t] * (1 - abar[t])), rel=1e-4)
  assert found == pytest.approx(4.0, rel=1e-4)
  weak = shared_noise_optimum(0.01, np.arange(0, 1000, 2), analytic.SD_SCHEDULE)
  assert weak == pytest.approx(0.05449, rel=2e-3)


def test_dpo_optimum_on_a_flow():
  """The same law with `c` of the flow: `a / c^2` at one level, `a E c^2 / E c^4` for weak rewards.

  And as its shift of the mean makes the output of N(delta, 1), nothing is learned but that shift.
  """
  for t in (500, 800):
    sigma = t / 1000
    c = sigma / ((1 - sigma) ** 2 + sigma**2)
    found = shared_noise_optimum(1.0, np.asarray([t]), analytic.FLOW_SCHEDULE)
    assert found == pytest.approx(1 / c**2, rel=1e-4)
  t = np.arange(0, 1001, 5)
  sigma = t / 1000
  c = sigma / ((1 - sigma) ** 2 + sigma**2)
  weak = shared_noise_optimum(0.01, t, analytic.FLOW_SCHEDULE)
  assert weak == pytest.approx(0.01 * (c**2).mean() / (c**4).mean(), rel=2e-3)
  models = world(analytic.FLOW_SCHEDULE)
  x, times = jax.random.normal(KEY, (4, 1)), jnp.asarray([100.0, 400.0, 800.0, 1000.0])
  moved = analytic.Mixture(np.ones(1), np.full((1, 1), 0.3), np.ones(1))
  np.testing.assert_allclose(
      models.output({"delta": jnp.float32(0.3)}, models.frozen, x, times,
                    analytic.make_batch(4)["conditioning"]),
      analytic.exact_output(models.schedule, moved.tree(), x, times), atol=1e-6)


def test_dpo_optimum_with_independent_noise():
  """Noise of its own for each image attenuates: 1.86 (Monte Carlo, three digits) for 6.02."""
  n, t = 24, np.arange(0, 1000, 10)
  nodes, weight = normal_nodes(n)
  gap, noise = (math.sqrt(2) * g.ravel() for g in np.meshgrid(nodes, nodes))
  latents, noise = (np.stack([a, -a], 1) / 2 for a in (gap, noise))
  weights = np.outer(weight, weight).ravel()
  found = dpo_optimum(1.0, np.tile(latents, (len(t), 1)), np.tile(noise, (len(t), 1)),
                      np.repeat(t, n * n), np.tile(weights, len(t)) / len(t))
  assert found == pytest.approx(1.86, abs=0.03)


def test_order_of_methods_without_a_reference():
  """Stationary means for a = 1, to 0.005: SFT 0.367, power 0.396, scaled 0.457, code 1.095.

  Here 2e5 pairs with exact label probabilities; standard error about 0.003, for code 0.01.
  """
  models, n = world(), 200_000
  x, noise, t = (jax.random.normal(KEY, (n, 2, 1)), jax.random.normal(jax.random.key(1), (n, 1, 1)),
                 jnp.arange(n) % 1000)
  rows = {"latents": x, "noise": noise, "t": t, "cond": {}, "origin": jnp.zeros((1, 1, 4))}
  label = jax.nn.sigmoid(x[:, 0, 0] - x[:, 1, 0])
  errors = lambda delta: denoising_errors(
      models, models.combine({"delta": delta}, models.frozen["base"]), rows)
  mapo = lambda cfg: stationary(lambda delta: mapo_loss(
      errors(delta)[:, 0], errors(delta)[:, 1], label, cfg=cfg)[0], 0.0, 2.0)
  sft = mapo(dataclasses.replace(CODE, weight=0.0))
  power = mapo(MaPOConfig(**PRESETS["paper_power"]))
  scaled = mapo(MaPOConfig(**PRESETS["paper_scaled"]))
  code = mapo(CODE)
  assert sft == pytest.approx(0.367, abs=0.015)
  assert power == pytest.approx(0.396, abs=0.015)
  assert scaled == pytest.approx(0.457, abs=0.015)
  assert code == pytest.approx(1.095, abs=0.05)
  assert sft < power < scaled < code


# ---- what a batch becomes -----------------------------------------------------------------------


def pair_batch(size, shape=(1,), label=1.0):
  batch = analytic.make_batch(size)
  latents = jax.random.normal(KEY, (size, 2, *shape))
  return {"conditioning": batch["conditioning"], "sample_ids": batch["sample_ids"],
          "pairs": {"latents": latents, "label": jnp.full(size, label),
                    "origin": jnp.arange(size * 8).reshape(size, 2, 4)}}


def test_draw_takes_the_times_of_the_path():
  """On a flow they are logit-normal, and shifted; the rest is the same."""
  schedule = Schedule.flow(shift=3.0)
  models = dataclasses.replace(world(), schedule=schedule)
  flow, rows = (draw(m, DPOConfig(), pair_batch(4096), KEY) for m in (models, world()))
  np.testing.assert_array_equal(flow["noise"], rows["noise"])
  t = np.asarray(flow["t"], np.float64) / 1000
  u = t / (3 - 2 * t)
  z = np.log(u / (1 - u))
  assert abs(z.mean()) < 4.5 / 64 and abs(z.var() - 1) < 4.5 * np.sqrt(2 / 4096)


def test_draw():
  models = world()
  rows = draw(models, DPOConfig(), pair_batch(4096), KEY)
  assert rows["noise"].shape == (4096, 1, 1) and rows["latents"].shape == (4096, 2, 1)
  t = np.asarray(rows["t"])
  assert t.min() < 5 and t.max() > 994 and abs(t.mean() - 499.5) < 4.5 * 288.7 / 64
  few = draw(models, DPOConfig(), pair_batch(8), KEY)          # the place in the batch decides
  np.testing.assert_array_equal(few["noise"], rows["noise"][:8])
  np.testing.assert_array_equal(few["t"], t[:8])
  apart = draw(models, DPOConfig(shared_noise=False), pair_batch(8), KEY)
  assert apart["noise"].shape == (8, 2, 1)
  np.testing.assert_array_equal(apart["noise"][:, :1], few["noise"])
  assert np.all(apart["noise"][:, 0] != apart["noise"][:, 1])


def test_sft_sees_preferred_images_only():
  models, batch = world(), pair_batch(64)
  rows = draw(models, SFTConfig(), batch, KEY)
  np.testing.assert_array_equal(rows["latents"], batch["pairs"]["latents"][:, :1])
  tied = pair_batch(64, label=0.5)
  rows = draw(models, SFTConfig(), tied, KEY)
  first = (rows["latents"] == tied["pairs"]["latents"][:, :1])[:, 0, 0]
  assert 0.2 < np.mean(first) < 0.8
  # Sizes and crops stay with their image.
  np.testing.assert_array_equal(rows["origin"][:, 0], np.where(
      first[:, None], tied["pairs"]["origin"][:, 0], tied["pairs"]["origin"][:, 1]))


@pytest.mark.parametrize("cfg", [DPOConfig(), SFTConfig()])
def test_xl_is_told_each_images_size_and_crop(cfg):
  """In place of the table's, with the trained size behind; also where the caption is dropped."""
  seen = {}

  def denoise(variables, x, t, cond):
    seen.update(cond["added"])
    return 0 * x
  batch, images = pair_batch(4), 1 if type(cfg) is SFTConfig else 2
  added = lambda value: {"text_embeds": jnp.full((4, 3), value),
                         "time_ids": jnp.tile(jnp.asarray([[64.0, 64, 0, 0, 64, 48]]), (4, 1))}
  batch["conditioning"] = batch["conditioning"]._replace(
      cond={"text": jnp.ones((4, 3, 2)), "added": added(1.0)},
      uncond={"text": jnp.zeros((4, 3, 2)), "added": added(0.0)})
  models = dataclasses.replace(
      world(), denoise=denoise,
      with_origin=functools.partial(StableDiffusionXLPipeline.with_origin, None))
  rows = draw(models, dataclasses.replace(cfg, prompt_dropout=0.5), batch, KEY)
  denoising_errors(models, None, rows)
  origin = np.asarray(batch["pairs"]["origin"])[:, :images].reshape(-1, 4)
  np.testing.assert_array_equal(seen["time_ids"][:, :4], origin)
  np.testing.assert_array_equal(seen["time_ids"][:, 4:], [[64, 48]] * 4 * images)
  dropped = np.asarray(rows["cond"]["added"]["text_embeds"])[:, 0] == 0
  np.testing.assert_array_equal(np.asarray(seen["text_embeds"])[:, 0] == 0,
                                np.repeat(dropped, images))


def test_prompt_dropout():
  """One in four of 4096; standard error 0.0068."""
  batch = pair_batch(4096)
  cond, uncond = {"text": jnp.ones((4096, 3, 2))}, {"text": jnp.zeros((4096, 3, 2))}
  batch["conditioning"] = batch["conditioning"]._replace(cond=cond, uncond=uncond)
  text = np.asarray(draw(world(), SFTConfig(prompt_dropout=0.25), batch, KEY)["cond"]["text"])
  assert abs(1 - text[:, 0, 0].mean() - 0.25) < 4.5 * 0.0068
  assert np.all(text == text[:, :1, :1])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_errors_are_against_what_the_network_predicts(prediction):
  models = world()
  schedule = analytic.FLOW_SCHEDULE if prediction == "flow" else dataclasses.replace(
      models.schedule, prediction=prediction)
  zero = dataclasses.replace(models, schedule=schedule, denoise=lambda v, x, t, c: 0 * x)
  rows = {"latents": jax.random.normal(KEY, (4, 2, 3)), "t": jnp.asarray([0, 9, 500, 999]),
          "noise": jax.random.normal(jax.random.key(1), (4, 1, 3)), "cond": {},
          "origin": jnp.zeros((1, 1, 4))}
  alpha, sigma = (a[np.asarray(rows["t"])][:, None, None]
                  for a in (schedule.alphas, schedule.sigmas))
  x, noise = np.asarray(rows["latents"], np.float64), np.asarray(rows["noise"], np.float64)
  target = {"epsilon": noise + 0 * x, "sample": x, "v_prediction": alpha * noise - sigma * x,
            "flow": noise - x}[prediction]
  np.testing.assert_allclose(denoising_errors(zero, None, rows), np.square(target).mean(-1),
                             rtol=2e-5)


@pytest.mark.parametrize("name", ["mapo", "diffusion_dpo", "sft"])
def test_update_does_not_depend_on_micro_batches(name):
  models, kind = world(), load_method(name)
  found = []
  for parts in (1, 4):
    optim = OptimConfig(lr=0.1, accumulate=parts, ema=0.9)
    method = kind.make(models, kind.Config(), optim)
    batch = pair_batch(16)
    state = method.init(KEY, models.frozen, batch)
    state["policy"] = {"delta": jnp.float32(0.3)}
    experience = method.collect(state, models.frozen, batch, KEY)
    assert "final" not in experience
    state, metrics = jax.jit(method.update)(state, models.frozen, experience, None, KEY)
    found.append([metrics["loss/total"], metrics["train/grad_norm"], state["policy"]["delta"],
                  method.product(state)["delta"]])
  np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, message", [
    (lambda: MaPOConfig(link="log"), r"method\.link='log' is not one of"),
    (lambda: MaPOConfig(logit_scale=0.0), r"method\.logit_scale=0\.0 leaves no preference"),
    (lambda: MaPOConfig(error_scale=-1.0), r"method\.error_scale=-1\.0 is below 0"),
    (lambda: MaPOConfig(weight=-0.1), r"method\.weight=-0\.1 is below 0"),
    (lambda: MaPOConfig(beta=float("inf")), r"method\.beta=inf is not a finite number"),
    (lambda: DPOConfig(beta=0.0), r"method\.beta=0\.0 leaves no preference"),
    (lambda: DPOConfig(shared_noise=1), r"method\.shared_noise=1 is of type int"),
    (lambda: SFTConfig(prompt_dropout=1.0), r"method\.prompt_dropout=1\.0 is outside \[0, 1\)"),
])
def test_bad_values_name_their_key(make, message):
  with pytest.raises(UserError, match=message):
    make()


def test_registry():
  configs = dict(mapo=MaPOConfig, diffusion_dpo=DPOConfig, sft=SFTConfig)
  for name, config in configs.items():
    assert load_method(name).Config is config and load_method(name).make is preference.make
    assert config().reads_pairs
