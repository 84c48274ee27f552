"""What MaPO, Diffusion-DPO and SFT share: training on pairs that people have judged.

No image is sampled and no reward is asked. All three compare denoising errors of clean latents z:

  draw pairs (c, z_w, z_l), preferred and rejected; for each pair one t and one eps    (batch, draw)
  x_k = alpha_t z_k + sigma_t eps,  k in {w, l}
  l_k = mean over elements of (target_k - f_theta(x_k, t, c))^2
  theta <- AdamW on the mean over pairs of the method's own `objective` of these        (update)

The target is what the network outputs, and t is drawn as the network was trained.
"""
import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxalign.config.fields import Fraction, check
from jaxalign.config.schema import OptimConfig
from jaxalign.devices import rng
from jaxalign.methods import Method, Models
from jaxalign.methods.shared.optimizer import Learner, accumulated_gradients


@dataclasses.dataclass(frozen=True)
class Config:
  """Keys of the `method` group that all three share.

  Attributes:
    prompt_dropout: probability in [0, 1) that a pair is shown without its caption, which keeps the
      branch alive that guidance needs.
  """
  prompt_dropout: Fraction = 0.0

  reads_pairs = True
  images = 1                # of each pair that the method looks at: one, or both
  reads_reference = False   # whether `objective` is given how errors differ from the base model's

  def __post_init__(self):
    check("method", self)

  def objective(self, error, change, label):
    """The loss, a scalar, and metrics.

    Args:
      error: `[B, images]` f32, mean squared errors, the preferred image first; same t for both.
      change: these less those of the base model, or None.
      label: `[B]` f32, 1, or 0.5 for a tie.
    """
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class PairConfig(Config):
  """What MaPO and Diffusion-DPO share.

  Attributes:
    shared_noise: whether both images of a pair are noised with the same noise. If not, what the
      noise itself contributes to the errors no longer cancels.
  """
  shared_noise: bool = True

  images = 2


def binary_cross_entropy(logit, label):
  """`-log sigmoid` of the logit, or with the label 0.5 the mean of both answers; `[B]`."""
  return -(label * jax.nn.log_sigmoid(logit) + (1 - label) * jax.nn.log_sigmoid(-logit))


def margin_metrics(logit, label):
  # A tie of the model counts half, as does one of the data.
  right = (logit > 0) + 0.5 * (logit == 0)
  return {"train/margin": logit.mean(), "train/margin_std": logit.std(),
          "train/margin_accuracy": jnp.where(label == 0.5, 0.5, right).mean()}


def draw(models: Models, cfg: Config, batch, key) -> dict:
  """What is random in an update, for all micro-batches at once: timesteps, noise, captions shown.

  Every pair draws from its place in the batch, so nothing depends on devices or micro-batches.

  Returns:
    Rows of B pairs with K images, 2 or (SFT) 1: `latents [B, K, ...]`, `noise [B, K or 1, ...]`,
    `t [B]` f32, `cond`, `label [B]`, and `origin [B, K, 4]`: size of the file and crop in pixels.
  """
  pairs, conditioning = batch["pairs"], batch["conditioning"]
  latents, label, origin = pairs["latents"], pairs["label"], pairs["origin"]
  keys = rng.per_sample(key, batch["sample_ids"])
  fold = lambda index, sample: jax.vmap(lambda k: sample(jax.random.fold_in(k, index)))(keys)
  each = lambda mask, a: mask.reshape((-1,) + (1,) * (a.ndim - 1))
  noise = [rng.normal_per_sample(keys, models.latent_shape, 0)]
  if cfg.images == 2:
    if not cfg.shared_noise:
      noise.append(rng.normal_per_sample(keys, models.latent_shape, 1))
  else:                                             # of a tie either image, as likely as the other
    first = fold(4, jax.random.uniform) < label
    latents, origin = (jnp.where(each(first, a), a[:, :1], a[:, 1:]) for a in (latents, origin))
  cond = conditioning.cond
  if cfg.prompt_dropout:
    drop = fold(3, jax.random.uniform) < cfg.prompt_dropout
    cond = jax.tree.map(lambda a, b: jnp.where(each(drop, a), b, a), cond, conditioning.uncond)
  return {"latents": latents, "noise": jnp.stack(noise, 1), "cond": cond, "label": label,
          "origin": origin, "t": fold(2, models.schedule.draw_t)}


def outputs(models: Models, variables, rows):
  """What the network makes of all noised images `[B K, ...]` f32, and what it should.

  The images of a pair lie side by side, so that a sharded batch keeps them on one device.
  """
  latents, schedule = rows["latents"], models.schedule
  images = latents.shape[1]
  flat = lambda a: a.reshape((-1,) + a.shape[2:])
  each = lambda a: jnp.repeat(a, images, axis=0)
  noise, t = flat(jnp.broadcast_to(rows["noise"], latents.shape)), each(rows["t"])
  latents = flat(latents)
  x_t = schedule.add_noise(latents, noise, t)
  cond = jax.tree.map(each, rows["cond"])
  cond = models.with_origin(cond, flat(rows["origin"]))     # of the image, caption or none
  prediction = models.denoise(variables, x_t, t, cond)
  return prediction.astype(jnp.float32), schedule.target(latents, noise, t)


def _of_pairs(a, rows):
  """`[B K, ...]` -> its means `[B, K]`."""
  return a.mean(tuple(range(1, a.ndim))).reshape(rows["latents"].shape[:2])


def denoising_errors(models: Models, variables, rows):
  """Mean squared errors `[B, K]` f32 of the network against its own kind of target."""
  output, target = outputs(models, variables, rows)
  return _of_pairs(jnp.square(output - target), rows)


def loss(models: Models, cfg: Config, policy, frozen, rows):
  """The loss of one micro-batch and its metrics.

  Args:
    rows: as `draw` returns them.
  """
  output, target = outputs(models, models.combine(policy, frozen["base"]), rows)
  error, change = _of_pairs(jnp.square(output - target), rows), None
  if cfg.reads_reference:
    reference, _ = outputs(models, models.combine(None, frozen["base"]), rows)
    reference = jax.lax.stop_gradient(reference)
    # A difference of two means would lose the digits that a beta of 5000 needs.
    change = _of_pairs((output - reference) * (output + reference - 2 * target), rows)
  total, metrics = cfg.objective(error, change, rows["label"])
  named = {f"train/error_{side}": column.mean() for side, column in zip("wl", error.T)}
  return total, {"loss/total": total, **named, **metrics}


def make(models: Models, cfg: Config, optim: OptimConfig) -> Method:
  """The method whose config `cfg` is."""
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
    images = batch * cfg.images
    return {"denoiser_forward": images * (1 + cfg.reads_reference),
            "denoiser_backward": images, "decodes": 0, "reward_queries": 0, "reward_gradients": 0}

  return Method(init=init, collect=collect, update=update, product=learner.product, cost=cost)
