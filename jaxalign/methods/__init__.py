"""Alignment methods: what they are given, what they return, and what they need.

A method is a file of this folder, found by being there, whose name is the method's. It offers
`Config`, a dataclass of its keys, and `make(models, cfg, optim) -> Method`, a record of pure
functions. It sees `Models` (static functions and the sampler) and trees of arrays, never a network
class, a mesh or a file. What several methods are made of lies in `shared/`.

What a method needs is said by its `Config`, in attributes that are no keys (see `NEEDS` in
`jaxalign.config.registry`), so that it is known before any model is loaded.

Other packages add methods through the entry point group `jaxalign.methods`; each entry point names
what offers `Config` and `make`, a module or an object in one.
"""
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxalign import sampling
from jaxalign.config import registry
from jaxalign.errors import UserError
from jaxalign.sampling import Sampler, Schedule, Trajectory


@dataclasses.dataclass(frozen=True)
class FlowNet:
  """A small trainable network with a latent-shaped output that starts at zero."""
  init: Callable      # (key) -> params
  apply: Callable     # (params, x_t, t, cond) -> [B, ...] f32


@dataclasses.dataclass(frozen=True)
class Models:
  """Everything a method may call. Weights are arguments of these functions, never part of them.

  Attributes:
    denoise: `(variables, x_t [B,...], t [] or [B], cond) -> prediction [B,...]`.
    schedule: the path, and what predictions mean; sampler: the transitions; guidance: scale used in
      sampling and in losses; latent_shape: `(h, w, c)`.
    with_origin: `(cond, origin [B, 4]) -> cond` of images of another size than those sampled:
      height and width of the file, top and left of the crop, in pixels.
    combine: `(policy | None, base) -> variables` for `denoise`; None switches the policy off and
      gives the reference.
    init_policy: `(key, frozen) -> policy`, the trainable part: LoRA factors (`frozen["adapter"]`
      if there is one), or a copy of the base model's parameters.
    decode: `(decoder params, latents) -> images [B,H,W,3] in [0, 1]`.
    score: `(reward params, images, prepared) -> [B]` f32, or None where the reward is a black box.
    flow: an auxiliary latent-valued network, or None.
    frozen: `{"base", "decoder", "reward"}` trees of arrays, `"teacher"` and `"adapter"` where the
      config names them.
    reward_std: within-prompt standard deviation of the reward on the base model, in reward units.
    decode_unclamped: `decode` without the clamp to [0, 1], where there is one.
    base_is_generator: whether `frozen["base"]` came as a one-step generator, or with weights in
      place of its own that may be one, so that it is no teacher of such generators.
  """
  denoise: Callable
  schedule: Schedule
  sampler: Sampler
  guidance: float
  latent_shape: tuple[int, ...]
  combine: Callable
  init_policy: Callable
  decode: Callable
  score: Callable | None
  flow: FlowNet | None
  frozen: Mapping[str, Any]
  reward_std: float = 1.0
  decode_unclamped: Callable | None = None
  with_origin: Callable = lambda cond, origin: cond
  base_is_generator: bool = False

  @property
  def branches(self) -> int:
    """Evaluations of the network that a guided one takes."""
    return sampling.branches(self.guidance)

  def output(self, policy, frozen, x, t, conditioning):
    """The guided output `[B, ...]` f32 of the policy's network, of the reference's for None.

    `t` is a time, scalar or `[B]`: at step k of the sampler `sampler.at("timesteps", k)`.
    """
    run = sampling.guided_output(self.denoise, self.guidance)
    return run(self.combine(policy, frozen["base"]), x, t, conditioning)

  def rollout(self, policy, frozen, batch, key, **options) -> Trajectory:
    """Trajectories of the policy, of the reference for None, with the samples of a batch.

    `options` are those of `sampling.rollout`.
    """
    return sampling.rollout(
        sampling.guided_output(self.denoise, self.guidance), self.combine(policy, frozen["base"]),
        self.sampler, batch["conditioning"], key, batch["sample_ids"], self.latent_shape, **options)


@dataclasses.dataclass(frozen=True)
class Method:
  """A method as pure functions.

  Attributes:
    init: `(key, frozen, batch) -> state`. The state holds everything that changes: trainable
      parameters, their average, optimiser, statistics, replay (shaped like what `batch` gives).
    collect: `(state, frozen, batch, key) -> experience`. `batch` has `conditioning`, `prepared`
      (arrays of the reward, one row a sample), `prompt_ids` and `sample_ids [B]`. Where the
      method's config has a `group`, so many rows side by side share their prompt. The experience
      has at least `final [B, h, w, c]`, the latents that the loop decodes and scores. Where the
      config has `reads_pairs`, `batch` has `conditioning`, `sample_ids` and `pairs` instead:
      `latents [B, 2, h, w, c]`, the preferred image first, and `label [B]`, 1 or 0.5 for a tie; the
      experience has no `final`, and nothing is scored.
    update: `(state, frozen, experience, rewards [B], key) -> (state, metrics)`; metrics are scalars
      named `group/name`. Without a `final`, rewards are None.
    product: `(state) -> policy tree` to evaluate and export.

  Where the config has `at_inference`, every array of the state has the batch as its leading axis,
  scalars aside, and no row depends on another. What is to be scored are the experience's `images`,
  n of each row side by side (none if `update` scores), and `rewards` has as many entries; the
  metrics are `{name: [B]}`; `product` gives the noise `[B, 1+T, h, w, c]` of the resulting images.
  The key of `init` is that of the evaluation's noise.
    cost: `(batch size) -> ` counts per update: denoiser_forward, denoiser_backward, decodes,
      reward_queries, reward_gradients (evaluations of one sample and one guidance branch).
    tilt: `(state) -> beta`, in 1 / reward units, where the method's target is `p_ref exp(beta R)`.
  """
  init: Callable
  collect: Callable
  update: Callable
  product: Callable
  cost: Callable
  tilt: Callable | None = None


def make(name: str, models: Models, cfg, optim) -> Method:
  """The method `name` on these models.

  Args:
    cfg: its `Config`. optim: `config.schema.OptimConfig`.
  Raises:
    UserError: the models lack what the method needs, or cannot be trained by it.
  """
  if registry.need(cfg, "reward_gradients") and models.score is None:
    instead = registry.need(cfg, "without_gradients") or (
        f"methods that take any reward: {', '.join(registry.methods_for_any_reward())}")
    raise UserError(f"method.name={name!r} needs reward gradients, and reward.names holds a "
                    f"black-box reward; {instead}")
  if registry.need(cfg, "noise_at_every_step") and not np.all(models.sampler.std > 0):
    raise UserError(f"method.name={name!r} needs noise at every step: set sample.eta > 0, "
                    "sample.final='noisy' and a sample.kind that has noise")
  return registry.load_method(name).make(models, cfg, optim)
