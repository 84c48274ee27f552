"""The compiled parts of a training step: collect and score, then update."""
import math
import time

import jax
import numpy as np
import optax

from jaxalign import methods
from jaxalign.devices import callbacks, processes, rng, sharding
from jaxalign.rewards import HostReward, mixture, weighted_sum
from jaxalign.train.experiment import Experiment, gather, placed_shapes
from jaxalign.train.pairs import PairTable


class Programs:
  """The compiled parts of a step: collect and score, then update. Nothing in the loop compiles."""

  def __init__(self, exp: Experiment, method: methods.Method, table, root,
               pairs: PairTable | None = None):
    self._exp, self._method, self._root = exp, method, root
    # What a batch is made of: ids of prompts, whose rows of `table` are gathered on the devices, or
    # pairs, gathered on the host.
    self._rows, self._gather = (pairs.rows, pairs.gather) if pairs else (lambda ids: ids, gather)
    self._batch = sharding.batch_sharding(exp.mesh)
    self._replicated = sharding.replicated(exp.mesh)
    self._table = exp.put(table, self._replicated)
    ids = np.arange(exp.config.sample.batch, dtype=np.int32)
    self._ids, self._example = exp.put_batch(ids), self._put(ids)
    self._collect = self._update = None
    # Known once compiled: bytes of one device; whether a step reads the base model; operations of
    # a step, nan where a loop of unknown length is in it.
    self.update_bytes, self.read_base, self.operations = 0, True, math.nan

  def init(self):
    """The initial state, made on the devices where it stays."""
    shardings = jax.tree.map(lambda s: s.sharding, self.state_shapes())
    return jax.jit(self._make_state, out_shardings=shardings)(
        self._exp.frozen, self._table, self._example, self._ids)

  def _make_state(self, frozen, table, rows, ids):
    key = rng.stream(self._root, rng.INIT)
    return self._method.init(key, frozen, self._gather(table, rows, ids))

  def state_shapes(self):
    """The state as `jax.ShapeDtypeStruct`s that say where it lies; computes nothing."""
    shapes = jax.eval_shape(
        self._make_state, self._exp.frozen, self._table, self._example, self._ids)
    shardings = jax.tree_util.tree_map_with_path(
        lambda p, s: self._batch if sharding.path_of(p).startswith("replay/") else s,
        sharding.param_shardings(shapes, self._exp.mesh))
    return placed_shapes(shapes, shardings)

  def _put(self, ids):
    return self._exp.put_batch(self._rows(ids))

  def compile(self, state) -> str:
    """Compiles both programs ahead of time for this state; returns a line about it."""
    begun = time.monotonic()
    with processes.progress(total=2, desc="compiling", unit="program", leave=False) as bar:
      programs, self.read_base, self.operations = [], False, 0.0
      for traced in self.traced(state).values():
        self.read_base |= reads(traced, 1, "base", "params")
        self.operations += operations(traced.jaxpr.jaxpr, math.nan)
        with callbacks.lowering(self._exp.config.method_name):
          programs.append(traced.lower().compile())
        bar.update()
    self._collect, self._update = programs
    processes.barrier("compiled")
    self.update_bytes = needed_bytes(self._update)
    return (f"compiled in {time.monotonic() - begun:.0f} s, update needs "
            f"{self.update_bytes / 2**20:.0f} MiB")

  def traced(self, state) -> dict[str, jax.stages.Traced]:
    """The programs "collect" and "update" for this state (arrays or shapes), not compiled yet."""
    exp, method = self._exp, self._method

    def collect(state, frozen, table, rows, sample_ids, key):
      experience = method.collect(state, frozen, self._gather(table, rows, sample_ids), key)
      if "final" not in experience:
        return experience, {}
      images = exp.models.decode(frozen["decoder"], experience["final"])
      if isinstance(exp.reward, HostReward):
        return experience, (images * 255).round().astype(np.uint8)
      return experience, exp.reward.terms(frozen["reward"], images, experience["batch"]["prepared"])

    def update(state, frozen, experience, rewards, key):
      state, values = method.update(state, frozen, experience, rewards, key)
      # Finite losses can leave parameters that are not; such a state must never be saved.
      return state, {**values, "train/policy_norm": optax.tree.norm(method.product(state))}

    key = jax.eval_shape(lambda: rng.stream(self._root, rng.ROLLOUT))
    on_batch = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=self._batch)
    # Images to be scored here stay apart; scores are small, and every process reads all of them.
    on_host = isinstance(exp.reward, HostReward)
    collect = jax.jit(collect, out_shardings=(
        self._batch, self._batch if on_host else self._replicated)).trace(
            state, exp.frozen, self._table, self._example, self._ids, key)
    experience = jax.tree.map(on_batch, collect.out_info[0])
    rewards = (on_batch(jax.ShapeDtypeStruct(self._ids.shape, np.float32))
               if "final" in experience else None)
    shardings = jax.tree.map(lambda a: a.sharding, state)
    update = jax.jit(update, donate_argnums=0, out_shardings=(shardings, self._replicated)).trace(
        state, exp.frozen, experience, rewards, key)
    return {"collect": collect, "update": update}

  def collect(self, state, step: int, ids, prompts):
    """Experience, `{term: [B]}` and rewards `[B]` of one batch; `{}` and None if none are scored.

    Args:
      ids: `[B]` int32, indices of prompts, or of pairs. prompts: the prompt of every index.
    """
    key = rng.stream(self._root, rng.ROLLOUT, step)
    experience, scored = self._collect(
        state, self._exp.frozen, self._table, self._put(ids), self._ids, key)
    if "final" not in experience:
      return experience, {}, None
    reward = self._exp.reward
    if isinstance(reward, HostReward):
      scored = processes.by_rows(reward.terms, processes.fetch(scored),
                                 [prompts[i] for i in ids])
    terms = mixture.comparable(
        self._exp.config.reward.normalise, scored, mixture.compared(self._exp.config.group, ids))
    rewards = processes.put(weighted_sum(reward.weights, terms), self._batch)
    return experience, scored, rewards

  def update(self, state, experience, rewards, step: int):
    key = rng.stream(self._root, rng.UPDATE, step)
    return self._update(state, self._exp.frozen, experience, rewards, key)


def reads(traced: jax.stages.Traced, argument: int, *names: str) -> bool:
  """Whether a program reads the entry `names` of its argument of that number, nested dicts."""
  jaxpr, keys = traced.jaxpr.jaxpr, jax.tree_util
  wanted = (keys.SequenceKey(argument), *map(keys.DictKey, names))
  entry = lambda path: path[:len(wanted)] == wanted
  own = {id(var) for (path, _), var in zip(
      keys.tree_leaves_with_path(traced.args_info[0]), jaxpr.invars, strict=True) if entry(path)}
  used = [*jaxpr.outvars, *(var for equation in jaxpr.eqns for var in equation.invars)]
  return any(id(var) in own for var in used)


def operations(jaxpr, open_ended: float = 1.0) -> float:
  """Multiplications and additions of the matrix products and convolutions of a jaxpr.

  A scan's body counts as often as it runs, a kernel's for every cell of its grid, the larger branch
  of a conditional once, the body of an open-ended loop `open_ended` times.
  """
  total = 0.0
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      shape = eqn.invars[0].aval.shape
      total += 2 * eqn.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
    elif name == "conv_general_dilated":
      kernel = eqn.invars[1].aval
      features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
      total += 2 * eqn.outvars[0].aval.size * kernel.size / features
    elif name == "cond":
      total += float(np.max([operations(b.jaxpr, open_ended) for b in params["branches"]]))
    else:
      times = {"scan": params.get("length"), "while": open_ended}.get(name, 1)
      if name == "pallas_call":
        times = math.prod(params["grid_mapping"].grid)
      elif name == "shard_map":                  # what every chip does
        times = params["mesh"].size
      inner = [v for v in params.values() if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
      inside = sum(operations(getattr(v, "jaxpr", v), open_ended) for v in inner)
      total += times * inside if inside else 0.0         # not nan for a loop without products
  return total


def needed_bytes(compiled) -> int:
  """Bytes of one device that a compiled program takes, by XLA's own buffer assignment."""
  memory = compiled.memory_analysis()
  if memory is None:                      # some backends do not say
    return 0
  return (memory.argument_size_in_bytes + memory.output_size_in_bytes
          - memory.alias_size_in_bytes + memory.temp_size_in_bytes)
