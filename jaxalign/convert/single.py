"""Single-file checkpoints of Stable Diffusion 1.x, 2.x, XL and 3.x, in and out.

All networks are in one file under the names of the original implementations (see `original`).
There is no configuration: it follows from names and shapes and from what readers agree on (8 heads
in SD 1.x, heads of 64 channels elsewhere). Nor is there a tokenizer, which is CLIP's.
"""
import dataclasses
import pathlib
import re
import sys

import numpy as np
import safetensors.numpy
from flax import traverse_util

from jaxalign.convert import names, original, weights
from jaxalign.convert.original import Place
from jaxalign.convert.tensors import (
  PICKLES,
  look,
  outline,
  plain_names,
  read_pickle,
  read_safetensors,
)
from jaxalign.errors import UserError
from jaxalign.models.pipeline import Pipeline, families
from jaxalign.models.tokenizer import T5Tokenizer, Tokenizer
from jaxalign.storage.files import share, whole

SUFFIXES = (".safetensors", *PICKLES)
UNET, VAE = "model.diffusion_model.", "first_stage_model."
_TEXT = {                                      # family -> text encoder -> prefix, names
    "sd1": {"text_encoder": ("cond_stage_model.transformer.", "clip")},
    "sd2": {"text_encoder": ("cond_stage_model.model.", "open_clip")},
    "sdxl": {"text_encoder": ("conditioner.embedders.0.transformer.", "clip"),
             "text_encoder_2": ("conditioner.embedders.1.model.", "open_clip")},
    "sd3": {"text_encoder": ("text_encoders.clip_l.transformer.", "clip"),
            "text_encoder_2": ("text_encoders.clip_g.transformer.", "clip"),
            "text_encoder_3": ("text_encoders.t5xxl.transformer.", "clip")},
}
_CLASSES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline",
            "sdxl": "StableDiffusionXLPipeline", "sd3": "StableDiffusion3Pipeline"}
# ComfyUI's marks, tensors without content.
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
# Trained at 768 pixels on the velocity, SD 2.x has wide biases here; ComfyUI's rule.
_SD2_MARK, _SD2_STD = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09
_BETAS = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012,
              beta_schedule="scaled_linear", trained_betas=None)
# Fields of a network's config that a reader does not need, or that no file says.
_UNSAID = ("sample_size", "eos_token_id", "projection_dim")


def family_of(shapes: dict[str, tuple], where) -> str:
  """The key of `_TEXT` for a file with these tensors.

  Raises:
    UserError: none of these; says what it is, if it is known.
  """
  has = lambda part: any(part in name for name in shapes)
  other = [kind for mark, kind in (
      ("control_model.", "a ControlNet"), ("edm_mean", "Playground 2.5, trained on EDM's levels"),
      ("edm_vpred", "a model trained on EDM's levels"), ("double_blocks.", "Flux"),
      ("lora_", "a LoRA; model.lora takes it"), ("hada_", "a LoHa"), ("lokr_", "a LoKr"))
           if has(mark)]
  if other:
    raise UserError(f"{where}: not a single-file checkpoint of Stable Diffusion, but "
                    f"{other[0]}{look(where)}")
  if has("joint_blocks."):
    found = "sd3"
  elif has("conditioner.embedders.1."):
    found = "sdxl"
  elif has("conditioner.embedders.0.model."):
    raise UserError(f"{where}: the refiner of SDXL, which only goes on with images; not supported")
  elif has("cond_stage_model.model."):
    found = "sd2"
  elif has("cond_stage_model.transformer."):
    found = "sd1"
  elif has(UNET):
    raise UserError(f"{where}: a denoiser without text encoders and autoencoder; give a diffusers "
                    f"directory as model.path and this file as model.unet{look(where)}")
  else:
    raise UserError(f"{where}: not a single-file checkpoint of Stable Diffusion{look(where)}")
  required = {"denoiser": UNET, "autoencoder": VAE,
              **{name: prefix for name, (prefix, _) in _TEXT[found].items()
                 if name != "text_encoder_3"}}
  missing = [f"{name} ({prefix})" for name, prefix in required.items() if not has(prefix)]
  if missing:
    raise UserError(f"{where}: has no {', '.join(missing)}; give a diffusers directory as "
                    f"model.path and this file as model.unet{look(where)}")
  return found


def load_single(file: pathlib.Path, *, dtype="float32", remat: str = "none",
                shapes_only: bool = False) -> Pipeline:
  """Reads a single-file checkpoint; arguments and errors as of `load_pipeline`.

  T5 of Stable Diffusion 3 needs `tokenizer_3/tokenizer.json` beside the file, and is left out
  without it, with a line that says so.
  """
  if file.suffix == ".safetensors":
    if shapes_only:
      shapes, metadata = outline(file)
      shapes = {name: shape for name, (_, shape) in shapes.items()}
      tensors = read_safetensors(file, (_SD2_MARK,))[0]
    else:
      tensors, metadata = read_safetensors(file)
  else:
    tensors, metadata = read_pickle(file), {}
  tensors = _with_text_model(plain_names(tensors))
  if file.suffix != ".safetensors" or not shapes_only:
    shapes = {name: x.shape for name, x in tensors.items()}
  shapes = _with_text_model(plain_names(shapes))
  family = family_of(shapes, file)
  tokenizers = {"tokenizer": Tokenizer.of_clip("!" if family == "sd2" else "<|endoftext|>")}
  if family in ("sdxl", "sd3"):
    tokenizers["tokenizer_2"] = Tokenizer.of_clip("!")
  if family == "sd3" and any(name.startswith(_TEXT["sd3"]["text_encoder_3"][0])
                             for name in shapes):
    beside = file.parent / "tokenizer_3"
    if (beside / "tokenizer.json").is_file():
      tokenizers["tokenizer_3"] = T5Tokenizer.load(beside)
    else:
      print(f"{file}: its T5 is left out, for want of {beside / 'tokenizer.json'}",
            file=sys.stderr)
  try:
    configs = configs_of(shapes, family, "tokenizer_3" in tokenizers)
    configs["scheduler"] = scheduler_of(family, shapes, metadata, _parameterization(file),
                                        tensors.get(_SD2_MARK))
    if family == "sd2" and configs["scheduler"]["prediction_type"] == "v_prediction":
      configs["unet"]["sample_size"], configs["vae"]["sample_size"] = 96, 768
    pipeline = Pipeline.build(configs, tokenizers, {}, dtype=dtype, remat=remat)
  except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
    raise UserError(f"{file}: not a whole checkpoint, it lacks {error}{look(file)}") from error
  except UserError as error:
    raise UserError(f"{file}: {error}") from error
  for name in pipeline.text_encoders:
    words, takes = tokenizers[name.replace("text_encoder", "tokenizer")], pipeline.networks[name]
    if words.vocab_size > takes.config.vocab_size:
      raise UserError(f"{file}: {name} has {takes.config.vocab_size} tokens, and CLIP's tokenizer "
                      f"{words.vocab_size}")
  wanted = pipeline.param_shapes()
  if shapes_only:
    return dataclasses.replace(pipeline, params=wanted)
  params, stored, extras = {}, {}, {}
  for name in pipeline.networks:
    own = _take(tensors, family, name, pipeline, wanted[name])
    params[name], stored[name], extras[name] = weights.fit(
        file, name, wanted[name], own, as_stored=name in pipeline.as_stored)
  return dataclasses.replace(pipeline, params=params, stored=stored, extras=extras)


def denoiser_tensors(tensors: dict[str, np.ndarray], pipeline: Pipeline, wanted) -> dict:
  """A denoiser's tensors under diffusers' names, where they have the original ones."""
  tensors = {name if name.startswith(UNET) or not name.startswith(
      ("input_blocks.", "output_blocks.", "middle_block.", "time_embed.", "label_emb.", "out.",
       "joint_blocks.")) else UNET + name: x for name, x in tensors.items()}
  if not any(name.startswith(UNET) for name in tensors):
    return tensors
  for name in [name for name in tensors if not name.startswith(UNET)]:
    if pipeline.denoiser_name == "transformer" and not name.startswith((VAE, "text_encoders.")):
      tensors[UNET + name] = tensors.pop(name)
  family = "sd3" if pipeline.denoiser_name == "transformer" else "sd1"
  return _take(tensors, family, pipeline.denoiser_name, pipeline, wanted)


def _take(tensors, family: str, network: str, pipeline: Pipeline, wanted) -> dict:
  """The tensors of one network out of the file's, under diffusers' names."""
  found, used = {}, set()
  places = _places(family, network, pipeline, wanted)
  for name, (place, shape) in places.items():
    if place.name in tensors:
      used.add(place.name)
      found[name] = place.read(tensors[place.name], shape)
  if network == pipeline.denoiser_name:          # what is left over is another architecture's
    found |= {name: x for name, x in tensors.items() if name.startswith(UNET) and name not in used}
  if family == "sd3" and network == "text_encoder" and "text_projection.weight" not in found:
    # Most files leave it out: the published one is the identity.
    width = pipeline.networks[network].config.hidden_size
    found["text_projection.weight"] = np.eye(width, dtype=np.float32)
  return found


def _places(family: str, network: str, pipeline: Pipeline, wanted) -> dict:
  """`{diffusers' name: (its place in the file, its shape)}` of a network's parameters."""
  flat = traverse_util.flatten_dict(wanted, sep="/")
  place = _placer(family, network, pipeline)
  found = {}
  for path, leaf in flat.items():
    name = names.torch_name(path)
    name = names.new_vae_name(name) if network == "vae" else name
    found[name] = place(name), names.torch_shape(path, leaf.shape)
  if network == "transformer":
    found["pos_embed.pos_embed"] = place("pos_embed.pos_embed"), None
  return found


def _placer(family: str, network: str, pipeline: Pipeline):
  config = pipeline.networks[network].config
  if network == "unet":
    modules = original.unet_modules(["CrossAttn" in kind for kind in config.down_block_types],
                                    config.layers_per_block)
    prefix, place = UNET, lambda name: original.unet_place(modules, name)
  elif network == "transformer":
    prefix, place = UNET, lambda name: original.transformer_place(name, config.num_layers - 1)
  elif network == "vae":
    modules = original.vae_modules(len(config.block_out_channels), config.layers_per_block)
    prefix, place = VAE, lambda name: original.vae_place(modules, name)
  else:
    prefix, style = _TEXT[family][network]
    place = original.open_clip_place if style == "open_clip" else Place

  def placed(name):
    found = place(name)
    return dataclasses.replace(found, name=prefix + found.name)
  return placed


def _with_text_model(tensors: dict) -> dict:
  """The earliest files of SD 1.x leave a module out."""
  prefix = "cond_stage_model.transformer."
  if f"{prefix}embeddings.token_embedding.weight" not in tensors:
    return tensors
  return {name.replace(prefix, f"{prefix}text_model.") if name.startswith(prefix) else name: x
          for name, x in tensors.items()}


# What the shapes say.


def _numbers(shapes, pattern: str) -> list[int]:
  """The numbers that the pattern's group has in names."""
  expression = re.compile(pattern)
  return sorted({int(match[1]) for name in shapes if (match := expression.match(name))})


def configs_of(shapes: dict[str, tuple], family: str, t5: bool = False) -> dict[str, dict]:
  """Configs by component of a file with these tensors, but for the scheduler's.

  Raises:
    KeyError: a tensor that says something is missing.
  """
  absent = [None, None]
  index = {"_class_name": _CLASSES[family], "feature_extractor": absent, "image_encoder": absent,
           "vae": ["diffusers", "AutoencoderKL"]}
  configs = {"model_index": index, "vae": _vae_config(shapes, family)}
  if family == "sd3":
    configs["transformer"] = _transformer_config(shapes)
    index["transformer"] = ["diffusers", "SD3Transformer2DModel"]
  else:
    configs["unet"] = _unet_config(shapes, family)
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
  if family in ("sd1", "sd2"):
    index |= {"safety_checker": absent, "requires_safety_checker": False}
  if family == "sdxl":
    index["force_zeros_for_empty_prompt"] = True
  for name, (prefix, style) in _TEXT[family].items():
    tokenizer = name.replace("text_encoder", "tokenizer")
    if name == "text_encoder_3":
      index |= {name: absent, tokenizer: absent}
      if t5:
        configs[name] = _t5_config(shapes, prefix)
        index |= {name: ["transformers", "T5EncoderModel"],
                  tokenizer: ["transformers", "T5TokenizerFast"]}
      continue
    projected = name == "text_encoder_2" or family == "sd3"
    kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    first = family in ("sd1", "sdxl", "sd3") and name == "text_encoder"
    configs[name] = _text_config(shapes, prefix, style, first, family == "sd2") | {
        "architectures": [kind]}
    index |= {name: ["transformers", kind], tokenizer: ["transformers", "CLIPTokenizer"]}
  index["scheduler"] = ["diffusers", {"sd3": "FlowMatchEulerDiscreteScheduler",
                                      "sdxl": "EulerDiscreteScheduler"}.get(
                                          family, "DDIMScheduler")]
  return configs


def _unet_config(shapes, family: str) -> dict:
  shape = lambda name: shapes[UNET + name]
  escaped = re.escape(UNET)
  last = _numbers(shapes, rf"{escaped}input_blocks\.(\d+)\.")[-1]
  levels = [[]]                                  # of (width, depth of the transformer)
  for n in range(1, last + 1):
    if f"{UNET}input_blocks.{n}.0.op.weight" in shapes:
      levels.append([])
      continue
    depth = len(_numbers(shapes, rf"{escaped}input_blocks\.{n}\.1\.transformer_blocks\.(\d+)\."))
    levels[-1].append((shape(f"input_blocks.{n}.0.in_layers.2.weight")[0], depth))
  widths, depths = ([level[0][i] for level in levels] for i in range(2))
  first = next(name for name in sorted(shapes) if name.startswith(UNET)
               and name.endswith("attn2.to_k.weight"))
  linear = len(shapes[next(name for name in sorted(shapes) if name.startswith(UNET)
                           and name.endswith(".proj_in.weight"))]) == 2
  down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
  config = {
      "_class_name": "UNet2DConditionModel", "sample_size": {"sdxl": 128}.get(family, 64),
      "in_channels": shape("input_blocks.0.0.weight")[1],
      "out_channels": shape("out.2.weight")[0], "block_out_channels": widths,
      "layers_per_block": len(levels[0]), "down_block_types": down,
      "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
      "cross_attention_dim": shapes[first][1], "use_linear_projection": linear,
      "attention_head_dim": [max(width // 64, 1) for width in widths] if linear else 8,
      "transformer_layers_per_block": [max(depth, 1) for depth in depths],
  }
  if family == "sdxl":
    taken = shape("label_emb.0.0.weight")[1]
    projected = shapes[_TEXT["sdxl"]["text_encoder_2"][0] + "text_projection"][1]
    config |= {"addition_embed_type": "text_time", "addition_time_embed_dim":
               (taken - projected) // 6, "projection_class_embeddings_input_dim": taken}
  return config


def _vae_config(shapes, family: str) -> dict:
  shape = lambda name: shapes[VAE + name]
  escaped = re.escape(VAE)
  levels = _numbers(shapes, rf"{escaped}encoder\.down\.(\d+)\.")
  widths = [shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in levels]
  config = {
      "_class_name": "AutoencoderKL", "in_channels": shape("encoder.conv_in.weight")[1],
      "out_channels": shape("decoder.conv_out.weight")[0],
      "latent_channels": shape("decoder.conv_in.weight")[1], "block_out_channels": widths,
      "layers_per_block": len(_numbers(shapes, rf"{escaped}encoder\.down\.0\.block\.(\d+)\.")),
      "down_block_types": ["DownEncoderBlock2D"] * len(widths),
      "up_block_types": ["UpDecoderBlock2D"] * len(widths), "norm_num_groups": 32,
      "sample_size": 1024 if family in ("sdxl", "sd3") else 512,
      "scaling_factor": {"sdxl": 0.13025, "sd3": 1.5305}.get(family, 0.18215),
  }
  if family == "sd3":
    config |= {"shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False}
  return config | ({"force_upcast": True} if family in ("sdxl", "sd3") else {})


def _text_config(shapes, prefix: str, style: str, first: bool, drops_last: bool) -> dict:
  """`first`: OpenAI's ViT-L; else an OpenCLIP tower, in SD 2.x without its last layer."""
  if style == "open_clip":
    blocks = _numbers(shapes, rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\.")
    embedding, positions = prefix + "token_embedding.weight", prefix + "positional_embedding"
    inner = f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"
    projection = shapes.get(prefix + "text_projection", (0, 512))[1]
  else:
    blocks = _numbers(shapes, rf"{re.escape(prefix)}text_model\.encoder\.layers\.(\d+)\.")
    text = f"{prefix}text_model."
    embedding = f"{text}embeddings.token_embedding.weight"
    positions = f"{text}embeddings.position_embedding.weight"
    inner = f"{text}encoder.layers.0.mlp.fc1.weight"
    projection = shapes.get(prefix + "text_projection.weight", (shapes[embedding][1],))[0]
  vocab, width = shapes[embedding]
  # 23 is what programs write that have dropped the last of 24 themselves.
  layers = len(blocks) - (drops_last and len(blocks) != 23)
  return {"model_type": "clip_text_model", "vocab_size": vocab, "hidden_size": width,
          "intermediate_size": shapes[inner][0], "num_hidden_layers": layers,
          "num_attention_heads": max(width // 64, 1),
          "max_position_embeddings": shapes[positions][0], "projection_dim": projection,
          "hidden_act": "quick_gelu" if first else "gelu", "layer_norm_eps": 1e-5,
          "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1 if first else 0}


def _t5_config(shapes, prefix: str) -> dict:
  shape = lambda name: shapes[f"{prefix}{name}.weight"]
  own = "encoder.block.0.layer"
  buckets, heads = shape(f"{own}.0.SelfAttention.relative_attention_bias")
  vocab, width = shape("shared")
  return {"architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": vocab,
          "d_model": width, "d_kv": shape(f"{own}.0.SelfAttention.q")[0] // heads,
          "d_ff": shape(f"{own}.1.DenseReluDense.wi_0")[0], "num_heads": heads,
          "num_layers": len(_numbers(shapes, rf"{re.escape(prefix)}encoder\.block\.(\d+)\.")),
          "relative_attention_num_buckets": buckets, "relative_attention_max_distance": 128,
          "layer_norm_epsilon": 1e-6, "feed_forward_proj": "gated-gelu"}


def _transformer_config(shapes) -> dict:
  prefix = UNET if any(name.startswith(f"{UNET}joint_blocks.") for name in shapes) else ""
  shape = lambda name: shapes[prefix + name]
  blocks = _numbers(shapes, rf"{re.escape(prefix)}joint_blocks\.(\d+)\.")
  width, channels, patch, _ = shape("x_embedder.proj.weight")
  normed = shapes.get(f"{prefix}joint_blocks.0.x_block.attn.ln_q.weight")
  # In the release of 3.0 and 3.5 large a head has 64 channels, and there are as many as blocks.
  head = normed[0] if normed else 64
  table = round(shape("pos_embed")[1] ** 0.5)
  dual = _numbers(shapes, rf"{re.escape(prefix)}joint_blocks\.(\d+)\.x_block\.attn2\.")
  return {"_class_name": "SD3Transformer2DModel", "patch_size": patch, "in_channels": channels,
          "sample_size": min(128, table * patch), "out_channels": channels,
          "num_layers": len(blocks), "attention_head_dim": head,
          "num_attention_heads": width // head, "caption_projection_dim": width,
          "joint_attention_dim": shape("context_embedder.weight")[1],
          "pooled_projection_dim": shape("y_embedder.mlp.0.weight")[1],
          "pos_embed_max_size": table, "qk_norm": "rms_norm" if normed else None,
          "dual_attention_layers": dual}


def _parameterization(file: pathlib.Path) -> str:
  """What the `.yaml` beside a file, which A1111 reads, says of it; "" where there is none."""
  try:
    text = file.with_suffix(".yaml").read_text(encoding="utf-8", errors="replace")
  except OSError:
    return ""
  found = re.search(r"^\s*parameterization:\s*[\"']?(\w+)", text, re.MULTILINE)
  return found[1] if found else ""


def scheduler_of(family: str, shapes, metadata: dict[str, str], said: str, mark) -> dict:
  """The scheduler's config, by the marks that a file has.

  Args:
    said: "v" or "eps" of the configuration beside the file, or "".
    mark: the tensor `_SD2_MARK`, if there is one.
  """
  if family == "sd3":
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
            "shift": 3.0}
  said = (metadata.get("modelspec.prediction_type") or said).lower()
  zero = ZERO_SNR_MARK in shapes
  if V_MARK in shapes or said.startswith("v"):
    prediction = "v_prediction"
  elif said.startswith("eps"):
    prediction = "epsilon"
  else:
    wide = mark is not None and np.std(np.asarray(mark, np.float64)) > _SD2_STD
    prediction = "v_prediction" if family == "sd2" and wide else "epsilon"
  name = "EulerDiscreteScheduler" if family == "sdxl" else "DDIMScheduler"
  config = {"_class_name": name, **_BETAS, "prediction_type": prediction, "steps_offset": 1,
            "timestep_spacing": "trailing" if zero else "leading", "rescale_betas_zero_snr": zero}
  return config if family == "sdxl" else config | {"clip_sample": False, "set_alpha_to_one": False}


# And back.


def save_single(pipeline: Pipeline, file, *, dtype: str | None = None) -> None:
  """Writes a single-file checkpoint, for ComfyUI, A1111 and `from_single_file` of diffusers.

  Args:
    file: its name, which ends in ".safetensors"; appears whole or not at all.
    dtype: as in `save_pipeline`.
  Raises:
    UserError: readers of such a file would take this model for another one.
  """
  file = pathlib.Path(file)
  if file.suffix != ".safetensors":
    raise UserError(f"{file}: a single file ends in .safetensors")
  tensors = {}
  family = _family_for(pipeline)
  for network in pipeline.networks:
    flat = traverse_util.flatten_dict(pipeline.params[network], sep="/")
    stored = pipeline.stored.get(network, {})
    arrays = {}
    for path, x in flat.items():
      name = names.torch_name(path)
      x = weights.cast(path, x, dtype or (stored[path].dtype if path in stored else "float32"))
      arrays[names.new_vae_name(name) if network == "vae" else name] = names.to_torch(path, x)
    if network == "transformer":
      arrays["pos_embed.pos_embed"] = pipeline.buffers["transformer"]["pos_embed.pos_embed"]
    tensors |= _placed(arrays, _placer(family, network, pipeline))
  if family == "sd2":
    tensors |= _last_block(tensors)
  scheduler, prediction = pipeline.scheduler_config, "flow"
  if family != "sd3":
    prediction = scheduler.get("prediction_type", "epsilon")
    marks = {V_MARK: prediction == "v_prediction",
             ZERO_SNR_MARK: bool(scheduler.get("rescale_betas_zero_snr"))}
    tensors |= {name: np.zeros(0, np.float32) for name, given in marks.items() if given}
  metadata = {"format": "pt", "modelspec.sai_model_spec": "1.0.0", "modelspec.prediction_type":
              {"v_prediction": "v"}.get(prediction, prediction)}
  _check_readable(pipeline, family, tensors, metadata)
  file.parent.mkdir(parents=True, exist_ok=True)
  with whole(file) as partial:
    safetensors.numpy.save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()},
                                partial, metadata=metadata)
    share(partial)


def _family_for(pipeline: Pipeline) -> str:
  kind = type(pipeline).__name__
  if kind != _CLASSES["sd1"]:
    return next((family for family, name in _CLASSES.items() if name == kind), "sd1")
  return "sd2" if pipeline.denoiser.config.use_linear_projection else "sd1"


def _placed(arrays: dict[str, np.ndarray], place) -> dict[str, np.ndarray]:
  """Under the names of the file; parts of one tensor joined."""
  parts = {}
  for name, x in arrays.items():
    found = place(name)
    parts.setdefault(found.name, {})[found.part] = found.write(x)
  return {name: own[0] if len(own) == 1 else np.concatenate([own[i] for i in sorted(own)])
          for name, own in parts.items()}


def _last_block(tensors) -> dict[str, np.ndarray]:
  """A last layer of the text tower of SD 2.x that adds nothing: readers drop it unread."""
  prefix = _TEXT["sd2"]["text_encoder"][0] + "transformer.resblocks."
  last = _numbers(tensors, rf"{re.escape(prefix)}(\d+)\.")[-1]
  old, new = f"{prefix}{last}.", f"{prefix}{last + 1}."
  return {name.replace(old, new): np.ones_like(x) if re.search(r"\.ln_\d\.weight$", name)
          else np.zeros_like(x) for name, x in tensors.items() if name.startswith(old)}


def _check_readable(pipeline: Pipeline, family: str, tensors, metadata) -> None:
  """UserError unless the configs that a reader infers are the pipeline's own."""
  shapes = {name: x.shape for name, x in tensors.items()}
  t5 = "text_encoder_3" in pipeline.networks
  configs = configs_of(shapes, family, t5)
  configs["scheduler"] = scheduler_of(family, shapes, metadata, "", None)
  try:
    inferred = families()[_CLASSES[family]].make_networks(configs, np.dtype("float32"), "none")
  except UserError as error:
    raise UserError(f"format: readers of a single file would not know this model ({error})"
                    ) from error
  fields = lambda config: (config._asdict() if hasattr(config, "_asdict")
                           else dataclasses.asdict(config))
  for name, network in pipeline.networks.items():
    own, other = fields(network.config), fields(inferred[name].config)
    for key, value in own.items():
      if key not in _UNSAID and (value or 0) != (other[key] or 0):
        raise UserError(f"format: a single file says nothing of {name}'s {key}, which readers take "
                        f"for {other[key]!r}, and here is {value!r}")
    takes = getattr(network.config, "vocab_size", None)
    if name in ("text_encoder", "text_encoder_2") and takes < 49408:
      raise UserError(f"format: readers of a single file take CLIP's tokenizer of 49408 tokens, "
                      f"and {name} has {takes}")
  own, other = pipeline.scheduler_config, configs["scheduler"]
  for key in ("beta_start", "beta_end", "beta_schedule", "shift"):
    if key in other and own.get(key) != other[key]:
      raise UserError(f"format: a single file says nothing of the scheduler's {key}, which readers "
                      f"take for {other[key]!r}, and here is {own.get(key)!r}")
