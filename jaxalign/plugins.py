"""What other packages add, through entry points."""
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
