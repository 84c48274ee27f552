"""From a config to what a run needs: mesh, pipeline, reward, judge, `Models`, prompt tables."""
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.config.schema import Config
from jaxalign.data.prompts import some_prompt
from jaxalign.devices import memory, processes, sharding
from jaxalign.errors import UserError
from jaxalign.methods import Models
from jaxalign.models.pipeline import Pipeline
from jaxalign.rewards import HostReward, Reward, make_reward, open_reward
from jaxalign.rewards.trial import Trial
from jaxalign.sampling import ONE_STEP_KEY, Conditioning, Schedule
from jaxalign.train.opening import open_pipeline
from jaxalign.train.policy import make_models, starting_adapter


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
  """What a run works with. `frozen` and `judge_params` lie on the mesh.

  `judge` scores what is evaluated; the features of `observer`, often the same, tell pictures apart.
  `judge_params` are those of both, `{"judge", "observer"}`; nothing for a judge on the host.
  `put(tree, shardings)` places host arrays; in an outline, which has shapes in place of arrays, it
  says where they would lie.
  """
  config: Config
  mesh: Mesh
  pipeline: Pipeline
  models: Models
  reward: Reward | HostReward
  judge: Reward | HostReward
  observer: Reward
  frozen: Any
  judge_params: Any
  put: Callable
  encode: Callable             # jitted `Pipeline.encode_prompts`

  def put_batch(self, tree):
    """A host tree with leading batch axis, split over the mesh."""
    return self.put(tree, sharding.batch_sharding(self.mesh))

  def embed(self, prompts: list[str]):
    """Embeddings `[P, ...]` of P prompts as host arrays, what a denoiser takes as `cond`.

    The text encoders lie on the devices only here: nothing else needs them, and some are large.
    """
    text = stored(self.pipeline.text_params, self.config.model.dtype)
    text = processes.put(text, sharding.param_shardings(text, self.mesh))
    cond = [processes.fetch(self.encode(text, self.pipeline.tokenize(prompts[i:i + 64])))
            for i in range(0, len(prompts), 64)]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *cond)

  def prompt_table(self, prompts: list[str]) -> dict:
    """Everything about P prompts that the device needs, as host arrays; `gather` takes rows of it.

    `{"cond", "uncond", "prepared", "judge"}`: embeddings `[P, ...]` (`uncond` has one row) and the
    prepared arrays of reward and judge.
    """
    return {"cond": self.embed(prompts), "uncond": self.embed([""]), **self.prepared(prompts)}

  def prepared(self, prompts: list[str]) -> dict:
    """`{"prepared", "judge"}`: what reward and judge make of prompts; nothing on the host."""
    of = lambda scorer: scorer.prepare(prompts) if isinstance(scorer, Reward) else {}
    return {"prepared": of(self.reward), "judge": of(self.judge)}


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
  judge = make_reward((cfg.eval.judge,), (1.0,))
  observer = make_reward((cfg.eval.features,), (1.0,)) if cfg.eval.features else judge
  if getattr(observer.parts[0][2], "features", None) is None:
    key = "features" if cfg.eval.features else "judge"
    raise UserError(f"eval.{key}={getattr(cfg.eval, key)!r} gives no features, which diversity "
                    "needs: name a scorer that does by eval.features; scene_judge is one, and "
                    "clip_score:DIR and its kin are (docs/rewards.md)")
  pipeline = pipeline or open_pipeline(cfg.model.path, cfg.model.dtype, cfg.model.remat,
                                       cfg.model.unet)
  pipeline = pipeline.resized(cfg.sample.height, cfg.sample.width)
  outline = pipeline.is_outline
  if not outline:                      # which may be that of a larger machine
    for key, size in (("sample.batch", cfg.sample.batch), ("eval.batch", cfg.eval.batch)):
      memory.check_fits(f"{key}={size}", size, (*pipeline.image_size, 3))
  trial = lambda gradient: Trial(
      pipeline.image_size, some_prompt(cfg.data.prompts, cfg.data.eval_prompts),
      cfg.method_name, gradient, outline)
  reward = open_reward(reward, lambda: trial(gradient=True), mesh)
  opened = lambda scorer: open_reward(
      scorer, lambda: trial(gradient=False), mesh).parts[0][2]
  judge, observer = (opened(judge),) * 2 if observer is judge else map(opened, (judge, observer))
  put = placed_shapes if outline else processes.put
  # Before the config has its say: what the checkpoint itself is.
  one_step = Schedule.from_config(pipeline.scheduler_config).one_step is not None
  if cfg.sample.timestep:                       # kept with the weights that are trained for it
    scheduler = {**pipeline.scheduler_config, ONE_STEP_KEY: cfg.sample.timestep}
    pipeline = dataclasses.replace(
        pipeline, configs={**pipeline.configs, "scheduler": scheduler})
  adapter = None
  if cfg.model.lora and not outline:        # of the same shapes as a new one
    pipeline, adapter = starting_adapter(cfg, pipeline)
  models = dataclasses.replace(make_models(cfg, pipeline, reward, mesh),
                               base_is_generator=one_step or bool(cfg.model.unet))
  if adapter is not None:
    models.frozen["adapter"] = adapter
  store = functools.partial(stored, dtype=cfg.model.dtype)
  frozen = {**models.frozen, "decoder": store(models.frozen["decoder"])}
  if not cfg.trains_all:        # else what is trained starts as a copy of one of these, in f32
    frozen |= {name: {**frozen[name], "params": store(frozen[name]["params"])}
               for name in ("base", "teacher") if name in frozen}
  models = dataclasses.replace(models, frozen=frozen)
  frozen = put(frozen, sharding.param_shardings(frozen, mesh))
  everywhere = sharding.replicated(mesh)
  judge_params = {"observer": put(observer.params, everywhere)}
  judge_params["judge"] = (judge_params["observer"] if judge is observer else
                           put(getattr(judge, "params", {}), everywhere))
  return Experiment(
      config=cfg, mesh=mesh, pipeline=pipeline, models=models, reward=reward, judge=judge,
      observer=observer, frozen=frozen, judge_params=judge_params, put=put,
      encode=jax.jit(pipeline.encode_prompts))


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
