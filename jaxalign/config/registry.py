"""Names and what they stand for: methods by module, and what other packages add (entry points)."""
import importlib
import importlib.metadata
from collections.abc import Collection

from jaxalign.errors import UserError


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


# name -> what offers `Config` (a validated dataclass) and `make(models, cfg, optim) -> Method`: a
# module, or `module:object` where one file holds several methods.
METHODS = {
    "alignprop": "jaxalign.methods.reward_gradient:alignprop",
    "b2_diffurl": "jaxalign.methods.b2_diffurl",
    "best_of_n": "jaxalign.methods.best_of_n",
    "ddpo": "jaxalign.methods.policy_gradient",
    "diff_instruct_star": "jaxalign.methods.diff_instruct_star",
    "diffusion_dpo": "jaxalign.methods.preference:diffusion_dpo",
    "dno": "jaxalign.methods.dno",
    "draft": "jaxalign.methods.reward_gradient:draft",
    "mapo": "jaxalign.methods.preference:mapo",
    "nabla_gfn": "jaxalign.methods.nabla_gfn",
    "refl": "jaxalign.methods.reward_gradient:refl",
    "sft": "jaxalign.methods.preference:sft",
}
# Those that train no weights. Their state is one row per image, their product that image's noise;
# `train/inference.py` runs them.
AT_INFERENCE = ("best_of_n", "dno")


def load_method(name: str):
  """What offers method `name`.

  Raises:
    UserError: there is none of that name; or two packages add the same one.
  """
  others = added("method", METHODS)
  if name in others:
    return others[name].load()
  if name not in METHODS:
    raise UserError(f"method.name={name!r} is unknown; choose one of "
                    f"{', '.join(sorted({*METHODS, *others}))}")
  return resolve(METHODS[name])


def resolve(path: str):
  """The module `module`, or what `module:object` names in it; imported only now."""
  module, _, inside = path.partition(":")
  module = importlib.import_module(module)
  return getattr(module, inside) if inside else module
