"""torch2jax as the bridge to a PyTorch reward: it gives what the callback gives, or is refused.

What needs its package and a compiler is slow, as that takes minutes where nothing is in its cache.
"""
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.devices import callbacks, processes, sharding
from jaxalign.errors import UserError
from jaxalign.rewards import make_reward, open_reward
from jaxalign.rewards.pytorch import saving
from jaxalign.rewards.trial import Trial

torch = pytest.importorskip("torch")
PROMPTS = ["a cat", "a dog", "a frog", "a cat"] * 2
IMAGES = np.random.default_rng(0).uniform(0, 1, (8, 6, 4, 3)).astype(np.float32)
CODE = '''
import torch

def load(device):
  torch.manual_seed(0)
  return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Tanh(),
                             torch.nn.Conv2d(8, 1, 1)).to(device)

def learnt(pixels, prompts, network):
  length = torch.tensor([float(len(p)) for p in prompts], device=pixels.device)
  pixels *= 1.5                        # a copy of its own, not memory of JAX
  return network(pixels).mean((1, 2, 3)) * length

def features(pixels, network):
  return network[0](pixels).mean((2, 3))
'''


@pytest.fixture
def make(tmp_path):
  """The reward above by a bridge, opened."""
  (tmp_path / "mine.py").write_text(CODE)

  def make(bridge, mesh=None):
    reward = make_reward((f"{tmp_path}/mine.py:learnt#bridge={bridge}",), (1.0,))
    return open_reward(reward, lambda: Trial(IMAGES.shape[1:3], PROMPTS, "some_method"), mesh)
  return make


@pytest.fixture
def package(monkeypatch):
  """Stands in for torch2jax, with a compiler beside it."""
  package = types.ModuleType("wrap_torch2jax")
  package.compile_and_import_module = lambda: print("compiling")
  monkeypatch.setitem(sys.modules, "wrap_torch2jax", package)
  monkeypatch.setenv("CXX", sys.executable)
  return package


def test_the_package_is_missing(make, monkeypatch):
  monkeypatch.setitem(sys.modules, "wrap_torch2jax", None)
  with pytest.raises(UserError, match=r"mine.py:learnt: bridge=torch2jax needs its package: pip "
                                      r"install jaxalign\[torch2jax\]; leave it out"):
    make("torch2jax")


def test_the_compiler_is_missing_or_fails(make, package, monkeypatch):
  def fails():
    raise RuntimeError("Error building extension\nand a page more")
  package.compile_and_import_module = fails
  with pytest.raises(UserError, match=r"does not compile \(RuntimeError: Error building extension\)"
                                      "; leave it out for the callback$"):
    make("torch2jax")
  monkeypatch.setenv("CXX", "no-such-compiler")
  with pytest.raises(UserError, match="needs a C.. compiler, and there is no no-such-compiler"):
    make("torch2jax")


def test_where_it_does_not_work(make, package, monkeypatch):
  gpu = types.SimpleNamespace(platform="gpu")
  with monkeypatch.context() as patch, pytest.raises(UserError, match="device=cpu is elsewhere"):
    patch.setattr(jax, "local_devices", lambda: [gpu])
    make("torch2jax")
  with monkeypatch.context() as patch, pytest.raises(UserError, match="others do not know"):
    patch.setattr(processes, "several", lambda: True)
    patch.setattr(callbacks, "meet", lambda *_: None)
    make("torch2jax")
  with pytest.raises(UserError, match="bridge=dlpack is none of callback, torch2jax"):
    make("dlpack")


def test_it_is_said(make, package, capsys):
  make("torch2jax")
  found = capsys.readouterr()
  assert "called by torch2jax" in found.out and "compiling" not in found.out
  assert "compiling" in found.err
  make("callback")
  assert "torch2jax" not in capsys.readouterr().out


@pytest.fixture
def compiled():
  pytest.importorskip("wrap_torch2jax", reason="needs pip install jaxalign[torch2jax]")
  if not shutil.which("c++"):
    pytest.skip("torch2jax needs a C++ compiler")


def value_and_grad(reward, mesh):
  images, prepared = jax.device_put((IMAGES, reward.prepare(PROMPTS)),
                                    sharding.batch_sharding(mesh))

  def total(x):
    scores = reward.score(reward.params, x, prepared)
    return scores.sum(), scores
  program = jax.jit(jax.value_and_grad(total, has_aux=True))
  (_, scores), gradient = program(images)
  jax.block_until_ready(gradient)
  callbacks.check()
  np.testing.assert_array_equal(images, IMAGES)
  return np.asarray(scores), np.asarray(gradient), "torch_call" in program.lower(images).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("data, fsdp, tensor", [(1, 1, 1), (2, 2, 1), (2, 1, 2), (1, 1, 2)])
def test_as_the_callback(make, compiled, data, fsdp, tensor):
  mesh = sharding.make_mesh(data, fsdp, tensor)
  found, expected = (value_and_grad(make(bridge, mesh), mesh)
                     for bridge in ("torch2jax", "callback"))
  assert np.ptp(expected[0]) > 0.05 and np.abs(expected[1]).max() > 1e-3
  assert found[2] and not expected[2]          # each by its own bridge
  for a, b in zip(found[:2], expected):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


@pytest.mark.slow
def test_in_a_scan_under_vmap_and_under_remat(make, compiled):
  mesh = sharding.make_mesh(2, 1, 1)

  def found(bridge):
    reward = make(bridge, mesh)
    images, prepared = jax.device_put((IMAGES, reward.prepare(PROMPTS)),
                                      sharding.batch_sharding(mesh))
    score = lambda x: reward.score(reward.params, x, prepared).sum()
    kept = jax.checkpoint(lambda x: jnp.sin(score(jnp.cos(x))), policy=saving())
    factors = jnp.asarray([1.0, 0.5, 0.25])
    features = jax.jit(reward.parts[0][2].features)({}, images)
    return [np.asarray(out) for out in (
        jax.jit(jax.vmap(jax.grad(lambda f, x: score(f * x)), (0, None)))(factors, images),
        jax.jit(lambda x: jax.lax.map(jax.grad(lambda f: score(f * x)), factors))(images),
        jax.jit(jax.grad(kept))(images), features)]
  for a, b in zip(found("torch2jax"), found("callback")):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())
  callbacks.check()
