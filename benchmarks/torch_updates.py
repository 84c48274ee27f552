"""What `benchmarks/updates.py` times jaxalign beside: the same updates in plain PyTorch.

diffusers' networks, peft's adapters, transformers' image tower, torch's AdamW, and the methods as
one would write them down: adapters in the layers and off for the reference, both branches of
guidance as one batch, the last step of DRaFT-1 run once, with its gradient.
"""
import contextlib
import dataclasses
import math
import pathlib
from typing import Any

import diffusers
import peft
import torch
import torch.nn.functional as F
import transformers

LN2 = math.log(2.0)


class Joint:
  """diffusers' attention of Stable Diffusion 3, with `bias [M]` added to the scores of text keys.

  Text has no positions, so one token with the bias log n stands for n equal ones.
  """

  def __init__(self, bias):
    self.bias = bias

  def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
    split = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    def project(x, q, k, v, norm_q, norm_k):
      q, k, v = split(q(x)), split(k(x)), split(v(x))
      return (norm_q(q) if norm_q else q), (norm_k(k) if norm_k else k), v
    qkv = project(hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
    count, mask = hidden_states.shape[1], None
    if encoder_hidden_states is not None:
      added = project(encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj,
                      attn.norm_added_q, attn.norm_added_k)
      qkv = [torch.cat(pair, 2) for pair in zip(qkv, added)]
      mask = F.pad(self.bias, (count, 0))[None, None, None]
    out = F.scaled_dot_product_attention(*qkv, attn_mask=mask).transpose(1, 2).flatten(2)
    image = attn.to_out[0](out[:, :count])
    if encoder_hidden_states is None:
      return image
    text = out[:, count:]
    return image, text if attn.context_pre_only else attn.to_add_out(text)


class Networks:
  """Denoiser with its adapter, decoder and scorer of a checkpoint in diffusers' layout.

  Args:
    folder: the checkpoint. denoiser: "unet" or "transformer".
    factors: module -> (A, B) of the adapter, in peft's layout.
    vision: config and state dict of the scorer's image tower.
    guidance: scale; up to 1 is off.
    bias: `[M]` of `Joint`, or None.
  """

  def __init__(self, folder, denoiser: str, factors: dict, vision: tuple, guidance: float, bias):
    folder, self.kind, self.guidance = pathlib.Path(folder), denoiser, guidance
    kind = (diffusers.UNet2DConditionModel if denoiser == "unet"
            else diffusers.SD3Transformer2DModel)
    layout = {"memory_format": torch.channels_last}          # of convolutions, the faster on CPUs
    self.net = kind.from_pretrained(folder / denoiser).to(**layout).requires_grad_(False)
    if bias is not None:
      for module in self.net.modules():
        if hasattr(module, "set_processor"):
          module.set_processor(Joint(bias))
    rank = len(next(iter(factors.values()))[0])
    self.net.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(factors)))
    named = dict(self.net.named_parameters())
    self.policy = {f"{module}.lora_{letter}.default.weight": factor
                   for module, pair in factors.items() for letter, factor in zip("AB", pair)}
    for name, value in self.policy.items():
      named[name].data.copy_(value)
    self.policy = {name: named[name] for name in self.policy}
    self.vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").to(**layout)
    self.vae.requires_grad_(False)
    config, state = vision
    self.vision = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**config)).requires_grad_(False).eval()
    self.vision.load_state_dict(state)
    self.run, self.look = self.net, self._look

  def compile(self) -> None:
    """With `torch.compile`: one program for each shape, as jaxalign has."""
    torch._dynamo.config.cache_size_limit = 64
    torch._dynamo.config.accumulated_cache_size_limit = 256
    self.run = torch.compile(self.net, dynamic=False)
    self.look = torch.compile(self._look, dynamic=False)

  @contextlib.contextmanager
  def reference(self):
    """The network without its adapter."""
    self.net.disable_adapters()
    try:
      yield
    finally:
      self.net.enable_adapters()

  def denoise(self, x, t, cond: dict):
    if self.kind == "unet":
      return self.run(x, t, cond["text"], return_dict=False)[0]
    return self.run(hidden_states=x, timestep=t, encoder_hidden_states=cond["text"],
                    pooled_projections=cond["pooled"], return_dict=False)[0]

  def output(self, x, t, cond: dict, uncond: dict):
    """The guided prediction; `t` is a float or `[B]`."""
    t = torch.as_tensor(t, dtype=torch.float32).expand(len(x))
    if self.guidance <= 1:
      return self.denoise(x, t, cond)
    both = {name: torch.cat([uncond[name], cond[name]]) for name in cond}
    without, given = self.denoise(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
    return without + self.guidance * (given - without)

  def _look(self, latents, text):
    config = self.vae.config
    images = self.vae.decode(
        latents / config.scaling_factor + (config.shift_factor or 0.0), return_dict=False)[0]
    images, size = (images / 2 + 0.5).clamp(0, 1), self.vision.config.image_size
    if images.shape[-1] != size:
      images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return (F.normalize(self.vision(images * 2 - 1).image_embeds) * text).sum(-1)

  def score(self, latents, text):
    """The reward `[B]` of decoded latents; `text [B, D]` are embedded prompts of length one."""
    return self.look(latents, text)


@dataclasses.dataclass
class Updates:
  """One step of each method; each takes what is `given` in place of its random numbers.

  Attributes:
    tables: columns of the sampler, `[T]` each, by the names of `jaxalign.sampling.Sampler`; and
      `clean_x`, `clean_out`, `gamma` at the times of `next_timesteps`, `step_weight` (DDPO).
    shape: `(c, h, w)` of latents. cfg, optim: keys of the method and of AdamW.
    rows: of the batch: `cond`, `uncond` and `text`; of preference methods `pairs [N, 2, c, h, w]`
      and `cond`. beta: nabla-GFlowNet's, raw.
    alphas, sigmas: `[N]`, levels of the schedule. prediction: what the network outputs. shift: of
      the times that a flow is trained at.
  """
  nets: Networks
  tables: dict[str, Any]
  shape: tuple[int, ...]
  cfg: Any
  optim: Any
  rows: dict[str, Any]
  beta: float
  alphas: Any
  sigmas: Any
  prediction: str
  shift: float

  def __post_init__(self):
    first = next(iter((self.rows["cond"]).values()))
    self.batch, self.steps = len(first), len(self.tables["timesteps"])
    self.z = None
    self.optimizer = self._adamw(self.nets.policy.values())

  def _adamw(self, parameters):
    o = self.optim
    return torch.optim.AdamW(parameters, o.lr, (o.b1, o.b2), o.eps, o.weight_decay)

  def _learn(self):
    """One optimiser step on the gradients that were accumulated."""
    if self.optim.clip_norm:
      torch.nn.utils.clip_grad_norm_(self.nets.policy.values(), self.optim.clip_norm)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)

  def _mean(self, k, x, out):
    return self.tables["x_coef"][k] * x - self.tables["out_coef"][k] * out

  def _at(self, name, k):
    """Entries of a table at `k [R]`, to multiply `[R, c, h, w]` with."""
    return self.tables[name][k].reshape(-1, 1, 1, 1)

  @torch.no_grad()
  def rollout(self, given, stop=None):
    """`latents [T+1, B, ...]`, `out` and `noise [T, B, ...]`; up to step `stop`."""
    s, noise = self.tables, given.get("noise")
    x = s["input_scale"] * (torch.randn(self.batch, *self.shape) if noise is None else noise[0])
    latents, outs, noises = [x], [], []
    for k in range(self.steps if stop is None else stop):
      z = torch.randn_like(x) if noise is None else noise[k + 1]
      out = self.nets.output(x, s["timesteps"][k], self.rows["cond"], self.rows["uncond"])
      x = self._mean(k, x, out) + s["std"][k] * z
      latents.append(x)
      outs.append(out)
      noises.append(z)
    return latents, outs, noises

  def sampling(self, given):
    with torch.no_grad():
      latents = self.rollout(given)[0][-1]
      return {"loss": self.nets.score(latents, self.rows["text"]).mean()}

  def nabla_gfn(self, given):
    cfg, batch = self.cfg, self.batch
    latents, outs, _ = (torch.stack(part) for part in self.rollout(given))
    with torch.no_grad():
      self.nets.score(latents[-1], self.rows["text"])                   # what is logged
    k = given.get("chosen")
    if k is None:
      edges = torch.linspace(0, self.steps, cfg.strata + 1).round().long().flip(0)
      k = torch.stack([torch.randint(int(low), int(high), (batch,))
                       for high, low in zip(edges, edges[1:])])
      k = torch.cat([k, torch.full((1, batch), self.steps - 1)])
    k, who = k.flatten(), torch.arange(batch).repeat(cfg.strata + 1)
    drawn = batch * cfg.strata
    x_k, x_next, out_old = latents[k, who], latents[k + 1, who], outs[k, who]
    rows = {name: {key: a[who] for key, a in self.rows[name].items()} for name in
            ("cond", "uncond")}
    guess = torch.cat([
        self._guess(x_next[:drawn], k[:drawn], who[:drawn], given.get("perturb_drawn")),
        self._guess(x_next[drawn:], None, who[drawn:], given.get("perturb_final"))])
    t = self.tables["timesteps"][k]
    with torch.no_grad(), self.nets.reference():
      out_ref = self.nets.output(x_k, t, **rows)
    out = self.nets.output(x_k, t, **rows)
    residual = out - out_ref + self.beta * guess / self._at("lam", k)
    loss = residual.square().mean() + cfg.prox * (out - out_old).square().mean()
    loss.backward()
    self._learn()
    return {"loss": loss.detach()}

  def _guess(self, x, k, who, noise):
    """`gamma grad_x R(x0_hat(x))` at the latents after steps `k`; k None: x is the output."""
    cfg, x = self.cfg, x.detach().requires_grad_()
    clean = x
    if k is not None:
      cond, uncond = ({key: a[who] for key, a in self.rows[name].items()}
                      for name in ("cond", "uncond"))
      with self.nets.reference():
        out = self.nets.output(x, self.tables["next_timesteps"][k], cond, uncond)
      last = (k == self.steps - 1).reshape(-1, 1, 1, 1)
      clean = torch.where(last, x, self._at("clean_x", k) * x - self._at("clean_out", k) * out)
    leaf = clean.detach().requires_grad_()
    for i in range(cfg.perturbations):
      moved = leaf
      if cfg.perturb_std:
        moved = leaf + cfg.perturb_std * (torch.randn_like(leaf) if noise is None else noise[i])
      (self.nets.score(moved, self.rows["text"][who]).sum() / cfg.perturbations).backward()
    if k is None:
      return leaf.grad
    gradient, = torch.autograd.grad(clean, x, leaf.grad)
    return torch.where(last, torch.ones(()), self._at("gamma", k)) * gradient

  def ddpo(self, given):
    cfg = self.cfg
    latents, outs, noises = self.rollout(given)
    with torch.no_grad():
      reward = self.nets.score(latents[-1], self.rows["text"]).reshape(-1, cfg.group)
    adv = (reward - reward.mean(1, keepdim=True)) / reward.std(1, keepdim=True)
    adv = adv.clamp(-cfg.advantage_clip, cfg.advantage_clip)
    dealt, total = given.get("dealt"), 0.0
    if dealt is None:
      dealt = torch.randperm(len(adv)).reshape(cfg.minibatches, -1)
    for groups in dealt:
      who = (groups[:, None] * cfg.group + torch.arange(cfg.group)).flatten()
      a = adv[groups].flatten()
      cond, uncond = ({key: v[who] for key, v in self.rows[name].items()}
                      for name in ("cond", "uncond"))
      for k in range(self.steps):
        out = self.nets.output(latents[k][who], self.tables["timesteps"][k], cond, uncond)
        rate, delta = self.tables["rate"][k], out - outs[k][who]
        log_rho = (-rate * noises[k][who] * delta - 0.5 * (rate * delta).square()).mean((1, 2, 3))
        rho = log_rho.exp()
        clipped = rho.clamp(1 - cfg.clip_range, 1 + cfg.clip_range)
        loss = (self.tables["step_weight"][k] * torch.maximum(-a * rho, -a * clipped)).mean()
        loss = loss / self.steps
        loss.backward()
        total += loss.detach()
      self._learn()
    return {"loss": total / len(dealt)}

  def draft(self, given):
    latents, _, noises = self.rollout(given, self.steps - 1)
    k, s = self.steps - 1, self.tables
    out = self.nets.output(latents[k], s["timesteps"][k], self.rows["cond"], self.rows["uncond"])
    z = given["noise"][k + 1] if given else torch.randn_like(out)
    x = self._mean(k, latents[k], out) + s["std"][k] * z
    loss = -self.nets.score(x, self.rows["text"]).mean()
    loss.backward()
    self._learn()
    return {"loss": loss.detach()}

  @staticmethod
  def _of_pairs(a):
    """`[2 N, ...]`, the images of pairs side by side -> their means `[2, N]`."""
    return a.mean((1, 2, 3)).reshape(-1, 2).T

  def _noised(self, given):
    """What the network reads, and targets: of the images of pairs, with the same noise."""
    z, pairs = self.rows["pairs"].flatten(0, 1), len(self.rows["pairs"])
    if given:
      noise, t = given["noise"], given["t"]
    else:
      noise, last = torch.randn(pairs, *self.shape), len(self.alphas) - 1
      if self.prediction == "flow":
        level = torch.sigmoid(torch.randn(pairs))
        t = last * self.shift * level / (1 + (self.shift - 1) * level)
      else:
        t = torch.randint(0, last + 1, (pairs,)).float()
    noise, t = noise.repeat_interleave(2, 0), t.repeat_interleave(2)
    low = t.floor().long().clamp(max=len(self.alphas) - 1)
    high, part = (low + 1).clamp(max=len(self.alphas) - 1), t - t.floor()
    alpha, sigma = ((a[low] + part * (a[high] - a[low])).reshape(-1, 1, 1, 1)
                    for a in (self.alphas, self.sigmas))
    target = {"epsilon": lambda: noise, "flow": lambda: noise - z,
              "v_prediction": lambda: alpha * noise - sigma * z}[self.prediction]()
    cond = {key: a.repeat_interleave(2, 0) for key, a in self.rows["cond"].items()}
    return (alpha * z + sigma * noise, t, cond), target

  def mapo(self, given):
    cfg, (noised, target) = self.cfg, self._noised(given)
    w, l = self._of_pairs((self.nets.denoise(*noised) - target).square())
    phi = lambda u: u * torch.exp(-u) / -torch.expm1(-u)
    margin = cfg.logit_scale * (phi(cfg.error_scale * w) - phi(cfg.error_scale * l))
    loss = w.mean() - cfg.weight * F.logsigmoid(margin).mean()
    loss.backward()
    self._learn()
    return {"loss": loss.detach()}

  def diffusion_dpo(self, given):
    noised, target = self._noised(given)
    with torch.no_grad(), self.nets.reference():
      ref = self.nets.denoise(*noised)
    out = self.nets.denoise(*noised)
    # The squares' difference as a product: f32 errors of 1 to 7 digits, times beta, are nats.
    w, l = self._of_pairs((out - ref) * (out + ref - 2 * target))
    loss = -F.logsigmoid(-0.5 * self.cfg.beta * (w - l)).mean()
    loss.backward()
    self._learn()
    return {"loss": loss.detach()}

  # Direct noise optimisation.

  def dno(self, given):
    cfg, s = self.cfg, self.tables
    if self.z is None:
      z = given["noise"].transpose(0, 1) if given else torch.randn(
          self.batch, self.steps + 1, *self.shape)
      self.start, self.z = z.clone(), z.clone().requires_grad_()
      self.optimizer = self._adamw([self.z])
      self.best, self.best_reward = z.clone(), torch.full((len(z),), -math.inf)
    z = self.z
    with self.nets.reference():
      x = s["input_scale"] * z[:, 0]
      for k in range(self.steps):
        out = self.nets.output(x, s["timesteps"][k], self.rows["cond"], self.rows["uncond"])
        x = self._mean(k, x, out) + s["std"][k] * z[:, k + 1]
      reward = self.nets.score(x, self.rows["text"])
      gradient, = torch.autograd.grad(reward.sum(), z)
    flat = z.flatten(2)
    count, block = cfg.permutations, cfg.block
    orders = given.get("orders") or [
        torch.stack([torch.randperm(size) for _ in range(count)]) for size in
        (flat[0].numel(), flat.shape[2])]
    joint, p = self._prno(flat.flatten(1), orders[0], block)
    vector, _ = self._prno(flat.flatten(0, 1), orders[1], block)
    score = cfg.prno * joint + cfg.prno_vector * vector.reshape(len(z), -1).mean(1)
    if score.requires_grad:
      gradient = gradient + torch.autograd.grad(score.sum(), z)[0]
    size = gradient.flatten(1).norm(dim=1)
    factor = (self.optim.clip_norm / size).clamp(max=1) if self.optim.clip_norm else 1.0
    better = (reward > self.best_reward) & (p >= cfg.min_p)
    each = lambda a: a.reshape(-1, 1, 1, 1, 1)
    self.best = torch.where(each(better), z.detach(), self.best)
    self.best_reward = torch.where(better, reward.detach(), self.best_reward)
    z.grad = -gradient * each(factor)
    self.optimizer.step()
    return {"loss": -(reward + score).detach().mean()}

  @staticmethod
  def _prno(z, orders, block: int):
    """The regulariser `[B]` of `z [B, D]`, and the mean over orders of its smaller probability."""
    count, D = z.shape[1] // block, z.shape[1]
    bounds = []
    for order in [torch.arange(D), *orders]:
      blocks = z[:, order][:, :count * block].reshape(-1, count, block)
      off = torch.linalg.eigvalsh(blocks.mT @ blocks / count - torch.eye(block)).abs().amax(-1)
      excess = (torch.sqrt(1 + off) - 1 - math.sqrt(block / count)).clamp(min=0)
      bounds.append(torch.stack([
          -count * blocks.mean(1).square().sum(-1) / (2 * block), -0.5 * count * excess.square()]))
    bounds = torch.stack(bounds).clamp(max=-LN2)
    score = (bounds[0] + bounds[1:].mean(0) + 2 * LN2).sum(0)
    return score, (2 * bounds[1:].exp()).amin(1).mean(0)

  # What a step is made of, at the rows of an update.

  def forward(self, given):
    with torch.no_grad():
      return {"loss": self._part(given).square().mean()}

  def policy_gradient(self, given):
    loss = self._part(given).square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in self.nets.policy.items()}
    self.optimizer.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), "gradient": gradients}

  def _part(self, given):
    x = given["noise"][0] if given else torch.randn(self.batch, *self.shape)
    return self.nets.output(x, 500.0, self.rows["cond"], self.rows["uncond"])

  def reward_gradient(self, given):
    x = given["noise"][0] if given else torch.randn(self.batch, *self.shape)
    x = x.clone().requires_grad_()
    reward = self.nets.score(x, self.rows["text"])
    gradient, = torch.autograd.grad(reward.sum(), x)
    return {"loss": reward.detach().mean(), "gradient": {"x": gradient}}
