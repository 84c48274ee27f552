"""Names of the original implementations of the families, which single-file checkpoints use.

CompVis' latent-diffusion (SD 1.x and 2.x), sgm (SDXL) and sd3-ref (SD 3), as ComfyUI and A1111 read
and write them, and as kohya's trainers name the layers of an adapter. `place` says where a tensor
of diffusers' layout lies in them; the names there come from these networks' own code.
"""
import dataclasses
import re

import numpy as np

# Modules within a block: ours, theirs.
_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
           "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
# The autoencoder's attention has two generations of names, see `names.new_vae_name`.
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
                  "to_out.0": "proj_out", "query": "q", "key": "k", "value": "v",
                  "proj_attn": "proj_out"}
_SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
}
_SD3_FUSED = {"attn.to_": "x_block.attn.qkv", "attn2.to_": "x_block.attn2.qkv",
              "attn.add_": "context_block.attn.qkv"}
_SD3 = {
    "pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1", "proj_out": "final_layer.linear",
}
# open_clip's text tower: ours, theirs.
_OPEN_CLIP = (
    (r"^text_model\.encoder\.layers\.(\d+)\.", r"transformer.resblocks.\1."),
    (r"\.self_attn\.out_proj\b", ".attn.out_proj"), (r"\.layer_norm([12])\b", r".ln_\1"),
    (r"\.mlp\.fc1\b", ".mlp.c_fc"), (r"\.mlp\.fc2\b", ".mlp.c_proj"),
    (r"^text_model\.embeddings\.token_embedding\b", "token_embedding"),
    (r"^text_model\.final_layer_norm\b", "ln_final"),
)


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a tensor lies.

  name: of the tensor there, or of the module.
  part, parts: which of how many equal parts it is of that one along the first axis.
  turn: what else differs: "" nothing, "square" a linear layer is a 1x1 convolution there,
    "transposed", "halves" the first axis' halves change places.
  """
  name: str
  part: int = 0
  parts: int = 1
  turn: str = ""

  def read(self, x: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Our tensor out of theirs; `shape` is the one it is to have, where "square" matters."""
    if self.parts > 1 and x.ndim and x.shape[0] % self.parts == 0:
      x = np.split(x, self.parts)[self.part]
    if self.turn == "square" and x.shape[2:] == (1, 1) and (shape is None or len(shape) == 2):
      x = x[:, :, 0, 0]
    elif self.turn == "transposed" and x.ndim == 2:
      x = x.T
    elif self.turn == "halves" and x.ndim and x.shape[0] % 2 == 0:
      x = np.concatenate(np.split(x, 2)[::-1])
    return x

  def write(self, x: np.ndarray) -> np.ndarray:
    """The inverse of `read`, but for parts, which are joined by whoever has all of them."""
    if self.turn == "square" and x.ndim == 2:
      return x[:, :, None, None]
    if self.turn == "transposed":
      return np.ascontiguousarray(x.T)
    if self.turn == "halves":
      return np.concatenate(np.split(x, 2)[::-1])
    return x


def unet_modules(blocks: list[bool], layers: int) -> dict[str, str]:
  """Prefixes of our module names -> theirs, for a UNet.

  Args:
    blocks: for each level, whether it has attention on the way down.
    layers: ResNet blocks of a level.
  """
  found = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
           "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
           "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}

  def resnet(ours, theirs):
    found.update({f"{ours}.{name}": f"{theirs}.{other}" for name, other in _RESNET.items()})
  n = 1
  for i, attention in enumerate(blocks):
    for j in range(layers):
      resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0")
      if attention:
        found[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{n}.1"
      n += 1
    if i < len(blocks) - 1:
      found[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
      n += 1
  resnet("mid_block.resnets.0", "middle_block.0")
  found["mid_block.attentions.0"] = "middle_block.1"
  resnet("mid_block.resnets.1", "middle_block.2")
  n = 0
  for i, attention in enumerate(reversed(blocks)):
    for j in range(layers + 1):
      resnet(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0")
      if attention:
        found[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{n}.1"
      n += 1
    if i < len(blocks) - 1:
      found[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{1 + attention}.conv"
  return found


def vae_modules(levels: int, layers: int) -> dict[str, str]:
  """The same for an autoencoder."""
  found = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
  for side, plural, ours, sampler, n in (("encoder", "down", "down_blocks", "downsample", layers),
                                         ("decoder", "up", "up_blocks", "upsample", layers + 1)):
    for name, other in (("conv_in", "conv_in"), ("conv_out", "conv_out"),
                        ("conv_norm_out", "norm_out"), ("mid_block.resnets.0", "mid.block_1"),
                        ("mid_block.resnets.1", "mid.block_2")):
      found[f"{side}.{name}"] = f"{side}.{other}"
    for name, other in _VAE_ATTENTION.items():
      found[f"{side}.mid_block.attentions.0.{name}"] = f"{side}.mid.attn_1.{other}"
    for i in range(levels):
      theirs = f"{side}.{plural}.{i if plural == 'down' else levels - 1 - i}"
      for j in range(n):
        block = f"{side}.{ours}.{i}.resnets.{j}"
        found[block] = f"{theirs}.block.{j}"
        found[f"{block}.conv_shortcut"] = f"{theirs}.block.{j}.nin_shortcut"
      found[f"{side}.{ours}.{i}.{sampler}rs.0.conv"] = f"{theirs}.{sampler}.conv"
  return found


def by_prefix(modules: dict[str, str], name: str) -> str | None:
  """The name in `modules` of what its longest prefix there stands for; None where there is none."""
  parts = name.split(".")
  for end in range(len(parts), 0, -1):
    prefix = ".".join(parts[:end])
    if prefix in modules:
      return ".".join([modules[prefix], *parts[end:]])
  return None


def transformer_place(name: str, last: int) -> Place | None:
  """Where a module or tensor of SD 3's transformer lies; `last` is the number of its last block."""
  if name.startswith("pos_embed.pos_embed"):
    return Place("pos_embed")
  block = re.match(r"transformer_blocks\.(\d+)\.(.+)", name)
  if not block:
    found = by_prefix(_SD3, name)
    return found and Place(found, turn="halves" if name.startswith("norm_out.") else "")
  number, inner = block.groups()
  for prefix, fused in _SD3_FUSED.items():
    part = re.match(rf"{re.escape(prefix)}([qkv])(?:_proj)?(\..+)?$", inner)
    if part:
      return Place(f"joint_blocks.{number}.{fused}{part[2] or ''}", "qkv".index(part[1]), 3)
  found = by_prefix(_SD3_BLOCK, inner)
  turn = "halves" if inner.startswith("norm1_context.") and int(number) == last else ""
  return found and Place(f"joint_blocks.{number}.{found}", turn=turn)


def open_clip_place(name: str) -> Place:
  """Where a tensor of a CLIP text tower lies in open_clip's."""
  if name == "text_projection.weight":
    return Place("text_projection", turn="transposed")
  if name == "text_model.embeddings.position_embedding.weight":
    return Place("positional_embedding")
  fused = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)", name)
  if fused:
    return Place(f"transformer.resblocks.{fused[1]}.attn.in_proj_{fused[3]}",
                 "qkv".index(fused[2]), 3)
  for pattern, theirs in _OPEN_CLIP:
    name = re.sub(pattern, theirs, name)
  return Place(name)


def unet_place(modules: dict[str, str], name: str) -> Place | None:
  found = by_prefix(modules, name)
  return found and Place(found)


def vae_place(modules: dict[str, str], name: str) -> Place | None:
  found = by_prefix(modules, name)
  square = ".mid_block.attentions.0." in name and name.endswith(".weight") and "norm" not in name
  return found and Place(found, turn="square" if square else "")
