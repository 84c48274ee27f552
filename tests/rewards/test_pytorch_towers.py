"""The page "bring your reward" as it stands: its file equals our JAX towers, its command runs."""
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from test_towers import PROMPTS, SIZE, assert_gradient, make_clip, score_and_gradient

import runs
from jaxalign.devices import callbacks
from jaxalign.rewards import HostReward, make_reward, open_reward
from jaxalign.rewards.trial import Trial

torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
PAGE = (runs.ROOT / "docs" / "bring_your_reward.md").read_text()
SCORERS, ASKS, JUDGE = re.findall(r"```python\n(.*?)```", PAGE, re.S)
COMMAND, = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
# The same model without its scale, which is all that PickScore differs from CLIP in.
COSINE = """
def clip_score(pixels, prompts, network):
  return pickscore(pixels, prompts, network) / network[0].logit_scale.exp()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A small random CLIP in place of the published one, and the page's file that opens it."""
  folder = tmp_path_factory.mktemp("pickscore")
  make_clip(folder)
  code = SCORERS.replace("yuvalkirstain/PickScore_v1", str(folder))
  assert str(folder) in code
  (folder / "scorers.py").write_text(code + COSINE)
  return folder


@pytest.mark.parametrize("form", ["pickscore", "clip_score"])
def test_equals_our_jax_towers(folder, form):
  images = np.random.default_rng(0).uniform(size=(3, 2 * SIZE, 2 * SIZE, 3)).astype(np.float32)
  theirs = open_reward(make_reward((f"{folder}/scorers.py:{form}",), (1.0,)),
                       lambda: Trial(images.shape[1:3], PROMPTS))
  scores, gradient = score_and_gradient(theirs, images)
  callbacks.check()
  ours, expected = score_and_gradient(make_reward((f"{form}:{folder}",), (1.0,)), images)
  np.testing.assert_allclose(scores, ours, rtol=1e-5, atol=1e-5)
  assert_gradient(gradient, expected)


@pytest.mark.slow
def test_newcomer_gets_from_the_page_to_a_run(folder, tmp_path):
  assert len(SCORERS.strip().splitlines()) <= 22
  words = shlex.split(COMMAND)
  assert words[:3] == ["python", "-m", "jaxalign.launch"] and len(words) == 5
  words = [word.replace("jaxalign:nabla_gfn", "jaxalign:nabla_gfn:smoke") for word in words]
  small = {"data.prompts": runs.TRAIN, "data.eval_prompts": runs.HELD_OUT, "mesh.data": 1,
           "train.steps": 1, "log.to": ()}
  done = subprocess.run(
      [sys.executable, *words[1:], f"--workdir={tmp_path}/run",
       *(f"--config.{key}={value}" for key, value in small.items())],
      cwd=folder, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-2000:]
  assert "scorers.py:pickscore in PyTorch on cpu" in done.stdout
  line, = runs.metrics(tmp_path / "run")
  assert line["train/reward_seconds"] > 0 and "train/reward" in line


def make_paligemma(folder):
  """A small random PaliGemma of four places a picture, and its tokenizer, left in `folder`."""
  words = "<pad> <bos> <eos> <unk> <image> yes no answer en does this picture show a cat dog ? \n"
  vocabulary = {word: i for i, word in enumerate(words.split(" "))}
  core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
  core.pre_tokenizer = tokenizers.pre_tokenizers.Split(
      tokenizers.Regex(r"\n|\?|[^\s?]+"), "removed", invert=True)
  tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
      unk_token="<unk>", extra_special_tokens={"image_token": "<image>"}, padding_side="left")
  tokenizer.save_pretrained(folder)
  tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
  torch.manual_seed(0)
  model = transformers.PaliGemmaForConditionalGeneration(transformers.PaliGemmaConfig(
      vision_config=dict(tower, model_type="siglip_vision_model", image_size=16, patch_size=8,
                         projection_dim=32),
      text_config=dict(tower, model_type="gemma", vocab_size=len(vocabulary), head_dim=8,
                       num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2),
      image_token_index=vocabulary["<image>"], projection_dim=32, hidden_size=32,
      # Of transformers 5 the other way takes rows without padding for causal ones.
      attn_implementation="eager")).eval()
  for parameter in model.parameters():
    parameter.data.normal_(std=0.3)
  model.save_pretrained(folder)
  return model, tokenizer


def test_a_vision_language_model_that_is_asked(tmp_path):
  model, tokenizer = make_paligemma(tmp_path)
  code = ASKS.replace("google/paligemma2-3b-mix-224", str(tmp_path))
  assert str(tmp_path) in code
  (tmp_path / "asks.py").write_text(code)
  images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
  prompts = ["a cat", "a dog a dog", "a cat"]
  reward = open_reward(make_reward((f"{tmp_path}/asks.py:expected",), (1.0,)),
                       lambda: Trial(images.shape[1:3], prompts))
  assert reward.differentiable
  scores = reward.score(reward.params, images.astype(np.float32) / 255, reward.prepare(prompts))
  callbacks.check()
  prepare = transformers.SiglipImageProcessor(size={"height": 16, "width": 16})
  for image, prompt, score in zip(images, prompts, scores):
    words = tokenizer("<image>" * 4 + f"<bos>answer en does this picture show {prompt}?\n",
                      add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
      logits = model(**words, **prepare(image, return_tensors="pt")).logits[0, -1]
    yes, no = (logits[tokenizer.convert_tokens_to_ids(word)] for word in ("yes", "no"))
    np.testing.assert_allclose(score, torch.sigmoid(yes - no), atol=1e-5)
  assert np.ptp(scores) > 1e-3


def test_a_network_in_onnx(tmp_path):
  """The page's file with a published classifier in place of `judge.onnx`: alone or with others."""
  package = pytest.importorskip("rapidocr_onnxruntime")
  file, = pathlib.Path(package.__file__).parent.rglob("*_cls_infer.onnx")
  code = JUDGE.replace("judge.onnx", str(file)).replace("(224, 224)", "(192, 48)")
  assert str(file) in code and "(192, 48)" in code
  (tmp_path / "judge.py").write_text(code)
  reward = make_reward((f"{tmp_path}/judge.py:judge",), (1.0,))
  assert isinstance(reward, HostReward)
  images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
  images[1, 16:48] = 255
  scores = reward.score(images, PROMPTS)
  assert scores.shape == (3,) and np.ptp(scores) > 1e-3 and (0 <= scores).all()
  np.testing.assert_allclose(reward.score(images[1:2], PROMPTS[1:2]), scores[1:2], rtol=1e-4)
