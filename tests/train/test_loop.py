"""The loop: what a run leaves behind, what it compiles, when it stops, what it exports."""
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import runs
from jaxalign import methods
from jaxalign.convert import load_pipeline
from jaxalign.errors import UserError
from jaxalign.methods import nabla_gfn
from jaxalign.storage.checkpoint import Checkpointer
from jaxalign.train import experiment, loop


def weights(path):
  return load_pipeline(path / "export").params["unet"]


def largest_difference(left, right):
  return max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (left, right))))


# The folder of a run.


def test_config_json():
  content = json.loads((runs.finished() / "config.json").read_text())
  assert content["config"] == runs.smoke(log__to=("tensorboard",)).to_dict()
  environment = content["environment"]
  assert environment["jax"] == jax.__version__ and {"flax", "optax", "python"} <= environment.keys()


def test_metrics_one_object_a_step():
  lines = runs.metrics(runs.finished())
  assert [line["step"] for line in lines] == [1, 2, 3]
  seconds = [line["seconds"] for line in lines]
  assert seconds == sorted(seconds) and seconds[0] > 0
  for line in lines:
    assert all(re.fullmatch(r"\w+/\w+", key) for key in line.keys() - {"step", "seconds"})
    assert {"loss/total", "loss/forward", "train/reward", "train/path_kl", "train/grad_norm",
            "train/policy_norm"} <= line.keys()
    assert all(np.isfinite(v) for v in line.values())
    assert ("eval/judge" in line) == (line["step"] == 2)      # eval.every
  assert {"eval/reward", "eval/reward_change", "eval/judge_change",
          "eval/diversity"} <= lines[1].keys()
  # The policy starts as the reference, and moves.
  first, second, third = (line["train/path_kl"] for line in lines)
  assert abs(first) < 1e-12 < second < third               # a square of roundings, if not 0
  assert abs(lines[0]["loss/prox"]) < 1e-12


def test_pictures_and_event_files():
  path = runs.finished()
  names = {p.name for p in (path / "samples").iterdir()}
  assert names == {"step_000000.png", "step_000002.png", "step_000003.png", "before_after.png"}
  sizes = {Image.open(path / "samples" / name).size for name in names if name.startswith("step")}
  assert len(sizes) == 1
  assert list((path / "tensorboard").iterdir())
  assert not [p for p in path.rglob("*partial*")]


def test_checkpoints_hold_the_last_steps():
  names = {p.name for p in (runs.finished() / "checkpoints").iterdir()}
  assert names == {"2", "3"}                            # train.keep


def test_summary():
  path, cfg = runs.finished(), runs.smoke()
  summary = json.loads((path / "summary.json").read_text())
  assert summary["recipe"] == "nabla_gfn:smoke"
  assert summary["steps"] == summary["exported_step"] == 3
  assert summary["device"] == "cpu x1" and summary["stopped"] == ""
  assert 0 < summary["seconds"] < summary["total_seconds"]
  for model in ("base", "tuned"):
    assert {"reward", "judge", "diversity", "color_accuracy"} <= summary[model].keys()
    for name in ("reward", "judge", "diversity", "color_accuracy"):
      assert {"mean", "sem", "n"} <= summary[model][name].keys()
    assert summary[model]["reward"]["n"] == cfg.eval.prompts * cfg.eval.samples
  assert {"distance", "floor", "n"} <= summary["tuned"]["fd_to_base"].keys()
  assert summary["tuned"]["kl_to_base"]["mean"] > 0
  change = summary["tuned"]["reward"]["change"]["mean"]
  difference = summary["tuned"]["reward"]["mean"] - summary["base"]["reward"]["mean"]
  assert change == pytest.approx(difference, abs=1e-7)
  # By hand: 8 trajectories of 4 steps, 2 strata and the last, two guidance branches, 3 updates.
  rollout, rows, inner = 8 * 4, 8 * 3, 8 * 2
  assert summary["cost"] == {
      "denoiser_forward": 3 * 2 * (rollout + 2 * rows + inner),
      "denoiser_backward": 3 * 2 * (rows + inner),
      "decodes": 3 * (rows + 8), "reward_queries": 3 * (rows + 8), "reward_gradients": 3 * rows,
      **{key: summary["cost"][key] for key in ("peak_bytes", "update_bytes")}}
  assert summary["cost"]["peak_bytes"] > summary["cost"]["update_bytes"] > 2 ** 20


def test_export_is_the_base_with_the_adapter_in_it():
  path = runs.finished()
  base = loop.build(runs.smoke(), jax.devices()[:1]).pipeline
  exported = load_pipeline(path / "export")
  moved = {sub for sub in ("vae", "text_encoder", "unet")
           if largest_difference(exported.params[sub], base.params[sub]) > 0}
  assert moved == {"unet"}
  flat = jax.tree_util.tree_leaves_with_path(
      jax.tree.map(lambda a, b: bool((a != b).any()), exported.params["unet"], base.params["unet"]))
  changed = {loop.sharding.path_of(p) for p, differs in flat if differs}
  assert changed and all(re.search(r"attn\d/to_(q|k|v|out_0)/kernel$", p) for p in changed)


def test_second_call_says_finished(capsys):
  path = runs.finished()
  before = {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}
  assert loop.run(runs.smoke(log__to=("tensorboard",)), path)["steps"] == 3
  assert "finished" in capsys.readouterr().out
  assert {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()} == before


def test_programs_are_traced_once():
  runs.finished()
  assert runs.TRACES == {"collect": 1, "update": 1}


# Variants.


def restored(path, **overrides):
  """`(method state, progress)` of a run's latest checkpoint."""
  cfg = runs.smoke(**overrides)
  exp = loop.build(cfg, jax.devices()[:1])
  method = methods.make("nabla_gfn", exp.models, cfg.method, cfg.optim)
  programs = loop.Programs(exp, method, exp.prompt_table(runs.TRAIN.read_text().splitlines()),
                           jax.random.key(cfg.seed))
  like = {"method": jax.eval_shape(programs.init)}
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), like)
  checkpoints = Checkpointer(path / "checkpoints")
  saved, progress = checkpoints.restore(like)
  checkpoints.close()
  return jax.device_get(saved["method"]), progress


@pytest.mark.slow      # programs of its own
def test_whole_weights_with_average_accumulation_and_minibatches():
  overrides = dict(model__adapter="full", optim__ema=0.9, optim__accumulate=2,
                   method__minibatches=2)
  path = runs.run("full", train__steps=2, eval__every=0, eval__path_kl=False, **overrides)
  lines = runs.metrics(path)
  assert len(lines) == 2 and lines[0]["loss/prox"] > 0      # the second minibatch has moved
  assert lines[1]["train/path_kl"] > 0                      # the reference has not
  state, _ = restored(path, **overrides)
  assert int(state["updates"]) == 4
  raw, average = state["trainable"]["policy"], state["ema"]
  base = loop.build(runs.smoke(), jax.devices()[:1]).pipeline.params["unet"]
  # With decay min(0.9, (1 + n) / (10 + n)) the average lags behind the raw policy.
  assert 0 < largest_difference(average, base) < largest_difference(raw, base)
  assert largest_difference(average, weights(path)) == 0    # and is what is exported
  flat = jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), base, average))
  assert sum(flat) > 0.9 * len(flat)


# Stopping.


@pytest.mark.slow
def test_max_seconds_stops_and_more_time_continues(capsys):
  path = runs.run("time", train__max_seconds=1e-3, train__checkpoint_every=10)
  summary = json.loads((path / "summary.json").read_text())
  assert summary["steps"] == 1 and summary["stopped"].startswith("train.max_seconds")
  assert [p.name for p in (path / "checkpoints").iterdir()] == ["1"]
  runs.run("time", train__max_seconds=1e-3, train__checkpoint_every=10)
  assert "finished" in capsys.readouterr().out
  runs.run("time", train__max_seconds=0.0, train__checkpoint_every=10)
  summary = json.loads((path / "summary.json").read_text())
  assert summary["steps"] == 3 and summary["stopped"] == ""
  plain = [line["train/reward"] for line in runs.metrics(runs.finished())]
  assert [line["train/reward"] for line in runs.metrics(path)] == plain


def judged(monkeypatch, scores):
  """Makes the short evaluations of steps 1, 2, .. find these judge scores; the base has 0."""
  def change(samples, base):
    del samples, base
    step = len(seen) + 1
    seen.append(scores[(step - 1) % len(scores)])
    return {"eval/judge": seen[-1], "eval/judge_change": seen[-1], "eval/judge_change_sem": 0.1}
  seen = []
  monkeypatch.setattr(loop, "watch_metrics", change)


@pytest.mark.slow
def test_keep_best_exports_the_best_step(monkeypatch):
  judged(monkeypatch, [-5.0, 9.0, 1.0])
  path = runs.run("best", train__keep_best=True, eval__every=1)
  summary = json.loads((path / "summary.json").read_text())
  assert (summary["steps"], summary["exported_step"]) == (3, 2)
  plain = runs.run("two", train__steps=2, eval__every=1)
  assert largest_difference(weights(path), weights(plain)) == 0
  assert largest_difference(weights(path), weights(runs.finished())) > 0


def test_keep_best_exports_the_base_if_nothing_was_better(monkeypatch):
  judged(monkeypatch, [-5.0, -9.0, -3.0])
  monkeypatch.setattr(loop, "judge_progress", lambda cfg, progress, step, seen: dict(
      loop_judge_progress(cfg, progress, step, seen), best_judge=9.0))
  path = runs.run("worse", train__keep_best=True, train__patience=0, eval__every=1)
  assert json.loads((path / "summary.json").read_text())["exported_step"] == 0
  base = loop.build(runs.smoke(), jax.devices()[:1]).pipeline.params["unet"]
  assert largest_difference(weights(path), base) == 0


loop_judge_progress = loop.judge_progress


def test_patience_stops_the_run(monkeypatch):
  judged(monkeypatch, [-1.0, -1.0, -1.0])
  path = runs.run("patience", eval__every=1, train__patience=2)
  summary = json.loads((path / "summary.json").read_text())
  assert summary["steps"] == 2 and "train.patience" in summary["stopped"]
  assert (path / "export" / "model_index.json").is_file()


def test_judge_progress():
  cfg = runs.smoke(train__patience=2, train__tolerance=2.0)
  start = {"best_step": 0, "best_judge": 0.5, "below_base": 0, "stopped": ""}
  look = lambda judge, change, sem=0.1: {
      "eval/judge": judge, "eval/judge_change": change, "eval/judge_change_sem": sem}
  better = loop.judge_progress(cfg, start, 1, look(0.6, 0.1))
  assert better == {"best_step": 1, "best_judge": 0.6, "below_base": 0, "stopped": ""}
  assert start["best_step"] == 0                            # untouched
  noise = loop.judge_progress(cfg, better, 2, look(0.4, -0.19))
  assert noise["below_base"] == 0 and noise["best_step"] == 1
  low = loop.judge_progress(cfg, noise, 3, look(0.2, -0.21))
  assert low["below_base"] == 1 and not low["stopped"]
  assert loop.judge_progress(cfg, low, 4, look(0.5, 0.0))["below_base"] == 0
  assert "train.patience" in loop.judge_progress(cfg, low, 4, look(0.2, -0.3))["stopped"]
  never = runs.smoke(train__patience=0)
  assert not loop.judge_progress(never, low, 4, look(0.2, -0.3))["stopped"]
  one_prompt = {"eval/judge": 0.2, "eval/judge_change": -1e-6}        # has no standard error
  assert loop.judge_progress(cfg, start, 1, one_prompt)["below_base"] == 1


# Numbers that are not finite.


def test_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(monkeypatch):
  original = loop.Programs.update

  def update(self, state, experience, rewards, step):
    state, values = original(self, state, experience, rewards, step)
    return state, {**values, "loss/total": values["loss/total"] * (np.nan if step == 1 else 1.0)}
  monkeypatch.setattr(loop.Programs, "update", update)
  with pytest.raises(UserError, match=r"step 2: loss/total is not finite.*optim\.lr"):
    runs.run("nan", eval__every=0)
  path = runs.FOLDER / "nan"
  assert [p.name for p in (path / "checkpoints").iterdir()] == ["1"]
  assert [line["step"] for line in runs.metrics(path)] == [1]
  dump = json.loads((path / "non_finite.json").read_text())
  assert dump["step"] == 2 and dump["values"]["loss/total"] == "nan" and len(dump["prompts"]) == 8
  monkeypatch.undo()
  runs.run("nan", eval__every=0)
  assert [line["step"] for line in runs.metrics(path)] == [1, 2, 3]


def fake_method(monkeypatch, change):
  """A method without networks: latents are noise, an update adds `change(rewards)`."""
  def make(models, cfg, optim):
    del cfg, optim

    def init(key, frozen, batch):
      del batch
      return {"trainable": {"policy": models.init_policy(key, frozen)}}

    def collect(state, frozen, batch, key):
      del state, frozen
      size = batch["sample_ids"].shape[0]
      return {"final": jax.random.normal(key, (size, *models.latent_shape)), "batch": batch}

    def update(state, frozen, experience, rewards, key):
      del frozen, experience, key
      policy = jax.tree.map(lambda a: a + change(rewards), state["trainable"]["policy"])
      return {"trainable": {"policy": policy}}, {"loss/total": rewards.mean()}
    return methods.Method(
        init=init, collect=collect, update=update, product=lambda s: s["trainable"]["policy"],
        cost=lambda batch: {"denoiser_forward": 0, "decodes": 0, "reward_queries": 0})
  monkeypatch.setattr(nabla_gfn, "make", make)


def test_parameters_that_are_not_finite_are_never_saved(monkeypatch):
  """The loss of the step that blows up is still finite."""
  fake_method(monkeypatch, lambda rewards: jnp.inf)
  with pytest.raises(UserError, match="step 1: train/policy_norm is not finite"):
    runs.run("blown", optim__lr=0.5, train__steps=1)
  assert not list((runs.FOLDER / "blown" / "checkpoints").iterdir())


def test_reward_that_turns_nan_names_prompt_and_reward(monkeypatch):
  original = loop.Programs.collect

  def collect(self, state, step, prompt_ids, prompts):
    experience, terms, rewards = original(self, state, step, prompt_ids, prompts)
    if step == 1:
      terms = {name: np.where(np.arange(8) == 3, np.nan, v) for name, v in terms.items()}
    return experience, terms, rewards
  monkeypatch.setattr(loop.Programs, "collect", collect)
  with pytest.raises(UserError, match=r"brightness.*nan.* at index 3, prompt 'a "):
    runs.run("nan reward", eval__every=0)
  assert [p.name for p in (runs.FOLDER / "nan reward" / "checkpoints").iterdir()] == ["1"]


def test_reward_without_spread_is_refused(monkeypatch):
  monkeypatch.setattr("jaxalign.metrics.within_prompt_std", lambda scores: 0.0)
  with pytest.raises(UserError, match="reward.names.*same score"):
    runs.run("flat")


def test_what_the_method_refuses_leaves_no_folder():
  for overrides, key in ((dict(reward__names=("jpeg_compressibility",)), "reward.names"),
                         (dict(sample__eta=0.0), "sample.eta"),
                         (dict(sample__final="clean"), "sample.final"),
                         (dict(method__strata=5), "method.strata")):
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
      runs.run("refused", **overrides)
  assert not (runs.FOLDER / "refused").exists()


@pytest.mark.slow
def test_black_box_rewards_reach_the_update(monkeypatch):
  """The seam for methods without reward gradients: scored on the host, weighted, `[B]` f32."""
  fake_method(monkeypatch, lambda rewards: rewards.sum())
  monkeypatch.setattr(nabla_gfn.Config, "reward_gradients", False)
  path = runs.run("host", reward__names=("jpeg_compressibility", "brightness"), optim__lr=0.25,
                  reward__weights=(1.0, 0.5), train__steps=1, eval__every=0, eval__path_kl=False)
  line = runs.metrics(path)[0]
  parts = [line[f"train/reward/{name}"] for name in ("jpeg_compressibility", "brightness")]
  assert line["loss/total"] == pytest.approx(parts[0] + 0.5 * parts[1], rel=1e-5)
  summary = json.loads((path / "summary.json").read_text())
  assert {"reward", "reward/brightness", "reward/jpeg_compressibility"} <= summary["tuned"].keys()


@pytest.mark.slow
def test_frozen_kernels_lie_in_the_dtype_they_compute_in():
  """The same numbers to the bit, from half of the memory; what is trained stays f32."""
  cfg = runs.smoke(model__dtype="bfloat16")
  exp = experiment.build(cfg, jax.devices()[:1])
  kinds = lambda tree: {(a.ndim > 1, str(a.dtype)) for a in jax.tree.leaves(tree)}
  for name in ("base", "decoder"):
    assert kinds(exp.frozen[name]) == {(True, "bfloat16"), (False, "float32")}
  assert kinds(exp.pipeline.params["unet"]) == {(True, "float32"), (False, "float32")}
  adapter = exp.models.init_policy(jax.random.key(0), exp.frozen)
  assert kinds(adapter) == {(True, "float32")}
  adapter = jax.tree.map(lambda a: a + 0.1, adapter)

  ids = exp.pipeline.tokenize(["a cat"])
  text = exp.embed(["a cat"])
  x = jax.random.normal(jax.random.key(1), (1, *exp.models.latent_shape))
  draw = jax.jit(lambda base, decoder, text: (
      exp.models.denoise(exp.models.combine(adapter, base), x, jnp.full(1, 300), text),
      exp.models.decode(decoder, x)))
  params = exp.pipeline.params
  jax.tree.map(np.testing.assert_array_equal, text,
               jax.jit(exp.pipeline.encode_prompts)(exp.pipeline.text_params, ids))
  jax.tree.map(np.testing.assert_array_equal, draw(exp.frozen["base"], exp.frozen["decoder"], text),
               draw({"params": params["unet"]}, params["vae"], text))


def test_weights_that_are_trained_start_from_f32():
  cfg = runs.smoke(model__dtype="bfloat16", model__adapter="full")
  exp = experiment.build(cfg, jax.devices()[:1])
  kinds = lambda name: {str(a.dtype) for a in jax.tree.leaves(exp.frozen[name])}
  assert kinds("base") == {"float32"}
  assert kinds("decoder") == {"float32", "bfloat16"}
