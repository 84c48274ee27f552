import json
import re

import numpy as np
import pytest
import tokenizers

from jaxalign.errors import UserError
from jaxalign.models.tokenizer import T5Tokenizer, Tokenizer
from jaxalign.train.opening import open_pipeline

TEXTS = [
    "", " ", "a cat on a red background", "A CAT, on   a\tred\nbackground!!", "!!", "!",
    "hi!! there!", "it's they'll i'd don't 'quoted' ''''s", "1234 3.14 x2y 50%",
    "naïve café Ünïcödé ẞ ΟΔΟΣ İstanbul", "e\u0301 vs \u00e9", "日本語 cat 猫cat",
    "한국어 русский العربية", "😀 cat 👩\u200d🔬 🇩🇪",
    "zero\u200bwidth\u00a0nbsp\u2028line\x00null\ufffd",
    "<|endoftext|> cat <|startoftext|>cat<|ENDOFTEXT|>",
    "#hash @at $%^&*()_+{}|:\"<>?~`-=[]\\;',./", "word " * 100, "x" * 300, "...!!!???", "a!b!!c",
]


def byte_alphabet():
  """The printable character that byte-level BPE writes for each of the 256 bytes."""
  kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
  moved = [b for b in range(256) if b not in kept]
  return [chr(b) for b in kept] + [chr(256 + i) for i in range(len(moved))]


def write_tokenizer(folder, pad="<|endoftext|>", added=True):
  merges = [("c", "a"), ("ca", "t</w>"), ("o", "n</w>"), ("!", "!</w>"), ("'", "s</w>"), ("r", "e"),
            ("re", "d</w>"), ("b", "a"), ("w", "o"), ("wo", "r"), ("wor", "d</w>"), ("x", "x"),
            ("xx", "xx"), ("Ã", "©</w>")]
  letters = byte_alphabet()
  tokens = letters + [c + "</w>" for c in letters] + [a + b for a, b in merges]
  tokens += ["<|startoftext|>", "<|endoftext|>"]
  vocab = {token: i for i, token in enumerate(tokens)}
  specials = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
              "unk_token": "<|endoftext|>", "pad_token": pad}
  config = {"model_max_length": 24, "tokenizer_class": "CLIPTokenizer", **specials}
  if added:
    config["added_tokens_decoder"] = {
        str(vocab[token]): {"content": token, "lstrip": False, "normalized": True, "rstrip": False,
                            "single_word": False, "special": True}
        for token in sorted(set(specials.values()))}
  (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
  (folder / "merges.txt").write_text(
      "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  (folder / "special_tokens_map.json").write_text(json.dumps(specials))


@pytest.fixture
def transformers_4():
  """The last transformers with CLIP's tokenizer in Python, for which folders of its time were."""
  transformers = pytest.importorskip("transformers")
  if int(transformers.__version__.partition(".")[0]) > 4:
    pytest.skip("needs transformers 4: later ones have no CLIP tokenizer in Python")
  return transformers


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
@pytest.mark.parametrize("added", [True, False])
def test_same_ids_as_transformers(transformers_4, tmp_path, pad, added):
  write_tokenizer(tmp_path, pad, added)
  theirs = transformers_4.CLIPTokenizer.from_pretrained(tmp_path)
  # ftfy is optional there and changes the text; ours follows the path without it.
  theirs.fix_text = None
  if not hasattr(theirs, "nlp"):
    from transformers.models.clip.tokenization_clip import BasicTokenizer
    theirs.nlp = BasicTokenizer(strip_accents=False, do_split_on_punc=False)
  expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=24,
                    return_tensors="np").input_ids
  ids = Tokenizer.load(tmp_path)(TEXTS)
  assert ids.dtype == np.int32
  for text, ours, other in zip(TEXTS, ids, expected):
    np.testing.assert_array_equal(ours, other, err_msg=repr(text))


def only_json(folder, pad="<|endoftext|>"):
  """What transformers 5 writes: its `tokenizer.json` and no vocab.json, merges.txt or map."""
  transformers = pytest.importorskip("transformers")
  folder.mkdir()
  write_tokenizer(folder, pad)
  theirs = transformers.CLIPTokenizerFast.from_pretrained(folder)
  theirs.add_tokens(["<Cat-Toy>"])
  theirs.save_pretrained(folder)
  for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"):
    (folder / name).unlink(missing_ok=True)
  return folder, theirs


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_folder_with_tokenizer_json_alone(tmp_path, pad):
  folder, theirs = only_json(tmp_path / "new", pad)
  texts = [*TEXTS, "a <Cat-Toy> car", "two<cat-toy>s", "x\x85y\x0bz"]
  expected = theirs(texts, padding="max_length", truncation=True, max_length=24).input_ids
  tokenizer = Tokenizer.load(folder)
  for text, ours, other in zip(texts, tokenizer(texts), expected):
    np.testing.assert_array_equal(ours, other, err_msg=repr(text))
  assert tokenizer.vocab_size == len(theirs)
  tokenizer.save(tmp_path / "copy")
  assert {f.name: f.read_bytes() for f in (tmp_path / "copy").iterdir()} == {
      f.name: f.read_bytes() for f in folder.iterdir()}
  write_tokenizer(folder, pad)                # an old folder, where the fast class is asked for
  np.testing.assert_array_equal(Tokenizer.load(folder, cleaning="fast")(TEXTS),
                                expected[:len(TEXTS)])


@pytest.mark.parametrize("token", ["<cat-toy>", "<Cat-Toy>", "toy"])
@pytest.mark.parametrize("age", ["added_tokens.json", "added_tokens_decoder"])
def test_added_tokens_of_any_age(transformers_4, tmp_path, token, age):
  write_tokenizer(tmp_path)
  theirs = transformers_4.CLIPTokenizer.from_pretrained(tmp_path)
  theirs.add_tokens(token)
  theirs.save_pretrained(tmp_path)
  i = len(theirs) - 1
  (tmp_path / "added_tokens.json").unlink()
  if age == "added_tokens.json":                    # before transformers 4.34
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["added_tokens_decoder"]
    file.write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({token: i}))
  texts = [f"a {token} cat", f"a{token}s!", token.upper(), "a cat"]
  tokenizer = Tokenizer.load(tmp_path)
  expected = theirs(texts, padding="max_length", truncation=True, max_length=24).input_ids
  assert tokenizer(texts).tolist() == expected
  assert i in tokenizer(texts)[0] and i not in tokenizer(texts)[2]
  assert tokenizer.vocab_size == i + 1


@pytest.mark.parametrize("token", ["<cat-toy>", "<Cat-Toy>"])
@pytest.mark.parametrize("age", ["added_tokens.json", "added_tokens_decoder"])
def test_an_added_token_is_one_id(tmp_path, token, age):
  """Start, `a`, the token, `ca`, `r`, end."""
  write_tokenizer(tmp_path, added=age != "added_tokens.json")
  if age == "added_tokens.json":
    (tmp_path / age).write_text(json.dumps({token: 528}))
  else:
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config[age]["528"] = {"content": token, "normalized": False, "special": False}
    file.write_text(json.dumps(config))
  ids = Tokenizer.load(tmp_path)([f"a {token} car"])[0, :6]
  assert ids.tolist() == [526, 320, 528, 512, 337, 527]


def test_cleaning_of_open_clip(tmp_path):
  write_tokenizer(tmp_path)
  tokenizer = Tokenizer.load(tmp_path, cleaning="open_clip")
  ids = lambda text: tokenizer([text])[0].tolist()
  assert ids("R&amp;amp;D &lt;b&gt;  CAT ") == ids("r&d <b> cat")
  assert ids("日本語 cat") != Tokenizer.load(tmp_path)(["日本語 cat"])[0].tolist()


def test_length_is_what_the_text_encoder_takes(tmp_path):
  write_tokenizer(tmp_path)
  file = tmp_path / "tokenizer_config.json"
  config = json.loads(file.read_text())
  assert Tokenizer.load(tmp_path, longest=77).length == 24
  for length in (1000000000000000019884624838656, 1e30, None):
    file.write_text(json.dumps({**config, "model_max_length": length} if length else {
        key: value for key, value in config.items() if key != "model_max_length"}))
    tokenizer = Tokenizer.load(tmp_path, longest=16)
    assert tokenizer(["a cat"]).shape == (1, 16)
    with pytest.raises(UserError, match="model_max_length is .*, and what a prompt may have is "):
      Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name, content, message", [
    ("merges.txt", b"#version: 0.2\nc a\n", "merges.txt: damaged: no merge makes"),
    ("merges.txt", b"", "merges.txt: damaged: no merge makes"),
    ("merges.txt", b"\xff", "merges.txt: not UTF-8"),
    ("merges.txt", b"#version: 0.2\nc a t\n", "merges.txt: line 2 is not two symbols"),
    ("merges.txt", None, "merges.txt: tokenizer file is missing"),
    ("vocab.json", b"[1]", "vocab.json: not a JSON object"),
    ("vocab.json", b'{"a": "x"}', "vocab.json: not tokens with ids"),
    ("vocab.json", b'{"a": 1}', "merges.txt: does not fit vocab.json"),
    ("vocab.json", b"[" * 100000, "vocab.json: not valid JSON"),
    ("tokenizer_config.json", b"[1]", "tokenizer_config.json: not a JSON object"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}',
     "tokenizer_config.json: added tokens are not tokens with ids"),
    ("tokenizer_config.json", b'{"bos_token": 3}', "tokenizer_config.json: bos_token is 3"),
    ("added_tokens.json", b'{"a": -1}', "added_tokens.json: added tokens"),
])
def test_damaged_files_are_named(tmp_path, name, content, message):
  write_tokenizer(tmp_path)
  (tmp_path / name).unlink(missing_ok=True)
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=re.escape(message)):
    Tokenizer.load(tmp_path)


def test_damaged_tokenizer_json_is_named(tmp_path):
  write_tokenizer(tmp_path)
  (tmp_path / "vocab.json").unlink()
  (tmp_path / "merges.txt").unlink()
  for content, message in ((b"{}", "not a tokenizer"), (t5_file(), "of type Unigram")):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=f"tokenizer.json: .*{message}"):
      Tokenizer.load(tmp_path)


def test_frame_of_a_row(tmp_path):
  write_tokenizer(tmp_path, "!")
  tokenizer = Tokenizer.load(tmp_path)
  empty, long = tokenizer(["", "word " * 100])
  assert empty.tolist() == [tokenizer.bos_id, tokenizer.eos_id] + [tokenizer.pad_id] * 22
  assert long[0] == tokenizer.bos_id and long[-1] == tokenizer.eos_id and len(long) == 24
  assert tokenizer([]).shape == (0, 24)


def test_prompts_that_are_cut_are_counted_and_one_is_shown():
  pipeline = open_pipeline("jaxalign:fixture", shapes_only=True)
  red = lambda count: " ".join(["red"] * count)
  assert pipeline.cut(["a cat", red(14)]) == ""                  # 16 tokens with start and end
  assert pipeline.cut([red(15), "a cat", red(15), red(20)]) == (
      f"2 of 3 prompts are cut to 16 tokens, what this model reads; the first of them has 17: "
      f"'{red(15)}'")
  assert pipeline.cut([red(40)]).endswith(f"has 42: '{red(40)[:60]}...'")


def test_saves_the_same_bytes(tmp_path):
  source, copy = tmp_path / "source", tmp_path / "copy"
  source.mkdir()
  write_tokenizer(source)
  Tokenizer.load(source).save(copy)
  assert {f.name for f in copy.iterdir()} == {f.name for f in source.iterdir()}
  for file in source.iterdir():
    assert (copy / file.name).read_bytes() == file.read_bytes()


def test_errors_name_the_file(tmp_path):
  write_tokenizer(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text("{}")
  with pytest.raises(UserError, match="model_max_length"):
    Tokenizer.load(tmp_path)
  (tmp_path / "merges.txt").unlink()
  with pytest.raises(UserError, match="merges.txt"):
    Tokenizer.load(tmp_path)


def t5_file(end="</s>"):
  """A Unigram tokenizer of T5's parts: `</s>` by template, spaces as U+2581."""
  vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
  vocab += [(piece, -3.0 - i / 10) for i, piece in enumerate(
      ["\u2581a", "\u2581cat", "\u2581on", "\u2581red", "\u2581back", "ground", "s", "C", "."])]
  vocab += [(letter, -9.0) for letter in "abcdegnortu"]
  tok = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=2))
  tok.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
      tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace()])
  tok.decoder = tokenizers.decoders.Metaspace()
  tok.add_special_tokens(["<pad>", "</s>", "<unk>"])
  tok.post_processor = tokenizers.processors.TemplateProcessing(
      single=f"$A {end}".strip(), special_tokens=[("</s>", 1)])
  return tok.to_str().encode()


@pytest.mark.parametrize("length", [256, 12])
def test_t5_has_the_ids_of_transformers(tmp_path, length):
  transformers = pytest.importorskip("transformers")
  (tmp_path / "tokenizer.json").write_bytes(t5_file())
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({
      "tokenizer_class": "T5TokenizerFast", "extra_ids": 0, "model_max_length": 512}))
  theirs = transformers.T5TokenizerFast.from_pretrained(tmp_path)
  texts = TEXTS + ["a cat on red backgrounds.", "a cat </s> a", "<pad> a <unk>"]
  expected = theirs(texts, padding="max_length", truncation=True, max_length=length,
                    add_special_tokens=True, return_tensors="np").input_ids
  tokenizer = T5Tokenizer.load(tmp_path, length=length)
  np.testing.assert_array_equal(tokenizer(texts), expected)
  assert tokenizer(texts).dtype == np.int32 and tokenizer([]).shape == (0, length)
  assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 0, len(theirs))
  empty, long = tokenizer(["", "cat " * 300])
  assert empty.tolist() == [1] + [0] * (length - 1) and long[-1] == 1 and not (long[:-1] == 1).any()


def test_t5_saves_the_same_bytes_and_names_bad_files(tmp_path):
  (tmp_path / "tokenizer.json").write_bytes(t5_file())
  (tmp_path / "spiece.model").write_bytes(b"sentencepiece")
  T5Tokenizer.load(tmp_path).save(tmp_path / "copy")
  assert {f.name: f.read_bytes() for f in (tmp_path / "copy").iterdir()} == {
      "tokenizer.json": t5_file(), "spiece.model": b"sentencepiece"}
  (tmp_path / "tokenizer.json").write_bytes(t5_file(end=""))
  with pytest.raises(UserError, match="its post_processor does not end a prompt with '</s>'"):
    T5Tokenizer.load(tmp_path)
  (tmp_path / "tokenizer.json").write_bytes(t5_file().replace(b"<pad>", b"<gap>"))
  with pytest.raises(UserError, match="tokenizer.json: special token '<pad>' is missing"):
    T5Tokenizer.load(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(UserError, match="tokenizer.json: not a tokenizer"):
    T5Tokenizer.load(tmp_path)
  (tmp_path / "tokenizer.json").unlink()
  with pytest.raises(UserError, match="tokenizer.json: tokenizer file is missing"):
    T5Tokenizer.load(tmp_path)
