"""LoRA files as people have them: kohya's, PEFT's, with text encoders; damaged and other ones."""
import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

import families
import runs
from jaxalign.convert import load_adapter, load_adapters, save_adapter
from jaxalign.convert.lora_names import module_of
from jaxalign.errors import UserError
from jaxalign.models import lora
from jaxalign.models.mmdit import SD3Transformer2DModel
from jaxalign.models.stable_diffusion import StableDiffusionPipeline
from jaxalign.models.stable_diffusion_3 import StableDiffusion3Pipeline
from jaxalign.models.unet import UNet2DConditionModel
from jaxalign.train import experiment

TEXT = {"attention": r"self_attn/(q|v|out)_proj$", "mlp": r"mlp/fc1$"}
Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def moved(tree, seed=1):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: (0.1 * rng.standard_normal(x.shape)).astype(np.float32), tree)


def adapter_of(params, targets, rank=3):
  return moved(lora.init(jax.random.key(0), params, rank, targets))


@pytest.fixture(scope="module")
def adapters(pipeline):
  """Of the UNet, and of the text encoder."""
  return {"unet": adapter_of(pipeline.params["unet"], StableDiffusionPipeline.lora_targets),
          "text_encoder": adapter_of(pipeline.params["text_encoder"], TEXT)}


def torch_factors(tree):
  """`{module: (a, b)}` in PyTorch's layout."""
  flat, found = traverse_util.flatten_dict(tree, sep="/"), {}
  for path in flat:
    if path.endswith("/a"):
      layer = path.removesuffix("/a")
      a, b = flat[path], flat[f"{layer}/b"]
      found[module_of(layer)] = ((a.T, b.T) if a.ndim == 2 else
                                 (a.transpose(3, 2, 0, 1), b.T[:, :, None, None]))
  return found


def kohya(trees, prefixes, alpha=None, rename=lambda module: module):
  tensors = {}
  for network, tree in trees.items():
    for module, (a, b) in torch_factors(tree).items():
      key = f"{prefixes[network]}_{rename(module).replace('.', '_')}"
      tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
      if alpha is not None:
        tensors[f"{key}.alpha"] = np.asarray(alpha, np.float32)
  return tensors


def write(file, tensors, metadata=None):
  file.parent.mkdir(exist_ok=True)
  safetensors.numpy.save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, file,
                              metadata=metadata)
  return file


def assert_same(left, right, **tolerance):
  left, right = (traverse_util.flatten_dict(tree, sep="/") for tree in (left, right))
  assert left.keys() == right.keys()
  for path, x in left.items():
    np.testing.assert_allclose(x, right[path], err_msg=path, **{"rtol": 0, "atol": 0, **tolerance})


def fails(file, params, *parts):
  with pytest.raises(UserError) as error:
    load_adapter(file, params)
  message = str(error.value)
  assert all(part in message for part in (str(file), *parts)) and "\n" not in message, message


@pytest.mark.parametrize("prefix", ["lora_te", "lora_te1"])
def test_kohyas_file_is_what_pytorch_reads_in_it(folder, pipeline, adapters, tmp_path, prefix):
  torch, _ = pytest.importorskip("torch"), pytest.importorskip("peft")
  diffusers = pytest.importorskip("diffusers")
  file = write(tmp_path / "kohya.safetensors",
               kohya(adapters, {"unet": "lora_unet", "text_encoder": prefix}, alpha=1.5),
               {"ss_network_dim": "3", "ss_network_alpha": "1.5"})
  found = load_adapters(file, pipeline.params, "unet")
  halved = {network: {path: x * np.float32(0.5) if path.endswith("/b") else x for path, x in
                      traverse_util.flatten_dict(tree, sep="/").items()}
            for network, tree in adapters.items()}
  assert_same(found["unet"], traverse_util.unflatten_dict(halved["unet"], sep="/"))
  if prefix == "lora_te1":                       # of a second encoder's time; the same file else
    return
  rng = np.random.default_rng(0)
  x, ids = rng.standard_normal((1, 8, 8, 4)).astype(np.float32), pipeline.tokenize(["a red cat"])
  params = {name: lora.merge(pipeline.params[name], tree) for name, tree in found.items()}
  text = jax.jit(pipeline.encode_prompts)(params, ids)["text"]
  out = jax.jit(pipeline.denoise)({"params": params["unet"]}, x, jnp.array(321), {"text": text})
  theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
  theirs.load_lora_weights(file.parent, weight_name=file.name)
  with torch.no_grad():
    states = theirs.text_encoder(torch.tensor(ids["text_encoder"]).long())[0]
    expected = theirs.unet(torch.from_numpy(x).permute(0, 3, 1, 2), 321, states).sample
  np.testing.assert_allclose(text, states, atol=1e-5, rtol=0)
  np.testing.assert_allclose(out, expected.permute(0, 2, 3, 1), atol=1e-5, rtol=0)
  plain = jax.jit(pipeline.encode_prompts)(pipeline.text_params, ids)["text"]
  assert np.abs(plain - text).max() > 0.01


def unet_shapes(family):
  unet = UNet2DConditionModel.from_config(families.UNETS[family])
  return jax.eval_shape(unet.init, jax.random.key(0), *unet.example_inputs())["params"]


def test_sgm_names_of_sdxl(tmp_path):
  """The names that kohya's trainer of SDXL writes; diffusers' conversion says which they are."""
  shapes = unet_shapes("sdxl")
  tree = adapter_of(shapes, {**StableDiffusionPipeline.lora_targets,
                             "rest": r"^(conv_in|time_embedding/linear_1|add_embedding/linear_2)$"})
  sgm = {}
  from jaxalign.convert import original
  modules = original.unet_modules([False, True], 1)
  for module, (a, b) in torch_factors(tree).items():
    key = "lora_unet_" + original.by_prefix(modules, module).replace(".", "_")
    sgm |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
  assert "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q.lora_up.weight" in sgm
  file = write(tmp_path / "sdxl.safetensors", sgm)
  assert_same(load_adapter(file, shapes), tree)

  torch = pytest.importorskip("torch")
  pytest.importorskip("diffusers", "0.36", reason="diffusers converts no `conv_in` before 0.36")
  from diffusers.loaders import lora_conversion_utils as theirs
  config = type("Config", (), {"layers_per_block": 1})
  blocks = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in sgm.items()
            if "_blocks_" in name or "middle_block" in name}
  blocks = theirs._maybe_map_sgm_blocks_to_diffusers(dict(blocks), config)
  converted, _ = theirs._convert_non_diffusers_lora_to_diffusers(dict(blocks))
  named = write(tmp_path / "named.safetensors", {name: x.numpy() for name, x in converted.items()})
  theirs_tree = traverse_util.flatten_dict(load_adapter(named, shapes), sep="/")
  ours = traverse_util.flatten_dict(tree, sep="/")
  assert len(theirs_tree) > 60
  for path, x in theirs_tree.items():
    np.testing.assert_array_equal(x, ours[path], err_msg=path)


def test_names_of_stable_diffusion_3(tmp_path):
  """Query, key and value are one layer there: one factor for three of ours, or in blocks."""
  model = SD3Transformer2DModel.from_config(dict(
      sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2,
      qk_norm="rms_norm", attention_head_dim=8, num_attention_heads=2,
      caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=8,
      pos_embed_max_size=8, dual_attention_layers=[0]))
  shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
  tree = adapter_of(shapes, StableDiffusion3Pipeline.lora_targets, rank=2)
  file = save_adapter(tree, tmp_path / "out", "transformer", style="kohya")
  tensors = safetensors.numpy.load_file(file)
  key = "lora_unet_joint_blocks_0_x_block_attn_qkv"
  assert tensors[f"{key}.lora_down.weight"].shape == (6, 16)
  assert tensors[f"{key}.lora_up.weight"].shape == (48, 6) and tensors[f"{key}.alpha"] == 6
  product = lambda tree: jax.tree.map(np.asarray, lora.merge(
      jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes), tree))
  assert_same(product(load_adapter(file, shapes, "transformer")), product(tree), atol=1e-6)
  rng = np.random.default_rng(0)
  a, b = rng.standard_normal((2, 16)), rng.standard_normal((48, 2))
  shared = {f"{key}.lora_down.weight": a.astype("f4"), f"{key}.lora_up.weight": b.astype("f4")}
  for name in (key, "diffusion_model.joint_blocks.0.x_block.attn.qkv"):
    file = write(tmp_path / "fused.safetensors",
                 {k.replace(key, name): x for k, x in shared.items()})
    attention = load_adapter(file, shapes, "transformer")["transformer_blocks_0"]["attn"]
    for i, part in enumerate(("to_q", "to_k", "to_v")):
      np.testing.assert_allclose(attention[part]["a"] @ attention[part]["b"],
                                 (b[16 * i:16 * i + 16] @ a).T, atol=1e-5)


@pytest.mark.parametrize("style", ["kohya", "peft"])
def test_what_we_write_for_others(folder, pipeline, adapters, tmp_path, style):
  text = {"text_encoder": adapters["text_encoder"]}
  file = save_adapter(adapters["unet"], tmp_path, style=style, text_encoders=text)
  found = load_adapters(file, pipeline.params, "unet")
  for network, tree in adapters.items():
    assert_same(found[network], tree)
  if style == "kohya":
    with safetensors.safe_open(file, "np") as content:
      names, about = set(content.keys()), content.metadata()
    assert names == set(kohya(adapters, {"unet": "lora_unet", "text_encoder": "lora_te"}, alpha=3))
    assert about["ss_network_dim"] == about["ss_network_alpha"] == "3"
    file = save_adapter(adapters["unet"], tmp_path / "xl", style=style,
                        text_encoders={**text, "text_encoder_2": {}})
    assert any(name.startswith("lora_te1_") for name in safetensors.numpy.load_file(file))
  pytest.importorskip("peft")
  theirs = pytest.importorskip("diffusers").StableDiffusionPipeline.from_pretrained(folder)
  theirs.load_lora_weights(tmp_path)
  for network, tree in adapters.items():
    state = getattr(theirs, network).state_dict()
    written = {name: x for name, x in state.items() if ".lora_A." in name or ".lora_B." in name}
    assert len(written) == 2 * len(torch_factors(tree))
    for module, (a, b) in torch_factors(tree).items():
      module = module.removeprefix("text_model.") if not any(
          name.startswith("text_model.") for name in written) else module
      for letter, x in zip("AB", (a, b)):
        np.testing.assert_array_equal(state[f"{module}.lora_{letter}.default_0.weight"], x)


def test_text_encoders_of_transformers_5(pipeline, adapters, tmp_path):
  """Whose modules have no `text_model.` before them; diffusers then writes none either."""
  file = save_adapter(adapters["unet"], tmp_path,
                      text_encoders={"text_encoder": adapters["text_encoder"]})
  tensors = {name.replace(".text_model.", "."): x
             for name, x in safetensors.numpy.load_file(file).items()}
  assert "text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight" in tensors
  found = load_adapters(write(tmp_path / "short.safetensors", tensors), pipeline.params, "unet")
  for network, tree in adapters.items():
    assert_same(found[network], tree)


def peft_folder(path, tree, prefix="base_model.model.", drop="", **config):
  tensors = {f"{prefix}{module.removeprefix(drop)}.lora_{letter}.weight": x
             for module, pair in torch_factors(tree).items() for letter, x in zip("AB", pair)}
  write(path / "adapter_model.safetensors", tensors)
  (path / "adapter_config.json").write_text(json.dumps(
      {"peft_type": "LORA", "r": 3, "lora_alpha": 6, **config}))
  return path


def test_folder_of_peft(pipeline, adapters, tmp_path):
  doubled = lambda tree, but=(): traverse_util.unflatten_dict(
      {path: x if path.endswith("/a") or path in but else 2 * x for path, x in
       traverse_util.flatten_dict(tree, sep="/").items()}, sep="/")
  for path in (tmp_path / "peft", tmp_path / "peft" / "adapter_model.safetensors"):
    peft_folder(tmp_path / "peft", adapters["unet"])
    assert_same(load_adapter(path, pipeline.params["unet"]), doubled(adapters["unet"]))
  peft_folder(tmp_path / "text", adapters["text_encoder"])
  found = load_adapters(tmp_path / "text", pipeline.params, "unet")
  assert found.keys() == {"text_encoder"}
  assert_same(found["text_encoder"], doubled(adapters["text_encoder"]))
  short = [module.removeprefix("text_model.") for module in torch_factors(adapters["text_encoder"])]
  peft_folder(tmp_path / "short", adapters["text_encoder"], drop="text_model.",
              alpha_pattern={f"^{module}$": 3 for module in short})
  assert_same(load_adapters(tmp_path / "short", pipeline.params, "unet")["text_encoder"],
              adapters["text_encoder"])
  key = rf"^{re.escape(Q)}$"                     # as PEFT anchors them
  for pattern in (key, Q, "attentions.0.transformer_blocks.0.attn1.to_q"):
    peft_folder(tmp_path / "alpha", adapters["unet"], alpha_pattern={pattern: 3},
                rank_pattern={pattern: 3})
    flat = traverse_util.flatten_dict(load_adapter(tmp_path / "alpha", pipeline.params["unet"]),
                                      sep="/")
    path = "mid_block/attentions_0/transformer_blocks_0/attn1/to_q/b"
    np.testing.assert_array_equal(
        flat[path], traverse_util.flatten_dict(adapters["unet"], sep="/")[path])
  for change, part in (({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
                       ({"use_dora": True}, "use_dora"), ({"lora_bias": True}, "lora_bias")):
    peft_folder(tmp_path / "bad", adapters["unet"], **change)
    with pytest.raises(UserError, match=f"adapter_config.json: {part}.* not supported"):
      load_adapter(tmp_path / "bad", pipeline.params["unet"])
  (tmp_path / "bad" / "adapter_config.json").write_text("[")
  with pytest.raises(UserError, match="adapter_config.json is not a JSON object"):
    load_adapter(tmp_path / "bad", pipeline.params["unet"])


@pytest.mark.parametrize("old", [False, True])
def test_text_encoders_in_the_names_of_diffusers(pipeline, adapters, tmp_path, old):
  def name(module, letter):
    if not old:
      return f"text_encoder.{module}.lora_{letter}.weight"
    kind = "_lora" if "self_attn" in module else ".lora_linear_layer"
    module = re.sub(r"self_attn\.(q|v|out)_proj", r"self_attn.to_\1", module)
    return f"text_encoder.{module}{kind}.{'down' if letter == 'A' else 'up'}.weight"

  file = write(tmp_path / "text.safetensors", {
      name(module, letter): x for module, pair in torch_factors(adapters["text_encoder"]).items()
      for letter, x in zip("AB", pair)})
  found = load_adapters(file, pipeline.params, "unet")
  assert_same(found["text_encoder"], adapters["text_encoder"])
  fails(file, pipeline.params["unet"], "text_encoder.text_model", "nor of its text encoders")


@pytest.mark.parametrize("merges", [False, True])
def test_a_run_has_text_encoders_merged(tmp_path, merges):
  cfg = runs.smoke(model__lora=str(tmp_path / "both.safetensors"),
                   model__adapter="full" if merges else "lora")
  from jaxalign.train.opening import open_pipeline
  pipeline = open_pipeline("jaxalign:fixture")
  own = {"unet": adapter_of(pipeline.params["unet"], {"a": r"attn\d/to_(q|k|v|out_0)$"}, 4),
         "text_encoder": adapter_of(pipeline.params["text_encoder"], TEXT, 2)}
  write(tmp_path / "both.safetensors",
        kohya(own, {"unet": "lora_unet", "text_encoder": "lora_te"}))
  built = experiment.starting_adapter(cfg, pipeline)[0]
  expected = jax.device_get(lora.merge(pipeline.params["text_encoder"], own["text_encoder"]))
  assert_same(built.params["text_encoder"], expected)
  assert_same(built.weights, jax.device_get(lora.merge(pipeline.weights, own["unet"]))
              if merges else pipeline.weights)


@pytest.mark.parametrize("tensor, kind", [
    ("dora_scale", "a DoRA"), ("hada_w1_a", "a LoHa"), ("lokr_w1", "a LoKr"),
    ("lora_mid.weight", "a LoCon with a Tucker core"), ("oft_diag", "an OFT"),
    ("diff", "a file of full differences")])
def test_other_kinds_are_refused_by_name(pipeline, adapters, tmp_path, tensor, kind):
  tensors = kohya({"unet": adapters["unet"]}, {"unet": "lora_unet"}, alpha=3)
  key = sorted(tensors)[0].rpartition(".alpha")[0] or sorted(tensors)[0].split(".")[0]
  file = write(tmp_path / "other.safetensors",
               {**tensors, f"{key}.{tensor}": np.ones((2, 2), "f4")})
  fails(file, pipeline.params["unet"], kind, f"{key}.{tensor}",
        "which is not supported; plain LoRA is")


@pytest.mark.parametrize("config", [
    {"alpha_pattern": {"([a-z0-9_.]+)+$!": 1}}, {"alpha_pattern": {"(": 1}}, {"alpha_pattern": [1]},
    {"lora_alpha": "abc"}, {"lora_alpha": None}, {"lora_alpha": float("nan")}, {"lora_alpha": True},
    {"alpha_pattern": {"to_q": float("inf")}}, {"alpha_pattern": {"to_q": [1]}},
])
def test_metadata_that_are_wrong(pipeline, adapters, tmp_path, config):
  tensors = {f"unet.{module}.lora_{letter}.weight": x
             for module, pair in torch_factors(adapters["unet"]).items()
             for letter, x in zip("AB", pair)}
  metadata = {"lora_adapter_metadata": json.dumps(
      {f"unet.{key}": value for key, value in config.items()})}
  file, begun = write(tmp_path / "a.safetensors", tensors, metadata), time.monotonic()
  fails(file, pipeline.params["unet"], "no number below 1e6" if "alpha_pattern" not in config else (
      "alpha"))
  assert time.monotonic() - begun < 5


def test_numbers_that_are_not_finite(pipeline, adapters, tmp_path):
  tensors = kohya({"unet": adapters["unet"]}, {"unet": "lora_unet"}, alpha=3)
  for name, bad in ((name, bad) for name in (sorted(tensors)[0], sorted(tensors)[1])
                    for bad in (np.nan, np.inf)):
    changed = {**tensors, name: np.full_like(tensors[name], bad)}
    fails(write(tmp_path / "nan.safetensors", changed), pipeline.params["unet"], name, "not finite")
  name = sorted(tensors)[0]
  fails(write(tmp_path / "two.safetensors", {**tensors, name: np.ones(2, "f4")}),
        pipeline.params["unet"], "alpha has shape (2,)")


def test_a_file_for_another_family_says_so(pipeline, tmp_path):
  file = write(tmp_path / "sd3.safetensors", {
      "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": np.ones((2, 16), "f4")})
  fails(file, pipeline.params["unet"], "for a unet of another family", "jaxalign.inspect")
