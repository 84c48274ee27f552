"""Alignment methods: what they are given, what they return, and their names.

A method is a record of pure functions in one file of this folder. It sees `Models` (static
functions and the sampler) and trees of arrays, never a network class, a mesh or a file.

Other packages add methods that train weights through the entry point group `jaxalign.methods`; each
entry point names what offers `Config` and `make`, a module or an object in one.
"""
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxalign.sampling import Sampler, Schedule


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
    schedule: converts predictions; sampler: the transitions; guidance: scale used in sampling and
      in losses; latent_shape: `(h, w, c)`.
    combine: `(policy | None, base) -> variables` for `denoise`; None switches the policy off and
      gives the reference.
    init_policy: `(key, frozen) -> policy`, the trainable part: LoRA factors (`frozen["adapter"]`
      if there is one), or a copy of `frozen["base"]`.
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
  base_is_generator: bool = False


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

  At inference (`AT_INFERENCE`) every array of the state has the batch as its leading axis, scalars
  aside, and no row depends on another. What is to be scored are the experience's `images`, n of
  each row side by side (none if `update` scores), and `rewards` has as many entries; the metrics
  are `{name: [B]}`; `product` gives the noise `[B, 1+T, h, w, c]` of the resulting images. The key
  of `init` is that of the evaluation's noise.
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
