"""The smoke recipes of DDPO and B2-DiffuRL through the loop."""
import json

import jax
import numpy as np
import pytest

import runs
from jaxalign.config.recipes import parse
from jaxalign.data.prompts import draw_prompts
from jaxalign.errors import UserError
from jaxalign.train import loop

# One optimiser step a batch: the policy that trains is the one that sampled. The reward, one of its
# terms a black box, is that of a run in `train/test_loop.py`, whose evaluation programs it shares.
B2 = dict(method="b2_diffurl", method__inner_epochs=1, eval__path_kl=False,
          reward__names=("jpeg_compressibility", "brightness"), reward__weights=(1.0, 0.5))


@pytest.mark.slow
def test_ddpo_smoke_run():
  path = runs.run("ddpo", method="ddpo")
  lines = runs.metrics(path)
  assert [line["step"] for line in lines] == [1, 2, 3]
  for line in lines:
    assert {"loss/total", "train/reward", "train/clip_fraction", "train/update_kl",
            "train/grad_norm", "train/policy_norm"} <= line.keys()
    assert all(np.isfinite(v) for v in line.values())
    assert line["train/kept"] == 1 and line["train/interval"] == 4
    assert line["train/update_kl"] > 1e-4             # four optimiser steps on each batch
  summary = json.loads((path / "summary.json").read_text())
  assert summary["recipe"] == "ddpo:smoke" and summary["tuned"]["kl_to_base"]["mean"] > 0
  # By hand: 8 trajectories of 4 steps, trained on in 2 passes, two guidance branches, 3 updates.
  assert summary["cost"]["denoiser_forward"] == 3 * 2 * (8 * 4 + 2 * 8 * 4)
  assert summary["cost"]["denoiser_backward"] == 3 * 2 * 2 * 8 * 4
  assert summary["cost"]["reward_queries"] == 3 * 8 and summary["cost"]["reward_gradients"] == 0


@pytest.mark.slow
def test_ddpo_resumes_with_its_statistics():
  """Rewards of earlier updates are part of the checkpoint."""
  whole = runs.run("ddpo", method="ddpo")
  runs.run("ddpo 1+2", method="ddpo", train__steps=1, eval__every=0)
  halves = runs.run("ddpo 1+2", method="ddpo", train__steps=3, eval__every=0)
  train = lambda path: [{k: v for k, v in line.items() if not k.startswith("eval/")}
                        for line in runs.without_seconds(path)]
  assert train(halves) == train(whole)


@pytest.mark.slow
def test_b2_smoke_run_with_a_black_box():
  path = runs.run("b2", **B2)
  lines = runs.metrics(path)
  assert [line["train/interval"] for line in lines] == [3, 4, 4]      # one compiled program
  for line in lines:
    assert all(np.isfinite(v) for v in line.values())
    assert line["train/mixed_groups"] == 1 and line["train/kept"] == 0.5     # 2 of each 4
    # T9: noise estimates of rollout and update agree to rounding, so the ratio is one.
    assert line["train/clip_fraction"] == 0 and line["train/update_kl"] < 1e-6
    assert abs(line["loss/total"]) < 1e-5             # pairs have opposite weights
    assert line["train/grad_norm"] > 0
  summary = json.loads((path / "summary.json").read_text())
  # Two roots of four branches; 3.5 trained steps on average over the schedule of two stages.
  rollout, trained = 2 * 0.5 + 8 * 3.5, 2 * 2 * 3.5
  assert summary["cost"]["denoiser_forward"] == 3 * round(2 * (rollout + trained))
  assert summary["cost"]["denoiser_backward"] == 3 * round(2 * trained)


@pytest.mark.slow
def test_b2_on_eight_devices():
  """Groups stay on their device; numbers agree with one device to rounding."""
  options = dict(method="b2_diffurl", sample__batch=32, train__steps=2, eval__every=0,
                 eval__path_kl=False)
  one = runs.metrics(runs.run("b2 one", **options))
  many = runs.metrics(runs.run("b2 eight", jax.devices(), mesh__data=-1, **options))
  assert many[0]["train/grad_norm"] == pytest.approx(one[0]["train/grad_norm"], rel=1e-3)
  for before, after in zip(one, many):
    for name in ("train/reward", "train/kept", "train/interval"):
      assert after[name] == pytest.approx(before[name], rel=1e-5)


def test_groups_share_their_prompt():
  ids = draw_prompts(0, 3, 12, 8, 4)
  assert ids.dtype == np.int32 and ids.shape == (8,)
  assert len(set(ids[:4])) == len(set(ids[4:])) == 1 and ids[0] != ids[4]
  np.testing.assert_array_equal(ids[::4], draw_prompts(0, 3, 12, 2))
  np.testing.assert_array_equal(np.bincount(draw_prompts(0, 0, 3, 24, 2)), [8, 8, 8])


@pytest.mark.parametrize("name", ["ddpo", "b2_diffurl"])
def test_sd15_asks_for_the_model(name):
  with pytest.raises(UserError, match="model.path is empty"):
    loop.run(parse(runs.recipe("sd15", name)), runs.FOLDER / "no model")
  assert not (runs.FOLDER / "no model").exists()
