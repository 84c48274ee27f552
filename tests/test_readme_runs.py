"""README's roads, walked: its commands, on the tiny model in place of the embedded one.

What of README and docs draws from a finished run is in `test_commands.py`.
"""
import base64
import http.server
import io
import json
import re
import runpy
import shlex
import sys

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import runs
from local_server import Local
from test_docs_commands import blocks

pytestmark = [pytest.mark.slow,
              pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")]
ROADS = [line for line in blocks((runs.ROOT / "README.md").read_text())
         if re.match(r"python -m jaxalign\.launch ", line)]
SMALL = ["--config.mesh.data=1", "--config.train.steps=2", "--config.eval.every=0"]


class Scorer(http.server.BaseHTTPRequestHandler):
  """Scores pictures by how bright they are, as docs/rewards.md has the protocol."""

  def do_POST(self):
    content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    scores = [float(np.mean(Image.open(io.BytesIO(base64.b64decode(image)))))
              for image in content["images"]]
    answer = json.dumps({"scores": scores}).encode()
    self.send_response(200)
    self.send_header("Content-Length", str(len(answer)))
    self.end_headers()
    self.wfile.write(answer)

  def log_message(self, *_):
    pass


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
  """A folder with what the reader is said to have: configs, pairs, votes, a prompt."""
  folder = tmp_path_factory.mktemp("reader")
  (folder / "configs").symlink_to(runs.ROOT / "configs")
  (folder / "prompt.txt").write_text("a taco on a blue background\n")
  table = pyarrow.parquet.read_table(runs.ROOT / "jaxalign" / "assets" / "pairs" / "emoji.parquet")
  some = np.linspace(0, len(table) - 1, 40).astype(int)        # of several captions
  for name in ("my_pairs", "votes"):
    (folder / name).mkdir()
    pyarrow.parquet.write_table(table.take(some), folder / name / "pairs.parquet")
  return folder


def test_there_is_a_road_for_everybody():
  found = {re.search(r"configs/(\w+)", line)[1] for line in ROADS}
  assert found == {"mapo", "ddpo", "nabla_gfn", "dno"} and len(ROADS) == 5


@pytest.mark.parametrize("number", range(len(ROADS)))
def test_a_road_to_its_end(number, reader, monkeypatch, capsys):
  monkeypatch.chdir(reader)
  line = re.sub(r"(--config=configs/\w+\.py)", r"\1:smoke", ROADS[number])
  with Local(("127.0.0.1", 0), Scorer) as server:
    line = line.replace("localhost:8000", f"127.0.0.1:{server.server_address[1]}")
    words = shlex.split(line)[3:]
    workdir = reader / "runs" / str(number)
    monkeypatch.setattr(sys, "argv", [
        "launch", *(word for word in words if not word.startswith("--workdir=")), *SMALL,
        f"--workdir={workdir}"])
    with pytest.raises(SystemExit) as status:
      runpy.run_module("jaxalign.launch", run_name="__main__", alter_sys=True)
  assert status.value.code == 0, capsys.readouterr().err
  summary = json.loads((workdir / "summary.json").read_text())
  assert summary["steps"] == 2 and (workdir / "report.html").is_file()
