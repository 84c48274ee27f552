"""The smoke recipes of MaPO, Diffusion-DPO and SFT through the loop, and what they leave behind."""
import dataclasses
import json
import math
from unittest import mock

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import runs
from jaxalign.config import registry
from jaxalign.config.recipes import parse
from jaxalign.data.pairs import open_pairs
from jaxalign.errors import UserError
from jaxalign.testing.fixture import make_pairs
from jaxalign.train import loop
from jaxalign.train.experiment import build
from jaxalign.train.pairs import PairTable

NAMES = ("mapo", "diffusion_dpo", "sft")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_smoke_recipe(name):
  path = runs.run(name, method=name)
  lines = runs.metrics(path)
  assert [line["step"] for line in lines] == [1, 2, 3]
  for line in lines:
    assert all(np.isfinite(v) for v in line.values()) and line["train/grad_norm"] > 0
    assert "train/reward" not in line                 # nothing is sampled, nothing is scored
  assert "eval/reward" in lines[1]
  if name == "mapo":
    total = lines[0]["loss/sft"] + lines[0]["loss/preference"]
    assert lines[0]["loss/total"] == pytest.approx(total, rel=1e-6)
    assert lines[0]["loss/sft"] == pytest.approx(lines[0]["train/error_w"], rel=1e-6)
  elif name == "diffusion_dpo":
    # At first the policy is the reference, but two programs: a last digit of an error near one,
    # 1.2e-7, is 3e-4 in the margin at beta = 5000. A mean of four such errors stays below 1e-3.
    assert lines[0]["loss/total"] == pytest.approx(math.log(2), abs=1e-3)
    assert abs(lines[0]["train/margin"]) < 1e-3
    assert lines[2]["loss/total"] != lines[0]["loss/total"]
  summary = json.loads((path / "summary.json").read_text())
  assert summary["tuned"]["kl_to_base"]["mean"] > 0 and "exact_tilt" not in summary
  # By hand: 3 updates of 8 pairs; SFT sees one image of each, DPO asks the reference as well.
  forward, backward = {"mapo": (16, 16), "diffusion_dpo": (32, 16), "sft": (8, 8)}[name]
  assert {k: v for k, v in summary["cost"].items() if not k.endswith("_bytes")} == {
      "denoiser_forward": 3 * forward, "denoiser_backward": 3 * backward, "decodes": 0,
      "reward_queries": 0, "reward_gradients": 0}


@pytest.mark.slow
def test_resume_is_bit_for_bit():
  """Pairs are drawn by step, and read from the latents that the first run wrote."""
  whole = runs.run("mapo", method="mapo")
  runs.run("mapo 1+2", method="mapo", train__steps=1)
  halves = runs.run("mapo 1+2", method="mapo", train__steps=3)
  train = lambda path: [{k: v for k, v in line.items() if not k.startswith("eval/")}
                        for line in runs.without_seconds(path)]
  assert train(halves) == train(whole)
  for file in ("pairs.npy", "export/unet/diffusion_pytorch_model.safetensors"):
    assert (whole / file).read_bytes() == (halves / file).read_bytes(), file


@pytest.mark.parametrize("name", NAMES)
def test_sd15_asks_for_pairs_and_model(name):
  config = runs.recipe("sd15", name)
  with pytest.raises(UserError, match="data.pairs is empty"):
    loop.run(parse(config), runs.FOLDER / "no pairs")
  config.data.pairs = "jaxalign:fixture"
  with pytest.raises(UserError, match="model.path is empty"):
    loop.run(parse(config), runs.FOLDER / "no pairs")
  assert not (runs.FOLDER / "no pairs").exists()


@pytest.mark.parametrize("key, value", [
    ("caption", "a dog"), ("jpg_0", "jpg_1"), ("label_0", 0.5)])
def test_a_run_on_pairs_that_have_changed_is_not_continued(tmp_path, key, value):
  rows = [{"caption": row["caption"], "jpg_0": row["image_0"], "jpg_1": row["image_1"],
           "label_0": row["label_0"], "label_1": 1 - row["label_0"]} for row in make_pairs()]
  file = tmp_path / "pairs.parquet"
  pq.write_table(pa.Table.from_pylist(rows), file)
  cfg = runs.smoke("mapo", data__pairs=str(file))

  def interrupted(*args):
    raise KeyboardInterrupt
  with mock.patch.object(loop, "Evaluator", interrupted), pytest.raises(KeyboardInterrupt):
    loop.run(cfg, tmp_path / "run", jax.devices()[:1])
  with (tmp_path / "run" / "metrics.jsonl").open("a") as file_of_metrics:
    file_of_metrics.write('{"step": 1, "seconds": 1.0}\n')     # else the folder would be free
  rows[1][key] = rows[1].get(value, value)
  rows[1]["label_1"] = 1 - rows[1]["label_0"]
  pq.write_table(pa.Table.from_pylist(rows), file)
  with pytest.raises(UserError, match="another run: the contents of data.pairs have changed since"):
    loop.run(cfg, tmp_path / "run", jax.devices()[:1])


@pytest.fixture(scope="module")
def experiment():
  return build(runs.smoke("mapo"), jax.devices()[:1])


def test_pair_table(experiment, tmp_path):
  """Preferred images first, encoded once; every pair once in each pass, in another order."""
  pairs = open_pairs("jaxalign:fixture", "soft")
  file = tmp_path / "pairs.npy"
  table = PairTable(experiment, pairs, tmp_path)
  written = file.stat().st_mtime_ns
  again = PairTable(experiment, pairs, tmp_path)
  assert file.stat().st_mtime_ns == written and len(list(tmp_path.iterdir())) == 2
  passes = [[int(i) for step in range(3 * n, 3 * n + 3) for i in table.draw(step, 4)]
            for n in range(2)]
  assert sorted(passes[0]) == sorted(passes[1]) == list(range(12)) and passes[0] != passes[1]
  np.testing.assert_array_equal(table.draw(5, 4), again.draw(5, 4))
  rows = table.rows(np.arange(12))
  np.testing.assert_array_equal(rows["pairs"]["label"], [1.0] * 11 + [0.5])
  latents = rows["pairs"]["latents"]
  assert latents.shape == (12, 2, *experiment.models.latent_shape) and np.isfinite(latents).all()
  origin = np.stack([pairs.images(i, 32, 32)["origin"] for i in range(12)])
  np.testing.assert_array_equal(rows["pairs"]["origin"], origin)
  np.testing.assert_array_equal(again.rows(np.arange(12))["pairs"]["origin"], origin)
  cond = experiment.embed([table.prompts[3]])["text"][0]
  # Embedded in a batch of another size: a few last digits of numbers up to 3.
  np.testing.assert_allclose(rows["cond"]["text"][3], cond, atol=1e-5)
  assert np.abs(rows["cond"]["text"][4] - cond).max() > 0.1
  with pytest.raises(UserError, match=r"pairs\.npy: has shape \(12, .* not \(11,"):
    PairTable(experiment, pairs.without_ties(), tmp_path)


def test_cache_is_found_by_content(experiment, tmp_path, monkeypatch, capsys):
  """A second run encodes nothing; other pairs or weights have files of their own; damage is mended.
  """
  pairs = open_pairs("jaxalign:fixture", "soft")
  exp = dataclasses.replace(experiment, config=runs.smoke(
      "mapo", data__cache=str(tmp_path / "cache")))
  read = lambda exp, pairs: PairTable(exp, pairs, tmp_path / "run").rows(np.arange(len(pairs)))
  files = lambda: sorted(path.name for path in (tmp_path / "cache").iterdir())
  same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
  first = read(exp, pairs)
  same(first, PairTable(experiment, pairs, tmp_path).rows(np.arange(len(pairs))))
  assert len(files()) == 3 and not (tmp_path / "run").exists()

  def refuse(*args):
    raise AssertionError("encoded again")
  blind = dataclasses.replace(exp, encode=refuse)
  monkeypatch.setattr("jaxalign.train.pairs.image_encoder", refuse)
  monkeypatch.setattr(type(exp), "embed", lambda self, prompts: (
      refuse() if prompts != [""] else {"text": np.zeros((1, 16, 32), np.float32)}))
  same(first, read(blind, pairs))
  monkeypatch.undo()

  assert len(read(exp, pairs.without_ties())["pairs"]["label"]) == 11 and len(files()) == 6
  params = exp.pipeline.params
  other = {**params, "vae": jax.tree.map(lambda a: 1.1 * a, params["vae"])}
  changed = read(dataclasses.replace(
      exp, pipeline=dataclasses.replace(exp.pipeline, params=other)), pairs)
  assert np.abs(changed["pairs"]["latents"] - first["pairs"]["latents"]).max() > 0.01
  assert len(files()) == 9

  for path in (tmp_path / "cache").iterdir():
    path.write_bytes(path.read_bytes()[:-9])
  capsys.readouterr()
  same(first, read(exp, pairs))
  assert capsys.readouterr().out.count("is damaged") == 2 and len(files()) == 9


def test_cache_is_for_pairs_only():
  with pytest.raises(UserError, match="data.cache=somewhere: method.name='ddpo' reads no pairs"):
    runs.smoke("ddpo", data__cache="somewhere")


def test_no_reference_is_allocated(experiment):
  """With all weights trained, MaPO and SFT never read the base model: bytes that an update needs.
  """
  exp = build(runs.smoke("mapo", model__adapter="full"), jax.devices()[:1])
  shape = lambda *s: jax.ShapeDtypeStruct(s, np.float32)
  rows = {"cond": {"text": shape(2, 16, 32)},
          "pairs": {"latents": shape(2, 2, *exp.models.latent_shape), "label": shape(2),
                    "origin": shape(2, 2, 4)}}
  shared, ids = {"uncond": {"text": shape(1, 16, 32)}}, jax.ShapeDtypeStruct((2,), np.int32)
  leaves = jax.tree.leaves(exp.frozen)
  base = sum(a.nbytes for a in jax.tree.leaves(exp.frozen["base"]))
  for name in NAMES:
    kind = registry.load_method(name)
    method = kind.make(exp.models, kind.Config(), exp.config.optim)

    def update(frozen, state, shared, rows, ids, key):
      experience = method.collect(state, frozen, PairTable.gather(shared, rows, ids), key)
      return method.update(state, frozen, experience, None, key)
    state = jax.eval_shape(lambda f: method.init(jax.random.key(0), f, None), exp.frozen)
    assert sum(a.size for a in jax.tree.leaves(state)) < 3.01 * base / 4    # weights, two moments
    jaxpr = jax.make_jaxpr(update)(exp.frozen, state, shared, rows, ids, jax.random.key(0)).jaxpr
    used = {id(v) for equation in jaxpr.eqns for v in equation.invars}
    read = sum(a.nbytes for a, v in zip(leaves, jaxpr.invars) if id(v) in used)
    assert read == (base if name == "diffusion_dpo" else 0), name
