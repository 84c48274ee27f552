"""The table of what is right, read from the pictures of a run."""
import json

import jax
import numpy as np
import pytest

import worlds
from jaxalign.emoji import parts, quality, scenes
from jaxalign.errors import UserError


@pytest.fixture(scope="module")
def read():
  return parts.by_rule(quality.World(worlds.NAMES, worlds.drawings().take(slice(0, 4)), None, None))


def drawn(number=6):
  """So many scenes of each kind, and pictures of them `[3 number, 64, 64, 3]` uint8."""
  table = scenes.table(worlds.NAMES, np.ones((4, 12), bool))
  asked, layout = quality.ask(table, worlds.NAMES, number, jax.random.key(0))
  sheets = scenes.Sheets.of(worlds.drawings().take(slice(0, 4)))
  pictures = np.asarray(scenes.render(sheets, table, layout))
  return list(map(scenes.caption, asked)), (pictures * 255).round().astype(np.uint8)


def test_what_is_right_and_what_is_not(read):
  prompts, pictures = drawn()
  both = np.stack([pictures, np.roll(pictures, 1, 0)], 1)        # one right, one of another prompt
  found = parts.shares(both, prompts, read)
  assert tuple(found) == parts.COLUMNS
  right = parts.shares(pictures[:, None], prompts, read)
  assert all(value["mean"] == 1.0 for value in right.values())
  assert 0.5 <= found["overall"]["mean"] < 0.6 and found["colour"]["mean"] < 1
  alone = parts.shares(pictures[:1, None], prompts[:1], read)    # has no standard error
  assert parts.table([("one", alone)]).endswith("| 100 |")
  plain = [scenes.caption(scenes.parse(prompt)._replace(style="")) for prompt in prompts]
  in_style = parts.shares(pictures[:, None], plain, read, "3d")["style"]
  assert "style" not in parts.shares(pictures[:, None], plain, read) and 0 < in_style["mean"] < 1
  assert found["single"]["n"] == 12 and found["place"]["n"] == 12


def test_the_table_of_a_run(read, tmp_path):
  prompts, pictures = drawn()
  (tmp_path / "evaluations").mkdir()
  (tmp_path / "evaluations" / "prompts.json").write_text(json.dumps(
      {"held_out": prompts, "watched": []}))
  (tmp_path / "config.json").write_text(json.dumps({"config": {
      "recipe": "draft:emoji", "seed": 3, "model": {"path": "jaxalign:emoji"}}}))
  with pytest.raises(UserError, match="not a finished run"):
    parts.read_run(tmp_path, read)
  for name, images in (("base", np.roll(pictures, 1, 0)), ("tuned", pictures)):
    np.savez(tmp_path / "evaluations" / f"{name}.npz", images=images[:, None],
             features=np.zeros((len(prompts), 1, 2)))
  lines = parts.table(2 * parts.read_run(tmp_path, read)).splitlines()
  assert len(lines) == 4 and lines[2].startswith("| jaxalign:emoji | ")
  assert lines[3] == "| `draft:emoji`, seed 3 | " + " | ".join(["100 ± 0"] * 8) + " |"
