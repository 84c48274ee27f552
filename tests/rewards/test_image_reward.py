"""ImageReward against transformers' BLIP with the same random weights."""
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.errors import UserError
from jaxalign.rewards import blip, make_reward
from jaxalign.rewards.clip_towers import HEAD_LAYERS, HEAD_WIDTHS
from jaxalign.rewards.image_reward import LENGTH, SCORE_MEAN, SCORE_STD

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "##s", "house", "moon",
         "!", "the", "cafe"]
PROMPTS = ["A red cat!", "the CATS", "café " * 40, "xylophone moon"]
SIZE = 32
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=40, vocab_size=len(WORDS) + 2, layer_norm_eps=1e-12)
VISION = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3,
              image_size=SIZE, patch_size=8)
# What the published med_config.json says.
PUBLISHED = dict(
    architectures=["BertModel"], attention_probs_dropout_prob=0.1, hidden_act="gelu",
    hidden_dropout_prob=0.1, hidden_size=768, initializer_range=0.02, intermediate_size=3072,
    layer_norm_eps=1e-12, max_position_embeddings=512, model_type="bert", num_attention_heads=12,
    num_hidden_layers=12, pad_token_id=0, type_vocab_size=2, vocab_size=30524, encoder_width=768,
    add_cross_attention=True)
LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
             num_attention_heads=16, image_size=224, patch_size=16)
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]

# transformers' names of the vision tower -> those of the published checkpoint.
VISUAL = ((r"^embeddings\.class_embedding$", "cls_token"),
          (r"^embeddings\.position_embedding$", "pos_embed"),
          (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
          (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
          (r"\.self_attn\.projection\.", ".attn.proj."), (r"\.self_attn\.", ".attn."),
          (r"\.layer_norm([12])\.", r".norm\1."),
          (r"^post_layernorm\.", "norm."))


def published_name(name):
  for pattern, new in VISUAL:
    name = re.sub(pattern, new, name)
  return name


class Reference:
  """transformers' towers, a head of torch, and their files in the published layout."""

  def __init__(self, folder, text=TEXT, vision=VISION, std=0.1, words=WORDS):
    torch.manual_seed(0)
    self.size = vision["image_size"]
    self.vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(
        **vision, layer_norm_eps=1e-6, hidden_act="gelu")).eval()
    self.text = transformers.models.blip.modeling_blip_text.BlipTextModel(
        transformers.BlipTextConfig(**text, encoder_hidden_size=vision["hidden_size"],
                                    hidden_act="gelu", is_decoder=True), add_pooling_layer=False
        ).eval()
    widths = (text["hidden_size"], *HEAD_WIDTHS)
    self.head = torch.nn.ModuleList(map(torch.nn.Linear, widths, widths[1:]))
    for module, spread in ((self.vision, std), (self.text, std), (self.head, 0.1)):
      for name, parameter in module.named_parameters():
        if "orm" not in name:
          parameter.data.normal_(std=spread)
    self.folder = folder
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (folder / "med_config.json").write_text(json.dumps(
        {**text, "hidden_act": "gelu", "model_type": "bert", "vision_config": vision}))
    tensors = {f"blip.visual_encoder.{published_name(n)}": p
               for n, p in self.vision.named_parameters()}
    tensors |= {f"blip.text_encoder.{n}": p for n, p in self.text.named_parameters()}
    tensors |= {f"mlp.layers.{i}.{n}": p for i, layer in zip(HEAD_LAYERS, self.head)
                for n, p in layer.named_parameters()}
    # In the published file, without use for the score.
    for name, width in (("vision", vision["hidden_size"]), ("text", text["hidden_size"])):
      tensors |= {f"blip.{name}_proj.weight": torch.ones(16, width),
                  f"blip.{name}_proj.bias": torch.ones(16)}
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(
        text["max_position_embeddings"])[None]
    self.tensors = {name: x.detach().clone().contiguous() for name, x in tensors.items()}
    torch.save(self.tensors, folder / "ImageReward.pt")
    save_file({n: x.numpy() for n, x in self.tensors.items() if "position_ids" not in n},
              folder / "model.safetensors")

  def score(self, x, prompts):
    """`x [B, 3, H, W]` in [0, 1]."""
    tokenizer = transformers.BertTokenizer(str(self.folder / "vocab.txt"))
    text = tokenizer(prompts, padding="max_length", truncation=True, max_length=LENGTH,
                     return_tensors="pt")
    height, width, size = *x.shape[2:], self.size
    short = min(height, width)
    x = torch.nn.functional.interpolate(
        x, (int(size * height / short), int(size * width / short)), mode="bicubic", antialias=True,
        align_corners=False)
    top, left = (round((side - size) / 2) for side in x.shape[2:])
    x = (x[:, :, top:top + size, left:left + size] - MEAN) / STD
    image = self.vision(pixel_values=x).last_hidden_state
    state = self.text(input_ids=text.input_ids, attention_mask=text.attention_mask,
                      encoder_hidden_states=image, is_decoder=False).last_hidden_state[:, 0]
    for layer in self.head:
      state = layer(state)
    return (state[:, 0] - SCORE_MEAN) / SCORE_STD


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  return Reference(tmp_path_factory.mktemp("image_reward"))


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(0).uniform(size=(len(PROMPTS), 37, 58, 3)).astype(np.float32)


@pytest.mark.parametrize("weights", ["", ",{}/ImageReward.pt"])
def test_scores_and_gradients_are_those_of_the_reference(reference, images, weights):
  folder = reference.folder
  reward = make_reward((f"image_reward:{folder}{weights.format(folder)}",), (1.0,))
  assert reward.differentiable and reward.name == "image_reward"
  assert_parity(reward, reference, images)


def assert_parity(reward, reference, images):
  x = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
  theirs = reference.score(x, PROMPTS)
  theirs.sum().backward()

  def total(images, params, prepared):
    scores = reward.score(params, images, prepared)
    return scores.sum(), scores
  (_, ours), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(
      images, reward.params, reward.prepare(PROMPTS))
  assert np.ptp(ours) > 1e-2                                 # neither constant nor blind
  np.testing.assert_allclose(ours, theirs.detach(), atol=1e-5, rtol=1e-5)
  expected = x.grad.numpy().transpose(0, 2, 3, 1)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(gradient / scale, expected / scale, atol=1e-5)


@pytest.mark.slow
def test_full_size(tmp_path):
  """ViT-L/16 and BERT-base as published, on pictures of 300x200; 12 GiB."""
  words = [*WORDS, *(f"unused{i}" for i in range(30522 - len(WORDS)))]
  text = {key: value for key, value in PUBLISHED.items() if key in TEXT}
  reference = Reference(tmp_path, text, LARGE, std=0.02, words=words)
  (tmp_path / "med_config.json").write_text(json.dumps(PUBLISHED))
  (tmp_path / "model.safetensors").unlink()                  # gigabytes
  reward = make_reward((f"image_reward:{tmp_path},{tmp_path / 'ImageReward.pt'}",), (1.0,))
  (tmp_path / "ImageReward.pt").unlink()
  images = np.random.default_rng(0).uniform(size=(len(PROMPTS), 300, 200, 3))
  images = images ** np.arange(1, len(PROMPTS) + 1)[:, None, None, None]
  assert_parity(reward, reference, images.astype(np.float32))


def test_prompts_become_the_tokens_of_bert(reference):
  prepared = make_reward((f"image_reward:{reference.folder}",), (1.0,)).prepare(PROMPTS)
  theirs = transformers.BertTokenizer(str(reference.folder / "vocab.txt"))(
      PROMPTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np")
  np.testing.assert_array_equal(prepared["image_reward/ids"], theirs.input_ids)
  np.testing.assert_array_equal(prepared["image_reward/mask"], theirs.attention_mask)
  assert prepared["image_reward/mask"].sum(1).tolist() == [6, 5, LENGTH, 4]


def test_a_line_of_the_vocabulary_ends_in_a_newline_only(reference, tmp_path):
  """A word may be a character at which `str.splitlines` would break the line."""
  words = ["\u2028" if word == "house" else word for word in WORDS]
  (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
  for name in ("med_config.json", "model.safetensors"):
    (tmp_path / name).symlink_to(reference.folder / name)
  prepared = make_reward((f"image_reward:{tmp_path}",), (1.0,)).prepare(["moon"])
  assert prepared["image_reward/ids"][0, :3].tolist() == [2, WORDS.index("moon"), 3]


def test_published_size():
  """ViT-L/16 and BERT-base with cross attention, as `BlipVisionModel` and `BlipTextModel` count."""
  shapes = jax.eval_shape(
      blip.Blip(blip.VisionConfig(), blip.TextConfig()).init, jax.random.key(0),
      jnp.zeros((1, 224, 224, 3)), jnp.zeros((1, LENGTH), jnp.int32), jnp.ones((1, LENGTH), bool))
  with torch.device("meta"):
    vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(**LARGE))
    text = transformers.models.blip.modeling_blip_text.BlipTextModel(transformers.BlipTextConfig(
        encoder_hidden_size=1024, num_attention_heads=12), add_pooling_layer=False)
  of = lambda module: sum(p.numel() for p in module.parameters())
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  assert count(shapes["params"]["visual_encoder"]) == of(vision)
  assert count(shapes["params"]["text_encoder"]) == of(text)


def test_what_is_wrong_is_named(reference, tmp_path):
  def message(where):
    with pytest.raises(UserError) as error:
      make_reward((f"image_reward:{where}",), (1.0,))
    return str(error.value)
  for name in ("vocab.txt", "med_config.json"):
    (tmp_path / name).write_text((reference.folder / name).read_text())
  assert "model.safetensors" in message(tmp_path)                    # no weights
  torch.save(reference.tensors, tmp_path / "ImageReward.pt")
  assert "ImageReward.pt: pickled weights are refused" in message(tmp_path)

  tensors = load_file(reference.folder / "model.safetensors")
  file = tmp_path / "other.safetensors"
  save_file({n: x for n, x in tensors.items() if "visual_encoder" not in n}, file)
  assert f"{file}: visual_encoder is missing" in message(f"{tmp_path},{file}")
  save_file({**tensors, "mlp.layers.7.bias": np.zeros(2, np.float32)}, file)
  assert "1 wrong shape: mlp.layers.7.bias (2,)" in message(f"{tmp_path},{file}")
  save_file({**tensors, "mlp.layers.7.bias": np.full(1, np.nan, np.float32)}, file)
  assert "not finite" in message(f"{tmp_path},{file}")

  (tmp_path / "vocab.txt").write_text("\n".join(WORDS[1:]))
  assert "vocab.txt: has no [PAD]" in message(f"{tmp_path},{file}")
  (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, *"uvwxyz"]))
  assert "20 words, the text encoder has 14 and 2 added ones" in message(f"{tmp_path},{file}")
  (tmp_path / "vocab.txt").write_text("\n".join(WORDS[:-1]))          # of another BERT
  assert "vocab.txt: 13 words" in message(f"{tmp_path},{file}")
  (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
  assert "vocab.txt: not a text file in UTF-8" in message(f"{tmp_path},{file}")
  (tmp_path / "vocab.txt").unlink()
  assert "vocab.txt: no such file" in message(f"{tmp_path},{file}")
  (tmp_path / "med_config.json").write_text(json.dumps({**TEXT, "hidden_act": "relu"}))
  assert "med_config.json: BLIP text config: hidden_act" in message(f"{tmp_path},{file}")
  (tmp_path / "med_config.json").write_text(json.dumps({**TEXT, "vision_config": 3}))
  assert "med_config.json: BLIP config: vision_config" in message(f"{tmp_path},{file}")
  (tmp_path / "med_config.json").write_text(json.dumps({**TEXT, "max_position_embeddings": 34}))
  assert "max_position_embeddings = 34" in message(f"{tmp_path},{file}")
  (tmp_path / "med_config.json").unlink()
  assert "med_config.json" in message(tmp_path)
