"""The page "bring your reward" as it stands: its file equals our JAX towers, its command runs."""
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from test_towers import PROMPTS, SIZE, assert_gradient, make_clip, score_and_gradient

import runs
from jaxalign.devices import callbacks
from jaxalign.rewards import HostReward, make_reward, open_reward
from jaxalign.rewards.trial import Trial

PAGE = (runs.ROOT / "docs" / "bring_your_reward.md").read_text()
SCORERS, JUDGE = re.findall(r"```python\n(.*?)```", PAGE, re.S)
COMMAND, = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
# The same model without its scale, which is all that PickScore differs from CLIP in.
COSINE = """
def clip_score(pixels, prompts, network):
  return pickscore(pixels, prompts, network) / network[0].logit_scale.exp()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A small random CLIP in place of the published one, and the page's file that opens it."""
  folder = tmp_path_factory.mktemp("pickscore")
  make_clip(folder)
  code = SCORERS.replace("yuvalkirstain/PickScore_v1", str(folder))
  assert str(folder) in code
  (folder / "scorers.py").write_text(code + COSINE)
  return folder


@pytest.mark.parametrize("form", ["pickscore", "clip_score"])
def test_equals_our_jax_towers(folder, form):
  images = np.random.default_rng(0).uniform(size=(3, 2 * SIZE, 2 * SIZE, 3)).astype(np.float32)
  theirs = open_reward(make_reward((f"{folder}/scorers.py:{form}",), (1.0,)),
                       lambda: Trial(images.shape[1:3], PROMPTS))
  scores, gradient = score_and_gradient(theirs, images)
  callbacks.check()
  ours, expected = score_and_gradient(make_reward((f"{form}:{folder}",), (1.0,)), images)
  np.testing.assert_allclose(scores, ours, rtol=1e-5, atol=1e-5)
  assert_gradient(gradient, expected)


@pytest.mark.slow
def test_newcomer_gets_from_the_page_to_a_run(folder, tmp_path):
  assert len(SCORERS.strip().splitlines()) <= 22
  words = shlex.split(COMMAND)
  assert words[:3] == ["python", "-m", "jaxalign.launch"] and len(words) == 5
  words = [word.replace("jaxalign:nabla_gfn", "jaxalign:nabla_gfn:smoke") for word in words]
  small = {"data.prompts": runs.TRAIN, "data.eval_prompts": runs.HELD_OUT, "mesh.data": 1,
           "train.steps": 1, "log.to": ()}
  done = subprocess.run(
      [sys.executable, *words[1:], f"--workdir={tmp_path}/run",
       *(f"--config.{key}={value}" for key, value in small.items())],
      cwd=folder, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-2000:]
  assert "scorers.py:pickscore in PyTorch on cpu" in done.stdout
  line, = runs.metrics(tmp_path / "run")
  assert line["train/reward_seconds"] > 0 and "train/reward" in line


def test_a_network_in_onnx(tmp_path):
  """The page's file with a published classifier in place of `judge.onnx`: alone or with others."""
  package = pytest.importorskip("rapidocr_onnxruntime")
  file, = pathlib.Path(package.__file__).parent.rglob("*_cls_infer.onnx")
  code = JUDGE.replace("judge.onnx", str(file)).replace("(224, 224)", "(192, 48)")
  assert str(file) in code and "(192, 48)" in code
  (tmp_path / "judge.py").write_text(code)
  reward = make_reward((f"{tmp_path}/judge.py:judge",), (1.0,))
  assert isinstance(reward, HostReward)
  images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
  images[1, 16:48] = 255
  scores = reward.score(images, PROMPTS)
  assert scores.shape == (3,) and np.ptp(scores) > 1e-3 and (0 <= scores).all()
  np.testing.assert_allclose(reward.score(images[1:2], PROMPTS[1:2]), scores[1:2], rtol=1e-4)
