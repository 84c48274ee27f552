"""PyTorch rewards: scores and gradients as PyTorch has them, on any mesh; every mistake is said."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.devices import callbacks, sharding
from jaxalign.errors import UserError
from jaxalign.rewards import REWARDS, HostReward, Reward, make_reward, open_reward
from jaxalign.rewards.pytorch import saving
from jaxalign.rewards.trial import Trial

torch = pytest.importorskip("torch")
PROMPTS = ["a cat", "a dog", "a frog", "a cat"] * 2
IMAGES = np.random.default_rng(0).uniform(0, 1, (8, 6, 4, 3)).astype(np.float32)
LENGTHS = np.asarray([len(p) for p in PROMPTS], np.float32)
CODE = '''
import torch

import pathlib

class Holder:
  def __init__(self, network):
    self.parts = {"network": [network]}

def load(device):
  with open(pathlib.Path(__file__).with_name("loaded"), "a") as file:
    print(device, file=file)
  torch.manual_seed(0)
  return Holder(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8),
                                    torch.nn.Tanh(), torch.nn.Conv2d(8, 1, 1)).to(device))

def square(pixels, prompts):
  length = torch.tensor([float(len(p)) for p in prompts])
  return pixels.square().sum((1, 2, 3)) * length

def learnt(pixels, prompts, network):
  net = network.parts["network"][0]
  assert not net.training and not any(p.requires_grad for p in net.parameters())
  assert pixels.dtype == torch.float32
  return net(pixels).mean((1, 2, 3))

def features(pixels, network):
  return network.parts["network"][0][0](pixels).mean((2, 3))

def in_place(pixels, prompts):
  assert not pixels.is_leaf or not pixels.requires_grad
  pixels *= 2
  return pixels.sum((1, 2, 3))

def batch_mean(pixels, prompts):
  return pixels.mean((1, 2, 3)) - pixels.mean()

hidden = [torch.nn.BatchNorm2d(3)]
def batch_norm(pixels, prompts):
  return hidden[0](pixels)[:, :, 0, 0].sum(1)

def no_grad(pixels, prompts):
  with torch.no_grad():
    return pixels.mean((1, 2, 3))

def whole(pixels, prompts):
  return (pixels * 255).byte().float().mean((1, 2, 3))

def rounded(pixels, prompts):
  return (pixels * 255).round().mean((1, 2, 3))

def detached(pixels, prompts):
  return (pixels * pixels.detach()).mean((1, 2, 3))
'''


@pytest.fixture
def make(tmp_path):
  """A sum of rewards of the file above and shipped ones, opened."""
  (tmp_path / "mine.py").write_text(CODE)

  def make(*names, mesh=None, gradient=True, weights=None):
    names = [n if n in REWARDS else f"{tmp_path}/mine.py:{n}" for n in names]
    reward = make_reward(tuple(names), weights or (1.0,) * len(names))
    trial = lambda: Trial(IMAGES.shape[1:3], PROMPTS, "some_method", gradient)
    return open_reward(reward, trial, mesh)
  return make


def value_and_grad(reward, images=IMAGES, mesh=None):
  prepared = reward.prepare(PROMPTS)
  if mesh is not None:
    images, prepared = jax.device_put((images, prepared), sharding.batch_sharding(mesh))

  def total(x, prepared):
    scores = reward.score(reward.params, x, prepared)
    return scores.sum(), scores
  (_, scores), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(images, prepared)
  callbacks.check()
  return np.asarray(scores), np.asarray(gradient)


@pytest.fixture
def scorer(make):
  """The `Scorer` of `square`, which counts rows."""
  from jaxalign.rewards import pytorch
  made, original = [], pytorch.Scorer.__init__

  def remember(self, *args):
    original(self, *args)
    made.append(self)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pytorch.Scorer, "__init__", remember)
    yield lambda *args, **kw: (make(*args, **kw), made[-1])


@pytest.mark.parametrize("data, fsdp, tensor", [
    (1, 1, 1), (4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 1, 2), (3, 1, 1)])
def test_on_any_mesh(scorer, data, fsdp, tensor):
  mesh = sharding.make_mesh(data, fsdp, tensor)
  reward, made = scorer("square", mesh=mesh)
  before, divides = made.rows, 8 % (data * fsdp) == 0
  scores, gradient = value_and_grad(reward, mesh=mesh if divides else None)
  np.testing.assert_allclose(scores, np.square(IMAGES).sum((1, 2, 3)) * LENGTHS, rtol=1e-6)
  np.testing.assert_allclose(gradient, 2 * IMAGES * LENGTHS[:, None, None, None], rtol=1e-6)
  assert made.rows - before == 8            # neither twice for the gradient nor for replicas


def test_rows_that_do_not_divide_are_scored_by_one_callback(scorer):
  mesh = sharding.make_mesh(4, 1, 1)
  reward, made = scorer("square", mesh=mesh)
  images, prepared = jax.device_put((IMAGES[:6], reward.prepare(PROMPTS[:6])),
                                    sharding.replicated(mesh))
  before = made.rows
  scores = jax.jit(reward.score)(reward.params, images, prepared)
  np.testing.assert_allclose(scores, np.square(IMAGES[:6]).sum((1, 2, 3)) * LENGTHS[:6], rtol=1e-6)
  assert made.rows - before == 6


def test_network_is_shared_frozen_and_in_eval(make, tmp_path):
  reward = make("learnt", "learnt#batch=3&name=again", weights=(1.0, 2.0))
  assert list(reward.weights)[0].endswith("mine.py:learnt") and list(reward.weights)[1] == "again"
  scores, gradient = value_and_grad(reward)
  assert np.abs(gradient).max() > 0 and (tmp_path / "loaded").read_text() == "cpu\n"
  terms = reward.terms(reward.params, jnp.asarray(IMAGES), reward.prepare(PROMPTS))
  np.testing.assert_allclose(scores, 3 * np.asarray(terms["again"]), rtol=1e-5)


def test_bfloat16_is_near_float32(make):
  exact, _ = value_and_grad(make("learnt"))
  rough, gradient = value_and_grad(make("learnt#dtype=bfloat16"))
  assert rough.dtype == gradient.dtype == np.float32
  assert 0 < np.abs(rough - exact).max() < 0.02 * np.abs(exact).max()


def test_pixels_may_be_written_into(make):
  scores, gradient = value_and_grad(make("in_place"))
  np.testing.assert_allclose(scores, 2 * IMAGES.sum((1, 2, 3)), rtol=1e-6)
  np.testing.assert_array_equal(gradient, 2)


def test_in_a_sum_with_a_jax_reward(make):
  scores, gradient = value_and_grad(make("square", "brightness", weights=(1.0, 10.0)))
  bright = make_reward(("brightness",), (10.0,))
  np.testing.assert_allclose(
      scores, np.square(IMAGES).sum((1, 2, 3)) * LENGTHS + np.asarray(bright.score(
          bright.params, jnp.asarray(IMAGES), {})), rtol=1e-5)


def test_in_a_sum_with_a_black_box(make):
  reward = make("square", "jpeg_compressibility")
  assert isinstance(reward, HostReward)
  images = (IMAGES * 255).round().astype(np.uint8)
  terms = reward.terms(images, PROMPTS)
  np.testing.assert_allclose(next(iter(terms.values())),
                             np.square(images / 255).sum((1, 2, 3)) * LENGTHS, rtol=1e-5)


@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_saveable", "everything_saveable"])
def test_asked_once_under_remat(scorer, policy):
  mesh = sharding.make_mesh(2, 1, 1)
  reward, made = scorer("square", mesh=mesh)
  images, prepared = jax.device_put((IMAGES, reward.prepare(PROMPTS)),
                                    sharding.batch_sharding(mesh))

  def loss(x):
    return jnp.sin(reward.score(reward.params, jnp.cos(x), prepared)).sum()
  kept = jax.checkpoint(loss, policy=saving(getattr(jax.checkpoint_policies, policy)))
  before = made.rows
  found = np.asarray(jax.jit(jax.grad(kept))(images))
  assert made.rows - before == 8
  np.testing.assert_allclose(found, jax.jit(jax.grad(loss))(images), rtol=1e-4, atol=1e-4)


def test_in_a_scan_and_under_vmap(make):
  mesh = sharding.make_mesh(2, 1, 1)
  reward = make("square", mesh=mesh)
  images, prepared = jax.device_put((IMAGES, reward.prepare(PROMPTS)),
                                    sharding.batch_sharding(mesh))
  score = lambda x: reward.score(reward.params, x, prepared).sum()
  factors = jnp.asarray([1.0, 0.5, 0.25])
  mapped = jax.jit(jax.vmap(jax.grad(lambda f, x: score(f * x)), (0, None)))(factors, images)
  scanned = jax.jit(lambda x: jax.lax.map(jax.grad(lambda f: score(f * x)), factors))(images)
  expected = 2 * np.asarray(factors) * (np.square(IMAGES).sum((1, 2, 3)) * LENGTHS).sum()
  np.testing.assert_allclose(mapped, expected, rtol=1e-5)
  np.testing.assert_allclose(scanned, expected, rtol=1e-5)


def test_second_order_and_forward_mode_are_refused(make):
  reward = make("square")
  prepared = reward.prepare(PROMPTS)
  score = lambda x: reward.score(reward.params, x, prepared).sum()
  with pytest.raises(UserError, match="method.name='some_method' asks for second ones"):
    jax.jit(jax.grad(lambda x: jax.grad(score)(x).sum())).lower(IMAGES)
  traced = jax.jit(lambda x: jax.jvp(score, (x,), (x,))[1]).trace(IMAGES)
  with pytest.raises(UserError, match="method.name='m' asks for derivatives in forward mode"), \
      callbacks.lowering("m"):
    traced.lower()


def test_numbers_of_prompts(make):
  reward = make("square")
  first = reward.prepare(["x", "y", "x"])
  name, numbers = next(iter(first.items()))
  assert numbers.dtype == np.int32 and numbers[0] == numbers[2] != numbers[1]
  again = reward.prepare(["new", "y"])[name]
  assert again[1] == numbers[1] and again[0] > numbers.max()


def test_judge(make):
  mesh = sharding.make_mesh(2, 1, 1)
  judge = make("learnt", mesh=mesh, gradient=False).parts[0][2]
  assert isinstance(judge, Reward) and not judge.differentiable
  found = jax.jit(judge.features)({}, jax.device_put(IMAGES, sharding.batch_sharding(mesh)))
  jax.block_until_ready(found)
  callbacks.check()
  assert found.shape == (8, 8) and np.asarray(found).std(0).min() > 0


@pytest.mark.parametrize("name", ["no_grad", "whole"])
def test_without_gradient_it_is_a_black_box(make, name, capsys):
  reward = make(name)
  assert isinstance(reward, HostReward) and "gives no gradient" in capsys.readouterr().out
  images = (IMAGES * 255).round().astype(np.uint8)
  expected = images.mean((1, 2, 3)) / (255 if name == "no_grad" else 1)
  np.testing.assert_allclose(reward.score(images, PROMPTS), expected, rtol=1e-2)


@pytest.mark.parametrize("name, said", [
    ("rounded", "a gradient that is zero everywhere"), ("detached", "100% apart")])
def test_doubtful_gradients_are_said(make, name, said, capsys):
  assert isinstance(make(name), Reward)
  assert said in capsys.readouterr().out


def test_sound_ones_are_not(make, capsys):
  make("learnt")
  out = capsys.readouterr().out
  assert "warning" not in out and "JAX keeps no program" in out


@pytest.mark.parametrize("name", ["batch_mean", "batch_norm"])
def test_scores_that_depend_on_the_batch_are_refused(make, name):
  with pytest.raises(UserError, match="must depend on its own picture"):
    make(name)


@pytest.mark.parametrize("name, said", [
    ("square#device=cuda:9", "PyTorch sees"), ("square#device=meta", "neither cpu nor cuda"),
    ("square#dtype=int8", "dtype=int8 is none of"), ("square#batch=-1", "batch=-1"),
    ("square#batch=x", "not a number"), ("square#size=3", "size is no setting"),
    ("square#timeout=0", "timeout=0")])
def test_settings_that_are_none(make, name, said):
  with pytest.raises(UserError, match=said):
    make(name)


@pytest.mark.parametrize("code, said", [
    ("def f(pixels): pass", r"takes \(pixels\)"),
    ("def f(pixels, prompts, network): pass", "no load"),
    ("def load(device):\n  raise OSError('no file')\n"
     "def f(pixels, prompts, network): pass", "load raised at line 2 OSError: no file"),
    ("def f(pixels, prompts): return 1.0", "float, not a tensor"),
    ("def f(pixels, prompts): return pixels.mean((2, 3))", r"shape \(4, 3\), not \[B\]"),
    ("def f(pixels, prompts): return pixels.mean((1, 2, 3)).to('meta')", "tensor on meta"),
    ("def f(pixels, prompts): return pixels.mean((1, 2, 3)) * float('nan')", "returned nan"),
    ("def f(pixels, prompts): return (pixels * 0).sum((1, 2, 3)).sqrt()", "gradient nan"),
    ("def f(pixels, prompts): return pixels.nothing()", "raised at line 1 AttributeError"),
])
def test_functions_that_do_not_fit(tmp_path, code, said):
  (tmp_path / "mine.py").write_text(code)
  with pytest.raises(UserError, match=said):
    open_reward(make_reward((f"{tmp_path}/mine.py:f",), (1.0,)), lambda: Trial((4, 4), PROMPTS))


def test_a_plan_has_a_stub_in_its_place(make, tmp_path, capsys):
  (tmp_path / "mine.py").write_text("def load(device): 1 / 0\n"
                                    "def f(pixels, prompts, network): 1 / 0\n")
  reward = open_reward(make_reward((f"{tmp_path}/mine.py:f",), (1.0,)),
                       lambda: Trial((4, 4), PROMPTS, outline=True))
  prepared = reward.prepare(PROMPTS)
  assert jax.eval_shape(reward.score, reward.params, IMAGES, prepared).shape == (8,)
  assert "a stub of the same shapes" in capsys.readouterr().out
