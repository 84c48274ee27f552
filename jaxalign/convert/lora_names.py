"""What the layers of an adapter are called: by PEFT, diffusers of all ages, kohya and ComfyUI."""
import re

import numpy as np

from jaxalign.convert import original
from jaxalign.convert.names import torch_name
from jaxalign.errors import UserError

KOHYA = {"unet": ("lora_unet",), "transformer": ("lora_unet", "lora_transformer"),
         "text_encoder": ("lora_te", "lora_te1"), "text_encoder_2": ("lora_te2",),
         "text_encoder_3": ("lora_te3",)}

# `to_q.lora_A.weight` of PEFT, `to_q.lora.down.weight` and the oldest `processor.to_q_lora.down`
# of diffusers, `to_q.lora_linear_layer.down` of its text encoders, `to_q.lora_down` of kohya.
_FACTOR = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?P<a>A|B)(?:\.default)?|[._]lora(?:_linear_layer)?\.(?P<b>down|up)"
    r"|\.lora_(?P<c>down|up))\.weight")
_FACTORS = {"A": "a", "B": "b", "down": "a", "up": "b"}
# Names that adapters of other kinds have.
OTHER_KINDS = {
    r"\.dora_scale$|\.lora_magnitude_vector\b": "a DoRA", r"\.hada_": "a LoHa",
    r"\.lokr_": "a LoKr", r"\.lora_mid\b": "a LoCon with a Tucker core", r"\.b?oft_": "an OFT",
    r"\.on_input$": "an IA3", r"\.diff(_b)?$": "a file of full differences",
}


def other_kind(names) -> tuple[str, str] | None:
  """What a file with these tensors is where that is no plain LoRA, and a tensor that shows it."""
  for mark, kind in OTHER_KINDS.items():
    for name in names:
      if re.search(mark, name):
        return kind, name
  return None


def parse(name: str) -> tuple[str, str] | None:
  """The module that a tensor belongs to and "a", "b" or "alpha"; None for any other name."""
  name = name.removeprefix("base_model.model.").replace(".processor.", ".")
  if name.endswith(".alpha"):
    return name.removesuffix(".alpha"), "alpha"
  match = _FACTOR.fullmatch(name)
  return match and (match["module"], _FACTORS[match["a"] or match["b"] or match["c"]])


def module_of(layer: str) -> str:
  """Our path of a layer -> its module in PyTorch."""
  return torch_name(f"{layer}/kernel").removesuffix(".weight")


def without_prefix(module: str) -> str:
  """The name that a text encoder's module has in transformers 5."""
  return module.removeprefix("text_model.")


class Layers:
  """The layers of some networks by every name that an adapter's file may have for them.

  Args:
    kernels: network -> layer -> shape of its kernel.
    denoiser: the network that a name without one belongs to.
  """

  def __init__(self, kernels: dict[str, dict[str, tuple[int, ...]]], denoiser: str):
    self._places = {}
    for network in sorted(kernels, key=lambda name: name != denoiser):
      modules = {module_of(layer): layer for layer in kernels[network]}
      original_of = _original(modules)
      for module, layer in modules.items():
        place = original_of(module)
        for name in _names(network, module, place, network == denoiser):
          # A fused layer of theirs stands for several of ours.
          parts = self._places.setdefault(name, [])
          part = place if place and name.endswith(_ends(place)) else original.Place(module)
          if not parts or (part.parts > 1 and parts[0][0] == network):
            parts.append((network, layer, part))

  def find(self, name: str) -> list[tuple[str, str, original.Place]]:
    """`(network, layer, which part of the file's layer it is)`; empty where there is no such."""
    return self._places.get(name) or []


def _ends(place: original.Place) -> tuple[str, str]:
  return "." + place.name, "_" + place.name.replace(".", "_")


def _names(network: str, module: str, place, is_denoiser: bool) -> list[str]:
  flat = module.replace(".", "_")
  found = [f"{network}.{module}", *(f"{prefix}_{flat}" for prefix in KOHYA.get(network, ()))]
  if is_denoiser or network == "text_encoder":
    found.append(module)
  if is_denoiser and place:
    found += [f"diffusion_model.{place.name}", f"lora_unet_{place.name.replace('.', '_')}"]
  old = re.sub(r"\.to_out\.0$", ".to_out", module) if is_denoiser else re.sub(
      r"\.self_attn\.(q|k|v|out)_proj$", r".self_attn.to_\1", module)
  if old != module:                        # the oldest names
    found += [f"{network}.{old}", *([old] if is_denoiser else [])]
  return found + [name.replace("text_model.", "", 1) for name in found if "text_model." in name]


def _original(modules):
  """`module -> Place` in the original implementation of the denoiser with these modules."""
  numbers = lambda pattern: {int(match[1]) for module in modules
                             if (match := re.match(pattern, module))}
  if levels := numbers(r"down_blocks\.(\d+)\."):
    with_attention = numbers(r"down_blocks\.(\d+)\.attentions\.")
    layers = len(numbers(r"down_blocks\.0\.resnets\.(\d+)\.")) or 1
    names = original.unet_modules([i in with_attention for i in sorted(levels)], layers)
    return lambda module: original.unet_place(names, module)
  if blocks := numbers(r"transformer_blocks\.(\d+)\."):
    return lambda module: original.transformer_place(module, max(blocks))
  return lambda module: None


def kohya_tensors(factors: dict[str, tuple[np.ndarray, np.ndarray]], network: str,
                  numbered: bool = False) -> dict:
  """kohya's tensors of a network's `{module: (a [r, in...], b [out, r...])}`; alpha is the rank.

  The layers of a UNet have diffusers' names, which kohya's trainers, ComfyUI and A1111 know; those
  of a transformer the original ones, where query, key and value are one layer: its factors are
  theirs, side by side and in blocks. The first text encoder is `numbered` where there are more.
  """
  prefix = KOHYA[network][1 if network == "text_encoder" and numbered else 0]
  fused, tensors = {}, {}
  for module, pair in factors.items():
    place = original.transformer_place(module, -1) if network == "transformer" else None
    place = place or original.Place(module)
    fused.setdefault(place.name, []).append((place, pair))
  for name, found in fused.items():
    key = f"{prefix}_{name.replace('.', '_')}"
    parts = found[0][0].parts
    if parts == 1:
      a, b = found[0][1]
    else:
      a = np.concatenate([pair[0] for _, pair in found])
      rows = found[0][1][1].shape[0]
      b = np.zeros((parts * rows, len(a)), found[0][1][1].dtype)
      column = 0
      for place, (own_a, own_b) in found:
        b[place.part * rows:(place.part + 1) * rows, column:column + len(own_a)] = own_b
        column += len(own_a)
    tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b,
                f"{key}.alpha": np.asarray(len(a), np.float32)}
  return tensors


def pattern_value(where: str, patterns, module: str, default):
  """What PEFT's `alpha_pattern` or `rank_pattern` says of a module.

  A key is the end of a module's name, or with `^` all of it; another regular expression, which PEFT
  would take, is an error: a stranger's one can run for ever.
  """
  if not isinstance(patterns, dict):
    raise UserError(f"{where} is {json_like(patterns)}, not a table of modules")
  for key, value in patterns.items():
    plain = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if re.search(r"[^\w.\-]", plain):
      raise UserError(f"{where}: {json_like(key)} is not the name of a module")
    if plain in (module, without_prefix(module)) or (
        not key.startswith("^") and module.endswith(f".{plain}")):
      return value
  return default


def json_like(value) -> str:
  """A value out of a stranger's file, short enough for a line."""
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:60]}..."
