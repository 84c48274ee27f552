"""DAS: particles that follow the reward's gradient, with the weights that make up for it.

No weight is trained. With K particles of each image, transitions of the base model
`x_{k+1} = mu_k(x_k) + s_k z`, r_k the reward of the clean estimate at x_k, of the output at the
end, and lam_k rising to 1:

  log w <- log w + lam_k beta r_k                                                    (update)
  if the effective number of particles is low: resample, log w <- 0
  g <- lam_{k+1} beta grad r_k(x_k)              through the network
  x_{k+1} <- mu_k + s_k^2 g + s_k z
  log w <- log w - lam_k beta r_k - s_k g.z - s_k^2 |g|^2 / 2
  at the end: one particle, drawn by its weight

The last two terms are the logarithm of the base model's density over that of the shifted one.
Weighted averages tend to those of the tilt `p exp(beta R)` of the sampler's own law, as those of
`fk_steering` do, whatever lam and g are: these decide the variance. A small lam keeps early
estimates, which mean little, from choosing.

Kim et al. 2025, "Test-time Alignment of Diffusion Models without Reward Over-optimization" (DAS).
Implemented from the equations: what a particle owns is gathered with it, which the published code
leaves out for guidance and weights.
"""
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.config.fields import Count, NonNegative, check
from jaxalign.config.schema import OptimConfig
from jaxalign.methods import Method, Models
from jaxalign.methods.shared import particles
from jaxalign.sampling import expand, pull_back

BISECTIONS = 20


@dataclasses.dataclass(frozen=True)
class Config:
  """Keys of the `method` group.

  Attributes:
    particles: K of each image; 1 follows the gradient alone.
    beta: strength of the tilt.
    beta_unit: what it is measured in: "sigma" (divided by the reward's within-prompt standard
      deviation on the base model) or "raw".
    temper: how lam_k rises: "exp" (`(1 + gamma)^k - 1`, at most 1), "adaptive" (as far as the
      effective share stays at `ess`, of each image) or "none" (1 throughout).
    gamma: of "exp"; 0 takes the smallest that reaches 1 before the output.
    ess: resample where the effective share of particles is below this; above 1 at every step.
    guide_cap: most that a step moves by the gradient, in standard deviations of its noise; 0 is
      any.
    output: the particle that is the result: "draw" (by weight, which has the tilt's law),
      "argmax_reward" or "argmax_weight" (the published code's).
  """
  particles: Count = 4
  beta: NonNegative = 2.0
  beta_unit: Literal["sigma", "raw"] = "sigma"
  temper: Literal["exp", "adaptive", "none"] = "exp"
  gamma: NonNegative = 0.0
  ess: NonNegative = 0.5
  guide_cap: NonNegative = 0.0
  output: Literal["draw", "argmax_reward", "argmax_weight"] = "draw"

  at_inference = True
  noise_at_every_step = True
  reward_gradients = True
  without_gradients = "choose configs/fk_steering.py or configs/svdd.py"

  def __post_init__(self):
    check("method", self)


# The published script's for an aesthetic score and 100 steps: argument of the recipe.
PRESETS: dict[str, dict[str, Any]] = {
    "release": dict(beta=200.0, beta_unit="raw", gamma=0.008, output="argmax_weight"),
}


def tempering(cfg: Config, steps: int) -> np.ndarray:
  """lam_0 .. lam_N `[N+1]`; the last one is 1. Those of "adaptive" are found on the way."""
  if cfg.temper != "exp":
    return np.ones(steps + 1)
  gamma = cfg.gamma or 2 ** (1 / max(steps - 1, 1)) - 1
  return np.append(np.minimum((1 + gamma) ** np.arange(steps) - 1, 1), 1.0)


def furthest(log_w, gain, start, ess: float):
  """The least lam `[B]` in [start, 1] at which `log_w + lam gain` has an effective share below
  `ess`, by bisection; 1 where none has.

  Args:
    log_w, gain: `[B, K]`. start: `[B]`.
  """
  low = lambda lam: particles.effective_share(log_w + lam[:, None] * gain) < ess

  def halve(_, between):
    above, below = between
    middle = (above + below) / 2
    found = low(middle)
    return jnp.where(found, above, middle), jnp.where(found, middle, below)
  return jax.lax.fori_loop(0, BISECTIONS, halve, (start, jnp.ones_like(start)))[1]


def make(models: Models, cfg: Config, optim: OptimConfig) -> Method:
  """DAS as a Method at inference: a step of each image per update, and one for the outputs."""
  sampler, count = models.sampler, cfg.particles
  steps, lams = sampler.steps, jnp.asarray(tempering(cfg, sampler.steps), jnp.float32)
  beta = particles.strength(models, cfg)
  adaptive = cfg.temper == "adaptive"

  def init(key, frozen, batch):
    state = particles.begin(models, key, batch, count)
    return {**state, "lam": jnp.zeros_like(state["log_z"])} if adaptive else state

  def collect(state, frozen, batch, key):
    return {"batch": batch}                         # scored where it is differentiated

  def look(frozen, batch, k, x):
    """Rewards `[B K]` at x_k, the transition's means and the rewards' gradients, as `x`."""
    rows = particles.repeated(batch, count)
    output = lambda params, x, t, conditioning: models.output(None, frozen, x, t, conditioning)

    def score(latents):
      images = models.decode(frozen["decoder"], latents)
      reward = models.score(frozen["reward"], images, rows["prepared"])
      return reward.sum(), reward

    def on_the_way(x):
      (mean, clean), pull, _ = pull_back(output, (), sampler, k, x, rows["conditioning"])
      (_, reward), slope = jax.value_and_grad(score, has_aux=True)(clean)
      return reward, mean, pull((jnp.zeros_like(mean), slope))[1]
    at_output = lambda x: (score(x)[1], x, jnp.zeros_like(x))
    return jax.lax.cond(k < steps, on_the_way, at_output, x)

  def update(state, frozen, experience, _, key):
    batch, k = experience["batch"], jnp.minimum(state["updates"], steps)
    at_end, keys = k == steps, particles.keys_of(key, batch)
    each = lambda a: particles.apart(a, count)
    rewards, mean, gradient = look(frozen, batch, k, particles.together(state["x"]))
    rewards = particles.numbers(rewards, count)
    gain = beta * rewards
    if adaptive:
      lam = jnp.where(at_end, 1.0, furthest(state["log_w"], gain, state["lam"], cfg.ess))
      ahead = lam
    else:
      lam, ahead = (jnp.broadcast_to(lams[jnp.minimum(i, steps)], gain.shape[:1])
                    for i in (k, k + 1))
    dead = jnp.isneginf(gain)                       # weighs nothing, unless all of a group are
    psi = jnp.where(dead, 0.0, lam[:, None] * gain)
    found = particles.weigh(jnp.where(dead, -jnp.inf, state["log_w"] + psi), cfg.ess, at_end, keys)

    at = {"mean": each(mean), "gradient": each(gradient), "psi": psi, "reward": rewards}
    at = {name: particles.pick(value, found.index) for name, value in at.items()}
    per_row = lambda a: expand(a, at["mean"])
    inner = lambda a, b: (a * b).sum(tuple(range(2, a.ndim)))
    # In units of the noise: what a step moves by the gradient. Any will do that knows x_k only.
    std = jnp.where(at_end, 0.0, sampler.at("std", jnp.minimum(k, steps - 1)))
    push = std * beta * per_row(ahead) * at["gradient"]
    size = jnp.sqrt(inner(push, push))
    share = jnp.minimum(1.0, cfg.guide_cap / jnp.maximum(size, 1e-30)) if cfg.guide_cap else 1.0
    push = jnp.where(per_row(jnp.isfinite(size)), per_row(share * jnp.ones_like(size)) * push, 0.0)
    j = jnp.minimum(k + 1, steps)
    noise = particles.inherit(state["noise"], found.index, k)
    z = noise[:, :, j]
    noise = noise.at[:, :, j].set(z + push)
    chosen = particles.winner(cfg.output, found.log_w, at["reward"], at_end, keys)
    left = jnp.where(at_end, found.log_w,
                     found.log_w - at["psi"] - inner(push, z) - 0.5 * inner(push, push))
    state = particles.advance(state, state["updates"] > steps, chosen, at["reward"], {
        "x": at["mean"] + std * noise[:, :, j], "log_w": left, "noise": noise,
        "log_z": state["log_z"] + found.log_z, **({"lam": lam} if adaptive else {})})
    return state, {
        "train/reward": particles.mean_reward(found.share, rewards),
        "train/best_reward": state["best_reward"], "train/ess": found.ess,
        "train/log_z": state["log_z"], "train/lam": lam,
        "train/guide": jnp.sqrt(inner(push, push)).mean(1)}

  return Method(init=init, collect=collect, update=update, product=lambda state: state["best"],
                cost=lambda batch: cost(models, cfg, batch))


def cost(models: Models, cfg: Config, batch: int) -> dict[str, int]:
  """Evaluations per update of one sample and one guidance branch, but for the outputs' update,
  which asks for their rewards only.
  """
  rows = batch * cfg.particles
  return {"denoiser_forward": rows * models.branches, "denoiser_backward": rows * models.branches,
          "decodes": rows, "reward_queries": rows, "reward_gradients": rows}
