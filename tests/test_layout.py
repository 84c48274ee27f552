"""The house: which folder may import which, what the top level holds, how long a file may be."""
import ast
import graphlib
import pathlib

import pytest

import runs

PACKAGE = runs.ROOT / "jaxalign"
FOREIGN = {"torch", "diffusers"}


def imports(source: str) -> set[str]:
  """Modules that the source imports anywhere in it, `a.b` and `a.b.c` for `from a.b import c`."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
  return found


def room(file: pathlib.Path) -> str:
  """The folder of `jaxalign` that the file lies in; a file at the top is a room of its own."""
  return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
  """Every room with those that it imports from."""
  rooms = {room(file) for file in PACKAGE.rglob("*.py")}
  found = {name: set() for name in rooms}
  for file in PACKAGE.rglob("*.py"):
    for name in imports(file.read_text()):
      parts = name.split(".")
      if parts[0] == "jaxalign" and len(parts) > 1 and parts[1] in rooms - {room(file)}:
        found[room(file)].add(parts[1])
  return found


def test_the_test_sees_every_kind_of_import():
  source = ("import a.b\ndef f():\n  from jaxalign import train\n"
            "  from jaxalign.data.pairs import x\n")
  assert imports(source) == {"a.b", "jaxalign", "jaxalign.train", "jaxalign.data.pairs",
                             "jaxalign.data.pairs.x"}
  with pytest.raises(graphlib.CycleError):
    graphlib.TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).prepare()


def test_no_circle_between_rooms(arrows):
  graphlib.TopologicalSorter(arrows).prepare()         # a CycleError names the rooms in it


@pytest.mark.parametrize("lower, upper", [
    ("models", "methods"), ("methods", "train"), ("sampling", "models"), ("config", "methods"),
    *((floor, "emoji") for floor in ("config", "data", "metrics", "rewards", "train")),
    *((floor, "pretrain") for floor in ("emoji", "train"))])
def test_no_import_upward(arrows, lower, upper):
  assert upper in arrows and upper not in arrows[lower]


def test_methods_know_no_network_library():
  used = {file.name: {name.split(".")[0] for name in imports(file.read_text())}
          for file in (PACKAGE / "methods").glob("*.py")}
  assert "jax" in set().union(*used.values())
  assert not {file for file, names in used.items() if "flax" in names}


def test_foreign_libraries_are_met_where_files_are_converted_and_rewards_called():
  """And there only within functions: the package works without them."""
  users = {file for file in PACKAGE.rglob("*.py")
           if FOREIGN & {name.split(".")[0] for name in imports(file.read_text())}}
  users_elsewhere = {file.name for file in users if room(file) != "convert"}
  assert users_elsewhere == {"pytorch.py"} and len(users) > 1
  for file in users:
    top = [node for node in ast.parse(file.read_text()).body
           if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not FOREIGN & {name.split(".")[0] for name in imports(ast.unparse(top))}


def test_the_top_level_holds_commands():
  for file in PACKAGE.glob("*.py"):
    if file.name not in ("__init__.py", "errors.py"):
      assert '\nif __name__ == "__main__":\n' in file.read_text(), file.name


def test_no_file_is_long():
  files = [file for folder in ("jaxalign", "configs", "benchmarks")
           for file in (runs.ROOT / folder).rglob("*.py")]
  assert len(files) > 100
  assert not {str(file): n for file in files if (n := len(file.read_text().splitlines())) > 600}
