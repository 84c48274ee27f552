"""Adjoint Matching against closed forms, through the method's own functions."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import methods
from jaxalign.config.schema import OptimConfig
from jaxalign.errors import UserError
from jaxalign.methods import adjoint_matching as am
from jaxalign.methods.shared import reward_gradient
from jaxalign.sampling import differentiable_rollout, guided_output, make_sampler
from jaxalign.testing import analytic

KEY = jax.random.key(7)
MEAN, VAR, BETA = 0.7, 0.5, 3.0
GAUSSIAN = analytic.Mixture(np.ones(1), np.asarray([[MEAN]]), np.asarray([VAR]))
MIXTURE = analytic.Mixture(np.asarray([0.4, 0.6]), np.asarray([[-1.0, 0.5], [1.0, -0.3]]),
                           np.asarray([0.3, 0.6]))
LINEAR, QUADRATIC = analytic.linear_reward([1.0]), analytic.quadratic_reward([2.0])
VP, FLOW = analytic.SD_SCHEDULE, analytic.FLOW_SCHEDULE
slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)      # more of the same


def config(**options):
  return am.Config(**{**dict(beta=BETA, beta_unit="raw", strata=0), **options})


def chain(steps, schedule=VP, reward=LINEAR, data=GAUSSIAN, policy=None, **options):
  options = {**({"final": "noisy"} if schedule is FLOW else {}), **options}
  return analytic.make_models(data, reward, steps=steps, schedule=schedule, policy=policy,
                              **options)


def line(models):
  """Slopes and offsets of the reference's steps, and products A_{k+1} of the slopes after k."""
  s = models.sampler
  slope, offset = analytic.gaussian_line(models.schedule, s.alpha, s.sigma, MEAN, VAR)
  gain = s.x_coef - s.out_coef * slope
  return gain, -s.out_coef * offset, np.append(np.cumprod(gain[::-1])[::-1][1:], 1.0)


def moments(models, policy):
  """Mean and variance of the output, and the path KL to the reference, of an affine policy."""
  s = models.sampler
  gain, offset, _ = line(models)
  slope, bias = (np.asarray(policy[name], np.float64)[:-1, 0] for name in ("slope", "bias"))
  m, v, kl = 0.0, 1.0, 0.0
  for k in range(s.steps):
    kl += 0.5 * s.rate[k] ** 2 * ((bias[k] + slope[k] * m) ** 2 + slope[k] ** 2 * v)
    step = gain[k] - s.out_coef[k] * slope[k]
    m, v = step * m + offset[k] - s.out_coef[k] * bias[k], step ** 2 * v + s.std[k] ** 2
  return m, v, kl


def trained(models, cfg, *, updates, batch=16, optim):
  method = am.make(models, cfg, optim)
  rows = analytic.make_batch(batch)

  def step(state, i):
    key = jax.random.fold_in(KEY, i)
    experience = method.collect(state, models.frozen, rows, key)
    return method.update(state, models.frozen, experience, None, key)
  state = method.init(KEY, models.frozen, rows)
  state, metrics = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(updates)))(state)
  return method.product(state), jax.tree.map(np.asarray, metrics)


def descent(rate):
  """Plain descent."""
  return OptimConfig(lr=rate * 1e6, eps=1e6, b1=0.0, clip_norm=0.0)


# ---- adjoints ------------------------------------------------------------------------------------


def all_rows(models, policy=None, batch=8, key=KEY):
  rows = analytic.make_batch(batch)
  trajectory = models.rollout(policy, models.frozen, rows, key)
  return {"latents": jnp.moveaxis(trajectory.latents, 0, 1), "conditioning": rows["conditioning"],
          "prepared": {}}, trajectory


@pytest.mark.parametrize("schedule", [VP, FLOW])
def test_adjoints_are_gradients_through_the_reference(schedule):
  """With the noise held, on a mixture, whose score bends; the last one is beta grad R."""
  models = chain(10, schedule, analytic.quadratic_reward([2.0, -1.0]), MIXTURE)
  rows, trajectory = all_rows(models)
  found, norms, first = am.adjoints(models, config(), models.frozen, rows, BETA, KEY)
  run, base = guided_output(models.denoise, 1.0), models.combine(None, models.frozen["base"])
  for j in (0, 4, 8, 9):
    def reward(x, j=j):
      final, _ = differentiable_rollout(run, base, models.sampler, rows["conditioning"], x,
                                        trajectory.noise[j + 1:], start=j + 1)
      return BETA * models.score(models.frozen["reward"], final, {}).sum()
    x = trajectory.latents[j + 1]
    np.testing.assert_allclose(found["h"][j], jax.grad(reward)(x), rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(found["out_ref"][j], trajectory.out[j], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found["h"][-1], BETA * (jnp.asarray([[2.0, -1.0]]) - trajectory.final),
                             rtol=1e-5)
  np.testing.assert_allclose(norms * BETA, jnp.sqrt(jnp.square(found["h"][-1]).sum(-1)), rtol=1e-5)
  assert first.shape == (8,)


def test_jacobians_are_the_references():
  """Whatever the policy, h_k / h_{k+1} is the slope of the reference's step."""
  models = chain(20)
  policy = {"bias": jnp.full((21, 1), 0.3), "slope": jnp.full((21, 1), -0.2)}
  rows, _ = all_rows(models, policy)
  found, _, first = am.adjoints(models, config(), models.frozen, rows, BETA, KEY)
  gain, _, after = line(models)
  h = np.asarray(found["h"], np.float64)[..., 0]
  np.testing.assert_allclose(h, BETA * after[:, None] * np.ones(8), rtol=1e-4)
  np.testing.assert_allclose(first, BETA * after[0] * gain[0] * np.ones(8), rtol=1e-4)
  few, *_ = am.adjoints(models, config(adjoint_steps=5), models.frozen, rows, BETA, KEY)
  np.testing.assert_array_equal(few["h"], found["h"][-5:])


@pytest.mark.parametrize("k, h, gap", [(0, .128631, -.1140532), (20, .749571, -.6245805),
                                       (40, 2.278792, -.9016051), (48, 2.996161, -.0361205),
                                       (49, 3.0, -.0617481)])
def test_table_of_adjoints(k, h, gap):
  models = chain(50)
  _, _, after = line(models)
  assert BETA * after[k] == pytest.approx(h, abs=2e-6)
  assert -h / models.sampler.lam[k] == pytest.approx(gap, rel=1e-4)


# ---- the loss ------------------------------------------------------------------------------------


def loss_of(models, cfg, rows, policy):
  found, *_ = am.adjoints(models, cfg, models.frozen, rows, BETA, KEY)
  steps, batch = models.sampler.steps, rows["latents"].shape[0]
  k = jnp.broadcast_to(jnp.arange(steps)[:, None], (steps, batch))
  rows = {"k": k, "x_k": jnp.moveaxis(rows["latents"], 1, 0)[:-1], **found,
          "conditioning": rows["conditioning"]}
  return am.loss(models, cfg, policy, models.frozen, rows, jnp.full(steps, jnp.inf))[0]


@pytest.mark.parametrize("steps, schedule, control, eps", [
    (50, VP, .0776437, .4325405), (20, FLOW, .1743856, 2.0398972)])
def test_loss_at_the_reference(steps, schedule, control, eps):
  models = chain(steps, schedule)
  rows, _ = all_rows(models)
  zero = models.init_policy(KEY, models.frozen)
  for weighting, expected in (("control", control), ("eps", eps)):
    got = loss_of(models, config(weighting=weighting), rows, zero)
    assert float(got) == pytest.approx(expected, rel=1e-4)


def test_first_gradient_is_twice_that_of_draft():
  """With the control weighting, all steps, the same noise, up to the means over steps, elements."""
  models = chain(10, reward=analytic.quadratic_reward([2.0, -1.0]), data=MIXTURE)
  zero = models.init_policy(KEY, models.frozen)
  rows, _ = all_rows(models, zero)
  got = jax.grad(lambda p: loss_of(models, config(weighting="control"), rows, p))(zero)

  def reward(policy):
    out = reward_gradient.replayed(models, policy, models.frozen, rows, jnp.ones(10, bool))
    return -BETA * models.score(models.frozen["reward"], out, {}).mean()
  draft = jax.grad(reward)(zero)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(draft)):
    np.testing.assert_allclose(a, 2 / (10 * 2) * b, rtol=1e-3, atol=1e-5)


# ---- fixed points --------------------------------------------------------------------------------


CHAINS = [
    slow(dict(steps=10), .882920, 1.324379, .297866),
    slow(dict(steps=20), 1.102615, 1.653923, .369599),
    (dict(steps=50), 1.294062, 1.941092, .432810),
    (dict(steps=50, eta=0.75), 1.289036, 1.933553, .450162),
    slow(dict(steps=50, eta=0.25), .393422, .590133, .466490),
    (dict(steps=20, schedule=FLOW), 1.162571, 1.743856, .387524),
    slow(dict(steps=20, schedule=FLOW, shift=3.0), .981250, 1.471875, .327083),
    (dict(steps=20, schedule=FLOW, kind="flow_sde", eta=0.7), 1.375483, 2.063225,
     .486672)]


@pytest.mark.parametrize("options, shift, kl, variance", CHAINS)
def test_linear_rewards_shift_the_chain(options, shift, kl, variance):
  """One step of plain descent solves every bias: h does not depend on x."""
  models = chain(**options)
  steps = models.sampler.steps
  only_bias = dataclasses.replace(models, denoise=lambda v, x, t, cond: models.denoise(
      dict(v, policy=None if v["policy"] is None else dict(
          v["policy"], slope=jax.lax.stop_gradient(v["policy"]["slope"]))), x, t, cond))
  policy, metrics = trained(only_bias, config(require_memoryless=False), updates=2, batch=4,
                            optim=descent(steps / 2))
  m, v, path_kl = moments(models, policy)
  base = moments(models, models.init_policy(KEY, models.frozen))[0]
  assert m - base == pytest.approx(shift, abs=2e-5)
  assert v == pytest.approx(variance, abs=1e-5) and path_kl == pytest.approx(kl, abs=1e-4)
  assert metrics["train/path_kl"][1] == pytest.approx(kl, rel=1e-4)
  assert metrics["loss/total"][1] < 1e-8 * metrics["loss/total"][0]
  assert models.sampler.memoryless == (options.get("eta", 1) == 1)


@pytest.mark.slow
def test_an_affine_policy_finds_it_too():
  """VP of 50 steps, every step, even weights, plain descent: slopes go to 0 again."""
  models = chain(50)
  policy, _ = trained(models, config(), updates=1000, optim=descent(8.0))
  m, v, kl = moments(models, policy)
  assert m - .697673 == pytest.approx(1.294062, abs=1e-4)
  assert (v, kl) == (pytest.approx(.432810, abs=2e-4), pytest.approx(1.941092, abs=1e-3))


@pytest.mark.parametrize("weighting", ["eps", slow("control")])
def test_a_subset_of_steps_has_the_same_minimum(weighting):
  """Strata and the last step, micro-batches, both weightings."""
  models = chain(20)
  policy, _ = trained(models, config(strata=5, weighting=weighting), updates=1500,
                      optim=OptimConfig(lr=0.1, clip_norm=0.0, accumulate=2, decay_steps=1500))
  m = moments(models, policy)[0]
  assert m - .696833 == pytest.approx(1.102615, rel=3e-3)


@pytest.mark.slow
@pytest.mark.parametrize("steps, schedule, mean, variance", [
    (20, VP, 1.380216, .187785), (20, FLOW, 1.398540, .191004)])
def test_a_curved_reward(steps, schedule, mean, variance):
  """R = -(x - 2)^2 / 2: the best policy of fixed variances, a little wider than the tilt."""
  sampler = make_sampler(schedule, steps, **({"final": "noisy"} if schedule is FLOW else {}))
  models = chain(steps, schedule, QUADRATIC, policy=analytic.affine_per_step(sampler, 1, MEAN))
  policy, _ = trained(models, config(), updates=3000, batch=64,
                      optim=OptimConfig(lr=0.03, clip_norm=0.0, decay_steps=3000))
  centre = MEAN * np.append(sampler.alpha, sampler.alpha_next[-1])[:, None]
  plain = {"slope": policy["slope"], "bias": policy["bias"] - policy["slope"] * centre}
  m, v, _ = moments(models, plain)
  assert m == pytest.approx(mean, abs=4e-3) and v == pytest.approx(variance, abs=4e-3)


# ---- the method ----------------------------------------------------------------------------------


def first_update(cfg, models, optim=None, size=16):
  method = am.make(models, cfg, optim or descent(1.0))
  batch = analytic.make_batch(size)
  state = method.init(KEY, models.frozen, batch)
  experience = jax.jit(method.collect)(state, models.frozen, batch, KEY)
  return method, *jax.jit(method.update)(state, models.frozen, experience, None, KEY)


def test_micro_batches_change_nothing():
  models = chain(10, reward=analytic.quadratic_reward([2.0, -1.0]), data=MIXTURE)
  found = [first_update(config(), models, dataclasses.replace(descent(1.0), accumulate=parts))[1]
           for parts in (1, 4)]
  for a, b in zip(*(jax.tree.leaves(state["policy"]) for state in found)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_sign_of_beta():
  models = chain(10)
  up, down = (first_update(config(beta=beta), models)[1]["policy"]["bias"] for beta in (2.0, -2.0))
  np.testing.assert_allclose(up, -down, rtol=1e-5, atol=1e-8)
  assert moments(models, {"bias": up, "slope": 0 * up})[0] > .694760
  _, state, metrics = first_update(config(beta=0.0), models)
  assert float(jnp.abs(state["policy"]["bias"]).max()) < 1e-7 > float(metrics["loss/total"])


def test_strata_cover_the_steps_that_have_adjoints():
  k = np.asarray(am.choose_steps(config(strata=4, adjoint_steps=8), KEY, 400, 20))
  assert k.shape == (5, 400)
  for i, (low, high) in enumerate([(12, 14), (14, 16), (16, 18), (18, 20), (19, 20)]):
    assert sorted(set(k[i])) == list(range(low, high))
  k = np.asarray(am.choose_steps(config(adjoint_steps=3), KEY, 2, 20))
  np.testing.assert_array_equal(k, [[17, 17], [18, 18], [19, 19]])


def test_clipping_leaves_out_what_is_above_the_quantile_of_before():
  """Nothing at first; then the share of the quantile, each stratum by its own."""
  models = chain(10, reward=analytic.quadratic_reward([2.0, -1.0]), data=MIXTURE)
  cfg = config(strata=5, clip_quantile=0.75)
  method = am.make(models, cfg, OptimConfig(lr=0.0))
  batch = analytic.make_batch(256)
  state, update = method.init(KEY, models.frozen, batch), jax.jit(method.update)
  collect = jax.jit(method.collect)
  shares = []
  for i in range(3):
    key = jax.random.fold_in(KEY, i)
    experience = collect(state, models.frozen, batch, key)
    state, metrics = update(state, models.frozen, experience, None, key)
    shares.append(float(metrics["train/clipped_share"]))
  assert shares[0] == 0 and shares[1] == pytest.approx(0.25, abs=0.05)
  limit = np.asarray(state["limit"])
  assert limit.shape == (6,) and np.isfinite(limit).all() and limit.max() > 2 * limit.min()


def test_what_is_refused():
  make = lambda models, **options: methods.make(
      "adjoint_matching", models, config(**options), OptimConfig())
  for options in (dict(eta=0.9), dict(schedule=FLOW, kind="flow_sde", eta=0.7, final="clean")):
    models = chain(10, **options)
    with pytest.raises(UserError, match=r"sample\.eta=1 and .*method\.require_memoryless=False"):
      make(models)
    make(models, require_memoryless=False)
  make(chain(10, FLOW, kind="flow_sde", eta=1.5, final="clean"))
  for options in (dict(eta=0.0), dict(final="clean")):
    with pytest.raises(UserError, match="needs noise at every step"):
      make(chain(10, **options))
  with pytest.raises(UserError, match="needs reward gradients"):
    make(dataclasses.replace(chain(10), score=None))
  with pytest.raises(UserError, match=r"method\.strata=11 exceeds the 10 steps"):
    make(chain(10), strata=11)
  with pytest.raises(UserError, match=r"method\.adjoint_steps=11 exceeds sample\.steps=10"):
    make(chain(10), adjoint_steps=11)
