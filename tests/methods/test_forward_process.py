"""NFT, AWM and RAM against closed forms, through the methods' own losses and updates."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from jaxalign.config.schema import OptimConfig
from jaxalign.errors import UserError
from jaxalign.methods import awm, nft, ram
from jaxalign.methods.shared import forward_process as fp
from jaxalign.testing import analytic

KEY = jax.random.key(5)
MEAN, VAR = 0.7, 0.5
GAUSSIAN = analytic.Mixture(np.ones(1), np.asarray([[MEAN]]), np.asarray([VAR]))
# Plain descent of rate 1.
DESCENT = OptimConfig(lr=1e6, eps=1e6, b1=0.0, clip_norm=0.0)
SHAPE = (6, 3, 2)
slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)      # more of the same


def some_row(adv, **entries):
  """Random outputs, for which `old` is the policy unless given."""
  keys = jax.random.split(KEY, 6)
  draw = lambda i: jax.random.normal(keys[i], SHAPE)
  out = draw(0)
  sigma = jnp.linspace(0.1, 0.9, SHAPE[0])
  row = fp.Row(target=draw(1), adv=jnp.asarray(adv, jnp.float32), sigma=sigma, unit=sigma, old=out,
               ref=out, start=out)
  return out, row._replace(**entries)


def gradient(cfg, out, row):
  return np.asarray(jax.grad(lambda o: cfg.row_loss(o, row)[0].sum())(out), np.float64)


ADV = np.asarray([1.5, -2.0, 0.0, 4.0, -0.3, 0.7])


@pytest.mark.parametrize("weighting", ["adaptive", "x0", "own"])
@pytest.mark.parametrize("prox, clip", [(5.0, 5.0), (0.5, 5.0), (1.0, 4.0)])
def test_first_gradient_of_nft(weighting, prox, clip):
  """At theta = old it is `2 k A (o_old - y) / D`, whatever prox and the clip range are."""
  out, row = some_row(ADV)
  got = gradient(nft.Config(weighting=weighting, prox=prox, advantage_clip=clip), out, row)
  error = np.asarray(out - row.target, np.float64)
  sigma = np.asarray(row.sigma, np.float64)[:, None, None]
  level = {"adaptive": sigma / np.abs(error).mean((1, 2), keepdims=True), "x0": sigma ** 2,
           "own": 1.0}[weighting]
  np.testing.assert_allclose(got, 2 * level * ADV[:, None, None] * error / error[0].size,
                             rtol=1e-4, atol=1e-6)
  assert np.all(got[2] == 0)


def test_two_sides_are_one_regression():
  """The published form without its weights, value up to the stated constant, gradient alike."""
  out, row = some_row(ADV, old=jax.random.normal(jax.random.key(9), SHAPE))
  c, beta = 5.0, 0.6
  cfg = nft.Config(prox=c * beta, weighting="x0")

  def two_sided(out):
    share = 0.5 * (row.adv / c + 1)
    clean = lambda o: row.sigma ** 2 * fp.mean_square(o - row.target)
    return c / beta * (share * clean(beta * out + (1 - beta) * row.old)
                       + (1 - share) * clean((1 + beta) * row.old - beta * out))
  np.testing.assert_allclose(gradient(cfg, out, row),
                             jax.grad(lambda o: two_sided(o).sum())(out), rtol=1e-4, atol=1e-6)
  constant = (c / beta * row.sigma ** 2 * (1 - (row.adv / c) ** 2)
              * fp.mean_square(row.old - row.target))
  np.testing.assert_allclose(cfg.row_loss(out, row)[0], two_sided(out) - constant, rtol=1e-4,
                             atol=1e-5)


@pytest.mark.parametrize("weighting, level", [
    ("uniform", lambda t, l: 1.0), ("sigma", lambda t, l: t), ("sigma2", lambda t, l: t ** 2),
    ("huber", lambda t, l: t / (2 * np.sqrt(l))), ("ghuber", lambda t, l: t * l ** -0.75)])
def test_all_three_start_in_one_direction(weighting, level):
  """At theta = old = ref, with the factors that their weights stand for."""
  out, row = some_row(ADV)
  of_nft = gradient(nft.Config(weighting="own"), out, row)
  square = np.asarray(fp.mean_square(out - row.target), np.float64)
  factor = level(np.asarray(row.sigma, np.float64), square)
  of_awm = gradient(awm.Config(weighting=weighting), out, row)
  np.testing.assert_allclose(of_awm, of_nft * np.reshape(factor / 5.0, (-1, 1, 1)) * np.ones(SHAPE),
                             rtol=1e-3, atol=1e-6)
  for inner in ("policy", "old"):
    of_ram = gradient(ram.Config(eta=0.3, inner=inner), out, row)
    np.testing.assert_allclose(of_ram, 0.3 * of_nft, rtol=1e-4, atol=1e-6)


def test_ram_is_two_regressions():
  """`|o - o_ref|^2 + eta A |o - y|^2`; the lagged form differs by `2 eta A (o_old - o) / D`."""
  other = lambda seed: jax.random.normal(jax.random.key(seed), SHAPE)
  out, row = some_row(ADV, old=other(1), ref=other(2))
  eta = 0.7
  both = lambda o: (fp.mean_square(o - row.ref)
                    + eta * row.adv * fp.mean_square(o - row.target)).sum()
  got = gradient(ram.Config(eta=eta), out, row)
  np.testing.assert_allclose(got, jax.grad(both)(out), rtol=1e-4, atol=1e-6)
  lagged = gradient(ram.Config(eta=eta, inner="old"), out, row)
  np.testing.assert_allclose(
      lagged - got, 2 * eta * row.adv[:, None, None] * (row.old - out) / out[0].size, rtol=1e-3,
      atol=1e-5)


def test_awm_holds_its_ratio():
  """Outside [0, 2] only what pulls back has a gradient."""
  out, row = some_row(np.full(6, 5.0))
  cfg = awm.Config(minibatches=2, weighting="uniform", kl_old=0.0)
  far = row._replace(start=out + 3.0)                    # worse before: rho is above 2
  log_rho = fp.mean_square(far.start - far.target) - fp.mean_square(out - far.target)
  far = far._replace(adv=jnp.where(log_rho > 1, far.adv, 0.0))
  assert np.all(gradient(cfg, out, far) == 0) and float(far.adv.sum()) > 10
  worse = far._replace(adv=-far.adv)
  assert np.all((np.abs(gradient(cfg, out, worse)).sum((1, 2)) > 0) == (far.adv > 0))


# ---- advantages, levels, the lagged policy -------------------------------------------------------


def test_advantages():
  rewards = jnp.asarray([1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 5.0])
  of = lambda **options: np.asarray(fp.advantages(nft.Config(group=4, **options), rewards, 0.5))
  np.testing.assert_allclose(of(), [-4, -2, 0, 6, 0, 0, 0, 0])
  np.testing.assert_allclose(of(baseline="loo"), of() * 4 / 3, rtol=1e-6)
  np.testing.assert_allclose(of(baseline="min"), [0, 2, 4, 10, 0, 0, 0, 0])
  np.testing.assert_allclose(of(advantage_scale="batch_std"), 0.5 * of() / np.std(rewards),
                             rtol=1e-5)
  np.testing.assert_allclose(of(advantage_scale="prompt_std")[:4],
                             0.5 * of()[:4] / np.std(rewards[:4]), rtol=1e-5)
  assert np.all(of(advantage_scale="prompt_std")[4:] == 0)
  for scale in ("batch_std", "prompt_std"):               # what is added or multiplied falls out
    cfg = nft.Config(group=4, advantage_scale=scale)
    np.testing.assert_allclose(fp.advantages(cfg, 3 * rewards + 7, 0.5),
                               fp.advantages(cfg, rewards, 0.5), atol=1e-5)


@pytest.mark.parametrize("baseline, factor", [("mean", 0.75), ("loo", 1.0)])
def test_a_groups_own_mean_shrinks_the_signal(baseline, factor):
  x = jax.random.normal(KEY, (200_000,))
  cfg = nft.Config(group=4, baseline=baseline)
  products = np.asarray(fp.advantages(cfg, x, 1.0) * x, np.float64).reshape(-1, 4).mean(1)
  assert abs(products.mean() - factor) < 4 * products.std() / np.sqrt(len(products))


def test_decay_of_the_lagged_policy():
  """The published tables at n = 0, 74, 75, 76, 500."""
  at = lambda cfg: [float(fp.old_decay(cfg, n)) for n in (0, 74, 75, 76, 500)]
  np.testing.assert_allclose(at(nft.Config()), [0, 0.074, 0.075, 0.076, 0.5], rtol=1e-5)
  np.testing.assert_allclose(at(nft.Config(**nft.PRESETS["release_ocr"])),
                             [0, 0, 0, 0.0075, 0.999], rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(at(nft.Config(old_rate=0.0)), 0)


def models_on(path, reward=analytic.linear_reward([1.0]), steps=10, **options):
  if path == "flow":
    options = dict(schedule=analytic.FLOW_SCHEDULE, kind="dpm2", final="clean", **options)
  return analytic.make_models(GAUSSIAN, reward, steps=steps, **options)


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_levels_are_the_samplers_own(path):
  """One in each stratum, none that is nearly clean, other ones in every row; noise of the id."""
  models, cfg = models_on(path, steps=20), nft.Config(levels=4)
  sampler = models.sampler
  batch = analytic.make_batch(500)
  rows = fp.draw(models, cfg, jnp.zeros((500, 1)), batch, KEY)
  usable = sampler.timesteps[sampler.sigma >= 0.02]
  strata = np.array_split(usable, 4)
  for i, stratum in enumerate(strata):
    seen = np.unique(np.asarray(rows["t"][:, i]))
    np.testing.assert_allclose(seen, np.sort(stratum), rtol=1e-6)
  some = dict(batch, sample_ids=batch["sample_ids"][100:200])
  again = fp.draw(models, cfg, jnp.zeros((100, 1)), {**some, "conditioning": None}, KEY)
  np.testing.assert_array_equal(again["noise"], rows["noise"][100:200])


def first_update(module, cfg, models, size=64, rewards=None, optim=DESCENT):
  method = module.make(models, cfg, optim)
  batch = analytic.make_batch(size)
  state = method.init(KEY, models.frozen, batch)
  experience = jax.jit(method.collect)(state, models.frozen, batch, KEY)
  rewards = experience["final"][:, 0] if rewards is None else rewards
  return method, state, experience, *jax.jit(method.update)(
      state, models.frozen, experience, rewards, KEY)


@pytest.mark.parametrize("module", [nft, awm, ram])
def test_endpoints_are_all_that_is_kept(module):
  cfg = module.Config(old_rate=0.0, minibatches=2)
  method, state, experience, new, metrics = first_update(module, cfg, models_on("flow"))
  assert experience.keys() == {"final", "batch"} and experience["final"].shape == (64, 1)
  assert float(jnp.abs(new["policy"]["bias"]).max()) > 0
  for a, b in zip(jax.tree.leaves(new["old"]), jax.tree.leaves(new["policy"])):
    np.testing.assert_array_equal(a, b)                   # old is the policy where nothing decays
  assert float(metrics["train/mixed_groups"]) == 1


def test_old_has_no_gradient():
  models, cfg = models_on("flow"), nft.Config(kl=0.1)
  rows = fp.draw(models, cfg, jnp.ones((8, 1)), analytic.make_batch(8), KEY)
  rows = jax.tree.map(lambda a: a[:, 0], {**rows, "adv": jnp.ones((8, 4))})
  policy = models.init_policy(KEY, models.frozen)
  of = lambda old: fp.loss(models, cfg, policy, {"old": old, "start": policy}, models.frozen,
                           rows)[0]
  assert all(np.all(g == 0) for g in jax.tree.leaves(jax.jit(jax.grad(of))(policy)))


def test_the_budget_ends_training():
  """Three updates of 1 / prox, the last one shortened; then nothing moves, momentum included."""
  models = dataclasses.replace(models_on("flow"), reward_std=0.5)
  cfg = nft.Config(prox=4.0, tilt_budget=0.6, old_rate=0.0)
  method = nft.make(models, cfg, OptimConfig(lr=0.01))
  batch = analytic.make_batch(32)
  state, tilts, update = method.init(KEY, models.frozen, batch), [], jax.jit(method.update)
  collect = jax.jit(method.collect)
  states = []
  for i in range(5):
    experience = collect(state, models.frozen, batch, jax.random.fold_in(KEY, i))
    state, metrics = update(state, models.frozen, experience, experience["final"][:, 0], KEY)
    tilts.append(float(metrics["train/tilt"]))
    states.append(state)
  np.testing.assert_allclose(tilts, [0.25, 0.5, 0.6, 0.6, 0.6], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(states[2]), jax.tree.leaves(states[4])):
    np.testing.assert_array_equal(a, b)
  assert float(method.tilt(state)) == pytest.approx(1.2, rel=1e-5)       # 1 / reward units


def test_rows_are_interchangeable():
  models, cfg = models_on("flow"), ram.Config(group=2)
  _, state, experience, new, _ = first_update(ram, cfg, models, 16)
  order = np.arange(16).reshape(-1, 2)[::-1].reshape(-1)
  batch = {**experience["batch"], "sample_ids": experience["batch"]["sample_ids"][order]}
  again, _ = jax.jit(ram.make(models, cfg, DESCENT).update)(
      state, models.frozen, {"final": experience["final"][order], "batch": batch},
      experience["final"][order, 0], KEY)
  for a, b in zip(jax.tree.leaves(again["policy"]), jax.tree.leaves(new["policy"])):
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("module, keys, message", [
    (nft, dict(prox=0.0), r"method\.prox=0\.0"),
    (nft, dict(tilt_budget=1.0, advantage_scale="batch_std"), "advantage_scale='fixed'"),
    (nft, dict(advantage_clip=0.0), r"method\.advantage_clip=0\.0"),
    (nft, dict(group=1), r"method\.group=1 is below 2"),
    (ram, dict(kl=0.1), "method.eta is its strength")])
def test_refused(module, keys, message):
  with pytest.raises(UserError, match=message):
    module.Config(**keys)


def test_more_levels_than_the_sampler_has():
  with pytest.raises(UserError, match=r"method\.levels=11 exceeds the 10 levels"):
    nft.make(models_on("flow"), nft.Config(levels=11), DESCENT)


# ---- minimisers and fixed points: affine networks, solved exactly --------------------------------


def quantiles(n):
  """Standard normal numbers whose first five moments are exact."""
  z = norm.ppf((np.arange(n) + 0.5) / n)
  of = lambda c: (z + c * z ** 3) / (z + c * z ** 3).std()
  return of(brentq(lambda c: (of(c) ** 4).mean() - 3, 0, 0.1))


def solver(models, cfg, levels, n=(300, 40)):
  """A function `(old, m, v, reward) -> {"bias", "slope"}`: the minimum of the mean loss over
  N(m, v) outputs at these levels.

  The loss is quadratic in them and levels do not meet, so three gradients give the answer.
  """
  x_0, noise = (g.reshape(-1) for g in np.meshgrid(*map(quantiles, n), indexing="ij"))
  flat = lambda a: jnp.asarray(np.tile(a, len(levels)), jnp.float32)
  t = jnp.repeat(models.sampler.at("timesteps", jnp.asarray(levels)), len(x_0))
  zero = models.init_policy(KEY, models.frozen)

  @jax.jit
  def grad(policy, old, x_0, adv):
    rows = {"x_0": x_0[:, None], "noise": flat(noise)[:, None], "adv": adv, "t": t,
            "conditioning": analytic.make_batch(1)["conditioning"]}
    return jax.grad(lambda p: fp.loss(models, cfg, p, {"old": old, "start": None}, models.frozen,
                                      rows)[0])(policy)

  def solve(old, m, v, reward):
    samples = m + np.sqrt(v) * x_0
    values = reward(samples)
    data = zero if old is None else old, flat(samples), flat(values - values.mean())
    with_ones = lambda name: {**zero, name: zero[name] + 1.0}
    g, g_b, g_s = (jax.tree.map(lambda a: np.asarray(a, np.float64), grad(p, *data))
                   for p in (zero, with_ones("bias"), with_ones("slope")))
    out = {name: np.zeros_like(g[name]) for name in zero}
    for k in levels:
      at = lambda tree: np.asarray([tree["bias"][k, 0], tree["slope"][k, 0]])
      hessian = np.stack([at(g_b) - at(g), at(g_s) - at(g)], 1)
      out["bias"][k, 0], out["slope"][k, 0] = np.linalg.solve(hessian, -at(g))
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), out)
  return solve


@pytest.mark.parametrize("weighting", ["x0", "own"])
def test_minimiser_at_one_level(weighting):
  """Flow at sigma 1/2, R = x: o moves by -V / (c beta rho sigma) at every x."""
  models = models_on("flow", steps=2)
  cfg = nft.Config(weighting=weighting)
  policy = solver(models, cfg, [1])(None, MEAN, VAR, lambda x: x / np.sqrt(0.5))
  assert float(policy["bias"][1, 0]) == pytest.approx(-0.1885618, rel=1e-3)
  assert abs(float(policy["slope"][1, 0])) < 1e-3


@pytest.mark.parametrize("t, shift", [(981, -0.0107475), (501, -0.0732134), (201, -0.0978658)])
def test_minimiser_on_the_variance_preserving_path(t, shift):
  models = models_on("vp", steps=50)
  k = int(np.argmin(np.abs(models.sampler.timesteps - t)))
  assert models.sampler.timesteps[k] == t
  policy = solver(models, nft.Config(weighting="own"), [k])(
      None, MEAN, VAR, lambda x: x / np.sqrt(0.5))
  assert float(policy["bias"][k, 0]) == pytest.approx(shift, rel=3e-3)


LEVELS = list(range(40))            # sigma 1, 0.975 .. 0.025


def endpoint(policy=None):
  """Mean and variance of the outputs of Heun's method, which are linear in the initial noise."""
  sigma = 1 - np.arange(40) / 40
  slope, offset = analytic.gaussian_line(analytic.FLOW_SCHEDULE, 1 - sigma, sigma, MEAN, VAR)
  if policy is not None:
    slope = slope + np.asarray(policy["slope"], np.float64)[:40, 0]
    offset = offset + np.asarray(policy["bias"], np.float64)[:40, 0]
  u = lambda x, k: slope[k] * x + offset[k]
  x = np.asarray([0.0, 1.0])
  for k, d in enumerate(np.diff(np.append(sigma, 0))):
    first = u(x, k)
    x = x + d * (first if k == 39 else (first + u(x + d * first, k + 1)) / 2)
  return x[0], (x[1] - x[0]) ** 2


def epochs_of(cfg, reward, count):
  """Mean and variance after so many epochs of exact inner solves, old the policy after each."""
  solve, policy = solver(models_on("flow", steps=40), cfg, LEVELS), None
  for _ in range(count):
    policy = solve(policy, *endpoint(policy), reward)
  return endpoint(policy)


def quadratic(x):
  return -0.5 * (x - 2) ** 2


def test_the_exact_base():
  assert endpoint() == (pytest.approx(0.7), pytest.approx(0.49946, abs=1e-5))


def test_nft_tilts_on_for_ever():
  """R = x over s, beta 1, eight epochs: each shifts the mean by s / 5, the variance stays."""
  m, v = epochs_of(nft.Config(weighting="own"), lambda x: x / np.sqrt(0.5), 8)
  assert m == pytest.approx(1.83016, abs=5e-4) and v == pytest.approx(0.49946, abs=5e-4)


@pytest.mark.parametrize("steps, mean, variance", [
    slow(4, 1.54746, 0.19347), (8, 1.51177, 0.19728), slow(16, 1.49525, 0.19869)])
def test_a_budget_is_an_integrator_of_the_tilt(steps, mean, variance):
  """R = -(x - 2)^2 / 2 in K steps of 3 / K: the error of the exact tilt (1.48, 0.2) halves."""
  m, v = epochs_of(nft.Config(weighting="own", prox=steps / 3), quadratic, steps)
  assert m == pytest.approx(mean, abs=1e-3) and v == pytest.approx(variance, abs=1e-3)


def test_ram_is_first_order():
  """R = -(x - 2)^2 / 2, eta 1/2: (0.93274, 0.40539), where the exact tilt has (0.96, 0.4).

  With the residual of the policy before, each epoch is a regression, and the fixed point the same.
  """
  m, v = epochs_of(ram.Config(eta=0.5, inner="old"), quadratic, 14)
  assert m == pytest.approx(0.93274, abs=5e-4) and v == pytest.approx(0.40539, abs=5e-4)


@pytest.mark.parametrize("weighting", ["own", "x0"])
def test_one_model_in_three_outputs(weighting):
  """eps, v and x0 networks of a Gaussian on one path: the clean estimate shifts alike."""
  shifts = []
  for prediction in ("epsilon", "v_prediction", "sample"):
    schedule = dataclasses.replace(analytic.SD_SCHEDULE, prediction=prediction)
    models = models_on("vp", schedule=schedule, steps=2)
    policy = solver(models, nft.Config(weighting=weighting), [1])(
        None, MEAN, VAR, lambda x: x / np.sqrt(0.5))
    q = models.sampler.clean_out_coef[1]
    shifts.append(-q * float(policy["bias"][1, 0]))
  np.testing.assert_allclose(shifts, shifts[0], rtol=2e-3)
  v = 0.5 * models.sampler.sigma[1] ** 2 / (0.5 * models.sampler.alpha[1] ** 2
                                            + models.sampler.sigma[1] ** 2)
  assert shifts[0] == pytest.approx(v / (5 * np.sqrt(0.5)), rel=3e-3)
