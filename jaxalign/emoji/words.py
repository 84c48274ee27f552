"""The embedded models' tokenizers: CLIP's byte pairs, with every word of the grammar a token; for
signs also every letter of what is between quotes, whatever it spells."""
import collections
import json
import string

from jaxalign.emoji import scenes
from jaxalign.emoji.artwork import STYLES
from jaxalign.models.tokenizer import Tokenizer

LENGTH = 24                # tokens; the longest caption of the grammar has 20
SPELLING_LENGTH = 18       # the longest caption of a sign
_SIGN = "sign that says"
_START, _END = "<|startoftext|>", "<|endoftext|>"


def vocabulary() -> list[str]:
  """All words that captions of scenes and signs are made of, sorted."""
  names = list(scenes.SUBJECTS.values())
  phrases = [*names, *map(scenes.plural, names), *scenes.NUMBERS, *scenes.RELATIONS.values(),
             *scenes.COLOURS, *STYLES, f"a an on background style {_SIGN}"]
  return sorted({word for phrase in phrases for word in phrase.split() if word.isalpha()})


def merges(words) -> list[tuple[str, str]]:
  """Byte pairs, most frequent first, until each word is one token."""
  split = [[*word[:-1], word[-1] + "</w>"] for word in words]
  out = []
  while True:
    count = collections.Counter(
        pair for symbols in split for pair in zip(symbols[:-1], symbols[1:]))
    if not count:
      return out
    best = min(count, key=lambda pair: (-count[pair], pair))
    out.append(best)
    for symbols in split:
      i = 0
      while i < len(symbols) - 1:
        if (symbols[i], symbols[i + 1]) == best:
          symbols[i:i + 2] = ["".join(best)]
        i += 1


def tokenizer() -> Tokenizer:
  """Of scenes; built from the grammar alone, so that it changes only with it."""
  return _built(LENGTH, merges(vocabulary()), {})


def spelling_tokenizer() -> Tokenizer:
  """Of signs, whose words are tokens as they are written, in small letters; capitals are spelt.

  Were the words byte pairs, those between quotes would be cut into the same ones, here and there.
  """
  words = f"a an {_SIGN} on {' '.join(scenes.COLOURS)} background".split()
  return _built(SPELLING_LENGTH, [], {word: {
      "content": word, "lstrip": False, "normalized": False, "rstrip": False, "single_word": True,
      "special": False} for word in words})


def _built(length: int, pairs: list[tuple[str, str]], added: dict[str, dict]) -> Tokenizer:
  symbols = [*string.ascii_lowercase, *string.digits, *string.punctuation]
  tokens = [_START, _END, *symbols, *(symbol + "</w>" for symbol in symbols),
            *("".join(pair) for pair in pairs)]
  tokens = list(dict.fromkeys(tokens))
  special = {"bos_token": _START, "eos_token": _END, "pad_token": _END, "unk_token": _END}
  ends = [{"content": token, "lstrip": False, "normalized": True, "rstrip": False,
           "single_word": False, "special": True} for token in (_START, _END)]
  decoder = dict(enumerate(ends)) | dict(enumerate(added.values(), len(tokens)))
  config = {"added_tokens_decoder": {str(i): entry for i, entry in decoder.items()}, **special,
            "clean_up_tokenization_spaces": False, "errors": "replace", "extra_special_tokens": {},
            "model_max_length": length, "tokenizer_class": "CLIPTokenizer"}
  dump = lambda tree: (json.dumps(tree, indent=2) + "\n").encode()
  return Tokenizer({
      "vocab.json": dump({token: i for i, token in enumerate(tokens)}),
      "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, pairs), ""]).encode(),
      "tokenizer_config.json": dump(config), "special_tokens_map.json": dump(special)})
