"""MaPO, Diffusion-DPO and SFT: training on pairs that people have judged.

No image is sampled and no reward is asked. All three compare denoising errors of clean latents z:

  draw pairs (c, z_w, z_l), preferred and rejected; for each pair one t and one eps    (batch, draw)
  x_k = sqrt(abar_t) z_k + sqrt(1 - abar_t) eps,  k in {w, l}
  l_k = mean over elements of (target_k - f_theta(x_k, t, c))^2
  MaPO : m = T [phi(s l_w) - phi(s l_l)],  phi(u) = u / (exp(u) - 1)
         L = l_w - b log sigmoid(m)
  DPO  : z = -(beta / 2) [(l_w - l_l) - (l_w_ref - l_l_ref)]
         L = -log sigmoid(z)
  SFT  : L = l_w
  theta <- AdamW on the mean of L over pairs                                               (update)

DPO alone has a reference: the base model with the policy off. Its errors cancel what makes an image
easy or hard to denoise, at the price of a second forward pass. MaPO does without, and its first
term keeps the preferred images likely.

Hong et al. 2024 (MaPO, arXiv 2406.06424, equations 9-11 and the released code); Wallace et al. 2023
(Diffusion-DPO, arXiv 2311.12908). Implemented from the papers.
"""
import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.config.fields import Fraction, NonNegative, check
from jaxalign.config.schema import OptimConfig
from jaxalign.devices import rng
from jaxalign.errors import UserError
from jaxalign.methods import Method, Models
from jaxalign.methods.optimizer import Learner, accumulated_gradients


@dataclasses.dataclass(frozen=True)
class SFTConfig:
  """Keys of the `method` group for SFT, and those that all three share.

  Attributes:
    prompt_dropout: probability in [0, 1) that a pair is shown without its caption, which keeps the
      branch alive that guidance needs.
  """
  prompt_dropout: Fraction = 0.0

  def __post_init__(self):
    check("method", self)

  @property
  def reads_pairs(self) -> bool:
    """Tells the loop to give pairs instead of prompts."""
    return True


@dataclasses.dataclass(frozen=True)
class PairConfig(SFTConfig):
  """What MaPO and Diffusion-DPO share.

  Attributes:
    shared_noise: whether both images of a pair are noised with the same noise. If not, what the
      noise itself contributes to the errors no longer cancels.
  """
  shared_noise: bool = True


@dataclasses.dataclass(frozen=True)
class MaPOConfig(PairConfig):
  """Keys of the `method` group for MaPO.

  Attributes:
    link: margin of the errors: "code" (`phi`), "power" (`phi^beta`) or "scaled" (`beta phi`).
    logit_scale: T > 0, factor of the margin. A constant of the objective: the sampler has no part
      in it.
    error_scale: s > 0, factor of the mean squared errors inside phi.
    weight: b >= 0 of the margin term; 0 is SFT.
    beta: > 0, of "power" and "scaled".
  """
  link: Literal["code", "power", "scaled"] = "code"
  logit_scale: NonNegative = 1000.0
  error_scale: NonNegative = 0.5
  weight: NonNegative = 0.1
  beta: NonNegative = 8.0

  def __post_init__(self):
    super().__post_init__()
    for key in ("logit_scale", "error_scale", "beta"):
      if getattr(self, key) == 0:
        raise UserError(f"method.{key}=0.0 leaves no preference to learn; it is above 0")


@dataclasses.dataclass(frozen=True)
class DPOConfig(PairConfig):
  """Keys of the `method` group for Diffusion-DPO.

  Attributes:
    beta: > 0, raw, per mean squared error; `2 D` times the beta per summed squared error of the
      paper, D the elements of a latent. Larger keeps the policy closer to the base model.
  """
  beta: NonNegative = 5000.0

  def __post_init__(self):
    super().__post_init__()
    if self.beta == 0:
      raise UserError("method.beta=0.0 leaves no preference to learn; it is above 0")


# Named forms of MaPO, arguments of its recipe: what was released, and two readings of equation 11.
PRESETS: dict[str, dict[str, Any]] = {
    "release": dict(link="code", logit_scale=1000.0, error_scale=0.5, weight=0.1),
    "paper_power": dict(link="power", logit_scale=1.0, error_scale=1.0, weight=1 / 8, beta=8.0),
    "paper_scaled": dict(link="scaled", logit_scale=1.0, error_scale=1.0, weight=1 / 8, beta=8.0),
}

CAP = 80.0           # phi is 1e-33 there; beyond 88 exp(u) overflows f32
SERIES = 0.2         # below, u / (exp(u) - 1) loses digits, and its gradient all of them


def _by_size(u, series: Callable, formula: Callable):
  """`series(u)` for small u, else `formula(u)`, each kept off the other's side.

  There is no lower bound: clipping at 0 would halve the gradient there.
  """
  u = jnp.minimum(u, CAP)
  small = u < SERIES
  return jnp.where(small, series(u), formula(jnp.where(small, SERIES, u)))


def phi(u):
  """`u / (exp(u) - 1)` for f32 `u >= 0` of any shape: 1 at 0, decreasing and convex, 0 at infinity.

  Value and gradient are right to 1e-6 and finite for every finite u.
  """
  return _by_size(u, lambda u: 1 - u / 2 + u ** 2 / 12 - u ** 4 / 720,
                  lambda u: u * jnp.exp(-u) / -jnp.expm1(-u))


def log_phi(u):
  """`log phi(u)`, of use where `phi` underflows or is raised to a power."""
  return _by_size(u, lambda u: -u / 2 - u ** 2 / 24 + u ** 4 / 2880,
                  lambda u: jnp.log(u) - u - jnp.log(-jnp.expm1(-u)))


def link(cfg: MaPOConfig, error):
  """The decreasing function of a mean squared error whose differences are MaPO's margins."""
  u = cfg.error_scale * error
  if cfg.link == "power":
    return jnp.exp(cfg.beta * log_phi(u))
  return phi(u) * (cfg.beta if cfg.link == "scaled" else 1.0)


def binary_cross_entropy(logit, label):
  """`-log sigmoid` of the logit, or with the label 0.5 the mean of both answers; `[B]`."""
  return -(label * jax.nn.log_sigmoid(logit) + (1 - label) * jax.nn.log_sigmoid(-logit))


def _margin_metrics(logit, label):
  # A tie of the model counts half, as does one of the data.
  right = (logit > 0) + 0.5 * (logit == 0)
  return {"train/margin": logit.mean(), "train/margin_std": logit.std(),
          "train/margin_accuracy": jnp.where(label == 0.5, 0.5, right).mean()}


def mapo_loss(error_w, error_l, label, *, cfg: MaPOConfig):
  """MaPO's loss from denoising errors.

  Args:
    error_w, error_l: `[B]` f32, mean squared errors of preferred and rejected image, same t and
      noise for both.
    label: `[B]` f32, 1, or 0.5 for a tie: then neither margin nor image is preferred.
  Returns:
    Scalar loss (`l + b log 2` where both errors are l) and metrics.
  Reference: the released code for "code"; equations 9-11 for "power" and "scaled", whose beta can
    be read in either way.
  """
  link_w, link_l = link(cfg, error_w), link(cfg, error_l)
  margin = cfg.logit_scale * (link_w - link_l)
  sft = (label * error_w + (1 - label) * error_l).mean()
  preference = cfg.weight * binary_cross_entropy(margin, label).mean()
  return sft + preference, {
      "loss/sft": sft, "loss/preference": preference, "train/link_w": link_w.mean(),
      "train/link_l": link_l.mean(), **_margin_metrics(margin, label)}


def dpo_loss(error_w, error_l, ref_w, ref_l, label, *, beta: float):
  """Diffusion-DPO's loss from denoising errors.

  Args:
    error_w, error_l: `[B]` f32, mean squared errors of preferred and rejected image, same t and
      noise for both. ref_w, ref_l: those of the reference.
    label: `[B]` f32, 1, or 0.5 for a tie.
    beta: per mean squared error.
  Returns:
    Scalar loss (log 2 at the reference) and metrics.
  Reference: equation 14 with a constant weight, T absorbed into beta.
  """
  logit = -0.5 * beta * ((error_w - error_l) - (ref_w - ref_l))
  return binary_cross_entropy(logit, label).mean(), {
      "train/ref_error_w": ref_w.mean(), "train/ref_error_l": ref_l.mean(),
      **_margin_metrics(logit, label)}


def draw(models: Models, cfg: SFTConfig, batch, key) -> dict:
  """What is random in an update, for all micro-batches at once: timesteps, noise, captions shown.

  Every pair draws from its place in the batch, so nothing depends on devices or micro-batches.

  Returns:
    Rows of B pairs with K images, 2 or (SFT) 1: `latents [B, K, ...]`, `noise [B, K or 1, ...]`,
    `t [B]` int32, `cond`, `label [B]`, and `origin [B, K, 4]`: size of the file and crop in pixels.
  """
  pairs, conditioning = batch["pairs"], batch["conditioning"]
  latents, label, origin = pairs["latents"], pairs["label"], pairs["origin"]
  keys = rng.per_sample(key, batch["sample_ids"])
  fold = lambda index, sample: jax.vmap(lambda k: sample(jax.random.fold_in(k, index)))(keys)
  each = lambda mask, a: mask.reshape((-1,) + (1,) * (a.ndim - 1))
  noise = [rng.normal_per_sample(keys, models.latent_shape, 0)]
  if isinstance(cfg, PairConfig):
    if not cfg.shared_noise:
      noise.append(rng.normal_per_sample(keys, models.latent_shape, 1))
  else:                                             # of a tie either image, as likely as the other
    first = fold(4, jax.random.uniform) < label
    latents, origin = (jnp.where(each(first, a), a[:, :1], a[:, 1:]) for a in (latents, origin))
  cond = conditioning.cond
  if cfg.prompt_dropout:
    drop = fold(3, jax.random.uniform) < cfg.prompt_dropout
    cond = jax.tree.map(lambda a, b: jnp.where(each(drop, a), b, a), cond, conditioning.uncond)
  steps = len(models.schedule.alphas_cumprod)
  return {"latents": latents, "noise": jnp.stack(noise, 1), "cond": cond, "label": label,
          "origin": origin, "t": fold(2, lambda k: jax.random.randint(k, (), 0, steps))}


def denoising_errors(models: Models, variables, rows):
  """Mean squared errors `[B, K]` f32 of the network against its own kind of target.

  The images of a pair lie side by side, so that a sharded batch keeps them on one device.
  """
  latents, schedule = rows["latents"], models.schedule
  images = latents.shape[1]
  flat = lambda a: a.reshape((-1,) + a.shape[2:])
  each = lambda a: jnp.repeat(a, images, axis=0)
  noise, t = flat(jnp.broadcast_to(rows["noise"], latents.shape)), each(rows["t"])
  x_t = schedule.add_noise(flat(latents), noise, t)
  cond = jax.tree.map(each, rows["cond"])
  if "added" in cond:                        # SDXL: each image's own size and crop, caption or none
    target = cond["added"]["time_ids"][:, 4:]
    time_ids = jnp.concatenate([flat(rows["origin"]).astype(target.dtype), target], axis=1)
    cond = {**cond, "added": {**cond["added"], "time_ids": time_ids}}
  prediction = models.denoise(variables, x_t, t, cond)
  gap = prediction.astype(jnp.float32) - schedule.from_eps(noise, x_t, t)
  return jnp.square(gap).mean(tuple(range(1, gap.ndim))).reshape(-1, images)


def loss(models: Models, cfg: SFTConfig, policy, frozen, rows):
  """The loss of one micro-batch and its metrics.

  Args:
    rows: as `draw` returns them.
  """
  error = denoising_errors(models, models.combine(policy, frozen["base"]), rows)
  if isinstance(cfg, MaPOConfig):
    total, metrics = mapo_loss(error[:, 0], error[:, 1], rows["label"], cfg=cfg)
  elif isinstance(cfg, DPOConfig):
    ref = jax.lax.stop_gradient(
        denoising_errors(models, models.combine(None, frozen["base"]), rows))
    total, metrics = dpo_loss(error[:, 0], error[:, 1], ref[:, 0], ref[:, 1], rows["label"],
                              beta=cfg.beta)
  else:
    total, metrics = error.mean(), {}
  named = {f"train/error_{side}": column.mean() for side, column in zip("wl", error.T)}
  return total, {"loss/total": total, **named, **metrics}


def make(models: Models, cfg: SFTConfig, optim: OptimConfig) -> Method:
  """MaPO, Diffusion-DPO or SFT, by the type of `cfg`, as a Method."""
  learner = Learner(optim)

  def init(key, frozen, batch):
    return learner.init(models.init_policy(key, frozen))

  def collect(state, frozen, batch, key):
    return batch

  def update(state, frozen, experience, rewards, key):
    def grads_of(policy, rows, key):
      (_, metrics), gradient = jax.value_and_grad(
          lambda policy: loss(models, cfg, policy, frozen, rows), has_aux=True)(policy)
      return gradient, metrics

    rows = draw(models, cfg, experience, key)
    gradient, metrics = accumulated_gradients(
        grads_of, state["policy"], rows, key, optim.accumulate)
    metrics["train/grad_norm"] = optax.tree.norm(gradient)
    return learner.step(state, gradient), metrics

  def cost(batch):
    images = batch * (2 if isinstance(cfg, PairConfig) else 1)
    return {"denoiser_forward": images * (2 if isinstance(cfg, DPOConfig) else 1),
            "denoiser_backward": images, "decodes": 0, "reward_queries": 0, "reward_gradients": 0}

  return Method(init=init, collect=collect, update=update, product=learner.product, cost=cost)


class Kind(NamedTuple):
  """What the registry needs of a method in this file."""
  Config: type
  make: Callable


mapo, diffusion_dpo, sft = (Kind(config, make) for config in (MaPOConfig, DPOConfig, SFTConfig))
