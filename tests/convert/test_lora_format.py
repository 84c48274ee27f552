"""LoRA files: PyTorch loads ours and we load PyTorch's, with equal outputs."""
import importlib
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import traverse_util

import runs
from jaxalign.config import recipes
from jaxalign.convert import load_adapter, load_adapters, save_adapter
from jaxalign.convert.adapter import FILE
from jaxalign.errors import UserError
from jaxalign.models import lora
from jaxalign.models.stable_diffusion import StableDiffusionPipeline
from jaxalign.train import experiment, opening
from jaxalign.train.restore import load_adapters_of, load_tuned, reference

TARGETS = StableDiffusionPipeline.lora_targets
ATTENTION = {"attention": TARGETS["attention"]}
Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def apply(pipeline):
  return jax.jit(pipeline.denoise)


@pytest.fixture(scope="module")
def adapter(pipeline):
  return moved(lora.init(jax.random.key(0), pipeline.params["unet"], 3, TARGETS))


@pytest.fixture(scope="module")
def inputs():
  rng = np.random.default_rng(0)
  return (rng.standard_normal((2, 8, 8, 4)).astype(np.float32),
          rng.standard_normal((2, 16, 32)).astype(np.float32))


def moved(tree):
  """The adapter after some training: every factor away from its start."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
      lambda x: np.asarray(x + 0.1 * rng.standard_normal(x.shape), np.float32), tree)


def ours(apply, pipeline, adapter, inputs):
  x, text = inputs
  variables = {"params": pipeline.params["unet"]} | ({"lora": adapter} if adapter else {})
  return np.asarray(apply(variables, x, jnp.array(321), {"text": text}))


def theirs(unet, inputs):
  import torch
  x, text = inputs
  with torch.no_grad():
    out = unet(torch.from_numpy(x).permute(0, 3, 1, 2), 321, torch.from_numpy(text)).sample
  return out.permute(0, 2, 3, 1).numpy()


def torch_pipeline(folder):
  pytest.importorskip("torch")
  pytest.importorskip("peft")
  return pytest.importorskip("diffusers").StableDiffusionPipeline.from_pretrained(folder)


def read(path):
  with safetensors.safe_open(path / FILE, "np") as file:
    return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def write(path, tensors, metadata=None):
  path.mkdir(exist_ok=True)
  safetensors.numpy.save_file(tensors, path / FILE, metadata=metadata)
  return path


def assert_same(left, right):
  left, right = (traverse_util.flatten_dict(tree, sep="/") for tree in (left, right))
  assert left.keys() == right.keys()
  for path, x in left.items():
    np.testing.assert_array_equal(x, right[path], err_msg=path, strict=True)


def test_pytorch_loads_our_adapter(apply, pipeline, folder, adapter, inputs, tmp_path):
  other = torch_pipeline(folder)
  base = ours(apply, pipeline, None, inputs)
  tuned = ours(apply, pipeline, adapter, inputs)
  assert np.abs(tuned - base).max() > 0.05
  save_adapter(adapter, tmp_path)
  other.load_lora_weights(tmp_path)
  config, = other.unet.peft_config.values()
  assert config.r == config.lora_alpha == 3
  np.testing.assert_allclose(theirs(other.unet, inputs), tuned, atol=1e-5, rtol=0)
  other.unload_lora_weights()
  np.testing.assert_allclose(theirs(other.unet, inputs), base, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_pytorch_loads_one_with_two_ranks(apply, pipeline, folder, inputs, tmp_path):
  params = pipeline.params["unet"]
  trees = [traverse_util.flatten_dict(
               lora.init(jax.random.key(0), params, rank, {target: TARGETS[target]}))
           for rank, target in ((2, "attention"), (5, "ff"))]
  mixed = moved(traverse_util.unflatten_dict(trees[0] | trees[1]))
  save_adapter(mixed, tmp_path)
  other = torch_pipeline(folder)
  other.load_lora_weights(tmp_path)
  np.testing.assert_allclose(theirs(other.unet, inputs), ours(apply, pipeline, mixed, inputs),
                             atol=1e-5, rtol=0)
  assert_same(load_adapter(tmp_path, params), mixed)


@pytest.mark.parametrize("options", [
    {"r": 4, "lora_alpha": 4}, {"r": 4, "lora_alpha": 10},
    {"r": 4, "lora_alpha": 6, "use_rslora": True},
    {"r": 4, "lora_alpha": 6, "alpha_pattern": {"attn1.to_q": 1}, "rank_pattern": {"to_v": 2}},
])
def test_we_load_an_adapter_of_pytorch(apply, pipeline, folder, inputs, tmp_path, options):
  other = torch_pipeline(folder)
  import peft
  import torch
  from diffusers.training_utils import _collate_lora_metadata
  other.unet.add_adapter(peft.LoraConfig(
      init_lora_weights=False, target_modules=["to_q", "to_v", "to_out.0", "proj_in", "conv1"],
      **options))
  with torch.no_grad():
    expected = theirs(other.unet, inputs)
  other.save_lora_weights(tmp_path, peft.get_peft_model_state_dict(other.unet),
                          **_collate_lora_metadata({"unet": other.unet}))
  found = load_adapter(tmp_path, pipeline.params["unet"])
  np.testing.assert_allclose(ours(apply, pipeline, found, inputs), expected, atol=1e-5, rtol=0)
  merged = {"params": lora.merge(pipeline.params["unet"], found)}
  x, text = inputs
  np.testing.assert_allclose(apply(merged, x, jnp.array(321), {"text": text}), expected,
                             atol=1e-5, rtol=0)


def test_round_trip_is_bit_identical(pipeline, adapter, tmp_path):
  params = pipeline.params["unet"]
  file = save_adapter(adapter, tmp_path / "one")
  assert_same(load_adapter(file, params), adapter)
  assert_same(load_adapter(file.parent, params), adapter)
  save_adapter(load_adapter(file, params), tmp_path / "two")
  # Not the files as such: safetensors writes the entries of its header in no fixed order.
  (tensors, about), (again, about_again) = read(tmp_path / "one"), read(tmp_path / "two")
  assert_same(tensors, again)
  assert about == about_again
  save_adapter(adapter, tmp_path / "two", dtype="bfloat16")        # replaces
  assert {str(x.dtype) for x in read(tmp_path / "two")[0].values()} == {"bfloat16"}
  assert [p.name for p in (tmp_path / "two").iterdir()] == [FILE]


def test_older_names_and_alphas(pipeline, tmp_path):
  adapter = moved(lora.init(jax.random.key(0), pipeline.params["unet"], 2, ATTENTION))
  save_adapter(adapter, tmp_path / "new")
  tensors, _ = read(tmp_path / "new")
  newer = lambda name: name.replace(".lora_A", ".lora.down").replace(".lora_B", ".lora.up")
  oldest = lambda name: re.sub(r"\.(to_\w+?)(?:\.0)?\.lora_(A|B)", lambda m: (
      f".processor.{m[1]}_lora.{'down' if m[2] == 'A' else 'up'}"), name)
  for k, rename in enumerate((newer, oldest)):
    old = write(tmp_path / str(k), {rename(name): x for name, x in tensors.items()})
    assert not any("lora_A" in name for name in read(old)[0])
    assert_same(load_adapter(old, pipeline.params["unet"]), adapter)
  # An alpha beside the factors: the rank is 2, so 4 doubles and 2 changes nothing.
  alpha = write(tmp_path / "alpha", tensors | {f"unet.{Q}.alpha": np.array(4, np.float32)})
  found = load_adapter(alpha, pipeline.params["unet"])
  layer = "mid_block/attentions_0/transformer_blocks_0/attn1/to_q/b"
  flat, plain = (traverse_util.flatten_dict(t, sep="/") for t in (found, adapter))
  np.testing.assert_array_equal(flat.pop(layer), 2 * plain.pop(layer))
  assert_same(flat, plain)


@pytest.mark.parametrize("change, parts", [
    (lambda t: t | {"unet.nowhere.to_q.lora_A.weight": np.zeros((2, 32), "f4")},
     ["unet.nowhere.to_q.lora_A.weight is not an adapter of a layer of this unet"]),
    (lambda t: t | {"text_encoder.q_proj.lora_A.weight": np.zeros((2, 32), "f4")},
     ["text_encoder.q_proj"]),
    (lambda t: t | {f"unet.{Q}.lora_A.weight": np.zeros((2, 31), "f4")}, [Q, "(2, 31)", "(2, 32)"]),
    (lambda t: t | {f"unet.{Q}.lora_B.weight": np.zeros((32, 5), "f4")}, [Q, "(32, 5)"]),
    (lambda t: t | {f"unet.{Q}.lora_B.weight": np.zeros((32, 2), "i4")}, [Q, "int32"]),
    (lambda t: t | {f"unet.{Q}.lora.up.weight": np.zeros((32, 2), "f4")},
     [Q, "is there under two names"]),
    (lambda t: {k: x for k, x in t.items() if k != f"unet.{Q}.lora_B.weight"},
     [Q, "has only one of its two factors"]),
    (lambda t: {}, ["no adapter"]),
])
def test_tensors_that_do_not_fit(pipeline, tmp_path, change, parts):
  params = pipeline.params["unet"]
  save_adapter(lora.init(jax.random.key(0), params, 2, ATTENTION), tmp_path)
  write(tmp_path, change(read(tmp_path)[0]))
  fails(tmp_path, params, str(tmp_path / FILE), *parts)


def fails(path, params, *parts):
  with pytest.raises(UserError) as error:
    load_adapter(path, params)
  for part in parts:
    assert part in str(error.value) and "\n" not in str(error.value), error.value


def test_unusable_files(pipeline, tmp_path):
  params = pipeline.params["unet"]
  fails(tmp_path, params, str(tmp_path), FILE)
  fails(tmp_path / "nowhere", params, "no such file")
  (tmp_path / FILE).write_bytes(b"\xff" * 100)
  fails(tmp_path, params, str(tmp_path / FILE), "corrupt")
  (tmp_path / FILE).unlink()
  torch = pytest.importorskip("torch")
  torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_lora_weights.bin")
  fails(tmp_path, params, "pytorch_lora_weights.bin", "pickled", "refused")
  (tmp_path / "pytorch_lora_weights.bin").rename(tmp_path / FILE)
  fails(tmp_path, params, str(tmp_path / FILE), "pickled")
  (tmp_path / FILE).unlink()
  adapter = lora.init(jax.random.key(0), params, 2, ATTENTION)
  save_adapter(adapter, tmp_path)
  for key, value in (("unet.use_dora", True), ("unet.lora_bias", True)):
    write(tmp_path, read(tmp_path)[0], {"lora_adapter_metadata": json.dumps({key: value})})
    fails(tmp_path, params, key.removeprefix("unet."), "not supported")
  write(tmp_path, read(tmp_path)[0], {"lora_adapter_metadata": "[]"})
  fails(tmp_path, params, "lora_adapter_metadata")


# The config key, and the command.


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """An adapter for the model of the smoke recipes, and its folder."""
  unet = opening.open_pipeline("jaxalign:fixture").params["unet"]
  adapter = moved(lora.init(jax.random.key(3), unet, 4, ATTENTION))
  path = tmp_path_factory.mktemp("adapter")
  save_adapter(adapter, path)
  return adapter, path, unet


def test_a_run_starts_from_an_adapter(start):
  adapter, path, unet = start
  exp = experiment.build(runs.smoke(model__lora=str(path)), jax.devices()[:1])
  assert_same(jax.device_get(exp.models.init_policy(jax.random.key(0), exp.frozen)), adapter)
  assert_same(jax.device_get(exp.frozen["base"]["params"]), unet)      # the reference: without it


@pytest.mark.parametrize("method, adapter", [("nabla_gfn", "full"), ("dno", "lora")])
def test_or_has_it_merged(start, method, adapter):
  factors, path, unet = start
  cfg = runs.smoke(method, model__lora=str(path), model__adapter=adapter)
  exp = experiment.build(cfg, jax.devices()[:1])
  assert_same(jax.device_get(exp.frozen["base"]["params"]),
              jax.device_get(lora.merge(unet, factors)))
  assert "adapter" not in exp.frozen


@pytest.mark.parametrize("overrides, parts", [
    ({"model__lora_rank": 8}, ["has rank 4", "model.lora_rank=8"]),
    ({"model__lora_targets": ("attention", "ff")}, ["lacks", "model.lora_targets=attention,ff"]),
    ({"model__lora_targets": ("ff",)}, ["attn1/to_", "model.lora_targets=ff"]),
    ({"model__lora": "no/where"}, ["model.lora=no/where", "no such file"]),
])
def test_adapter_that_does_not_fit_the_config(start, overrides, parts):
  with pytest.raises(UserError) as error:
    experiment.build(runs.smoke(**{"model__lora": str(start[1]), **overrides}), jax.devices()[:1])
  for part in ("model.lora=", *parts):
    assert part in str(error.value)


def call(monkeypatch, command, **flags):
  """The command with these flags, and its defaults for the others."""
  module = importlib.import_module(f"jaxalign.{command}")
  module._FLAGS.mark_as_parsed()
  for name, value in flags.items():
    value = value if isinstance(value, int) else str(value)
    monkeypatch.setattr(module, f"_{name}", types.SimpleNamespace(value=value))
  module.main([])


def test_evaluation_has_the_runs_base(start, tmp_path):
  """It is without the denoiser's part, which the policy started from."""
  adapter, _, unet = start
  fixture = opening.open_pipeline("jaxalign:fixture")
  text = moved(lora.init(jax.random.key(4), fixture.params["text_encoder"], 2, {"a": "self_attn"}))
  file = save_adapter(adapter, tmp_path, text_encoders={"text_encoder": text})
  own = reference(runs.smoke(model__lora=str(file)))
  assert_same(own.params["text_encoder"],
              jax.device_get(lora.merge(fixture.params["text_encoder"], text)))
  assert_same(own.weights, unet)


def test_export_command(monkeypatch, tmp_path):
  run = runs.finished()
  adapters, denoiser = load_adapters_of(run)
  assert denoiser == "unet" and adapters.keys() == {"unet", "text_encoder"}
  adapter = adapters["unet"]
  call(monkeypatch, "export", CHECKPOINT=run, FORMAT="lora", OUTPUT=tmp_path)
  unet = opening.open_pipeline("jaxalign:fixture").params["unet"]
  found = load_adapter(tmp_path, unet)
  assert_same(found, adapter)
  merged = jax.device_get(lora.merge(unet, found))
  assert_same(merged, load_tuned(run).params["unet"])
  with pytest.raises(UserError, match="model.adapter=lora"):
    load_adapters_of(run / "export")


@pytest.mark.slow
def test_a_whole_run_from_an_adapter(start, tmp_path, monkeypatch):
  """What it has for the text encoder is in the images, in every export and in the comparison."""
  fixture = opening.open_pipeline("jaxalign:fixture")
  text = moved(lora.init(jax.random.key(4), fixture.params["text_encoder"], 2, {"a": "self_attn"}))
  both = save_adapter(start[0], tmp_path / "both", text_encoders={"text_encoder": text})
  run = runs.run("from_adapter", model__lora=str(both))
  merged = jax.device_get(lora.merge(fixture.params["text_encoder"], text))
  assert_same(load_tuned(run).params["text_encoder"], merged)
  call(monkeypatch, "export", CHECKPOINT=run, FORMAT="lora", OUTPUT=tmp_path / "lora")
  found = load_adapters(tmp_path / "lora", fixture.params, "unet")
  assert_same(found["text_encoder"], text)
  tuned = found["unet"]
  call(monkeypatch, "evaluate", CHECKPOINT=run, PROMPTS=str(runs.HELD_OUT),
       OUTPUT=tmp_path / "result.json", SAMPLES=2)
  result = json.loads((tmp_path / "result.json").read_text())
  summary = json.loads((run / "summary.json").read_text())
  for model in ("base", "tuned"):
    assert result[model]["reward"]["mean"] == pytest.approx(summary[model]["reward"]["mean"],
                                                            abs=1e-4)
  shapes = lambda tree: jax.tree.map(np.shape, tree)
  assert shapes(tuned) == shapes(start[0])
  near, new = (sum(np.square(x - y).sum() for x, y in zip(*map(jax.tree.leaves, (tuned, tree))))
               for tree in (start[0], jax.tree.map(np.zeros_like, tuned)))
  assert 0 < near < new / 10      # three updates away from where it started
  assert recipes.parse(json.loads((run / "config.json").read_text())["config"]).model.lora
