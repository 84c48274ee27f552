"""CLIP checkpoints in: both towers, from transformers' layout or that of open_clip and OpenAI."""
import dataclasses
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.convert import weights
from jaxalign.convert.directory import find_folder, read_json
from jaxalign.errors import UserError
from jaxalign.models.clip import CLIPTextModelWithProjection, CLIPVisionModelWithProjection
from jaxalign.models.tokenizer import Tokenizer

_FILES = ["config.json", "preprocessor_config.json", "processor_config.json", *Tokenizer.FILES,
          "model*.safetensors*"]

# The normalisation that CLIP was trained with; a preprocessor_config.json may say otherwise.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# What open_clip calls the modules, in the order in which they are renamed.
_OPEN_CLIP = (
    (r"^(visual\.)?transformer\.resblocks\.", r"\1encoder.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^(visual\.)?positional_embedding$", r"\1embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^visual\.class_embedding$", "visual.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "visual.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "visual.pre_layrnorm."),
    (r"^visual\.ln_post\.", "visual.post_layernorm."),
    (r"^(encoder|embeddings|final_layer_norm)\.", r"text_model.\1."),
    (r"^visual\.", "vision_model."),
)
_OPEN_CLIP_EXTRAS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
  """Both towers of a checkpoint.

  Attributes:
    text, vision: Linen modules, that is descriptions without weights.
    tokenizer: `tokenizer(prompts) -> [B, L]` int32.
    params: `{"text", "vision", "logit_scale"}`, numpy f32; the last one is a logarithm, shape ().
    mean, std: per colour channel, what pixels in [0, 1] are normalised with.
  """
  text: CLIPTextModelWithProjection
  vision: CLIPVisionModelWithProjection
  tokenizer: Tokenizer
  params: dict[str, Any]
  mean: tuple[float, ...]
  std: tuple[float, ...]


def load_clip(path, source=None, cleaning: str = "fast") -> Clip:
  """Reads a CLIP model and its tokenizer.

  Args:
    path: directory in the layout of transformers' `CLIPModel`, or a hub id.
    source: weights that take the place of the directory's own: another such directory, or a file,
      in transformers', open_clip's or OpenAI's names. Only a file that is named here may be a
      pickle; torch reads it with `weights_only`.
    cleaning: of texts, see `jaxalign.models.tokenizer`; the default is what `CLIPProcessor` does.
  Raises:
    UserError: one line that names the file at fault.
  """
  folder = find_folder(path, _FILES)
  config = read_json(folder / "config.json")
  try:
    text, vision = towers(config)
  except UserError as error:
    raise UserError(f"{folder / 'config.json'}: {error}") from error
  tokenizer = Tokenizer.load(folder, longest=text.config.max_position_embeddings,
                             cleaning=cleaning)
  if tokenizer.vocab_size > text.config.vocab_size:
    raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the text tower "
                    f"takes {text.config.vocab_size}")
  source = folder if source is None else pathlib.Path(source)
  flat = read_weights(source, "clip", param_shapes(text, vision),
                      lambda tensors: _to_transformers(source, tensors))
  of = lambda *names: {name: flat[name] for name in names}
  params = {"text": of("text_model", "text_projection"),
            "vision": of("vision_model", "visual_projection"), "logit_scale": flat["logit_scale"]}
  return Clip(text, vision, tokenizer, params, *_normalisation(folder))


def towers(config: dict) -> tuple[CLIPTextModelWithProjection, CLIPVisionModelWithProjection]:
  """Text and vision tower for the `config.json` of a `CLIPModel`; UserError names a wrong key."""
  if config.get("model_type", "clip") != "clip":
    raise UserError(f"model_type: {config['model_type']!r} is not 'clip', text and vision tower in "
                    "one")
  made = []
  for name, kind in (("text", CLIPTextModelWithProjection),
                     ("vision", CLIPVisionModelWithProjection)):
    # Old files have both keys; as in transformers, the second one counts.
    tower = config.get(f"{name}_config_dict") or config.get(f"{name}_config")
    if not isinstance(tower, dict):
      raise UserError(f"{name}_config: the {name} tower is missing")
    made.append(kind.from_config({**tower, "projection_dim": config.get("projection_dim", 512)}))
  return tuple(made)


def param_shapes(text, vision):
  """Tree of `jax.ShapeDtypeStruct` with the names of a `CLIPModel`; computes nothing."""
  size, key = vision.config.image_size, jax.random.key(0)
  pixels = jnp.zeros((1, size, size, vision.config.num_channels))
  shapes = lambda module, *inputs: jax.eval_shape(module.init, key, *inputs)["params"]
  return {**shapes(text, jnp.zeros((1, 2), jnp.int32)), **shapes(vision, pixels),
          "logit_scale": jax.ShapeDtypeStruct((), jnp.float32)}


def read_weights(source, model: str, shapes, adapt=lambda tensors: tensors):
  """`weights.load` without its bookkeeping for the way back."""
  return weights.load(pathlib.Path(source), model, shapes, adapt)[0]


def _normalisation(folder: pathlib.Path):
  """Mean and standard deviation by which the checkpoint's pixels are normalised."""
  file = folder / "preprocessor_config.json"
  if file.is_file():
    config = read_json(file)
  else:                                          # where transformers 5 writes it
    file = folder / "processor_config.json"
    config = read_json(file).get("image_processor") if file.is_file() else {}
    if not isinstance(config, dict):
      raise UserError(f"{file}: image_processor is missing")
  found = []
  for key, default in (("image_mean", MEAN), ("image_std", STD)):
    value = config.get(key, default)
    if not (isinstance(value, (list, tuple)) and len(value) == 3
            and all(isinstance(x, (int, float)) for x in value)):
      raise UserError(f"{file}: {key}: {value!r} is not a list of three numbers")
    found.append(tuple(map(float, value)))
  return found


def _to_transformers(source: pathlib.Path, tensors: dict) -> dict:
  """Names and layouts of transformers' `CLIPModel`, whatever of the known ones `tensors` has."""
  if "positional_embedding" in tensors or "visual.conv1.weight" in tensors:
    tensors = _from_open_clip(tensors)
  for name in ("text", "vision"):
    if not any(key.startswith(f"{name}_model.") for key in tensors):
      raise UserError(f"{source}: the {name} tower is missing")
  return tensors


def _from_open_clip(tensors: dict) -> dict:
  out = {}
  for name, x in tensors.items():
    if name in _OPEN_CLIP_EXTRAS:
      continue
    if name == "text_projection":            # applied as x @ w, unlike the weight of a linear layer
      out["text_projection.weight"] = x.T
      continue
    if name == "visual.proj":
      out["visual_projection.weight"] = x.T
      continue
    for pattern, new in _OPEN_CLIP:
      name = re.sub(pattern, new, name)
    fused = re.fullmatch(r"(.+\.self_attn)\.in_proj_(weight|bias)", name)
    if fused and x.shape[0] % 3 == 0:
      for part, rows in zip("qkv", np.split(x, 3)):
        out[f"{fused[1]}.{part}_proj.{fused[2]}"] = rows
    else:
      out[name] = x
  return out
