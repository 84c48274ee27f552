"""Tokenizers of CLIP and T5, read from a checkpoint's `tokenizer/` folders.

Same ids as transformers' `CLIPTokenizer` (without ftfy) and `T5TokenizerFast`, but built on
`tokenizers` alone, whose interface has stayed put while transformers' changed.
"""
import json
import pathlib
import unicodedata

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from jaxalign.errors import UserError

T5_LENGTH = 256                # `max_sequence_length` of Stable Diffusion 3's pipeline, its default
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CJK = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
       (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))


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


def _normalise(text: str) -> str:
  """What `CLIPTokenizer` does to a text before it splits it into words."""
  text = unicodedata.normalize("NFC", "".join(map(_clean_char, text)))
  return " ".join(word.lower() for word in text.split())


class _Folder:
  """A tokenizer made of a folder's files, which it keeps byte for byte for the way back."""
  CLASSES: tuple[str, ...]                 # of transformers, whose folders these are
  REQUIRED: tuple[str, ...]
  OPTIONAL: tuple[str, ...]
  _files: dict[str, bytes]

  @classmethod
  def load(cls, folder, **options):
    """Reads the files `REQUIRED` and, where they are, `OPTIONAL`; `options` as the class takes.

    Raises:
      UserError: a file is missing or cannot be used.
    """
    folder = pathlib.Path(folder)
    files = {name: (folder / name).read_bytes() for name in cls.REQUIRED + cls.OPTIONAL
             if (folder / name).is_file()}
    for name in cls.REQUIRED:
      if name not in files:
        raise UserError(f"{folder / name}: tokenizer file is missing")
    return cls(files, str(folder), **options)

  def save(self, folder) -> None:
    """Writes the files it was loaded from, byte for byte."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in self._files.items():
      (folder / name).write_bytes(content)


class Tokenizer(_Folder):
  """CLIP's: `tokenizer(prompts) -> [B, L]` int32 token ids: bos, words cut to fit, eos, padding.

  Attributes:
    length: L, the checkpoint's `model_max_length`.
    vocab_size: number of ids.
    bos_id, eos_id, pad_id: ids of the special tokens.
  """
  CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
  REQUIRED = ("vocab.json", "merges.txt", "tokenizer_config.json")
  OPTIONAL = ("special_tokens_map.json",)

  def __init__(self, files: dict[str, bytes], where: str = "tokenizer"):
    """`files`: contents by file name, as `load` reads them; `where` names them in errors."""
    self._files = files
    try:
      vocab = json.loads(files["vocab.json"])
      config = json.loads(files["tokenizer_config.json"])
      fallback = json.loads(files.get("special_tokens_map.json", b"{}"))
    except ValueError as error:
      raise UserError(f"{where}: not valid JSON: {error}") from error
    # The first line of merges.txt is a version comment.
    merges = [tuple(line.split()) for line in
              files["merges.txt"].decode("utf-8").strip().split("\n")[1:]]
    if not isinstance(config.get("model_max_length"), int):
      raise UserError(f"{where}/tokenizer_config.json: model_max_length is missing")
    self.length = config["model_max_length"]

    def special(name, default="<|endoftext|>"):
      token = config.get(name) or fallback.get(name) or default
      return token["content"] if isinstance(token, dict) else token

    bos, eos = special("bos_token", "<|startoftext|>"), special("eos_token")
    pad, unk = special("pad_token"), special("unk_token")
    added = {entry["content"]: int(i) for i, entry in
             config.get("added_tokens_decoder", {}).items()}
    vocab.update(added)
    for token in (bos, eos, pad, unk):
      if token not in vocab:
        raise UserError(f"{where}/vocab.json: special token {token!r} is missing")
    self.bos_id, self.eos_id, self.pad_id = vocab[bos], vocab[eos], vocab[pad]
    self.vocab_size = len(vocab)

    self._bpe = tokenizers.Tokenizer(models.BPE(
        vocab=vocab, merges=merges, end_of_word_suffix="</w>", unk_token=unk))
    self._bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    # A special token inside a prompt is one token. That holds for the padding token too: where it
    # is "!" (OpenCLIP), "hi!!" ends in two padding ids, as in transformers.
    self._bpe.add_special_tokens(sorted({bos, eos, pad, unk, *added}))

  def with_length(self, length: int) -> "Tokenizer":
    """The same with L tokens a prompt."""
    config = json.loads(self._files["tokenizer_config.json"]) | {"model_max_length": length}
    return Tokenizer({**self._files, "tokenizer_config.json": json.dumps(config).encode()})

  def __call__(self, prompts: list[str]) -> np.ndarray:
    """Token ids `[B, L]` int32 in [0, vocab_size)."""
    ids = np.full((len(prompts), self.length), self.pad_id, np.int32)
    for row, prompt in zip(ids, prompts):
      words = self._bpe.encode(_normalise(prompt), add_special_tokens=False).ids
      tokens = [self.bos_id, *words[:self.length - 2], self.eos_id]
      row[:len(tokens)] = tokens
    return ids


class T5Tokenizer(_Folder):
  """T5's: `tokenizer(prompts) -> [B, L]` int32 token ids: pieces cut to fit, eos, padding.

  Attributes:
    length: L, the `max_sequence_length` of Stable Diffusion 3's pipeline.
    vocab_size: number of ids.
    eos_id, pad_id: ids of the special tokens.
  """
  CLASSES = ("T5TokenizerFast", "T5Tokenizer")
  REQUIRED = ("tokenizer.json",)
  OPTIONAL = ("tokenizer_config.json", "special_tokens_map.json", "spiece.model",
              "added_tokens.json")

  def __init__(self, files: dict[str, bytes], where: str = "tokenizer", length: int = T5_LENGTH):
    """`files`: contents by file name, as `load` reads them; `where` names them in errors."""
    self._files, self.length = files, length
    file = f"{where}/tokenizer.json"
    try:
      self._pieces = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
    except Exception as error:                   # the library raises no narrower one
      raise UserError(f"{file}: not a tokenizer: {error}") from error
    self.eos_id, self.pad_id = map(self._pieces.token_to_id, ("</s>", "<pad>"))
    for token, i in (("</s>", self.eos_id), ("<pad>", self.pad_id)):
      if i is None:
        raise UserError(f"{file}: special token {token!r} is missing")
    self.vocab_size = self._pieces.get_vocab_size()
    # Whatever the file says: the template's end token stays, as in transformers.
    self._pieces.enable_truncation(length)
    self._pieces.no_padding()
    if self._pieces.encode("").ids != [self.eos_id]:
      raise UserError(f"{file}: its post_processor does not end a prompt with '</s>'")

  def __call__(self, prompts: list[str]) -> np.ndarray:
    """Token ids `[B, L]` int32 in [0, vocab_size)."""
    ids = np.full((len(prompts), self.length), self.pad_id, np.int32)
    for row, prompt in zip(ids, prompts):
      pieces = self._pieces.encode(prompt).ids
      row[:len(pieces)] = pieces
    return ids


def load_tokenizer(kind: str, folder):
  """The tokenizer in `folder`, which is of transformers' class `kind`."""
  return next(own for own in (Tokenizer, T5Tokenizer) if kind in own.CLASSES).load(folder)
