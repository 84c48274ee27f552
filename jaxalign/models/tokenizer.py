"""Tokenizers of CLIP and T5, read from a checkpoint's `tokenizer/` folders of any age.

Same ids as transformers (without ftfy), but built on `tokenizers` alone, whose interface has stayed
put while transformers' changed. CLIP's texts are cleaned in one of three ways before they become
words, and for odd characters the ids differ:

  "slow"        `CLIPTokenizer` up to transformers 4: no control characters, ideographs alone
  "fast"        `CLIPTokenizerFast`, and `CLIPTokenizer` since transformers 5
  "open_clip"   open_clip's own, which unescapes HTML
"""
import gzip
import html
import json
import pathlib
import re
import unicodedata

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from jaxalign.errors import UserError

T5_LENGTH = 256                # `max_sequence_length` of Stable Diffusion 3's pipeline, its default
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CJK = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
       (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))
_START, _END = "<|startoftext|>", "<|endoftext|>"
_END_OF_WORD = "</w>"
_MAX_MERGES = 49152 - 256 - 2    # that CLIP uses of a longer merges.txt
_CLIP_MERGES = pathlib.Path(__file__).resolve().parent.parent / "assets" / "clip_merges.txt.gz"
_PROPERTIES = ("single_word", "lstrip", "rstrip", "normalized", "special")   # of added tokens


def _clean_char(char: str) -> str:
  """Whitespace becomes a space, control characters vanish, ideographs stand alone."""
  code = ord(char)
  if char in "\t\n\r":
    return " "
  if code in (0, 0xFFFD) or unicodedata.category(char).startswith("C"):
    return ""
  if any(low <= code <= high for low, high in CJK):
    return f" {char} "
  return char


def _slow(text: str) -> str:
  text = unicodedata.normalize("NFC", "".join(map(_clean_char, text)))
  return " ".join(word.lower() for word in text.split())


def _open_clip(text: str) -> str:
  return " ".join(html.unescape(html.unescape(text)).split()).lower()


_CLEANERS = {"slow": _slow, "open_clip": _open_clip}


class _Folder:
  """A tokenizer made of a folder's files, which it keeps byte for byte for the way back.

  Called with prompts it gives token ids `[B, L]` int32: the prompt's, cut to fit, the end token's,
  padding.

  Attributes:
    length: L.
    vocab_size: number of ids.
    eos_id, pad_id: ids of the special tokens.
  """
  CLASSES: tuple[str, ...]                 # of transformers, whose folders these are
  FILES: tuple[str, ...]                   # whatever of them is there
  length: int
  vocab_size: int
  eos_id: int
  pad_id: int
  _files: dict[str, bytes]

  @classmethod
  def load(cls, folder, **options):
    """Reads those of `FILES` that are there; `options` as the class takes.

    Raises:
      UserError: a file is missing or cannot be used.
    """
    folder = pathlib.Path(folder)
    files = {name: (folder / name).read_bytes() for name in cls.FILES if (folder / name).is_file()}
    return cls(files, str(folder), **options)

  def save(self, folder) -> None:
    """Writes the files it was loaded from, byte for byte."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in self._files.items():
      (folder / name).write_bytes(content)

  def tokens(self, prompt: str) -> list[int]:
    """Ids of a prompt however long, with the end token and without padding."""
    raise NotImplementedError

  def __call__(self, prompts: list[str]) -> np.ndarray:
    """Token ids `[B, L]` int32 in [0, vocab_size)."""
    ids = np.full((len(prompts), self.length), self.pad_id, np.int32)
    for row, prompt in zip(ids, prompts):
      tokens = self.tokens(prompt)
      if len(tokens) > self.length:
        tokens = [*tokens[:self.length - 1], self.eos_id]
      row[:len(tokens)] = tokens
    return ids


class Tokenizer(_Folder):
  """CLIP's, from `vocab.json` and `merges.txt` or from `tokenizer.json`. See `_Folder`.

  Attributes:
    bos_id: id of the start token.
  """
  CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
  FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
           "special_tokens_map.json", "added_tokens.json")

  def __init__(self, files: dict[str, bytes], where: str = "tokenizer", *,
               longest: int | None = None, cleaning: str = "slow"):
    """See `load`.

    Args:
      files: contents by file name.
      where: names them in errors.
      longest: positions of the text encoder, the most tokens that a prompt may have.
      cleaning: one of those above; a folder without `vocab.json` is always "fast".
    """
    self._files, self._where = files, where
    self._cleaning = cleaning
    self._clean = _CLEANERS.get(cleaning)
    config = self._json("tokenizer_config.json")
    special, added = self._special(config), self._added(config)
    if "vocab.json" in files and "merges.txt" in files:
      words, vocab = self._from_merges(special["unk_token"])
    elif "tokenizer.json" in files:
      if cleaning == "slow":
        self._clean = None
      words, vocab, own = self._from_json()
      added = {**own, **added}
    else:
      missing = "merges.txt" if "vocab.json" in files else "vocab.json"
      raise UserError(f"{where}/{missing}: tokenizer file is missing, and so is tokenizer.json")
    self.length = self._length(config, longest)
    for token, (i, _) in added.items():
      vocab[token] = i
    for token in special.values():
      if token not in vocab:
        raise UserError(f"{where}: special token {token!r} is in no file of this folder")
    self.bos_id, self.eos_id, self.pad_id = (
        vocab[special[name]] for name in ("bos_token", "eos_token", "pad_token"))
    self.vocab_size = max(vocab.values()) + 1
    self._apart, self._words = self._split_off(words, vocab, added, set(special.values()))
    self._vocab = vocab

  @classmethod
  def of_clip(cls, pad: str = _END) -> "Tokenizer":
    """The one that CLIP's and OpenCLIP's text towers have; those of the latter pad with "!"."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]    # bytes that are themselves
    letters = [chr(b) for b in kept] + [chr(256 + i) for i in range(256 - len(kept))]
    merges = gzip.decompress(_CLIP_MERGES.read_bytes())
    tokens = [*letters, *(letter + _END_OF_WORD for letter in letters),
              *(line.replace(" ", "") for line in merges.decode("utf-8").splitlines()[1:]),
              _START, _END]
    special = {"bos_token": _START, "eos_token": _END, "pad_token": pad, "unk_token": _END}
    config = special | {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    dump = lambda content: (json.dumps(content, indent=2) + "\n").encode()
    return cls({"vocab.json": dump({token: i for i, token in enumerate(tokens)}),
                "merges.txt": merges, "tokenizer_config.json": dump(config),
                "special_tokens_map.json": dump(special)})

  def _json(self, name: str) -> dict:
    try:
      content = json.loads(self._files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
      raise UserError(f"{self._where}/{name}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
      raise UserError(f"{self._where}/{name}: not a JSON object")
    return content

  def _length(self, config: dict, longest: int | None) -> int:
    length = config.get("model_max_length", longest)   # 1e30 where nobody has set it
    if type(length) not in (int, float) or not length >= 2 or (
        length > 2**31 and longest is None):
      raise UserError(f"{self._where}/tokenizer_config.json: model_max_length is "
                      f"{'missing' if length is None else length}, and what a prompt may have is "
                      "said nowhere else")
    return int(length if longest is None else min(length, longest))

  def _special(self, config: dict) -> dict[str, str]:
    """Names of the special tokens -> the tokens."""
    fallback, found = self._json("special_tokens_map.json"), {}
    for name, default in (("bos_token", _START), ("eos_token", _END), ("pad_token", _END),
                          ("unk_token", _END)):
      token = config.get(name) or fallback.get(name) or default
      token = token.get("content") if isinstance(token, dict) else token
      if not isinstance(token, str):
        raise UserError(f"{self._where}/tokenizer_config.json: {name} is {token!r}, no token")
      found[name] = token
    return found

  def _added(self, config: dict) -> dict[str, tuple[int, dict]]:
    """Tokens that were added later, whose texts are never cut into words -> id and properties."""
    found, name = {}, "added_tokens.json"
    try:
      for token, i in self._json(name).items():      # what transformers before 4.34 wrote
        found[token] = self._id(i), {}
      name = "tokenizer_config.json"
      for i, entry in (config.get("added_tokens_decoder") or {}).items():
        found[str(entry["content"])] = self._id(i), entry
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(f"{self._where}/{name}: added tokens are not tokens with ids "
                      f"({error})") from error
    return found

  @staticmethod
  def _id(value) -> int:
    if not 0 <= int(value) < 2**31:
      raise ValueError(f"{value} is no id")
    return int(value)

  def _from_merges(self, unk: str):
    """The words' model and all ids, of `vocab.json` and `merges.txt`."""
    vocab, file = self._json("vocab.json"), f"{self._where}/merges.txt"
    try:
      vocab = {token: self._id(i) for token, i in vocab.items()}
    except (ValueError, TypeError) as error:
      raise UserError(f"{self._where}/vocab.json: not tokens with ids ({error})") from error
    try:
      lines = self._files["merges.txt"].decode("utf-8").strip().split("\n")
    except UnicodeDecodeError as error:
      raise UserError(f"{file}: not UTF-8 text ({error.reason})") from error
    # The first line is a version comment.
    merges = [tuple(line.split()) for line in lines[1:_MAX_MERGES + 1]]
    for i, merge in enumerate(merges, 2):
      if len(merge) != 2:
        raise UserError(f"{file}: line {i} is not two symbols")
    whole = {"".join(merge) for merge in merges}
    for token in vocab:
      symbols = token.removesuffix(_END_OF_WORD)
      # Special tokens, and those that were added, are in the vocabulary's angle brackets.
      if len(symbols) > 1 and token not in whole and not re.fullmatch(r"<.*>", token):
        raise UserError(f"{file}: damaged: no merge makes {token!r}, which vocab.json has")
    try:
      words = tokenizers.Tokenizer(models.BPE(
          vocab=vocab, merges=merges, end_of_word_suffix=_END_OF_WORD, unk_token=unk))
    except Exception as error:                   # the library raises no narrower one
      raise UserError(f"{file}: does not fit vocab.json ({error})") from error
    if self._clean is None:
      words.normalizer = normalizers.Sequence([
          normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
          normalizers.Lowercase()])
    words.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return words, vocab

  def _from_json(self):
    """The same of `tokenizer.json`, and its added tokens."""
    words = _read_json_tokenizer(self._files, self._where)
    if not isinstance(words.model, models.BPE):
      raise UserError(f"{self._where}/tokenizer.json: model of type "
                      f"{type(words.model).__name__}, and CLIP's is BPE")
    added = {entry.content: (i, {key: getattr(entry, key) for key in _PROPERTIES})
             for i, entry in words.get_added_tokens_decoder().items()}
    return words, words.get_vocab(with_added_tokens=True), added

  def _split_off(self, words, vocab: dict, added: dict, special: set[str]):
    """The pattern of what is a token by itself before any cleaning, or None; and the model.

    A special token inside a prompt is one token. That holds for the padding token too: where it is
    "!" (OpenCLIP), "hi!!" ends in two padding ids, as in transformers.
    """
    entries = dict.fromkeys(special, {}) | {token: entry for token, (_, entry) in added.items()}
    if self._clean is None:                      # the library does it all
      for token in sorted(entries):
        known = {key: bool(entries[token][key]) for key in _PROPERTIES if key in entries[token]}
        words.add_tokens([tokenizers.AddedToken(
            token, **{"special": token in special, "normalized": True, **known})])
      return None, words
    if self._cleaning == "slow":
      words.add_special_tokens([token for token in (_START, _END) if token in vocab])
    # The longest first, as in transformers' tree.
    alone = lambda token: (rf"(?<![^ ]){re.escape(token)}(?![^ ])"
                           if entries[token].get("single_word") else re.escape(token))
    tokens = [token for token in sorted(entries, key=len, reverse=True) if token]
    return re.compile(f"({'|'.join(map(alone, tokens))})"), words

  def with_length(self, length: int) -> "Tokenizer":
    """The same with L tokens a prompt."""
    config = self._json("tokenizer_config.json") | {"model_max_length": length}
    return Tokenizer({**self._files, "tokenizer_config.json": json.dumps(config).encode()},
                     self._where, cleaning=self._cleaning)

  def tokens(self, prompt):
    if self._apart is None:
      words = self._words.encode(prompt, add_special_tokens=False).ids
    else:
      words = []
      for i, part in enumerate(self._apart.split(prompt)):
        if i % 2:
          words.append(self._vocab[part])
        elif part:
          words += self._words.encode(self._clean(part), add_special_tokens=False).ids
    return [self.bos_id, *words, self.eos_id]


class T5Tokenizer(_Folder):
  """T5's, from `tokenizer.json`. See `_Folder`; L is by default that of Stable Diffusion 3."""
  CLASSES = ("T5TokenizerFast", "T5Tokenizer")
  FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model",
           "added_tokens.json")

  def __init__(self, files: dict[str, bytes], where: str = "tokenizer", length: int = T5_LENGTH):
    """`files`: contents by file name, as `load` reads them; `where` names them in errors."""
    self._files, self.length = files, length
    file = f"{where}/tokenizer.json"
    if "tokenizer.json" not in files:
      raise UserError(f"{file}: tokenizer file is missing")
    self._pieces = _read_json_tokenizer(files, where)
    self.eos_id, self.pad_id = map(self._pieces.token_to_id, ("</s>", "<pad>"))
    for token, i in (("</s>", self.eos_id), ("<pad>", self.pad_id)):
      if i is None:
        raise UserError(f"{file}: special token {token!r} is missing")
    self.vocab_size = self._pieces.get_vocab_size()
    if self._pieces.encode("").ids != [self.eos_id]:
      raise UserError(f"{file}: its post_processor does not end a prompt with '</s>'")

  def tokens(self, prompt):
    return self._pieces.encode(prompt).ids


def _read_json_tokenizer(files: dict[str, bytes], where: str) -> tokenizers.Tokenizer:
  """What `tokenizer.json` says, without a length of its own."""
  try:
    found = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
  except Exception as error:                   # the library raises no narrower one
    raise UserError(f"{where}/tokenizer.json: not a tokenizer: {error}") from error
  found.no_truncation()
  found.no_padding()
  return found


def load_tokenizer(kind: str, folder, longest: int | None = None):
  """The tokenizer in `folder`, of transformers' class `kind`; `longest` as `Tokenizer` takes it."""
  if kind in T5Tokenizer.CLASSES:
    return T5Tokenizer.load(folder)
  return Tokenizer.load(folder, longest=longest,
                        cleaning="fast" if kind == "CLIPTokenizerFast" else "slow")
