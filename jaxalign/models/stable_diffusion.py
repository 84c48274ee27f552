"""Stable Diffusion 1.x and 2.x (and the latter's Turbo form): a UNet and one CLIP text encoder."""
import jax
import jax.numpy as jnp

from jaxalign.errors import UserError
from jaxalign.models.clip import CLIPTextModel
from jaxalign.models.pipeline import Pipeline
from jaxalign.models.tokenizer import Tokenizer
from jaxalign.models.unet import UNet2DConditionModel
from jaxalign.models.vae import AutoencoderKL

_FLAX_SCHEDULERS = ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler",
                    "EulerDiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler")


class StableDiffusionPipeline(Pipeline):
  """See `Pipeline`. `cond` is `{"text": [B, L, D]}`: states after the last layer and its norm."""
  denoiser_name = "unet"
  components = {
      "unet": ("UNet2DConditionModel",), "vae": ("AutoencoderKL",),
      "text_encoder": ("CLIPTextModel",), "tokenizer": Tokenizer.CLASSES, "scheduler": None,
  }
  formats = ("diffusers", "flax")
  lora_targets = {
      "attention": r"attn\d/to_(q|k|v|out_0)$",
      "ff": r"ff/(net_0/proj|net_2)$",
      "conv": r"(resnets_\d+/(conv1|conv2|conv_shortcut)|samplers_0/conv)$",
  }
  starts_at_zero = "^conv_out/"
  # What the UNet is told besides the text: `addition_embed_type`.
  added = None

  @classmethod
  def make_networks(cls, configs, dtype, remat):
    return {"unet": UNet2DConditionModel.from_config(configs["unet"], dtype=dtype, remat=remat),
            "vae": AutoencoderKL.from_config(configs["vae"], dtype=dtype, remat=remat),
            "text_encoder": CLIPTextModel.from_config(configs["text_encoder"], dtype=dtype)}

  def check_widths(self):
    config = self.denoiser.config
    takes, latents = config.in_channels, self.vae.config.latent_channels
    if takes != latents:
      kind = {9: "an inpainting UNet, which takes a mask and a masked image too",
              8: "a UNet that takes a second image, to edit (InstructPix2Pix)"}.get(
                  takes, "another autoencoder's")
      raise UserError(f"unet/config.json: in_channels = {takes}: {kind}; text-to-image has the "
                      f"{latents} channels of the autoencoder")
    widths = [self.networks[name].config.hidden_size for name in self.text_encoders]
    if sum(widths) != config.cross_attention_dim:
      raise UserError(f"unet/config.json: cross_attention_dim = {config.cross_attention_dim}, but "
                      f"the states of {' and '.join(self.text_encoders)} are "
                      f"{' + '.join(map(str, widths))} wide")
    if config.addition_embed_type != self.added:
      raise UserError(f"unet/config.json: addition_embed_type = {config.addition_embed_type!r}, "
                      f"which with {' and '.join(self.text_encoders)} is {self.added!r}")

  def denoise(self, variables, x_t, t, cond):
    return self.denoiser.apply(variables, x_t, t, cond["text"], cond.get("added"))

  def encode_prompts(self, params, ids):
    out = self.networks["text_encoder"].apply({"params": params["text_encoder"]},
                                              ids["text_encoder"])
    return {"text": out.last_hidden_state.astype(jnp.float32)}

  def small(self):
    # The published sizes for 64x64 latents; two levels are all that 8x8 ones have room for.
    widths = (64, 128, 256, 256) if min(self.latent_shape[:2]) >= 32 else (32, 64)
    plain = len(widths) - 1
    unet = UNet2DConditionModel.from_config({
        **self.configs["unet"], "block_out_channels": widths, "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D"] * plain + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * plain,
        "norm_num_groups": min(32, widths[0]), "attention_head_dim": 8,
        "num_attention_heads": None, "transformer_layers_per_block": 1})

    def init(key):
      params = unet.init(key, *unet.example_inputs())["params"]
      return {**params, "conv_out": jax.tree.map(jnp.zeros_like, params["conv_out"])}

    def apply(params, x_t, t, cond):
      return unet.apply({"params": params}, x_t, t, cond["text"], cond.get("added"))
    return init, apply

  def export_configs(self, format):
    if format == "flax":
      self._check_flax()
    configs = super().export_configs(format)
    index = configs["model_index"]
    index["safety_checker"], index["requires_safety_checker"] = [None, None], False
    if format == "flax":
      # The Flax class takes "absent" only with the library named, and has no other optional parts.
      index["feature_extractor"] = ["transformers", None]
      index["safety_checker"] = ["stable_diffusion", None]
      del index["image_encoder"], index["requires_safety_checker"]
    return configs

  def _check_flax(self) -> None:
    """UserError where diffusers' Flax classes would silently compute something else."""
    for model, key, only in (("unet", "norm_num_groups", (32,)), ("unet", "norm_eps", (1e-5,)),
                             ("vae", "shift_factor", (None, 0, 0.0))):
      value = self.configs[model].get(key, only[0])
      if value not in only:
        raise UserError(f"format: flax has no {model} with {key} = {value!r}")
    scheduler = self.configs["model_index"]["scheduler"][1].removeprefix("Flax")
    if scheduler not in _FLAX_SCHEDULERS:
      raise UserError(f"format: flax has no scheduler {scheduler}")
