"""The seam to methods: what is trained, what it starts from, and `Models` around a pipeline."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from jaxalign.config.schema import Config
from jaxalign.convert import load_adapter
from jaxalign.devices import sharding
from jaxalign.errors import UserError
from jaxalign.methods import FlowNet, Models
from jaxalign.models import lora
from jaxalign.models.pipeline import Pipeline
from jaxalign.models.unet import UNet2DConditionModel
from jaxalign.models.vae import decode_images
from jaxalign.rewards import HostReward, Reward
from jaxalign.sampling import Schedule, make_sampler
from jaxalign.train.opening import open_pipeline


def make_models(cfg: Config, pipeline: Pipeline, reward: Reward | HostReward,
                mesh: Mesh) -> Models:
  """The seam between this pipeline and the methods."""
  schedule = Schedule.from_config(pipeline.scheduler_config)
  sampler = make_sampler(schedule, **cfg.sample.transitions)
  if cfg.model.adapter == "lora":
    def init_policy(key, frozen):
      if "adapter" in frozen:
        return jax.tree.map(jnp.copy, frozen["adapter"])
      return lora.init(key, frozen["base"], cfg.model.lora_rank, cfg.model.lora_targets)

    def combine(policy, base):
      return {"params": base} if policy is None else {"params": base, "lora": policy}
  else:
    def init_policy(key, frozen):
      return jax.tree.map(jnp.copy, frozen["base"])

    def combine(policy, base):
      return {"params": base if policy is None else policy}
  frozen = {"base": pipeline.params["unet"], "decoder": pipeline.params["vae"],
            "reward": reward.params if isinstance(reward, Reward) else {}}
  if cfg.model.teacher:
    frozen["teacher"] = _teacher(cfg.model.teacher, pipeline)
  differentiable = isinstance(reward, Reward) and reward.differentiable
  decode = sharding.on_mesh(functools.partial(decode_images, pipeline.vae), mesh)
  return Models(
      denoise=sharding.on_mesh(pipeline.denoise, mesh), schedule=schedule, sampler=sampler,
      guidance=cfg.sample.guidance, latent_shape=pipeline.latent_shape, combine=combine,
      init_policy=init_policy,
      decode=decode, decode_unclamped=functools.partial(decode, clamp=False),
      score=reward.score if differentiable else None, flow=make_flow_net(pipeline, mesh),
      frozen=frozen)


def make_flow_net(pipeline: Pipeline, mesh: Mesh) -> FlowNet:
  """A small UNet on the same inputs, with zero-initialised output."""
  size = min(pipeline.latent_shape[:2])
  config = dict(pipeline.configs["unet"])
  # The published sizes for 64x64 latents; two levels are all that 8x8 ones have room for.
  widths = (64, 128, 256, 256) if size >= 32 else (32, 64)
  plain = len(widths) - 1
  config.update(block_out_channels=widths, layers_per_block=1,
                down_block_types=["CrossAttnDownBlock2D"] * plain + ["DownBlock2D"],
                up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * plain,
                norm_num_groups=min(32, widths[0]), attention_head_dim=8, num_attention_heads=None,
                transformer_layers_per_block=1)
  unet = UNet2DConditionModel.from_config(config)

  def init(key):
    params = unet.init(key, *unet.example_inputs())["params"]
    return {**params, "conv_out": jax.tree.map(jnp.zeros_like, params["conv_out"])}

  def apply(params, x, t, cond):
    return unet.apply({"params": params}, x, t, cond["text"], cond.get("added"))
  return FlowNet(sharding.on_mesh(init, mesh), sharding.on_mesh(apply, mesh))


def _teacher(path: str, pipeline: Pipeline):
  """UNet parameters of another model with the same architecture and text encoder.

  Shapes, where `pipeline` has those.
  """
  outline = is_outline(pipeline)
  other = open_pipeline(path, shapes_only=outline)
  shapes = lambda tree: jax.tree.map(lambda a: a.shape, tree)
  if shapes(other.params["unet"]) != shapes(pipeline.params["unet"]):
    raise UserError(f"model.teacher={path}: its UNet has another architecture than model.path")
  same = shapes(other.text_params) == shapes(pipeline.text_params) and (
      outline or all(jax.tree.leaves(
          jax.tree.map(np.array_equal, other.text_params, pipeline.text_params))))
  if not same:
    raise UserError(f"model.teacher={path}: its text encoder differs from that of model.path")
  return other.params["unet"]


def starting_adapter(cfg: Config, pipeline: Pipeline):
  """`model.lora`, that the policy starts from; or None, and the pipeline with it merged in."""
  unet = pipeline.params["unet"]
  try:
    adapter = load_adapter(cfg.model.lora, unet)
  except UserError as error:
    raise UserError(f"model.lora={cfg.model.lora}: {error}") from error
  if cfg.merges_lora:
    merged = jax.device_get(lora.merge(unet, adapter))
    return dataclasses.replace(pipeline, params={**pipeline.params, "unet": merged}), None
  expected = jax.eval_shape(lambda: lora.init(
      jax.random.key(0), unet, cfg.model.lora_rank, cfg.model.lora_targets))
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


def is_outline(pipeline: Pipeline) -> bool:
  """Whether its parameters are shapes."""
  return isinstance(jax.tree.leaves(pipeline.params["unet"])[0], jax.ShapeDtypeStruct)


def policy_weights(cfg: Config, policy, base):
  """UNet parameters with the policy in them, for export (adapters merged)."""
  return lora.merge(base, policy) if cfg.model.adapter == "lora" else policy
