"""Command line: `jaxalign [NAME ...]`, or `python -m jaxalign [NAME ...]`.

`jaxalign NAME ...` is `python -m jaxalign.NAME ...`. Alone, it lists the commands and the recipes.
"""
import ast
import pathlib
import re
import runpy
import sys
import textwrap

from jaxalign.config.command import exit_status
from jaxalign.config.nearest import suggestion
from jaxalign.config.recipes import shipped_recipes
from jaxalign.errors import UserError

FOLDER = pathlib.Path(__file__).resolve().parent


def commands() -> dict[str, str]:
  """Name -> what it does, of every file beside this one that is a command; imports none."""
  found = {}
  for file in sorted(FOLDER.glob("*.py")):
    head, *body = (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").split("\n\n")
    if head.startswith("Command line:") and file.stem != "__main__":
      found[file.stem] = re.split(r"[.:;] ", " ".join(body[0].split()))[0].rstrip(".")
  return found


def overview() -> str:
  """The page that `jaxalign` alone prints."""
  lines = ["Aligns text-to-image diffusion models with rewards and preferences.", "",
           "A first run, 5 to 15 minutes on two CPU cores:",
           "  python -m jaxalign.launch --config=jaxalign:nabla_gfn", "",
           "Commands (python -m jaxalign.NAME, or jaxalign NAME; --help lists the flags):"]
  lines += [f"  {name:10s}{textwrap.shorten(text, 86, placeholder=' ...')}"
            for name, text in commands().items()]
  lines += ["", "Recipes (launch --config=jaxalign:NAME; launch --config=help:NAME explains the "
            "keys):"]
  lines += [f"  {name:24s}{ast.get_docstring(ast.parse(file.read_text('utf-8'))).splitlines()[0]}"
            for name, file in shipped_recipes().items()]
  return "\n".join(lines)


def run(argv: list[str] | None = None) -> int:
  """Runs `argv` (the process's own by default); returns the exit status."""
  argv = list(sys.argv if argv is None else argv)
  names = argv[1:2]
  if not names or names[0] in ("--help", "-help", "-h", "help"):
    return exit_status(lambda: print(overview()))
  if names[0] not in commands():
    def refuse():
      raise UserError(f"no command {names[0]!r}{suggestion(names[0], commands())}; `jaxalign` "
                      "alone lists them")
    return exit_status(refuse)
  sys.argv = [f"jaxalign {names[0]}", *argv[2:]]
  runpy.run_module(f"jaxalign.{names[0]}", run_name="__main__", alter_sys=True)   # exits itself
  return 0


if __name__ == "__main__":
  sys.exit(run())
