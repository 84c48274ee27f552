"""How good a model of scenes is: what is asked of it, and the figures of its card."""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxalign.devices import sharding
from jaxalign.emoji import artwork, reader, scenes
from jaxalign.emoji.artwork import STYLES
from jaxalign.errors import UserError
from jaxalign.models.pipeline import Pipeline
from jaxalign.sampling import Conditioning, Schedule, guided_output, make_sampler, rollout

STEPS, GUIDANCE = 20, 3.0
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


class World(NamedTuple):
  """Subjects and their drawings, the scenes of training and those kept from it."""
  names: list[str]
  drawings: artwork.Artwork
  trained: scenes.Table
  held_out: scenes.Table


def world(file, subjects: int = len(scenes.SUBJECTS)) -> World:
  """The first `subjects` of the world, out of the file of drawings.

  Of scenes that are kept from training, one thing is new: subject and colour of a single drawing,
  subject and number of several, the ordered pair of two.
  """
  if subjects > len(scenes.SUBJECTS):
    raise UserError(f"task.subjects={subjects}: there are {len(scenes.SUBJECTS)}")
  codes = list(scenes.SUBJECTS)[:subjects]
  drawings, names = artwork.load(file).of(codes), [scenes.SUBJECTS[code] for code in codes]
  return World(names, drawings, *tables(names, scenes.contrast(drawings)))


def tables(names, visible) -> tuple[scenes.Table, scenes.Table]:
  """Scenes of training, and those that `world` keeps from it; `visible` as `scenes.contrast`."""
  new = lambda scene: scenes.held_out(scene) == (
      ("pair",) if scene.relation else ("number",) if scene.number > 1 else ("colour",))
  return scenes.table(names, visible), scenes.table(names, visible, new)


def ask(table: scenes.Table, names, each: int, key) -> tuple[list[scenes.Scene], scenes.Drawn]:
  """`3 each` scenes to ask for: single, several and two, a style in every other one.

  A kind that the table lacks is left out. Beside them the same scenes to be drawn.
  """
  parts = [scenes.draw(table, jax.random.fold_in(key, kind), each, np.eye(3)[kind])
           for kind in range(3) if table.starts[kind + 1] > table.starts[kind]]
  drawn = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
  said = [table.scene(int(row), int(colour), names, STYLES[int(style)] if i % 2 else "")
          for i, (row, colour, style) in enumerate(zip(drawn.row, drawn.colour, drawn.style))]
  return said, drawn


def answers(asked, readings) -> dict[str, list[bool]]:
  """Which scenes are read as asked for: by kind, and by what the caption says.

  single, several, two: all that a caption of this kind says, but for the style. two_subjects: both
  are there, wherever. number, place, colour, style: of the captions that say one.
  """
  found = [(scene, reader.check(scene, reading)) for scene, reading in zip(asked, readings)]
  kinds = {"single": lambda s: not s.relation and s.number == 1,
           "several": lambda s: s.number > 1, "two": lambda s: bool(s.relation)}
  all_right = lambda parts: all(right for part, right in parts.items() if part != "style")
  return {**{kind: [all_right(parts) for scene, parts in found if of(scene)]
             for kind, of in kinds.items()},
          "two_subjects": [parts["subjects"] for scene, parts in found if scene.relation],
          **{part: [parts[part] for _, parts in found if part in parts]
             for part in ("number", "place", "colour", "style")}}


def share(right) -> dict[str, float]:
  """Mean of `[n]` yes/no answers with its 95 % interval (Wilson)."""
  right = np.asarray(right, np.float64)
  n, p, z = len(right), float(right.mean()), 1.96
  middle, scale = (p + z * z / (2 * n)), 1 + z * z / n
  half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  return {"mean": p, "low": float((middle - half) / scale), "high": float((middle + half) / scale),
          "n": n}


def choices(judge, images, asked, names, part: str) -> np.ndarray:
  """What a text-image scorer takes for the truth, `[B]` bool, of scenes that say `part`.

  It chooses among captions that differ in this part alone: "subjects", the (first) one among all;
  "number" one to four; "place" the four relations; "style" the three artists.
  """
  def variants(scene):
    if part == "subjects":
      own, rest = scene.subjects[0], scene.subjects[1:]
      return [scene._replace(subjects=(name, *rest)) for name in (
          own, *(name for name in names if name not in scene.subjects))]
    if part == "number":
      return [scene._replace(number=n) for n in (scene.number, *(
          n for n in (1, 2, 3, 4) if n != scene.number))]
    if part == "place":
      return [scene._replace(relation=r) for r in (scene.relation, *(
          r for r in scenes.RELATIONS if r != scene.relation))]
    return [scene._replace(style=s) for s in (scene.style, *(
        s for s in STYLES if s != scene.style))]

  score, out = jax.jit(judge.score), []
  for image, scene in zip(images, asked):
    captions = [scenes.caption(s) for s in variants(scene)]
    values = np.asarray(score(judge.params, np.repeat(image[None], len(captions), 0),
                              judge.prepare(captions)))
    out.append(bool((values[0] > values[1:]).all()))
  return np.array(out)
