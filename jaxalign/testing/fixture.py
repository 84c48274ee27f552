"""A Stable Diffusion pipeline with random weights, so small that it compiles in seconds.

For `:smoke` recipes and tests: one 32-channel block at 8x8x4 latents, in diffusers' layout and
within what its PyTorch and Flax classes can load.
"""
import io
import json

import numpy as np
from PIL import Image
from tokenizers import pre_tokenizers

from jaxalign.convert import save_pipeline
from jaxalign.models.pipeline import Pipeline
from jaxalign.models.tokenizer import Tokenizer

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


def make_pipeline_dir(path, seed: int = 0, *, image_size: int = 16):
  """Writes the fixture pipeline, f32 safetensors, to directory `path`, and returns `path`."""
  tokenizer = make_tokenizer()
  configs = make_configs(tokenizer, image_size)
  save_pipeline(Pipeline.build(configs, {"tokenizer": tokenizer}, seed=seed), path)
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
