"""Small checkpoints with random weights of each model family, written by PyTorch's diffusers."""
import json

import pytest

from jaxalign.models.tokenizer import Tokenizer
from jaxalign.testing.fixture import LENGTH, make_tokenizer

LEVELS = 2                                   # 8x8 latents are 16x16 images
UNET = dict(sample_size=8, block_out_channels=[32, 64], layers_per_block=1)
UNETS = {
    "sd1": dict(UNET, down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
                up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"], cross_attention_dim=24,
                attention_head_dim=4),
    "sd2": dict(UNET, down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
                up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"], cross_attention_dim=40,
                attention_head_dim=[2, 4], use_linear_projection=True, upcast_attention=True),
    "sdxl": dict(UNET, down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
                 up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], cross_attention_dim=24 + 40,
                 attention_head_dim=[2, 4], transformer_layers_per_block=[1, 2],
                 use_linear_projection=True, addition_embed_type="text_time",
                 addition_time_embed_dim=8, projection_class_embeddings_input_dim=20 + 6 * 8),
}
UNETS["turbo"] = UNETS["sd2"]
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SMALL_TEXT, LARGE_TEXT = (dict(hidden_size=24, num_attention_heads=4, intermediate_size=48),
                          dict(hidden_size=40, num_attention_heads=5, intermediate_size=80))


def tokenizers() -> dict[str, Tokenizer]:
  """CLIP's, padded with its end token, and OpenCLIP's, padded with "!", whose id is 0."""
  first = make_tokenizer()
  files = {name: json.loads(first._files[name])
           for name in ("tokenizer_config.json", "special_tokens_map.json")}
  padded = {name: json.dumps({**content, "pad_token": "!"}).encode()
            for name, content in files.items()}
  return {"clip": first, "openclip": Tokenizer({**first._files, **padded})}


def write(folder, family: str, seed: int = 0):
  """Writes a checkpoint of "sd1", "sd2" (v-prediction), "turbo" or "sdxl"; returns `folder`."""
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(seed)
  words = tokenizers()
  for name, tokenizer in words.items():
    tokenizer.save(folder / name)
  read = lambda name: transformers.CLIPTokenizer.from_pretrained(folder / name)

  def text(sizes, act, cls=transformers.CLIPTextModel):
    ids = words["clip"]
    return cls(transformers.CLIPTextConfig(
        **sizes, num_hidden_layers=3, hidden_act=act, projection_dim=20,
        max_position_embeddings=LENGTH, vocab_size=ids.vocab_size, bos_token_id=ids.bos_id,
        eos_token_id=ids.eos_id, pad_token_id=ids.pad_id))

  openclip = family in ("sd2", "turbo")
  parts = {
      "unet": diffusers.UNet2DConditionModel(**UNETS[family]),
      "vae": diffusers.AutoencoderKL(
          block_out_channels=[16] * LEVELS, layers_per_block=1, norm_num_groups=8, sample_size=16,
          down_block_types=["DownEncoderBlock2D"] * LEVELS, scaling_factor=0.5,
          up_block_types=["UpDecoderBlock2D"] * LEVELS, force_upcast=family == "sdxl"),
      "tokenizer": read("openclip" if openclip else "clip"),
      "text_encoder": text(LARGE_TEXT, "gelu") if openclip else text(SMALL_TEXT, "quick_gelu"),
  }
  if family in ("sdxl", "turbo"):
    spacing = "trailing" if family == "turbo" else "leading"
    parts["scheduler"] = diffusers.EulerDiscreteScheduler(
        **BETAS, timestep_spacing=spacing, steps_offset=1)
  else:
    parts["scheduler"] = diffusers.DDIMScheduler(
        **BETAS, steps_offset=1, clip_sample=False, set_alpha_to_one=False,
        prediction_type="v_prediction" if family == "sd2" else "epsilon")
  if family == "sdxl":
    pipeline = diffusers.StableDiffusionXLPipeline(
        **parts, tokenizer_2=read("openclip"), add_watermarker=False,
        text_encoder_2=text(LARGE_TEXT, "gelu", transformers.CLIPTextModelWithProjection))
  else:
    pipeline = diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
  pipeline.save_pretrained(folder / family)
  return folder / family
