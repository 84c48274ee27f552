"""Rewards on CLIP towers against transformers and open_clip, with the same random weights."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import runs
from jaxalign.convert.clip import load_clip, param_shapes, towers
from jaxalign.errors import UserError
from jaxalign.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from jaxalign.rewards import make_reward
from jaxalign.rewards.clip_towers import crop, letterbox, resize
from jaxalign.testing.fixture import make_tokenizer
from jaxalign.train import experiment

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPTS = ["a red cat on a blue background", "moon", "the house!!"]
SIZE = 16                # pixels that the small tower sees
TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def make_clip(folder, act="gelu", seed=0):
  """A small random `CLIPModel`, and its directory with a tokenizer."""
  tokenizer = make_tokenizer()
  config = transformers.CLIPConfig(
      text_config=dict(TOWER, hidden_act=act, vocab_size=tokenizer.vocab_size,
                       max_position_embeddings=tokenizer.length, bos_token_id=tokenizer.bos_id,
                       eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id),
      vision_config=dict(TOWER, hidden_act=act, image_size=SIZE, patch_size=4),
      projection_dim=24, logit_scale_init_value=3.0)
  torch.manual_seed(seed)
  model = transformers.CLIPModel(config).eval()
  for name, parameter in model.named_parameters():  # their initial weights are nearly the identity
    if name != "logit_scale":
      parameter.data.normal_(std=0.2)
  model.save_pretrained(folder, safe_serialization=True)
  tokenizer.save(folder)
  return model


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clip")
  return folder, make_clip(folder)


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(0).uniform(size=(3, 37, 58, 3)).astype(np.float32)


def torch_resize(x, height, width):
  """What torchvision's bicubic `resize(antialias=True)` calls for a tensor [B, 3, H, W]."""
  return torch.nn.functional.interpolate(x, (height, width), mode="bicubic", align_corners=False,
                                         antialias=True)


def torch_crop(x, size, offset):
  height, width = x.shape[2:]
  short = min(height, width)
  x = torch_resize(x, int(size * height / short), int(size * width / short))
  top, left = offset(x.shape[2] - size), offset(x.shape[3] - size)
  return x[:, :, top:top + size, left:left + size]


def torch_letterbox(x, size):
  scale = size / max(x.shape[2:])
  x = torch_resize(x, *(round(side * scale) for side in x.shape[2:]))
  height, width = size - x.shape[2], size - x.shape[3]
  return torch.nn.functional.pad(
      x, (width // 2, width - width // 2, height // 2, height - height // 2))


half = lambda extra: int(round(extra / 2.0))
floor = lambda extra: extra // 2


def with_gradient(function, images):
  """Values of a torch function of [B, 3, H, W], and the gradient of their sum, [B, H, W, 3]."""
  x = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
  values = function(x)
  values.sum().backward()
  return values.detach().numpy(), x.grad.numpy().transpose(0, 2, 3, 1)


def score_and_gradient(reward, images, prompts=PROMPTS):
  def total(images, params, prepared):
    scores = reward.score(params, images, prepared)
    return scores.sum(), scores
  (_, scores), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(
      images, reward.params, reward.prepare(prompts))
  return np.asarray(scores), np.asarray(gradient)


def assert_gradient(ours, theirs):
  """Within 1e-5 of the largest entry, far below 1 where thousands of pixels share a cosine."""
  scale = np.abs(theirs).max()
  assert scale > 1e-6
  np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-5)


def embed(model, pixels):
  """`get_image_features`, which returns a tensor in transformers 4 and an object in 5."""
  return model.visual_projection(model.vision_model((pixels - MEAN) / STD).pooler_output)


def reference(folder, model, fit, *, scaled):
  """Scores of transformers' own model and tokenizer."""
  tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
  ids = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
  text = model.text_projection(model.text_model(ids).pooler_output).detach()
  text = text / text.norm(dim=-1, keepdim=True)

  def score(x):
    image = embed(model, fit(x))
    cosine = (image / image.norm(dim=-1, keepdim=True) * text).sum(-1)
    return cosine * model.logit_scale.exp().detach() if scaled else cosine
  return score


@pytest.mark.parametrize("shape", [(37, 58), (64, 19), (9, 13), (16, 16)])
def test_resize_is_torchs(shape):
  x = np.random.default_rng(1).uniform(size=(2, *shape, 3)).astype(np.float32)
  weights = np.random.default_rng(2).normal(size=(2, 16, 21, 3)).astype(np.float32)
  ours, pull = jax.vjp(lambda x: resize(x, 16, 21), jnp.asarray(x))
  t = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
  theirs = torch_resize(t, 16, 21)
  theirs.backward(torch.tensor(weights.transpose(0, 3, 1, 2)))
  np.testing.assert_allclose(ours, theirs.detach().numpy().transpose(0, 2, 3, 1), atol=1e-5)
  np.testing.assert_allclose(pull(jnp.asarray(weights))[0],
                             t.grad.numpy().transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize("shape", [(37, 58), (58, 37), (40, 61), (23, 23), (11, 16)])
def test_crop_and_letterbox(shape):
  x = np.random.default_rng(3).uniform(size=(1, *shape, 3)).astype(np.float32)
  t = torch.tensor(x.transpose(0, 3, 1, 2))
  for ours, theirs in ((crop(x, SIZE), torch_crop(t, SIZE, half)),
                       (crop(x, SIZE, floor), torch_crop(t, SIZE, floor)),
                       (letterbox(x, SIZE), torch_letterbox(t, SIZE))):
    assert ours.shape == (1, SIZE, SIZE, 3)
    np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def test_crop_is_the_processors():
  """transformers' own preprocessing of an 8-bit picture, up to its rounding in two passes."""
  rows, columns = np.mgrid[:301, :500]
  picture = np.stack([rows / 300, columns / 499, 0.5 + 0.3 * np.sin(columns / 25)], -1)
  picture = (255 * picture).round().astype(np.uint8)
  processor = transformers.CLIPImageProcessor()
  theirs = processor(Image.fromarray(picture), return_tensors="np").pixel_values
  theirs = theirs.transpose(0, 2, 3, 1) * processor.image_std + processor.image_mean
  ours = crop(jnp.asarray(picture[None], jnp.float32) / 255, 224, floor)
  np.testing.assert_allclose(ours, theirs, atol=1.5 / 255)
  shifted = np.abs(np.asarray(ours)[:, :, 1:] - theirs[:, :, :-1]).max()
  assert shifted > 3 / 255  # so a crop one pixel off would not have passed


@pytest.mark.parametrize("name, fit, scaled, act", [
    ("clip_score", lambda x: torch_crop(x, SIZE, half), False, "quick_gelu"),
    ("clip_score", lambda x: torch_crop(x, SIZE, half), False, "gelu"),
    ("pickscore", lambda x: torch_crop(x, SIZE, floor), True, "gelu"),
    ("hpsv2", lambda x: torch_letterbox(x, SIZE), False, "gelu"),
    ("hpsv2.1", lambda x: torch_letterbox(x, SIZE), False, "gelu"),
])
def test_parity(name, fit, scaled, act, images, tmp_path):
  model = make_clip(tmp_path, act, seed=1)
  scores, gradient = score_and_gradient(make_reward((f"{name}:{tmp_path}",), (1.0,)), images)
  expected, slope = with_gradient(reference(tmp_path, model, fit, scaled=scaled), images)
  assert np.ptp(expected) > 0.05
  np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=1e-6)
  assert_gradient(gradient, slope)


def test_a_clip_can_be_the_judge(clip, images):
  """Its features are the image embedding, of length one; so runs of any domain have a diversity."""
  folder, model = clip
  cfg = runs.smoke(eval__judge=f"clip_score:{folder}")
  judge = experiment.build(cfg, jax.devices()[:1]).judge
  pixels = torch_crop(torch.tensor(images.transpose(0, 3, 1, 2)), SIZE, half)
  embedding = embed(model, pixels).detach()
  np.testing.assert_allclose(judge.features(judge.params, images),
                             embedding / embedding.norm(dim=-1, keepdim=True), atol=1e-5)
  with pytest.raises(UserError, match="eval.judge='grayness' gives no features"):
    experiment.build(runs.smoke(eval__judge="grayness"), jax.devices()[:1])


def make_head(width, seed=0):
  """LAION's head, as its authors stack it."""
  torch.manual_seed(seed)
  linear, drop = torch.nn.Linear, torch.nn.Dropout
  layers = torch.nn.Sequential(linear(width, 1024), drop(0.2), linear(1024, 128), drop(0.2),
                               linear(128, 64), drop(0.1), linear(64, 16), linear(16, 1))
  return torch.nn.ModuleDict({"layers": layers}).eval()


@pytest.mark.parametrize("file", ["head.safetensors", "head.pth"])
def test_aesthetic_parity(file, clip, images, tmp_path):
  folder, model = clip
  head = make_head(24)
  if file.endswith(".pth"):
    torch.save(head.state_dict(), tmp_path / file)
  else:
    save_file({k: v.numpy() for k, v in head.state_dict().items()}, tmp_path / file)

  def score(x):
    embedding = embed(model, torch_crop(x, SIZE, half))
    return head["layers"](embedding / embedding.norm(dim=-1, keepdim=True))[:, 0]

  reward = make_reward((f"aesthetic:{folder},{tmp_path / file}",), (1.0,))
  scores, gradient = score_and_gradient(reward, images)
  expected, slope = with_gradient(score, images)
  np.testing.assert_allclose(scores, expected, atol=1e-5)
  assert_gradient(gradient, slope)
  assert reward.prepare(PROMPTS) == {}


def open_clip_layout(state):
  """transformers' tensors under the names that open_clip gives them, qkv fused."""
  out = {"logit_scale": state["logit_scale"], "text_projection": state["text_projection.weight"].T,
         "visual.proj": state["visual_projection.weight"].T}
  for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
    for i in range(TOWER["num_hidden_layers"]):
      layer, block = f"{tower}.encoder.layers.{i}", f"{prefix}transformer.resblocks.{i}"
      for kind in ("weight", "bias"):
        out[f"{block}.attn.in_proj_{kind}"] = np.concatenate(
            [state[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"])
        for theirs, ours in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"),
                             ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"),
                             ("mlp.fc2", "mlp.c_proj")):
          out[f"{block}.{ours}.{kind}"] = state[f"{layer}.{theirs}.{kind}"]
    out[f"{prefix}positional_embedding"] = state[f"{tower}.embeddings.position_embedding.weight"]
  for kind in ("weight", "bias"):
    out[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
    out[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
    out[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
  out["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
  out["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
  out["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
  return {name: np.array(x, order="C") for name, x in out.items()}


@pytest.mark.parametrize("file", ["HPS.pt", "module.pt", "hps.safetensors", "folder"])
def test_weights_of_another_file(file, clip, tmp_path):
  """The published forms of HPSv2's weights all score alike."""
  folder, _ = clip
  base, tuned = tmp_path / "base", tmp_path / "tuned"
  make_clip(base, seed=1)  # sizes and tokenizer; its weights must not be used
  state = load_file(folder / "model.safetensors")
  source = tmp_path / file
  if file.endswith(".pt"):
    prefix = "module." if file == "module.pt" else ""
    torch.save({"epoch": 1, "state_dict": {prefix + name: torch.tensor(x) for name, x in
                                           open_clip_layout(state).items()}}, source)
  elif file == "folder":
    source = tuned
    tuned.mkdir()
    save_file(state, tuned / "model.safetensors")
  else:
    save_file(open_clip_layout(state), source)
  load = lambda where: make_reward((f"hpsv2:{where}",), (1.0,))
  ours, theirs, unused = load(f"{base},{source}"), load(folder), load(base)
  jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
  texts = [reward.prepare(PROMPTS)["hpsv2/text"] for reward in (ours, theirs, unused)]
  np.testing.assert_array_equal(texts[0], texts[1])
  assert np.abs(texts[0] - texts[2]).max() > 0.01


@pytest.mark.parametrize("name, fit", [
    ("clip_score", lambda x: torch_crop(x, SIZE, half)),
    ("hpsv2", lambda x: torch_letterbox(x, SIZE))])
def test_open_clip(name, fit, clip, images, tmp_path):
  """open_clip's own network, random weights, saved by itself."""
  open_clip = pytest.importorskip("open_clip")
  folder, hf = clip
  tokenizer = make_tokenizer()
  torch.manual_seed(3)
  model = open_clip.CLIP(
      24, dict(layers=2, width=32, head_width=8, mlp_ratio=2, patch_size=4, image_size=SIZE),
      dict(context_length=tokenizer.length, vocab_size=tokenizer.vocab_size, width=32, heads=4,
           layers=2, mlp_ratio=2)).eval()
  for parameter in model.parameters():
    if parameter.ndim:
      parameter.data.normal_(std=0.2)
  torch.save(model.state_dict(), tmp_path / "open_clip.pt")
  text = model.encode_text(torch.tensor(tokenizer(PROMPTS)).long(), normalize=True).detach()
  score = lambda x: (model.encode_image((fit(x) - MEAN) / STD, normalize=True) * text).sum(-1)
  expected, slope = with_gradient(score, images)
  where = f"{name}:{folder},{tmp_path / 'open_clip.pt'}"
  scores, gradient = score_and_gradient(make_reward((where,), (1.0,)), images)
  np.testing.assert_allclose(scores, expected, atol=1e-5)
  assert_gradient(gradient, slope)


def count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
             num_attention_heads=16, patch_size=14)
HUGE = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
            num_attention_heads=16, patch_size=14, hidden_act="gelu")
LARGE_TEXT = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                  num_attention_heads=12)
HUGE_TEXT = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                 num_attention_heads=16, hidden_act="gelu")
GIANT_TEXT = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                  num_attention_heads=20, hidden_act="gelu", projection_dim=1280)


@pytest.mark.parametrize("kind, config, expected", [
    (CLIPTextModel, LARGE_TEXT, 123_060_480),
    (CLIPTextModelWithProjection, GIANT_TEXT, 694_659_840)])
def test_parameters_of_text_towers(kind, config, expected):
  ids = jnp.zeros((1, 2), jnp.int32)
  tree = jax.eval_shape(kind.from_config(config).init, jax.random.key(0), ids)["params"]
  assert count(tree) == expected


@pytest.mark.parametrize("vision, text, width", [(LARGE, LARGE_TEXT, 768),
                                                 (HUGE, HUGE_TEXT, 1024)])
def test_parameters_of_both_towers(vision, text, width):
  """ViT-L/14 and ViT-H/14 have the tensors of transformers' `CLIPModel`, each in its size."""
  config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=width)
  with torch.device("meta"):
    theirs = transformers.CLIPModel(config)
  ours = param_shapes(*towers(config.to_dict()))
  assert count(ours) == sum(p.numel() for p in theirs.parameters())
  assert count({k: ours[k] for k in ("vision_model", "visual_projection")}) == sum(
      p.numel() for part in (theirs.vision_model, theirs.visual_projection)
      for p in part.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("vision, text, width, name", [
    (LARGE, LARGE_TEXT, 768, "clip_score"), (HUGE, HUGE_TEXT, 1024, "pickscore")])
def test_full_size(vision, text, width, name, tmp_path):
  """ViT-L/14 and ViT-H/14 as they are published, on a picture of 300x200; 14 GiB for the latter."""
  tokenizer = make_tokenizer()
  config = transformers.CLIPConfig(
      vision_config=vision, text_config=dict(text, eos_token_id=tokenizer.eos_id),
      projection_dim=width)
  torch.manual_seed(0)
  model = transformers.CLIPModel(config).eval()
  model.save_pretrained(tmp_path, safe_serialization=True)
  tokenizer.save(tmp_path)
  images = np.random.default_rng(0).uniform(size=(3, 300, 200, 3)).astype(np.float32)
  images = images ** np.asarray([1, 2, 3])[:, None, None, None].astype(np.float32)
  scaled = name == "pickscore"
  offset = floor if scaled else half
  fit = lambda x: torch_crop(x, 224, offset)
  expected, slope = with_gradient(reference(tmp_path, model, fit, scaled=scaled), images)
  del model
  reward = make_reward((f"{name}:{tmp_path}",), (1.0,))
  (tmp_path / "model.safetensors").unlink()      # gigabytes
  scores, gradient = score_and_gradient(reward, images)
  assert np.ptp(expected) > 1e-3
  np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=1e-5)
  assert_gradient(gradient, slope)


def test_names_without_where(clip, images, tmp_path):
  """Terms are called by the short name, unless two share it."""
  folder, _ = clip
  other = tmp_path / "other"
  make_clip(other, seed=1)
  reward = make_reward((f"pickscore:{folder}", "brightness"), (0.05, 1.0))
  score = lambda reward: jax.jit(reward.terms)(reward.params, images, reward.prepare(PROMPTS))
  assert set(score(reward)) == {"pickscore", "brightness"}
  assert "0.05*pickscore + brightness" == reward.name
  names = (f"clip_score:{folder}", f"clip_score:{other}")
  twice = make_reward(names, (1.0, 1.0))
  assert list(twice.weights) == list(names)
  terms = score(twice)
  assert np.abs(terms[names[0]] - terms[names[1]]).max() > 0.01


def test_old_configs(clip, images, tmp_path):
  """Files of before transformers 4.31: a second copy of the sizes, and 2 as end of text."""
  folder, _ = clip
  make_clip(tmp_path)
  file = tmp_path / "config.json"
  config = json.loads(file.read_text())
  for tower in ("text", "vision"):
    config[f"{tower}_config_dict"] = config[f"{tower}_config"]
    config[f"{tower}_config"] = {"hidden_size": 48, "model_type": f"clip_{tower}_model"}
  config["text_config_dict"]["eos_token_id"] = 2
  file.write_text(json.dumps(config))
  score = lambda where: score_and_gradient(make_reward((f"pickscore:{where}",), (1.0,)), images)[0]
  np.testing.assert_array_equal(score(tmp_path), score(folder))


def edit(folder, change):
  tensors = load_file(folder / "model.safetensors")
  change(tensors)
  save_file(tensors, folder / "model.safetensors")


def drop(prefix):
  return lambda t: [t.pop(name) for name in list(t) if name.startswith(prefix)]


def config_without(key):
  def change(folder):
    file = folder / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items()
                                if k != key}))
  return change


def pickled(folder):
  (folder / "model.safetensors").unlink()
  (folder / "pytorch_model.bin").write_bytes(b"")


def shape(folder):
  edit(folder, lambda t: t.update({"visual_projection.weight": np.zeros((24, 31), np.float32)}))


def nan(folder):
  edit(folder, lambda t: t.update({"logit_scale": np.asarray(np.nan, np.float32)}))


@pytest.mark.parametrize("damage, words", [
    (config_without("vision_config"), ("config.json", "vision tower is missing")),
    (lambda f: (f / "config.json").unlink(), ("config.json", "cannot be read")),
    (lambda f: edit(f, drop("vision_model.")), ("vision tower is missing",)),
    (lambda f: edit(f, drop("text_model.")), ("text tower is missing",)),
    (lambda f: edit(f, drop("logit_scale")), ("model.safetensors", "1 missing: logit_scale")),
    (shape, ("model.safetensors", "visual_projection.weight (24, 31) instead of (24, 32)")),
    (nan, ("logit_scale", "not finite")),
    (pickled, ("pytorch_model.bin", "pickled weights are refused")),
    (lambda f: (f / "merges.txt").unlink(), ("merges.txt", "missing")),
])
def test_damaged_directory(damage, words, tmp_path):
  make_clip(tmp_path)
  damage(tmp_path)
  with pytest.raises(UserError) as error:
    make_reward((f"pickscore:{tmp_path}",), (1.0,))
  message = str(error.value)
  assert message.startswith("reward.names: 'pickscore': ") and str(tmp_path) in message
  assert all(word in message for word in words), message


def test_folder_of_transformers_5(tmp_path):
  """`processor_config.json` has the normalisation, `tokenizer.json` the tokenizer."""
  make_clip(tmp_path)
  tokenizer = transformers.CLIPTokenizerFast.from_pretrained(tmp_path)
  tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
  for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
    (tmp_path / name).unlink()
  settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5] * 3}
  (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
  clip = load_clip(tmp_path)
  assert (clip.mean, clip.std) == ((0.5, 0.4, 0.3), (0.5,) * 3)
  expected = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=16).input_ids
  assert clip.tokenizer(PROMPTS).tolist() == expected
  (tmp_path / "processor_config.json").write_text("{}")
  with pytest.raises(UserError, match="processor_config.json: image_processor is missing"):
    load_clip(tmp_path)


class Malicious:
  def __reduce__(self):
    return exec, ("raise SystemExit('the pickle ran')",)


def test_errors_of_where(clip, tmp_path):
  folder, _ = clip

  def message(name):
    with pytest.raises(UserError) as error:
      make_reward((name,), (1.0,))
    return str(error.value)

  assert "pickscore:WHERE" in message("pickscore")
  assert "ocr_judge, pickscore" in message("pikscore:/a")
  assert f"{tmp_path}/none: not a directory" in message(f"hpsv2:{tmp_path}/none")
  assert "no such file" in message(f"hpsv2:{folder},{tmp_path}/none.pt")
  assert "no file after the comma" in message(f"hpsv2:{folder},")
  assert "needs the file of its head" in message(f"aesthetic:{folder}")
  torch.save({"state_dict": Malicious()}, tmp_path / "evil.pt")
  assert "not a PyTorch state dict" in message(f"hpsv2:{folder},{tmp_path / 'evil.pt'}")
  head = {k: v.numpy() for k, v in make_head(25).state_dict().items()}
  save_file(head, tmp_path / "head.safetensors")
  assert "layers.0.weight (1024, 25) instead of (1024, 24)" in message(
      f"aesthetic:{folder},{tmp_path / 'head.safetensors'}")
