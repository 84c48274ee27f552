"""How good nabla-GFlowNet's forward-looking guess is, before any training.

  python benchmarks/value_gradient.py [--beta=20] [--samples=32]

First: samples held-out prompts with `eps_ref - h / lam`, that is with the guess as guidance, and
prints reward and judge shift with the path KL spent, for each `gamma`. Second: the share of the
guess's squared norm that samples of one prompt have in common, which is what a policy can learn.
"""
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from jaxalign.config import recipes
from jaxalign.data.prompts import read_prompts
from jaxalign.devices import rng
from jaxalign.methods import nabla_gfn
from jaxalign.sampling import expand, initial_noise, step_noise
from jaxalign.train.experiment import build, gather

_BETA = flags.DEFINE_float("beta", 20.0, "reward strength, raw")
_SAMPLES = flags.DEFINE_integer("samples", 32, "samples, and samples per prompt in the second part")


def main(argv):
  del argv
  exp = build(recipes.parse(recipes.default("nabla_gfn")))
  models, frozen, sampler = exp.models, exp.frozen, exp.models.sampler
  prompts = read_prompts("prompts", "jaxalign:emoji_heldout")
  table, n = exp.prompt_table(prompts), _SAMPLES.value
  key, ids = rng.stream(jax.random.key(0), rng.EVAL), jnp.arange(n)

  @jax.jit
  def guide(frozen, batch, beta, gammas):
    def body(k, carry):
      x, kl = carry
      t = sampler.at("timesteps", k)
      cfg = nabla_gfn.Config(gamma="one", x0_net="ref")
      guess, _ = nabla_gfn.value_gradient(models, cfg, None, frozen, x, jnp.full((n,), t),
                                          jnp.zeros(n, bool), batch, key, jnp.inf)
      shift = -beta * gammas[k] * guess / sampler.at("lam", k)
      out = models.output(None, frozen, x, t, batch["conditioning"]) + shift
      kl = kl + 0.5 * jnp.square(sampler.at("rate", k)) * jnp.square(shift).sum((1, 2, 3))
      noise = step_noise(key, ids, models.latent_shape, k)
      return sampler.mean(k, x, out) + expand(sampler.at("std", k), x) * noise, kl
    x, kl = jax.lax.fori_loop(0, sampler.steps, body, (
        initial_noise(key, ids, models.latent_shape), jnp.zeros(n)))
    images = models.decode(frozen["decoder"], x)
    return (models.score(frozen["reward"], images, batch["prepared"]),
            exp.judge.score(exp.judge_params["judge"], images, batch["judge"]), kl)

  batch = gather(table, np.arange(n) % len(prompts), np.arange(n))
  before = guide(frozen, batch, 0.0, jnp.ones(sampler.steps))
  pm = lambda a: f"{a.mean():+.3f} ± {a.std(ddof=1) / np.sqrt(len(a)):.3f}"
  print(f"guidance by the guess, raw beta {_BETA.value:g}, {n} samples (reward mean without "
        f"{before[0].mean():.3f})")
  for name in ("one", "sqrt_abar", "abar"):
    gammas = nabla_gfn.gamma_at(name, jnp.asarray(sampler.alpha, jnp.float32))
    reward, judge, kl = guide(frozen, batch, _BETA.value, gammas)
    print(f"  gamma {name:10s} reward {pm(np.asarray(reward - before[0]))}   judge "
          f"{pm(np.asarray(judge - before[1]))}   path KL {kl.mean():.2f} nats")

  print(f"share of the guess's squared norm common to {n} samples of one prompt")
  several = gather(table, np.repeat(np.arange(4) * 8, n), np.arange(4 * n))
  trajectory = jax.jit(lambda frozen: models.rollout(None, frozen, several, key))(frozen)
  for copies, std in ((1, 0.0), (4, 0.8)):
    cfg = nabla_gfn.Config(gamma="one", x0_net="ref", perturbations=copies, perturb_std=std)
    guess = jax.jit(lambda frozen, x, t: nabla_gfn.value_gradient(
        models, cfg, None, frozen, x, t, jnp.zeros(4 * n, bool), several, key, jnp.inf)[0])
    for k in (6, 10, 13, 16):
      t = jnp.full((4 * n,), sampler.timesteps[k])
      g = np.asarray(guess(frozen, trajectory.latents[k], t)).reshape(4, n, -1)
      cross = np.square(g.sum(1)).sum(-1) - np.square(g).sum((1, 2))      # i != j: unbiased
      share = cross / (n - 1) / np.square(g).sum((1, 2))
      print(f"  {copies} copies, perturb_std {std}: step {k:2d} {share.mean():.3f} "
            f"± {share.std(ddof=1) / 2:.3f}")


if __name__ == "__main__":
  sys.exit(app.run(main))
