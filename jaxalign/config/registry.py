"""Names and what they stand for: methods by file, and what other packages add (entry points)."""
import functools
import importlib
import importlib.metadata
import importlib.util
import pkgutil
from collections.abc import Collection

from jaxalign.errors import UserError

# What the `Config` of a method may say of it, in attributes or properties that are no keys, and
# what holds where it says nothing.
NEEDS = {
    "reads_pairs": False,             # it trains on preference pairs: nothing is sampled and scored
    "at_inference": False,            # it trains no weights: the noise of each image is its product
    "reward_gradients": False,        # the reward must be differentiable
    "without_gradients": "",          # ... and what a user may do if it is not
    "noise_at_every_step": False,     # no transition of the sampler may be deterministic
    "strength": "",                   # key whose 0 keeps the policy at the reference
    "group": 1,                       # trajectories of each prompt in a batch, side by side
    "minibatches": 1,                 # optimiser steps that share a batch
}


def need(method, name: str):
  """What the config of a method says of the need `name`."""
  return getattr(method, name, NEEDS[name])


def added(kind: str, known: Collection[str]) -> dict[str, importlib.metadata.EntryPoint]:
  """Entry points of the group `jaxalign.{kind}s`, by name.

  Raises:
    UserError: a name is one of `known`, or two packages add it.
  """
  found = {}
  for entry in importlib.metadata.entry_points(group=f"jaxalign.{kind}s"):
    if entry.name in known or entry.name in found:
      raise UserError(f"{kind} '{entry.name}' is registered twice; {entry.value} is the second: "
                      "uninstall or rename one")
    found[entry.name] = entry
  return found


@functools.cache
def own_methods() -> tuple[str, ...]:
  """Names of the methods of this package: the files in `jaxalign/methods`."""
  folder = importlib.util.find_spec("jaxalign.methods").submodule_search_locations
  return tuple(sorted(m.name for m in pkgutil.iter_modules(folder) if not m.ispkg))


def load_method(name: str):
  """What offers method `name`: its `Config` and `make`.

  Raises:
    UserError: there is none of that name; or two packages add the same one.
  """
  own = own_methods()
  others = added("method", own)
  if name in others:
    return others[name].load()
  if name not in own:
    raise UserError(f"method.name={name!r} is unknown; choose one of "
                    f"{', '.join(sorted({*own, *others}))}")
  return importlib.import_module(f"jaxalign.methods.{name}")


def methods_for_any_reward() -> list[str]:
  """Names of own methods that neither differentiate the reward nor train on pairs."""
  configs = {name: load_method(name).Config() for name in own_methods()}
  return [name for name, config in configs.items()
          if not need(config, "reward_gradients") and not need(config, "reads_pairs")]


def resolve(path: str):
  """The module `module`, or what `module:object` names in it; imported only now."""
  module, _, inside = path.partition(":")
  module = importlib.import_module(module)
  return getattr(module, inside) if inside else module
