import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxalign.errors import UserError
from jaxalign.models.clip import (
  CLIPTextModel,
  CLIPTextModelWithProjection,
  CLIPVisionModelWithProjection,
)

SMALL = dict(hidden_size=32, intermediate_size=64, projection_dim=16, num_hidden_layers=3,
             num_attention_heads=4)
TEXT = dict(SMALL, vocab_size=99, max_position_embeddings=12, bos_token_id=97, eos_token_id=98,
            pad_token_id=0, model_type="clip_text_model")
VISION = dict(SMALL, image_size=16, patch_size=4, model_type="clip_vision_model")


def from_torch(model):
  """Nested tree of a torch CLIP model's weights, in our layout."""
  flat = {}
  # In transformers 5 this class is the tower itself; its files have the names as before.
  above = [] if hasattr(model, "text_model") or hasattr(model, "vision_model") else ["text_model"]
  for name, value in model.state_dict().items():
    if name.endswith("position_ids"):
      continue
    path, value = above + name.split("."), value.numpy()
    if path[-1] == "weight" and value.ndim == 4:
      path[-1], value = "kernel", value.transpose(2, 3, 1, 0)
    elif path[-1] == "weight" and "embedding" in path[-2]:
      path[-1] = "embedding"
    elif path[-1] == "weight":
      path[-1], value = ("kernel", value.T) if value.ndim == 2 else ("scale", value)
    flat[tuple(path)] = value
  return unflatten_dict(flat)


def torch_model(name, config, kind):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  torch.manual_seed(0)
  model = getattr(transformers, name)(getattr(transformers, kind)(**config)).eval()
  for parameter in model.parameters():  # the library's initial weights are nearly the identity
    parameter.data.normal_(std=0.2)
  return torch, model


def input_ids(eos):
  ids = np.random.default_rng(0).integers(1, 90, (3, 12)).astype(np.int32)
  for row, end in zip(ids, (2, 7, 11)):
    row[end:] = eos
  return ids


@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("eos", [98, 2])
@pytest.mark.parametrize("ours", [CLIPTextModel, CLIPTextModelWithProjection])
def test_text_parity(ours, eos, act):
  config = dict(TEXT, hidden_act=act, eos_token_id=eos)
  torch, model = torch_model(ours.__name__, config, "CLIPTextConfig")
  ids = input_ids(98)
  with torch.no_grad():
    expected = model(torch.tensor(ids), output_hidden_states=True)
  out = ours.from_config(config).apply({"params": from_torch(model)}, ids)
  close = lambda x, y: np.testing.assert_allclose(x, y.numpy(), atol=1e-5, rtol=1e-5)
  close(out.last_hidden_state, expected.last_hidden_state)
  close(out.penultimate, expected.hidden_states[-2])
  if ours is CLIPTextModel:
    close(out.pooled, expected.pooler_output)
    assert out.projected is None
  else:
    close(out.projected, expected.text_embeds)


def test_vision_parity():
  torch, model = torch_model("CLIPVisionModelWithProjection", VISION, "CLIPVisionConfig")
  pixels = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
  with torch.no_grad():
    expected = model(torch.tensor(pixels.transpose(0, 3, 1, 2)))
  tower = CLIPVisionModelWithProjection.from_config(VISION)
  out = tower.apply({"params": from_torch(model)}, pixels)
  np.testing.assert_allclose(out.projected, expected.image_embeds.numpy(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ours, config, kind, example", [
    (CLIPTextModel, TEXT, "CLIPTextConfig", np.zeros((1, 12), np.int32)),
    (CLIPTextModelWithProjection, TEXT, "CLIPTextConfig", np.zeros((1, 12), np.int32)),
    (CLIPVisionModelWithProjection, VISION, "CLIPVisionConfig", np.zeros((1, 16, 16, 3))),
])
def test_same_tree_as_torch(ours, config, kind, example):
  _, model = torch_model(ours.__name__, config, kind)
  params = jax.eval_shape(ours.from_config(config).init, jax.random.key(0), example)["params"]
  shapes = lambda tree: {path: leaf.shape for path, leaf in flatten_dict(tree).items()}
  assert shapes(params) == shapes(from_torch(model))


def test_compute_dtype():
  ids = input_ids(98)
  tower = CLIPTextModel.from_config(TEXT)
  params = tower.init(jax.random.key(0), ids)
  half = CLIPTextModel.from_config(TEXT, jnp.bfloat16)
  leaves = jax.tree.leaves(half.init(jax.random.key(0), ids))
  assert all(leaf.dtype == jnp.float32 for leaf in leaves)
  out = half.apply(params, ids).last_hidden_state
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out.astype(jnp.float32), tower.apply(params, ids).last_hidden_state,
                             atol=5e-2)


@pytest.mark.parametrize("ours, config, count", [
    (CLIPTextModel, dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
     123_060_480),
    (CLIPTextModelWithProjection,
     dict(hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32,
          projection_dim=1280, hidden_act="gelu"), 694_659_840),
])
def test_full_size_parameter_counts(ours, config, count):
  shapes = jax.eval_shape(ours.from_config(config).init, jax.random.key(0),
                          np.zeros((1, 77), np.int32))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("change, message", [
    ({"hidden_act": "tanhish"}, "hidden_act: 'tanhish'"),
    ({"num_attention_heads": 5}, "num_attention_heads: 5"),
    ({"model_type": "t5"}, "model_type: 't5'"),
    ({"hidden_size": "big"}, "hidden_size: 'big'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers: 0"),
])
def test_bad_config_names_key_and_value(change, message):
  with pytest.raises(UserError, match=message):
    CLIPTextModel.from_config(dict(TEXT, **change))


def test_bad_shapes_raise():
  with pytest.raises(ValueError, match="input_ids"):
    CLIPTextModel.from_config(TEXT).init(jax.random.key(0), np.zeros((1, 13), np.int32))
  with pytest.raises(ValueError, match="pixels"):
    tower = CLIPVisionModelWithProjection.from_config(VISION)
    tower.init(jax.random.key(0), np.zeros((1, 8, 8, 3)))
