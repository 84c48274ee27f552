"""Published architectures without their weights: what `--plan` needs when there is no checkpoint.

The values are those of the `config.json` files of Stable Diffusion 1.5, SDXL base 1.0, Stable
Diffusion 3 medium and 3.5 medium and large; keys that are left out have the networks' defaults.
"""
import dataclasses

from jaxalign.models.pipeline import Pipeline
from jaxalign.models.tokenizer import T5_LENGTH, Tokenizer

_CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
               num_attention_heads=12, hidden_act="quick_gelu", vocab_size=49408,
               max_position_embeddings=77, projection_dim=768, eos_token_id=49407)
_BIG_G = dict(_CLIP_L, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
              num_attention_heads=20, hidden_act="gelu", projection_dim=1280)
_VAE = dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4,
            in_channels=3, out_channels=3, norm_num_groups=32,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
_SCHEDULER = dict(_class_name="DDIMScheduler", num_train_timesteps=1000, beta_start=0.00085,
                  beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon",
                  steps_offset=1, set_alpha_to_one=False, clip_sample=False)
_T5_XXL = dict(model_type="t5", vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24,
               num_heads=64, relative_attention_num_buckets=32, layer_norm_epsilon=1e-6,
               relative_attention_max_distance=128, feed_forward_proj="gated-gelu")


def _stable_diffusion_3(layers: int, max_size: int, **transformer) -> dict:
  """Configs by component. Published sizes have as many heads as layers."""
  return {
      "model_index": {"_class_name": "StableDiffusion3Pipeline"},
      "transformer": dict(
          sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=layers,
          attention_head_dim=64, num_attention_heads=layers, caption_projection_dim=64 * layers,
          joint_attention_dim=4096, pooled_projection_dim=2048, pos_embed_max_size=max_size,
          **transformer),
      "vae": dict(_VAE, latent_channels=16, sample_size=1024, scaling_factor=1.5305,
                  shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
                  force_upcast=True),
      "text_encoder": _CLIP_L, "text_encoder_2": _BIG_G, "text_encoder_3": _T5_XXL,
      "scheduler": dict(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000,
                        shift=3.0),
  }


ARCHITECTURES = {
    "sd15": {
        "model_index": {"_class_name": "StableDiffusionPipeline"},
        "unet": dict(sample_size=64, cross_attention_dim=768),
        "vae": dict(_VAE, sample_size=512, scaling_factor=0.18215),
        "text_encoder": _CLIP_L, "scheduler": _SCHEDULER,
    },
    "sdxl": {
        "model_index": {"_class_name": "StableDiffusionXLPipeline",
                        "force_zeros_for_empty_prompt": True},
        "unet": dict(
            sample_size=128, block_out_channels=[320, 640, 1280], cross_attention_dim=2048,
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            attention_head_dim=[5, 10, 20], transformer_layers_per_block=[1, 2, 10],
            use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816),
        "vae": dict(_VAE, sample_size=1024, scaling_factor=0.13025),
        "text_encoder": _CLIP_L, "text_encoder_2": _BIG_G, "scheduler": _SCHEDULER,
    },
    "sd3_medium": _stable_diffusion_3(24, 192),
    "sd35_medium": _stable_diffusion_3(24, 384, qk_norm="rms_norm",
                                       dual_attention_layers=list(range(13))),
    "sd35_large": _stable_diffusion_3(38, 192, qk_norm="rms_norm"),
}


def architecture(name: str, tokenizer: Tokenizer, *, shapes_only: bool, dtype="float32",
                 remat="none") -> Pipeline:
  """The pipeline of `ARCHITECTURES[name]` with shapes or random weights.

  `tokenizer` stands in for those of the text encoders, with as many tokens as theirs.
  """
  configs = {key: dict(value) for key, value in ARCHITECTURES[name].items()}
  tokenizers = {
      name.replace("text_encoder", "tokenizer"): tokenizer.with_length(
          config.get("max_position_embeddings", T5_LENGTH))
      for name, config in configs.items() if name.startswith("text_encoder")}
  pipeline = Pipeline.build(configs, tokenizers, {} if shapes_only else None, dtype=dtype,
                            remat=remat)
  return dataclasses.replace(pipeline, params=pipeline.param_shapes()) if shapes_only else pipeline
