"""The plane: three modes, one rewarded twice as much, one beside a cliff; samples against the tilt.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.atlas.laboratory import (
  Entry,
  World,
  queries,
  sample,
  searched,
  trained,
)
from jaxalign.testing import analytic

MODES = ("plain", "twice", "cliff")
ANGLES = np.pi / 2 + 2 * np.pi / 3 * np.arange(3)
MEANS = 1.5 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)
MIXTURE = analytic.Mixture(np.full(3, 1 / 3), MEANS, np.full(3, 0.1))
STRENGTHS = (0.5, 1.0, 2.0)
COUNT = 4096                  # samples of a row, half of it at inference
EDGES = np.linspace(-3, 3, 25)


def reward(x):
  """`[B]`: 1 and 2 at the middle of the first two modes; 1 before the cliff of the third, then -3.
  """
  middle = jnp.asarray(MEANS, jnp.float32)
  near = jnp.exp(-jnp.square(x[:, None] - middle[None]).sum(-1) / (2 * 0.5 ** 2))      # [B, 3]
  beyond = ((x - middle[2:]) * middle[2:]).sum(1) / 1.5 - 0.2
  fall = 1 - 4 * jax.nn.sigmoid(beyond / 0.05)
  return near[:, 0] + 2 * near[:, 1] + near[:, 2] * fall


def network(schedule, sampler):
  return analytic.mlp(schedule, 2, width=32)


WORLD = World("plane", MIXTURE, reward, network)


@dataclasses.dataclass(frozen=True)
class Target:
  """An exact tilt, as weights of samples of the base's own chain.

  `cells`: its mass in each cell of the grid. `mass`: of each mode. `effective`: independent
  samples that the weights amount to.
  """
  cells: np.ndarray
  mass: np.ndarray
  reward: float
  effective: float


@functools.cache
def pool(path: str, chain: str):
  x = np.asarray(WORLD.base(path, chain))
  return x, np.asarray(jax.jit(reward)(jnp.asarray(x)), np.float64)


def mode_of(x):
  return np.square(x[:, None] - MEANS).sum(-1).argmin(1)


def cells_of(x, weights=None):
  """Mass of each cell `[24 x 24]`; what lies outside the grid counts at its rim."""
  inside = np.clip(x, EDGES[0] + 1e-6, EDGES[-1] - 1e-6)
  found, _, _ = np.histogram2d(inside[:, 0], inside[:, 1], bins=[EDGES, EDGES], weights=weights)
  return (found / found.sum()).ravel()


@functools.cache
def target(path: str, chain: str, scale: float) -> Target:
  x, r = pool(path, chain)
  w = np.exp(scale * (r - r.max()))
  w /= w.sum()
  mass = np.bincount(mode_of(x), w, 3)
  return Target(cells_of(x, w), mass, float(w @ r), float(1 / np.square(w).sum()))


def divergence(x, aim: Target) -> float:
  """`KL(samples || tilt)` of the masses of cells, nats; the tilt's are at least 1e-6."""
  return between(cells_of(x), aim.cells)


def between(p, q) -> float:
  """`KL(p || q)` of masses, nats; q is at least 1e-6."""
  q = np.maximum(q, 1e-6)
  return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


@functools.cache
def floor(path: str, chain: str, scale: float, count: int = COUNT) -> float:
  """The divergence of as many samples of the tilt itself."""
  x, r = pool(path, chain)
  w = np.exp(scale * (r - r.max()))
  index = np.random.default_rng(0).choice(len(x), count, p=w / w.sum())
  return divergence(x[index], target(path, chain, scale))


def described(x, path: str, chain: str, scale: float, path_kl=None) -> dict:
  """The numbers of a row, of samples `[n, 2]`."""
  aim, r = target(path, chain, scale), np.asarray(jax.jit(reward)(jnp.asarray(x)), np.float64)
  base = target(path, chain, 0.0)
  return {
      "base_kl": between(base.cells, aim.cells), "base_reward": base.reward,
      "kl": divergence(x, aim), "floor": floor(path, chain, scale, len(x)),
      "mass": (np.bincount(mode_of(x), minlength=3) / len(x)).tolist(),
      "tilt_mass": aim.mass.tolist(), "reward": float(r.mean()),
      "reward_error": float(r.std() / np.sqrt(len(r))), "tilt_reward": aim.reward,
      "path_kl": None if path_kl is None else float(path_kl.mean()),
      "cells": cells_of(x).round(6).tolist()}


def rows(entry: Entry, path: str) -> list[dict]:
  """Three rows of a method on a path, one for each strength."""
  chain = "noisy" if entry.chain == "sde" and path == "vp" else entry.chain
  models, out = WORLD.models(path, chain), []
  if entry.at_inference:
    for i, strength in enumerate(STRENGTHS):
      one, scale = entry, strength
      if entry.strength == "candidates":
        one, scale = dataclasses.replace(entry, updates=entry.updates * 2 ** i), 1.0
      x = np.asarray(searched(one, models, scale, i, COUNT // 2))
      out.append({"strength": one.updates if one is not entry else strength, "scale": scale,
                  **described(x, path, chain, scale), **queries(one, models)})
    return out
  if entry.strength == "scale":
    policies = trained(entry, WORLD, path, chain, STRENGTHS, [0, 1, 2])[-1]
    x, kl = sample(WORLD, path, chain, policies, COUNT)
    return [{"strength": s, "scale": s, **described(x[i], path, chain, s, kl[i]),
             **queries(entry, models)} for i, s in enumerate(STRENGTHS)]
  for policies, share in zip(trained(entry, WORLD, path, chain, [1.0], [0]), (0.25, 0.5, 1.0)):
    x, kl = sample(WORLD, path, chain, policies, COUNT)
    out.append({"strength": round(share * entry.updates), "scale": 1.0,
                **described(x[0], path, chain, 1.0, kl[0]), **queries(entry, models, share)})
  return out
