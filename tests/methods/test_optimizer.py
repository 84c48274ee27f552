"""Shared optimisation: schedules, clipping, accumulation, moving averages."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.config.schema import OptimConfig
from jaxalign.errors import UserError
from jaxalign.methods.shared.optimizer import (
  accumulated_gradients,
  ema_update,
  learning_rate,
  make_optimizer,
)


def first_step(cfg, gradient):
  optimizer = make_optimizer(cfg)
  params = jax.tree.map(jnp.ones_like, gradient)
  updates, _ = optimizer.update(gradient, optimizer.init(params), params)
  return updates


@pytest.mark.parametrize(
  "warmup, decay_steps, expected",
  [
    (0, 0, {0: 1.0, 1000: 1.0}),
    (4, 0, {0: 0.2, 2: 0.6, 4: 1.0, 1000: 1.0}),
    (0, 10, {0: 1.0, 5: 0.5, 10: 0.0, 1000: 0.0}),
    (4, 10, {0: 0.2, 3: 0.8, 4: 1.0, 9: 0.5, 14: 0.0, 1000: 0.0}),
  ],
)
def test_learning_rate(warmup, decay_steps, expected):
  rate = learning_rate(OptimConfig(lr=2.0, warmup=warmup, decay_steps=decay_steps))
  for step, value in expected.items():
    assert float(rate(step)) == pytest.approx(2.0 * value, abs=1e-6)


def test_first_step_of_adam_is_the_sign_and_clipping_keeps_the_direction():
  gradient = {"a": jnp.asarray([3.0, -4.0])}
  step = first_step(OptimConfig(lr=0.1, clip_norm=1.0), gradient)
  np.testing.assert_allclose(step["a"], [-0.1, 0.1], rtol=1e-4)
  # With a large eps the step is -lr / eps times the clipped gradient.
  for clip, scale in ((0.0, 1.0), (1.0, 0.2), (10.0, 1.0)):
    step = first_step(OptimConfig(lr=1e6, eps=1e6, clip_norm=clip), gradient)
    np.testing.assert_allclose(step["a"], -scale * np.asarray([3.0, -4.0]), rtol=1e-4)


def test_weight_decay_is_decoupled():
  step = first_step(OptimConfig(lr=0.1, weight_decay=0.5), {"a": jnp.zeros(2)})
  np.testing.assert_allclose(step["a"], -0.05, rtol=1e-5)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_accumulated_gradient_is_the_mean_over_rows(parts):
  rows = {"x": jax.random.normal(jax.random.key(0), (8, 3)), "y": jnp.arange(8.0)}
  weights = jnp.asarray([0.1, -0.2, 0.3])

  def grads_of(w, rows, key):
    loss = lambda w: jnp.square(rows["x"] @ w - rows["y"]).mean()
    return jax.grad(loss)(w), {"loss": loss(w)}

  got = accumulated_gradients(grads_of, weights, rows, jax.random.key(1), parts)
  whole = grads_of(weights, rows, None)
  chex.assert_trees_all_close(got, whole, rtol=1e-5)


def test_moving_average_warms_up_and_settles():
  average = ema_update({"a": jnp.zeros(2)}, {"a": jnp.ones(2)}, 0.9, jnp.asarray(1))
  np.testing.assert_allclose(average["a"], 1 - 2 / 11, rtol=1e-6)
  average = ema_update({"a": jnp.zeros(2)}, {"a": jnp.ones(2)}, 0.9, jnp.asarray(10**6))
  np.testing.assert_allclose(average["a"], 0.1, rtol=1e-5)


@pytest.mark.parametrize(
  "options, key",
  [
    (dict(lr=-1.0), "optim.lr"),
    (dict(eps=-1.0), "optim.eps"),
    (dict(b1=1.0), "optim.b1"),
    (dict(b2=1.0), "optim.b2"),
    (dict(weight_decay=-1.0), "optim.weight_decay"),
    (dict(clip_norm=-1.0), "optim.clip_norm"),
    (dict(warmup=-1), "optim.warmup"),
    (dict(decay_steps=-1), "optim.decay_steps"),
    (dict(accumulate=0), "optim.accumulate"),
    (dict(ema=1.0), "optim.ema"),
  ],
)
def test_bad_config_names_its_key(options, key):
  with pytest.raises(UserError, match=key):
    OptimConfig(**options)


def test_optimizer_minimises():
  optimizer = make_optimizer(OptimConfig(lr=0.05, warmup=5, decay_steps=200))
  params = {"a": jnp.asarray([2.0, -3.0])}
  state = optimizer.init(params)
  for _ in range(205):
    updates, state = optimizer.update(jax.tree.map(lambda a: 2 * a, params), state, params)
    params = optax.apply_updates(params, updates)
  assert float(jnp.abs(params["a"]).max()) < 0.05
