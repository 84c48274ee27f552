"""ImageReward: a human preference score on BLIP (Xu et al. 2023, arXiv 2304.05977).

The text encoder reads the prompt while it looks at the image, so both run for every image; a linear
head of five layers turns its first token into a score, which is standardised by constants of the
published model. Preprocessing as in `clip_towers`: floating point, hence differentiable.
"""
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers.implementations import BertWordPieceTokenizer

from jaxalign.convert.clip import MEAN, STD, read_weights
from jaxalign.convert.directory import find_folder, read_json
from jaxalign.errors import UserError
from jaxalign.models import layers
from jaxalign.rewards import Reward
from jaxalign.rewards.blip import Blip, TextConfig, VisionConfig
from jaxalign.rewards.clip_towers import crop, head, head_shapes, split

LENGTH = 35                                     # tokens of a prompt; longer ones are cut
SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072
ADDED_WORDS = 2            # [DEC] and [ENC], which BLIP appends to BERT's vocabulary; unused here
# BLIP's contrastive projections: they are in the published file, the score does without them.
_UNUSED = ("vision_proj.", "text_proj.")

# Keys of med_config.json that have one value here, or none that counts.
_FIXED = {"architectures": ..., "model_type": ("bert",), "hidden_act": ("gelu",),
          "pad_token_id": ...,
          "attention_probs_dropout_prob": ..., "hidden_dropout_prob": ..., "initializer_range": ...,
          "type_vocab_size": ..., "encoder_width": ..., "add_cross_attention": (True,),
          "position_embedding_type": ("absolute",), "vision_config": ...}


def image_reward(where: str) -> Reward:
  """ImageReward v1.0, about -2 to 2: standardised over its authors' prompts and images.

  Args:
    where: `DIR,WEIGHTS`: the folder of `med_config.json` and of BERT's `vocab.txt`, and the file
      `ImageReward.pt`, or a safetensors file of the same tensors; `DIR` alone where that is its
      `model.safetensors`. A key `vision_config` of `med_config.json` may give other sizes than
      ViT-L/16's.
  Raises:
    UserError: a file is missing or does not fit; names it.
  """
  directory, weights = split(where)
  folder = find_folder(directory, ["med_config.json", "vocab.txt", "model*.safetensors*"])
  config = read_json(folder / "med_config.json")
  try:
    text = layers.read_config(TextConfig, config, _FIXED, "BLIP text")
    sizes = config.get("vision_config", {})
    layers.check_config(isinstance(sizes, dict), "BLIP", "vision_config", sizes, "an object")
    vision = layers.read_config(VisionConfig, sizes, {}, "BLIP vision")
    layers.check_config(text.max_position_embeddings >= LENGTH, "BLIP text",
                        "max_position_embeddings", text.max_position_embeddings,
                        f"at least {LENGTH}, the tokens of a prompt")
  except UserError as error:
    raise UserError(f"{folder / 'med_config.json'}: {error}") from error
  tokenizer = _tokenizer(folder / "vocab.txt", text.vocab_size)
  blip, source = Blip(vision, text), pathlib.Path(weights or folder)
  size = vision.image_size
  shapes = jax.eval_shape(blip.init, jax.random.key(0), jnp.zeros((1, size, size, 3)),
                          jnp.zeros((1, LENGTH), jnp.int32), jnp.ones((1, LENGTH), bool))["params"]
  flat = read_weights(source, "clip", {**shapes, "mlp": {"layers": head_shapes(text.hidden_size)}},
                      lambda tensors: _adapt(source, tensors))
  params = {"blip": {name: flat[name] for name in shapes}, "head": flat["mlp"]["layers"]}
  mean, std = (np.asarray(x, np.float32)[None, None, None] for x in (MEAN, STD))

  def prepare(prompts):
    rows = tokenizer.encode_batch(list(prompts))
    return {"ids": np.array([row.ids for row in rows], np.int32),
            "mask": np.array([row.attention_mask for row in rows], bool)}

  def score(params, images, prepared):
    if images.shape[0] != prepared["ids"].shape[0]:
      raise ValueError(f"{images.shape[0]} images but {prepared['ids'].shape[0]} prepared prompts")
    pixels = (crop(images.astype(jnp.float32), size) - mean) / std
    state = blip.apply({"params": params["blip"]}, pixels, prepared["ids"], prepared["mask"])
    return (head(params["head"], state) - SCORE_MEAN) / SCORE_STD

  return Reward("image_reward", params, prepare, score, "standardised rating, about -2 to 2")


def _tokenizer(file: pathlib.Path, vocab_size: int) -> BertWordPieceTokenizer:
  """BERT's word pieces, lower case; every prompt becomes `LENGTH` ids."""
  if not file.is_file():
    raise UserError(f"{file}: no such file; it is that of bert-base-uncased")
  try:
    lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
  except ValueError as error:
    raise UserError(f"{file}: not a text file in UTF-8 ({error})") from error
  # Not `splitlines`: a word can be a separator such as U+2028.
  words = {word: i for i, word in enumerate(lines)}
  missing = [word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if word not in words]
  if missing:
    raise UserError(f"{file}: has no {', '.join(missing)}")
  if len(words) not in (vocab_size - ADDED_WORDS, vocab_size):
    raise UserError(f"{file}: {len(words)} words, the text encoder has {vocab_size - ADDED_WORDS} "
                    f"and {ADDED_WORDS} added ones; take the file of bert-base-uncased")
  tokenizer = BertWordPieceTokenizer(words, lowercase=True)
  tokenizer.enable_truncation(LENGTH)
  tokenizer.enable_padding(length=LENGTH, pad_id=words["[PAD]"], pad_token="[PAD]")
  return tokenizer


def _adapt(source: pathlib.Path, tensors: dict) -> dict:
  """The published names without `blip.` and what has no use here; all three parts are there."""
  tensors = {name.removeprefix("blip."): x for name, x in tensors.items()}
  tensors = {name: x for name, x in tensors.items() if not name.startswith(_UNUSED)}
  for part in ("visual_encoder", "text_encoder", "mlp"):
    if not any(name.startswith(f"{part}.") for name in tensors):
      raise UserError(f"{source}: {part} is missing")
  return tensors
