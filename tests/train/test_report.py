"""What a run leaves at its end, and what is said where that was damaged."""
import json

import pytest
import runs

from jaxalign.errors import UserError
from jaxalign.train.report import read_finished, read_summary

SUMMARY = {"recipe": "r", "steps": 3, "seconds": 1.0, "total_seconds": 2, "device": "cpu x1",
           "stopped": "", "base": {}, "tuned": {}, "cost": {}}


def test_a_run_is_finished_if_it_needs_nothing_more(tmp_path):
  assert read_summary(tmp_path) is None and read_finished(tmp_path, runs.smoke()) is None
  (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
  assert read_finished(tmp_path, runs.smoke()) == SUMMARY
  assert read_finished(tmp_path, runs.smoke(train__steps=4)) is None
  stopped = {**SUMMARY, "steps": 1, "stopped": "train.max_seconds=1 reached"}
  (tmp_path / "summary.json").write_text(json.dumps(stopped))
  assert read_finished(tmp_path, runs.smoke(train__max_seconds=1.0)) == stopped
  assert read_finished(tmp_path, runs.smoke(train__max_seconds=9.0)) is None


@pytest.mark.parametrize("content", [
    b"", b"{", b"\xff\xfe", b"[]", b"{}", b"[" * 100_000, json.dumps(SUMMARY)[:80].encode(),
    *(json.dumps({**SUMMARY, key: None}).encode() for key in SUMMARY)])
def test_a_damaged_summary_is_one_line(tmp_path, content):
  (tmp_path / "summary.json").write_bytes(content)
  with pytest.raises(UserError, match=r"summary\.json: not the summary of a run") as error:
    read_finished(tmp_path, runs.smoke())
  assert "\n" not in str(error.value)
