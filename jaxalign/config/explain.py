"""Every key of a recipe in words: value, type and range from the dataclasses, text from their docs.
"""
import dataclasses
import inspect
import re
import textwrap
import typing
from typing import Annotated, Literal

from jaxalign.config import registry
from jaxalign.config.fields import Range
from jaxalign.config.recipes import default, load_recipe
from jaxalign.config.schema import GROUPS
from jaxalign.errors import UserError

HELP = "--config=help"


def wanted(argv: list[str]) -> str | None:
  """The recipe that `--config=help:RECIPE` asks about, "" for `--config=help`; else None."""
  for arg in argv[1:]:
    if arg == HELP or arg.startswith(f"{HELP}:"):
      return arg[len(HELP) + 1:]
  return None


def explain(recipe: str = "") -> str:
  """All keys of a recipe, `NAME[:ARG]` of a shipped one or `FILE.py[:ARG]`; "" is the main job's.

  Raises:
    UserError: there is no such recipe, or it is one of pretraining.
  """
  recipe = recipe or "nabla_gfn"
  name = recipe if ".py" in recipe or recipe.startswith("jaxalign:") else f"jaxalign:{recipe}"
  config = load_recipe(name)
  if "task" in config:
    raise UserError(f"--config=help:{recipe}: a pretraining recipe; its file explains its keys")
  defaults = default(config.method.name)
  classes = {"method": registry.load_method(config.method.name).Config, **GROUPS}
  lines = [f"Keys of {name}, as --config.KEY=VALUE. Where the recipe has something else than the "
           "default, that follows.", "", f"seed = {config.seed}   whole number from 0",
           "    Of everything that is drawn."]
  for group, cls in classes.items():
    lines += ["", f"[{group}] {_first(cls)}"]
    texts = explanations(cls)
    for key, kind in typing.get_type_hints(cls, include_extras=True).items():
      value, usual = config[group][key], defaults[group][key]
      other = f"   (default {usual!r})" if value != usual else ""
      lines.append(f"{group}.{key} = {value!r}   {spoken(kind)}{other}")
      lines += textwrap.wrap(texts.get(key, ""), 96, initial_indent="    ",
                             subsequent_indent="    ")
  return "\n".join(lines)


def spoken(kind) -> str:
  """A field's type and range in words."""
  if typing.get_origin(kind) is Annotated:
    base, *limits = typing.get_args(kind)
    limit = next((item for item in limits if isinstance(item, Range)), Range(-float("inf")))
    if base is int:
      return f"whole number from {limit.low:g}"
    return f"number from {limit.low:g}" + (
        f" to below {limit.high:g}" if limit.high < float("inf") else "")
  if typing.get_origin(kind) is Literal:
    return "one of " + ", ".join(map(repr, typing.get_args(kind)))
  if typing.get_origin(kind) is tuple:
    return f"several, each: {spoken(typing.get_args(kind)[0])}"
  return {bool: "True or False", str: "text", float: "number", int: "whole number"}.get(
      kind, str(kind))


def explanations(cls) -> dict[str, str]:
  """Field -> its text in the docstrings of the class and of those it inherits from.

  There, "name: text" or "name, other: text" begins a line, or a sentence or clause on one.
  """
  names = "|".join(sorted((field.name for field in dataclasses.fields(cls)), key=len, reverse=True))
  start = re.compile(rf"(?:^|(?<=[.;)]) )((?:{names})(?:,? (?:and )?(?:{names}))*)"
                     r"(?: \([^)]*\))?:\s", re.MULTILINE)
  found = {}
  for part in reversed(cls.__mro__):
    doc = inspect.cleandoc(part.__dict__.get("__doc__") or "")
    if not dataclasses.is_dataclass(part) or doc.startswith(f"{part.__name__}("):
      continue                                       # the signature that dataclasses write
    _, _, body = doc.partition("Attributes:")
    text = "\n".join(line.strip() for line in (body or doc).splitlines())
    marks = list(start.finditer(re.sub(r"\n(?=[^\n])", " ", text) if not body else text))
    text = marks[0].string if marks else text
    for mark, following in zip(marks, [*marks[1:], None]):
      words = " ".join(text[mark.end():following.start() if following else None].split())
      for name in re.findall(rf"\b(?:{names})\b", mark[1]):
        found[name] = words
  return found


def _first(cls) -> str:
  doc = inspect.cleandoc(cls.__doc__ or "")
  return "" if doc.startswith(f"{cls.__name__}(") else doc.splitlines()[0] if doc else ""
