"""The JSON files of the embedded models, in diffusers' words: what is in them, and how large.

Each takes the tokenizer, the autoencoder's own config (`vae`), and the sizes that a recipe has.
"""
from jaxalign.models.tokenizer import Tokenizer

_ABSENT = [None, None]
_HEAD = 32                 # features of a head of the transformer
_SECOND = 64               # features of its second text encoder, which has two layers


def _text_encoder(tokenizer: Tokenizer, width: int, layers: int, kind: str, act: str) -> dict:
  return {
      "architectures": [kind], "model_type": "clip_text_model", "hidden_size": width,
      "intermediate_size": 2 * width, "num_hidden_layers": layers, "num_attention_heads": 4,
      "max_position_embeddings": tokenizer.length, "vocab_size": tokenizer.vocab_size,
      "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id,
      "pad_token_id": tokenizer.pad_id, "hidden_act": act, "layer_norm_eps": 1e-5,
      "projection_dim": width,
  }


def _side(vae: dict) -> int:
  """Of the latents."""
  return vae["sample_size"] // 2 ** (len(vae["block_out_channels"]) - 1)


def stable_diffusion(tokenizer: Tokenizer, vae: dict, *, widths, text_width: int,
                     text_layers: int) -> dict[str, dict]:
  """`StableDiffusionPipeline`: a UNet of the velocity.

  `beta_end` is larger than Stable Diffusion's, so that the last training step has all but forgotten
  a flat background: with 0.012 a fifteenth of its colour would be left, in each of 64 positions,
  and sampling starts from none.
  """
  levels = len(widths)
  return {
      "model_index": {
          "_class_name": "StableDiffusionPipeline", "feature_extractor": _ABSENT,
          "image_encoder": _ABSENT, "safety_checker": _ABSENT, "requires_safety_checker": False,
          "scheduler": ["diffusers", "DDIMScheduler"], "vae": ["diffusers", "AutoencoderKL"],
          "text_encoder": ["transformers", "CLIPTextModel"],
          "tokenizer": ["transformers", "CLIPTokenizer"],
          "unet": ["diffusers", "UNet2DConditionModel"],
      },
      "scheduler": {
          "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.02,
          "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "clip_sample": False,
          "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction",
          "timestep_spacing": "trailing", "trained_betas": None,
      },
      "unet": {
          "_class_name": "UNet2DConditionModel", "sample_size": _side(vae),
          "in_channels": vae["latent_channels"], "out_channels": vae["latent_channels"],
          "block_out_channels": list(widths), "layers_per_block": 1,
          "down_block_types": ["CrossAttnDownBlock2D"] * levels,
          "up_block_types": ["CrossAttnUpBlock2D"] * levels,
          "cross_attention_dim": text_width, "attention_head_dim": 4,
      },
      "vae": vae,
      "text_encoder": _text_encoder(tokenizer, text_width, text_layers, "CLIPTextModel",
                                    "quick_gelu") | {"projection_dim": 512},
  }


def stable_diffusion_3(tokenizer: Tokenizer, vae: dict, *, width: int, layers: int, dual: int,
                       patch: int, text_width: int, text_layers: int) -> dict[str, dict]:
  """`StableDiffusion3Pipeline` without T5: a transformer of the flow, `dual` of whose layers, from
  the first, attend to the picture twice, as in 3.5 medium.

  Its autoencoder keeps the quant convolutions that Stable Diffusion 3's lacks: they are identities,
  and one file serves all embedded models.
  """
  clip = ["transformers", "CLIPTextModelWithProjection"]
  side, second = _side(vae), min(_SECOND, text_width)
  return {
      "model_index": {
          "_class_name": "StableDiffusion3Pipeline", "feature_extractor": _ABSENT,
          "image_encoder": _ABSENT, "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
          "text_encoder": clip, "text_encoder_2": clip, "text_encoder_3": _ABSENT,
          "tokenizer": ["transformers", "CLIPTokenizer"],
          "tokenizer_2": ["transformers", "CLIPTokenizer"], "tokenizer_3": _ABSENT,
          "transformer": ["diffusers", "SD3Transformer2DModel"],
          "vae": ["diffusers", "AutoencoderKL"],
      },
      # The levels that larger latents need would be too noisy for 8 x 8.
      "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
                    "shift": 1.0},
      "transformer": {
          "_class_name": "SD3Transformer2DModel", "sample_size": side, "patch_size": patch,
          "in_channels": vae["latent_channels"], "out_channels": vae["latent_channels"],
          "num_layers": layers, "num_attention_heads": width // _HEAD, "attention_head_dim": _HEAD,
          "caption_projection_dim": width, "joint_attention_dim": text_width + second,
          "pooled_projection_dim": text_width + second, "pos_embed_max_size": side // patch,
          "dual_attention_layers": list(range(dual)), "qk_norm": "rms_norm",
      },
      "vae": {**vae, "shift_factor": 0.0},
      "text_encoder": _text_encoder(tokenizer, text_width, text_layers, clip[1], "quick_gelu"),
      "text_encoder_2": _text_encoder(tokenizer, second, 2, clip[1], "gelu"),
  }
