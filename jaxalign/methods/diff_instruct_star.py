"""Diff-Instruct*: rewards for one-step generators, held by a divergence of scores.

A generator x_0 = g(z, c) draws in one evaluation. Three networks live: the generator, an assistant
that learns the generator's own scores, and the teacher, the frozen multi-step model.

  repeat K times:                                                                     (assistant)
    x_0 = sg[g(z, c)];  x_t = a x_0 + s e
    psi <- Adam on |psi(x_t, t, c) - target|^2, the target what the network outputs
  x_0 = g(z, c);  x_t = a x_0 + s e                                                   (generator)
  y = eps_ref(x_t) - eps_psi(x_t);  r = e - eps_psi(x_t)          guided teacher; scores, times s
  L = w(t) [-d'(y) . r + (full: d(y))] - alpha R(decode(x_0), c)
  theta <- Adam on L, through x_t into both networks' inputs, never into their weights

  d(y) = |y|^2 (l2), sqrt(|y|^2 + kappa^2) - kappa (pseudo_huber);  kl: L = w(t) sg[y] . x_t

`detached` is the paper's gradient; `full` adds the term by which the law of x_t moves with theta,
and is the one whose optimum with a reward is the tilted distribution. Without a reward the same
code distils a multi-step model into one step; with `kl` it is Diff-Instruct++.

Luo et al. 2024 (Diff-Instruct*, arXiv 2410.20898; Diff-Instruct++, 2410.18881; SIM, 2410.16794).
Implemented from the equations; no training code was published.
"""
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.config.fields import Count, Fraction, NonNegative, Whole, check
from jaxalign.config.schema import OptimConfig
from jaxalign.devices import rng
from jaxalign.errors import UserError
from jaxalign.methods import Method, Models
from jaxalign.methods.shared.optimizer import Learner, make_optimizer
from jaxalign.sampling import branches, expand, guided, initial_noise


@dataclasses.dataclass(frozen=True)
class Config:
  """Keys of the `method` group.

  Attributes:
    divergence: "pseudo_huber", "l2" or "kl".
    kappa: > 0, of pseudo_huber, in the unit of y per root of the latent's size.
    gradient: "detached", "full", or "alpha": detached plus `gradient_alpha` times what full adds.
      Of no effect on kl.
    gradient_alpha: of "alpha": 0 is detached, 1 is full; for l2 in space "x0", SiD's alpha is
      `1 - gradient_alpha / 2`, so that its 1.2 is -0.4.
    space: unit of y: "eps", "score" (eps / s) or "x0" (eps s / a).
    weight: w(t): "constant"; "edm", `(a^2 + s^2) / s^2`, EDM's for errors of x_0 where latents
      have unit spread; "half_dsigma2", for space "score": with gradient "full" and l2 the
      divergence is then the KL of clean samples, less what the levels beyond t_min and t_max add (4
      % at the defaults); "dmd_norm", one over the mean of `|x_0 - x0_ref|`
      of each sample, `x0_ref` the guided teacher's clean estimate: SiD's and DMD's, with space
      "x0".
    guidance: scale of the teacher, 1 is off. guidance_in: whether it is inside y (else its
      difference is a term of its own).
    reward: alpha >= 0; 0 distils. ratio: alpha is not raw but the wanted ratio of the norms of
      both terms' gradients in x_0.
    assistant_steps: K. assistant_lr: learning rate of the assistant, otherwise as `optim`.
    warmup: updates at the beginning that train the assistant only.
    t_min, t_max: levels of x_t, uniform over the training levels of these indices: timesteps of a
      trained schedule, `1000 sigma` before its shift on a flow.
    ratio_decay: of the moving average of these norms.
  """
  divergence: Literal["pseudo_huber", "l2", "kl"] = "pseudo_huber"
  kappa: NonNegative = 0.1
  gradient: Literal["detached", "full", "alpha"] = "detached"
  gradient_alpha: float = 0.0
  space: Literal["eps", "score", "x0"] = "eps"
  weight: Literal["constant", "edm", "half_dsigma2", "dmd_norm"] = "constant"
  guidance: NonNegative = 3.0
  guidance_in: bool = True
  reward: NonNegative = 1.0
  ratio: bool = True
  assistant_steps: Count = 5
  assistant_lr: NonNegative = 1e-3
  warmup: Whole = 0
  t_min: Whole = 20
  t_max: Whole = 979
  ratio_decay: Fraction = 0.9

  @property
  def reward_gradients(self) -> bool:
    return self.reward > 0

  def __post_init__(self):
    check("method", self)
    if self.kappa == 0:
      raise UserError("method.kappa=0.0 has no gradient where scores agree; it is above 0")
    if self.t_min > self.t_max:
      raise UserError(f"method.t_min={self.t_min} is above method.t_max={self.t_max}")
    if self.gradient_alpha and self.gradient != "alpha":
      raise UserError(f"method.gradient_alpha={self.gradient_alpha} is for method.gradient='alpha'")
    if self.weight == "half_dsigma2" and self.space != "score":
      raise UserError("method.weight='half_dsigma2' weights scores: it is for method.space='score',"
                      f" not {self.space!r}")

  @property
  def sampling_share(self) -> float:
    """What the term by which the law of x_t moves is multiplied by."""
    return {"detached": 0.0, "full": 1.0, "alpha": self.gradient_alpha}[self.gradient]


# Named forms, arguments of the recipe.
PRESETS: dict[str, dict[str, Any]] = {
    "exact": dict(gradient="full"),
    "sim": dict(reward=0.0),
    "diff_instruct_pp": dict(divergence="kl"),
}


class Point(NamedTuple):
  """Where scores are compared.

  Attributes:
    noise: e, `[B, ...]`. a, s: `x_t = a x_0 + s e`, `[B]`. weight: w(t), `[B]`.
  """
  noise: Any
  a: Any
  s: Any
  weight: Any


def unit(space: str, point: Point):
  """What a difference of noise estimates is multiplied by to be one in `space`, `[B]`."""
  return {"eps": jnp.ones_like(point.s), "score": 1 / point.s, "x0": point.s / point.a}[space]


def _dot(a, b):
  return (a * b).sum(tuple(range(1, a.ndim)))


def pseudo_loss(cfg: Config, x_0, point: Point, assistant, reference):
  """Per-sample loss `[B]`: its gradient in `x_0` is the divergence's, its value means little.

  Args:
    x_0: `[B, ...]` generated.
    assistant: `(x_t) -> eps [B, ...]`. reference: `(x_t) -> (cond, uncond, combined)` noise
      estimates of the teacher, `Guided`. Both are functions of x_t with constant weights.
  Returns:
    `[B]`; the divergence `d(y)` `[B]`, and `|y|^2` per element `[B]`, without gradients.
  Reference: the score-projection identity, arXiv 2410.16794, and equation 1.5 of its full form.
  """
  x_t = expand(point.a, x_0) * x_0 + expand(point.s, x_0) * point.noise
  scale = expand(unit(cfg.space, point), x_0)
  eps, ref = assistant(x_t), reference(x_t)
  inside = ref.combined if cfg.guidance_in else ref.cond
  y, residual = scale * (inside - eps), scale * (point.noise - eps)
  square = _dot(y, y)
  if cfg.divergence == "kl":
    loss, distance = _dot(jax.lax.stop_gradient(y), x_t), square
  elif cfg.divergence == "l2":
    loss, distance = -2 * _dot(y, residual), square
  else:
    kappa = cfg.kappa * np.sqrt(x_0[0].size)
    root = jnp.sqrt(square + kappa ** 2)
    loss, distance = -_dot(y, residual) / root, root - kappa
  if cfg.sampling_share and cfg.divergence != "kl":
    loss = loss + cfg.sampling_share * distance
  if not cfg.guidance_in and ref.uncond is not None:
    pull = jax.lax.stop_gradient(scale * (ref.uncond - ref.cond))      # score difference, outside
    loss = loss - (cfg.guidance - 1) * _dot(pull, x_t)
  weight = point.weight
  if cfg.weight == "dmd_norm":
    x0_ref = (x_t - expand(point.s, x_t) * ref.combined) / expand(point.a, x_t)
    apart = jnp.abs(x_0 - x0_ref).mean(tuple(range(1, x_0.ndim)))
    weight = weight / jax.lax.stop_gradient(jnp.maximum(apart, 1e-5))
  return weight * loss, jax.lax.stop_gradient((distance, square / x_0[0].size))


def time_weights(cfg: Config, a: np.ndarray, s: np.ndarray) -> np.ndarray:
  """w(t) for every training level `(a, s)`, f64; 1 where it depends on the sample ("dmd_norm").

  "half_dsigma2" turns the mean over levels into `1/2 int d(sigma^2)` over variance-exploding
  levels `sigma = s / a`, whose scores are `a` times those of x_t.
  """
  if cfg.weight in ("constant", "dmd_norm"):
    return np.ones_like(a)
  with np.errstate(divide="ignore", invalid="ignore"):   # at the ends, which t_min, t_max avoid
    if cfg.weight == "edm":
      return (np.square(a) + np.square(s)) / np.square(s)
    return 0.5 * np.square(a) * np.gradient(np.square(s / a)) * (cfg.t_max - cfg.t_min + 1)


def make(models: Models, cfg: Config, optim: OptimConfig) -> Method:
  """Diff-Instruct* as a Method.

  Raises:
    UserError: a sampler of several steps, no teacher for a model that is a generator already, or
      levels beyond the schedule, or where the loss is infinite.
  """
  schedule, sampler = models.schedule, models.sampler
  if sampler.steps != 1:
    raise UserError("method.name: diff_instruct_star trains one-step generators; sample.kind is "
                    "'one_step' for them")
  if models.base_is_generator and "teacher" not in models.frozen:
    raise UserError("model.teacher is empty, and the model itself, a one-step generator or one "
                    "with the weights of model.unet, cannot be its own teacher: name the "
                    "multi-step model that it was distilled from")
  times = schedule.times
  if cfg.t_max >= len(times):
    raise UserError(f"method.t_max={cfg.t_max} is outside the {len(times)} levels of the schedule")
  if optim.accumulate != 1:
    raise UserError("optim.accumulate is 1 for diff_instruct_star, which takes no micro-batches")
  levels = schedule.training_levels
  weights = time_weights(cfg, *levels)
  used = np.append(levels, weights[None], 0)[:, cfg.t_min:cfg.t_max + 1]
  if not np.all((used > 0) & np.isfinite(used)):
    raise UserError(f"method.t_min={cfg.t_min} and method.t_max={cfg.t_max} take in a level "
                    "without noise or without data, where scores are infinite; leave out the ends")
  weights = jnp.asarray(weights, jnp.float32)
  learner = Learner(optim)
  assistant_optimizer = make_optimizer(dataclasses.replace(
      optim, lr=cfg.assistant_lr, decay_steps=optim.decay_steps * cfg.assistant_steps))
  teacher = guided(models.denoise, cfg.guidance)
  # The multi-step model, in the place of the base of what is made of it.
  teacher_of = lambda frozen: {"base": frozen.get("teacher", frozen["base"])}

  def generate(policy, frozen, z, conditioning):
    out = models.output(policy, frozen, z, sampler.at("timesteps", 0), conditioning)
    return sampler.mean(0, z, out)

  def draw(key, ids):
    """Times, noise and weights of a batch, per sample."""
    keys = rng.per_sample(key, ids)
    level = jax.vmap(lambda k: jax.random.randint(
        jax.random.fold_in(k, 1), (), cfg.t_min, cfg.t_max + 1))(keys)
    t = jnp.asarray(times, jnp.float32)[level]
    return t, Point(rng.normal_per_sample(keys, models.latent_shape, 2), *schedule.levels(t),
                    weights[level])

  def init(key, frozen, batch):
    k_policy, k_assistant = jax.random.split(key)
    assistant = models.init_policy(k_assistant, teacher_of(frozen))
    return {**learner.init(models.init_policy(k_policy, frozen)), "assistant": assistant,
            "assistant_optimizer": assistant_optimizer.init(assistant), "norms": jnp.zeros(2)}

  def collect(state, frozen, batch, key):
    trajectory = models.rollout(state["policy"], frozen, batch, key)
    return {"final": trajectory.final, "z": trajectory.latents[0], "batch": batch}

  def train_assistant(state, frozen, batch, key):
    """One step of the assistant on fresh samples of the generator."""
    ids, conditioning = batch["sample_ids"], batch["conditioning"]
    z = sampler.input_scale * initial_noise(key, ids, models.latent_shape)
    x_0 = jax.lax.stop_gradient(generate(state["policy"], frozen, z, conditioning))
    t, point = draw(key, ids)
    x_t = schedule.add_noise(x_0, point.noise, t)

    def loss(assistant):
      out = models.output(assistant, teacher_of(frozen), x_t, t, conditioning)
      return jnp.square(out - schedule.target(x_0, point.noise, t)).mean()
    value, gradient = jax.value_and_grad(loss)(state["assistant"])
    updates, opt = assistant_optimizer.update(
        gradient, state["assistant_optimizer"], state["assistant"])
    return dict(state, assistant=optax.apply_updates(state["assistant"], updates),
                assistant_optimizer=opt), value

  def cotangents(state, frozen, x_0, batch, key):
    """Gradients in x_0 of divergence and of minus the reward, and metrics."""
    conditioning = batch["conditioning"]
    t, point = draw(key, batch["sample_ids"])
    eps_of = lambda out, x_t: schedule.to_eps(out.astype(jnp.float32), x_t, t)
    multi_step = teacher_of(frozen)
    base = models.combine(None, multi_step["base"])
    assistant = lambda x_t: eps_of(
        models.output(state["assistant"], multi_step, x_t, t, conditioning), x_t)
    reference = lambda x_t: jax.tree.map(
        lambda out: eps_of(out, x_t), teacher(base, x_t, t, conditioning))

    def divergence(x_0):
      loss, logs = pseudo_loss(cfg, x_0, point, assistant, reference)
      return loss.mean(), logs
    to_data, (distance, gap) = jax.grad(divergence, has_aux=True)(x_0)
    metrics = {"train/divergence": distance.mean(), "train/score_gap": gap.mean()}
    if not cfg.reward:
      return to_data, jnp.zeros_like(to_data), metrics

    def cost(x_0):
      images = models.decode(frozen["decoder"], x_0)
      score = models.score(frozen["reward"], images, batch["prepared"])
      return -score.mean(), score.mean()
    to_reward, score = jax.grad(cost, has_aux=True)(x_0)
    return to_data, to_reward, {**metrics, "train/reward_scored": score}

  def update(state, frozen, experience, rewards, key):
    batch, k_assistant, k_generator = experience["batch"], *jax.random.split(key)

    def body(state, k):
      return train_assistant(state, frozen, batch, jax.random.fold_in(k_assistant, k))
    state, errors = jax.lax.scan(body, state, jnp.arange(cfg.assistant_steps))

    x_0 = experience["final"]                        # of this very policy and z
    to_data, to_reward, metrics = cotangents(state, frozen, x_0, batch, k_generator)
    # Norms are averaged over updates: a batch's own would let its noise set the reward's weight.
    now = jnp.stack([optax.tree.norm(to_data), optax.tree.norm(to_reward)])
    n = state["updates"]
    norms = jnp.where(n == 0, now, cfg.ratio_decay * state["norms"] + (1 - cfg.ratio_decay) * now)
    alpha = cfg.reward * (norms[0] / jnp.maximum(norms[1], 1e-12) if cfg.ratio else 1.0)
    # The generator runs once the critics and the reward are done, so that its activations do not
    # lie beside theirs.
    z, cotangent = jax.lax.optimization_barrier((experience["z"], to_data + alpha * to_reward))
    gradient, = jax.vjp(lambda policy: generate(policy, frozen, z, batch["conditioning"]),
                        state["policy"])[1](cotangent)
    before = learner.own(state)
    learned = jax.tree.map(lambda new, old: jnp.where(n >= cfg.warmup, new, old),
                           learner.step(before, gradient), before)
    state = {**state, **learned, "updates": n + 1, "norms": norms}
    return state, {
        "loss/assistant": errors.mean(), "train/grad_norm": optax.tree.norm(gradient),
        "train/alpha": alpha, "train/cotangent_ratio": alpha * now[1] / jnp.maximum(now[0], 1e-12),
        "train/x0_std": x_0.std(), **metrics}

  return Method(init=init, collect=collect, update=update, product=learner.product,
                cost=lambda batch: cost(cfg, batch))


def cost(cfg: Config, batch: int) -> dict[str, int]:
  """Evaluations per update of one sample and one guidance branch."""
  views = branches(cfg.guidance)
  kl, rewarded = cfg.divergence == "kl", int(cfg.reward > 0)
  return {"denoiser_forward": batch * (2 * cfg.assistant_steps + 3 + views),
          "denoiser_backward": batch * (cfg.assistant_steps + 1 + (0 if kl else 1 + views)),
          "decodes": batch * rewarded, "reward_queries": batch * rewarded,
          "reward_gradients": batch * rewarded}
