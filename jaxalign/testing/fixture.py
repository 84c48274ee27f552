"""Pipelines with random weights, so small that they compile in seconds.

For `:smoke` recipes and tests, in diffusers' layout and within what its classes can load: a UNet of
one 32-channel block at 8x8x4 latents, a transformer of two 32-wide blocks at 8x8x16 latents.
"""
import io
import json

import numpy as np
import tokenizers
from PIL import Image
from tokenizers import pre_tokenizers

from jaxalign.convert import save_pipeline
from jaxalign.models.pipeline import Pipeline
from jaxalign.models.tokenizer import T5Tokenizer, Tokenizer

LENGTH = 16  # tokens per prompt
WIDTH = 32
# Words that are one token; any other is spelt in bytes, so distinct prompts have distinct ids.
WORDS = ("a on background style noto twemoji red orange yellow green blue purple white black "
         "grinning face cat dog apple heart star sun moon tree car house").split()


def make_tokenizer() -> Tokenizer:
  """CLIP tokenizer over bytes and `WORDS`, 16 tokens long."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = letters + [f"{letter}</w>" for letter in letters]
  merges = []
  for word in WORDS:
    symbols = [*word[:-1], f"{word[-1]}</w>"]
    left = symbols[0]
    for right in symbols[1:]:
      if (left, right) not in merges:
        merges.append((left, right))
        vocab.append(left + right)
      left += right
  bos, eos = "<|startoftext|>", "<|endoftext|>"
  special = {"bos_token": bos, "eos_token": eos, "pad_token": eos, "unk_token": eos}
  config = special | {"model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer"}
  to_bytes = lambda content: json.dumps(content, indent=2).encode()
  return Tokenizer({
      "vocab.json": to_bytes({token: i for i, token in enumerate([*vocab, bos, eos])}),
      "merges.txt": "\n".join(["#version: 0.2"] + [" ".join(m) for m in merges]).encode(),
      "tokenizer_config.json": to_bytes(config),
      "special_tokens_map.json": to_bytes(special),
  })


def make_configs(tokenizer: Tokenizer, image_size: int = 16) -> dict[str, dict]:
  """JSON configs of the fixture; `image_size` is 16, 32 or 64 pixels."""
  levels = {16: 2, 32: 3, 64: 4}[image_size]
  absent = [None, None]
  return {
      "model_index": {
          "_class_name": "StableDiffusionPipeline", "feature_extractor": absent,
          "image_encoder": absent, "requires_safety_checker": False,
          "safety_checker": absent, "scheduler": ["diffusers", "DDIMScheduler"],
          "text_encoder": ["transformers", "CLIPTextModel"],
          "tokenizer": ["transformers", "CLIPTokenizer"],
          "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
      },
      "scheduler": {
          "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
          "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "clip_sample": False,
          "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "epsilon",
          "timestep_spacing": "leading", "trained_betas": None,
      },
      "unet": {
          "_class_name": "UNet2DConditionModel", "sample_size": 8, "in_channels": 4,
          "out_channels": 4, "block_out_channels": [WIDTH], "layers_per_block": 1,
          "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"],
          "cross_attention_dim": WIDTH, "attention_head_dim": 4,
      },
      "vae": {
          "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3,
          "latent_channels": 4, "block_out_channels": [16] * levels, "layers_per_block": 1,
          "down_block_types": ["DownEncoderBlock2D"] * levels,
          "up_block_types": ["UpDecoderBlock2D"] * levels, "norm_num_groups": 8,
          "sample_size": image_size, "scaling_factor": 0.5,
      },
      "text_encoder": {
          "architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
          "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 1,
          "num_attention_heads": 4, "max_position_embeddings": LENGTH,
          "vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id,
          "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id,
          "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": WIDTH,
      },
  }


def make_sd3_configs(tokenizer: Tokenizer, image_size: int = 16, t5: bool = False):
  """JSON configs of the fixture of Stable Diffusion 3, every path of 3.5 medium in it; shift 3."""
  base, absent = make_configs(tokenizer, image_size), [None, None]
  text = base["text_encoder"] | {"architectures": ["CLIPTextModelWithProjection"],
                                 "num_hidden_layers": 2}
  configs = {
      "model_index": {
          "_class_name": "StableDiffusion3Pipeline", "feature_extractor": absent,
          "image_encoder": absent, "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
          "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
          "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
          "text_encoder_3": absent, "tokenizer": ["transformers", "CLIPTokenizer"],
          "tokenizer_2": ["transformers", "CLIPTokenizer"], "tokenizer_3": absent,
          "transformer": ["diffusers", "SD3Transformer2DModel"],
          "vae": ["diffusers", "AutoencoderKL"],
      },
      "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
                    "shift": 3.0},
      "transformer": {
          "_class_name": "SD3Transformer2DModel", "sample_size": 8, "patch_size": 2,
          "in_channels": 16, "out_channels": 16, "num_layers": 2, "num_attention_heads": 2,
          "attention_head_dim": 16, "caption_projection_dim": WIDTH, "joint_attention_dim": 64,
          "pooled_projection_dim": WIDTH + 16, "pos_embed_max_size": 6,
          "dual_attention_layers": [0], "qk_norm": "rms_norm",
      },
      "vae": base["vae"] | {
          "latent_channels": 16, "scaling_factor": 1.5, "shift_factor": 0.06,
          "use_quant_conv": False, "use_post_quant_conv": False,
      },
      "text_encoder": text,
      "text_encoder_2": text | {"hidden_size": 16, "intermediate_size": 32, "projection_dim": 16,
                                "hidden_act": "gelu"},
  }
  if t5:
    configs["model_index"] |= {"text_encoder_3": ["transformers", "T5EncoderModel"],
                               "tokenizer_3": ["transformers", "T5TokenizerFast"]}
    configs["text_encoder_3"] = {
        "architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": 32, "d_model": 64,
        "d_kv": 8, "d_ff": 96, "num_layers": 2, "num_heads": 4, "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "use_cache": False,
    }
  return configs


def make_t5_tokenizer() -> T5Tokenizer:
  """Pieces of one letter, and a few words."""
  pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("\u2581cat", -3.0)]
  pieces += [(letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz!"]
  model = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
  model.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
  model.decoder = tokenizers.decoders.Metaspace()
  model.add_special_tokens(["<pad>", "</s>", "<unk>"])
  model.post_processor = tokenizers.processors.TemplateProcessing(
      single="$A </s>", special_tokens=[("</s>", 1)])
  config = {"tokenizer_class": "T5TokenizerFast", "extra_ids": 0, "model_max_length": 512}
  return T5Tokenizer({"tokenizer.json": model.to_str().encode(),
                      "tokenizer_config.json": json.dumps(config).encode()})


def make_pipeline_dir(path, seed: int = 0, *, image_size: int = 16):
  """Writes the fixture pipeline, f32 safetensors, to directory `path`, and returns `path`."""
  tokenizer = make_tokenizer()
  configs = make_configs(tokenizer, image_size)
  save_pipeline(Pipeline.build(configs, {"tokenizer": tokenizer}, seed=seed), path)
  return path


def make_sd3_pipeline_dir(path, seed: int = 0, *, image_size: int = 16, t5: bool = False):
  """The same for Stable Diffusion 3; T5 is absent unless `t5`."""
  tokenizer = make_tokenizer()
  own = {"tokenizer": tokenizer, "tokenizer_2": tokenizer}
  if t5:
    own["tokenizer_3"] = make_t5_tokenizer()
  save_pipeline(Pipeline.build(make_sd3_configs(tokenizer, image_size, t5), own, seed=seed), path)
  return path


def make_pairs() -> list[dict]:
  """Twelve preference pairs of random 32-pixel images for `data.pairs`, the last one a tie.

  The preferred image is the bright one, and is image 0 and image 1 in turn.
  """
  generator = np.random.default_rng(0)

  def png(low, high):
    buffer = io.BytesIO()
    Image.fromarray(generator.integers(low, high, (32, 32, 3), np.uint8)).save(buffer, "png")
    return buffer.getvalue()
  captions = [f"a {name} on a {colour} background" for name in ("cat", "dog", "sun")
              for colour in ("red", "blue", "green", "white")]
  pairs = [(png(128, 256), png(0, 128)) for _ in captions]
  return [{"caption": caption, "image_0": pair[i % 2], "image_1": pair[1 - i % 2],
           "label_0": 0.5 if i == len(captions) - 1 else 1.0 - i % 2}
          for i, (caption, pair) in enumerate(zip(captions, pairs))]
