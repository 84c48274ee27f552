"""A judge behind `transformers serve`: a server that others wrote, with tiny random models.

It knows no log-probabilities and answers in event streams alone. The models' output layers know
two words, so every answer is one of them; which one depends on the question and the picture.
"""
import os
import re
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
from PIL import Image

from jaxalign.errors import UserError
from jaxalign.rewards import make_reward

pytestmark = pytest.mark.slow
ASK = "does it show {prompt} ?"
PROMPTS = ["a cat", "a dog", "a frog", "a bird", "a red cat", "a red dog", "a red frog", "a fish"]
WORDS = "<pad> <unk> <image> a cat dog frog bird red fish does it show ? yes no 4 2".split()
IMAGES = np.random.default_rng(0).integers(0, 256, (len(PROMPTS), 16, 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def packages():
  pytest.importorskip("torch")
  for name in ("transformers", "accelerate", "fastapi", "uvicorn", "pydantic", "openai"):
    pytest.importorskip(
        name, reason='needs pip install "transformers[serving]>=4.55,<5" "openai<2" accelerate')


@pytest.fixture(scope="module")
def folder(packages, tmp_path_factory):
  """Models `words` and `digits`, of text, and `sees`, of pictures and text."""
  import torch
  import transformers as t
  from tokenizers import Tokenizer, models, pre_tokenizers
  folder = tmp_path_factory.mktemp("served")
  plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
  plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer = t.PreTrainedTokenizerFast(
      tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>",
      additional_special_tokens=["<image>"], model_input_names=["input_ids", "attention_mask"],
      chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
  text = t.LlamaConfig(
      vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
      num_attention_heads=2, initializer_range=1.0, pad_token_id=0, bos_token_id=None,
      eos_token_id=None, tie_word_embeddings=False)

  def save(name, seed, make, answers, *parts):
    """Whatever the model sees, one of two answers is likelier than any other word."""
    torch.manual_seed(seed)                     # one with which both answers come up
    model = make()
    a, b = (WORDS.index(answer) for answer in answers)
    with torch.no_grad():
      row = model.lm_head.weight[a].clone()
      model.lm_head.weight.zero_()
      model.lm_head.weight[a], model.lm_head.weight[b] = row, -row
    for part in (model, *parts):
      part.save_pretrained(folder / name)
  save("words", 10, lambda: t.LlamaForCausalLM(text), ("yes", "no"), tokenizer)
  save("digits", 9, lambda: t.LlamaForCausalLM(text), ("4", "2"), tokenizer)
  vision = t.CLIPVisionConfig(
      hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
      image_size=16, patch_size=8, projection_dim=16, initializer_range=1.0)
  both = t.LlavaConfig(
      vision, text, image_token_index=WORDS.index("<image>"), image_seq_length=4)
  processor = t.LlavaProcessor(
      t.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16), tokenizer, patch_size=8,
      vision_feature_select_strategy="default", num_additional_image_tokens=1,
      chat_template="{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == "
                    "'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}"
                    "{% endfor %}")
  save("sees", 0, lambda: t.LlavaForConditionalGeneration(both), ("yes", "no"), processor)
  return folder


@pytest.fixture(scope="module", params=["", "--input_validation"])
def served(request, folder):
  """The server's URL, and the flag that it was started with."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  command = "from transformers.commands.transformers_cli import main; main()"
  flags = [request.param] if request.param else []
  with open(folder / "log", "w") as log:
    server = subprocess.Popen(
        [sys.executable, "-c", command, "serve", "--host=127.0.0.1", f"--port={port}", *flags],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}, stdout=log,
        stderr=log)
  try:
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 300
    while True:
      try:
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        break
      except httpx.TransportError:
        assert server.poll() is None and time.monotonic() < end, (folder / "log").read_text()
        time.sleep(0.5)
    yield url, request.param
  finally:
    server.kill()
    server.wait()


def ask(served, model, settings=""):
  url, flag = served
  # Its own check of requests wants `stream` to be said, though it never answers otherwise. And it
  # loads a model when it is first asked, which fails where two ask at once.
  stream = '&extra={"stream":true}' if flag else ""
  reward = make_reward((f"vlm:{url}#model={model}&ask={ASK}&parallel=1{stream}{settings}",), (1.0,))
  return reward.score(IMAGES, PROMPTS)


def answers(model, inputs):
  """The word that a model says first to each of the inputs."""
  import torch
  with torch.no_grad():
    return [WORDS[int(model(**one).logits[0, -1].argmax())] for one in inputs]


@pytest.mark.parametrize("name, settings, values", [
    ("words", "", {"yes": 1.0, "no": 0.0}), ("digits", "&answers=1..5", {"4": 4.0, "2": 2.0})])
def test_a_model_of_text_is_taken_at_its_word(served, folder, capsys, name, settings, values):
  """It is served without the picture, which the server leaves out and does not say so."""
  import transformers as t
  found = ask(served, folder / name, settings)
  tokenizer = t.AutoTokenizer.from_pretrained(folder / name)
  model = t.AutoModelForCausalLM.from_pretrained(folder / name)
  said = answers(model, [tokenizer(ASK.replace("{prompt}", prompt), return_tensors="pt")
                         for prompt in PROMPTS])
  assert set(said) == set(values)
  np.testing.assert_array_equal(found, [values[word] for word in said])
  lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("vlm")]
  assert len(lines) == 1
  assert re.search("refuses log-probabilities .status 422" if served[1] else
                   "answers without log-probabilities", lines[0])


def test_a_model_of_pictures_sees_them(served, folder):
  import transformers as t
  found = ask(served, folder / "sees")
  processor = t.AutoProcessor.from_pretrained(folder / "sees")
  model = t.AutoModelForImageTextToText.from_pretrained(folder / "sees")

  def said(images):
    return answers(model, [
        processor(images=Image.fromarray(image), text=f"<image> {ASK.replace('{prompt}', prompt)}",
                  return_tensors="pt") for image, prompt in zip(images, PROMPTS)])
  assert said(IMAGES) != said(IMAGES[::-1])
  np.testing.assert_array_equal(found, [float(word == "yes") for word in said(IMAGES)])


def test_words_that_were_not_asked_for_are_unparsable(served, folder):
  with pytest.raises(UserError, match="8 of 8 answers are none of 1, 2, 3, such as '(yes|no) "):
    ask(served, folder / "words", "&answers=1..3")
