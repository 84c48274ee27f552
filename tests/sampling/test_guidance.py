"""Classifier-free guidance: one batched call equals two, and skips what it does not need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.sampling import Conditioning, Schedule, guided, guided_eps, make_sampler, rollout
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


def test_scale_one_skips_the_unconditional_branch():
  params, x, conditioning = example()
  denoise = Recorder()
  got = guided(denoise, 1.0)(params, x, jnp.asarray(3), conditioning)
  assert denoise.batches == [3] and got.uncond is None
  np.testing.assert_array_equal(got.combined, denoise(params, x, jnp.asarray(3), conditioning.cond))


def test_scale_zero_is_unconditional():
  params, x, conditioning = example()
  got = guided(Recorder(), 0.0)(params, x, jnp.asarray(3), conditioning)
  np.testing.assert_array_equal(got.combined, got.uncond)


def test_rows_stay_apart():
  """A row's prediction depends on that row alone."""
  params, x, conditioning = example(4)
  predict = guided(Recorder(), 3.0)
  whole = predict(params, x, jnp.asarray(3), conditioning).combined
  order = np.asarray([2, 0, 3, 1])
  moved = predict(params, x[order], jnp.asarray(3), jax.tree.map(lambda a: a[order], conditioning))
  np.testing.assert_array_equal(moved.combined, whole[order])


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_guided_eps_converts_after_combining(prediction):
  """Conversion is affine in the prediction, so guiding eps or the raw output is the same."""
  params, x, conditioning = example()
  schedule = Schedule(analytic.SD_SCHEDULE.alphas_cumprod, prediction)
  t = jnp.asarray([20, 500, 981])
  got = guided_eps(Recorder(), schedule, 5.0)(params, x, t, conditioning)
  cond, uncond = (schedule.to_eps(Recorder()(params, x, t, c), x, t) for c in conditioning)
  np.testing.assert_allclose(got, uncond + 5.0 * (cond - uncond), rtol=1e-4, atol=1e-4)


def test_guided_rollout_of_gaussians_extrapolates_the_mean():
  """Gaussians of one variance: guidance between means u and c gives the mean u + w (c - u)."""
  base = {"log_weights": jnp.zeros(1), "variances": jnp.full(1, 0.5)}
  schedule, scale, rows = analytic.SD_SCHEDULE, 3.0, 6
  sampler = make_sampler(schedule, 10)

  def denoise(params, x, t, cond):
    row = lambda x, t, m: analytic.exact_eps(
      dict(params, means=m[None]), x[None], schedule.abar(t)
    )[0]
    return jax.vmap(row)(x, jnp.broadcast_to(t, x.shape[:1]), cond["m"])

  c, u = jax.random.normal(jax.random.key(3), (2, rows, 2))
  run = lambda conditioning, w: rollout(
    guided_eps(denoise, schedule, w),
    base,
    sampler,
    conditioning,
    jax.random.key(4),
    jnp.arange(rows),
    (2,),
  )
  guided_run = run(Conditioning({"m": c}, {"m": u}), scale)
  direct = run(Conditioning({"m": u + scale * (c - u)}, {"m": u}), 1.0)
  np.testing.assert_allclose(guided_run.latents, direct.latents, atol=2e-4)
  assert (
    np.abs(np.asarray(direct.final - run(Conditioning({"m": c}, {"m": u}), 1.0).final)).max() > 0.5
  )
