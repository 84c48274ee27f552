"""Stable Diffusion 3 and 3.5: a flow-matching transformer, two CLIP text encoders, and T5.

Reference: Esser et al. 2024, arXiv 2403.03206.
"""
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import UserError
from jaxalign.models import mmdit
from jaxalign.models.clip import CLIPTextModelWithProjection
from jaxalign.models.pipeline import Pipeline
from jaxalign.models.t5 import T5EncoderModel
from jaxalign.models.tokenizer import T5_LENGTH, T5Tokenizer, Tokenizer
from jaxalign.models.vae import AutoencoderKL

CLIPS, T5 = ("text_encoder", "text_encoder_2"), "text_encoder_3"
_POSITIONS = "pos_embed.pos_embed"


class StableDiffusion3Pipeline(Pipeline):
  """See `Pipeline`. `cond` is `{"text": [B, M, J], "pooled": [B, Q]}`.

  `text` are the states before the last layer of both CLIP encoders side by side, filled up with
  zeros, and behind them T5's states. Where T5 is absent, diffusers has as many zero vectors in its
  place; here they are the one that they amount to, and `"key_bias" [B, M]` says of how many. No
  token is masked, and the null condition is the empty prompt, encoded.
  """
  denoiser_name = "transformer"
  components = {
      "transformer": ("SD3Transformer2DModel",), "vae": ("AutoencoderKL",),
      "scheduler": ("FlowMatchEulerDiscreteScheduler",),
      **dict.fromkeys(CLIPS, ("CLIPTextModelWithProjection",)), T5: ("T5EncoderModel",),
      "tokenizer": Tokenizer.CLASSES, "tokenizer_2": Tokenizer.CLASSES,
      "tokenizer_3": T5Tokenizer.CLASSES,
  }
  optional = (T5, "tokenizer_3")
  as_stored = (T5,)
  lora_targets = {
      "attention": r"attn2?/(to_(q|k|v|out_0|add_out)|add_(q|k|v)_proj)$",
      "ff": r"ff(_context)?/(net_0/proj|net_2)$",
  }
  # AdaLN-Zero: every block is the identity, and the output zero.
  starts_at_zero = r"((norm1|norm1_context|norm_out)/linear|^proj_out)/kernel$"

  @classmethod
  def make_networks(cls, configs, dtype, remat):
    networks = {
        "transformer": mmdit.SD3Transformer2DModel.from_config(
            configs["transformer"], dtype=dtype, remat=remat),
        "vae": AutoencoderKL.from_config(configs["vae"], dtype=dtype, remat=remat)}
    for name in CLIPS:
      networks[name] = CLIPTextModelWithProjection.from_config(configs[name], dtype)
    if T5 in configs:
      networks[T5] = T5EncoderModel.from_config(configs[T5], dtype)
    return networks

  def check_widths(self):
    config, clips = self.denoiser.config, [self.networks[name].config for name in CLIPS]
    joint, third = config.joint_attention_dim, self.networks.get(T5)

    def refuse(key, why):
      raise UserError(f"transformer/config.json: {key} = {getattr(config, key)}, but {why}")
    if sum(clip.hidden_size for clip in clips) > joint:
      refuse("joint_attention_dim", f"the states of {' and '.join(CLIPS)} are "
             f"{' + '.join(str(clip.hidden_size) for clip in clips)} wide")
    if third and third.config.d_model != joint:
      refuse("joint_attention_dim", f"the states of {T5} are {third.config.d_model} wide")
    if sum(clip.projection_dim for clip in clips) != config.pooled_projection_dim:
      refuse("pooled_projection_dim", f"the projection_dim of {' and '.join(CLIPS)} are "
             f"{' + '.join(str(clip.projection_dim) for clip in clips)}")
    if self.vae.config.latent_channels != config.in_channels:
      refuse("in_channels", f"the autoencoder has {self.vae.config.latent_channels} channels")
    if third and "tokenizer_3" not in self.tokenizers:
      raise UserError(f"model_index.json: {T5} needs its tokenizer_3, which is missing")
    for name, clip in zip(CLIPS, clips):
      if self.tokenizer.length > clip.max_position_embeddings:
        raise UserError(f"tokenizer/tokenizer_config.json: model_max_length = "
                        f"{self.tokenizer.length}, but {name} has max_position_embeddings = "
                        f"{clip.max_position_embeddings}")

  def denoise(self, variables, x_t, t, cond):
    return self.denoiser.apply(variables, x_t, t, cond["text"], cond["pooled"],
                               cond.get("key_bias"))

  def tokenize(self, prompts):
    ids, length = super().tokenize(prompts), self.tokenizer.length
    if ids[CLIPS[1]].shape[1] != length:            # the first tokenizer's length counts for both
      ids[CLIPS[1]] = self.tokenizers["tokenizer_2"].with_length(length)(prompts)
    return ids

  def encode_prompts(self, params, ids):
    outs = [self.networks[name].apply({"params": params[name]}, ids[name]) for name in CLIPS]
    text = jnp.concatenate([out.penultimate for out in outs], axis=-1).astype(jnp.float32)
    B, length, width = text.shape
    text = jnp.pad(text, ((0, 0), (0, 0), (0, self.denoiser.config.joint_attention_dim - width)))
    pooled = jnp.concatenate([out.projected for out in outs], axis=-1).astype(jnp.float32)
    if self._reads_t5():
      states = self.networks[T5].apply({"params": params[T5]}, ids[T5]).astype(jnp.float32)
      return {"text": jnp.concatenate([text, states], axis=1), "pooled": pooled}
    bias = jnp.zeros((B, length + 1)).at[:, -1].set(math.log(T5_LENGTH))
    return {"text": jnp.pad(text, ((0, 0), (0, 1), (0, 0))), "pooled": pooled, "key_bias": bias}

  def _reads_t5(self) -> bool:
    """Whether T5 is there, and not one whose output is zero, which stands in for an absent one."""
    if T5 not in self.networks:
      return False
    scale = self.params.get(T5, {}).get("encoder", {}).get("final_layer_norm", {}).get("scale")
    return not isinstance(scale, np.ndarray) or bool(scale.any())

  def small(self):
    own, (h, w, channels) = self.denoiser.config, self.latent_shape
    layers, heads, head = (4, 4, 64) if min(h, w) >= 32 else (2, 2, 32)
    network = mmdit.SD3Transformer2DModel(mmdit.SD3Config(
        sample_size=max(h, w), patch_size=own.patch_size, in_channels=channels,
        out_channels=channels, num_layers=layers, num_attention_heads=heads,
        attention_head_dim=head, caption_projection_dim=heads * head, qk_norm="rms_norm",
        joint_attention_dim=own.joint_attention_dim,
        pooled_projection_dim=own.pooled_projection_dim,
        pos_embed_max_size=max(h, w) // own.patch_size))
    rows, columns = h // own.patch_size, w // own.patch_size
    table = {"pos_embed": {"pos_embed": mmdit.positions(network.config, rows, columns)}}

    def init(key):
      params = network.init(key, *network.example_inputs())["params"]
      return {**params, "proj_out": jax.tree.map(jnp.zeros_like, params["proj_out"])}

    def apply(params, x_t, t, cond):
      return network.apply({"params": params, "constants": table}, x_t, t, cond["text"],
                           cond["pooled"], cond.get("key_bias"))
    return init, apply

  @property
  def pixel_step(self):
    return self.vae.factor * self.denoiser.config.patch_size

  def resized(self, height, width):
    pipeline = super().resized(height, width)
    largest = self.denoiser.config.pos_embed_max_size * self.pixel_step
    for key, pixels in zip(("height", "width"), pipeline.image_size):
      if pixels > largest:
        raise UserError(f"sample.{key}={pixels} is more than {largest}, the pixels that "
                        "transformer/config.json has positions for (pos_embed_max_size)")
    return pipeline

  @property
  def buffers(self):
    own = self.extras.get("transformer", {})
    if _POSITIONS not in own:
      own = {**own, _POSITIONS: mmdit.position_table(self.denoiser.config)}
    return {**self.extras, "transformer": own}

  @property
  def constants(self):
    config, (h, w, _) = self.denoiser.config, self.latent_shape
    make = lambda: mmdit.constants(self.buffers["transformer"][_POSITIONS], config, h, w)
    if not self.is_outline:
      return {"constants": make()}
    shape = h // config.patch_size, w // config.patch_size, config.width
    return {"constants": {"pos_embed": {
        "pos_embed": jax.ShapeDtypeStruct(shape, np.float32)}}}

  def export_configs(self, format):
    configs = super().export_configs(format)
    # diffusers' pipeline adds the shift, and fails where that is null.
    configs["vae"] = {**configs["vae"], "shift_factor": self.vae.config.shift_factor or 0.0}
    for name, present in ((T5, T5 in self.networks),
                          ("tokenizer_3", "tokenizer_3" in self.tokenizers)):
      if not present:
        configs["model_index"][name] = [None, None]
    return configs
