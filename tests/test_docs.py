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
