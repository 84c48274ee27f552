"""Speed on one GPU with random weights: sampling, training the UNet, updates of methods.

  python benchmarks/gpu.py --model=sd15 --torch --output=gpu.json
  python benchmarks/gpu.py --model=sdxl --batch=4
  python benchmarks/gpu.py --model=tiny        # does it run? seconds, on any machine

bfloat16 compute, attention by cuDNN where JAX finds it; every number is the median of the repeats.
`--torch` times PyTorch diffusers beside it in the same run (SDPA, `torch.compile`, bfloat16,
channels last) on the same shapes: sampling, and one full training step of the UNet. MFU counts the
operations of a UNet's forward and backward pass against `--peak` (H100 and H200: 989 TFLOP/s).
"""
import argparse
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign import methods
from jaxalign.config import recipes, schema
from jaxalign.models.architectures import ARCHITECTURES, architecture
from jaxalign.models.tokenizer import Tokenizer
from jaxalign.sampling import Conditioning, guided_output, rollout
from jaxalign.train.experiment import build
from jaxalign.train.opening import ASSETS, open_pipeline
from jaxalign.train.pairs import PairTable
from jaxalign.train.programs import Programs

TFLOP = {"sd15": (0.803, 2.407), "sdxl": (6.761, 20.231)}    # per image: forward, and with backward
METHODS = ("nabla_gfn", "ddpo", "mapo", "diffusion_dpo")


def median(call, repeats: int) -> float:
  """Seconds of `call()`, which waits for its result; the first call is not counted."""
  seconds = []
  for _ in range(repeats + 1):
    begun = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - begun)
  return statistics.median(seconds[1:])


class RandomPairs:
  """Stands in for `PairTable`: N pairs of random latents."""
  gather = staticmethod(PairTable.gather)

  def __init__(self, exp, count: int):
    generator = np.random.default_rng(0)
    shape = (count, 2, *exp.models.latent_shape)
    self.prompts = ["a cat"] * count
    self._latents = generator.standard_normal(shape).astype(np.float32)
    height, width = exp.pipeline.image_size
    self._origin = np.array([[[height, width, 0, 0]] * 2], np.int32)       # not cropped
    self._cond, self.shared = exp.embed(["a cat"]), {"uncond": exp.embed([""])}

  def rows(self, ids):
    return {"cond": jax.tree.map(lambda a: np.repeat(a, len(ids), 0), self._cond),
            "pairs": {"latents": self._latents[ids % len(self._latents)],
                      "label": np.ones(len(ids), np.float32),
                      "origin": np.repeat(self._origin, len(ids), 0)}}


def config(method: str, args) -> schema.Config:
  """The same small run for every method: LoRA, `args.batch` samples or pairs, 10 steps."""
  cfg = recipes.default(method)
  cfg.model.dtype, cfg.model.remat = args.dtype, "block"
  cfg.reward.names = ("brightness",)             # the reward network is not what is timed
  cfg.sample.batch, cfg.sample.steps, cfg.sample.guidance = args.batch, 10, 5.0
  cfg.mesh.data = 1
  if method == "ddpo":
    cfg.method.group, cfg.method.minibatches = 1, 1
  return recipes.parse(cfg)


def time_update(name: str, pipeline, args) -> float:
  """Seconds of collecting and updating with one method."""
  cfg = config(name, args)
  exp = build(cfg, jax.devices()[:1], pipeline)
  method = methods.make(name, exp.models, cfg.method, cfg.optim)
  prompts, root = ["a cat on a red background"], jax.random.key(0)
  pairs = RandomPairs(exp, args.batch) if cfg.reads_pairs else None
  table = pairs.shared if pairs else exp.prompt_table(prompts)
  programs = Programs(exp, method, table, root, pairs)
  state = programs.init()
  print(f"{name}: {programs.compile(state)}", flush=True)
  ids = np.zeros(args.batch, np.int32)

  def step():
    nonlocal state
    experience, _, rewards = programs.collect(state, 0, ids, prompts * args.batch)
    state, metrics = programs.update(state, experience, rewards, 0)
    jax.block_until_ready((state, metrics))
  return median(step, args.repeats)


def time_jax(pipeline, args) -> dict[str, float]:
  """Seconds of sampling a batch, and of a full training step of the UNet."""
  exp = build(config("sft", args), jax.devices()[:1], pipeline)
  models, base = exp.models, exp.frozen["base"]["params"]
  cond = jax.device_put(exp.embed(["a cat"] * args.batch))
  uncond = jax.device_put(exp.embed([""] * args.batch))
  ids, key = jnp.arange(args.batch), jax.random.key(0)
  output = guided_output(models.denoise, 5.0)

  @jax.jit
  def sample(base, decoder):
    trajectory = rollout(output, {"params": base}, models.sampler, Conditioning(cond, uncond), key,
                         ids, models.latent_shape)
    return models.decode(decoder, trajectory.final)
  out = {"sampling": median(
      lambda: jax.block_until_ready(sample(base, exp.frozen["decoder"])), args.repeats)}

  optimizer = optax.adamw(1e-6)
  x = jax.random.normal(key, (args.batch, *models.latent_shape))
  t = jnp.full(args.batch, 500)

  def train(params, state):
    loss = lambda params: jnp.square(models.denoise({"params": params}, x, t, cond) - x).mean()
    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state
  train = jax.jit(train, donate_argnums=(0, 1))
  held = jax.tree.map(jnp.copy, base)
  held = held, optimizer.init(held)

  def step():
    nonlocal held
    held = jax.block_until_ready(train(*held))
  out["training"] = median(step, args.repeats)
  return out


def time_torch(configs: dict, args) -> dict[str, float]:
  """The same two with PyTorch diffusers."""
  import diffusers
  import torch
  device = "cuda" if torch.cuda.is_available() else "cpu"
  dtype = getattr(torch, args.dtype)
  wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
  unet = diffusers.UNet2DConditionModel(**configs["unet"]).to(
      device, dtype, memory_format=torch.channels_last)
  vae = diffusers.AutoencoderKL(**configs["vae"]).to(device, torch.float32)
  scheduler = diffusers.DDIMScheduler.from_config(configs["scheduler"])
  scheduler.set_timesteps(10)
  size, width = configs["unet"]["sample_size"], configs["unet"]["cross_attention_dim"]
  make = lambda *shape: torch.randn(*shape, device=device, dtype=dtype)
  text = make(2 * args.batch, 77, width)
  added = {}
  if configs["unet"].get("addition_embed_type"):
    added = {"text_embeds": make(2 * args.batch, 1280), "time_ids": make(2 * args.batch, 6)}
  part = lambda n: {k: v[:n] for k, v in added.items()}
  run = torch.compile(unet) if args.compile else unet
  x = make(args.batch, 4, size, size)

  @torch.no_grad()
  def sample():
    latents = x
    for t in scheduler.timesteps:
      out = run(torch.cat([latents] * 2), t.to(device), text,
                added_cond_kwargs=part(2 * args.batch)).sample
      uncond, cond = out.chunk(2)
      latents = scheduler.step(uncond + 5.0 * (cond - uncond), t, latents).prev_sample
    vae.decode(latents.float() / configs["vae"]["scaling_factor"])
    wait()

  optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6, fused=device == "cuda")
  t = torch.full((args.batch,), 500, device=device)

  def train():
    out = run(x, t, text[:args.batch], added_cond_kwargs=part(args.batch)).sample
    torch.nn.functional.mse_loss(out.float(), x.float()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    wait()
  return {"sampling": median(sample, args.repeats), "training": median(train, args.repeats)}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--model", choices=(*ARCHITECTURES, "tiny"), default="sd15")
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
  parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of the GPU in bfloat16")
  parser.add_argument("--torch", action="store_true", help="time PyTorch diffusers beside it")
  parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                      help="torch.compile")
  parser.add_argument("--output", type=pathlib.Path, help="JSON file")
  args = parser.parse_args()
  if args.model == "tiny":
    pipeline = open_pipeline("jaxalign:fixture", args.dtype, "block")
    configs = pipeline.configs
  else:
    configs = ARCHITECTURES[args.model]
    pipeline = architecture(args.model, Tokenizer.load(ASSETS / "emoji" / "tokenizer"),
                            shapes_only=False, dtype=args.dtype, remat="block")
  result = {"device": jax.devices()[0].device_kind, **vars(args),
            "jaxalign": {**time_jax(pipeline, args),
                         **{name: time_update(name, pipeline, args) for name in METHODS}}}
  if args.torch:
    result["torch"] = time_torch(configs, args)
  forward, both = TFLOP.get(args.model, (None, None))
  for name in ("jaxalign", "torch"):
    for what, seconds in result.get(name, {}).items():
      line = f"{name:10s}{what:16s}{seconds:10.4f} s{args.batch / seconds:10.2f} img/s"
      work = {"sampling": forward and 20 * forward, "training": both}.get(what)
      if work:
        line += f"   MFU {100 * work * args.batch / seconds / args.peak:.1f} %"
      print(line)
  if args.output:
    args.output.write_text(json.dumps(result, indent=2, default=str) + "\n")


if __name__ == "__main__":
  main()
