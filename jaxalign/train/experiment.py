"""From a config to what a run needs: mesh, pipeline, reward, judge, `Models`, prompt tables."""
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from jaxalign.config.schema import Config, SampleConfig
from jaxalign.convert import load_adapter, load_pipeline
from jaxalign.devices import processes, sharding
from jaxalign.errors import UserError
from jaxalign.methods import FlowNet, Models
from jaxalign.models import lora
from jaxalign.models.architectures import ARCHITECTURES, architecture
from jaxalign.models.pipeline import Pipeline
from jaxalign.models.tokenizer import Tokenizer
from jaxalign.models.unet import UNet2DConditionModel
from jaxalign.models.vae import decode_images
from jaxalign.rewards import HostReward, Reward, make_reward
from jaxalign.sampling import ONE_STEP_KEY, Conditioning, Schedule, make_sampler

ASSETS = pathlib.Path(__file__).resolve().parent.parent / "assets"


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
  """What a run works with. `frozen` and `judge_params` lie on the mesh.

  `put(tree, shardings)` places host arrays; in an outline, which has shapes in place of arrays, it
  says where they would lie.
  """
  config: Config
  mesh: Mesh
  pipeline: Pipeline
  models: Models
  reward: Reward | HostReward
  judge: Reward
  frozen: Any
  judge_params: Any
  put: Callable
  encode: Callable             # token ids, as `Pipeline.tokenize` returns them -> cond tree

  def put_batch(self, tree):
    """A host tree with leading batch axis, split over the mesh."""
    return self.put(tree, sharding.batch_sharding(self.mesh))

  def embed(self, prompts: list[str]):
    """Embeddings `[P, ...]` of P prompts as host arrays, what a denoiser takes as `cond`."""
    cond = [processes.fetch(self.encode(self.pipeline.tokenize(prompts[i:i + 64])))
            for i in range(0, len(prompts), 64)]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *cond)

  def prompt_table(self, prompts: list[str]) -> dict:
    """Everything about P prompts that the device needs, as host arrays; `gather` takes rows of it.

    `{"cond", "uncond", "prepared", "judge"}`: embeddings `[P, ...]` (`uncond` has one row) and the
    prepared arrays of reward and judge.
    """
    return {
        "cond": self.embed(prompts), "uncond": self.embed([""]),
        "prepared": self.reward.prepare(prompts) if isinstance(self.reward, Reward) else {},
        "judge": self.judge.prepare(prompts),
    }


def gather(table, prompt_ids, sample_ids) -> dict:
  """The batch of a method: rows `prompt_ids [B]` of a prompt table."""
  rows = lambda tree: jax.tree.map(lambda a: a[prompt_ids], tree)
  uncond = jax.tree.map(lambda a: a[prompt_ids * 0], table["uncond"])
  return {"conditioning": Conditioning(rows(table["cond"]), uncond),
          "prepared": rows(table["prepared"]), "judge": rows(table["judge"]),
          "prompt_ids": prompt_ids, "sample_ids": sample_ids}


def build(cfg: Config, devices=None, pipeline: Pipeline | None = None) -> Experiment:
  """Loads and places everything that `cfg` names.

  Args:
    pipeline: in place of the one that `cfg` names. Where its `params` are shapes, nothing is placed
      or computed, and `devices` may be those of a machine that is not there.
  Raises:
    UserError: a key or file of the config is at fault.
  """
  mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor, devices)
  cfg.check_devices(sharding.batch_shards(mesh))
  reward = make_reward(cfg.reward.names, cfg.reward.weights)
  judge = make_reward((cfg.eval.judge,), (1.0,)).parts[0][2]
  if getattr(judge, "features", None) is None:
    raise UserError(f"eval.judge={cfg.eval.judge!r} gives no features, which diversity needs; "
                    "emoji_judge does, and clip_score:DIR and its kin (docs/rewards.md)")
  pipeline = pipeline or open_pipeline(cfg.model.path, cfg.model.dtype, cfg.model.remat,
                                       cfg.model.unet)
  pipeline = pipeline.resized(cfg.sample.height, cfg.sample.width)
  outline = _is_outline(pipeline)
  put = placed_shapes if outline else processes.put
  encode = pipeline.encode_prompts
  encode = functools.partial(jax.eval_shape, encode) if outline else jax.jit(encode)
  # Before the config has its say: what the checkpoint itself is.
  one_step = Schedule.from_config(pipeline.scheduler_config).one_step is not None
  if cfg.sample.timestep:                       # kept with the weights that are trained for it
    scheduler = {**pipeline.scheduler_config, ONE_STEP_KEY: cfg.sample.timestep}
    pipeline = dataclasses.replace(
        pipeline, configs={**pipeline.configs, "scheduler": scheduler})
  adapter = None
  if cfg.model.lora and not outline:        # of the same shapes as a new one
    pipeline, adapter = _starting_adapter(cfg, pipeline)
  models = dataclasses.replace(make_models(cfg, pipeline, reward, mesh),
                               base_is_generator=one_step or bool(cfg.model.unet))
  if adapter is not None:
    models.frozen["adapter"] = adapter
  # Whatever is trained starts as a copy of the base model or of the teacher, in f32.
  copied = ("base", "teacher") if cfg.trains_all else ()
  frozen = {name: tree if name in copied or name not in ("base", "teacher", "decoder")
            else stored(tree, cfg.model.dtype) for name, tree in models.frozen.items()}
  models = dataclasses.replace(models, frozen=frozen)
  frozen = put(frozen, sharding.param_shardings(frozen, mesh))
  text = put(stored(pipeline.text_params, cfg.model.dtype), sharding.replicated(mesh))
  return Experiment(
      config=cfg, mesh=mesh, pipeline=pipeline, models=models, reward=reward, judge=judge,
      frozen=frozen, judge_params=put(judge.params, sharding.replicated(mesh)), put=put,
      encode=functools.partial(encode, text))


def stored(params, dtype: str):
  """Parameters of a frozen network as they lie on the device: kernels and embeddings in `dtype`.

  That is what layers cast them to whenever they are used, so results are the same to the bit, in
  half of the memory for bfloat16. Biases and norms, which are used in f32, stay.
  """
  def store(a):
    if a.ndim < 2 or a.dtype == jnp.dtype(dtype):          # numpy would copy it all the same
      return a
    if isinstance(a, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(a.shape, jnp.dtype(dtype))
    return a.astype(dtype)
  return jax.tree.map(store, params)


def placed_shapes(tree, shardings):
  """`jax.ShapeDtypeStruct`s that say where the arrays (or shapes) of a tree would lie."""
  place = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
  if isinstance(shardings, jax.sharding.Sharding):
    return jax.tree.map(lambda a: place(a, shardings), tree)
  return jax.tree.map(place, tree, shardings)


def open_pipeline(path: str, dtype: str = "float32", remat: str = "none", unet: str = "",
                  shapes_only: bool = False) -> Pipeline:
  """`jaxalign:emoji`, `jaxalign:fixture`, a diffusers directory or a hub id -> Pipeline.

  `jaxalign:sd15` and `jaxalign:sdxl` are architectures without weights, for `shapes_only`.
  `unet` names weights that take the place of the UNet's; for `shapes_only` see `load_pipeline`.
  """
  load = functools.partial(load_pipeline, unet=unet, dtype=dtype, remat=remat,
                           shapes_only=shapes_only)
  if not path:
    raise UserError("model.path is empty: name a diffusers directory or a hub id")
  if path == "jaxalign:fixture":
    from jaxalign.testing.fixture import make_pipeline_dir
    with tempfile.TemporaryDirectory() as folder:
      make_pipeline_dir(f"{folder}/fixture", image_size=32)
      return load(f"{folder}/fixture")
  if path.startswith("jaxalign:"):
    name = path.removeprefix("jaxalign:")
    if name in ARCHITECTURES:
      if not shapes_only:
        raise UserError(f"model.path={path}: an architecture without weights, for --plan only")
      return architecture(name, Tokenizer.load(ASSETS / "emoji" / "tokenizer"), shapes_only=True,
                          dtype=dtype, remat=remat)
    folder = ASSETS / name
    if not folder.is_dir():
      raise UserError(f"model.path={path}: no model of this name is shipped")
    return load(folder)
  return load(path)


def own_sampler(pipeline: Pipeline) -> SampleConfig:
  """How a checkpoint is sampled where no run says so: one step for a one-step generator."""
  if Schedule.from_config(pipeline.scheduler_config).one_step is None:
    return SampleConfig()
  return SampleConfig(kind="one_step", steps=1, guidance=1.0)


def make_models(cfg: Config, pipeline: Pipeline, reward: Reward | HostReward,
                mesh: Mesh) -> Models:
  """The seam between this pipeline and the methods."""
  schedule = Schedule.from_config(pipeline.scheduler_config)
  sampler = make_sampler(schedule, cfg.sample.steps, kind=cfg.sample.kind, eta=cfg.sample.eta,
                         spacing=cfg.sample.spacing, final=cfg.sample.final,
                         variance=cfg.sample.variance, timestep=cfg.sample.timestep)
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


def _is_outline(pipeline: Pipeline) -> bool:
  """Whether its parameters are shapes."""
  return isinstance(jax.tree.leaves(pipeline.params["unet"])[0], jax.ShapeDtypeStruct)


def _teacher(path: str, pipeline: Pipeline):
  """UNet parameters of another model with the same architecture and text encoder.

  Shapes, where `pipeline` has those.
  """
  outline = _is_outline(pipeline)
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


def _starting_adapter(cfg: Config, pipeline: Pipeline):
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


def policy_weights(cfg: Config, policy, base):
  """UNet parameters with the policy in them, for export (adapters merged)."""
  return lora.merge(base, policy) if cfg.model.adapter == "lora" else policy


def read_prompts(key: str, path: str) -> list[str]:
  """Prompts of a text file, one a line, or of `jaxalign:NAME`; errors name the config key `key`."""
  file = pathlib.Path(path)
  if path.startswith("jaxalign:"):
    file = ASSETS / "prompts" / f"{path.removeprefix('jaxalign:')}.txt"
  try:
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{key}={path}: {error}") from error
  prompts = [line for line in lines if line]
  if not prompts:
    raise UserError(f"{key}={path}: the file has no prompts")
  return prompts
