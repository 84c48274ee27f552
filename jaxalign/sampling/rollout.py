"""Rollouts: one loop over sampler steps, returning the whole trajectory."""
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.devices import rng
from jaxalign.sampling.samplers import Sampler, gaussian_log_prob
from jaxalign.sampling.schedule import expand

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Trajectory(NamedTuple):
  """A batch of sampler trajectories.

  Attributes:
    latents: `[T+1, B, h, w, c]` f32, from noise (index 0) to output (index T). Outside the steps
      that were run: the initial latents before, zeros after.
    timesteps: `[T]` f32.
    log_prob: `[T, B]` f32, log-density of each transition under the policy that sampled it, summed
      over elements.
    sample_ids: `[B]` int32, global ids from which the noise was drawn.
    noise: `[T, B, h, w, c]` f32, the injected standard normal noise.
    out: `[T, B, h, w, c]` f32, the guided outputs of the sampling policy's network.
  """
  latents: Any
  timesteps: Any
  log_prob: Any
  sample_ids: Any
  noise: Any
  out: Any

  @property
  def final(self):
    """The outputs of the sampler `[B, h, w, c]`."""
    return self.latents[-1]


def initial_noise(key, sample_ids, latent_shape):
  """`x_0 ~ N(0, I)` of shape `[B, *latent_shape]`, drawn per sample from its global id."""
  return rng.normal_per_sample(rng.per_sample(key, sample_ids), latent_shape, 0)


def step_noise(key, sample_ids, latent_shape, k):
  """Standard normal noise injected by transition `k`, `[B, *latent_shape]`."""
  return rng.normal_per_sample(rng.per_sample(key, sample_ids), latent_shape, k + 1)


def transition(output_fn, params, sampler: Sampler, k, x_k, noise, conditioning, before=None):
  """One step: `(x_{k+1}, output, log_prob [B])` with the injected `noise` given.

  `before` is `(clean estimate of the step before, whether there is one)`; only second-order
  samplers ask for it.
  """
  out = output_fn(params, x_k, sampler.at("timesteps", k), conditioning)
  std = sampler.at("std", k)
  x_next = sampler.mean(k, x_k, out) + expand(std, x_k) * noise
  if sampler.second_order and before is not None:
    clean_before, exists = before
    weight = jnp.where(exists, sampler.at("correction", k), 0.0)
    x_next = x_next + weight * (sampler.clean(k, x_k, out) - clean_before)
  log_prob = jnp.where(
      std > 0, gaussian_log_prob(noise, tuple(range(1, noise.ndim)))
      - x_k[0].size * jnp.log(jnp.where(std > 0, std, 1.0)), 0.0)
  return x_next, out, log_prob


def rollout(output_fn, params, sampler: Sampler, conditioning, key, sample_ids, latent_shape, *,
            x_init=None, noise=None, start=0, stop=None) -> Trajectory:
  """Samples trajectories that nobody differentiates.

  Bounds may be traced: one compiled program serves every interval `[start, stop)`.

  Args:
    output_fn: `(params, x_t, t, conditioning) -> output` of the network, guidance included.
    key, sample_ids: noise is drawn from these unless given.
    x_init: `[B, *latent_shape]` latents at index `start`; if None drawn from N(0, I), times the
      sampler's `input_scale`.
    noise: `[T, B, *latent_shape]` injected noise; drawn per step if None.
    start, stop: first step and one past the last; all steps by default.
  """
  steps, batch = sampler.steps, sample_ids.shape[0]
  stop = steps if stop is None else stop
  if x_init is None:
    x_init = sampler.input_scale * initial_noise(key, sample_ids, latent_shape)
  shape = (batch,) + tuple(latent_shape)
  before = (jnp.arange(steps + 1) <= start)[(slice(None),) + (None,) * len(shape)]
  empty = Trajectory(
      latents=jnp.where(before, x_init[None], 0.0),
      timesteps=jnp.asarray(sampler.timesteps, jnp.float32),
      log_prob=jnp.zeros((steps, batch)),
      sample_ids=sample_ids,
      noise=jnp.zeros((steps,) + shape) if noise is None else noise,
      out=jnp.zeros((steps,) + shape))

  def body(k, trajectory):
    z = step_noise(key, sample_ids, latent_shape, k) if noise is None else noise[k]
    j = jnp.maximum(k - 1, 0)
    previous = sampler.clean(j, trajectory.latents[j], trajectory.out[j]), k > start
    x_next, out, log_prob = transition(output_fn, params, sampler, k, trajectory.latents[k], z,
                                       conditioning, previous)
    return trajectory._replace(
        latents=trajectory.latents.at[k + 1].set(x_next),
        log_prob=trajectory.log_prob.at[k].set(log_prob),
        noise=trajectory.noise.at[k].set(z),
        out=trajectory.out.at[k].set(out))
  return jax.lax.fori_loop(start, stop, body, empty)


def differentiable_rollout(output_fn, params, sampler: Sampler, conditioning, x_init, noise, *,
                           start: int = 0, stop: int | None = None, remat: str = "full"):
  """Samples with gradients through every step: to `params`, `x_init` and `noise`.

  Args:
    x_init: `[B, *latent_shape]` latents at index `start`.
    noise: `[stop - start, B, *latent_shape]` injected noise.
    start, stop: static bounds.
    remat: "none" (keep all activations), "dots", or "full" (keep the latents only and run each step
      again in the backward pass).
  Returns:
    Final latents `[B, *latent_shape]` and the latents after each step `[stop - start, B, ...]`.
  """
  def body(carry, inputs):
    x_k, *clean = carry
    k, z = inputs
    before = (*clean, k > start) if clean else None
    x_next, out, _ = transition(output_fn, params, sampler, k, x_k, z, conditioning, before)
    return (x_next, *([sampler.clean(k, x_k, out)] if clean else [])), x_next
  if REMAT_POLICIES[remat] is not None:
    body = jax.checkpoint(body, policy=REMAT_POLICIES[remat])
  ks = np.arange(start, sampler.steps if stop is None else stop)
  carry = (x_init, jnp.zeros_like(x_init)) if sampler.second_order else (x_init,)
  (final, *_), after = jax.lax.scan(body, carry, (jnp.asarray(ks), noise))
  return final, after


def pull_back(output_fn, params, sampler: Sampler, k, x_k, conditioning):
  """A transition's mean and clean estimate at `x_k`, and what takes cotangents of them back.

  The vector-Jacobian product of one step, of which the adjoint of a chain is made: `replay`, the
  reverse score of nabla-GFN, adjoint matching.

  Args:
    output_fn: `(params, x_t, t, conditioning) -> output` of the network.
    k: scalar or `[B]`.
  Returns:
    `(mean, clean)`; `(cotangent of both) -> (gradient to params, cotangent of x_k)`; and the
    network's output.
  """
  def both(params, x):
    out = output_fn(params, x, sampler.at("timesteps", k), conditioning)
    return (sampler.mean(k, x, out), sampler.clean(k, x, out)), out
  return jax.vjp(both, params, x_k, has_aux=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def replay(output_fn, sampler: Sampler, params, conditioning, latents, active):
  """The output of sampled trajectories, as a function of the parameters that sampled them.

  The value is `latents[-1]`, and the gradient to `params` is that of running the last S transitions
  again from `latents[0]` with the same noise. Nothing is sampled twice: every step's Jacobian is
  taken at its stored latents, from the last step to the first, so that memory holds the latents and
  the activations of one step.

  Args:
    output_fn: `(params, x_t, t, conditioning) -> output`, guidance included.
    conditioning: anything that `output_fn` takes as such; constant, as are the latents.
    latents: `[S+1, B, ...]` from index `T - S` on, sampled with these very `params`.
    active: `[S]` bool, may be traced. At other steps the network's output is a constant: gradients
      pass along `a_k x_k` only, and the network is not run.
  Reference: `a_k` is `Sampler.x_coef`; the recursion is the discrete adjoint of the sampler.
  """
  return latents[-1]


def _replay_forward(output_fn, sampler, params, conditioning, latents, active):
  return latents[-1], (params, conditioning, latents, active)


def _replay_backward(output_fn, sampler, residuals, cotangent):
  params, conditioning, latents, active = residuals
  steps = active.shape[0]

  def back(i, carry):
    gradient, cotangent, ahead = carry
    j = steps - 1 - i
    k = sampler.steps - steps + j
    # A second-order step adds what the clean estimate has changed by since the step before, if the
    # chain has that.
    correction = jnp.where(j > 0, sampler.at("correction", k), 0.0) * cotangent
    pulled = cotangent, correction - ahead

    def through(gradient):
      _, pull, _ = pull_back(output_fn, params, sampler, k, latents[j], conditioning)
      to_params, to_x = pull(pulled)
      return jax.tree.map(jnp.add, gradient, to_params), to_x

    def past(gradient):
      return gradient, (sampler.at("x_coef", k) * pulled[0]
                        + sampler.at("clean_x_coef", k) * pulled[1])
    gradient, to_x = jax.lax.cond(active[j], through, past, gradient)
    return gradient, to_x, correction
  zeros = jax.tree.map(jnp.zeros_like, params)
  start = zeros, cotangent, jnp.zeros_like(cotangent)
  return jax.lax.fori_loop(0, steps, back, start)[0], None, None, None


replay.defvjp(_replay_forward, _replay_backward)
