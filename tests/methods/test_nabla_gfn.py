"""nabla-GFlowNet: identities of its losses, options, and errors, on the analytic world."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import methods
from jaxalign.config.registry import load_method, own_methods
from jaxalign.config.schema import OptimConfig
from jaxalign.errors import UserError
from jaxalign.methods import nabla_gfn
from jaxalign.methods.nabla_gfn import PRESETS, Config
from jaxalign.sampling import Conditioning
from jaxalign.testing import analytic

pytestmark = pytest.mark.usefixtures("compile_quickly")

STEPS, ROWS, DIM, BETA = 10, 8, 2, 1.5
KEY = jax.random.key(5)
GAUSSIAN = analytic.Mixture(np.ones(1), np.asarray([[0.7, -0.3]]), np.asarray([0.5]))
MIXTURE = analytic.Mixture(
  np.asarray([0.6, 0.4]), np.asarray([[-1.0, 0.0], [1.0, 0.5]]), np.asarray([0.2, 0.3])
)
QUADRATIC = analytic.quadratic_reward([1.0, 2.0])
LINEAR = analytic.linear_reward([1.0, -0.5])
ADAM = OptimConfig(lr=3e-3, clip_norm=0.0)
# Plain gradient descent of rate 1: parameters move by minus the gradient.
DESCENT = OptimConfig(lr=1e6, eps=1e6, b1=0.0, clip_norm=0.0)


def config(**options):
  plain = dict(beta=BETA, beta_unit="raw", prox=0.0, flow_weight_decay=0.0, gamma="one",
               x0_net="theta")
  return Config(**{**plain, **options})


def world(mixture=GAUSSIAN, reward=QUADRATIC, **options):
  return analytic.make_models(mixture, reward, steps=STEPS, **options)


def affine(bias, slope):
  levels = jnp.linspace(0.5, 1.5, STEPS + 1)[:, None] * jnp.asarray([[1.0, -0.7]])
  return {"bias": bias * levels, "slope": slope * levels}


def sample(models, policy=None, batch=None, key=KEY):
  """A trajectory of the policy (of the reference if None)."""
  batch = batch or analytic.make_batch(ROWS)
  return models.rollout(policy, models.frozen, batch, key)


def all_rows(models, policy=None, batch=None, key=KEY):
  """Every transition of a batch of trajectories, rows flattened trajectory by trajectory."""
  batch = batch or analytic.make_batch(ROWS)
  size = batch["sample_ids"].shape[0]
  steps = jnp.broadcast_to(jnp.arange(STEPS)[:, None], (STEPS, size))
  trajectory = sample(models, policy, batch, key)
  rows = nabla_gfn.transitions(
    {
      "latents": trajectory.latents.swapaxes(0, 1),
      "out": trajectory.out.swapaxes(0, 1),
      "batch": batch,
    },
    steps,
  )
  return jax.tree.map(lambda a: a.reshape((-1,) + a.shape[2:]), rows)


def prepare(models, cfg, trainable, rows, beta=BETA, key=KEY, cap=jnp.inf, terminal=False):
  return nabla_gfn.targets(models, cfg, trainable, models.frozen, beta, cap, rows, key, terminal)[0]


def parts(models, cfg, trainable, rows, name=None):
  total, metrics = nabla_gfn.loss(models, cfg, trainable, models.frozen, rows)
  return metrics[f"loss/{name}"] if name else (total, metrics)


def gradient(models, cfg, trainable, rows, name):
  return jax.grad(lambda tr: parts(models, cfg, tr, rows, name))(trainable)


def largest(tree):
  return max(float(jnp.abs(a).max()) for a in jax.tree.leaves(tree))


def session(models, cfg, optim=ADAM, batch=None):
  """Jitted init, collect and update with the keys of this file."""
  method = nabla_gfn.make(models, cfg, optim)
  batch = batch or analytic.make_batch(ROWS)
  state = method.init(KEY, models.frozen, batch)
  collect = jax.jit(
    lambda s, i, b=batch: method.collect(s, models.frozen, b, jax.random.fold_in(KEY, i))
  )
  update = jax.jit(
    lambda s, e, i: method.update(
      s, models.frozen, e, jnp.zeros(ROWS), jax.random.fold_in(KEY, 100 + i)
    )
  )
  return method, state, collect, update


def run(models, cfg, optim=ADAM, updates=2):
  _, state, collect, update = session(models, cfg, optim)
  metrics = []
  for i in range(updates):
    state, m = update(state, collect(state, i), i)
    metrics.append({k: float(v) for k, v in m.items()})
  return state, metrics


# ---- identities of the losses -------------------------------------------------------------------


@pytest.mark.parametrize("reverse", ["lean", "sampled"])
@pytest.mark.parametrize("weighting", ["eps", "score", "std"])
def test_beta_zero_at_initialisation_is_a_zero_of_every_loss(weighting, reverse):
  models, cfg = world(MIXTURE), config(flow=True, reverse=reverse, weighting=weighting, prox=1.0)
  trainable = {"policy": affine(0.0, 0.0), "flow": affine(0.0, 0.0)}
  rows = prepare(models, cfg, trainable, all_rows(models), beta=0.0)
  total, metrics = parts(models, cfg, trainable, rows)
  # Recomputed noise estimates differ from the recorded ones by rounding.
  assert float(total) < 1e-9 and float(metrics["path_kl"].max()) == 0.0
  for name in ("forward", "reverse", "terminal"):
    assert float(metrics[f"loss/{name}"]) == 0.0
  grads = jax.grad(lambda tr: parts(models, cfg, tr, rows)[0])(trainable)
  assert largest(grads) < 1e-5


def test_forward_gradient_at_the_reference_is_two_lam_h():
  models, cfg = world(), config(flow=True, reverse="lean", weighting="score")
  trainable = {"policy": affine(0.0, 0.0), "flow": affine(0.0, 0.0)}
  rows = prepare(models, cfg, trainable, all_rows(models))
  got = gradient(models, cfg, trainable, rows, "forward")["policy"]["bias"]
  h = np.asarray(rows["guess_next"]).reshape(ROWS, STEPS, DIM)
  expected = 2 * models.sampler.lam[:, None] * h.sum(0) / (ROWS * STEPS * DIM)
  np.testing.assert_allclose(got[:-1], expected, rtol=1e-4)


@pytest.mark.parametrize("stopgrad", [True, False])
def test_which_loss_trains_what(stopgrad):
  """forward -> policy (in release routing flow too), reverse, terminal -> flow, prox -> policy."""
  models = world(MIXTURE)
  cfg = config(flow=True, reverse="sampled", prox=1.0, flow_target_stopgrad=stopgrad)
  trainable = {"policy": affine(0.1, 0.05), "flow": affine(0.2, 0.1)}
  rows = prepare(models, cfg, trainable, all_rows(models))
  grads = {
    n: gradient(models, cfg, trainable, rows, n) for n in ("forward", "reverse", "terminal", "prox")
  }
  moved = {n: (largest(g["policy"]) > 0, largest(g["flow"]) > 0) for n, g in grads.items()}
  assert moved == {
    "forward": (True, not stopgrad),
    "reverse": (False, True),
    "terminal": (False, True),
    "prox": (True, False),
  }


def test_published_weights_of_the_last_transition():
  """The terminal loss over all rows, one of STEPS of which is last; gamma at the output's level."""
  models = world(MIXTURE)
  trainable = {"policy": affine(0.1, 0.05), "flow": affine(0.2, 0.1)}
  found = {}
  for mean in ("last", "rows"):
    cfg = config(flow=True, reverse="sampled", terminal_mean=mean, gamma="abar",
                 gamma_at_output=mean == "rows")
    rows = prepare(models, cfg, trainable, all_rows(models))
    found[mean] = float(parts(models, cfg, trainable, rows)[1]["loss/terminal"]), rows["guess_next"]
  assert found["rows"][0] == pytest.approx(found["last"][0] / STEPS, rel=1e-5)
  ours, theirs = (np.asarray(found[name][1]).reshape(ROWS, STEPS, DIM) for name in ("last", "rows"))
  np.testing.assert_array_equal(theirs[:, :-1], ours[:, :-1])
  np.testing.assert_allclose(theirs[:, -1], 0.99915 * ours[:, -1], rtol=1e-5)


def test_constant_added_to_the_reward_changes_nothing():
  params, score = QUADRATIC
  shifted = (params, lambda p, x, prepared: score(p, x, prepared) + 64.0)
  states = [
    run(world(reward=r), config(flow=True, reverse="lean"))[0] for r in (QUADRATIC, shifted)
  ]
  chex.assert_trees_all_equal(states[0]["trainable"], states[1]["trainable"])


def prompted():
  """Prompts decide both the reference's output and the reward."""
  models = world()
  score = lambda p, images, prepared: (
    (images * prepared["w"]).sum(-1) - 0.1 * jnp.square(images).sum(-1)
  )
  denoise = lambda v, x, t, cond: models.denoise(v, x, t, cond) + 0.3 * cond["m"]
  w, m = jax.random.normal(jax.random.key(9), (2, ROWS, DIM))
  batch = dict(
    analytic.make_batch(ROWS), prepared={"w": w}, conditioning=Conditioning({"m": m}, {})
  )
  return dataclasses.replace(models, score=score, denoise=denoise), batch


@pytest.mark.parametrize("reward_grad", ["onestep", "final_latent"])
def test_reward_gradient_uses_the_prompt_of_its_row(reward_grad):
  models, batch = prompted()
  cfg = config(reward_grad=reward_grad, always_final=False, strata=STEPS, perturbations=1)
  method = nabla_gfn.make(models, cfg, DESCENT)
  state = method.init(KEY, models.frozen, batch)
  experience = method.collect(state, models.frozen, batch, KEY)
  order = np.asarray([3, 1, 4, 7, 5, 2, 6, 0])
  mixed = jax.tree.map(lambda a: a[order], experience)
  update = jax.jit(lambda e: method.update(state, models.frozen, e, jnp.zeros(ROWS), KEY)[0])
  moved = lambda e: update(e)["trainable"]["policy"]
  plain = moved(experience)
  both = moved(mixed)
  chex.assert_trees_all_close(both, plain, rtol=1e-4, atol=1e-6)
  alone = moved(dict(experience, batch=dict(batch, prepared=mixed["batch"]["prepared"])))
  assert largest(jax.tree.map(jnp.subtract, alone, plain)) > 1e-3


def test_targets_follow_a_joint_shuffle_row_by_row():
  models, batch = prompted()
  cfg, policy = config(flow=True, reverse="sampled"), affine(0.1, 0.05)
  trainable = {"policy": policy, "flow": affine(0.0, 0.0)}
  rows = all_rows(models, policy, batch)
  order = np.random.default_rng(0).permutation(ROWS * STEPS)
  plain = prepare(models, cfg, trainable, rows)
  mixed = prepare(models, cfg, trainable, jax.tree.map(lambda a: a[order], rows))
  for name in ("guess_next", "guess_cur", "reverse"):
    # Scores reach 1 / s = 50 in magnitude, hence the absolute tolerance.
    np.testing.assert_allclose(mixed[name], plain[name][order], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixture", [GAUSSIAN, MIXTURE])
def test_forward_residual_in_eps_form_is_the_difference_of_scores(mixture):
  """In f64, from the sampler's own table: the two forms agree to rounding, for any x'."""
  s = world(mixture).sampler
  rng = np.random.default_rng(1)
  for k in range(STEPS):
    x, eps, eps_ref, x_next = rng.normal(size=(4, DIM))
    mean = lambda e: s.x_coef[k] * x - s.out_coef[k] * e
    score = lambda e: -(x_next - mean(e)) / s.std[k] ** 2
    np.testing.assert_allclose(-s.lam[k] * (eps - eps_ref), score(eps) - score(eps_ref), rtol=1e-9)


def test_forward_residual_matches_autodiff_of_the_log_density():
  models = world(MIXTURE)
  rows = all_rows(models)
  s, k = models.sampler, rows["k"]
  noise = jax.random.normal(KEY, rows["x_k"].shape)
  eps, h = rows["out_old"] + 0.1 * noise, 0.3 * noise[::-1]
  log_ratio = lambda x: (
    s.log_prob(k, x, s.mean(k, rows["x_k"], eps))
    - s.log_prob(k, x, s.mean(k, rows["x_k"], rows["out_old"]))
  ).sum()
  expected = jax.grad(log_ratio)(rows["x_next"]) - h
  got = nabla_gfn.forward_residual(s, k, eps, rows["out_old"], rows["x_k"], rows["x_next"], h)
  got = -got * s.at("lam", k)[:, None]
  np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-3)


def test_sampled_reverse_score_matches_autodiff_of_the_log_density():
  models, policy = world(MIXTURE), affine(0.1, 0.05)
  rows = all_rows(models, policy)
  s, k = models.sampler, rows["k"]

  def log_ratio(x):
    def log_prob(p):
      eps = models.denoise(models.combine(p, models.frozen["base"]), x, s.at("timesteps", k), None)
      return s.log_prob(k, rows["x_next"], s.mean(k, x, eps))

    return (log_prob(policy) - log_prob(None)).sum()

  got = nabla_gfn.reverse_score(
    models,
    config(flow=True, reverse="sampled"),
    policy,
    models.frozen,
    k,
    rows["x_k"],
    rows["x_next"],
    rows["conditioning"],
  )
  np.testing.assert_allclose(got, jax.grad(log_ratio)(rows["x_k"]), rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("k", [0, 5, STEPS - 1])
def test_lean_reverse_score_is_the_mean_of_the_sampled_one(k):
  """40000 draws of x' at one x_k, within 4.5 standard errors: the policy's own score has mean 0."""
  models, policy, n = world(MIXTURE), affine(0.1, 0.3), 40000
  s = models.sampler
  x = jnp.broadcast_to(sample(models, policy).latents[k, :1], (n, DIM))
  steps = jnp.full(n, k)
  eps = models.denoise(models.combine(policy, models.frozen["base"]), x, s.at("timesteps", k), None)
  z = jax.random.normal(jax.random.key(k), x.shape)
  x_next = s.mean(k, x, eps) + s.at("std", k) * z
  reverse = lambda kind, rows: np.asarray(
    nabla_gfn.reverse_score(
      models,
      config(flow=True, reverse=kind),
      policy,
      models.frozen,
      steps[:rows],
      x[:rows],
      x_next[:rows],
      Conditioning({}, {}),
    ),
    np.float64,
  )
  draws, lean = reverse("sampled", n), reverse("lean", 1)[0]
  error = draws.std(0) / np.sqrt(n)
  assert np.all(np.abs(draws.mean(0) - lean) < 4.5 * error + 1e-4 * np.abs(lean))
  assert np.all(np.abs(lean) > 8 * error)  # the comparison has power


def test_last_transition_uses_the_output_itself():
  models, cfg, policy = world(MIXTURE), config(gamma="abar"), affine(0.1, 0.05)
  x = 3.0 * jax.random.normal(KEY, (ROWS, DIM))
  rows = {"conditioning": Conditioning({}, {}), "prepared": {}}
  t = jnp.zeros(ROWS, jnp.int32)
  expected = np.asarray([1.0, 2.0]) - np.asarray(x)
  for at_end in (True, jnp.ones(ROWS, bool)):
    got, norms = nabla_gfn.value_gradient(
      models, cfg, policy, models.frozen, x, t, at_end, rows, KEY, jnp.inf
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norms, np.sqrt((expected**2).sum(-1)), rtol=1e-5)
  assert np.all(models.sampler.std > 0) and np.all(np.isfinite(models.sampler.lam))


@pytest.mark.parametrize("x0_net", ["theta", "ref"])
def test_guess_differentiates_the_clean_estimate(x0_net):
  """Gaussian data: d x0_hat / dx = (1 - sqrt(1 - abar) (c + slope)) / sqrt(abar)."""
  models, policy = world(reward=LINEAR), affine(0.1, 0.05)
  x, k = jax.random.normal(KEY, (STEPS, DIM)), np.arange(STEPS)
  got, _ = nabla_gfn.value_gradient(
    models,
    config(gamma="sqrt_abar", x0_net=x0_net),
    policy,
    models.frozen,
    x,
    models.sampler.at("timesteps", k),
    jnp.zeros(STEPS, bool),
    {"conditioning": Conditioning({}, {}), "prepared": {}},
    KEY,
    jnp.inf,
  )
  abar = models.sampler.alpha[:, None] ** 2
  slope = np.sqrt(1 - abar) / (abar * 0.5 + 1 - abar)
  slope = slope + (np.asarray(policy["slope"])[:-1] if x0_net == "theta" else 0.0)
  np.testing.assert_allclose(
    got, (1 - np.sqrt(1 - abar) * slope) * np.asarray([1.0, -0.5]), rtol=2e-3, atol=1e-4
  )


def test_path_kl_is_that_of_the_chains():
  """Metric, mean log ratio of 4096 trajectories, and the bound E[bR] - KL <= log E[e^bR]."""
  models, policy, n = world(MIXTURE, LINEAR), affine(0.1, 0.05), 4096
  batch = analytic.make_batch(n)
  trajectory = sample(models, policy, batch)
  s = models.sampler
  ratio, exact = 0.0, 0.0
  for k in range(STEPS):
    x, x_next = trajectory.latents[k], trajectory.latents[k + 1]
    ref = models.denoise(models.combine(None, models.frozen["base"]), x, int(s.timesteps[k]), None)
    ratio = ratio + trajectory.log_prob[k] - s.log_prob(k, x_next, s.mean(k, x, ref))
    difference = np.asarray(trajectory.out[k] - ref, np.float64) * s.out_coef[k]
    exact += (difference**2).sum(-1).mean() / (2 * s.std[k] ** 2)
  rows = all_rows(models, policy, batch)
  cfg = config()
  rows = prepare(models, cfg, {"policy": policy, "flow": {}}, rows)
  metric = (
    float(parts(models, cfg, {"policy": policy, "flow": {}}, rows)[1]["path_kl"].mean()) * STEPS
  )
  assert metric == pytest.approx(exact, rel=1e-3)
  ratio = np.asarray(ratio, np.float64)
  assert abs(ratio.mean() - exact) < 4.5 * ratio.std() / np.sqrt(n)
  reward = lambda x: BETA * np.asarray(x, np.float64) @ np.asarray([1.0, -0.5])
  free = np.log(np.exp(reward(sample(models, None, batch, jax.random.key(6)).final)).mean())
  assert reward(trajectory.final).mean() - exact < free


def test_reference_strength_below_one_leaves_a_part_of_its_score():
  """At the reference with beta 0: (1 - rho) score_ref, of mean square (1 - rho)^2 / s^2."""
  models, rho = world(MIXTURE), 0.8
  batch = analytic.make_batch(4096)
  rows = all_rows(models, None, batch)
  cfg = config(weighting="score", pretrained_strength=rho)
  trainable = {"policy": affine(0.0, 0.0), "flow": {}}
  got = float(
    parts(models, cfg, trainable, prepare(models, cfg, trainable, rows, beta=0.0), "forward")
  )
  floor = ((1 - rho) ** 2 / models.sampler.std**2).mean()
  assert got == pytest.approx(floor, rel=0.05)  # the last step alone: 4 sqrt(2 / 8192) = 6 %


def test_exact_step_of_the_prox_loss_moves_by_its_fraction():
  """min lam^2 (e - target)^2 + prox (e - old)^2 moves lam^2 / (lam^2 + prox) of the way."""
  models, prox = world(reward=LINEAR), 20.0
  cfg = config(weighting="score", prox=prox, x0_net="ref")
  zero = {"policy": affine(0.0, 0.0), "flow": {}}
  rows = prepare(models, cfg, zero, all_rows(models))

  def total(bias):
    policy = {
      "bias": jnp.append(bias, 0.0)[:, None] * jnp.ones((1, DIM)),
      "slope": zero["policy"]["slope"],
    }
    return parts(models, cfg, {"policy": policy, "flow": {}}, rows)[0]

  bias = jnp.zeros(STEPS)
  step = -jax.grad(total)(bias) / jnp.diag(jax.hessian(total)(bias))
  lam = models.sampler.lam
  h = np.asarray(rows["guess_next"], np.float64).reshape(ROWS, STEPS, DIM).mean((0, 2))
  np.testing.assert_allclose(step, lam**2 / (lam**2 + prox) * (-h / lam), rtol=1e-3)


@pytest.mark.parametrize("steps, strata", [(50, 5), (50, 4), (20, 20), (7, 3), (5, 1)])
def test_one_step_of_each_stratum_is_drawn_uniformly(steps, strata):
  n = 20000
  chosen = np.asarray(nabla_gfn.choose_steps(KEY, n, steps, strata))
  edges = np.linspace(0, steps, strata + 1).round().astype(int)
  assert chosen.shape == (strata, n)
  for row, (low, high) in zip(chosen, reversed(list(zip(edges[:-1], edges[1:])))):
    assert row.min() >= low and row.max() < high
    share = np.bincount(row - low, minlength=high - low) / n
    p = 1 / (high - low)
    assert np.all(np.abs(share - p) < 4.5 * np.sqrt(p * (1 - p) / n) + 1e-12)


def test_last_transition_is_trained_on_besides():
  """N = 50, five strata: every step 0.1 times a trajectory, and the last 1.1 times."""
  models = analytic.make_models(GAUSSIAN, LINEAR, steps=50)
  seen = []

  def denoise(variables, x, t, cond):
    if variables["policy"] is not None:
      jax.debug.callback(lambda t: seen.append(np.asarray(t)), jnp.broadcast_to(t, x.shape[:1]))
    return models.denoise(variables, x, t, cond)

  watched = dataclasses.replace(models, denoise=denoise)
  batch = analytic.make_batch(1000)
  method = nabla_gfn.make(watched, config(strata=5, x0_net="ref"), ADAM)
  state = method.init(KEY, models.frozen, batch)
  unwatched = nabla_gfn.make(models, config(strata=5), ADAM)
  experience = jax.jit(unwatched.collect)(state, models.frozen, batch, KEY)
  jax.jit(method.update)(state, models.frozen, experience, jnp.zeros(1000), KEY)
  jax.effects_barrier()
  counts = np.asarray([(np.concatenate(seen) == t).sum() for t in models.sampler.timesteps]) / 1000
  assert counts.sum() == pytest.approx(6.0)
  np.testing.assert_allclose(counts[:-1], 0.1, atol=4.5 * np.sqrt(0.09 / 1000))
  assert counts[-1] == pytest.approx(1.1, abs=4.5 * np.sqrt(0.09 / 1000))


# ---- the loss in numpy --------------------------------------------------------------------------


def loss_in_numpy(models, cfg, policy, flow, rows):
  """The parts of the loss in f64 for Gaussian data, affine policy and flow, quadratic reward."""
  s, D = models.sampler, DIM
  f64 = lambda a: np.asarray(a, np.float64)
  k, x, x_next, old = rows["k"], f64(rows["x_k"]), f64(rows["x_next"]), f64(rows["out_old"])
  k = np.asarray(k)
  last = k == s.steps - 1
  column = lambda a: a[k][:, None]
  data_mean, data_var = GAUSSIAN.means[0], GAUSSIAN.variances[0]

  def eps(x, index, abar, with_policy):
    c = np.sqrt(1 - abar) / (abar * data_var + 1 - abar)
    out, slope = c * (x - np.sqrt(abar) * data_mean), c * np.ones_like(x)
    if with_policy:
      out = out + f64(policy["bias"])[index] + f64(policy["slope"])[index] * x
      slope = slope + f64(policy["slope"])[index]
    return out, slope

  def guess(x, index, abar, end):
    e, slope = eps(x, index, abar, cfg.x0_net == "theta")
    x0 = np.where(end[:, None], x, (x - np.sqrt(1 - abar) * e) / np.sqrt(abar))
    jac = np.where(end[:, None], 1.0, (1 - np.sqrt(1 - abar) * slope) / np.sqrt(abar))
    gamma = {"one": 1.0, "sqrt_abar": np.sqrt(abar), "abar": abar}[cfg.gamma]
    return BETA * np.where(end[:, None], 1.0, gamma) * jac * (np.asarray([1.0, 2.0]) - x0)

  abar, abar_next = column(s.alpha) ** 2, column(s.alpha_next) ** 2
  e, slope = eps(x, k, abar, True)
  e_ref, slope_ref = eps(x, k, abar, False)
  std, lam = column(s.std), column(s.lam)
  mean = lambda e: column(s.x_coef) * x - column(s.out_coef) * e
  score = lambda e: -(x_next - mean(e)) / std**2
  g = lambda x, index: f64(flow["bias"])[index] + f64(flow["slope"])[index] * x
  g_next = g(x_next, k + 1)
  h = guess(x_next, k + 1, abar_next, last) + np.where(last[:, None], 0.0, g_next)
  forward = score(e) - cfg.pretrained_strength * score(e_ref) - h
  weight = {"eps": lam**-2, "score": 1.0, "std": std**2}[cfg.weighting]
  jac = lambda slope: column(s.x_coef) - column(s.out_coef) * slope
  if cfg.reverse == "lean":
    reverse = -jac(slope_ref) * (mean(e) - mean(e_ref)) / std**2
  else:
    reverse = -jac(slope) * score(e) + cfg.pretrained_strength * jac(slope_ref) * score(e_ref)
  reverse = reverse + guess(x, k, abar, np.zeros_like(last)) + g(x, k)
  assert x.shape[-1] == D
  return {
    "forward": (weight * forward**2).mean(),
    "reverse": cfg.reverse_weight * (reverse**2).mean(),
    "terminal": (g_next[last] ** 2).mean(),
    "prox": cfg.prox * ((e - old) ** 2).mean(),
  }


@pytest.mark.parametrize(
  "options",
  [
    dict(weighting="eps", reverse="lean", gamma="one"),
    dict(weighting="score", reverse="sampled", gamma="abar", x0_net="ref"),
    dict(
      weighting="std",
      reverse="sampled",
      gamma="sqrt_abar",
      pretrained_strength=0.9,
      reverse_weight=0.3,
    ),
  ],
)
def test_loss_equals_its_derivation_in_float64(options):
  models, cfg = world(), config(flow=True, prox=0.7, **options)
  trainable = {"policy": affine(0.1, 0.05), "flow": affine(-0.3, 0.2)}
  rows = all_rows(models, affine(0.05, -0.02))
  ready = prepare(models, cfg, trainable, rows)
  total, metrics = parts(models, cfg, trainable, ready)
  expected = loss_in_numpy(models, cfg, trainable["policy"], trainable["flow"], rows)
  # f32 noise estimates are differenced and multiplied by lam up to 130: 1e-3 of a part at most.
  for name, value in expected.items():
    assert float(metrics[f"loss/{name}"]) == pytest.approx(value, rel=2e-3), name
  assert float(total) == pytest.approx(sum(expected.values()), rel=2e-3)


def test_value_at_initialisation_is_the_mean_square_of_h_over_lam():
  models, cfg = world(reward=LINEAR), config(x0_net="ref", strata=STEPS, always_final=False)
  _, metrics = run(models, cfg, updates=1)
  s = models.sampler
  abar = s.alpha_next**2
  slope = np.append((np.sqrt(abar) * 0.5 / (abar * 0.5 + 1 - abar))[:-1], 1.0)
  h = BETA * slope[:, None] * np.asarray([1.0, -0.5])
  assert metrics[0]["loss/forward"] == pytest.approx(((h / s.lam[:, None]) ** 2).mean(), rel=1e-3)
  assert metrics[0]["loss/prox"] < 1e-9 and metrics[0]["train/path_kl"] == 0.0


# ---- options ------------------------------------------------------------------------------------

OPTIONS = {
  "default": {},
  "score": dict(weighting="score"),
  "std": dict(weighting="std"),
  "lean": dict(flow=True, reverse="lean", x0_net="ref"),
  "sampled": dict(flow=True, reverse="sampled", x0_net="ref"),
  "flow_without_reverse": dict(flow=True),
  "release_routing": dict(
    flow=True, reverse="sampled", flow_target_stopgrad=False, train_last_reverse=False, x0_net="ref"
  ),
  "replay": dict(replay_lag=1, prox=0.1),
  "perturbed": dict(perturbations=3, perturb_std=0.1),
  "capped": dict(grad_cap_quantile=0.8),
  "final_latent": dict(reward_grad="final_latent"),
  "minibatches": dict(minibatches=2, prox=0.1),
  "repeats": dict(optimizer_repeats=2),
  "reference_strength": dict(pretrained_strength=0.99),
  "all_steps": dict(strata=STEPS, always_final=False),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option_trains(name):
  """The forward loss, on the same trajectories, falls to less than 0.7 of its first value."""
  models, cfg = world(), config(**{**dict(gamma="abar", flow_lr=1e-2), **OPTIONS[name]})
  method, state, collect, update = session(models, cfg, dataclasses.replace(ADAM, lr=1e-2))
  experience = collect(state, 0)
  history = []
  for _ in range(50):
    state, metrics = update(state, experience, 0)
    history.append(float(metrics["loss/forward"]))
    assert all(np.isfinite(float(v)) for v in metrics.values())
  assert history[-1] < 0.7 * history[0]
  product = method.product(state)
  assert largest(product) > 0
  chex.assert_trees_all_equal_shapes_and_dtypes(product, models.init_policy(KEY, None))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_constructs_and_updates(name):
  models = world()
  state, metrics = run(models, Config(**PRESETS[name]), updates=3)
  for m in metrics:
    assert all(np.isfinite(v) for v in m.values())
  assert largest(state["trainable"]["policy"]) > 0


def test_replay_trains_on_the_trajectories_of_the_update_before():
  models = world()
  _, state, collect, update = session(models, config(replay_lag=1, prox=1.0))
  first, second = collect(state, 0), collect(state, 1)
  fresh, _ = session(models, config(replay_lag=0, prox=1.0))[3](
    {k: v for k, v in state.items() if k != "replay"}, first, 1
  )
  one, _ = update(state, first, 0)
  chex.assert_trees_all_equal(one["trainable"], state["trainable"])  # which only samples
  chex.assert_trees_all_equal(one["optimizer"], state["optimizer"])
  garbage = jax.tree.map(lambda a: a + 7 if a.dtype == jnp.float32 else a, second)
  a, _ = update(one, second, 1)
  b, metrics = update(one, garbage, 1)
  chex.assert_trees_all_equal(a["trainable"], b["trainable"])
  chex.assert_trees_all_close(a["trainable"], fresh["trainable"], atol=1e-6)
  assert float(metrics["loss/prox"]) >= 0
  chex.assert_trees_all_equal(a["replay"]["latents"], second["latents"])
  c, _ = update(b, second, 2)
  assert (
    largest(jax.tree.map(jnp.subtract, c["trainable"], update(a, second, 2)[0]["trainable"])) > 1e-4
  )


def test_output_regularisation_acts_only_once_the_policy_has_moved():
  """On fresh trajectories and one optimiser step, recorded and new estimates are the same."""
  moved = lambda **o: run(world(), config(**o), updates=1)[0]["trainable"]["policy"]
  chex.assert_trees_all_close(moved(prox=0.0), moved(prox=10.0), atol=1e-5)
  two = [moved(prox=p, minibatches=2) for p in (0.0, 10.0)]
  assert largest(jax.tree.map(jnp.subtract, *two)) > 1e-4


@pytest.mark.parametrize("copies, std", [(1, 0.5), (16, 0.5), (4, 0.0)])
def test_perturbed_copies_average_the_reward_gradient(copies, std):
  """Quadratic reward at the output: mean c - x, standard deviation std / sqrt(copies)."""
  models, n = world(), 20000
  x = jnp.zeros((n, DIM))
  got, _ = nabla_gfn.value_gradient(
    models,
    config(perturbations=copies, perturb_std=std),
    None,
    models.frozen,
    x,
    jnp.zeros(n, jnp.int32),
    True,
    {"conditioning": Conditioning({}, {}), "prepared": {}},
    KEY,
    jnp.inf,
  )
  got, spread = np.asarray(got, np.float64), std / np.sqrt(copies)
  np.testing.assert_allclose(got.mean(0), [1.0, 2.0], atol=4.5 * spread / np.sqrt(n) + 1e-5)
  np.testing.assert_allclose(got.std(0), spread, rtol=0.03, atol=1e-6)


def test_gradient_norms_are_capped_at_the_running_quantile():
  x = jnp.asarray([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
  capped, norms = nabla_gfn.cap_norms(x, 1.0)
  np.testing.assert_allclose(norms, [5.0, 0.5, 0.0], atol=1e-6)
  np.testing.assert_allclose(capped, [[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]], atol=1e-6)
  models = world()
  cfg = config(grad_cap_quantile=0.5, strata=STEPS, always_final=False, x0_net="ref")
  _, state, collect, update = session(models, cfg)
  experience = collect(state, 0)
  rows = all_rows(models, key=jax.random.fold_in(KEY, 0))
  _, norms = nabla_gfn.targets(
    models, cfg, state["trainable"], models.frozen, BETA, jnp.inf, rows, KEY, False
  )
  assert np.isinf(float(state["grad_cap"]))
  state, _ = update(state, experience, 0)
  first = float(np.quantile(np.asarray(norms), 0.5))
  assert float(state["grad_cap"]) == pytest.approx(first, rel=1e-4)
  state, metrics = update(state, experience, 1)
  assert float(state["grad_cap"]) == pytest.approx(
    0.9 * first + 0.1 * float(metrics["train/grad_cap"]), rel=1e-4
  )


def test_final_latent_gradient_is_that_of_the_output_at_every_step():
  """Descent from zero: bias_k moves by -2 (h / lam_k) / count, h the gradient at the output."""
  models = world()
  cfg = config(reward_grad="final_latent", strata=STEPS, always_final=False, gamma="sqrt_abar")
  _, state, collect, update = session(models, cfg, DESCENT)
  experience = collect(state, 0)
  moved = update(state, experience, 0)[0]["trainable"]["policy"]["bias"]
  gradient = (np.asarray([1.0, 2.0]) - np.asarray(experience["final"], np.float64)).sum(0)
  gamma = np.append(models.sampler.alpha_next[:-1], 1.0)
  expected = -2 * BETA * (gamma / models.sampler.lam)[:, None] * gradient / (ROWS * STEPS * DIM)
  np.testing.assert_allclose(moved[:-1], expected, rtol=1e-3)


@pytest.mark.parametrize(
  "options",
  [
    dict(),
    dict(flow=True, reverse="lean", strata=STEPS, always_final=False),
    dict(reward_grad="final_latent"),
  ],
)
def test_accumulation_gives_the_same_gradient(options):
  """Parameters move by minus the gradient; four micro-batches of two against one of eight."""
  models = world(MIXTURE)
  moved = []
  for parts_ in (1, 4):
    optim = dataclasses.replace(DESCENT, accumulate=parts_)
    cfg = config(flow_lr=1e6, **options)
    state, metrics = run(models, cfg, optim, updates=1)
    moved.append((state["trainable"], metrics[0]["loss/total"], metrics[0]["train/path_kl"]))
  chex.assert_trees_all_close(*moved, rtol=1e-5, atol=1e-6)
  assert largest(moved[0][0]["policy"]) > 1e-3


def test_minibatches_repeats_and_counts():
  state, _ = run(world(), config(minibatches=4), updates=3)
  assert int(state["updates"]) == 12
  once, twice = (
    run(world(), config(optimizer_repeats=n), DESCENT, 1)[0]["trainable"]["policy"] for n in (1, 2)
  )
  chex.assert_trees_all_close(jax.tree.map(lambda a: 2 * a, once), twice, rtol=1e-5, atol=1e-7)


def test_moving_average_is_what_is_exported():
  method, state, collect, update = session(world(), config(), dataclasses.replace(ADAM, ema=0.9))
  average = state["ema"]
  for i in range(3):
    state, _ = update(state, collect(state, i), i)
    decay = min(0.9, (2 + i) / (11 + i))
    average = jax.tree.map(
      lambda a, p: decay * a + (1 - decay) * p, average, state["trainable"]["policy"]
    )
  chex.assert_trees_all_close(method.product(state), average, atol=1e-6)
  assert largest(jax.tree.map(jnp.subtract, average, state["trainable"]["policy"])) > 1e-4
  plain, state, *_ = session(world(), config())
  assert plain.product(state) is state["trainable"]["policy"]


def test_negative_beta_lowers_the_reward():
  """The sampler trained with beta of either sign, on the same noise; linear reward."""
  means = {}
  for beta in (BETA, -BETA):
    models = world(reward=LINEAR)
    state, _ = run(models, config(beta=beta, gamma="abar"), dataclasses.replace(ADAM, lr=1e-2), 60)
    means[beta] = float(
      LINEAR[1](LINEAR[0], sample(models, state["trainable"]["policy"]).final, {}).mean()
    )
  base = float(LINEAR[1](LINEAR[0], sample(world(reward=LINEAR)).final, {}).mean())
  assert means[BETA] > base + 0.1 and means[-BETA] < base - 0.1


def test_beta_in_units_of_the_reward_deviation():
  models = dataclasses.replace(world(), reward_std=4.0)
  for unit, expected in (("sigma", BETA / 4.0), ("raw", BETA)):
    state = session(models, config(beta_unit=unit))[1]
    assert float(state["beta"]) == pytest.approx(expected)


# ---- programs -----------------------------------------------------------------------------------


def test_frozen_weights_do_not_move():
  models = world()
  before = jax.tree.map(np.array, dict(models.frozen))
  state, _ = run(models, config(flow=True, reverse="lean"), updates=3)
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, dict(models.frozen)), before)
  assert set(state) == {"trainable", "optimizer", "beta", "grad_cap", "updates"}
  x, t = jnp.ones((ROWS, DIM)), jnp.asarray(500)
  reference = models.combine(None, models.frozen["base"])
  np.testing.assert_array_equal(
    models.denoise(reference, x, t, None),
    analytic.exact_output(models.schedule, models.frozen["base"], x, t),
  )


@pytest.mark.slow
def test_jit_equals_eager():
  models = world(MIXTURE)
  cfg = config(strata=3, flow=True, reverse="sampled", replay_lag=1, flow_lr=1e6)
  method = nabla_gfn.make(models, cfg, DESCENT)
  batch = analytic.make_batch(ROWS)
  state = method.init(KEY, models.frozen, batch)
  experience = jax.jit(method.collect)(state, models.frozen, batch, KEY)
  arguments = (state, models.frozen, experience, jnp.zeros(ROWS), KEY)
  eager, jitted = method.update(*arguments), jax.jit(method.update)(*arguments)
  chex.assert_trees_all_close(eager[0]["trainable"], jitted[0]["trainable"], rtol=1e-3, atol=1e-4)
  chex.assert_trees_all_close(eager[1], jitted[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [dict(), dict(flow=True, reverse="lean", always_final=False)])
def test_one_transition_after_the_other_gives_the_same_update(options):
  models, batch = world(MIXTURE), analytic.make_batch(ROWS)

  def updated(serial):
    method = nabla_gfn.make(models, config(strata=3, serial=serial, **options), DESCENT)
    state = method.init(KEY, models.frozen, batch)
    experience = jax.jit(method.collect)(state, models.frozen, batch, KEY)
    return jax.jit(method.update)(state, models.frozen, experience, jnp.zeros(ROWS), KEY)
  (together, metrics), (apart, metrics_apart) = updated(False), updated(True)
  chex.assert_trees_all_close(together["trainable"], apart["trainable"], rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_close(metrics, metrics_apart, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "options",
  [dict(), dict(flow=True, reverse="lean", replay_lag=1, minibatches=2, grad_cap_quantile=0.8)],
)
def test_one_trace_serves_all_updates(options):
  models = world()
  method = nabla_gfn.make(models, config(**options), dataclasses.replace(ADAM, ema=0.9, warmup=2))
  batch = analytic.make_batch(ROWS)
  # As in a training loop, the first state comes from a jitted init; with a replay it traces collect
  # once to learn its shapes.
  state = jax.jit(method.init)(KEY, models.frozen, batch)
  chex.clear_trace_counter()
  collect = jax.jit(chex.assert_max_traces(lambda *a: method.collect(*a), n=1))
  update = jax.jit(chex.assert_max_traces(lambda *a: method.update(*a), n=1))
  for i in range(3):
    batch = dict(batch, sample_ids=batch["sample_ids"] + ROWS)
    experience = collect(state, models.frozen, batch, jax.random.fold_in(KEY, i))
    state, _ = update(state, models.frozen, experience, jnp.zeros(ROWS), jax.random.fold_in(KEY, i))
  assert int(state["updates"]) == 3 * options.get("minibatches", 1)


@pytest.mark.parametrize(
  "options",
  [
    dict(),
    dict(always_final=False, strata=3),
    dict(reward_grad="final_latent"),
    dict(flow=True, reverse="lean"),
    dict(flow=True, reverse="sampled"),
  ],
)
def test_cost_counts_evaluations_of_the_denoiser(options):
  """Forward evaluations: an update's, counted while it is traced, and the rollout's."""
  models, count = world(), [0]

  def denoise(variables, x, t, cond):
    count[0] += x.shape[0]
    return models.denoise(variables, x, t, cond)

  method = nabla_gfn.make(dataclasses.replace(models, denoise=denoise), config(**options), ADAM)
  batch = analytic.make_batch(ROWS)
  state = method.init(KEY, models.frozen, batch)
  experience = jax.eval_shape(method.collect, state, models.frozen, batch, KEY)
  count[0] = 0
  jax.eval_shape(method.update, state, models.frozen, experience, jnp.zeros(ROWS), KEY)
  assert method.cost(ROWS)["denoiser_forward"] == count[0] + ROWS * STEPS


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "options, key",
  [
    (dict(beta_unit="z"), "method.beta_unit"),
    (dict(weighting="snr"), "method.weighting"),
    (dict(reverse="both"), "method.reverse"),
    (dict(gamma="half"), "method.gamma"),
    (dict(x0_net="ema"), "method.x0_net"),
    (dict(reward_grad="none"), "method.reward_grad"),
    (dict(replay_lag=2), "method.replay_lag"),
    (dict(reverse_weight=-1.0), "method.reverse_weight"),
    (dict(flow_lr=-1.0), "method.flow_lr"),
    (dict(prox=-1.0), "method.prox"),
    (dict(flow_weight_decay=-1.0), "method.flow_weight_decay"),
    (dict(perturb_std=-1.0), "method.perturb_std"),
    (dict(perturbations=0), "method.perturbations"),
    (dict(minibatches=0), "method.minibatches"),
    (dict(strata=0), "method.strata"),
    (dict(optimizer_repeats=0), "method.optimizer_repeats"),
    (dict(grad_cap_quantile=1.0), "method.grad_cap_quantile"),
    (dict(reverse="lean"), "method.reverse"),
    (dict(flow=True, reward_grad="final_latent"), "method.reward_grad"),
  ],
)
def test_bad_config_names_its_key(options, key):
  with pytest.raises(UserError, match=key):
    Config(**options)


@pytest.mark.parametrize(
  "options, key", [(dict(eta=0.0), "sample.eta"), (dict(final="clean"), "sample.final")]
)
def test_deterministic_sampler_is_refused(options, key):
  with pytest.raises(UserError, match=key):
    methods.make("nabla_gfn", world(**options), config(), ADAM)


def test_black_box_reward_is_refused():
  with pytest.raises(UserError, match="reward.names"):
    methods.make("nabla_gfn", dataclasses.replace(world(), score=None), config(), ADAM)


def test_models_that_do_not_fit_the_config_are_refused():
  with pytest.raises(UserError, match="method.strata"):
    nabla_gfn.make(world(), config(strata=STEPS + 1), ADAM)
  with pytest.raises(UserError, match="method.flow"):
    nabla_gfn.make(dataclasses.replace(world(), flow=None), config(flow=True), ADAM)


def test_registry_knows_the_method():
  assert load_method("nabla_gfn") is nabla_gfn
  with pytest.raises(UserError, match="method.name"):
    load_method("nabla")
  assert "nabla_gfn" in own_methods()
