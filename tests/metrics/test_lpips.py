"""LPIPS: the distance against PyTorch with the same weights, the command, what is wrong."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from jaxalign import lpips
from jaxalign.config.command import run_command
from jaxalign.metrics.lpips import NETWORKS, Features, load_lpips
from jaxalign.metrics.lpips import lpips as distance

PADS = {11: 2, 5: 2, 3: 1}


def tensors(network, seed=0):
  """Weights by the names of torchvision and of LPIPS."""
  rng = np.random.default_rng(seed)
  weights, heads, before = {"classifier.6.bias": np.zeros(10, np.float32)}, {}, 3
  for layer in NETWORKS[network]:
    shape = (layer.features, before, layer.kernel, layer.kernel)
    weights[f"features.{layer.index}.weight"] = (
        rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
    weights[f"features.{layer.index}.bias"] = (
        0.1 * rng.standard_normal(layer.features)).astype(np.float32)
    before = layer.features
    if layer.read:
      heads[f"lin{len(heads)}.model.1.weight"] = rng.uniform(
          size=(1, layer.features, 1, 1)).astype(np.float32)
  return weights, heads


@pytest.fixture
def files(tmp_path):
  def write(network):
    weights, heads = tensors(network)
    save_file(weights, tmp_path / "net.safetensors")
    save_file(heads, tmp_path / "heads.safetensors")
    return tmp_path / "net.safetensors", tmp_path / "heads.safetensors"
  return write


def theirs(network, a, b):
  """The published distance: torchvision's `features` cut where LPIPS reads them."""
  torch = pytest.importorskip("torch")
  weights, heads = ({k: torch.from_numpy(v) for k, v in part.items()} for part in tensors(network))
  shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in (
      [-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
  # Positions of poolings in torchvision's list, and of the ReLUs that are read.
  pools, reads = {"alex": ({2: 3, 5: 3}, (1, 4, 7, 9, 11)),
                  "vgg": ({4: 2, 9: 2, 16: 2, 23: 2}, (3, 8, 15, 22, 29))}[network]

  def activations(x):
    x, out = (2 * torch.from_numpy(x).permute(0, 3, 1, 2) - 1 - shift) / scale, []
    for i in range(reads[-1] + 1):
      if i in pools:
        x = torch.nn.functional.max_pool2d(x, pools[i], 2)
      elif f"features.{i}.weight" in weights:
        kernel = weights[f"features.{i}.weight"]
        x = torch.nn.functional.conv2d(x, kernel, weights[f"features.{i}.bias"],
                                       4 if kernel.shape[-1] == 11 else 1, PADS[kernel.shape[-1]])
      else:
        x = torch.relu(x)
      if i in reads:
        out.append(x)
    return out
  total = 0
  for i, (fa, fb) in enumerate(zip(activations(a), activations(b))):
    unit = lambda f: f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10)
    gap = (unit(fa) - unit(fb)).square()
    total = total + torch.nn.functional.conv2d(gap, heads[f"lin{i}.model.1.weight"]).mean((2, 3))
  return total[:, 0].numpy()


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_distance_equals_pytorchs(network, files):
  rng = np.random.default_rng(1)
  a, b = rng.uniform(size=(2, 3, 64, 80, 3)).astype(np.float32)
  b[2] = a[2]
  params = load_lpips(network, *files(network))
  ours = np.asarray(jax.jit(lambda p, a, b: distance(network, p, a, b))(params, a, b))
  np.testing.assert_allclose(ours, theirs(network, a, b), rtol=1e-5, atol=1e-5)
  assert ours[2] < 1e-12 and ours[0] > 0.1
  shapes = [f.shape[-1] for f in jax.eval_shape(
      Features(network).apply, {"params": params["features"]}, jnp.zeros((1, 64, 64, 3)))]
  assert shapes == {"alex": [64, 192, 384, 256, 256], "vgg": [64, 128, 256, 512, 512]}[network]


def images(folder, seed, names=("0000_00", "0000_01", "0000_02", "0001_00", "0001_01")):
  folder.mkdir()
  rng = np.random.default_rng(seed)
  for name in names:
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{name}.png")
  return folder


def run(files, *args):
  return run_command(lpips.main, lpips._FLAGS, ("weights", "heads", "images"),
                     ["lpips", f"--weights={files[0]}", f"--heads={files[1]}", *args])


def test_command(files, tmp_path, capsys):
  found = files("alex")
  a, b = images(tmp_path / "a", 0), images(tmp_path / "b", 1, ("0000_00", "0001_01", "0007_00"))
  assert run(found, f"--images={a}", f"--reference={b}", "--batch=3") == 0
  within, apart = capsys.readouterr().out.splitlines()
  params = load_lpips("alex", *found)
  read = lambda path: np.asarray(Image.open(path), np.float32)[None] / 255
  d = lambda x, y: float(distance("alex", params, read(x), read(y))[0])
  prompts = [np.mean([d(a / f"0000_0{i}.png", a / f"0000_0{j}.png")
                      for i, j in ((0, 1), (0, 2), (1, 2))]),
             d(a / "0001_00.png", a / "0001_01.png")]
  error = np.std(prompts, ddof=1) / np.sqrt(2)
  assert within == (f"LPIPS (alex) within prompts {np.mean(prompts):.4f} ± {error:.4f} (2 prompts, "
                    "4 pairs)")
  same = np.mean([d(a / f"{n}.png", b / f"{n}.png") for n in ("0000_00", "0001_01")])
  assert apart == f"LPIPS (alex) to the reference {same:.4f} (2 images)"


def test_what_is_wrong_is_named(files, tmp_path, capsys):
  weights, heads = files("alex")
  a = images(tmp_path / "a", 0)

  def message(*args, weights=weights, heads=heads):
    assert run((weights, heads), *args) == 2
    return capsys.readouterr().err
  assert "none: no such folder" in message(f"--images={tmp_path / 'none'}", "--reference=")
  alone = images(tmp_path / "alone", 0, ("0000_00", "0001_00"))
  assert "alone: no two images of one prompt" in message(f"--images={alone}", "--reference=")
  other = images(tmp_path / "other", 0, ("x_0", "x_1"))
  assert "no image has the name" in message(f"--images={a}", f"--reference={other}")
  assert "none.pth: no such file" in message(f"--images={a}", "--reference=",
                                             weights=tmp_path / "none.pth")
  assert "net.safetensors" in message(f"--images={a}", "--reference=", heads=weights)
  Image.new("RGB", (32, 64)).save(a / "0001_01.png")
  assert "0001_01.png: is of another size" in message(f"--images={a}", "--reference=")
  Image.new("RGB", (28, 28)).save(a / "0000_00.png")
  Image.new("RGB", (28, 28)).save(a / "0000_01.png")
  assert "0000_00.png: is 28 x 28 pixels" in message(f"--images={a}", "--reference=", "--batch=1")
  plain = images(tmp_path / "plain", 0, ("1", "2"))
  assert "plain: no two images of one prompt" in message(f"--images={plain}", "--reference=")
  bad = {k: -v for k, v in tensors("alex")[1].items()}
  save_file(bad, tmp_path / "bad.safetensors")
  assert "bad.safetensors: has negative weights" in message(
      f"--images={other}", "--reference=", heads=tmp_path / "bad.safetensors")
