"""Classifier-free guidance: one batched call equals two, and skips what it does not need."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.sampling import (
    Conditioning,
    branches,
    guided,
    guided_output,
    make_sampler,
    rollout,
)
from jaxalign.sampling.schedule import PREDICTIONS
from jaxalign.testing import analytic


class Recorder:
  """A denoiser, affine in latents, timestep and condition, that notes its calls."""

  def __init__(self):
    self.batches = []

  def __call__(self, params, x, t, cond):
    self.batches.append(x.shape[0])
    t = jnp.broadcast_to(t, x.shape[:1])[:, None]
    return params["w"] * x * (1 + t / 1000) + cond["m"]


def example(rows=3):
  x, c, u = jax.random.normal(jax.random.key(0), (3, rows, 2))
  return {"w": jnp.float32(0.3)}, x, Conditioning({"m": c}, {"m": u})


@pytest.mark.parametrize("t", [7, np.asarray([1, 500, 981])])
def test_batched_guidance_equals_two_calls(t):
  params, x, conditioning = example()
  denoise = Recorder()
  got = guided(denoise, 5.0)(params, x, jnp.asarray(t), conditioning)
  assert denoise.batches == [6]
  cond = denoise(params, x, jnp.asarray(t), conditioning.cond)
  uncond = denoise(params, x, jnp.asarray(t), conditioning.uncond)
  np.testing.assert_array_equal(got.cond, cond)
  np.testing.assert_array_equal(got.uncond, uncond)
  np.testing.assert_allclose(got.combined, uncond + 5.0 * (cond - uncond), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_scales_up_to_one_are_off(scale):
  """As in the pipelines: the conditional branch alone."""
  params, x, conditioning = example()
  denoise = Recorder()
  got = guided(denoise, scale)(params, x, jnp.asarray(3), conditioning)
  assert denoise.batches == [3] and got.uncond is None and branches(scale) == 1
  np.testing.assert_array_equal(got.combined, denoise(params, x, jnp.asarray(3), conditioning.cond))


def test_rows_stay_apart():
  """A row's prediction depends on that row alone."""
  params, x, conditioning = example(4)
  predict = guided(Recorder(), 3.0)
  whole = predict(params, x, jnp.asarray(3), conditioning).combined
  order = np.asarray([2, 0, 3, 1])
  moved = predict(params, x[order], jnp.asarray(3), jax.tree.map(lambda a: a[order], conditioning))
  np.testing.assert_array_equal(moved.combined, whole[order])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guidance_is_the_same_in_every_unit(prediction):
  """Conversion is affine in the output, so guiding noise estimates or outputs is the same."""
  params, x, conditioning = example()
  schedule = dataclasses.replace(analytic.SD_SCHEDULE, prediction=prediction)
  t = jnp.asarray([20, 500, 981])
  got = schedule.to_eps(guided_output(Recorder(), 5.0)(params, x, t, conditioning), x, t)
  cond, uncond = (schedule.to_eps(Recorder()(params, x, t, c), x, t) for c in conditioning)
  np.testing.assert_allclose(got, uncond + 5.0 * (cond - uncond), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", analytic.PATHS)
def test_guided_rollout_of_gaussians_extrapolates_the_mean(path):
  """Gaussians of one variance: guidance between means u and c gives the mean u + w (c - u)."""
  base = {"log_weights": jnp.zeros(1), "variances": jnp.full(1, 0.5)}
  schedule, scale, rows = analytic.PATHS[path]["schedule"], 3.0, 6
  sampler = make_sampler(steps=10, **analytic.PATHS[path])

  def denoise(params, x, t, cond):
    row = lambda x, t, m: analytic.exact_output(
        schedule, dict(params, means=m[None]), x[None], t)[0]
    return jax.vmap(row)(x, jnp.broadcast_to(t, x.shape[:1]), cond["m"])

  c, u = jax.random.normal(jax.random.key(3), (2, rows, 2))
  run = lambda conditioning, w: rollout(
      guided_output(denoise, w), base, sampler, conditioning, jax.random.key(4), jnp.arange(rows),
      (2,))
  guided_run = run(Conditioning({"m": c}, {"m": u}), scale)
  direct = run(Conditioning({"m": u + scale * (c - u)}, {"m": u}), 1.0)
  np.testing.assert_allclose(guided_run.latents, direct.latents, atol=2e-4)
  plain = run(Conditioning({"m": c}, {"m": u}), 1.0)
  assert np.abs(np.asarray(direct.final - plain.final)).max() > 0.5
