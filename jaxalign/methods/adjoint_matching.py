"""Adjoint Matching: stochastic optimal control of the sampler, as a regression on adjoints.

  minimise E_theta[ path KL to the reference - beta R(x_N) ]

With transitions `x_{k+1} = a_k x_k - b_k o_theta(x_k) + s_k z`, o the network's output, and J_k the
Jacobian of the reference's mean:

  sample trajectories x_0..x_N with the policy, on a memoryless sampler             (collect)
  h_N = beta grad R(decode(x_N));  h_k = J_k(x_k)^T h_{k+1}                         (adjoints)
  pick transitions: one per stratum of steps, and the last                          (choose_steps)
  theta <- AdamW on w_k mean |(o_theta - o_ref)(x_k) + h_{k+1} / lam_k|^2           (loss)

h is the lean adjoint with its sign turned. In discrete time, too, its mean given x_k is the
gradient of the value at the optimum, at any step size and for any network: the minimum is the best
policy of fixed variances, near the reference path tilted by `exp(beta R)` given its noise. A
memoryless sampler forgets that noise, so that its output is tilted as the path is.

Domingo-Enrich et al. 2025, "Adjoint Matching: Fine-tuning Flow and Diffusion Generative Models with
Memoryless Stochastic Optimal Control". Implemented from the equations; the published code for
Stable Diffusion takes h_k where h_{k+1} belongs.
"""
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.config.fields import Count, Fraction, NonNegative, Whole, check
from jaxalign.config.schema import OptimConfig
from jaxalign.errors import UserError
from jaxalign.methods import Method, Models
from jaxalign.methods.shared.optimizer import Learner, accumulated_gradients
from jaxalign.methods.shared.reward_gradient import perturbed_gradient
from jaxalign.sampling import expand, pull_back


@dataclasses.dataclass(frozen=True)
class Config:
  """Keys of the `method` group.

  Attributes:
    beta: reward strength, > 0 to raise and < 0 to lower the reward; in `beta_unit`.
    beta_unit: "sigma" (beta is divided by the reward's within-prompt standard deviation on the base
      model) or "raw".
    weighting: w_k: "eps" (1: even over the steps, in the unit of the network's output) or "control"
      (`rate_k^2`, the paper's; most of it on the last two steps).
    strata: transitions trained on per trajectory, one from each of this many equal ranges of steps;
      0 is all of them. always_final: whether the last one is added to strata.
    adjoint_steps: adjoints are carried back through the last so many steps only, and these are
      trained; 0 is all.
    clip_quantile: residuals whose norm exceeds this running quantile of their stratum's are left
      out, in [0, 1); 0 is off. It leaves out large reward gradients, so it biases toward smaller.
    guidance: "one" (sampling, adjoints and loss have the sampler's guidance) or "mixed" (adjoints
      and loss have none: images look better in training, and there is no fixed target).
    perturbations, perturb_std: average the reward's gradient over this many copies of the output
      with noise of this standard deviation added, in latent units.
    require_memoryless: whether samplers that remember their noise are refused.
  """
  beta: float = 2.0
  beta_unit: Literal["sigma", "raw"] = "sigma"
  weighting: Literal["eps", "control"] = "eps"
  strata: Whole = 4
  always_final: bool = True
  adjoint_steps: Whole = 0
  clip_quantile: Fraction = 0.0
  guidance: Literal["one", "mixed"] = "one"
  perturbations: Count = 1
  perturb_std: NonNegative = 0.0
  require_memoryless: bool = True

  reward_gradients = True
  noise_at_every_step = True
  strength = "beta"

  def __post_init__(self):
    check("method", self)


# What the published code computes for Stable Diffusion, but for its index of the adjoint and its
# own schedule: argument of the recipe, which also sets the optimiser.
PRESETS: dict[str, dict[str, Any]] = {
    "release": dict(weighting="control", strata=4, always_final=False, clip_quantile=0.9,
                    guidance="mixed", beta=100.0, beta_unit="raw"),
}


def adjoints(models: Models, cfg: Config, frozen, rows, beta, key):
  """Adjoints after each step, and the reference's outputs before it.

  Args:
    rows: `latents [B, N+1, ...]`, `conditioning`, `prepared`.
    beta: scalar, in 1 / reward units.
  Returns:
    `{"h", "out_ref"} [K, B, ...]` f32 of the last K steps, `h[j]` the adjoint at x_{N-K+j+1}; norms
    `[B]` of the reward's gradient, and of the adjoint at the first of these steps. Memory holds
    these and the activations of one step.
  """
  sampler = models.sampler
  latents = jnp.moveaxis(rows["latents"], 1, 0)
  count = cfg.adjoint_steps or sampler.steps
  output = lambda params, x, t, conditioning: models.output(None, frozen, x, t, conditioning)
  gradient = perturbed_gradient(models, cfg, frozen, latents[-1], rows["prepared"], key)

  def back(h, k):
    _, pull, out = pull_back(output, (), sampler, k, latents[k], rows["conditioning"])
    _, before = pull((h, jnp.zeros_like(h)))
    return before, {"h": h, "out_ref": out}
  ks = jnp.arange(sampler.steps - count, sampler.steps)
  first, stacked = jax.lax.scan(back, beta * gradient, ks, reverse=True)
  norm = lambda a: jnp.sqrt(jnp.square(a).sum(tuple(range(1, a.ndim))))
  return jax.lax.stop_gradient((stacked, norm(gradient), norm(first)))


def choose_steps(cfg: Config, key, batch: int, steps: int):
  """Indices of trained transitions, `[S, B]` int32, among the last steps that have adjoints."""
  count = cfg.adjoint_steps or steps
  if not cfg.strata:
    return jnp.broadcast_to(jnp.arange(steps - count, steps)[:, None], (count, batch))
  edges = steps - count + np.linspace(0, count, cfg.strata + 1).round().astype(np.int32)
  chosen = jax.random.randint(key, (cfg.strata, batch), edges[:-1, None], edges[1:, None])
  if not cfg.always_final:
    return chosen
  return jnp.concatenate([chosen, jnp.full((1, batch), steps - 1, chosen.dtype)])


def loss(models: Models, cfg: Config, policy, frozen, rows, limit):
  """The loss of transitions, a scalar: their mean of the weighted squares' mean over elements.

  Args:
    rows: `k [S, B]`, `x_k`, `h` (the adjoint after the step), `out_ref [S, B, ...]` and
      `conditioning [S, B, ...]`.
    limit: `[S]` norms of residuals, in the unit of the network's output, above which rows are left
      out; the mean is still over all.
  Returns:
    The loss; `norms [S, B]` of the residuals and `path_kl [S, B]` in nats of each transition.
  """
  sampler, shape = models.sampler, rows["k"].shape
  flat = lambda a: a.reshape((-1,) + a.shape[2:])
  rows = jax.tree.map(flat, rows)
  k, axes = rows["k"], tuple(range(1, rows["x_k"].ndim))
  out = models.output(policy, frozen, rows["x_k"], sampler.at("timesteps", k),
                      rows["conditioning"])
  gap = out - rows["out_ref"]
  square = jnp.square(gap + rows["h"] / expand(sampler.at("lam", k), gap))
  rate = jnp.square(sampler.at("rate", k))
  weight = rate if cfg.weighting == "control" else jnp.ones_like(rate)
  norms = jax.lax.stop_gradient(jnp.sqrt(square.sum(axes))).reshape(shape)
  weight = jnp.where(norms > limit[:, None], 0.0, weight.reshape(shape))
  total = (weight * square.mean(axes).reshape(shape)).mean()
  path_kl = 0.5 * rate * jnp.square(gap).sum(axes)
  return total, {"norms": norms, "path_kl": path_kl.reshape(shape)}


def make(models: Models, cfg: Config, optim: OptimConfig) -> Method:
  """Adjoint Matching as a Method.

  Raises:
    UserError: a sampler that remembers its noise, or has not as many steps as the keys ask for.
  """
  sampler, learner = models.sampler, Learner(optim)
  if cfg.require_memoryless and not sampler.memoryless:
    raise UserError("method.name='adjoint_matching' is for samplers that forget their noise: set "
                    "sample.kind='ddim' with sample.eta=1 and sample.final='noisy', or "
                    "method.require_memoryless=False")
  if cfg.adjoint_steps > sampler.steps:
    raise UserError(f"method.adjoint_steps={cfg.adjoint_steps} exceeds sample.steps="
                    f"{sampler.steps}")
  count = cfg.adjoint_steps or sampler.steps
  if cfg.strata > count:
    raise UserError(f"method.strata={cfg.strata} exceeds the {count} steps that have adjoints")
  trained = (cfg.strata + cfg.always_final) if cfg.strata else count
  inner = models if cfg.guidance == "one" else dataclasses.replace(models, guidance=1.0)
  beta = cfg.beta / models.reward_std if cfg.beta_unit == "sigma" else cfg.beta

  no_limit = lambda: jnp.full(trained, jnp.inf, jnp.float32)

  def init(key, frozen, batch):
    state = learner.init(models.init_policy(key, frozen))
    return {**state, "limit": no_limit()} if cfg.clip_quantile else state

  def collect(state, frozen, batch, key):
    trajectory = models.rollout(state["policy"], frozen, batch, key)
    # The batch leads every array, so that an experience is sharded as one.
    return {"final": trajectory.final, "latents": jnp.moveaxis(trajectory.latents, 0, 1),
            "batch": batch}

  def update(state, frozen, experience, rewards, key):
    batch = experience["batch"]
    limit = state["limit"] if cfg.clip_quantile else no_limit()
    key_steps, key_train = jax.random.split(key)
    chosen = choose_steps(cfg, key_steps, experience["final"].shape[0], sampler.steps)
    rows = {"latents": experience["latents"], "conditioning": batch["conditioning"],
            "prepared": batch["prepared"], "k": chosen.T}

    def grads_of(policy, rows, key):
      stacked, reward_norms, first_norms = adjoints(inner, cfg, frozen, rows, beta, key)
      k = rows["k"].T                                                            # [S, B]
      pick = lambda a, i: jnp.take_along_axis(a, i.reshape(i.shape + (1,) * (a.ndim - 2)), axis=0)
      repeat = lambda a: jnp.broadcast_to(a[None], k.shape[:1] + a.shape)
      transitions = {
          "k": k, "x_k": pick(jnp.moveaxis(rows["latents"], 1, 0), k),
          **{name: pick(a, k - (sampler.steps - count)) for name, a in stacked.items()},
          "conditioning": jax.tree.map(repeat, rows["conditioning"])}
      (total, found), gradient = jax.value_and_grad(
          lambda p: loss(inner, cfg, p, frozen, transitions, limit), has_aux=True)(policy)
      # One row per stratum stands for all steps of its range.
      drawn = found["path_kl"][:cfg.strata or count]
      metrics = {"loss/total": total, "train/path_kl": drawn.mean() * count,
                 "train/reward_grad_norm": reward_norms.mean(),
                 "train/adjoint_gain": first_norms.mean() / jnp.maximum(
                     abs(beta) * reward_norms.mean(), 1e-30)}
      if cfg.clip_quantile:
        metrics["train/clipped_share"] = (found["norms"] > limit[:, None]).mean()
        metrics["limit"] = jnp.quantile(found["norms"], cfg.clip_quantile, axis=1)
      return gradient, metrics

    gradient, metrics = accumulated_gradients(
        grads_of, state["policy"], rows, key_train, optim.accumulate)
    metrics["train/grad_norm"] = optax.tree.norm(gradient)
    state = learner.step(state, gradient)
    if cfg.clip_quantile:
      new = metrics.pop("limit")
      state["limit"] = jnp.where(jnp.isinf(limit), new, 0.9 * limit + 0.1 * new)
    return state, metrics

  return Method(init=init, collect=collect, update=update, product=learner.product,
                cost=lambda batch: cost(models, inner, cfg, batch, count, trained),
                tilt=(lambda state: jnp.asarray(beta)) if cfg.guidance == "one" else None)


def cost(models: Models, inner: Models, cfg: Config, batch: int, count: int,
         trained: int) -> dict[str, int]:
  """Evaluations per update of one sample and one guidance branch."""
  learned = batch * (count + trained) * inner.branches
  images = batch * cfg.perturbations
  return {"denoiser_forward": batch * models.sampler.steps * models.branches + learned,
          "denoiser_backward": learned, "decodes": images, "reward_queries": images,
          "reward_gradients": images}
