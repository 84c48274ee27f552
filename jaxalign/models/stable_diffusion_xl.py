"""Stable Diffusion XL: a UNet that two CLIP text encoders and the size of the image condition."""
import jax.numpy as jnp

from jaxalign.errors import UserError
from jaxalign.models.clip import CLIPTextModelWithProjection
from jaxalign.models.stable_diffusion import StableDiffusionPipeline
from jaxalign.models.tokenizer import Tokenizer


class StableDiffusionXLPipeline(StableDiffusionPipeline):
  """See `Pipeline`. `cond` is `{"text": [B, L, D], "added": {"text_embeds", "time_ids"}}`.

  `text` are the states before the last layer of both encoders side by side, `text_embeds [B, P]`
  the second encoder's projection. `time_ids [B, 6]` are original height and width, top and left of
  the crop, target height and width, in pixels: an uncropped image of `image_size`, unless
  `with_origin` says otherwise. The empty prompt gives zeros for both embeddings, as the null
  condition of these checkpoints is (`force_zeros_for_empty_prompt`).
  """
  components = StableDiffusionPipeline.components | {
      "text_encoder_2": ("CLIPTextModelWithProjection",),
      "tokenizer_2": Tokenizer.CLASSES,
  }
  formats = ("diffusers",)
  added = "text_time"

  @classmethod
  def make_networks(cls, configs, dtype, remat):
    second = CLIPTextModelWithProjection.from_config(configs["text_encoder_2"], dtype)
    return {**super().make_networks(configs, dtype, remat), "text_encoder_2": second}

  def check_widths(self):
    super().check_widths()
    config, second = self.denoiser.config, self.networks["text_encoder_2"].config
    taken, times = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
    if second.projection_dim + 6 * times != taken:
      raise UserError(f"unet/config.json: projection_class_embeddings_input_dim = {taken} is not "
                      f"the projection_dim of text_encoder_2, {second.projection_dim}, plus 6 "
                      f"times addition_time_embed_dim, {times}")

  def encode_prompts(self, params, ids):
    outs = [self.networks[name].apply({"params": params[name]}, ids[name])
            for name in self.text_encoders]
    text = jnp.concatenate([out.penultimate for out in outs], axis=-1).astype(jnp.float32)
    pooled = outs[1].projected.astype(jnp.float32)
    if self.configs["model_index"].get("force_zeros_for_empty_prompt", True):
      empty = ids["text_encoder"][:, 1] == self.tokenizer.eos_id       # right after the start token
      text = jnp.where(empty[:, None, None], 0.0, text)
      pooled = jnp.where(empty[:, None], 0.0, pooled)
    size = jnp.asarray(self.image_size, jnp.float32)
    time_ids = jnp.concatenate([size, jnp.zeros(2), size])
    time_ids = jnp.broadcast_to(time_ids[None], (text.shape[0], 6))
    return {"text": text, "added": {"text_embeds": pooled, "time_ids": time_ids}}

  def with_origin(self, cond, origin):
    target = cond["added"]["time_ids"][:, 4:]
    time_ids = jnp.concatenate([origin.astype(target.dtype), target], axis=1)
    return {**cond, "added": {**cond["added"], "time_ids": time_ids}}

  def export_configs(self, format):
    configs = super().export_configs(format)
    del configs["model_index"]["safety_checker"], configs["model_index"]["requires_safety_checker"]
    return configs
