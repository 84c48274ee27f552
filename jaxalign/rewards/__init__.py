"""Rewards: what the images are scored by.

Two kinds behind one seam. A `Reward` is a pure JAX function: it runs on the device beside the
model and gives gradients; a PyTorch function is made one by a callback. A `HostReward` is a black
box on uint8 images, for whose scores a training step waits; in optimisation at inference the device
draws the next batch meanwhile.
`make_reward` builds either from the config: built-in names, the user's own
`path/to/file.py:function`, or a weighted sum of them.

Other packages add rewards through the entry point group `jaxalign.rewards`; each entry point names
a function without arguments that returns a `Reward` or a `HostReward`.
"""
import dataclasses
import inspect
import math
import re
import urllib.parse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.config import registry
from jaxalign.config.credentials import JUDGE, hidden
from jaxalign.config.source import one_line
from jaxalign.devices import callbacks, sharding
from jaxalign.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)  # by identity, hence hashable: a static jit argument
class Reward:
  """A reward in JAX.

  Attributes:
    name: what logs and messages call it.
    params: frozen weights, a pytree (`{}` for rules); always passed in, never closed over.
    prepare: `list[str]` of P prompts -> dict of numpy arrays with leading axis P (`{}` if the
      reward ignores the prompt). Runs on the host, once per prompt.
    score: `(params, images [B,H,W,3] f32 in [0,1], prepared with leading axis B) -> [B]` f32. Pure.
    range: values that `score` can take and their unit, in words.
    differentiable: False if the gradient is zero or meaningless, as for a yes/no rule; methods that
      climb reward gradients must refuse such a reward.
    parts: the `(name, weight, reward)` of a weighted sum; empty for a single reward.
    features: `(params, images [B,H,W,3] in [0,1]) -> [B, D]`, what the reward sees in an image, for
      diversity and Frechet distance; pure. None where it has no such thing: it cannot be a judge.
    opened: `(trial.Trial) -> Reward | HostReward`, what it is once it was tried out; None where
      that is known without.
  """
  name: str
  params: Any
  prepare: Callable[[list[str]], dict[str, np.ndarray]]
  score: Callable[[Any, jax.Array, dict[str, jax.Array]], jax.Array]
  range: str = ""
  differentiable: bool = True
  parts: tuple[tuple[str, float, "Reward"], ...] = ()
  features: Callable[[Any, jax.Array], jax.Array] | None = None
  opened: Callable[[Any], Any] | None = None

  @property
  def weights(self) -> dict[str, float]:
    """Weight of each term; `score` is `weighted_sum(weights, terms(...))`."""
    return {name: weight for name, weight, _ in self.parts} or {self.name: 1.0}

  def terms(self, params, images, prepared) -> dict[str, jax.Array]:
    """Each term's own `[B]` scores before weighting, for logs. Pure, like `score`."""
    if not self.parts:
      return {self.name: self.score(params, images, prepared)}
    return {
      name: _checked_trace(name, images, part.score(params[name], images, _pick(prepared, name)))
      for name, _, part in self.parts}


@dataclasses.dataclass(frozen=True, eq=False)
class HostReward:
  """A black-box reward on the host, without gradients.

  Attributes:
    name: what logs and messages call it.
    score: `(images [B,H,W,3] uint8, list[str] of B prompts) -> [B]` np.float32.
    range: values that `score` can take and their unit, in words.
    parts: the `(name, weight, reward)` of a weighted sum; empty for a single reward.
    opened: as that of a `Reward`.
    keep: `(pathlib.Path)`, told the folder of the run, where it may keep what it asked for. None
      where it has no use for that.
  """
  name: str
  score: Callable[[np.ndarray, list[str]], np.ndarray]
  range: str = ""
  parts: tuple[tuple[str, float, "HostReward"], ...] = ()
  opened: Callable[[Any], Any] | None = None
  keep: Callable[[Any], None] | None = None

  @property
  def weights(self) -> dict[str, float]:
    """Weight of each term; `score` is `weighted_sum(weights, terms(...))`."""
    return {name: weight for name, weight, _ in self.parts} or {self.name: 1.0}

  def terms(self, images, prompts) -> dict[str, np.ndarray]:
    """Each term's own `[B]` scores before weighting, checked by `check_scores`, for logs."""
    parts = self.parts or ((self.name, 1.0, self),)
    return {name: check_scores(name, part.score(images, list(prompts)), prompts)
            for name, _, part in parts}


# Name -> `module:function` without arguments; a module is imported when its reward is asked for.
REWARDS = {
    "brightness": "jaxalign.rewards.rules:brightness",
    "color_accuracy": "jaxalign.emoji.colours:color_accuracy",
    "color_match": "jaxalign.emoji.colours:color_match",
    "colour": "jaxalign.emoji.checks:colour",
    "grayness": "jaxalign.rewards.rules:grayness",
    "jpeg_compressibility": "jaxalign.rewards.rules:jpeg_compressibility",
    "jpeg_incompressibility": "jaxalign.rewards.rules:jpeg_incompressibility",
    "number": "jaxalign.emoji.checks:number",
    "place": "jaxalign.emoji.checks:place",
    "scene": "jaxalign.emoji.checks:scene",
    "scene_clip": "jaxalign.emoji.scorers:scene_clip",
    "scene_judge": "jaxalign.emoji.scorers:scene_judge",
    "scene_share": "jaxalign.emoji.checks:scene_share",
    "soft_colour": "jaxalign.emoji.checks:soft_colour",
    "soft_number": "jaxalign.emoji.checks:soft_number",
    "soft_place": "jaxalign.emoji.checks:soft_place",
    "soft_scene": "jaxalign.emoji.checks:soft_scene",
    "soft_scene_share": "jaxalign.emoji.checks:soft_scene_share",
    "soft_style_3d": "jaxalign.emoji.checks:soft_style_3d",
    "soft_subjects": "jaxalign.emoji.checks:soft_subjects",
    "soft_word": "jaxalign.emoji.lettering:soft_word",
    "style_3d": "jaxalign.emoji.checks:style_3d",
    "subjects": "jaxalign.emoji.checks:subjects",
}
# The same for those that take WHERE their weights lie, in `reward.names` as NAME:WHERE;
# docs/rewards.md says what WHERE is. Some know where, and settings alone may follow, NAME#...
PRETRAINED = {
    "aesthetic": "jaxalign.rewards.clip_towers:aesthetic",
    "clip_score": "jaxalign.rewards.clip_towers:clip_score",
    "hpsv2": "jaxalign.rewards.clip_towers:hpsv2",
    "hpsv2.1": "jaxalign.rewards.clip_towers:hpsv2_1",
    "image_reward": "jaxalign.rewards.image_reward:image_reward",
    "ocr": "jaxalign.rewards.ocr:ocr",
    "ocr_exact": "jaxalign.rewards.ocr:ocr_exact",
    "ocr_judge": "jaxalign.rewards.ocr:ocr_judge",
    "pickscore": "jaxalign.rewards.clip_towers:pickscore",
}


def make_reward(names: tuple[str, ...], weights: tuple[float, ...]) -> Reward | HostReward:
  """The weighted sum of the named rewards; a single name is a sum of one term.

  If every term is a `Reward`, so is the sum: `params` and the keys of `prepare` are grouped by
  term. If any term is a black box, the sum is a `HostReward` that jits the JAX terms inside.
  `.terms` gives the terms one by one, `.weights` their weights.

  Args:
    names: config key `reward.names`: names in `REWARDS` or from an entry point, `NAME:WHERE` with a
      name in `PRETRAINED`, `path/to/file.py:function`, a URL, or `vlm:URL`. No name twice. Without
      WHERE in what is returned, unless it tells two of one name apart.
    weights: config key `reward.weights`, one finite number for each name, in raw units of its term.
  Raises:
    UserError: for anything that the config or the user's file gets wrong.
  """
  names, weights = tuple(names), tuple(float(w) for w in weights)
  if not names:
    raise UserError("reward.names is empty: name at least one reward")
  shown = hidden(names)
  if len(set(shown)) < len(names):
    raise UserError(f"reward.names has a name twice: {', '.join(shown)}")
  if len(weights) != len(names):
    raise UserError(f"reward.weights has {len(weights)} numbers for {len(names)} reward.names")
  if not all(map(math.isfinite, weights)):
    raise UserError(f"reward.weights must be finite numbers, not {weights}")

  return _summed(_short(shown), weights, [find(name) for name in names])


def open_reward(reward: Reward | HostReward, trial: Callable, mesh=None) -> Reward | HostReward:
  """What `make_reward` made, ready for a run: parts that must be tried out first have been.

  Args:
    trial: `() -> rewards.trial.Trial`, asked where a part needs one.
    mesh: that of the programs which will hold the reward, if any will.
  Raises:
    UserError: a part does not pass, in any process of the run.
  """
  names, weights, parts = zip(*reward.parts)
  if any(part.opened for part in parts):
    try:
      asked = trial()
      parts = [part.opened(asked) if part.opened else part for part in parts]
    except UserError as error:
      callbacks.record(str(error))
    callbacks.check()
    reward = _summed(names, weights, parts)
  return reward if mesh is None or isinstance(reward, HostReward) else _on_mesh(reward, mesh)


def reweighted(reward: Reward | HostReward, weights: dict[str, float]) -> Reward | HostReward:
  """The weighted sum `reward` with other weights, of which it is a function of the same params."""
  names, _, parts = zip(*reward.parts)
  return _summed(names, tuple(weights[name] for name in names), parts)


def keep_answers(reward: Reward | HostReward, folder) -> None:
  """Tells a reward, or its parts, which folder, a `pathlib.Path`, is that of their run."""
  for _, _, part in reward.parts or ((reward.name, 1.0, reward),):
    if isinstance(part, HostReward) and part.keep:
      part.keep(folder)


def _on_mesh(reward: Reward, mesh) -> Reward:
  """The reward with its functions traced with `mesh` in force, for callbacks split over it."""
  traced = lambda f: f and sharding.on_mesh(f, mesh)
  return dataclasses.replace(
      reward, score=traced(reward.score), features=traced(reward.features),
      parts=tuple((name, weight, _on_mesh(part, mesh)) for name, weight, part in reward.parts))


def _summed(names, weights, rewards) -> Reward | HostReward:
  label = " + ".join(n if w == 1 else f"{w:g}*{n}" for n, w in zip(names, weights))
  span = " + ".join(f"{w:g} x ({n}: {r.range})" for n, w, r in zip(names, weights, rewards))
  by_name = dict(zip(names, weights))
  if any(isinstance(r, HostReward) for r in rewards):
    parts = tuple(zip(names, weights, map(_on_host, names, rewards)))
    host = HostReward(label, None, span, parts)
    score = lambda images, prompts: weighted_sum(by_name, host.terms(images, prompts))
    return dataclasses.replace(host, score=score)

  def prepare(prompts):
    return {f"{name}/{key}": array for name, r in zip(names, rewards)
            for key, array in _checked_prepare(name, r, prompts).items()}

  total = Reward(label, {n: r.params for n, r in zip(names, rewards)}, prepare, None, span,
                 all(r.differentiable for r in rewards), tuple(zip(names, weights, rewards)))
  score = lambda params, images, prepared: weighted_sum(
    by_name, total.terms(params, images, prepared))
  return dataclasses.replace(total, score=score)


def weighted_sum(weights: dict[str, float], terms: dict[str, Any]):
  """`sum_name weights[name] * terms[name]`, `[B]`; for who has the terms already."""
  return sum(weight * terms[name] for name, weight in weights.items())


def check_scores(reward_name: str, scores, prompts) -> np.ndarray:
  """Fetched scores as `[B]` np.float32, or a `UserError` that says what is wrong with them.

  JAX rewards cannot raise on NaN inside a compiled program, so the caller checks what it fetches.

  Args:
    reward_name: named in the message.
    scores: what the reward returned: anything that becomes a real numpy array of shape `[B]`.
    prompts: the B prompts that were scored.
  """
  where = f"reward.names: '{reward_name}'"
  try:
    array = np.asarray(scores)
  except Exception as e:  # e.g. a ragged list, or a torch tensor that still needs .detach()
    raise UserError(f"{where} returned no array: {one_line(e)}") from e
  # bfloat16 is no numpy kind of its own, hence the question to jnp.
  if array.dtype.kind not in "biuf" and not jnp.issubdtype(array.dtype, jnp.floating):
    raise UserError(f"{where} returned {type(scores).__name__} of dtype {array.dtype}, "
                    "not real numbers")
  if array.shape != (len(prompts),):
    raise UserError(f"{where} returned shape {array.shape}, not ({len(prompts)},): "
                    "one score for each image")
  with np.errstate(over="ignore"):  # beyond float32 becomes inf, reported below
    array = array.astype(np.float32)
  bad = np.flatnonzero(~np.isfinite(array))
  if bad.size:
    i = int(bad[0])
    raise UserError(f"{where} returned {array[i]} at index {i}, prompt {prompts[i]!r} "
                    f"({bad.size} of {array.size} scores are not finite)")
  return array


def _short(names: tuple[str, ...]) -> tuple[str, ...]:
  """What logs call them: `NAME` of `NAME:WHERE`, and a user's function without what follows `#`.

  `name=` there says it. Where two would be called the same, names stay as they are.
  """
  def short(name):
    if name.startswith(("http://", "https://")):
      return name
    if name.startswith(JUDGE):
      return dict(urllib.parse.parse_qsl(name.partition("#")[2])).get("name") or "vlm"
    if ".py:" in name:
      spec, _, settings = name.partition("#")
      return dict(urllib.parse.parse_qsl(settings)).get("name", spec)
    return _pretrained(name) or name
  short = [short(name) for name in names]
  return tuple(s if short.count(s) == 1 else n for s, n in zip(short, names))


def find(name: str) -> Reward | HostReward:
  """The one reward of a name as in `reward.names`, its own and not a sum of one term.

  Raises:
    UserError: there is none of that name, or it is not usable.
  """
  if name.startswith(("http://", "https://")):
    from jaxalign.rewards.http import http_reward
    return http_reward(name)
  if name.startswith(JUDGE):
    from jaxalign.rewards.vlm import vlm_reward
    return vlm_reward(name)
  if ".py:" in name:
    from jaxalign.rewards.user import load_user_reward
    return load_user_reward(name)
  short = _pretrained(name)
  if short:
    where, load = name[len(short):].removeprefix(":"), registry.resolve(PRETRAINED[short])
    needed = inspect.signature(load).parameters["where"].default is inspect.Parameter.empty
    if needed and not where:
      raise UserError(f"reward.names: '{short}' needs its weights: write {short}:WHERE, and see "
                      "docs/rewards.md for what WHERE is")
    try:
      return load(where)
    except UserError as error:
      raise UserError(f"reward.names: '{short}': {error}") from error
  added = registry.added("reward", REWARDS)
  if name in added:
    return added[name].load()()
  if name not in REWARDS:
    raise UserError(f"reward.names: unknown reward '{hidden(name)}'; choose from "
                    f"{', '.join(sorted({*REWARDS, *added}))}, NAME:WHERE with one of "
                    f"{', '.join(PRETRAINED)}, path/to/file.py:function, a URL, or vlm:URL")
  return registry.resolve(REWARDS[name])()


def _pretrained(name: str) -> str:
  """Which of `PRETRAINED` is named, alone or before ":" or "#"; "" if none is."""
  short = re.match("[^:#]*", name)[0]
  return short if short in PRETRAINED else ""


def _pick(prepared, name):
  """The entries of one term, under the keys that the term itself gave them."""
  prefix = f"{name}/"
  return {k.removeprefix(prefix): v for k, v in prepared.items() if k.startswith(prefix)}


def _checked_prepare(name, reward, prompts):
  prepared = reward.prepare(list(prompts))
  where = f"reward.names: '{name}': prepare(prompts)"
  if not isinstance(prepared, dict):
    raise UserError(f"{where} returned {type(prepared).__name__}, not a dict of arrays")
  prepared = {key: np.asarray(value) for key, value in prepared.items()}
  for key, value in prepared.items():
    if value.shape[:1] != (len(prompts),):
      raise UserError(f"{where} returned '{key}' of shape {value.shape}: "
                      f"the first axis must be the {len(prompts)} prompts")
    if value.dtype.kind in "OSU":
      raise UserError(f"{where} returned '{key}' of dtype {value.dtype}, not numbers")
  return prepared


def _checked_trace(name, images, scores):
  """`[B]` f32; shapes and dtypes are known while tracing, so that is where they are checked."""
  where = f"reward.names: '{name}'"
  if not isinstance(scores, jax.Array):
    raise UserError(f"{where} returned {type(scores).__name__}, not a JAX array")
  if scores.shape != images.shape[:1]:  # [B,1] would broadcast silently further on
    raise UserError(f"{where} returned shape {scores.shape}, not {images.shape[:1]}: "
                    "one score for each image")
  if not jnp.issubdtype(scores.dtype, jnp.floating):
    raise UserError(f"{where} returned dtype {scores.dtype}, not a float: it has no gradient")
  return scores.astype(jnp.float32)


def _on_host(name, reward):
  """A `Reward` as a black box, to be summed with other black boxes."""
  if isinstance(reward, HostReward):
    return reward
  opened = reward.opened and (lambda trial: _on_host(name, reward.opened(trial)))
  jitted = jax.jit(lambda params, images, prepared: _checked_trace(
    name, images, reward.score(params, images, prepared)))

  rows = {}                                # prompt -> what was prepared for it

  def prepare(prompts):
    new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in rows]
    if new:
      prepared = _checked_prepare(name, reward, new)
      rows.update((prompt, {key: value[i] for key, value in prepared.items()})
                  for i, prompt in enumerate(new))
    mine = [rows[prompt] for prompt in prompts]
    if len({tuple((key, value.shape) for key, value in row.items()) for row in mine}) > 1:
      return _checked_prepare(name, reward, prompts)       # padded to the longest of a call
    return {key: np.stack([row[key] for row in mine]) for key in mine[0]}

  def score(images, prompts):
    pixels = images.astype(np.float32) / 255
    return np.asarray(jitted(reward.params, pixels, prepare(prompts)))

  return HostReward(name, score, reward.range, opened=opened)
