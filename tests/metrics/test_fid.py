"""Frechet Inception distance: the network against pytorch-fid's, the distance, the command."""
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image
from safetensors.numpy import save_file
from scipy.linalg import sqrtm

from jaxalign import fid, metrics
from jaxalign.config.command import run_command
from jaxalign.convert import names
from jaxalign.metrics.inception import Inception, fit, load_inception

# Every 256th feature that `InceptionV3` of pytorch-fid 0.3.0 gives for the weights of `tensor` and
# the images of `test_network_is_that_of_pytorch_fid`, computed once by it on torchvision 0.29's
# network; and the length of all 2,048.
REFERENCE = [
    [0.026959341019392014, 5.762375354766846, 0.768925666809082, 2.8589839935302734,
     10.603952407836914, 3.600863218307495, 1.821632981300354, 0.2141270637512207],
    [0.0, 5.868712425231934, 0.7485047578811646, 2.8870067596435547, 10.607258796691895,
     3.474681854248047, 1.742081880569458, 0.12492047250270844]]
LENGTHS = [309.9640808105469, 307.1996765136719]


def tensor(name, shape):
  """The weight that PyTorch calls `name`, by a rule."""
  random = np.random.RandomState(zlib.crc32(name.encode()))
  if len(shape) > 1:
    return (random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
  if name.endswith(("bn.weight", "running_var")):
    return random.uniform(0.5, 1.5, shape).astype(np.float32)
  return (0.2 * random.standard_normal(shape)).astype(np.float32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  shapes = jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, 299, 299, 3)))
  flat = traverse_util.flatten_dict(shapes["params"], sep="/")
  tensors = {}
  for path, leaf in flat.items():
    name = names.torch_name(path)
    tensors[name] = tensor(name, names.torch_shape(path, leaf.shape))
  tensors["fc.weight"] = np.zeros((1008, 2048), np.float32)         # as the published file has it
  file = tmp_path_factory.mktemp("inception") / "inception.safetensors"
  save_file(tensors, file)
  return file


def test_network_is_that_of_pytorch_fid(weights):
  images = np.random.RandomState(0).uniform(size=(2, 40, 56, 3)).astype(np.float32)
  params = load_inception(weights)
  ours = np.asarray(jax.jit(lambda p, x: Inception().apply({"params": p}, fit(x)))(params, images))
  assert ours.shape == (2, 2048)
  np.testing.assert_allclose(ours[:, ::256], REFERENCE, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(ours, axis=1), LENGTHS, rtol=1e-5)


def test_distance_is_the_textbooks():
  """Against scipy's root of the product, and also where there are fewer images than features."""
  rng = np.random.default_rng(0)
  a, b = rng.standard_normal((400, 100)), 1.3 * rng.standard_normal((300, 100)) + 0.1
  one, two = metrics.moments(a), metrics.moments(b)
  cross = np.trace(sqrtm(one.covariance @ two.covariance).real)
  expected = (((one.mean - two.mean) ** 2).sum() + np.trace(one.covariance)
              + np.trace(two.covariance) - 2 * cross)
  assert metrics.frechet_between(one, two) == pytest.approx(expected, rel=1e-8)
  few = metrics.moments(a[:20])
  assert metrics.frechet_between(few, few) == pytest.approx(0, abs=1e-9)
  moved = few._replace(mean=few.mean + 2)
  assert metrics.frechet_between(few, moved) == pytest.approx(400)


def write_images(folder, count, seed):
  folder.mkdir()
  rng = np.random.default_rng(seed)
  for i in range(count):
    size = (24, 40) if i % 2 else (32, 32)
    Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / f"{i}.png")
  Image.new("RGB", (8, 8)).save(folder / "grid.png")          # an overview is no sample
  return folder


def run(*args):
  return run_command(fid.main, fid._FLAGS, ("weights", "images", "reference"), ["fid", *args])


@pytest.mark.slow
def test_command(weights, tmp_path, capsys, monkeypatch):
  """On 48 of the features: roots of 2,048 take half a minute."""
  every = fid.features
  monkeypatch.setattr(fid, "features", lambda *args: every(*args)[:, :48])
  monkeypatch.setattr(Inception, "FEATURES", 48)
  a, b = write_images(tmp_path / "a", 5, 0), write_images(tmp_path / "b", 4, 1)
  flags = [f"--weights={weights}", f"--images={a}", "--batch=4"]
  assert run(*flags, f"--reference={b}", f"--save={tmp_path / 'b.npz'}") == 0
  first = capsys.readouterr().out
  params = load_inception(weights)
  of = lambda folder: metrics.moments(fid.features(params, fid.image_files(folder), 4))
  distance = metrics.frechet_between(of(a), of(b))
  assert first == f"FID {distance:.4f} (5 images and 4 of reference)\n" and distance > 0.1
  # The same from statistics, in the layout that PyTorch's programs write.
  assert run(*flags, f"--reference={tmp_path / 'b.npz'}", "--save=") == 0
  assert capsys.readouterr().out == f"FID {distance:.4f} (5 images)\n"


def test_what_is_wrong_is_named(weights, tmp_path, capsys):
  folder = write_images(tmp_path / "a", 2, 0)

  def message(reference=folder, images=folder, file=weights):
    assert run(f"--weights={file}", f"--images={images}", f"--reference={reference}",
               "--save=") == 2
    return capsys.readouterr().err
  assert "none: no such folder" in message(images=tmp_path / "none")
  (tmp_path / "empty").mkdir()
  assert "empty: 0 images" in message(reference=tmp_path / "empty")
  assert "no such file or folder" in message(file=tmp_path / "none.pth")
  np.savez(tmp_path / "small.npz", mu=np.zeros(3), sigma=np.eye(3))
  assert "small.npz: mu (3,) and sigma (3, 3) are not of 2048" in message(tmp_path / "small.npz")
  (tmp_path / "broken.npz").write_bytes(b"nothing")
  assert "broken.npz: no statistics" in message(tmp_path / "broken.npz")
  save_file({"Conv2d_1a_3x3.conv.weight": np.zeros((32, 3, 3, 3), np.float32)},
            tmp_path / "part.safetensors")
  assert "missing: Conv2d_1a_3x3.bn.bias" in message(file=tmp_path / "part.safetensors")
  (folder / "2.png").write_bytes(b"\x89PNG")
  assert f"{folder / '2.png'}: cannot be read" in message()
