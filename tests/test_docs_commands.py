"""Every command of README and docs is taken by what it calls, and what README says is short.

A command is parsed by the command itself, its recipe is made and its keys are checked; a script has
the flags that are given to it. `test_commands.py` and its like run each of the commands.
"""
import functools
import pathlib
import re
import runpy
import shlex
import sys

import pytest

import runs
from jaxalign.__main__ import commands as own_commands
from jaxalign.config import recipes
from jaxalign.config.command import _parse
from jaxalign.config.explain import explain, wanted
from jaxalign.pretrain.config import parse as parse_pretraining

PAGES = [runs.ROOT / "README.md", *sorted((runs.ROOT / "docs").rglob("*.md"))]
# What stands for something of the reader's. The rest of a command is to be as it is written.
STANDS_FOR = {"RECIPE": "jaxalign:nabla_gfn:sd15", "configs/NAME.py": "configs/nabla_gfn.py",
              "help:NAME": "help:nabla_gfn", "configs/rwr.py": "configs/ddpo.py"}
LEFT_OUT = re.compile(r"\.\.\.$|\[--.*?\]|\(or .*?\)|\bMORE\b|  # .*")
CALLS = re.compile(r"^(?:\S*/)?python3?$|^jaxalign$|^launch/")
PREPARES = {"source", "echo", "pip", "vllm"}             # not of this project


def blocks(text: str) -> list[str]:
  """Lines of the bash blocks, continued ones joined, as a shell would take them one by one."""
  code = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ")
  return [part for line in code.splitlines() for part in line.split(" && ") if line.strip()]


def spans(text: str) -> list[str]:
  """Commands in code spans and indented code."""
  prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
  found = re.findall(r"`(python [^`]+)`", " ".join(prose.split("\n")))
  return found + re.findall(r"^    (python .*)$", prose, re.M)


def page_commands(file: pathlib.Path) -> list[list[str]]:
  text = file.read_text()
  found = []
  for line in [*blocks(text), *spans(text)]:
    line = LEFT_OUT.sub("", line)
    for name, instead in STANDS_FOR.items():
      line = line.replace(name, instead)
    found.append(shlex.split(line))
  return found


EVERY = [(str(file.relative_to(runs.ROOT)), words) for file in PAGES
         for words in page_commands(file)]


def test_commands_are_found():
  text = ("a `python -m x\ny` b\n```bash\none \\\n  two && three  # why\n```\n\n"
          "    python z (or a)\n```python\npython no\n```\n")
  assert blocks(text) == ["one    two", "three  # why"]
  assert spans(text) == ["python -m x y", "python z (or a)"]
  assert len(EVERY) > 50 and len({page for page, _ in EVERY}) > 12
  ways = {words[2] for _, words in EVERY if words[1:2] == ["-m"]}
  assert {f"jaxalign.{name}" for name in own_commands()} <= ways     # each is shown somewhere


@pytest.mark.parametrize("page, words", EVERY, ids=[f"{p}:{' '.join(w)[:60]}" for p, w in EVERY])
def test_command_of_the_docs(page, words, monkeypatch):
  monkeypatch.chdir(runs.ROOT)
  if pathlib.Path(words[0]).name in PREPARES:
    return extras_exist(words)
  assert CALLS.match(words[0]), f"{page}: what is {words[0]}?"
  if words[1] != "-m":
    return has_flags(runs.ROOT / words[1], words[2:])
  name, args = words[2], words[3:]
  if name in ("venv", "pytest"):
    for target in args:
      assert name == "venv" or target.startswith("-") or not target.endswith(".py") or (
          runs.ROOT / target).exists() or "rwr" in target        # of the page's own method
    return
  command = name.removeprefix("jaxalign.")
  if name == "jaxalign":
    assert not args
  elif command in own_commands():
    takes(command, args, monkeypatch)
  else:
    file = runs.ROOT / name.replace(".", "/")
    has_flags(file / "__main__.py" if file.is_dir() else file.with_suffix(".py"), args)


def extras_exist(words):
  setup = (runs.ROOT / "setup.py").read_text()
  for extra in re.findall(r"\[(\w[\w-]*)\]", " ".join(words)):
    assert f'"{extra}": ' in setup, extra


def has_flags(file: pathlib.Path, args: list[str]):
  source = file.read_text()
  for arg in args:
    if arg.startswith("--"):
      flag = arg[2:].partition("=")[0]
      assert re.search(rf'"(--)?{flag}"', source), f"{file}: {arg}"


def takes(command: str, args: list[str], monkeypatch):
  """The command parses this; `launch` also makes the recipe and checks it."""
  monkeypatch.setattr(sys, "argv", [command, *args])         # where overrides of keys are looked up
  if command == "inspect":
    assert len(args) <= 1
  elif command == "launch" and (asked := wanted([command, *args])) is not None:
    assert explain(asked)
  else:
    module = runpy.run_module(f"jaxalign.{command}", run_name="parsed")
    _parse([command, *args], module["_FLAGS"], required=())
    config = module["_CONFIG"].value if command == "launch" else None
    if config is not None:
      (parse_pretraining if "task" in config else recipes.parse)(config)


def test_a_wrong_command_is_found(monkeypatch):
  for command, args in (("sample", ["--chekpoint=a"]), ("launch", ["--config=configs/none.py"]),
                        ("launch", ["--config=jaxalign:ddpo", "--config.train.stpes=3"]),
                        ("launch", ["--config=jaxalign:ddpo", "--config.train.steps=0"])):
    with pytest.raises(Exception, match="chekpoint|none.py|stpes|train.steps=0"):
      takes(command, args, monkeypatch)
  with pytest.raises(AssertionError):
    has_flags(runs.ROOT / "benchmarks" / "alarm.py", ["--modle=a"])
  with pytest.raises(AssertionError):
    extras_exist(["pip", "install", "-e", ".[votes]"])


@functools.cache
def links() -> list[tuple[pathlib.Path, str]]:
  code = re.compile(r"^```.*?^```|`[^`\n]*`", re.M | re.S)
  return [(file, target) for file in PAGES
          for target in re.findall(r"\]\(([^)\s]+)\)", code.sub("", file.read_text()))]


def test_links_lead_somewhere():
  assert len(links()) > 100
  for file, target in links():
    path, _, _ = target.partition("#")
    if path and not re.match(r"\w+://", path):
      assert (file.parent / path).exists(), f"{file}: {target}"


def test_every_page_is_in_the_index():
  """Of docs/README.md, or of the list of methods, which is in it."""
  listed = {(file.parent / target).resolve() for file, target in links()
            if file.name == "README.md" and file.parent != runs.ROOT}
  pages = {file.resolve() for file in PAGES[1:]}
  assert pages - listed <= {(runs.ROOT / "docs" / "README.md").resolve()}


def test_readme_is_short_and_sets_up_in_two_commands():
  text = (runs.ROOT / "README.md").read_text()
  assert len(text.split()) <= 900
  set_up = [line for line in text.splitlines() if line.startswith("python3 -m venv")]
  assert len(set_up) == 2 and "jaxalign.launch" in set_up[0] and "pytest" in set_up[1]
  assert text.index("![") < text.index("## Run it") < text.index("### What it printed")
  assert text.count("\n**I have ") == 3 and text.count("\n**My ") + text.count("\n**I want ") == 2
