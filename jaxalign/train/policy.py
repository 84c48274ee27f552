"""The seam to methods: what is trained, what it starts from, and `Models` around a pipeline."""
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from jaxalign.config.schema import Config
from jaxalign.convert import load_adapters
from jaxalign.devices import processes, sharding
from jaxalign.errors import UserError
from jaxalign.methods import FlowNet, Models
from jaxalign.models import lora
from jaxalign.models.pipeline import Pipeline
from jaxalign.rewards import HostReward, Reward
from jaxalign.sampling import Schedule, make_sampler
from jaxalign.train.opening import open_pipeline


def make_models(cfg: Config, pipeline: Pipeline, reward: Reward | HostReward,
                mesh: Mesh) -> Models:
  """The seam between this pipeline and the methods."""
  schedule = Schedule.from_config(pipeline.scheduler_config)
  sampler = make_sampler(schedule, **cfg.sample.transitions)
  if cfg.model.adapter == "lora":
    targets = pipeline.adapter_targets(cfg.model.lora_targets)

    def init_policy(key, frozen):
      if "adapter" in frozen:
        return jax.tree.map(jnp.copy, frozen["adapter"])
      return lora.init(key, frozen["base"]["params"], cfg.model.lora_rank, targets)

    def combine(policy, base):
      return base if policy is None else {**base, "lora": policy}
  else:
    def init_policy(key, frozen):
      return jax.tree.map(jnp.copy, frozen["base"]["params"])

    def combine(policy, base):
      return base if policy is None else {**base, "params": policy}
  frozen = {"base": pipeline.variables, "decoder": pipeline.params["vae"],
            "reward": reward.params if isinstance(reward, Reward) else {}}
  if cfg.model.teacher:
    frozen["teacher"] = _teacher(cfg.model.teacher, pipeline)
  differentiable = isinstance(reward, Reward) and reward.differentiable
  decode = sharding.on_mesh(pipeline.decode_images, mesh)
  return Models(
      denoise=sharding.on_mesh(pipeline.denoise, mesh), schedule=schedule, sampler=sampler,
      guidance=cfg.sample.guidance, latent_shape=pipeline.latent_shape, combine=combine,
      init_policy=init_policy, with_origin=pipeline.with_origin,
      decode=decode, decode_unclamped=functools.partial(decode, clamp=False),
      score=reward.score if differentiable else None,
      flow=FlowNet(*(sharding.on_mesh(f, mesh) for f in pipeline.small())), frozen=frozen)


def _teacher(path: str, pipeline: Pipeline):
  """What the denoiser of another model of the same architecture and text encoders reads.

  Shapes, where `pipeline` has those.
  """
  outline = pipeline.is_outline
  other = dataclasses.replace(open_pipeline(path, shapes_only=outline), size=pipeline.size)
  shapes = lambda tree: jax.tree.map(lambda a: a.shape, tree)
  if type(other) is not type(pipeline) or shapes(other.weights) != shapes(pipeline.weights):
    raise UserError(f"model.teacher={path}: its {other.denoiser_name} has another architecture "
                    "than model.path")
  same = shapes(other.text_params) == shapes(pipeline.text_params) and (
      outline or all(jax.tree.leaves(
          jax.tree.map(np.array_equal, other.text_params, pipeline.text_params))))
  if not same:
    raise UserError(f"model.teacher={path}: its text encoders differ from those of model.path")
  return other.variables


def movement(cfg: Config, start, base) -> Callable[[Any], float]:
  """`policy -> |W - W_start| / |W_base|`: Frobenius norms over all weights that it changes.

  Computed on the host, in f64; 0 at the start. All processes must call it.

  Args:
    start: the policy at the start; not read where all weights are trained, which start as `base`.
    base: host parameters of the denoiser.
  """
  flat = traverse_util.flatten_dict(base, sep="/")
  square = lambda a: float(np.square(np.asarray(a, np.float64)).sum())
  if cfg.trains_all:
    size = functools.cache(lambda: sum(map(square, flat.values())))     # seconds, for large models

    def moved(policy) -> float:
      now = traverse_util.flatten_dict(policy, sep="/")
      # One after the other: the policy may be larger than what is free here.
      gaps = (processes.fetch(now[name]) - np.asarray(a, np.float64) for name, a in flat.items())
      return float(np.sqrt(sum(map(square, gaps)) / size()))
    return moved
  start = processes.fetch(start)
  names = lora.layers(traverse_util.flatten_dict(start, sep="/"))
  size = functools.cache(lambda: np.sqrt(sum(square(flat[f"{name}/kernel"]) for name in names)))
  return lambda policy: float(lora.distance(processes.fetch(policy), start) / size())


def adapters_of(cfg: Config, pipeline: Pipeline) -> dict:
  """What `model.lora` adapts: network -> tree, of the denoiser and of text encoders."""
  parts = {name: pipeline.params[name]
           for name in (pipeline.denoiser_name, *pipeline.text_encoders)}
  try:
    return load_adapters(cfg.model.lora, parts, pipeline.denoiser_name)
  except UserError as error:
    raise UserError(f"model.lora={cfg.model.lora}: {error}") from error


def starting_adapter(cfg: Config, pipeline: Pipeline):
  """`model.lora`, that the policy starts from; or None, and the pipeline with it merged in.

  What it adapts of the text encoders, which are not trained, is merged into them in any case.
  """
  weights, adapters = pipeline.weights, adapters_of(cfg, pipeline)
  adapter = adapters.pop(pipeline.denoiser_name, {})
  params = {name: merged(pipeline.params[name], tree) for name, tree in adapters.items()}
  pipeline = dataclasses.replace(pipeline, params={**pipeline.params, **params})
  if cfg.merges_lora:
    return pipeline.with_weights(merged(weights, adapter)), None
  targets = pipeline.adapter_targets(cfg.model.lora_targets)
  expected = jax.eval_shape(
      lambda: lora.init(jax.random.key(0), weights, cfg.model.lora_rank, targets))
  want, have = (traverse_util.flatten_dict(tree, sep="/") for tree in (expected, adapter))
  if want.keys() != have.keys():
    path = min(want.keys() ^ have.keys())
    raise UserError(f"model.lora={cfg.model.lora}: {'lacks' if path in want else 'also adapts'} "
                    f"{path.rpartition('/')[0]}, unlike model.lora_targets="
                    f"{','.join(cfg.model.lora_targets)}")
  for path, leaf in want.items():
    if leaf.shape != have[path].shape:
      rank = have[path].shape[-1 if path.endswith("/a") else 0]
      raise UserError(f"model.lora={cfg.model.lora}: has rank {rank} at "
                      f"{path.rpartition('/')[0]}, and model.lora_rank={cfg.model.lora_rank}")
  return pipeline, adapter


def merged(weights, adapter):
  """`lora.merge` on the host, in the dtypes that the weights have."""
  return jax.tree.map(lambda x, like: np.asarray(x, like.dtype),
                      jax.device_get(lora.merge(weights, adapter)), weights)


def policy_weights(cfg: Config, policy, base):
  """The denoiser's parameters with the policy in them, for export (adapters merged)."""
  return lora.merge(base, policy) if cfg.model.adapter == "lora" else policy
