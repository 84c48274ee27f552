"""The docs name what the code logs."""
import re

import runs

LOGGED = re.compile(r'"((?:train|loss|eval|noise)/[a-z0-9_]+)"')


def test_every_logged_key_is_documented():
  docs = "".join(file.read_text() for file in (runs.ROOT / "docs").rglob("*.md"))
  keys = {key for file in (runs.ROOT / "jaxalign").rglob("*.py")
          for key in LOGGED.findall(file.read_text())}
  assert len(keys) > 30
  # Of a score all vectors' mean, and of an evaluation the change's error, are described once.
  missing = {key for key in keys
             if re.sub(r"_vector$|_change(_sem)?$", "", key) + "`" not in docs}
  assert not missing


def rows_of_files():
  """Cells of the tables of docs/files.md."""
  lines = (runs.ROOT / "docs" / "files.md").read_text().splitlines()
  rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines
          if line.startswith("| ") and not line.startswith("| format")]
  assert len(rows) > 35 and all(len(row) == 5 for row in rows)
  return rows


def test_every_row_of_files_names_its_test():
  for row in rows_of_files():
    file, _, name = row[-1].strip("`").partition("::")
    assert f"\ndef {name}(" in (runs.ROOT / "tests" / file).read_text(), row


def test_what_files_says_of_errors_is_printed():
  """Every phrase is in the code, joined where a string goes over several lines of it."""
  join = re.compile(r'"\s*\n\s*f?"')
  code = "".join(join.sub("", file.read_text()) for file in (runs.ROOT / "jaxalign").rglob("*.py"))
  refused = [row[3] for row in rows_of_files()]
  assert sum(cell.startswith("`") for cell in refused) > 25
  for cell in refused:
    assert cell == "no line" or cell.strip("`") in code, cell


def test_what_files_says_of_errors_is_tested():
  """Every phrase is in a test, but for what it leaves open in braces."""
  tests = "".join(file.read_text().replace("\\", "") for file in
                  (runs.ROOT / "tests").rglob("test_*.py") if file.name != "test_docs.py")
  for row in rows_of_files():
    for part in re.split(r"\{.*?\}", row[3].strip("`")):
      assert part == "no line" or part in tests, row


def test_every_command_of_files_is_one():
  text = (runs.ROOT / "docs" / "files.md").read_text()
  source = (runs.ROOT / "jaxalign" / "export.py").read_text()
  for format in re.findall(r"--format=(\w+)", text):
    assert f'"{format}"' in source
