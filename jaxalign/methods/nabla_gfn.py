"""nabla-GFlowNet: fine-tuning with reward gradients inside a detailed-balance loss.

The optimum is the reference distribution tilted by the reward, `p_ref(x) exp(beta R(x))`, so that
samples move toward the reward while diversity and prior stay (Liu et al. 2025, "Efficient
Diversity-Preserving Diffusion Alignment via Gradient-Informed GFlowNets"; implemented from the
equations).

One update:

  sample trajectories x_0..x_N with the policy                                     (collect)
  pick transitions: one per stratum of steps, and always the last                  (choose_steps)
  h(x') = beta gamma(t') grad R(decode(x0_hat(x')))  [+ g_phi(x')]                 (value_gradient)
  forward : || grad_x' log P_theta/P_ref - h(x') ||^2         -> theta
  reverse : || grad_x  log P_theta/P_ref + h(x)  ||^2         -> phi
  terminal: || g_phi(x_N) ||^2                                -> phi
  prox    : lambda || o_theta - o_at_sampling ||^2            -> theta

With equal-variance Gaussian transitions the forward residual is `-lam_k (o_theta - o_ref)`, o the
network's output, independent of x' (identity I1), so it is computed from outputs and never as the
difference of two large scores.
"""
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.config.fields import Count, Fraction, NonNegative, check
from jaxalign.config.schema import OptimConfig
from jaxalign.errors import UserError
from jaxalign.methods import Method, Models
from jaxalign.methods.shared.optimizer import accumulated_gradients, ema_update, make_optimizer
from jaxalign.methods.shared.reward_gradient import perturbed_gradient
from jaxalign.sampling import expand, pull_back


@dataclasses.dataclass(frozen=True)
class Config:
  """Keys of the `method` group.

  Attributes:
    beta: reward strength, > 0 to raise and < 0 to lower the reward; in `beta_unit`.
    beta_unit: "sigma" (beta is divided by the reward's within-prompt standard deviation on the base
      model) or "raw".
    weighting: of the squared forward residual: "eps" (divided by lam_k^2, even over the steps: the
      unit is that of the network's output),
      "score" (as printed in the paper; 99 % of it on the last two steps) or "std" (times std_k^2).
    reverse: estimator of the reverse loss, which trains the flow net only: "off", "lean"
      (its expectation, one Jacobian product of the reference) or "sampled".
    reverse_weight: w_B >= 0.
    flow: whether a flow network g_phi corrects the forward-looking guess. Off, the loss is
      forward + prox.
    flow_target_stopgrad: whether the forward loss leaves g_phi alone. False biases g_phi.
    flow_lr, flow_weight_decay: optimiser of g_phi.
    gamma: factor of the forward-looking guess at level alpha: "one", "sqrt_abar" (alpha itself) or
      "abar" (its square). At the output, where the guess is the reward gradient itself, it is 1.
    gamma_at_output: whether gamma of the output's own level, which is not quite clean, multiplies
      that too, as published.
    terminal_mean: of the terminal loss: over the "last" transitions, or over all "rows", as
      published, which is `strata + 1` times less.
    x0_net: network of the one-step estimate in the guess: "ref", or "theta" (the policy, as in the
      paper; with gamma "one" its slope feeds back into its own target and can diverge).
    reward_grad: "onestep" (through the denoiser at every chosen transition) or "final_latent" (one
      gradient a trajectory, at the sampled output).
    perturbations, perturb_std: average the reward gradient over this many copies of x0_hat with
      noise of this standard deviation added, in latent units.
    grad_cap_quantile: cap norms of reward gradients at this running quantile; 0 is off.
    prox: lambda >= 0 of the output regularisation, per mean squared difference of the network's
      outputs to those at sampling. It acts from the second optimiser step on a batch of
      trajectories, so it needs `minibatches` > 1 or `replay_lag` 1.
    replay_lag: 0 trains on the fresh trajectories, 1 on those of the update before; the first one
      then only samples.
    strata: transitions drawn per trajectory, one from each of this many equal ranges of steps.
    always_final: whether the last transition is trained on besides.
    serial: whether the reward gradients of a trajectory's transitions are taken one after the
      other, in the memory of one of them.
    pretrained_strength: rho, factor of the reference score in the residuals.
    minibatches: optimiser steps per batch of trajectories.
    optimizer_repeats: apply each gradient this many times.
    train_last_reverse: whether the reverse loss includes the last transition.
  """
  beta: float = 2.0
  beta_unit: Literal["sigma", "raw"] = "sigma"
  weighting: Literal["eps", "score", "std"] = "eps"
  reverse: Literal["off", "lean", "sampled"] = "off"
  reverse_weight: NonNegative = 1.0
  flow: bool = False
  flow_target_stopgrad: bool = True
  flow_lr: NonNegative = 1e-3
  flow_weight_decay: NonNegative = 1e-2
  gamma: Literal["one", "sqrt_abar", "abar"] = "sqrt_abar"
  gamma_at_output: bool = False
  terminal_mean: Literal["last", "rows"] = "last"
  x0_net: Literal["theta", "ref"] = "ref"
  reward_grad: Literal["onestep", "final_latent"] = "onestep"
  perturbations: Count = 1
  perturb_std: NonNegative = 0.0
  grad_cap_quantile: Fraction = 0.0
  prox: NonNegative = 0.1
  replay_lag: Literal[0, 1] = 0
  strata: Count = 4
  always_final: bool = True
  serial: bool = False
  pretrained_strength: float = 1.0
  minibatches: Count = 1
  optimizer_repeats: Count = 1
  train_last_reverse: bool = True

  reward_gradients = True
  noise_at_every_step = True
  strength = "beta"

  def __post_init__(self):
    check("method", self)
    if self.reverse != "off" and not self.flow:
      raise UserError(f"method.reverse={self.reverse!r} trains the flow net only: set "
                      "method.flow=True or method.reverse='off'")
    if self.flow and self.reward_grad == "final_latent":
      raise UserError("method.reward_grad='final_latent' has no flow net: set method.flow=False")


# What the published code and paper do where our defaults differ; arguments of the recipe.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": dict(flow=True, reverse="sampled", weighting="score", perturbations=3, perturb_std=0.1,
                  gamma="abar", gamma_at_output=True, terminal_mean="rows", x0_net="theta",
                  prox=2000.0, replay_lag=1, beta_unit="raw", beta=1e4, strata=5, minibatches=2),
    "release": dict(flow=True, reverse="sampled", flow_target_stopgrad=False, weighting="score",
                    gamma="abar", gamma_at_output=True, terminal_mean="rows", x0_net="theta",
                    prox=2000.0, replay_lag=1, beta_unit="raw", beta=1e4, strata=5, minibatches=2,
                    optimizer_repeats=2, train_last_reverse=False),
    "no_flow": dict(flow=False, reverse="off", weighting="score", gamma="abar",
                    gamma_at_output=True, x0_net="theta", prox=2000.0, replay_lag=1,
                    beta_unit="raw", beta=1e4, strata=5, minibatches=2),
    "final_latent": dict(reward_grad="final_latent", weighting="std", prox=100.0, beta_unit="raw",
                         beta=5e5, strata=10),
}


def choose_steps(key, batch: int, steps: int, strata: int):
  """One uniform step index per stratum and trajectory, `[strata, B]` int32, latest first."""
  edges = np.linspace(0, steps, strata + 1).round().astype(np.int32)[::-1]
  low, high = jnp.asarray(edges[1:, None]), jnp.asarray(edges[:-1, None])
  return jax.random.randint(key, (strata, batch), low, high)


def gamma_at(kind: str, alpha):
  """Factor of the forward-looking guess at level `alpha`."""
  return {"one": jnp.ones_like(alpha), "sqrt_abar": alpha, "abar": jnp.square(alpha)}[kind]


def cap_norms(gradients, cap):
  """Scales rows of `gradients [R, ...]` whose norm exceeds `cap` down to it; also returns norms."""
  norms = jnp.sqrt(jnp.square(gradients).sum(tuple(range(1, gradients.ndim))))
  return gradients * expand(jnp.minimum(1.0, cap / jnp.maximum(norms, 1e-30)), gradients), norms


def value_gradient(models: Models, cfg: Config, policy, frozen, x, t, at_end, rows, key, cap):
  """Forward-looking guess of the value gradient without beta, gamma included, and its norms.

  `gamma(t) grad_x R(decode(x0_hat(x, t)))`, the gradient taken through decoder and denoiser to the
  latent only. Nothing here is differentiated again.

  Args:
    x: `[R, ...]` latents; t: `[R]` their timesteps.
    at_end: True (static) if all rows are outputs, whose x0_hat is x itself and needs no network; or
      `[R]` bool.
    rows: has `conditioning` and `prepared` of these rows, so that a row is scored with its own
      prompt.
    cap: scalar, largest allowed norm of the raw reward gradient.
  """
  def estimate(x):
    if at_end is True:
      return x
    out = models.output(policy if cfg.x0_net == "theta" else None, frozen, x, t,
                        rows["conditioning"])
    return jnp.where(expand(at_end, x), x, models.schedule.to_x0(out, x, t))

  x0, to_x = jax.vjp(estimate, x)
  gradient, = to_x(perturbed_gradient(models, cfg, frozen, x0, rows["prepared"], key))
  gradient, norms = cap_norms(gradient, cap)
  gamma = gamma_at(cfg.gamma, models.schedule.levels(t)[0])
  if not cfg.gamma_at_output:
    gamma = jnp.where(at_end, 1.0, gamma)
  return expand(gamma, x) * gradient, norms


def forward_residual(sampler, k, out, out_ref, x_k, x_next, h, pretrained_strength=1.0):
  """Forward residual divided by `-lam_k`, i.e. in units of the network's output, `[R, ...]`.

  `(o_theta - o_ref) + h(x') / lam_k`, plus what is left of the reference score when it is
  scaled by `pretrained_strength != 1`. Multiply by `lam_k` for score units.
  """
  lam = expand(sampler.at("lam", k), x_k)
  residual = out - out_ref + h / lam
  if pretrained_strength != 1.0:
    std = expand(sampler.at("std", k), x_k)
    score_ref = -(x_next - sampler.mean(k, x_k, out_ref)) / jnp.square(std)
    residual = residual - (1 - pretrained_strength) * score_ref / lam
  return residual


def reverse_score(models: Models, cfg: Config, policy, frozen, k, x_k, x_next, conditioning):
  """`grad_{x_k} log P_theta / P_ref` at `[R]` transitions, without gradients to anything.

  "sampled": from the drawn x_{k+1}, through both Jacobians. "lean": its expectation over x_{k+1},
  `-J_ref^T (mu_theta - mu_ref) / std^2`, with less variance and one Jacobian (identity I2).
  """
  var = jnp.square(expand(models.sampler.at("std", k), x_k))

  def mean(policy):
    output = lambda params, x, t, conditioning: models.output(policy, frozen, x, t, conditioning)
    (mu, _), pull, _ = pull_back(output, (), models.sampler, k, x_k, conditioning)
    return mu, lambda cotangent: pull((cotangent, jnp.zeros_like(cotangent)))[1]
  mu_ref, pull_ref = mean(None)
  mu, pull = mean(policy)
  if cfg.reverse == "lean":
    return -pull_ref((mu - mu_ref) / var)
  return pull((x_next - mu) / var) - cfg.pretrained_strength * pull_ref((x_next - mu_ref) / var)


def targets(models: Models, cfg: Config, trainable, frozen, beta, cap, rows, key, terminal: bool):
  """Everything in the loss that is constant for theta and phi: value gradients and reverse scores.

  Args:
    rows: `k [R]`, `x_k`, `x_next`, `conditioning`, `prepared` of each transition.
    terminal: whether all rows are last transitions (static: saves the network at x_N).
  Returns:
    rows with `guess_next` (beta included), and with a reverse loss `guess_cur` and `reverse`; norms
    `[R]` of the raw reward gradients at x_next.
  """
  sampler, policy = models.sampler, trainable["policy"]
  at_end = True if terminal else rows["k"] == sampler.steps - 1
  key_next, key_cur = jax.random.split(key)
  if cfg.reward_grad == "final_latent":
    guess, norms = rows["final_gradient"], rows["final_norm"]
    gamma = gamma_at(cfg.gamma, sampler.at("alpha_next", rows["k"]))
    if not cfg.gamma_at_output:
      gamma = jnp.where(at_end, 1.0, gamma)
    guess = guess * expand(gamma, guess)
  else:
    t_next = sampler.at("next_timesteps", rows["k"])
    guess, norms = value_gradient(models, cfg, policy, frozen, rows["x_next"], t_next, at_end, rows,
                                  key_next, cap)
  rows = dict(rows, guess_next=beta * guess)
  if cfg.reverse != "off":
    cur, _ = value_gradient(models, cfg, policy, frozen, rows["x_k"],
                            sampler.at("timesteps", rows["k"]), jnp.zeros(rows["k"].shape, bool),
                            rows, key_cur, cap)
    rows["guess_cur"] = beta * cur
    rows["reverse"] = reverse_score(models, cfg, policy, frozen, rows["k"], rows["x_k"],
                                    rows["x_next"], rows["conditioning"])
  return jax.lax.stop_gradient(rows), norms


def loss(models: Models, cfg: Config, trainable, frozen, rows):
  """The nabla-DB loss of transitions.

  Args:
    trainable: `{"policy", "flow"}`; `flow` is {} without a flow net.
    rows: transitions with their `targets`, and `out_old [R, ...]`, the outputs at sampling.
  Returns:
    Scalar f32: mean over rows of the mean over latent elements. At initialisation (policy off, g =
    0) it is the mean of `(h / lam)^2` in eps weighting, and 0 for beta = 0. Metrics: the parts, and
    `path_kl [R]`, each row's `KL(P_theta || P_ref)` of its transition in nats.
  """
  sampler, k = models.sampler, rows["k"]
  t, t_next = sampler.at("timesteps", k), sampler.at("next_timesteps", k)
  last = k == sampler.steps - 1
  axes = tuple(range(1, rows["x_k"].ndim))
  cond = rows["conditioning"]
  out_ref = jax.lax.stop_gradient(models.output(None, frozen, rows["x_k"], t, cond))
  out = models.output(trainable["policy"], frozen, rows["x_k"], t, cond)

  h = rows["guess_next"]
  parts = {}
  if cfg.flow:
    g_next = models.flow.apply(trainable["flow"], rows["x_next"], t_next, cond.cond)
    g_target = jax.lax.stop_gradient(g_next) if cfg.flow_target_stopgrad else g_next
    h = h + jnp.where(expand(last, h), 0.0, g_target)     # the value at the output is R itself
    count = jnp.maximum(last.sum(), 1) if cfg.terminal_mean == "last" else last.size
    parts["terminal"] = jnp.where(last, jnp.square(g_next).mean(axes), 0.0).sum() / count
  residual = forward_residual(sampler, k, out, out_ref, rows["x_k"], rows["x_next"], h,
                              cfg.pretrained_strength)
  lam, rate = sampler.at("lam", k), sampler.at("rate", k)
  weight = {"eps": jnp.ones_like(lam), "score": jnp.square(lam), "std": jnp.square(rate)}
  parts["forward"] = (weight[cfg.weighting] * jnp.square(residual).mean(axes)).mean()
  if cfg.reverse != "off":
    g_cur = models.flow.apply(trainable["flow"], rows["x_k"], t, cond.cond)
    error = jnp.square(rows["reverse"] + g_cur + rows["guess_cur"]).mean(axes)
    if not cfg.train_last_reverse:
      error = jnp.where(last, 0.0, error)
    parts["reverse"] = cfg.reverse_weight * error.mean()
  parts["prox"] = cfg.prox * jnp.square(out - rows["out_old"]).mean()
  total = sum(parts.values())
  path_kl = 0.5 * jnp.square(rate) * jnp.square(out - out_ref).sum(axes)
  return total, dict({f"loss/{name}": value for name, value in parts.items()}, path_kl=path_kl)


def transitions(experience, steps):
  """Gathers transitions at `steps [S, B]` as rows `[B, S, ...]`."""
  k, batch = steps.T, experience["batch"]
  pick = lambda a, i: jnp.take_along_axis(a, i.reshape(i.shape + (1,) * (a.ndim - 2)), axis=1)
  repeat = lambda a: jnp.broadcast_to(a[:, None], a.shape[:1] + k.shape[1:] + a.shape[1:])
  return {
      "k": k,
      "x_k": pick(experience["latents"], k),
      "x_next": pick(experience["latents"], k + 1),
      "out_old": pick(experience["out"], k),
      "conditioning": jax.tree.map(repeat, batch["conditioning"]),
      "prepared": jax.tree.map(repeat, batch["prepared"]),
  }


def make(models: Models, cfg: Config, optim: OptimConfig) -> Method:
  """nabla-GFlowNet as a Method.

  Raises:
    UserError: fewer steps than strata, or a missing flow network.
  """
  sampler = models.sampler
  if cfg.strata > sampler.steps:
    raise UserError(f"method.strata={cfg.strata} exceeds sample.steps={sampler.steps}")
  if cfg.flow and models.flow is None:
    raise UserError("method.flow=True, but this model offers no flow network")
  beta_raw = cfg.beta / models.reward_std if cfg.beta_unit == "sigma" else cfg.beta
  labels = {"policy": "policy", "flow": "flow"}
  optimizer = optax.partition({
      "policy": make_optimizer(optim),
      "flow": make_optimizer(dataclasses.replace(
          optim, lr=cfg.flow_lr, weight_decay=cfg.flow_weight_decay)),
  }, labels)

  def init(key, frozen, batch):
    key_policy, key_flow = jax.random.split(key)
    trainable = {"policy": models.init_policy(key_policy, frozen),
                 "flow": models.flow.init(key_flow) if cfg.flow else {}}
    state = {
        "trainable": trainable,
        "optimizer": optimizer.init(trainable),
        "beta": jnp.asarray(beta_raw, jnp.float32),
        "grad_cap": jnp.asarray(jnp.inf, jnp.float32),
        "updates": jnp.asarray(0, jnp.int32),
    }
    if optim.ema:
      state["ema"] = jax.tree.map(jnp.copy, trainable["policy"])
    if cfg.replay_lag:
      state["replay"] = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype),
                                     jax.eval_shape(collect, state, frozen, batch, key))
    return state

  def collect(state, frozen, batch, key):
    trajectory = models.rollout(state["trainable"]["policy"], frozen, batch, key)
    # The batch leads every array, so that an experience is sharded and replayed as one.
    return {"final": trajectory.final, "latents": jnp.moveaxis(trajectory.latents, 0, 1),
            "out": jnp.moveaxis(trajectory.out, 0, 1), "batch": batch}

  def step(state, frozen, rows, key):
    """One optimiser step on the transitions of some trajectories, rows `[b, S, ...]`."""
    def grads_of(trainable, rows, key):
      """Gradient and metrics of a micro-batch; the last transitions of all rows apart."""
      flat = lambda tree: jax.tree.map(lambda a: a.reshape((-1,) + a.shape[2:]), tree)
      prepare = lambda group, key, terminal=False: targets(
          models, cfg, trainable, frozen, state["beta"], state["grad_cap"], group, key, terminal)

      def one_by_one(group, key):
        """`prepare` of `[b, S, ...]`, for each of the S in turn."""
        turns = jax.tree.map(lambda a: a.swapaxes(0, 1), group)
        out = jax.lax.map(lambda args: prepare(*args), (turns, jax.random.split(key, cfg.strata)))
        return flat(jax.tree.map(lambda a: a.swapaxes(0, 1), out))
      drawn = jax.tree.map(lambda a: a[:, :cfg.strata], rows)
      key_drawn, key_final = (jax.random.fold_in(key, i) for i in (0, 1))
      prepared = [one_by_one(drawn, key_drawn) if cfg.serial else prepare(flat(drawn), key_drawn)]
      if cfg.always_final:
        final = flat(jax.tree.map(lambda a: a[:, cfg.strata:], rows))
        prepared.append(prepare(final, key_final, terminal=True))
      ready = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *[p[0] for p in prepared])
      norms = jnp.concatenate([p[1] for p in prepared])
      (total, metrics), gradient = jax.value_and_grad(
          lambda tr: loss(models, cfg, tr, frozen, ready), has_aux=True)(trainable)
      # One row per stratum stands for all steps of its range.
      kl = metrics.pop("path_kl")[:drawn["k"].size]
      metrics["train/path_kl"] = kl.mean() * sampler.steps
      metrics["train/reward_grad_norm"] = norms.mean()
      metrics["loss/total"] = total
      if cfg.grad_cap_quantile:
        metrics["train/grad_cap"] = jnp.quantile(norms, cfg.grad_cap_quantile)
      return gradient, metrics

    trainable = state["trainable"]
    gradient, metrics = accumulated_gradients(grads_of, trainable, rows, key, optim.accumulate)
    metrics["train/grad_norm"] = jnp.sqrt(sum(
        jnp.square(g).sum() for g in jax.tree.leaves(gradient["policy"])))
    opt_state = state["optimizer"]
    for _ in range(cfg.optimizer_repeats):
      updates, opt_state = optimizer.update(gradient, opt_state, trainable)
      trainable = optax.apply_updates(trainable, updates)
    state = dict(state, trainable=trainable, optimizer=opt_state, updates=state["updates"] + 1)
    if optim.ema:
      state["ema"] = ema_update(state["ema"], trainable["policy"], optim.ema, state["updates"])
    if cfg.grad_cap_quantile:
      old, new = state["grad_cap"], metrics["train/grad_cap"]
      state["grad_cap"] = jnp.where(jnp.isinf(old), new, 0.9 * old + 0.1 * new)
    return state, metrics

  def update(state, frozen, experience, rewards, key):
    key_steps, key_train, key_final = jax.random.split(key, 3)
    before = state
    if cfg.replay_lag:
      fresh = experience
      # Before there is anything to replay, the fresh trajectories stand in, and nothing is learned.
      experience = jax.tree.map(
          lambda old, new: jnp.where(state["updates"] > 0, old, new), state["replay"], fresh)
    size = experience["final"].shape[0]
    chosen = choose_steps(key_steps, size, sampler.steps, cfg.strata)
    if cfg.always_final:
      chosen = jnp.concatenate([chosen, jnp.full((1, size), sampler.steps - 1, chosen.dtype)])
    rows = transitions(experience, chosen)
    if cfg.reward_grad == "final_latent":
      gradient, norms = value_gradient(
          models, dataclasses.replace(cfg, gamma="one"), None, frozen, experience["final"],
          jnp.zeros((size,), jnp.int32), True, experience["batch"], key_final, state["grad_cap"])
      spread = lambda a: jnp.broadcast_to(a[:, None], (size, len(chosen)) + a.shape[1:])
      rows.update(final_gradient=spread(gradient), final_norm=spread(norms))
    # Interleaved split: each device keeps rows of its own shard in every minibatch.
    split = jax.tree.map(
        lambda a: a.reshape((-1, cfg.minibatches) + a.shape[1:]).swapaxes(0, 1), rows)
    logged = []
    for i in range(cfg.minibatches):
      state, metrics = step(state, frozen, jax.tree.map(lambda a: a[i], split),
                            jax.random.fold_in(key_train, i))
      logged.append(metrics)
    metrics = jax.tree.map(lambda *values: sum(values) / cfg.minibatches, *logged)
    if cfg.replay_lag:
      kept = {name: value for name, value in before.items() if name not in ("replay", "updates")}
      learned = jax.tree.map(lambda new, old: jnp.where(before["updates"] > 0, new, old),
                             {name: state[name] for name in kept}, kept)
      state = {**learned, "updates": state["updates"], "replay": fresh}
    return state, metrics

  def product(state):
    return state["ema"] if optim.ema else state["trainable"]["policy"]

  return Method(init=init, collect=collect, update=update, product=product,
                cost=lambda batch: cost(models, cfg, batch), tilt=lambda state: state["beta"])


def cost(models: Models, cfg: Config, batch: int) -> dict[str, int]:
  """Evaluations per update of one sample and one guidance branch, for `batch` trajectories."""
  branches = models.branches
  inner, rows = batch * cfg.strata, batch * (cfg.strata + cfg.always_final)
  forward = batch * models.sampler.steps + 2 * rows
  backward = rows
  gradients = batch if cfg.reward_grad == "final_latent" else rows
  if cfg.reward_grad == "onestep":
    forward, backward = forward + inner, backward + inner
  if cfg.reverse != "off":
    jacobians = 1 if cfg.reverse == "lean" else 2
    forward, backward = forward + 3 * rows, backward + (1 + jacobians) * rows
    gradients += rows
  gradients *= cfg.perturbations
  return {"denoiser_forward": forward * branches, "denoiser_backward": backward * branches,
          "decodes": gradients, "reward_queries": gradients, "reward_gradients": gradients}
