"""Policy gradients (DDPO, B2-DiffuRL) against closed forms, through the method's own functions.

Monte Carlo comparisons allow 4.5 standard errors, estimated from the same draws with groups as the
independent units.
"""
import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import gammaln, ndtr

from jaxalign import methods
from jaxalign.config import recipes
from jaxalign.config.registry import load_method
from jaxalign.config.schema import OptimConfig
from jaxalign.errors import UserError
from jaxalign.methods import Models, b2_diffurl
from jaxalign.methods.shared import policy_gradient as pg
from jaxalign.sampling import Conditioning, Sampler, make_sampler
from jaxalign.testing import analytic

pytestmark = pytest.mark.usefixtures("compile_quickly")

KEY = jax.random.key(3)
# Plain gradient descent of rate 1: parameters move by minus the gradient.
DESCENT = OptimConfig(lr=1e6, eps=1e6, b1=0.0, clip_norm=0.0)
SD20 = make_sampler(analytic.SD_SCHEDULE, 20)

# x_{k+1} = GAIN_k x_k + OFFSET_k + STD_k z from x_0 ~ N(0, 1).
GAIN, OFFSET, STD = np.asarray([0.8, 0.9]), np.asarray([0.3, -0.2]), np.asarray([0.5, 0.4])


def chain(tied=False, score=None) -> Models:
  """The linear Gaussian chain; its policy adds to the offsets (one number for both if tied)."""
  ones = np.ones(2)
  sampler = Sampler(timesteps=np.asarray([1.0, 0.0]), next_timesteps=np.zeros(2), alpha=ones,
                    sigma=ones, alpha_next=ones, sigma_next=ones, x_coef=GAIN, out_coef=-ones,
                    std=STD, clean_x_coef=ones, clean_out_coef=ones, correction=0 * ones)

  def denoise(variables, x, t, cond):
    k = 1 - jnp.broadcast_to(t, x.shape[:1]).astype(jnp.int32)
    if variables["policy"] is None:
      return variables["base"]["offset"][k][:, None] + 0 * x
    shift = variables["policy"]["shift"]
    return (variables["base"]["offset"][k] + shift[k * (shift.size > 1)])[:, None] + 0 * x
  return Models(
      denoise=denoise, schedule=analytic.SD_SCHEDULE, sampler=sampler, guidance=1.0,
      latent_shape=(1,), combine=lambda policy, base: {"base": base, "policy": policy},
      init_policy=lambda key, base: {"shift": jnp.zeros(1 if tied else 2)},
      decode=lambda params, latents: latents, score=score, flow=None,
      frozen={"base": {"offset": jnp.asarray(OFFSET, jnp.float32)}, "decoder": {}, "reward": {}})


advantages = jax.jit(pg.advantages, static_argnums=0)
select = jax.jit(pg.select, static_argnums=0)


def batch_of(size, prompts=1, group=1):
  ids = jnp.repeat(jnp.arange(size // group, dtype=jnp.int32) % prompts, group)
  return dict(analytic.make_batch(size), prompt_ids=ids)


def unbiased(**options):
  """Plain REINFORCE: leave-one-out baseline, nothing selected or clipped."""
  return pg.Config(**{**dict(objective="score", advantage="group_loo", group=4, history=0,
                             advantage_clip=1e9), **options})


def first_update(models, cfg, reward, size, optim=DESCENT, prompts=1):
  """State before and after one update, its experience, rewards and metrics."""
  method = pg.make(models, cfg, optim)
  batch = batch_of(size, prompts, cfg.group)

  @jax.jit
  def run():
    state = method.init(KEY, models.frozen, batch)
    experience = method.collect(state, models.frozen, batch, KEY)
    rewards = reward(experience["final"])
    new, metrics = method.update(state, models.frozen, experience, rewards, KEY)
    return state, new, experience, rewards, metrics
  return run()


def moved(state, new):
  return jax.tree.map(lambda a, b: np.asarray(b - a, np.float64), state["policy"], new["policy"])


def standard_error(values, group):
  """Of the mean of `values [B, ...]`, groups independent."""
  means = np.asarray(values, np.float64).reshape((-1, group) + values.shape[1:]).mean(1)
  return means.std(0, ddof=1) / np.sqrt(len(means))


# ---- the estimator -------------------------------------------------------------------------------


@pytest.mark.parametrize("objective, reward, expected", [
    ("score", lambda x: x[:, 0], (0.9, 1.0)),             # T1: dJ/db of the first and last step
    ("clip", lambda x: -jnp.square(x[:, 0] - 1.0), (1.674, 1.86)),
])
def test_gradient_of_the_affine_chain(objective, reward, expected):
  """The sum over steps of A grad log p is dJ/db; the loss takes the mean of its two steps."""
  state, new, experience, rewards, metrics = first_update(
      chain(), unbiased(objective=objective), reward, 2 ** 16)
  got = 2 * moved(state, new)["shift"]
  adv = advantages(unbiased(), rewards, None)
  terms = np.asarray(adv)[:, None] * np.asarray(experience["noise"][..., 0]) / STD
  np.testing.assert_allclose(got, terms.mean(0), rtol=1e-3)
  error = standard_error(terms, 4)
  assert np.all(np.abs(got - expected) < 4.5 * error) and np.all(error < 0.03)
  assert float(metrics["train/clip_fraction"]) == 0 and float(metrics["train/update_kl"]) < 1e-10


@pytest.mark.parametrize("path", analytic.PATHS)
def test_gradient_of_the_diffusion_chain(path):
  """Data N(0.7, 0.5), R = x: dE[R] / d bias_k = -b_k times the gains of the steps after k."""
  steps, mean, var = 10, 0.7, 0.5
  data = analytic.Mixture(np.ones(1), np.asarray([[mean]]), np.asarray([var]))
  models = analytic.make_models(data, analytic.linear_reward([1.0]), steps=steps,
                                **analytic.PATHS[path])
  s = models.sampler
  gain = s.x_coef - s.out_coef * analytic.gaussian_line(
      models.schedule, s.alpha, s.sigma, mean, var)[0]
  exact = -s.out_coef * np.append(np.cumprod(gain[::-1])[::-1][1:], 1.0)
  state, new, experience, rewards, _ = first_update(
      models, unbiased(objective="clip"), lambda x: x[:, 0], 2 ** 15)
  got = steps * moved(state, new)["bias"][:-1, 0]
  adv = np.asarray(advantages(unbiased(), rewards, None), np.float64)
  terms = -adv[:, None] * s.lam * s.std * np.asarray(experience["noise"][..., 0], np.float64)
  np.testing.assert_allclose(got, terms.mean(0), rtol=2e-3, atol=2e-4)
  error = standard_error(terms, 4)
  assert np.all(np.abs(got - exact) < 4.5 * error)
  assert np.linalg.norm(exact) > 20 * np.linalg.norm(error)           # the comparison has power


def test_interval_gives_the_semi_gradient():
  """T2: with one offset for both steps dJ/db is 1 + 0.9; of the last step alone 1, prefix held."""
  cfg = unbiased(interval="grow", interval_first=0.5, interval_last=0.5)
  state, new, experience, rewards, metrics = first_update(
      chain(tied=True), cfg, lambda x: x[:, 0], 2 ** 16)
  assert int(metrics["train/interval"]) == 1
  terms = (np.asarray(advantages(cfg, rewards, None))
           * np.asarray(experience["noise"][:, 1, 0]) / STD[1])
  assert abs(moved(state, new)["shift"][0] - 1.0) < 4.5 * standard_error(terms, 4) < 0.1


def branches(size=2 ** 16, group=5, **options):
  """Rewards and noise of the last step, `[R, K]` f64, for branches after the first step."""
  cfg = unbiased(group=group, branch=True, interval="grow", interval_first=0.5, interval_last=0.5,
                 **options)
  method = pg.make(chain(), cfg, DESCENT)
  batch = batch_of(size // group * group)
  experience = jax.jit(lambda frozen: method.collect(
      method.init(KEY, frozen, batch), frozen, batch, KEY))(chain().frozen)
  return cfg, experience, np.asarray(experience["noise"][:, 1, 0], np.float64).reshape(-1, group)


def test_branch_baselines():
  """T3 and T4: bias of the group mean, exact identity with leave-one-out, and variances."""
  k, (cfg, experience, z) = 5, branches()
  rewards = experience["final"][:, 0]
  estimate = {}
  for mode in ("group_loo", "group_center"):
    adv = advantages(dataclasses.replace(cfg, advantage=mode), rewards, None)
    estimate[mode] = np.asarray(adv, np.float64).reshape(-1, k) * z / STD[1]
  np.testing.assert_allclose(estimate["group_loo"], estimate["group_center"] * k / (k - 1),
                             rtol=1e-4, atol=1e-5)
  error = standard_error(estimate["group_loo"].ravel(), k)
  assert abs(estimate["group_loo"].mean() - 1) < 4.5 * error
  assert abs(estimate["group_center"].mean() - (k - 1) / k) < 4.5 * error
  constant = (np.asarray(rewards, np.float64).reshape(-1, k) - 0.07) * z / STD[1]   # J = 0.07
  v = GAIN[1] ** 2 * (GAIN[0] ** 2 + STD[0] ** 2)
  roots = len(z)
  # A variance has a relative standard error of about sqrt(kurtosis / n); 15 bounds it here.
  close = lambda value: pytest.approx(value, rel=4.5 * np.sqrt(15 / roots))
  assert estimate["group_loo"].var() == close(2 + 1 / (k - 1))
  assert constant.var() == close(v / STD[1] ** 2 + 2)
  assert estimate["group_loo"].mean(1).var() == close(2 / (k - 1))
  assert constant.mean(1).var() == close((v / STD[1] ** 2 + 2) / k)


@pytest.mark.parametrize("k", [3, 5])
def test_standardised_groups_shrink_the_gradient(k):
  """T5: E[z e] = (K - 1) / K c4(K), ddof 1."""
  e = jax.random.normal(KEY, (100_000 * k,))
  cfg = pg.Config(group=k, advantage="group_z")
  products = np.asarray(advantages(cfg, e, None) * e, np.float64)
  c4 = np.sqrt(2 / (k - 1)) * np.exp(gammaln(k / 2) - gammaln((k - 1) / 2))
  assert abs(products.mean() - (k - 1) / k * c4) < 4.5 * standard_error(products, k)


@pytest.mark.parametrize("k, gain, kept", [(3, 2.465, 1.339), (5, 3.568, 1.684), (8, 4.787, 1.896)])
def test_extremes_are_a_shaped_reward(k, gain, kept):
  """T6: sum of A^2 over the kept, and how many are kept, for A ~ N(0, 1), thresholds +-0.5."""
  cfg = pg.Config(group=k, select="extremes")
  _, adv, keep = select(cfg, jax.random.normal(KEY, (100_000 * k,)))
  keep = np.asarray(keep)
  totals = (np.asarray(adv, np.float64) ** 2 * keep).sum(1)
  assert abs(totals.mean() - gain) < 4.5 * standard_error(totals, 1) + 5e-4
  counts = keep.sum(1)
  assert abs(counts.mean() - kept) < 4.5 * standard_error(counts, 1) + 5e-4


# ---- advantages and selection --------------------------------------------------------------------


def test_advantages_sum_to_zero():
  """T8."""
  rewards = jax.random.normal(KEY, (40,)) + 7.0
  ids = jnp.arange(40) // 10
  for mode in ("group_z", "group_center", "group_loo"):
    adv = advantages(pg.Config(group=5, advantage=mode), rewards, ids)
    np.testing.assert_allclose(adv.reshape(-1, 5).sum(1), 0, atol=1e-5)
  assert abs(float(advantages(pg.Config(advantage="batch"), rewards, ids).sum())) < 1e-4
  adv = advantages(pg.Config(min_count=10), rewards, ids)
  np.testing.assert_allclose(adv.reshape(-1, 10).sum(1), 0, atol=1e-5)
  _, adv, kept = select(pg.Config(group=5, select="pairs", advantage="group_z"), adv)
  assert bool(kept.all()) and float(jnp.abs(adv.sum(1)).max()) < 1e-6


def test_statistics_of_a_prompt_over_updates():
  """Against a plain loop: rewards of a prompt in this update and `history` before; else the batch.

  With rewards that improve, the sum is positive: the baseline lags.
  """
  cfg = pg.Config(history=3, min_count=4)
  generator, size = np.random.default_rng(0), 6
  models, seen = chain(), []
  method = pg.make(models, cfg, OptimConfig(lr=0.0))
  batch = batch_of(size)
  state = method.init(KEY, models.frozen, batch)
  experience = jax.tree.map(jnp.zeros_like, jax.eval_shape(
      lambda: method.collect(state, models.frozen, batch, KEY)))
  update, adv_of = jax.jit(method.update), jax.jit(lambda *a: pg.advantages(cfg, *a))
  for step in range(6):
    ids = generator.integers(0, 3, size)
    rewards = generator.normal(size=size) + step
    seen.append((ids, rewards))
    expected = np.zeros(size)
    for i in range(size):
      pool = np.concatenate([r[p == ids[i]] for p, r in seen[-4:]])
      pool = pool if len(pool) >= 4 else rewards
      expected[i] = (rewards[i] - pool.mean()) / pool.std(ddof=1)
    now = jnp.asarray(rewards, jnp.float32), jnp.asarray(ids, jnp.int32)
    np.testing.assert_allclose(adv_of(*now, state["history"]), expected, rtol=1e-4)
    assert step < 4 or expected.sum() > 0
    experience["batch"] = dict(batch, prompt_ids=now[1])
    state, _ = update(state, models.frozen, experience, now[0], KEY)


@pytest.mark.parametrize("mode", ["prompt", "batch", "group_z"])
@pytest.mark.parametrize("value", [0.0, 0.3, -117.3])
def test_equal_rewards_say_nothing(mode, value):
  """Rounding in the mean of equal numbers must not be standardised into an advantage."""
  cfg = pg.Config(group=3, advantage=mode, min_count=2)
  adv = advantages(cfg, jnp.full(21, value), jnp.repeat(jnp.arange(7), 3))
  assert float(jnp.abs(adv).max()) == 0.0


def test_adding_to_or_scaling_the_reward_changes_nothing():
  rewards, ids = jax.random.normal(KEY, (24,)), jnp.arange(24) // 6
  for mode in ("prompt", "batch", "group_z"):
    cfg = pg.Config(group=3, advantage=mode, min_count=2)
    np.testing.assert_allclose(advantages(cfg, 5 * rewards + 2, ids),
                               advantages(cfg, rewards, ids), atol=1e-4)


def test_selection_finds_its_samples():
  """T12: the value says which root and branch it belongs to."""
  place = np.asarray([[3, 0, 2, 1, 4], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
  adv = jnp.asarray((place - 2.0) + 10 * np.arange(3)[:, None], jnp.float32).reshape(-1)
  index, chosen, kept = select(pg.Config(group=5, select="pairs"), adv)
  np.testing.assert_array_equal(index, [[4, 1], [4, 0], [0, 4]])
  np.testing.assert_allclose(chosen, [[2, -2]] * 3)                 # half of the difference
  index, chosen, kept = select(pg.Config(group=5, select="pairs", pairs=2), adv)
  np.testing.assert_array_equal(np.sort(np.asarray(index), 1),
                                [[0, 1, 3, 4], [0, 1, 3, 4], [0, 1, 3, 4]])
  index, chosen, kept = select(
      pg.Config(group=5, select="extremes", keep_above=9.0, keep_below=9.0), adv)
  np.testing.assert_array_equal(index, [[4, 1], [4, 0], [0, 4]])
  np.testing.assert_array_equal(kept, [[False, True], [True, True], [True, False]])
  np.testing.assert_allclose(chosen, [[2, -2], [12, 8], [22, 18]])
  index, chosen, kept = select(pg.Config(group=5), adv)
  assert bool(kept.all()) and chosen.reshape(-1).tolist() == adv.tolist()


def test_yes_no_rewards_keep_the_groups_that_differ():
  rewards = jnp.asarray([0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1], jnp.float32)
  cfg = b2_diffurl.Config(group=4)
  index, adv, kept = select(cfg, advantages(cfg, rewards, None))
  np.testing.assert_array_equal(kept, [[False] * 2, [True] * 2, [False] * 2])
  np.testing.assert_allclose(adv[1], [1.0, -1.0], rtol=1e-5)         # z: 1.5 and -0.5
  assert int(index[1, 0]) == 0


def test_nothing_selected_changes_nothing():
  """Not even by the momentum of steps before; the stage goes on."""
  models, cfg, batch = chain(), b2_diffurl.Config(group=4, inner_epochs=1), batch_of(32, 1, 4)
  method = pg.make(models, cfg, OptimConfig(lr=0.1, ema=0.9))
  first = method.init(KEY, models.frozen, batch)
  experience = jax.jit(method.collect)(first, models.frozen, batch, KEY)
  update = jax.jit(method.update)
  state, metrics = update(first, models.frozen, experience, experience["final"][:, 0], KEY)
  assert float(jnp.abs(state["policy"]["shift"]).max()) > 0 and int(state["updates"]) == 1
  assert method.product(state) is state["ema"]            # which is what is exported
  assert float(metrics["train/mixed_groups"]) == 1 and float(metrics["train/kept"]) == 0.5
  new, metrics = update(state, models.frozen, experience, jnp.ones(32), KEY)
  for name in ("policy", "optimizer", "ema", "updates"):
    chex.assert_trees_all_equal(new[name], state[name])
  assert int(new["stage"]) == 2
  assert float(metrics["train/kept"]) == float(metrics["train/mixed_groups"]) == 0


# ---- intervals and branches ----------------------------------------------------------------------


def bounds(cfg, steps, stages, key=KEY):
  at = lambda stage: pg.interval(cfg, steps, stage, jax.random.fold_in(key, stage))
  return np.asarray(jax.jit(jax.vmap(at))(jnp.arange(stages)))


def test_growing_interval_follows_the_published_table():
  """T12: 100 stages from 14 to 20 of 20 steps."""
  table = bounds(b2_diffurl.Config(), 20, 130)
  start, length = table[:, 0], table[:, 1] - table[:, 0]
  assert np.all(table[:, 1] == 20)
  first = {s: int(np.argmax(length == s)) for s in range(14, 21)}
  assert first == {14: 0, 15: 15, 16: 29, 17: 43, 18: 58, 19: 72, 20: 86}
  assert length[:100].mean() == pytest.approx(16.97) and np.all(length[86:] == 20)
  assert [int(SD20.timesteps[start[first[s]]]) for s in (14, 15, 16, 17, 18, 19, 20)] == [
      651, 701, 751, 801, 851, 901, 951]


def test_other_intervals():
  slide = bounds(pg.Config(interval="slide", interval_first=0.2, interval_stages=17 * 3), 20, 60)
  np.testing.assert_array_equal(slide[:, 1] - slide[:, 0], 4)
  np.testing.assert_array_equal(slide[:51, 0], np.arange(51) // 3)
  assert np.all(slide[51:, 0] == 16)
  window = bounds(pg.Config(interval="random", interval_first=0.2), 20, 3400)
  np.testing.assert_array_equal(window[:, 1] - window[:, 0], 4)
  counts = np.bincount(window[:, 0], minlength=17)
  assert len(counts) == 17 and np.all(np.abs(counts - 200) < 4.5 * np.sqrt(200))
  np.testing.assert_array_equal(bounds(pg.Config(), 20, 3), [[0, 20]] * 3)


def test_branches_share_their_prefix():
  """T12: latents of a group agree up to the branching point and differ after it."""
  data = analytic.Mixture(np.ones(1), np.zeros((1, 2)), np.ones(1))
  models = analytic.make_models(data, analytic.linear_reward([1.0, 0.0]), steps=10)
  cfg = b2_diffurl.Config(group=4, interval_stages=4)
  method = pg.make(models, cfg, DESCENT)
  batch = batch_of(24, 6, 4)
  state = method.init(KEY, models.frozen, batch)
  collect = jax.jit(method.collect)
  for stage in (0, 3, 4):
    start = int(pg.interval(cfg, 10, stage, KEY)[0])
    state = dict(state, interval=pg.interval(cfg, 10, jnp.asarray(stage), KEY))
    experience = collect(state, models.frozen, batch, KEY)
    x = np.asarray(experience["latents"]).reshape(6, 4, 10, 2)
    assert start == {0: 3, 3: 0, 4: 0}[stage]
    assert np.all(x[:, :, start] == x[:, :1, start])
    assert len(np.unique(x[:, 0, start, 0])) == 6
    assert all(len(np.unique(x[:, :, k, 0])) == 24 for k in range(start + 1, 10))
    assert len(np.unique(np.asarray(experience["final"])[:, 0])) == 24
    assert collect._cache_size() == 1                  # one program for every interval
    # The trained transitions are those of the kernel: x_{k+1} = mean + s z.
    s = models.sampler
    k = np.arange(start, 9)
    mean = (s.x_coef[k, None] * x[:, :, k] - s.out_coef[k, None]
            * np.asarray(experience["out"]).reshape(x.shape)[:, :, k])
    noise = np.asarray(experience["noise"]).reshape(x.shape)[:, :, k]
    np.testing.assert_allclose(x[:, :, k + 1], mean + s.std[k, None] * noise, atol=1e-5)


def test_one_branch_of_the_whole_chain_is_ddpo():
  """T7: bit for bit, over three updates with several optimiser steps each."""
  data = analytic.Mixture(np.ones(1), np.zeros((1, 2)), np.ones(1))
  models = analytic.make_models(data, analytic.linear_reward([1.0, 0.0]), steps=5)
  ddpo = pg.Config(inner_epochs=2, minibatches=2, min_count=4)
  b2 = b2_diffurl.Config(group=1, advantage="prompt", select="all", interval="full", min_count=4,
                         history=16, minibatches=2)
  states = []
  for cfg in (ddpo, b2):
    method, batch = pg.make(models, cfg, OptimConfig(lr=1e-2)), batch_of(16, 3)

    @jax.jit
    def step(state, i):
      key = jax.random.fold_in(KEY, i)
      experience = method.collect(state, models.frozen, batch, key)
      return method.update(state, models.frozen, experience, experience["final"][:, 0], key)[0]
    state = method.init(KEY, models.frozen, batch)
    for i in range(3):
      state = step(state, i)
    states.append(state)
  assert int(states[0]["updates"]) == 12
  for name in ("policy", "optimizer", "history"):
    chex.assert_trees_all_equal(states[0][name], states[1][name])


# ---- the loss ------------------------------------------------------------------------------------


def test_schedule_of_the_published_sampler():
  """T13 and T14: standard deviations, and how sensitive log-densities are to the noise estimate."""
  at = lambda t: int(np.flatnonzero(SD20.timesteps == t)[0])
  np.testing.assert_allclose([SD20.std[at(t)] for t in (951, 651, 301, 51, 1)],
                             [0.6444, 0.5087, 0.3144, 0.0406, 0.0206], atol=6e-5)
  rate = SD20.lam * SD20.std
  np.testing.assert_allclose(rate[[0, 17, 18, 19]], [0.85, 1.14, 5.43, 1.00], atol=6e-3)
  assert rate[:18].min() == pytest.approx(0.62, abs=6e-3)
  share = lambda k: rate[18] ** 2 / (rate[k:] ** 2).sum()
  assert (share(0), share(6)) == pytest.approx((0.73, 0.80), abs=6e-3)
  even = np.asarray(pg.step_weights(pg.Config(step_weights="even"), SD20, 6, 20))
  np.testing.assert_allclose(even[:6], 0)
  assert even.mean() * 20 / 14 == pytest.approx(1) and np.ptp((even * rate)[6:]) < 1e-5


def test_log_ratio_is_the_difference_of_log_densities():
  """Mean over elements; exactly 0 at the sampling policy, where its gradient is that of log p."""
  x, noise, eps, delta = jax.random.normal(KEY, (4, 20, 8, 8, 4))
  k = jnp.arange(20)
  x_next = SD20.mean(k, x, eps) + SD20.at("std", k)[:, None, None, None] * noise
  log_p = lambda e: SD20.log_prob(k, x_next, SD20.mean(k, x, e)) / 256
  got = pg.log_ratio(SD20, k, eps + 0.1 * delta, eps, noise)
  np.testing.assert_allclose(got, log_p(eps + 0.1 * delta) - log_p(eps), atol=3e-4)
  assert float(jnp.abs(pg.log_ratio(SD20, k, eps, eps, noise)).max()) == 0
  grads = jax.grad(lambda e: log_p(e).sum())(eps)
  np.testing.assert_allclose(
      jax.grad(lambda e: pg.log_ratio(SD20, k, e, eps, noise).sum())(eps), grads, atol=2e-5)


def test_why_the_noise_is_recorded():
  """T10: rounding x_{k+1} to bfloat16 moves the mean log-density by 32 and 8 clip ranges of 1e-4.

  That is at the last two steps, for latents of unit spread. The published errors are those of one
  latent, here there are 64.
  """
  generator = np.random.default_rng(0)
  for k, shift, error in ((19, -3.2e-3, 6.6e-4), (18, -8e-4, 3.3e-4)):
    mean, z = generator.normal(size=(2, 64, 16384))
    x = np.sqrt(1 - SD20.std[k] ** 2) * mean + SD20.std[k] * z
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    off = (rounded - x) / SD20.std[k]
    moved = -(z * off + off ** 2 / 2).mean(1)
    assert abs(moved.mean() - shift) < 4.5 * error / 8
    assert moved.std() == pytest.approx(error, rel=0.4)


def test_what_is_recorded_is_f32_whatever_the_network_computes_in():
  """Under a bfloat16 denoiser latents and noise are unrounded, and make the next latent.

  One in 2^16 normal f32 numbers is one of bfloat16 too.
  """
  data = analytic.Mixture(np.ones(1), np.asarray([[0.7] * 64]), np.asarray([0.25]))
  models = analytic.make_models(data, analytic.linear_reward([1.0] * 64), steps=20)
  denoise = models.denoise
  models = dataclasses.replace(models, denoise=lambda v, x, t, c: denoise(
      v, x.astype(jnp.bfloat16).astype(jnp.float32), t, c).astype(jnp.bfloat16))
  _, _, experience, *_ = first_update(models, unbiased(), lambda x: x.sum(-1), 8)
  for name in ("latents", "noise", "out", "final"):
    assert experience[name].dtype == jnp.float32
  rounded = lambda a: a.astype(jnp.bfloat16).astype(jnp.float32) == a
  assert rounded(experience["out"]).all()                     # the network's own, and no worse
  for name in ("latents", "noise", "final"):
    assert rounded(experience[name]).mean() < 1e-2
  sampler, k = models.sampler, jnp.arange(20)
  x, noise, eps = (jnp.moveaxis(experience[name], 1, 0) for name in ("latents", "noise", "out"))
  after = jnp.concatenate([x[1:], experience["final"][None]])
  np.testing.assert_allclose(
      after, jax.vmap(sampler.mean)(k, x, eps) + sampler.at("std", k)[:, None, None] * noise,
      rtol=1e-6, atol=1e-6)


def test_mean_ratio_is_below_one():
  """T11: log rho has mean -m / 2 and variance m / D."""
  n, d, k = 100_000, 16, 5
  z = jax.random.normal(KEY, (n, d))
  rate = SD20.lam[k] * SD20.std[k]
  delta = jnp.full((n, d), 0.5)
  got = np.asarray(pg.log_ratio(SD20, jnp.full(n, k), delta, jnp.zeros((n, d)), z), np.float64)
  m = (rate * 0.5) ** 2
  assert abs(got.mean() + m / 2) < 4.5 * np.sqrt(m / d / n)
  assert got.var() == pytest.approx(m / d, rel=4.5 * np.sqrt(2 / n))
  rho = np.exp(got)
  assert abs(rho.mean() - np.exp(-m / 2 * (1 - 1 / d))) < 4.5 * rho.std() / np.sqrt(n)


@pytest.mark.parametrize("adv, log_rho, alive", [
    (1.0, 0.0, True), (-1.0, 0.0, True), (1.0, 0.2, False), (1.0, -0.2, True),
    (-1.0, 0.2, True), (-1.0, -0.2, False)])
def test_clip_geometry(adv, log_rho, alive):
  """T15: outside the range the gradient lives only where the advantage pulls back."""
  value, slope = jax.value_and_grad(lambda r: pg.surrogate("clip", r, adv, 0.1))(log_rho)
  assert float(slope) == pytest.approx(-adv * np.exp(log_rho) if alive else 0.0)
  rho = np.exp(log_rho)
  assert float(value) == pytest.approx(max(-adv * rho, -adv * np.clip(rho, 0.9, 1.1)))
  assert float(jax.grad(lambda r: pg.surrogate("score", r, adv, 0.1))(log_rho)) == -adv


@pytest.mark.parametrize("preset, weights, parts", [
    ("b2_paper", "even", 1), ("b2_code", "uniform", 4)])
def test_update_in_numpy(preset, weights, parts):
  """One optimiser step of the presets from the experience alone.

  T16: the mean over kept samples and trained steps, also where micro-batches keep unequal numbers.
  """
  data = analytic.Mixture(np.ones(1), np.zeros((1, 2)), np.ones(1))
  models = analytic.make_models(data, analytic.linear_reward([1.0, 0.0]), steps=10)
  s = models.sampler
  cfg = b2_diffurl.Config(**{**b2_diffurl.PRESETS[preset], "group": 4, "inner_epochs": 1,
                             "step_weights": weights})
  state, new, experience, rewards, metrics = first_update(
      models, cfg, lambda x: jnp.square(x[:, 0]), 32, prompts=3,
      optim=dataclasses.replace(DESCENT, accumulate=parts))
  got = moved(state, new)
  r = np.asarray(rewards, np.float64).reshape(8, 4)
  expected, count, start = np.zeros((11, 2)), 0, 3
  rate = (s.lam * s.std)[:, None]
  step_weight = np.ones((10, 1)) if weights == "uniform" else 7 / rate / (1 / rate[3:]).sum()
  z = np.asarray(experience["noise"], np.float64).reshape(8, 4, 10, 2)
  for i in range(8):
    best, worst = r[i].argmax(), r[i].argmin()
    if preset == "b2_paper":
      half = (r[i, best] - r[i, worst]) / r[i].std(ddof=1) / 2
      keep = [(best, half), (worst, -half)]
    else:
      pool = r[np.arange(8) % 3 == i % 3]
      score = (r[i] - pool.mean()) / pool.std(ddof=1)
      keep = [(j, score[j]) for j, yes in ((best, score[best] >= 0.5),
                                           (worst, score[worst] < -0.5)) if yes]
    for j, adv in keep:
      count += 1
      expected[start:10] += (-adv * step_weight * rate * z[i, j] / 2)[start:]   # mean over D = 2
  np.testing.assert_allclose(got["bias"], expected / count / 7, rtol=2e-3, atol=1e-5)
  assert float(metrics["train/kept"]) == pytest.approx(count / 32)


@pytest.mark.parametrize("parts", [1, 2])
def test_kl_to_the_reference_is_part_of_the_loss(parts):
  """Beside advantages of zero, at distance d from it: gradient `kl rate^2 d`, of the mean of steps.

  Counted are a reference pass of each transition and the same passes of the policy.
  """
  models, batch = chain(), batch_of(8)
  optim, cfg = dataclasses.replace(DESCENT, accumulate=parts), pg.Config(advantage="batch", kl=0.6)
  method = pg.make(models, cfg, optim)
  state = method.init(KEY, models.frozen, batch)
  state["policy"] = {"shift": state["policy"]["shift"] + 0.3}
  experience = method.collect(state, models.frozen, batch, KEY)
  new, metrics = jax.jit(method.update)(state, models.frozen, experience, jnp.ones(8), KEY)
  np.testing.assert_allclose(moved(state, new)["shift"], -0.6 * 0.3 / STD ** 2 / 2, rtol=1e-5)
  assert float(metrics["train/path_kl"]) == pytest.approx((0.045 / STD ** 2).sum(), rel=1e-5)
  assert method.cost(8)["denoiser_forward"] == 8 * 2 * 3
  assert method.tilt is None                               # standardised advantages have none


def test_every_pass_deals_each_group_once():
  dealt = np.asarray(pg.deal(KEY, 12, 3, 2))
  assert dealt.shape == (6, 4)
  for each in (dealt[:3], dealt[3:]):
    np.testing.assert_array_equal(np.sort(each, 0), np.repeat(np.arange(3)[:, None], 4, 1))
  assert not np.array_equal(dealt[:3], dealt[3:])


def test_clipping_holds_the_policy_near_the_one_that_sampled():
  """Many passes over one batch: without a clip range the policy runs away from its samples."""
  kl, clipped = {}, {}
  for clip in (0.05, 1e6):
    cfg = pg.Config(inner_epochs=40, clip_range=clip, advantage="batch")
    *_, metrics = first_update(chain(), cfg, lambda x: x[:, 0], 256, OptimConfig(lr=0.05))
    kl[clip], clipped[clip] = (float(metrics[f"train/{n}"]) for n in ("update_kl", "clip_fraction"))
  assert clipped[0.05] > 0.3 and clipped[1e6] == 0
  assert kl[0.05] < 0.2 * kl[1e6]


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [
    pg.Config(minibatches=2, inner_epochs=2, clip_range=0.2, min_count=8),
    b2_diffurl.Config(group=8, clip_range=0.2, interval_first=0.5, interval_stages=40),
])
def test_a_sparse_reward_is_learned(cfg):
  """R = [x > 2.5], 0.7 % of the base's samples; its mean follows from the offsets exactly."""
  models = chain()
  method, batch = pg.make(models, cfg, OptimConfig(lr=0.05)), batch_of(256, 2, cfg.group)

  def step(state, i):
    key = jax.random.fold_in(KEY, i)
    experience = method.collect(state, models.frozen, batch, key)
    rewards = (experience["final"][:, 0] > 2.5).astype(jnp.float32)
    return method.update(state, models.frozen, experience, rewards, key)
  state = method.init(KEY, models.frozen, batch)
  state, metrics = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(60)))(state)

  def success(shift):
    offset = OFFSET + np.asarray(shift, np.float64)
    mean = GAIN[1] * offset[0] + offset[1]
    return ndtr((mean - 2.5) / np.sqrt(GAIN[1] ** 2 * (GAIN[0] ** 2 + STD[0] ** 2) + STD[1] ** 2))
  assert success(np.zeros(2)) < 0.01
  assert success(method.product(state)["shift"]) > 0.8
  assert np.all(np.isfinite(metrics["loss/total"])) and int(state["stage"]) == 60


def test_cost_counts_evaluations():
  data = analytic.Mixture(np.ones(1), np.zeros((1, 2)), np.ones(1))
  models = analytic.make_models(data, analytic.linear_reward([1.0, 0.0]), steps=20)
  cost = pg.cost(models, pg.Config(inner_epochs=3), 16)
  assert (cost["denoiser_forward"], cost["denoiser_backward"]) == (16 * 20 * 4, 16 * 20 * 3)
  guided = dataclasses.replace(models, guidance=5.0)
  cost = pg.cost(guided, b2_diffurl.Config(), 5 * 100)      # per root T + (K - 1) s, s = 16.97
  trained = 2 * 100 * 2 * 16.97 * 2
  assert cost["denoiser_backward"] == round(trained)
  assert cost["denoiser_forward"] == round(2 * 100 * (20 + 4 * 16.97) + trained)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, options, message", [
    ("ddpo", dict(objective="ppo"), r"method\.objective='ppo' is not one of"),
    ("ddpo", dict(clip_range=-1.0), r"method\.clip_range=-1\.0 is below 0"),
    ("ddpo", dict(inner_epochs=0), r"method\.inner_epochs=0 is below 1"),
    ("ddpo", dict(objective="score", inner_epochs=2), r"method\.objective='score' allows one"),
    ("ddpo", dict(objective="score", minibatches=2), r"set method\.inner_epochs=1 and method\.min"),
    ("ddpo", dict(group=0), r"method\.group=0 is below 1"),
    ("ddpo", dict(interval="late"), r"method\.interval='late' is not one of \('full', 'early'"),
    ("ddpo", dict(interval_first=0.0), r"method\.interval_first=0\.0 .* must be in \(0, 1\]"),
    ("ddpo", dict(interval_last=0.5), r"method\.interval_last=0\.5 must be in \(0, 1\], the first"),
    ("ddpo", dict(interval_last=1.5), r"method\.interval_last=1\.5 must be"),
    ("ddpo", dict(min_count=1), r"method\.min_count=1 is below 2"),
    ("ddpo", dict(advantage="group_z"), r"method\.advantage='group_z' compares .* method\.group"),
    ("ddpo", dict(select="pairs"), r"method\.select='pairs' compares .* method\.group"),
    ("ddpo", dict(select="extremes"), r"method\.select='extremes' compares"),
    ("b2_diffurl", dict(pairs=3), r"method\.pairs=3 exceeds half of method\.group=5"),
    ("b2_diffurl", dict(keep_below=0.7), r"keep_below=0\.7 exceeds method\.keep_above=0\.5"),
    ("b2_diffurl", dict(branch=1), r"method\.branch=1 is of type int, not bool"),
    ("b2_diffurl", dict(history=-1), r"method\.history=-1 is below 0"),
])
def test_bad_values_name_their_key(name, options, message):
  with pytest.raises(UserError, match=message):
    load_method(name).Config(**options)


def test_batches_are_whole_groups_and_parts():
  config = recipes.default("b2_diffurl").unlock()
  config.sample.batch = 16
  with pytest.raises(UserError, match=r"sample\.batch=16 does not divide into groups of method"):
    recipes.parse(config)
  config.sample.batch, config.optim.accumulate = 20, 3
  with pytest.raises(UserError, match=r"sample\.batch=20 in groups of method\.group=5 does not"):
    recipes.parse(config)
  config.sample.batch, config.optim.accumulate = 40, 2
  cfg = recipes.parse(config)
  cfg.check_devices(4)
  with pytest.raises(UserError, match=r"leaves 4 groups of method\.group=5 for 8 devices"):
    cfg.check_devices(8)


@pytest.mark.parametrize("options", [dict(eta=0.0), dict(final="clean")])
def test_a_step_without_noise_is_refused(options):
  data = analytic.Mixture(np.ones(1), np.zeros((1, 1)), np.ones(1))
  models = analytic.make_models(data, analytic.linear_reward([1.0]), steps=5, **options)
  with pytest.raises(UserError, match=r"'ddpo' needs noise .* sample\.final='noisy'"):
    methods.make("ddpo", models, pg.Config(), OptimConfig())


def test_guidance_is_part_of_the_policy():
  """The loss differentiates the guided estimate: here w times the conditional branch."""
  plain = chain()
  models = dataclasses.replace(
      plain, guidance=3.0,
      denoise=lambda v, x, t, cond: plain.denoise(v, x, t, cond) * cond["sign"][:, None])
  batch = dict(batch_of(64), conditioning=Conditioning({"sign": jnp.ones(64)},
                                                       {"sign": jnp.zeros(64)}))
  cfg = unbiased()
  method = pg.make(models, cfg, DESCENT)

  @jax.jit
  def run():
    state = method.init(KEY, models.frozen, batch)
    experience = method.collect(state, models.frozen, batch, KEY)
    rewards = experience["noise"].sum((1, 2))
    state, _ = method.update(state, models.frozen, experience, rewards, KEY)
    return state["policy"]["shift"], rewards, experience["noise"][..., 0]
  shift, rewards, z = run()
  adv = np.asarray(advantages(cfg, rewards, None))
  np.testing.assert_allclose(2 * shift, 3 * (adv[:, None] * np.asarray(z) / STD).mean(0), rtol=1e-4)
