"""ReFL, DRaFT and AlignProp against closed forms, on the analytic world and the fixture UNet.

With data N(m, v) the exact output is affine, so with a policy that adds `bias_k + slope_k x` the
chain is `x_{k+1} = M_k x_k + d_k + s_k z_k`, and the gradient of `R = w x_N` follows by hand in
f64: `d x_N / d o_k = -b_k A_{k+1}`, where `A_{k+1}` is the product of what a change is multiplied
by at the later steps: `M_j` where gradients run through the network, and `a_j` where its output is
a constant.
"""
import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
from jaxalign import methods
from jaxalign.config import recipes
from jaxalign.config.registry import load_method
from jaxalign.config.schema import OptimConfig
from jaxalign.errors import UserError
from jaxalign.methods.alignprop import Config as AlignPropConfig
from jaxalign.methods.alignprop import draw_active
from jaxalign.methods.draft import Config as DRaFTConfig
from jaxalign.methods.refl import Config as ReFLConfig
from jaxalign.methods.shared import reward_gradient
from jaxalign.methods.shared.reward_gradient import Config
from jaxalign.sampling import (
  Conditioning,
  differentiable_rollout,
  guided_output,
  make_sampler,
  step_noise,
)
from jaxalign.testing import analytic
from jaxalign.train.experiment import build

pytestmark = pytest.mark.usefixtures("compile_quickly")

MEAN, VAR, W, STEPS, ROWS = 0.7, 0.5, 1.5, 10, 64
KEY = jax.random.key(3)
DATA = analytic.Mixture(np.ones(1), np.asarray([[MEAN]]), np.asarray([VAR]))
LINEAR, QUADRATIC = analytic.linear_reward([W]), analytic.quadratic_reward([2.0])
DRAFT = DRaFTConfig(backprop_steps=0)
# Plain gradient descent of rate 1: parameters move by minus the gradient.
DESCENT = OptimConfig(lr=1e6, eps=1e6, b1=0.0, clip_norm=0.0)


def world(reward=LINEAR, steps=STEPS, **sampler):
  return analytic.make_models(DATA, reward, steps=steps, **sampler)


def policy_of(steps=STEPS, bias=0.1, slope=0.1):
  levels = jnp.linspace(0.5, 1.5, steps + 1)[:, None]
  return {"bias": bias * levels, "slope": slope * levels}


def line(models):
  """Slope and offset of the exact output at every step, f64."""
  s = models.sampler
  return analytic.gaussian_line(models.schedule, s.alpha, s.sigma, MEAN, VAR)


def chain(models, policy):
  """`c_k + slope_k` and `M_k`, f64: slopes of the output and of the whole transition."""
  slope = line(models)[0] + np.asarray(policy["slope"], np.float64)[:-1, 0]
  return slope, models.sampler.x_coef - models.sampler.out_coef * slope


def output_gradient(models, policy, active):
  """`d x_N / d o_k [N]` where gradients run through the `active` steps only."""
  sampler = models.sampler
  through = np.where(active, chain(models, policy)[1], sampler.x_coef)
  later = np.append(np.cumprod(through[::-1])[::-1][1:], 1.0)
  return np.where(active, -sampler.out_coef * later, 0.0)


def sampled(models, cfg, policy, size=ROWS, optim=DESCENT, batch=None):
  """The method, a state with this policy, and an experience of it."""
  method = reward_gradient.make(models, cfg, optim)
  batch = batch or analytic.make_batch(size)
  state = dict(method.init(KEY, models.frozen, batch), policy=policy)
  return method, state, jax.jit(method.collect)(state, models.frozen, batch, KEY)


def rows_of(experience):
  batch = experience["batch"]
  return {"latents": experience["latents"], "conditioning": batch["conditioning"],
          "prepared": batch["prepared"]}


def gradient(models, cfg, policy, rows, key=KEY):
  loss = lambda policy: reward_gradient.loss(models, cfg, policy, models.frozen, rows, key)[0]
  found = jax.jit(jax.grad(loss))(policy)
  return jax.tree.map(lambda a: np.asarray(a, np.float64)[:-1, 0], found)


def check_affine(models, cfg, active):
  """Gradient of the loss against the closed form; f32 latents of size one, hence 1e-4."""
  policy = policy_of(models.sampler.steps)
  _, _, experience = sampled(models, cfg, policy)
  found = gradient(models, cfg, policy, rows_of(experience))
  per_step = -W * output_gradient(models, policy, active)
  x = np.zeros((ROWS, models.sampler.steps))            # gated steps need none
  kept = experience["latents"].shape[1] - 1
  x[:, models.sampler.steps - kept:] = np.asarray(experience["latents"])[:, :-1, 0]
  np.testing.assert_allclose(found["bias"], per_step, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(found["slope"], per_step * x.mean(0), rtol=1e-3, atol=1e-5)
  assert np.all((found["bias"] != 0) == active)


# ---- DRaFT --------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("last", [0, 1, 4])
@pytest.mark.parametrize("path", analytic.PATHS)
def test_draft_on_the_affine_chain(last, eta, path):
  active = np.arange(STEPS) >= (STEPS - last if last else 0)
  models = world(**{**analytic.PATHS[path], "eta": eta})
  check_affine(models, DRaFTConfig(backprop_steps=last), active)


def test_draft_on_the_fifty_step_chain():
  check_affine(world(steps=50), DRAFT, np.ones(50, bool))


def test_draft_k_of_all_steps_is_full():
  models, policy = world(QUADRATIC), policy_of()
  _, _, experience = sampled(models, DRAFT, policy)
  found = [gradient(models, DRaFTConfig(backprop_steps=k), policy, rows_of(experience))
           for k in (0, STEPS)]
  chex.assert_trees_all_equal(*found)


@pytest.mark.parametrize("path", analytic.PATHS)
def test_draft_and_reinforce_agree(path):
  """`mu_k + s_k^2 u_k`: d E[x_N] / du_k is A_{k+1} s_k^2 for both, REINFORCE within 4.5 errors.

  The score function estimate is `mean(x_N s_k z_k)`; 20000 trajectories of one batch.
  """
  models, policy, n = world(**analytic.PATHS[path]), policy_of(), 20000
  sampler = models.sampler
  found = gradient(models, DRAFT, policy, rows_of(sampled(models, DRAFT, policy)[2]))
  direct = -found["bias"] / W * -sampler.std ** 2 / sampler.out_coef
  latents = np.asarray(sampled(models, DRAFT, policy, n)[2]["latents"], np.float64)[..., 0]
  bias = np.asarray(policy["bias"], np.float64)[:-1, 0]
  _, gain = chain(models, policy)
  offset = -line(models)[1] - bias
  noise = latents[:, 1:] - gain * latents[:, :-1] - sampler.out_coef * offset      # s_k z_k
  draws = (latents[:, -1:] - latents[:, -1].mean()) * noise
  error = draws.std(0) / np.sqrt(n)
  assert np.all(np.abs(draws.mean(0) - direct) < 4.5 * error)
  assert np.sum(direct > 10 * error) > STEPS // 2         # the comparison has power


@pytest.mark.parametrize("final", ["noisy", "clean"])
@pytest.mark.parametrize("copies", [1, 4])
def test_draft_lv_mean_and_variance(copies, final):
  """Of the slope's gradient, `w b z` with `z = sqrt(abar) x_N + sqrt(1 - abar) noise`.

  Over 4000 keys: the mean within 4.5 standard errors of `w b sqrt(abar) mean(x_N)`, the variance,
  whose relative error is sqrt(2 / 4000), within 4.5 of those of `(w b)^2 (1 - abar) / (R n)`.
  """
  models, policy, size, keys = world(final=final, eta=0.5), policy_of(), 8, 4000
  cfg, sampler = DRaFTConfig(renoise=copies), models.sampler
  _, _, experience = sampled(models, cfg, policy, size)
  assert experience["latents"].shape == (size, 1, 1)                 # nothing but outputs is kept
  loss = lambda policy, key: reward_gradient.loss(
      models, cfg, policy, models.frozen, rows_of(experience), key)[0]
  found = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(policy, jax.random.split(KEY, keys))
  bias, slope = (np.asarray(found[name], np.float64)[:, :-1, 0] for name in ("bias", "slope"))
  assert not bias[:, :-1].any() and not slope[:, :-1].any()
  factor, abar = W * sampler.out_coef[-1], sampler.alpha[-1] ** 2
  np.testing.assert_allclose(bias[:, -1], factor, rtol=1e-5)
  variance = factor ** 2 * (1 - abar) / (size * copies)
  mean = factor * np.sqrt(abar) * np.asarray(experience["final"], np.float64).mean()
  assert abs(slope[:, -1].mean() - mean) < 4.5 * np.sqrt(variance / keys)
  assert abs(slope[:, -1].var() / variance - 1) < 4.5 * np.sqrt(2 / keys)


# ---- AlignProp ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "uniform", "per_step"])
@pytest.mark.parametrize("path", analytic.PATHS)
def test_alignprop_on_the_affine_chain(kind, path):
  """At steps without gradient a change is carried on by `a_k` alone."""
  active = np.asarray(draw_active(kind, KEY, STEPS))
  assert 0 < active.sum() < STEPS
  check_affine(world(**analytic.PATHS[path]), AlignPropConfig(truncation=kind), active)


def active_draws(kind, steps, keys=20000):
  return np.asarray(jax.vmap(lambda key: draw_active(kind, key, steps))(
      jax.random.split(KEY, keys)))


def test_per_step_truncation():
  """20000 draws: step k of 50 is active with probability (k + 1) / 51, independently; 25 in all."""
  draws = active_draws("per_step", 50)
  p = np.arange(1, 51) / 51
  assert np.all(np.abs(draws.mean(0) - p) < 4.5 * np.sqrt(p * (1 - p) / 20000))
  count = draws.sum(1)
  assert abs(count.mean() - 25) < 4.5 * np.sqrt((p * (1 - p)).sum() / 20000)
  assert count.var() == pytest.approx((p * (1 - p)).sum(), rel=4.5 * np.sqrt(2 / 20000))
  assert AlignPropConfig(truncation="per_step").visited(50) == pytest.approx(p.sum())


def test_normal_truncation():
  """As integer parts of N(42, 5), drawn anew outside [1, 49]: K has mean 9.1, 5 % to 95 % 2-17."""
  draws = active_draws("normal", 50)
  last = draws.sum(1)
  np.testing.assert_array_equal(draws, np.arange(50) >= 50 - last[:, None])     # the last K steps
  numbers = np.random.default_rng(0).normal(42, 5, 1000000).astype(int)
  numbers = 50 - numbers[(numbers >= 1) & (numbers <= 49)]
  p = np.bincount(numbers, minlength=51)[:50] / len(numbers)
  assert np.all(np.abs(np.bincount(last, minlength=51)[:50] / 20000 - p)
                < 5 * np.sqrt(np.maximum(p, 1e-4) / 20000))
  assert last.mean() == pytest.approx(9.1, abs=0.1)
  assert tuple(np.quantile(last, [0.05, 0.95])) == (2, 17)
  expected = AlignPropConfig(truncation="normal").visited(50)
  assert abs(last.mean() - expected) < 4.5 * last.std() / np.sqrt(20000)


def test_uniform_truncation():
  draws = active_draws("uniform", 8)
  last = draws.sum(1)
  np.testing.assert_array_equal(draws, np.arange(8) >= 8 - last[:, None])
  share = np.bincount(last, minlength=9)[1:] / 20000
  assert np.all(np.abs(share - 1 / 8) < 4.5 * np.sqrt(7 / 64 / 20000))
  assert AlignPropConfig(truncation="uniform").visited(8) == pytest.approx(4.5)


def test_truncation_of_very_short_chains():
  for kind in ("normal", "uniform", "per_step"):
    assert AlignPropConfig(truncation=kind).visited(1) == (0.5 if kind == "per_step" else 1)
  for kind in ("normal", "uniform"):
    assert np.all(np.asarray(draw_active(kind, KEY, 1)))
  assert AlignPropConfig(truncation="normal").visited(2) == pytest.approx(1)     # never none or all


# ---- ReFL ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", analytic.PATHS)
def test_refl_by_hand(path):
  """One step of the window: `-d relu(target - w x0_hat) / d o = w q` if below, q of the path."""
  models, policy = world(**analytic.PATHS[path]), policy_of()
  cfg = ReFLConfig(window=1, objective="hinge", target=1.0, weight=0.3)
  _, _, experience = sampled(models, cfg, policy)
  found = gradient(models, cfg, policy, rows_of(experience))
  x = np.asarray(experience["latents"], np.float64)[:, 0, 0]
  slope, _ = chain(models, policy)
  out = slope[-1] * x + line(models)[1][-1] + float(policy["bias"][-2, 0])
  # x0_hat = p x - q o: (x - sigma eps) / alpha, and x - sigma u.
  alpha, sigma = models.sampler.alpha[-1], models.sampler.sigma[-1]
  p, q = (1 / alpha, sigma / alpha) if path == "vp" else (1.0, sigma)
  reward = W * (p * x - q * out)
  below = reward < cfg.target
  assert 0.1 < below.mean() < 0.9
  per_row = cfg.weight * W * q * below
  np.testing.assert_allclose(found["bias"], np.append(np.zeros(STEPS - 1), per_row.mean()),
                             rtol=1e-4)
  assert found["slope"][-1] == pytest.approx((per_row * x).mean(), rel=1e-4)
  total, metrics = jax.jit(lambda policy, rows: reward_gradient.loss(
      models, cfg, policy, models.frozen, rows, KEY))(policy, rows_of(experience))
  assert float(total) == pytest.approx(cfg.weight * np.maximum(1.0 - reward, 0).mean(), rel=1e-4)
  assert float(metrics["train/reward_scored"]) == pytest.approx(reward.mean(), rel=1e-4)


def test_refl_steps_are_uniform_over_the_window():
  """Each row adds the slope of its own step; 4000 rows, within 4.5 standard errors."""
  models, policy, size = world(), policy_of(), 4000
  cfg = ReFLConfig(window=4)
  _, _, experience = sampled(models, cfg, policy, size)
  assert experience["latents"].shape == (size, 5, 1)
  found = gradient(models, cfg, policy, rows_of(experience))["bias"]
  share = found / (W * models.sampler.sigma / models.sampler.alpha)
  assert not share[:-4].any() and share.sum() == pytest.approx(1, rel=1e-4)
  assert np.all(np.abs(share[-4:] - 0.25) < 4.5 * np.sqrt(0.25 * 0.75 / size))
  assert np.abs(share[-4:] - 0.25).max() > 1e-4                   # drawn, not averaged


# ---- what they have in common -------------------------------------------------------------------


@pytest.mark.parametrize("objective, values, slopes", [
    ("linear", [1.0, -0.5, -3.0], [-1, -1, -1]),
    ("hinge", [3.0, 1.5, 0.0], [-1, -1, 0]),
    ("absolute", [3.0, 1.5, 1.0], [-1, -1, 1]),
])
def test_objectives(objective, values, slopes):
  cfg, reward = Config(objective, target=2.0, weight=0.5), jnp.asarray([-1.0, 0.5, 3.0])
  np.testing.assert_allclose(reward_gradient.penalty(cfg, reward), 0.5 * np.asarray(values))
  found = jax.grad(lambda r: reward_gradient.penalty(cfg, r).sum())(reward)
  np.testing.assert_allclose(found, 0.5 * np.asarray(slopes))


KINDS = [DRAFT, DRaFTConfig(renoise=2), ReFLConfig(window=3), AlignPropConfig("absolute", 3.0)]


@pytest.mark.parametrize("cfg", KINDS, ids=lambda cfg: type(cfg).__name__)
def test_rewards_use_the_prompt_of_their_row(cfg):
  """Against the rewards of hand-made prompts: each row is scored with its own weight."""
  score = lambda p, images, prepared: (images * prepared["w"]).sum(-1)
  models = dataclasses.replace(world(), score=score)
  weights = jnp.linspace(-1, 2, 8)[:, None]
  batch = dict(analytic.make_batch(8), prepared={"w": weights})
  policy = policy_of()
  _, _, experience = sampled(models, cfg, policy, batch=batch)
  rows = rows_of(experience)
  whole = gradient(models, cfg, policy, rows)["bias"]
  # The bias' gradient is the sum over rows, so scaling one row's prompt must scale its part.
  doubled = dict(rows, prepared={"w": weights.at[7].multiply(2)})
  without = dict(rows, prepared={"w": weights.at[7].set(0)})
  part = gradient(models, cfg, policy, doubled)["bias"] - whole
  np.testing.assert_allclose(part, whole - gradient(models, cfg, policy, without)["bias"],
                             rtol=1e-3, atol=1e-6)
  assert np.abs(part).max() > 1e-3


@pytest.mark.parametrize("cfg", KINDS, ids=lambda cfg: type(cfg).__name__)
def test_update_is_a_descent_step_on_the_loss_and_is_traced_once(cfg):
  models, policy = world(QUADRATIC), policy_of()
  method, state, experience = sampled(models, cfg, policy)
  traces = []

  @jax.jit
  def update(state, experience, key):
    traces.append(key)
    return method.update(state, models.frozen, experience, jnp.zeros(ROWS), key)

  after, metrics = update(state, experience, KEY)
  moved = jax.tree.map(lambda a, b: np.asarray(a - b)[:-1, 0], policy, after["policy"])
  chex.assert_trees_all_close(moved, gradient(models, cfg, policy, rows_of(experience)),
                              rtol=1e-3, atol=1e-4)
  assert set(metrics) == {"loss/total", "train/reward_scored", "train/grad_norm"}
  norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(moved)))
  assert float(metrics["train/grad_norm"]) == pytest.approx(norm, rel=1e-3)
  assert int(update(after, experience, jax.random.key(9))[0]["updates"]) == 2 and len(traces) == 1
  assert method.tilt is None and method.product(after) is after["policy"]


def test_accumulation_and_moving_average():
  models, policy = world(QUADRATIC), policy_of()
  states = []
  for parts in (1, 4):
    optim = dataclasses.replace(DESCENT, accumulate=parts, ema=0.9)
    method, state, experience = sampled(models, DRAFT, policy, optim=optim)
    states.append(jax.jit(method.update)(state, models.frozen, experience, jnp.zeros(ROWS), KEY)[0])
  chex.assert_trees_all_close(states[0]["policy"], states[1]["policy"], rtol=1e-4, atol=1e-5)
  # The average started at the initial policy, zero; its warmed decay is 2 / 11 after one update.
  chex.assert_trees_all_close(
      method.product(states[1]), jax.tree.map(lambda a: (9 / 11) * a, states[1]["policy"]),
      rtol=1e-5)


def test_a_curved_reward_collapses_to_its_maximum():
  """No target distribution: 1000 updates take the chain's mean to 2 and its variance away.

  Moments follow from the learned coefficients, without Monte Carlo. The tilt of the base by
  `exp(R)` would keep `v / (1 + v)` of variance v.
  """
  models = world(QUADRATIC)

  def moments(policy):
    _, gain = chain(models, policy)
    offset = -models.sampler.out_coef * (line(models)[1] + np.asarray(policy["bias"])[:-1, 0])
    mean, var = 0.0, 1.0
    for k in range(STEPS):
      mean, var = gain[k] * mean + offset[k], gain[k] ** 2 * var + models.sampler.std[k] ** 2
    return mean, var

  optim = OptimConfig(lr=2e-2, decay_steps=1000, clip_norm=0.0)
  method = reward_gradient.make(models, DRAFT, optim)
  batch = analytic.make_batch(ROWS)

  def step(state, i):
    key_collect, key = jax.random.split(jax.random.fold_in(KEY, i))
    experience = method.collect(state, models.frozen, batch, key_collect)
    return method.update(state, models.frozen, experience, jnp.zeros(ROWS), key)
  state = method.init(KEY, models.frozen, batch)
  (mean, var), (_, samples) = moments(state["policy"]), sampled(models, DRAFT, state["policy"])[1:]
  draws = np.asarray(samples["final"], np.float64)
  assert abs(draws.mean() - mean) < 4.5 * np.sqrt(var / ROWS)         # the formula is the chain's
  state, metrics = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(1000)))(state)
  after = moments(state["policy"])
  assert abs(after[0] - 2.0) < 0.02 < 1 < abs(mean - 2.0)
  assert after[1] < 0.1 * var / (1 + var)
  reward = np.asarray(metrics["train/reward_scored"])
  assert reward[-20:].mean() > reward[:20].mean() + 0.5


@pytest.mark.parametrize("cfg, forward, backward, images", [
    (ReFLConfig(window=3), 8 * 11, 8, 8),
    (DRAFT, 8 * 20, 80, 8),
    (DRaFTConfig(backprop_steps=3), 8 * 13, 24, 8),
    (DRaFTConfig(renoise=2), 8 * 12, 16, 16),
    (AlignPropConfig(truncation="per_step"), 8 * 15, 40, 8),
    (AlignPropConfig(truncation="uniform"), 8 * 10 + 44, 44, 8),
])
def test_cost_by_hand(cfg, forward, backward, images):
  method = reward_gradient.make(world(), cfg, DESCENT)
  assert method.cost(8) == {
      "denoiser_forward": forward, "denoiser_backward": backward, "decodes": images,
      "reward_queries": images, "reward_gradients": images}
  guided = reward_gradient.make(dataclasses.replace(world(), guidance=2.0), cfg, DESCENT)
  assert guided.cost(8)["denoiser_backward"] == 2 * backward


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, message", [
    (lambda: Config("square"), r"method\.objective='square' is not one of"),
    (lambda: Config(target=float("nan")), r"method\.target=nan is not a finite number"),
    (lambda: Config(weight=-1.0), r"method\.weight=-1\.0 is below 0"),
    (lambda: Config(weight=0.0), r"method\.weight=0\.0 leaves nothing"),
    (lambda: ReFLConfig(window=0), r"method\.window=0 is below 1"),
    (lambda: DRaFTConfig(backprop_steps=-1), r"method\.backprop_steps=-1 is below 0"),
    (lambda: DRaFTConfig(renoise=-1), r"method\.renoise=-1 is below 0"),
    (lambda: DRaFTConfig(backprop_steps=0, renoise=2), r"method\.renoise=2 .*backprop_steps=1"),
    (lambda: AlignPropConfig(truncation="fixed"), r"method\.truncation='fixed' is not one of"),
    (lambda: reward_gradient.make(world(), ReFLConfig(window=11), DESCENT),
     r"method\.window=11 exceeds sample\.steps=10"),
    (lambda: reward_gradient.make(world(), DRaFTConfig(backprop_steps=11), DESCENT),
     r"method\.backprop_steps=11 exceeds sample\.steps=10"),
])
def test_bad_values_name_their_key(make, message):
  with pytest.raises(UserError, match=message):
    make()


@pytest.mark.parametrize("cfg", KINDS, ids=lambda cfg: type(cfg).__name__)
def test_black_box_rewards_are_refused(cfg):
  with pytest.raises(UserError, match=r"reward\.names holds a black-box reward"):
    methods.make("draft", dataclasses.replace(world(), score=None), cfg, DESCENT)


def test_registry():
  configs = dict(refl=ReFLConfig, draft=DRaFTConfig, alignprop=AlignPropConfig)
  for name, config in configs.items():
    assert load_method(name).Config is config and load_method(name).make is reward_gradient.make
    with pytest.raises(UserError, match=r"method\.beta is unknown.*; method has .*target"):
      tree = recipes.default(name).to_dict()
      recipes.parse(dict(tree, method=dict(tree["method"], beta=1.0)))


# ---- the fixture UNet ---------------------------------------------------------------------------


@functools.cache
def fixture_models():
  return build(runs.smoke("draft"), jax.devices()[:1]).models


def fixture(steps):
  """The fixture UNet with a reward of the latents themselves, a policy, rows of trajectories."""
  models = fixture_models()
  models = dataclasses.replace(
      models, sampler=make_sampler(models.schedule, steps), decode=lambda _, x: x,
      score=lambda params, x, _: jnp.sin(x).mean((1, 2, 3)))
  policy = jax.jit(models.init_policy)(KEY, models.frozen)
  size, text = 4, jax.random.normal(KEY, (2, 4, 16, 32))
  rows = {"latents": jax.random.normal(KEY, (size, steps + 1) + models.latent_shape),
          "conditioning": Conditioning({"text": text[0]}, {"text": text[1]}), "prepared": {}}
  return models, policy, rows


@pytest.mark.slow
def test_memory_grows_with_the_steps_by_the_latents_only():
  """Bytes that the compiled gradient of DRaFT-full needs beside its arguments, at 4 and 24 steps.

  The latents are an argument; a step more may cost one copy of its latents and no activation. One
  feature map of the guided batch is 16 times as large.
  """
  def needed(steps):
    models, policy, rows = fixture(steps)
    loss = lambda policy, frozen, rows: reward_gradient.loss(
        models, DRAFT, policy, frozen, rows, KEY)[0]
    compiled = jax.jit(jax.grad(loss)).lower(policy, models.frozen, rows).compile()
    return compiled.memory_analysis().temp_size_in_bytes, rows["latents"][:, 0].nbytes

  (few, latent), (many, _) = needed(4), needed(24)
  assert many - few <= 1.5 * 20 * latent


@pytest.mark.slow
def test_gradient_through_the_network_is_that_of_a_differentiated_rollout():
  """Same noise, three guided steps, f32: 1e-3 of the largest entry of each leaf."""
  models, policy, _ = fixture(3)
  policy = jax.tree.map(lambda a: a + 0.05 * jax.random.normal(KEY, a.shape), policy)
  text = jax.random.normal(jax.random.key(1), (2, 2, 16, 32))
  batch = dict(analytic.make_batch(2), conditioning=Conditioning({"text": text[0]},
                                                                 {"text": text[1]}))
  output_fn = guided_output(models.denoise, models.guidance)

  @jax.jit
  def both(policy, frozen):
    method = reward_gradient.make(models, DRAFT, DESCENT)
    experience = method.collect({"policy": policy}, frozen, batch, KEY)
    rows = rows_of(experience)
    found = jax.grad(lambda policy: reward_gradient.loss(
        models, DRAFT, policy, frozen, rows, KEY)[0])(policy)
    latents = jnp.moveaxis(rows["latents"], 1, 0)
    sampler = models.sampler
    noise = jnp.stack([step_noise(KEY, batch["sample_ids"], models.latent_shape, k)
                       for k in range(3)])
    expected = jax.grad(lambda policy: -models.score(None, differentiable_rollout(
        output_fn, models.combine(policy, frozen["base"]), sampler, batch["conditioning"],
        latents[0], noise)[0], None).mean())(policy)
    return found, expected

  found, expected = both(policy, models.frozen)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, atol=1e-3 * float(jnp.abs(b).max()))
    assert np.abs(b).max() > 0


# ---- the recipes --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name, argument", [
    ("draft", "smoke"), ("refl", "smoke"), ("alignprop", "smoke"), ("draft", "smoke,lv")])
def test_smoke_recipe(name, argument):
  path = runs.run(f"{name}-{argument}", method=name, argument=argument)
  lines = runs.metrics(path)
  assert [line["step"] for line in lines] == [1, 2, 3]
  for line in lines:
    assert all(np.isfinite(v) for v in line.values()) and line["train/grad_norm"] > 0
    assert line["loss/total"] == pytest.approx(-line["train/reward_scored"], rel=1e-5)
    if argument == "smoke" and name != "refl":      # scored where it was sampled
      assert line["train/reward_scored"] == pytest.approx(line["train/reward"], rel=1e-4)
  summary = json.loads((path / "summary.json").read_text())
  assert summary["steps"] == 3 and "exact_tilt" not in summary
  assert summary["tuned"]["kl_to_base"]["mean"] > 0           # it moved
  expected = {"draft": 2, "refl": 1, "alignprop": 1}[name] * 8 * 2 * 3
  if argument == "smoke" and name != "alignprop":
    assert summary["cost"]["denoiser_backward"] == expected
