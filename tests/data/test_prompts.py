"""Prompt files: every form that people have, and what is said of those that cannot be read."""
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxalign.data.prompts import read_prompts, read_sets
from jaxalign.errors import UserError

THREE = ["a cat, anime", "a dog", "a bird"]
OBJECTS = [{"tag": "single", "prompt": prompt} for prompt in THREE]


def read(tmp_path, name, content):
  (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  return read_prompts("data.prompts", str(tmp_path / name))


@pytest.mark.parametrize("name, content", [
    ("a.txt", "a cat, anime\na dog\n\n  a bird  \n"),
    ("a.prompts", "a cat, anime\na dog\na bird"),
    ("bom.txt", "\ufeffa cat, anime\r\na dog\r\na bird\r\n"),
    ("a.json", json.dumps(THREE)),
    ("indented.json", "\ufeff" + json.dumps(THREE, indent=4)),
    ("objects.json", json.dumps(OBJECTS)),
    ("captions.json", json.dumps([{"caption": prompt} for prompt in THREE])),
    ("a.jsonl", "".join(json.dumps(row) + "\n" for row in OBJECTS) + "\n"),
    ("strings.jsonl", "\ufeff" + "\r\n".join(map(json.dumps, THREE))),
    ("a.csv", 'prompt,category\n"a cat, anime",animals\r\na dog,animals\na bird,\n'),
    ("A.CSV", '\ufeffid,prompt\n1,"a cat, anime"\n2,a dog\n3,a bird\n'),
    ("a.tsv", "id\ttext\n1\ta cat, anime\n2\ta dog\n3\ta bird\n"),
])
def test_forms(tmp_path, name, content):
  assert read(tmp_path, name, content) == THREE


def test_parquet(tmp_path):
  pq.write_table(pa.table({"id": [1, 2, 3], "caption": THREE}), tmp_path / "a.parquet")
  assert read_prompts("data.prompts", str(tmp_path / "a.parquet")) == THREE


@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\x0b", "\x0c"])
def test_only_line_feeds_end_a_prompt(tmp_path, mark):
  assert read(tmp_path, "a.txt", f"a poster:{mark}line two\na dog\n") == [
      f"a poster:{mark}line two", "a dog"]
  line = json.dumps({"prompt": f"a poster:{mark}line two"}, ensure_ascii=False)
  assert len(read(tmp_path, "a.jsonl", f"{line}\n{line}\n")) == 2


def test_a_prompt_over_two_lines_of_a_table(tmp_path):
  assert read(tmp_path, "a.csv", 'prompt\n"one\ntwo"\nthree\n') == ["one\ntwo", "three"]


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", "\n \n", r"a\.txt: the file has no prompts"),
    ("a.txt", "a cat\n".encode("utf-16"), r"a\.txt: not UTF-8 text \(.* at byte 0\); save it as"),
    ("a.json", '{"prompts": []}', r"a\.json: holds one dict, not a list of prompts"),
    ("a.json", "[1, ", r"a\.json: not JSON"),
    ("a.json", "[" * 100_000, r"a\.json: not JSON"),
    ("a.json", '["a", 2]', r"a\.json: row 2: 2 is not a text"),
    ("a.json", '[{"prompt": null}]', r"a\.json: row 1: prompt: null is not a text"),
    ("a.jsonl", '"a"\n{"text2": "b"}\n', r"row 2: has no prompt or caption or text; there are"),
    ("a.jsonl", '"a"\nb\n', r"a\.jsonl: row 2: not JSON"),
    ("a.csv", "a cat\na dog\n", r"a\.csv: has no column prompt or .*; the first line has a cat"),
    ("a.csv", "", r"a\.csv: has no column prompt or .*; the first line has nothing"),
    ("a.csv", "id,prompt\n1\n", r"a\.csv: row 1: prompt: null is not a text"),
    ("a.csv", 'prompt\n"a\n', r"a\.csv: row \d: not CSV"),
    ("a.parquet", b"PAR1", r"a\.parquet: not a Parquet file that can be read"),
])
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
  with pytest.raises(UserError, match=r"^data\.prompts=.*" + message):
    read(tmp_path, name, content)


def test_missing_file_and_column(tmp_path):
  with pytest.raises(UserError, match=r"data\.prompts=.*none\.txt: No such file"):
    read_prompts("data.prompts", str(tmp_path / "none.txt"))
  pq.write_table(pa.table({"words": THREE}), tmp_path / "a.parquet")
  with pytest.raises(UserError, match=r"has no column prompt or caption or text; there are words"):
    read_prompts("data.prompts", str(tmp_path / "a.parquet"))


def write(folder, name, prompts):
  (folder / name).write_text("\n".join(prompts))
  return str(folder / name)


def test_some_prompts_are_held_out_where_none_are_named(tmp_path):
  mine = [f"a prompt of number {k}" for k in range(100)]
  file = write(tmp_path, "mine.txt", [*mine, mine[3]])        # one of them twice
  sets = read_sets(file, "", 32)
  assert len(sets.evaluation) == 10 and sets.held_out == sets.evaluation
  assert not set(sets.training) & set(sets.evaluation)
  assert set(sets.training) | set(sets.evaluation) == set(mine)
  assert "held out of them" in str(sets) and repr(sets.training[0]) in str(sets)
  # The same ones whatever the order, and mostly those whatever else joins the file.
  again = read_sets(write(tmp_path, "again.txt", mine[::-1]), "", 32)
  assert set(again.evaluation) == set(sets.evaluation)
  more = read_sets(write(tmp_path, "more.txt", [*mine, "another"]), "", 32)
  assert len(set(more.evaluation) & set(sets.evaluation)) >= 9
  assert len(read_sets(file, "", 4).evaluation) == 4
  assert len(read_sets(write(tmp_path, "few.txt", mine[:12]), "", 32).evaluation) == 4


def test_too_few_to_spare_any_are_judged_by_themselves_and_that_is_said(tmp_path):
  sets = read_sets(write(tmp_path, "one.txt", ["a fox in snow"]), "", 32)
  assert sets.training == sets.evaluation == ["a fox in snow"] and not sets.held_out
  assert "Some are the same" in str(sets)


def test_captions_of_pairs_take_the_place_of_prompts(tmp_path):
  captions = [f"caption {k % 20}" for k in range(60)]
  sets = read_sets("", "", 32, captions)
  assert len(sets.held_out) == 4 and len(sets.training) == 16
  other = write(tmp_path, "other.txt", ["x", "y"])
  assert read_sets("", other, 1, captions).evaluation == ["x"]
  with pytest.raises(UserError, match="data.prompts is empty"):
    read_sets("", other, 0)


def test_two_files_stay_what_they_are(tmp_path):
  a, b = write(tmp_path, "a.txt", ["a", "b"]), write(tmp_path, "b.txt", ["c", "d"])
  sets = read_sets(a, b, 1)
  assert (sets.training, sets.evaluation, sets.held_out) == (["a", "b"], ["c"], [])
  assert str(sets) == "2 training prompts ('a', 'b'); judged on 1 others ('c')"
