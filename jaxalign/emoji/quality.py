"""How good a model of emoji is: the figures of its card."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxalign.devices import sharding
from jaxalign.emoji.colours import color_accuracy
from jaxalign.emoji.drawings import COLOURS, STYLES, Drawings, caption, held_out
from jaxalign.emoji.scorers import emoji_clip, emoji_judge
from jaxalign.models.pipeline import Pipeline
from jaxalign.sampling import Conditioning, Schedule, guided_output, make_sampler, rollout

STEPS, GUIDANCE, CHOICES = 20, 3.0, 20
_BATCH = 64


@functools.lru_cache(maxsize=2)
def _program(family: type[Pipeline], networks: tuple, scheduler: tuple, guidance: float):
  """Compiled sampling; networks and schedule are what a program depends on, not the weights."""
  pipeline = family(dict(networks), {}, {}, {})
  schedule = Schedule.from_config(dict(scheduler))
  one = schedule.one_step is not None
  sampler = make_sampler(schedule, 1 if one else STEPS, kind="one_step" if one else "ddim", eta=0.0,
                         spacing="", final="", variance="small")
  output = guided_output(pipeline.denoise, 1.0 if one else guidance)

  @jax.jit
  def sample(variables, decoder, conditioning, ids, key):
    trajectory = rollout(output, variables, sampler, conditioning, key, ids, pipeline.latent_shape)
    return pipeline.decode_images(decoder, trajectory.final)
  return sample


def draw(pipeline: Pipeline, captions: list[str], seed: int = 0, label: str = "drawing",
         guidance: float = GUIDANCE):
  """`[len(captions), S, S, 3]` f32 in [0, 1]: 20 DDIM steps without noise (Euler's on a flow), or
  the one step of a one-step generator, which has no guidance."""
  sample = _program(type(pipeline), tuple(pipeline.networks.items()), tuple(
      (k, v) for k, v in pipeline.scheduler_config.items() if not isinstance(v, (list, dict))),
      guidance)
  mesh = sharding.make_mesh(-1, 1, 1)
  everywhere, rows_apart = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  variables, decoder = jax.device_put((pipeline.variables, pipeline.params["vae"]), everywhere)
  key = jax.device_put(jax.random.key(seed), everywhere)
  encode = jax.jit(pipeline.encode_prompts)
  text = lambda prompts: encode(pipeline.text_params, pipeline.tokenize(prompts))
  empty = jax.tree.map(lambda a: jnp.repeat(a, _BATCH, 0), text([""]))
  images = []
  with tqdm(total=len(captions), desc=label, unit="img", leave=False) as bar:
    for i in range(0, len(captions), _BATCH):
      part = captions[i:i + _BATCH]
      cond = text(part + [""] * (_BATCH - len(part)))          # the last batch is filled up
      ids = jnp.arange(i, i + _BATCH, dtype=jnp.int32)
      conditioning, ids = jax.device_put((Conditioning(cond, empty), ids), rows_apart)
      images.append(np.asarray(sample(variables, decoder, conditioning, ids, key)))
      bar.update(len(part))
  return np.concatenate(images)[:len(captions)]


def reconstruction_error(images, reconstructed) -> dict[str, float]:
  """Mean absolute and root mean squared error of `[B, S, S, 3]` in [0, 1]."""
  gap = np.asarray(images, np.float64) - np.asarray(reconstructed, np.float64)
  return {"mean_absolute_error": float(np.abs(gap).mean()),
          "root_mean_squared_error": float(np.sqrt((gap ** 2).mean()))}


def share(right) -> dict[str, float]:
  """Mean of `[n]` yes/no answers with its 95 % interval (Wilson)."""
  right = np.asarray(right, np.float64)
  n, p, z = len(right), float(right.mean()), 1.96
  middle, scale = (p + z * z / (2 * n)), 1 + z * z / n
  half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  return {"mean": p, "low": float((middle - half) / scale), "high": float((middle + half) / scale),
          "n": n}


def trained_pairs(drawings: Drawings) -> list[tuple[str, str]]:
  """All (name, colour) that training sees."""
  return [(str(name), colour) for name in drawings.names for colour in COLOURS
          if not held_out(str(name), colour)]


def ranks_first(scorer, images, captions, wrong) -> np.ndarray:
  """Whether each image's caption scores above all its wrong ones, `[B]` bool.

  Args:
    wrong: `[B][K]` captions.
  """
  score = jax.jit(scorer.score)
  of = lambda texts: np.asarray(score(scorer.params, images, scorer.prepare(texts)))
  own = of(captions)
  best = np.max([of([row[k] for row in wrong]) for k in range(len(wrong[0]))], 0)
  return own > best


def measure(pipeline: Pipeline, drawings: Drawings, images: int, seed: int = 0):
  """Figures of a model on captions of trained name-colour pairs, without a style.

  colour: the border has the named colour (`color_accuracy`).
  judge_20, clip_20: the scorer ranks the image's caption above 19 random ones.
  judge_20_names: the same where the wrong ones differ in the name only.
  noto, twemoji: share the judge takes for each vendor's style.

  Returns:
    Figures with 95 % intervals, images `[n, S, S, 3]`, their captions.
  """
  generator = np.random.default_rng(seed)
  pairs = trained_pairs(drawings)
  chosen = [pairs[i] for i in generator.integers(len(pairs), size=images)]
  captions = [caption(*pair) for pair in chosen]
  drawn = draw(pipeline, captions, seed, "drawing samples")
  return {**score(drawn, chosen, drawings, generator)}, drawn, captions


def score(drawn, chosen, drawings: Drawings, generator) -> dict[str, dict]:
  """The figures of `measure` for images `[n, S, S, 3]` of `chosen` (name, colour)."""
  captions = [caption(*pair) for pair in chosen]
  names = list(map(str, drawings.names))

  def others(colour_of):
    return [[caption(generator.choice([n for n in names if n != name]), colour_of(colour))
             for _ in range(CHOICES - 1)] for name, colour in chosen]
  anywhere = others(lambda _: str(generator.choice(COLOURS)))
  same_colour = others(lambda colour: colour)
  judge, clip, rule = emoji_judge(), emoji_clip(), color_accuracy()
  vendor = np.asarray(judge.style(judge.params, drawn)).argmax(-1)
  return {
      "colour": share(rule.score(rule.params, jnp.asarray(drawn), rule.prepare(captions))),
      "judge_20": share(ranks_first(judge, drawn, captions, anywhere)),
      "judge_20_names": share(ranks_first(judge, drawn, captions, same_colour)),
      "clip_20": share(ranks_first(clip, drawn, captions, anywhere)),
      **{style: share(vendor == i) for i, style in enumerate(STYLES)},
  }
