"""Methods climb a PyTorch reward as they climb the same network in JAX."""
import jax
import numpy as np
import pytest

import runs
from jaxalign import methods
from jaxalign.data.prompts import draw_prompts, read_prompts
from jaxalign.devices import callbacks, processes
from jaxalign.rewards import pytorch
from jaxalign.train.experiment import build
from jaxalign.train.programs import Programs
from jaxalign.train.search import Search, means

pytest.importorskip("torch")
# The same little network, and a colour that depends on the length of the prompt.
CODE = '''
import jax, jax.numpy as jnp
import numpy as np
import torch

KERNEL = np.random.default_rng(0).normal(0, 0.3, (4, 4, 3, 16)).astype(np.float32)
HEAD = np.random.default_rng(1).normal(0, 0.3, 16).astype(np.float32)

def prepare(prompts):
  return {"length": np.asarray([len(p) / 30 for p in prompts], np.float32)}

def in_jax(images, prepared):
  x = jax.lax.conv_general_dilated(images, KERNEL, (2, 2), "VALID",
                                   dimension_numbers=("NHWC", "HWIO", "NHWC"))
  near = jnp.square(images - prepared["length"][:, None, None, None]).mean((1, 2, 3))
  return (jnp.tanh(x).mean((1, 2)) * HEAD[None]).sum(-1) - near

def load(device):
  net = torch.nn.Conv2d(3, 16, 4, stride=2, bias=False)
  net.weight.data = torch.tensor(KERNEL).permute(3, 2, 0, 1)
  return {"net": net.to(device), "head": torch.tensor(HEAD, device=device)}

def in_torch(pixels, prompts, network):
  length = torch.tensor([len(p) / 30 for p in prompts], device=pixels.device)
  near = (pixels - length[:, None, None, None]).square().mean((1, 2, 3))
  return (network["net"](pixels).tanh().mean((2, 3)) * network["head"]).sum(1) - near
'''
# The network of the reward `scene_clip` in transformers' towers, from the same file of weights.
COPY = '''
import json
import re

import numpy as np
import safetensors.numpy
import torch
import transformers

from jaxalign.config.places import ASSETS
from jaxalign.models.tokenizer import Tokenizer

FOLDER = ASSETS / "scene_clip"

def tower(name, model):
  state = {}
  for path, leaf in safetensors.numpy.load_file(FOLDER / "model.safetensors").items():
    if path.startswith(f"{name}."):
      leaf = torch.tensor(leaf.astype(np.float32))
      if path.endswith(".kernel"):
        leaf = leaf.permute(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
      path = re.sub(r"[.](kernel|scale|embedding)$", ".weight", path.removeprefix(f"{name}."))
      state[path] = leaf
  model.load_state_dict(state)
  return model

def load(device):
  config = json.loads((FOLDER / "config.json").read_text())["model"]
  text = transformers.CLIPTextModelWithProjection(
      transformers.CLIPTextConfig(**config["text_config"]))
  vision = transformers.CLIPVisionModelWithProjection(
      transformers.CLIPVisionConfig(**config["vision_config"]))
  return tower("text", text), tower("vision", vision), Tokenizer.load(FOLDER)

def scene_clip(pixels, prompts, network):
  text, vision, tokenizer = network
  assert pixels.shape[2:] == (vision.config.image_size,) * 2
  words = text(torch.tensor(np.asarray(tokenizer(prompts))).long()).text_embeds
  image = vision(2 * pixels - 1).image_embeds
  return torch.nn.functional.cosine_similarity(image, words)
'''
STEPS = 3


@pytest.fixture
def scorers(monkeypatch):
  """The `Scorer`s that are made."""
  made, original = [], pytorch.Scorer.__init__

  def remember(self, *args):
    original(self, *args)
    made.append(self)
  monkeypatch.setattr(pytorch.Scorer, "__init__", remember)
  return made


def climb(cfg, scorers):
  """The mean reward of each step, its metrics, and rows that PyTorch scored in the last one.

  Without the loop's evaluations, which take most of the time.
  """
  exp = build(cfg, jax.devices()[:2])
  method = methods.make(cfg.method_name, exp.models, cfg.method, cfg.optim)
  rewards, rows = [], 0
  count = lambda: sum(scorer.rows for scorer in scorers)
  if cfg.at_inference:
    search = Search(exp, method, read_prompts("data.eval_prompts", cfg.data.eval_prompts))
    search.compile()
    for step in range(STEPS):
      before = count()
      values = means(search.step(step), search.total, step)
      rewards, rows = [*rewards, values["train/reward"]], count() - before
    return rewards, rows, method.cost(search.total)["reward_queries"]
  prompts = read_prompts("data.prompts", cfg.data.prompts)
  programs = Programs(exp, method, exp.prompt_table(prompts), jax.random.key(cfg.seed))
  state = programs.init()
  programs.compile(state)
  for step in range(STEPS):
    before = count()
    ids = draw_prompts(cfg.seed, step, len(prompts), cfg.sample.batch, cfg.group)
    experience, _, scores = programs.collect(state, step, ids, prompts)
    state, values = programs.update(state, experience, scores, step)
    jax.block_until_ready(values)
    callbacks.check()
    rewards.append(float(processes.fetch(scores).mean()))
    rows = count() - before
  # The images that were collected are scored as well.
  return rewards, rows, method.cost(cfg.sample.batch)["reward_queries"] + cfg.sample.batch


@pytest.mark.slow
@pytest.mark.parametrize("name, strong", [
    ("draft", dict(method__backprop_steps=1, optim__lr=0.01)),
    ("nabla_gfn", dict(optim__lr=0.01)), ("dno", dict(optim__lr=0.1)),
])
def test_as_in_jax(tmp_path, scorers, name, strong):
  (tmp_path / "mine.py").write_text(CODE)
  found = {}
  for kind in ("in_jax", "in_torch"):
    cfg = runs.smoke(name, mesh__data=2, reward__names=(f"{tmp_path}/mine.py:{kind}",), **strong)
    found[kind] = climb(cfg, scorers)
  rewards, rows, cost = found["in_torch"]
  np.testing.assert_allclose(rewards, found["in_jax"][0], atol=1e-4)
  assert np.ptp(rewards) > 1e-3, rewards             # it moves, so that this says something
  assert rows == cost and found["in_jax"][1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name, strong", [
    ("draft", dict(method__backprop_steps=1, optim__lr=0.01)),
    ("nabla_gfn", dict(optim__lr=0.01, method__strata=2, method__perturbations=1)),
    ("dno", dict(optim__lr=0.1)),
])
def test_the_embedded_model_as_in_jax(tmp_path, scorers, name, strong):
  pytest.importorskip("transformers")
  (tmp_path / "copy.py").write_text(COPY)
  small = dict(mesh__data=2, sample__batch=4, sample__steps=4, optim__warmup=0,
               optim__decay_steps=0, **strong)
  found = [climb(runs.smoke(name, "emoji", reward__names=(reward,), **small), scorers)[0]
           for reward in ("scene_clip", f"{tmp_path}/copy.py:scene_clip")]
  np.testing.assert_allclose(*found, atol=1e-4)
  assert np.ptp(found[1]) > 1e-3 and len(scorers) == 1, found
