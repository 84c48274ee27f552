"""Optimisation shared by all methods: optax chains, gradient accumulation, moving averages."""
import jax
import jax.numpy as jnp
import optax

from jaxalign.config.schema import OptimConfig


def learning_rate(cfg: OptimConfig) -> optax.Schedule:
  """Learning rate as a function of the optimiser steps taken so far."""
  main = (optax.cosine_decay_schedule(cfg.lr, cfg.decay_steps) if cfg.decay_steps
          else optax.constant_schedule(cfg.lr))
  if not cfg.warmup:
    return main
  rise = optax.linear_schedule(cfg.lr / (cfg.warmup + 1), cfg.lr, cfg.warmup)   # no step is lost
  return optax.join_schedules([rise, main], [cfg.warmup])


def make_optimizer(cfg: OptimConfig, mask=None) -> optax.GradientTransformation:
  """AdamW with optional clipping, linear warm-up and cosine decay.

  Args:
    mask: `(params) -> tree of bool`, the leaves whose weights decay; all by default.
  """
  clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
  return optax.chain(clip, optax.adamw(
      learning_rate(cfg), cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay, mask=mask))


class Learner:
  """The policy in a method's state, AdamW that trains it, and its moving average.

  They are the entries `policy`, `optimizer`, `updates` and, with `optim.ema`, `ema` of the state.
  """

  def __init__(self, cfg: OptimConfig):
    self._optimizer, self._decay = make_optimizer(cfg), cfg.ema

  def init(self, policy) -> dict:
    state = {"policy": policy, "optimizer": self._optimizer.init(policy),
             "updates": jnp.zeros((), jnp.int32)}
    return {**state, "ema": jax.tree.map(jnp.copy, policy)} if self._decay else state

  def own(self, state: dict) -> dict:
    """These entries alone."""
    names = ("policy", "optimizer", "updates", *(["ema"] if self._decay else []))
    return {name: state[name] for name in names}

  def step(self, state: dict, gradient) -> dict:
    """The state after one optimiser step; what else it holds stays as it is."""
    changes, optimizer = self._optimizer.update(gradient, state["optimizer"], state["policy"])
    state = dict(state, policy=optax.apply_updates(state["policy"], changes), optimizer=optimizer,
                 updates=state["updates"] + 1)
    if self._decay:
      state["ema"] = ema_update(state["ema"], state["policy"], self._decay, state["updates"])
    return state

  def product(self, state: dict):
    """What is evaluated and exported."""
    return state["ema"] if self._decay else state["policy"]


def accumulated_gradients(grads_of, trainable, rows, key, parts: int):
  """Mean over `parts` micro-batches of `grads_of(trainable, rows, key) -> (gradient, metrics)`.

  `rows` is split along its leading axis, interleaved so that each device keeps rows of its own
  shard. One part is as large as the next, so the mean of means is the mean over rows.
  """
  if parts == 1:
    return grads_of(trainable, rows, key)
  split = jax.tree.map(lambda a: a.reshape((-1, parts) + a.shape[1:]).swapaxes(0, 1), rows)

  def body(total, inputs):
    index, part = inputs
    out = grads_of(trainable, part, jax.random.fold_in(key, index))
    return jax.tree.map(jnp.add, total, out), None
  shapes = jax.eval_shape(grads_of, trainable, jax.tree.map(lambda a: a[0], split), key)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  total, _ = jax.lax.scan(body, zeros, (jnp.arange(parts), split))
  return jax.tree.map(lambda a: a / parts, total)


def ema_update(average, tree, decay: float, updates):
  """Moving average with warmed decay `min(decay, (1 + n) / (10 + n))` after `n` updates."""
  n = updates.astype(jnp.float32)
  decay = jnp.minimum(decay, (1 + n) / (10 + n))
  return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, average, tree)
