"""The bar of a run: what it shows, of which look, how fast, and how often."""
import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import runs
from jaxalign import methods
from jaxalign.devices import chips, processes
from jaxalign.train.bar import Bar, Work
from jaxalign.train.experiment import build, placed_shapes
from jaxalign.train.plan import outlined
from jaxalign.train.programs import operations


def gpu(kind):
  return SimpleNamespace(device_kind=kind)


def shown(capsys, work, *lines, **overrides):
  """The bar at its end, after `(step, seconds, logged)` of some steps."""
  with Bar(runs.smoke(train__steps=9, **overrides), 0, work) as bar:
    for line in lines:
      bar.show(*line)
  return capsys.readouterr().err.split("\r")[-1]


def test_it_shows_reward_judge_of_the_last_look_speed_and_time_left(capsys):
  work = Work(8, 5e9, (gpu("NVIDIA H200"), gpu("NVIDIA H200")))
  text = shown(capsys, work, (1, 1.0, {"train/reward": 0.5, "train/path_kl": 3.0}),
               (2, 2.0, {"train/reward": 0.6, "eval/judge": 0.25, "train/other": 1.0}),
               (4, 2.0, {"train/reward": 0.75}))
  assert "4/9" in text and "<" in text                      # what has passed < what is left
  rate = 2 * 5e9 / (2 * 989e12)
  assert all(part in text for part in (
      "reward=0.7500", "judge=0.2500", "KL=3.00", "img/s=16", f"MFU={rate:.1%}")), text
  assert "other" not in text and "GFLOP" not in text


def test_a_cpu_has_no_published_peak(capsys):
  devices = tuple(jax.devices()[:2])
  assert chips.peak(devices) is None
  text = shown(capsys, Work(8, 5e9, devices), (4, 2.0, {"train/margin_accuracy": 0.5}))
  assert "GFLOP/s=10" in text and "MFU" not in text and "margin_accuracy=0.5000" in text
  text = shown(capsys, Work(8, math.nan, devices), (4, 2.0, {"train/best_reward": 0.5}))
  assert "best=0.5000, img/s=16]" in text


@pytest.mark.parametrize("kind, flops", [
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA L40S", 362e12),
    ("NVIDIA H100 PCIe", 756e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12),
    ("NVIDIA L40", None), ("NVIDIA H100 NVL", None), ("cpu", None)])
def test_peaks_of_chips(kind, flops):
  assert chips.peak([gpu(kind)]) == flops
  assert chips.peak([gpu(kind), gpu("NVIDIA L4")]) == (flops and flops + 121e12)


@pytest.mark.parametrize("terminal, most", [(True, 5), (False, 2)])
def test_thousands_of_steps_are_a_few_renewals(capsys, monkeypatch, terminal, most):
  monkeypatch.setattr(processes.sys.stderr, "isatty", lambda: terminal)
  work = Work(1, 1.0, ())
  shown_lines = []
  with Bar(runs.smoke(train__steps=5000), 0, work) as bar:
    for step in range(1, 5001):
      bar.show(step, 1e-3 * step, {"train/reward": 1.0})
    shown_lines = capsys.readouterr().err.split("\r")
  assert 1 <= len([line for line in shown_lines if line.strip()]) <= most


def test_a_loop_of_unknown_length_is_not_guessed():
  matrix = jnp.zeros((4, 4))

  def function(n, m):
    return jax.lax.fori_loop(0, n, lambda _, m: m @ matrix, m) + jax.lax.fori_loop(
        0, n, lambda _, m: m + 1, m)
  jaxpr = jax.make_jaxpr(function)(3, matrix).jaxpr
  assert operations(jaxpr) == 2 * 4 ** 3
  assert math.isnan(operations(jaxpr, math.nan))
  jaxpr = jax.make_jaxpr(lambda n, m: jax.lax.fori_loop(0, n, lambda _, m: m + 1, m) @ m)(
      3, matrix).jaxpr
  assert operations(jaxpr, math.nan) == 2 * 4 ** 3


def test_operations_of_a_run():
  """Those of its networks, by the count of `--dry_run`, and something for reward and adapter."""
  cfg = runs.smoke("draft")
  exp = build(cfg, jax.devices()[:1])
  method = methods.make(cfg.method_name, exp.models, cfg.method, cfg.optim)
  outline = dataclasses.replace(exp, put=placed_shapes)
  programs = outlined(outline, method, ["a cat on a red background"])
  found = sum(operations(t.jaxpr.jaxpr, math.nan)
              for t in programs.traced(programs.state_shapes()).values())
  models, batch = exp.models, cfg.sample.batch
  shapes = (jnp.zeros((1, *models.latent_shape)), jnp.zeros(1, jnp.int32), exp.embed(["a"]))
  one = operations(jax.make_jaxpr(lambda x, t, cond: models.denoise(
      models.combine(None, models.frozen["base"]), x, t, cond))(*shapes).jaxpr)
  cost = method.cost(batch)
  least = one * (cost["denoiser_forward"] + cost["denoiser_backward"])
  assert least < found < 4 * least
