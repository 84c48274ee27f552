"""Runs without training: what DNO and best of N leave behind, black boxes, resume bit for bit."""
import json

import jax
import numpy as np
import pytest
from PIL import Image

import runs
from jaxalign import methods
from jaxalign.devices import rng
from jaxalign.errors import UserError
from jaxalign.methods.shared.noise import draw
from jaxalign.storage.checkpoint import Checkpointer
from jaxalign.train import inference
from jaxalign.train.experiment import build
from jaxalign.train.restore import load_tuned
from jaxalign.train.search import Search

# Six images in batches of four: the second batch is filled up.
SMALL = dict(sample__batch=4, eval__samples=2, eval__prompts=3, eval__batch=4,
             method__permutations=1, method__rival=False)


def run(folder, name="dno", **options):
  cfg = runs.smoke(name, **options)
  inference.run(cfg, runs.FOLDER / folder, jax.devices()[:1])
  return runs.FOLDER / folder


def summary(path):
  return json.loads((path / "summary.json").read_text())


def checkpoint(path, **options):
  """The state of the latest checkpoint, on the host."""
  cfg = runs.smoke("dno", **options)
  exp = build(cfg, jax.devices()[:1])
  method = methods.make("dno", exp.models, cfg.method, cfg.optim)
  search = Search(exp, method, runs.HELD_OUT.read_text().splitlines()[:3])
  checkpoints = Checkpointer(path / "checkpoints")
  state, _ = checkpoints.restore(search.state)
  checkpoints.close()
  return exp, jax.device_get(state)


@pytest.mark.slow
def test_dno_run_and_its_rival():
  path = run("dno", sample__batch=8)
  lines = runs.metrics(path)
  assert [line["step"] for line in lines] == [1, 2, 3]
  for line in lines:
    assert {"loss/total", "train/reward", "train/best_reward", "noise/drift", "noise/prno",
            "noise/p", "noise/mean_hinge", "noise/second_hinge", "train/grad_norm"} <= line.keys()
    assert all(np.isfinite(v) for v in line.values())
  assert lines[0]["noise/drift"] == 0 < lines[1]["noise/drift"] < lines[2]["noise/drift"]
  assert lines[2]["train/reward"] > lines[0]["train/reward"]
  assert "eval/judge_change" in lines[1]
  result = summary(path)
  base = result["base"]["reward"]["mean"]
  # The base is the one that the evaluation of every method draws: step 1 scores the same images.
  assert lines[0]["train/reward"] == pytest.approx(base, abs=1e-4)
  assert result["tuned"]["reward"]["mean"] > base
  # By hand: 8 images, 4 steps, two guidance branches, 3 updates and the last score.
  assert result["cost"]["denoiser_forward"] == result["cost"]["denoiser_backward"] == 4 * 8 * 4 * 2
  assert result["cost"]["equal_candidates"] == result["best_of_n"]["candidates"] == 12
  assert result["best_of_n"]["reward"]["mean"] >= base
  rival = summary(path / "best_of_n")
  assert rival["base"] == result["base"]
  assert rival["cost"]["denoiser_forward"] == 12 * 8 * 4 * 2
  assert inference.run(runs.smoke("dno", sample__batch=8), path)["steps"] == 3      # finished

  rows = [json.loads(line) for line in (path / "product/instances.jsonl").read_text().splitlines()]
  assert len(rows) == 8 and rows[3]["sample"] == 1
  for row in rows:
    assert row["reward_after"] >= row["reward_before"] - 1e-4 and 0 <= row["step"] <= 3
    with np.load(path / "product" / row["noise"]) as file:
      assert file["noise"].shape == (5, 8, 8, 4) and str(file["prompt"]) == row["prompt"]
    assert np.asarray(Image.open(path / "product" / row["image"])).shape == (32, 32, 3)
  with pytest.raises(UserError, match="a run of dno tunes no weights; its images"):
    load_tuned(path)


@pytest.mark.slow
def test_two_steps_and_one_equal_three():
  whole = run("dno 3", **SMALL)
  run("dno 2+1", train__steps=2, **SMALL)
  parts = run("dno 2+1", **SMALL)
  (exp, state), (_, other) = checkpoint(whole, **SMALL), checkpoint(parts, **SMALL)
  assert list(state) == ["00000", "00001"]
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other)):
    assert a.dtype == b.dtype and np.array_equal(a, b)
  assert runs.without_seconds(whole) == runs.without_seconds(parts)
  assert summary(whole)["tuned"] == summary(parts)["tuned"]
  for file in sorted((whole / "product" / "noise").iterdir()):
    with np.load(file) as a, np.load(parts / "product" / "noise" / file.name) as b:
      assert np.array_equal(a["noise"], b["noise"])
  # The last image of the last batch is there twice, and counted once.
  np.testing.assert_array_equal(state["00001"]["z"][1], state["00001"]["z"][3])
  assert summary(whole)["images"] == 6
  # It starts from the evaluation's noise.
  noise = draw(exp.models, rng.stream(jax.random.key(0), rng.EVAL), np.arange(4))
  np.testing.assert_array_equal(state["00000"]["start"], noise)


@pytest.mark.slow
def test_best_of_n_run_with_a_black_box():
  path = run("best", "best_of_n", reward__names=("jpeg_compressibility",), train__steps=2,
             sample__batch=4, eval__batch=4)
  lines = runs.metrics(path)
  assert lines[1]["train/best_reward"] >= lines[0]["train/best_reward"]
  result = summary(path)
  assert result["tuned"]["reward"]["mean"] >= result["base"]["reward"]["mean"]
  assert result["cost"]["reward_queries"] == 3 * 8


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["zo", "hybrid1", "hybrid2"])
def test_black_boxes(gradient):
  options = SMALL | dict(train__steps=1, eval__every=0, method__probes=2,
                         method__gradient=gradient, reward__names=("jpeg_compressibility",))
  path = run(f"dno {gradient}", **options)
  line = runs.metrics(path)[0]
  assert line["train/grad_norm"] > 0 and line["train/active"] == 1
  assert summary(path)["cost"]["reward_queries"] == 2 * 6 * 3


@pytest.mark.parametrize("options, message", [
    (dict(train__keep_best=True), "train.keep_best=True chooses among policies"),
    (dict(reward__names=("jpeg_compressibility",)),
     "'dno' needs reward gradients.*or configs/best_of_n.py"),
    (dict(optim__accumulate=2), "optim.ema and optim.accumulate"),
    (dict(model__path=""), "model.path is empty")])
def test_what_is_refused(options, message):
  with pytest.raises(UserError, match=message):
    inference.run(runs.smoke("dno", **options), runs.FOLDER / "refused", jax.devices()[:1])
  assert not (runs.FOLDER / "refused").exists()


@pytest.mark.slow
def test_eight_devices():
  """Images are sharded; numbers agree with one device to rounding."""
  one = runs.metrics(run("dno one", method__rival=False, eval__every=0))
  cfg = runs.smoke("dno", method__rival=False, eval__every=0, mesh__data=8)
  inference.run(cfg, runs.FOLDER / "dno eight", jax.devices())
  for a, b in zip(one, runs.metrics(runs.FOLDER / "dno eight")):
    assert b["train/reward"] == pytest.approx(a["train/reward"], abs=1e-4)
