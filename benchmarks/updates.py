"""One step of the methods: jaxalign beside the same in plain PyTorch, on the same cores.

  python -m benchmarks.updates --model=emoji --methods=nabla_gfn,ddpo --rounds=7
  python -m benchmarks.updates --model=emoji_sd3           # all methods; goes on where it stopped
  python -m benchmarks.updates --model=smoke --methods=ddpo --rounds=2 --no-compile \\
      --output=runs/speed.json --page=runs/speed.md        # a minute, to see that it works

PyTorch's side is `benchmarks/torch_updates.py`. Before anything is timed both sides take one step
from the same weights with the same random numbers, and stop unless loss and gradient agree to 1e-4.
Then they take turns, a matrix product of either before each turn. jaxalign's side are the programs
of a run. Rounds are added to those in `--output`, which are kept where settings and machine are the
same; the page is made of that file alone.

Models: `emoji`, `emoji_sd3` have random weights and the sizes of the embedded models' training
(`jaxalign/pretrain`), `smoke`, `smoke_sd3` are the fixtures; or a folder in diffusers' layout.
"""
import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import tempfile
import time
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import speed_page
from benchmarks.gpu import RandomPairs
from jaxalign import methods
from jaxalign.config import recipes
from jaxalign.convert import lora_names, names, save_pipeline
from jaxalign.data.prompts import read_prompts
from jaxalign.devices import rng, sharding
from jaxalign.emoji.scorers import scene_clip
from jaxalign.errors import UserError
from jaxalign.methods import nabla_gfn
from jaxalign.methods.shared import noise, policy_gradient, preference
from jaxalign.models.clip import CLIPTextModelWithProjection, unit
from jaxalign.models.pipeline import Pipeline
from jaxalign.models.tokenizer import T5_LENGTH, Tokenizer
from jaxalign.pretrain import autoencoder, scene_denoisers
from jaxalign.sampling import Conditioning, guided_output, rollout
from jaxalign.train.experiment import build
from jaxalign.train.opening import ASSETS, open_pipeline
from jaxalign.train.programs import Programs
from jaxalign.train.search import Search

ROOT = pathlib.Path(__file__).resolve().parent.parent
METHODS = ("nabla_gfn", "ddpo", "draft", "mapo", "diffusion_dpo", "dno")
# What steps are made of.
PARTS = ("sampling", "forward", "policy_gradient", "reward_gradient")
TOLERANCE = 1e-4


def make_pipeline(model: str) -> Pipeline:
  """The pipeline that `--model` names."""
  if model in recipes.SMOKE:
    return open_pipeline(recipes.SMOKE[model])
  if model not in ("emoji", "emoji_sd3"):
    return open_pipeline(model)
  tokenizer = Tokenizer.load(ASSETS / "emoji" / "tokenizer")
  cfg = getattr(scene_denoisers, model).Config()
  configs = cfg.layout(tokenizer, autoencoder.vae_config(autoencoder.Config()))
  return Pipeline.build(configs, {name: tokenizer for name, entry in configs["model_index"].items()
                                  if name.startswith("tokenizer") and entry[0]})


def settings(name: str, model: str):
  """The recipe of the method at the size that is timed."""
  small = model in recipes.SMOKE
  cfg = recipes.load_recipe(f"jaxalign:{'nabla_gfn' if name in PARTS else name}"
                            f":{model if small else 'emoji'}{',one' if name == 'draft' else ''}")
  cfg.model.path, cfg.reward.names, cfg.reward.weights = model, ("scene_clip",), (1.0,)
  cfg.data.prompts, cfg.data.pairs = "jaxalign:emoji_train", ""
  if name in ("mapo", "diffusion_dpo"):
    cfg.data.pairs = "jaxalign:emoji"                     # the captions; latents are random
  if name in ("draft", "dno"):
    cfg.sample.batch = 8 if small else 16
  if name == "ddpo":                # what the shape of the step does not hang on: one spread
    cfg.method.group = 4
    cfg.method.advantage, cfg.method.history = "group_z", 0
    cfg.method.minibatches, cfg.method.inner_epochs = 2, 1
    # Standardised advantages sum to nothing, and with them the loss, which would be rounding only.
    cfg.method.advantage_clip = 0.5
  if name == "nabla_gfn" and small:
    cfg.method.perturbations, cfg.method.perturb_std = 2, 0.8
  cfg.eval.samples = 2
  cfg.optim.warmup = cfg.optim.decay_steps = 0
  return recipes.parse(cfg)


def devices_of(cfg) -> list:
  """As many devices as the batch divides over, as a run takes (`sharding.use_cores`)."""
  for count in range(jax.device_count(), 1, -1):
    with contextlib.suppress(UserError):
      cfg.check_devices(count)
      return jax.devices()[:count]
  return jax.devices()[:1]


class Ours:
  """jaxalign's side of one method: `step()` takes a step; `first()` takes the one to compare."""

  def __init__(self, name: str, pipeline: Pipeline, model: str):
    self.name, self.cfg = name, settings(name, model)
    cfg = self.cfg
    self.exp = exp = build(cfg, devices_of(cfg), pipeline)
    self.models, self.root, self.taken = exp.models, jax.random.key(cfg.seed), 0
    self.method = methods.make(cfg.method_name, self.models, cfg.method, cfg.optim)
    size = cfg.sample.batch
    group = getattr(cfg.method, "group", 1)
    self.ids = np.repeat(np.arange(size // group, dtype=np.int32), group)
    self.prompts = read_prompts("data.prompts", cfg.data.prompts)[:size]
    key = jax.random.key(1)
    self.policy = self._moved(self.models.init_policy(key, self.exp.frozen), key)
    if name == "dno":
      self.ids = np.arange(size, dtype=np.int32)
      self.prompts = [prompt for prompt in self.prompts[:size // 2] for _ in range(2)]
      self.search = Search(exp, self.method, self.prompts[::2])
      self.search.compile()
    elif name in PARTS:
      self._make_part(name)
    else:
      self.pairs = RandomPairs(exp, size) if cfg.reads_pairs else None
      table = self.pairs.shared if self.pairs else exp.prompt_table(self.prompts)
      self.programs = Programs(exp, self.method, table, self.root, self.pairs)
      self.state = self._with_policy(self.programs.init())
      self.programs.compile(self.state)

  def _moved(self, policy, key):
    """The policy away from the reference, where `b` is not zero, so that all gradients live."""
    leaves, treedef = jax.tree.flatten(policy)
    keys = jax.random.split(key, len(leaves))
    moved = [a + 0.02 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys)]
    return jax.tree.unflatten(treedef, moved)

  def _with_policy(self, state):
    place = lambda a, old: jax.device_put(np.asarray(a), old.sharding)
    if "trainable" in state:
      old = state["trainable"]
      return {**state, "trainable": {**old, "policy": jax.tree.map(
          place, self.policy, old["policy"])}}
    return {**state, "policy": jax.tree.map(place, self.policy, state["policy"])}

  def step(self) -> dict:
    """Takes a step and waits for it; metrics."""
    i, self.taken = self.taken, self.taken + 1
    if self.name == "dno":
      return jax.block_until_ready(self.search.step(i))[0]
    if self.name in PARTS:
      return jax.block_until_ready(self.part(i))
    experience, _, rewards = self.programs.collect(self.state, i, self.ids, self.prompts)
    self.state, metrics = self.programs.update(self.state, experience, rewards, i)
    return jax.block_until_ready((self.state, metrics))[1]

  # What a step is made of.

  def _make_part(self, name):
    exp, models, size = self.exp, self.models, self.cfg.sample.batch
    batch = exp.put_batch(self._conditioning())
    prepared = exp.put_batch(exp.reward.prepare(self.prompts))
    policy = exp.put(self.policy, sharding.replicated(exp.mesh))
    ids = exp.put_batch(np.arange(size, dtype=np.int32))

    def draw(key, ids):
      return noise.draw(models, key, ids)[:, 0]

    def score(frozen, x, prepared):
      return models.score(frozen["reward"], models.decode(frozen["decoder"], x), prepared)

    def loss(policy, frozen, batch, x):
      return jnp.square(models.output(policy, frozen, x, 500.0, batch)).mean()

    def run(policy, frozen, batch, prepared, ids, key):
      if name == "sampling":
        output = guided_output(models.denoise, models.guidance)
        out = rollout(output, models.combine(policy, frozen["base"]), models.sampler, batch, key,
                      ids, models.latent_shape)
        return {"loss/total": score(frozen, out.final, prepared).mean()}
      x = draw(key, ids)
      if name == "forward":
        return {"loss/total": loss(policy, frozen, batch, x)}
      if name == "policy_gradient":
        value, gradient = jax.value_and_grad(loss)(policy, frozen, batch, x)
        return {"loss/total": value, "gradient": gradient}
      total = lambda x: score(frozen, x, prepared).sum()
      value, gradient = jax.value_and_grad(total)(x)
      return {"loss/total": value / size, "gradient": gradient}
    run = jax.jit(run)
    self.part = lambda i: run(policy, exp.frozen, batch, prepared, ids,
                              rng.stream(self.root, rng.ROLLOUT, i))

  def _conditioning(self) -> Conditioning:
    """Of the rows of a batch, on the host."""
    if self.cfg.reads_pairs:
      cond, uncond = self.pairs.rows(self.ids)["cond"], self.pairs.shared["uncond"]
    else:
      cond, uncond = self.exp.embed([self.prompts[i] for i in self.ids]), self.exp.embed([""])
    uncond = jax.tree.map(lambda a: np.repeat(a[:1], len(self.ids), 0), uncond)
    return Conditioning(cond, uncond)

  def first(self) -> tuple[dict, float, dict]:
    """Takes the first step: what it drew, its loss, and its gradients by place."""
    given, metrics = self._given(), self.step()
    loss = float(np.mean(metrics["loss/total"]))
    if self.name in PARTS:
      gradient = metrics.get("gradient", {})
      return given, loss, {"x": gradient} if self.name == "reward_gradient" else gradient
    if self.name == "dno":
      state = next(iter(self.search.state.values()))
      moment = _first_moment(state["optimizer"])
      return given, loss, {"z": moment}
    return given, loss, _first_moment(self.state["optimizer"])

  def _given(self) -> dict:
    """The random numbers of the first step, `[T+1, B, h, w, c]` noise first."""
    cfg, models, size = self.cfg, self.models, self.cfg.sample.batch
    streams = {name: rng.stream(self.root, name, 0) for name in (rng.ROLLOUT, rng.UPDATE)}
    key = streams[rng.UPDATE]
    if self.name == "dno":
      start = next(iter(self.search.state.values()))["start"]
      all_key, vector_key = jax.random.split(key)
      orders = [noise.permutations(k, cfg.method.permutations, n) for k, n in (
          (all_key, start[0].size), (vector_key, start[0, 0].size))]
      return {"noise": np.moveaxis(np.asarray(start), 1, 0), "orders": orders}
    if cfg.reads_pairs:
      rows = self.pairs.rows(self.ids)
      batch = self.pairs.gather(self.pairs.shared, rows, np.arange(size))
      drawn = preference.draw(models, cfg.method, batch, key)
      return {"noise": drawn["noise"][:, 0], "t": drawn["t"]}
    given = {"noise": np.moveaxis(np.asarray(
        noise.draw(models, streams[rng.ROLLOUT], np.arange(size))), 1, 0)}
    if self.name == "nabla_gfn":
      key_steps, key_train, _ = jax.random.split(key, 3)
      strata, copies = cfg.method.strata, cfg.method.perturbations
      chosen = nabla_gfn.choose_steps(key_steps, size, models.sampler.steps, strata)
      last = jnp.full((1, size), models.sampler.steps - 1)
      given["chosen"] = jnp.concatenate([chosen, last])
      train = jax.random.fold_in(key_train, 0)
      for i, (name, count) in enumerate((("drawn", strata), ("final", 1))):
        to_next, _ = jax.random.split(jax.random.fold_in(train, i))
        draws = [jax.random.normal(k, (size * count, *models.latent_shape))
                 for k in jax.random.split(to_next, copies)]
        # Ours go trajectory by trajectory, PyTorch's step by step.
        order = np.arange(size * count).reshape(size, count).T.ravel()
        given[f"perturb_{name}"] = jnp.stack(draws)[:, order]
    if self.name == "ddpo":
      groups, parts = size // cfg.method.group, cfg.method.minibatches
      dealt = policy_gradient.deal(jax.random.split(key)[0], groups, parts,
                                   cfg.method.inner_epochs)
      given["dealt"] = dealt + parts * jnp.arange(groups // parts)[None]
    return given

  # What PyTorch's side is made of, and what a step costs.

  def tables(self) -> dict:
    """Columns of the sampler that updates read; see `torch_updates.Updates`."""
    s, schedule, cfg = self.models.sampler, self.models.schedule, self.cfg.method
    out = {name: getattr(s, name) for name in (
        "timesteps", "next_timesteps", "x_coef", "out_coef", "std", "lam", "rate", "input_scale")}
    alpha, sigma = (np.asarray(a, np.float64) for a in schedule.levels(s.next_timesteps))
    (p, q), _ = schedule.coefficients(alpha, sigma)
    out.update(clean_x=p, clean_out=q)
    if self.cfg.method_name == "nabla_gfn":
      out["gamma"] = nabla_gfn.gamma_at(cfg.gamma, alpha)
    if self.name == "ddpo":
      out["step_weight"] = policy_gradient.step_weights(cfg, s, 0, s.steps)
    return out

  def flops(self) -> float:
    """Operations of a step: the method's count of calls, times what XLA counts in one call."""
    models, exp, size = self.models, self.exp, self.cfg.sample.batch
    conditioning = self._conditioning()
    x = jnp.zeros((size, *models.latent_shape))
    prepared = {} if self.cfg.reads_pairs else exp.reward.prepare(
        [self.prompts[i] for i in self.ids])
    out = lambda p, f, x, c: models.denoise(models.combine(p, f["base"]), x, 500.0, c)
    decode = lambda f, x: models.decode(f["decoder"], x)
    count = lambda f, *args: jax.jit(f).lower(*args).cost_analysis()["flops"] / size
    square = lambda *args: jnp.square(out(*args)).mean()
    args = self.policy, exp.frozen, x, conditioning.cond
    forward = count(out, *args)
    backward = count(jax.grad(square, 2 if self.name == "dno" else 0), *args) - forward
    cost = dict(denoiser_forward=0, denoiser_backward=0, decodes=0, reward_queries=0,
                reward_gradients=0)
    if self.name == "sampling":
      cost["denoiser_forward"] = size * models.branches * models.sampler.steps
    elif self.name in ("forward", "policy_gradient"):
      cost["denoiser_forward"] = size * models.branches
      cost["denoiser_backward"] = size * models.branches * (self.name == "policy_gradient")
    elif self.name == "reward_gradient":
      cost.update(reward_queries=size, reward_gradients=size)
    else:
      cost = self.method.cost(size)
      if self.name != "dno" and not self.cfg.reads_pairs:
        cost["reward_queries"] += size                     # those that the loop scores
    if self.name == "sampling":
      cost["reward_queries"] = size
    total = cost["denoiser_forward"] * forward + cost["denoiser_backward"] * backward
    if cost["reward_queries"]:
      look = lambda f, x, p: models.score(f["reward"], decode(f, x), p)
      once = count(look, exp.frozen, x, prepared)
      both = count(jax.grad(lambda x, f, p: look(f, x, p).sum()), x, exp.frozen, prepared)
      total += cost["reward_queries"] * once + cost["reward_gradients"] * (both - once)
    return float(total)


def _first_moment(optimizer) -> dict:
  """AdamW's first moments of a policy, or of what else is trained, out of an optimiser's state.

  Where groups have optimisers of their own each has the whole tree, the others' places empty.
  """
  moments = [leaf.mu for leaf in jax.tree.leaves(optimizer, is_leaf=lambda a: hasattr(a, "mu"))
             if hasattr(leaf, "mu")]
  named = [mu["policy"] if isinstance(mu, dict) and "policy" in mu else mu for mu in moments]
  return next(mu for mu in named if jax.tree.leaves(mu))


def place_of(tree) -> dict[str, np.ndarray]:
  """A tree like an adapter's by the names and in the layouts of peft."""
  return {f"{module}.lora_{letter}.default.weight": value
          for module, pair in factors_of(tree).items() for letter, value in zip("AB", pair)}


def factors_of(tree) -> dict[str, tuple]:
  """Module -> its (A, B) in PyTorch's layout."""
  flat = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
          for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
  return {lora_names.module_of(path.removesuffix("/a")):
          (names.to_torch("/kernel", flat[path]),
           names.to_torch("/kernel", flat[path[:-1] + "b"])) for path in flat
          if path.endswith("/a")}


class Theirs:
  """PyTorch's side of the same, made from ours."""

  def __init__(self, ours: Ours, folder: str, padded: bool = False):
    import torch

    from benchmarks import torch_updates
    self.torch, self.name, cfg = torch, ours.name, ours.cfg
    torch.manual_seed(0)
    pipeline, models = ours.exp.pipeline, ours.models
    conditioning, bias = ours._conditioning(), None
    cond, uncond = ({name: np.asarray(a) for name, a in tree.items()} for tree in conditioning)
    if "key_bias" in cond:
      bias = cond["key_bias"][0]
      if padded:                       # as the pipeline of diffusers does where T5 is absent
        bias, zeros = None, ((0, 0), (0, T5_LENGTH - 1), (0, 0))
        for tree in (cond, uncond):
          tree["text"] = np.pad(tree["text"], zeros)
    for tree in (cond, uncond):
      tree.pop("key_bias", None)
    scorer = scene_clip()
    config = json.loads((ASSETS / "scene_clip" / "config.json").read_text())["model"]
    state = {names.torch_name(path): torch.tensor(names.to_torch(path, a)) for path, a in _flat(
        scorer.params["vision"])}
    nets = torch_updates.Networks(
        folder, pipeline.denoiser_name,
        {module: tuple(map(self._tensor, pair)) for module, pair in factors_of(
            ours.policy).items()},
        (config["vision_config"], state), models.guidance,
        None if bias is None else self._tensor(bias))
    rows = {"cond": jax.tree.map(self._tensor, cond), "uncond": jax.tree.map(self._tensor, uncond)}
    if cfg.reads_pairs:
      rows["pairs"] = self._image(ours.pairs.rows(ours.ids)["pairs"]["latents"])
    else:
      ids = scorer.prepare([ours.prompts[i] for i in ours.ids])["input_ids"]
      rows["text"] = self._tensor(_embed_text(scorer, ids))
    tables = {name: self._tensor(np.asarray(a, np.float32)) for name, a in ours.tables().items()}
    h, w, c = models.latent_shape
    beta = getattr(cfg.method, "beta", 0.0) / models.reward_std
    self.updates = torch_updates.Updates(
        nets, tables, (c, h, w), cfg.method, cfg.optim, rows, beta,
        self._tensor(np.asarray(models.schedule.alphas, np.float32)),
        self._tensor(np.asarray(models.schedule.sigmas, np.float32)), models.schedule.prediction,
        models.schedule.shift)
    self.step = lambda given=None: getattr(self.updates, self.name)(given or {})

  def _tensor(self, a):
    return self.torch.tensor(np.asarray(a))

  def _image(self, a):
    """`[..., h, w, c]` -> `[..., c, h, w]`."""
    return self._tensor(np.moveaxis(np.asarray(a), -1, -3))

  def first(self, given: dict) -> tuple[float, dict]:
    """The step with what is given: its loss, and gradients by place."""
    whole = ("chosen", "dealt", "orders")
    given = {name: [self._tensor(np.asarray(a, np.int64)) for a in value] if name == "orders" else
             self._tensor(np.asarray(value, np.int64)) if name in whole else
             self._tensor(value) if name == "t" else self._image(value)
             for name, value in given.items()}
    out, updates = self.step(given), self.updates
    if "gradient" in out or self.name in PARTS:
      gradient = out.get("gradient", {})
    elif self.name == "dno":
      gradient = {"z": updates.optimizer.state[updates.z]["exp_avg"]}
    else:
      gradient = {name: updates.optimizer.state[p]["exp_avg"]
                  for name, p in updates.nets.policy.items()}
    return float(out["loss"]), {name: a.detach().numpy() for name, a in gradient.items()}

  def flops(self) -> float:
    """Operations of the products and convolutions of a step that is taken, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode
    nets = self.updates.nets
    kept, nets.run, nets.look = (nets.run, nets.look), nets.net, nets._look
    with FlopCounterMode(display=False) as counter:
      self.step()
    nets.run, nets.look = kept
    return float(counter.get_total_flops())


def _flat(tree):
  return [(jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(leaf))
          for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _embed_text(scorer, ids):
  config = json.loads((ASSETS / "scene_clip" / "config.json").read_text())["model"]
  tower = CLIPTextModelWithProjection.from_config(config["text_config"])
  embed = jax.jit(lambda params, ids: unit(tower.apply({"params": params}, ids).projected))
  return np.asarray(embed(scorer.params["text"], ids))


def agreement(ours: Ours, theirs: Theirs) -> dict[str, float]:
  """Relative differences of loss and gradient of the first step; takes it on both sides."""
  given, loss, gradient = ours.first()
  their_loss, their_gradient = theirs.first(given)
  image = {"x", "z"} & set(gradient)
  gradient = ({name: np.moveaxis(np.asarray(a), -1, -3) for name, a in gradient.items()} if image
              else place_of(gradient))
  assert gradient.keys() == their_gradient.keys(), gradient.keys() ^ their_gradient.keys()
  norm = lambda tree: np.sqrt(sum(np.square(a, dtype=np.float64).sum() for a in tree.values()))
  out = {"loss": abs(loss - their_loss) / max(abs(loss), 1e-6)}
  if gradient:
    gap = {name: gradient[name] - their_gradient[name] for name in gradient}
    out["gradient"] = float(norm(gap) / norm(gradient))
  return out


def product_rates() -> dict[str, float]:
  """GFLOP/s of a product of 1024-square f32 matrices, best of three calls, by XLA and by torch.

  On all cores: each device has a part of the rows of one product.
  """
  import torch
  size, mesh = 1024, sharding.make_mesh(-1, 1, 1)
  height = size // mesh.size * mesh.size                   # as many rows for each device
  one = jax.device_put(np.ones((size, size), np.float32), sharding.replicated(mesh))
  rows = jax.device_put(np.ones((height, size), np.float32), sharding.batch_sharding(mesh))
  theirs = torch.ones(size, size)
  calls = {"jaxalign": lambda: jax.block_until_ready(_product(rows, one)),
           "pytorch": lambda: theirs[:height] @ theirs}
  best = {}
  for name, call in calls.items():
    call()
    seconds = []
    for _ in range(3):
      begun = time.perf_counter()
      call()
      seconds.append(time.perf_counter() - begun)
    best[name] = 2e-9 * height * size ** 2 / min(seconds)
  return best


_product = jax.jit(lambda a, b: a @ b)


def machine(devices: int) -> dict:
  """What the ratios hold for, with jaxalign on so many devices."""
  cpu = platform.processor()
  with open("/proc/cpuinfo") as file:
    cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
  return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "devices": devices,
          **{name: metadata.version(name) for name in ("jax", "torch", "diffusers", "peft")}}


def seconds_of(call) -> float:
  begun = time.perf_counter()
  call()
  return time.perf_counter() - begun


def measure(name: str, args, pipeline: Pipeline, folder: str, results: dict) -> None:
  """Adds rounds of one method to `results`, which is written after each."""
  cfg = settings(name, args.model)
  same = {"machine": machine(len(devices_of(cfg))), "padded": args.padded, "compile": args.compile,
          "settings": _described(cfg)}
  key = f"{args.model}{'+zeros' if args.padded else ''}/{name}"
  old = results.get(key, {})
  kept = old if all(old.get(k) == v for k, v in same.items()) else {}
  if len(kept.get("rounds", [])) >= args.rounds:
    return
  ours = Ours(name, pipeline, args.model)
  theirs = Theirs(ours, folder, args.padded)
  agree = agreement(ours, theirs)
  print(f"{args.model} {name}: " + ", ".join(f"{k} {v:.1e}" for k, v in agree.items()), flush=True)
  if not max(agree.values()) < TOLERANCE:
    raise SystemExit(f"{name}: the two sides do not compute the same")
  entry = {**same, "agreement": agree, "rounds": kept.get("rounds", []),
           "flops": {"jaxalign": ours.flops(), "pytorch": theirs.flops()}}
  ours.step()
  if args.compile:
    entry["compiled"] = compile_if_faster(theirs, kept.get("compiled"))
  theirs.step()
  while len(entry["rounds"]) < args.rounds:
    sides = {"jaxalign": ours.step, "pytorch": theirs.step}
    turn = {"product": product_rates(), "load": os.getloadavg()[0]}
    for side in sorted(sides, reverse=len(entry["rounds"]) % 2 == 1):
      cpu = time.process_time()
      turn[side] = seconds_of(sides[side])
      turn[f"{side}_cpu"] = time.process_time() - cpu
    entry["rounds"].append(turn)
    print(f"  {turn['jaxalign']:8.3f} s  {turn['pytorch']:8.3f} s", flush=True)
    results[key] = entry
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")


def compile_if_faster(theirs: Theirs, known: bool | None) -> bool:
  """`torch.compile` where it is faster, or was when rounds that are kept were timed."""
  nets = theirs.updates.nets
  best = lambda: min(seconds_of(theirs.step) for _ in range(2))
  if known is not None:
    if known:
      nets.compile()
    return known
  plain = best()
  nets.compile()
  theirs.step()
  if best() < plain:
    return True
  nets.run, nets.look = nets.net, nets._look
  return False


def _described(cfg) -> dict:
  """What of a config a step's time hangs on."""
  keep = lambda group, *keys: {key: getattr(group, key) for key in keys}
  method = {key: value for key, value in dataclasses.asdict(cfg.method).items()
            if isinstance(value, (int, float, str))}
  return {"sample": keep(cfg.sample, "batch", "steps", "guidance"),
          "model": {**keep(cfg.model, "lora_rank"), "lora_targets": list(cfg.model.lora_targets)},
          "method": method}


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--model", default="emoji")
  parser.add_argument("--methods", default=",".join((*METHODS, *PARTS)),
                      help=f"of {', '.join((*METHODS, *PARTS))}")
  parser.add_argument("--rounds", type=int, default=speed_page.ROUNDS,
                      help="turns of each side, in all")
  parser.add_argument("--no-compile", dest="compile", action="store_false",
                      help="without torch.compile, which else is kept where it is faster")
  parser.add_argument("--padded", action="store_true",
                      help="PyTorch reads the zeros of an absent T5 one by one, as diffusers does")
  parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs/updates.json")
  parser.add_argument("--page", type=pathlib.Path, default=ROOT / "docs/updates.md",
                      help="written at the end; empty for none")
  args = parser.parse_args(argv)
  chosen = args.methods.split(",")
  if unknown := set(chosen) - {*METHODS, *PARTS}:
    parser.error(f"--methods: {', '.join(sorted(unknown))}")
  import torch
  sharding.use_cores()
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  results = json.loads(args.output.read_text()) if args.output.exists() else {}
  pipeline = make_pipeline(args.model)
  with tempfile.TemporaryDirectory() as folder:
    save_pipeline(pipeline, folder)
    for name in chosen:
      measure(name, args, pipeline, folder, results)
  if args.page.name:
    args.page.write_text(speed_page.page(results))


if __name__ == "__main__":
  main()
