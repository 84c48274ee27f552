"""T5's encoder: goldens, parity with transformers, names, sizes, what is refused."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import waves
from jaxalign.convert import names
from jaxalign.errors import UserError
from jaxalign.models import t5
from jaxalign.models.pipeline import random_params
from jaxalign.models.t5 import T5EncoderModel

SMALL = dict(vocab_size=32, d_model=16, d_kv=6, num_heads=3, d_ff=24, num_layers=2,
             relative_attention_num_buckets=8, relative_attention_max_distance=10,
             feed_forward_proj="gated-gelu")
XXL = dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
           feed_forward_proj="gated-gelu", model_type="t5", dropout_rate=0.1, is_decoder=False,
           tie_word_embeddings=False, num_decoder_layers=24)


@functools.cache
def shapes_of(model):
  return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


def test_golden():
  model = T5EncoderModel.from_config(SMALL)
  ids = np.array(waves.goldens()["t5"]["ids"], np.int32)
  got = jax.jit(model.apply)({"params": waves.parameters(shapes_of(model))}, ids)
  np.testing.assert_allclose(got, waves.golden("t5")[0], rtol=0, atol=1e-5)


def test_buckets():
  want = waves.goldens()["t5_buckets"]
  assert t5.buckets(np.array(want["distance"]), 32, 128).tolist() == want["32, 128"]
  assert t5.buckets(np.arange(-11, 12), 8, 10).tolist() == want["-11..11 with 8, 10"]


def test_buckets_of_any_sizes_are_those_of_transformers():
  torch = pytest.importorskip("torch")
  attention = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
  distance = np.arange(-600, 601)
  for count, far in ((32, 128), (32, 20), (64, 500), (4, 3), (16, 200)):
    theirs = attention._relative_position_bucket(torch.tensor(distance), True, count, far)
    np.testing.assert_array_equal(t5.buckets(distance, count, far), theirs)


@pytest.mark.parametrize("length", [12, 40])
def test_equals_transformers(length):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  config = dict(SMALL, relative_attention_num_buckets=32, relative_attention_max_distance=128)
  model = T5EncoderModel.from_config(config)
  params = random_params(shapes_of(model), 0)
  # Variance 1 / fan-in leaves the unscaled scores and the embeddings of 0.02 without effect.
  params["shared"]["embedding"] *= 50
  params["encoder"]["block_0"]["layer_0"]["SelfAttention"]["relative_attention_bias"][
      "embedding"] *= 50
  theirs = transformers.T5EncoderModel(transformers.T5Config(**config)).eval()
  flat = traverse_util.flatten_dict(params, sep="/")
  state = {names.torch_name(p): torch.from_numpy(names.to_torch(p, x)) for p, x in flat.items()}
  state["encoder.embed_tokens.weight"] = state["shared.weight"]
  theirs.load_state_dict(state, strict=True)
  ids = np.random.default_rng(1).integers(0, 32, (2, length)).astype(np.int32)
  with torch.no_grad():
    want = theirs(torch.from_numpy(ids).long())[0].numpy()
  got = jax.jit(model.apply)({"params": params}, ids)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_names_and_size_of_xxl():
  flat = traverse_util.flatten_dict(shapes_of(T5EncoderModel.from_config(XXL)), sep="/")
  assert sum(x.size for x in flat.values()) == 4_762_310_656 and len(flat) == 219
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  with torch.device("meta"):
    theirs = transformers.T5EncoderModel(transformers.T5Config(**XXL)).state_dict()
  theirs.pop("encoder.embed_tokens.weight")                # the same tensor as `shared.weight`
  assert ({names.torch_name(p): names.torch_shape(p, x.shape) for p, x in flat.items()}
          == {name: tuple(x.shape) for name, x in theirs.items()})


def test_bf16_parameters_and_computation():
  model, half = (T5EncoderModel.from_config(SMALL, dtype) for dtype in ("float32", "bfloat16"))
  params = waves.parameters(shapes_of(model))
  ids = np.array(waves.goldens()["t5"]["ids"], np.int32)
  out = jax.jit(half.apply)({"params": jax.tree.map(lambda x: x.astype("bfloat16"), params)}, ids)
  assert out.dtype == jnp.bfloat16 and np.isfinite(out.astype(np.float32)).all()
  exact = model.apply({"params": params}, ids)
  error = np.abs(out.astype(np.float32) - exact)
  assert error.mean() < 0.02 and error.max() < 0.3         # of about 1; scores of 10 are not scaled


@pytest.mark.parametrize("key, value", [
    ("feed_forward_proj", "relu"), ("model_type", "umt5"), ("is_decoder", True), ("num_layers", 0),
    ("d_model", 1.5), ("layer_norm_epsilon", "small"), ("relative_attention_num_buckets", 6),
    ("relative_attention_max_distance", 2)])
def test_unsupported_config_names_key(key, value):
  with pytest.raises(UserError, match=f"T5EncoderModel config: {key}"):
    T5EncoderModel.from_config({**SMALL, key: value})


def test_float16_and_a_missing_activation_are_refused():
  with pytest.raises(UserError, match="float16; choose dtype bfloat16"):
    T5EncoderModel.from_config(SMALL, "float16")
  with pytest.raises(UserError, match="feed_forward_proj = 'relu'"):
    T5EncoderModel.from_config({k: v for k, v in SMALL.items() if k != "feed_forward_proj"})
