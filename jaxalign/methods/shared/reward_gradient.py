"""What ReFL, DRaFT and AlignProp share: fine-tuning by the reward's gradient through the sampler.

All three sample with the policy and follow `grad_theta R(decode(x))` of what came out. They differ
in where the gradient stops, because through all steps it is dear and noisy. With
`x_{k+1} = a_k x_k - b_k o_theta(x_k) + std_k z_k`, o the network's output, k = 0..N-1:

  sample trajectories x_0..x_N with the policy, without gradients                  (collect)
  x = the method's own `output` of the last steps, with a gradient
  theta <- AdamW on E[ shape(R(decode(x))) ]                                       (update)

The trajectories are those that were sampled: only Jacobians are computed in `update`, at the stored
latents (`sampling.replay`), so memory does not grow with the steps beyond the latents.

None of these has a target distribution: a linear reward rises without bound, a curved one ends in
its maximum, and diversity goes. Stop early, and watch the judge.
"""
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxalign.config.fields import NonNegative, check
from jaxalign.config.schema import OptimConfig
from jaxalign.errors import UserError
from jaxalign.methods import Method, Models
from jaxalign.methods.shared.optimizer import Learner, accumulated_gradients
from jaxalign.sampling import replay


@dataclasses.dataclass(frozen=True)
class Config:
  """Keys of the `method` group that all three share.

  Attributes:
    objective: what is minimised for a reward r: "linear" (`-r`), "hinge" (`max(target - r, 0)`,
      which leaves samples alone that reach the target) or "absolute" (`|target - r|`).
    target: of "hinge" and "absolute", in units of the reward.
    weight: > 0, factor of the objective. AdamW divides it out again, but for its `eps` and
      `optim.clip_norm`.
  """
  objective: Literal["linear", "hinge", "absolute"] = "linear"
  target: float = 0.0
  weight: NonNegative = 1.0

  reward_gradients = True

  def __post_init__(self):
    check("method", self)
    if self.weight == 0:
      raise UserError("method.weight=0.0 leaves nothing to train on; it is above 0")

  @property
  def copies(self) -> int:
    """Images scored per trajectory."""
    return 1

  def kept(self, steps: int) -> int:
    """Last steps, of `steps` in all, that a gradient may visit; UserError if there are not as many.
    """
    raise NotImplementedError

  def visited(self, steps: int) -> float:
    """Expected number of steps that the gradient of one trajectory does visit."""
    raise NotImplementedError

  def output(self, models: Models, policy, frozen, rows, key):
    """What is scored, latents `[R, ...]`, with a gradient to the policy; `rows` as in `loss`."""
    raise NotImplementedError


def at_most(key: str, value: int, steps: int) -> int:
  """`value` of the key `method.{key}`, which no sampler of `steps` steps has more of."""
  if value > steps:
    raise UserError(f"method.{key}={value} exceeds sample.steps={steps}")
  return value


def replayed(models: Models, policy, frozen, rows, active):
  """Outputs of the sampler as a function of the policy, through the steps that are `active [S]`."""
  latents = jnp.moveaxis(rows["latents"], 1, 0)
  fixed = {"base": frozen["base"]}, rows["conditioning"]
  output = lambda policy, x, t, fixed: models.output(policy, fixed[0], x, t, fixed[1])
  return replay(output, models.sampler, policy, fixed, latents, active)


def perturbed_gradient(models: Models, cfg, frozen, x_0, prepared, key):
  """Gradient of the reward of clean latents `x_0 [R, ...]`, mean over noisy copies of them.

  `cfg.perturbations` copies, with noise of standard deviation `cfg.perturb_std` in latent units.
  """
  def reward(x_0):
    def one(key):
      noise = cfg.perturb_std * jax.random.normal(key, x_0.shape) if cfg.perturb_std else 0.0
      images = models.decode(frozen["decoder"], x_0 + noise)
      return models.score(frozen["reward"], images, prepared).sum()
    return sum(one(k) for k in jax.random.split(key, cfg.perturbations)) / cfg.perturbations
  return jax.grad(reward)(x_0)


def penalty(cfg: Config, reward):
  """What is minimised, of the shape of `reward`."""
  short = cfg.target - reward
  return cfg.weight * {"linear": -reward, "hinge": jnp.maximum(short, 0.0),
                       "absolute": jnp.abs(short)}[cfg.objective]


def loss(models: Models, cfg: Config, policy, frozen, rows, key):
  """Mean penalty of the reward, with gradients to the policy where the method lets them through.

  Args:
    policy: the one that sampled the rows.
    rows: `latents [R, S+1, ...]`, the last `S = cfg.kept(N)` transitions of each trajectory, and
      `conditioning`, `prepared` of its prompt.
    key: draws exit steps, noise or truncation.
  Returns:
    Scalar loss; `{"train/reward_scored": mean reward of what was scored}`.
  """
  if cfg.copies > 1:
    rows = jax.tree.map(lambda a: jnp.repeat(a, cfg.copies, axis=0), rows)
  x = cfg.output(models, policy, frozen, rows, key)
  images = models.decode(frozen["decoder"], x)
  reward = models.score(frozen["reward"], images, rows["prepared"])
  return penalty(cfg, reward).mean(), {"train/reward_scored": reward.mean()}


def make(models: Models, cfg: Config, optim: OptimConfig) -> Method:
  """The method whose config `cfg` is.

  Raises:
    UserError: more steps with gradients than the sampler has.
  """
  sampler = models.sampler
  kept = cfg.kept(sampler.steps)
  learner = Learner(optim)

  def init(key, frozen, batch):
    return learner.init(models.init_policy(key, frozen))

  def collect(state, frozen, batch, key):
    trajectory = models.rollout(state["policy"], frozen, batch, key)
    # The batch leads every array, so that an experience is sharded as one.
    latents = jnp.moveaxis(trajectory.latents[sampler.steps - kept:], 0, 1)
    return {"final": trajectory.final, "latents": latents, "batch": batch}

  def update(state, frozen, experience, rewards, key):
    batch = experience["batch"]
    rows = {"latents": experience["latents"], "conditioning": batch["conditioning"],
            "prepared": batch["prepared"]}

    def grads_of(policy, rows, key):
      (total, metrics), gradient = jax.value_and_grad(
          lambda policy: loss(models, cfg, policy, frozen, rows, key), has_aux=True)(policy)
      return gradient, {"loss/total": total, **metrics}

    gradient, metrics = accumulated_gradients(
        grads_of, state["policy"], rows, key, optim.accumulate)
    metrics["train/grad_norm"] = optax.tree.norm(gradient)
    return learner.step(state, gradient), metrics

  return Method(init=init, collect=collect, update=update, product=learner.product,
                cost=lambda batch: cost(models, cfg, batch))


def cost(models: Models, cfg: Config, batch: int) -> dict[str, int]:
  """Evaluations per update of one sample and one guidance branch; expected ones for AlignProp."""
  branches = models.branches
  steps, images = models.sampler.steps, batch * cfg.copies
  visited = round(batch * cfg.visited(steps))
  return {"denoiser_forward": (batch * steps + visited) * branches,
          "denoiser_backward": visited * branches, "decodes": images, "reward_queries": images,
          "reward_gradients": images}
