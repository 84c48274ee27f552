"""The page that puts runs side by side."""
import json

import numpy as np
import pytest

from jaxalign import compare
from jaxalign.config import recipes
from jaxalign.errors import UserError


def write_run(folder, recipe="ddpo:emoji", seed=0, gain=0.1, queries=64, reward="scene_clip",
              model="jaxalign:emoji", pairs=""):
  """A finished run of 10 steps, evaluated every 5, whose reward rises linearly to `gain`."""
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps({"config": {
      "seed": seed, "reward": {"names": [reward]},
      "data": {"eval_prompts": "jaxalign:held", "pairs": pairs},
      "model": {"path": model}}}))
  (folder / "metrics.jsonl").write_text("".join(json.dumps(
      {"step": step, "seconds": 2.0 * step, "train/loss": 0.0, **(
          {"eval/reward_change": gain * step / 10, "eval/diversity": 1.0} if step % 5 == 0 else {})}
  ) + "\n" for step in range(1, 11)))
  change = lambda mean: {"mean": mean, "change": {"mean": mean, "sem": 0.01}}
  (folder / "summary.json").write_text(json.dumps({
      "recipe": recipe, "steps": 10, "seconds": 20.0, "device": "cpu x2",
      "base": {"reward": {"mean": 0.0, "within_prompt_std": 0.2}},
      "tuned": {"reward": change(gain), "judge": change(gain / 2),
                "diversity": {"ratio_to_base": 0.9}, "kl_to_base": {"mean": 3.0},
                "fd_to_base": {"distance": 0.05, "floor": 0.01}},
      "cost": {"denoiser_forward": 100, "denoiser_backward": 0, "reward_queries": 10 * queries,
               "reward_gradients": 5 * queries, "peak_bytes": 2**30, "update_bytes": 2**28}}))
  return folder


def test_page_holds_what_the_runs_measured(tmp_path):
  runs = [write_run(tmp_path / f"a{seed}", seed=seed, gain=0.1 + 0.02 * seed) for seed in range(3)]
  runs.append(write_run(tmp_path / "b", "nabla_gfn:emoji", gain=0.4, queries=32))
  runs.append(write_run(tmp_path / "c", "mapo:emoji", reward="style_3d"))
  output = tmp_path / "docs" / "results.md"
  compare._FLAGS(["compare", f"--runs={','.join(map(str, runs))}", f"--output={output}"])
  output.parent.mkdir()
  compare.main([])
  text = output.read_text()
  assert text.count("## ") == 2                    # a table for each task
  row, = [line for line in text.splitlines() if line.startswith("| `ddpo:emoji`")]
  cells = [cell.strip() for cell in row.split("|")[1:-1]]
  error = np.std([0.1, 0.12, 0.14], ddof=1) / np.sqrt(3)
  assert cells[1:6] == ["3", f"+0.1200 ± {error:.4f}", f"+0.60 ± {error / 0.2:.2f}",
                        "10.0 to 14.0", f"+0.0600 ± {error / 2:.4f}"]
  assert cells[6:10] == ["90.0 ± 0.0", "0.0500 ± 0.0000 (0.0100)", "3.0 ± 0.0", "640"]
  assert cells[11:15] == ["20", "2.00", "256", "1,024"]
  assert cells[-2].startswith("+0.0600")           # at the 320 queries of the cheapest run
  assert cells[-1].startswith("+0.1200")
  for number in (1, 2):
    assert (tmp_path / "docs" / "results" / f"task_{number}.png").stat().st_size > 5000

  compare._FLAGS(["compare", "--runs=", f"--output={output}"])
  compare.main([])                                 # from what was read before
  assert output.read_text() == text
  again = write_run(tmp_path / "d", gain=0.7)      # seed 0 once more: replaces its record
  compare._FLAGS(["compare", f"--runs={again}", f"--output={output}"])
  compare.main([])
  assert len(json.loads((tmp_path / "docs" / "results" / "results.json").read_text())) == 5


def test_tasks_are_apart_by_base_model_and_pairs(tmp_path):
  task = lambda **options: compare.read_run(write_run(tmp_path / str(options), **options))["task"]
  assert task() == "scene_clip on jaxalign:held, from jaxalign:emoji"
  assert task(model="elsewhere") == "scene_clip on jaxalign:held, from elsewhere"
  pairs = write_run(tmp_path / "pairs", pairs="folder/r0.parquet")
  assert compare.read_run(pairs)["task"] == task(reward="scene_clip") + ", pairs r0"


def test_a_run_with_other_settings_is_no_seed_of_the_recipe(tmp_path):
  """Its row says what is different, but for the task and what only watches."""
  config = recipes.parse(recipes.load_recipe("jaxalign:ddpo:emoji")).to_dict()
  config["method"]["step_weights"], config["optim"]["lr"] = "uniform", 3e-3
  config["eval"]["every"], config["reward"]["names"] = 7, ["scene_clip"]
  run = write_run(tmp_path / "run")
  (run / "config.json").write_text(json.dumps({"config": config}))
  assert compare.read_run(run)["recipe"] == (
      "ddpo:emoji method.step_weights=uniform optim.lr=0.003")
  own = write_run(tmp_path / "own", recipe="mine:emoji")
  assert compare.read_run(own)["recipe"] == "mine:emoji"


def test_times_are_those_of_the_fastest_seed():
  point = lambda step, seconds: {"seconds": step * seconds, "queries": step}
  record = lambda recipe, seconds: {
      "recipe": recipe, "seconds": 10 * seconds, "step_seconds": seconds,
      "curve": [point(5, seconds), point(10, seconds)]}
  slow, fast, other = compare.undisturbed([record("a", 3.0), record("a", 2.0), record("b", 1.0)])
  assert slow == fast == record("a", 2.0) and other == record("b", 1.0)


def test_one_seed_has_its_error_over_prompts(tmp_path):
  record = compare.read_run(write_run(tmp_path / "run"))
  assert compare.change_of([record], "reward") == (0.1, 0.01)
  assert compare.change_of([record, record], "reward") == (pytest.approx(0.1), 0.0)


def test_a_curve_is_read_between_its_points_and_not_beyond():
  record = {"curve": [{"queries": 100.0, "reward_change": 0.2},
                      {"queries": 300.0, "reward_change": 0.4}]}
  assert compare.at(record, "queries", 50.0, "reward_change") == pytest.approx(0.1)
  assert compare.at(record, "queries", 200.0, "reward_change") == pytest.approx(0.3)
  assert compare.at(record, "queries", 301.0, "reward_change") is None


def test_unfinished_runs_are_refused(tmp_path):
  with pytest.raises(UserError, match="not a finished run"):
    compare.read_run(tmp_path)
  run = write_run(tmp_path / "run")
  (run / "summary.json").write_text(json.dumps({"recipe": "pretrain_emoji:emoji", "steps": 3}))
  with pytest.raises(UserError, match="pretraining"):
    compare.read_run(run)
  compare._FLAGS(["compare", "--runs=", f"--output={tmp_path / 'page.md'}"])
  with pytest.raises(UserError, match="--runs is empty"):
    compare.main([])
