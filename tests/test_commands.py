"""Commands as users call them: exit status, one-line errors, files written and files left alone."""
import dataclasses
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import runs
from jaxalign import sample, train
from jaxalign.convert import load_pipeline
from jaxalign.errors import UserError
from jaxalign.evaluate import main as evaluate_main
from jaxalign.export import main as export_main
from jaxalign.models.vae import decode_images
from jaxalign.sample import _prompts
from jaxalign.sampling import Conditioning, Schedule, guided_output, make_sampler, rollout
from jaxalign.testing.fixture import make_pipeline_dir
from jaxalign.train.generation import generate
from jaxalign.train.restore import load_tuned
from test_docs_commands import EVERY

UNET = "unet/diffusion_pytorch_model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


@pytest.fixture
def command(monkeypatch, capsys):
  """`command("sample", "--n=2", ..) -> (status, stdout, stderr)`, as `python -m`, in-process."""
  def call(name, *args):
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
      runpy.run_module(f"jaxalign.{name}", run_name="__main__", alter_sys=True)
    out = capsys.readouterr()
    return status.value.code, out.out, out.err
  return call


@pytest.fixture
def fails(command):
  """Asserts status 2 and one line on stderr that starts with `error:` and names all `parts`."""
  def call(name, *args, parts):
    status, _, err = command(name, *args)
    assert status == 2, err
    # Progress bars write to stderr too, each on a line that it clears.
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and err.rstrip().endswith(lines[0]) and "Traceback" not in err, err
    for part in parts:
      assert part in lines[0], lines[0]
  return call


def launch_args(*extra, **overrides):
  cfg = {"data.prompts": runs.TRAIN, "data.eval_prompts": runs.HELD_OUT, "mesh.data": 1,
         **overrides}
  keys = (f"--config.{k}={v}" for k, v in cfg.items())
  return ("--config=configs/nabla_gfn.py:smoke", *keys, *extra)


def snapshot(path):
  return {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture
def fixture_model(tmp_path):
  return make_pipeline_dir(tmp_path / "model")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
  monkeypatch.chdir(runs.ROOT)


# launch.


def test_launch_from_a_process_of_its_own(tmp_path):
  """Really no traceback, really that exit status."""
  done = subprocess.run(
      [sys.executable, "-m", "jaxalign.launch", "--config=configs/nabla_gfn.py:smoke",
       "--config.train.stpes=3", f"--workdir={tmp_path / 'run'}"],
      cwd=runs.ROOT, env={**os.environ, "PYTHONPATH": str(runs.ROOT)},
      capture_output=True, text=True, timeout=300)
  assert done.returncode == 2
  assert done.stderr.strip() == ("error: config key train.stpes is unknown; did you mean "
                                 "'train.steps'? (--config.train.stpes=3)")
  assert not (tmp_path / "run").exists()


def test_launch_says_finished(command):
  args = launch_args(f"--workdir={runs.finished()}")
  before = snapshot(runs.finished())
  status, out, _ = command("launch", *args)
  assert status == 0 and "finished" in out
  assert snapshot(runs.finished()) == before


def test_dry_run(command, tmp_path):
  status, out, _ = command("launch", *launch_args("--dry_run", f"--workdir={tmp_path / 'run'}"))
  assert status == 0
  for part in ('"lora_rank": 4', "policy (trained)", " 8,192 ", "mesh ", "GFLOP"):
    assert part in out
  assert "to_q/kernel" not in out                    # one device has no table of partitions
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("args, prompts, held", [
    ((), "jaxalign:emoji_train", "jaxalign:emoji_heldout"),
    (("--config.data.prompts=mine.txt",), "mine.txt", ""),
    (("--config.data.prompts=mine.txt", "--config.data.eval_prompts=x.txt"), "mine.txt", "x.txt"),
    (("--config.data.prompts=jaxalign:animals_train",), "jaxalign:animals_train",
     "jaxalign:emoji_heldout"),
    (("--config.data.pairs=votes",), "", ""),
    (("--config.data.pairs=votes", "--config.data.prompts=mine.txt"), "mine.txt", ""),
    (("--config.data.pairs=jaxalign:emoji",), "jaxalign:emoji_train", "jaxalign:emoji_heldout")])
def test_own_data_are_judged_by_some_of_them(command, monkeypatch, args, prompts, held):
  seen = []
  monkeypatch.setattr(train, "run", lambda cfg, path: seen.append(cfg))
  recipe = "mapo" if any("pairs" in arg for arg in args) else "nabla_gfn"
  assert command("launch", f"--config=configs/{recipe}.py:smoke", *args)[0] == 0
  assert (seen[0].data.prompts, seen[0].data.eval_prompts) == (prompts, held)


@pytest.mark.parametrize("name", ["launch", "sample", "evaluate", "export", "vote", "report"])
def test_help(command, name):
  status, out, err = command(name, "--help")
  assert status == 0 and not err
  assert f"python -m jaxalign.{name}" in out and any(
      f"--{flag}: " in out for flag in ("config", "checkpoint", "runs"))


def test_commands_can_be_imported_together():
  assert evaluate_main is not export_main


@pytest.mark.parametrize("args, parts", [
    ((), ["--config is required"]),
    (("--config=configs/nabla.py",), ["configs/nabla.py", "no such file"]),
    (("--config=jaxalign:nabla",), ["no recipe 'nabla'", "nabla_gfn"]),
    (("--config=configs/nabla_gfn.py:smok",), ["recipe argument 'smok' is unknown", "smoke"]),
    (launch_args("--config.trian.steps=3"), ["trian.steps"]),
    (launch_args("--config.train.steps=many"), ["train.steps", "many"]),
    (launch_args("--config.train.steps=2.5"), ["train.steps", "2.5"]),
    (launch_args("--config.train.keep_best=perhaps"), ["train.keep_best", "perhaps"]),
    (launch_args("--config.train.steps=0"), ["train.steps=0"]),
    (launch_args("--stpes=3"), ["stpes"]),
    (launch_args("more"), ["unexpected argument 'more'"]),
    (launch_args(**{"optim.accumulate": 3}), ["sample.batch=8", "optim.accumulate"]),
    (launch_args(**{"mesh.data": -1, "sample.batch": 12}), ["sample.batch=12", "8 devices"]),
    (launch_args(**{"mesh.data": -1, "optim.accumulate": 2}),
     ["sample.batch=8 in 2 parts", "8 devices"]),
    (launch_args(**{"mesh.tensor": 16}), ["mesh.data x mesh.fsdp x mesh.tensor = 16"]),
    (launch_args(**{"model.path": "no/where/model"}), ["no/where/model"]),
    (launch_args(**{"model.path": "jaxalign:emojis"}), ["model.path=jaxalign:emojis"]),
    (launch_args(**{"data.prompts": "nowhere.txt"}), ["data.prompts=nowhere.txt"]),
    (launch_args(**{"data.eval_prompts": "jaxalign:none"}), ["data.eval_prompts=jaxalign:none"]),
    (launch_args(**{"reward.names": "('scene_clap',)"}), ["reward.names", "scene_clap"]),
    (launch_args(**{"reward.names": "('jpeg_compressibility',)"}), ["reward.names", "black-box"]),
    (launch_args(**{"reward.names": "('no/file.py:f',)"}), ["reward.names", "no/file.py"]),
    (launch_args(**{"eval.judge": "grayness"}), ["eval.judge='grayness'"]),
    (launch_args(**{"sample.eta": 0}), ["sample.eta"]),
    (launch_args(**{"sample.eta": 1.5}), ["sample.eta=1.5"]),
    (launch_args(**{"sample.spacing": "even"}), ["sample.spacing='even'"]),
    (launch_args(**{"sample.steps": 2000}), ["sample.steps=2000"]),
])
def test_bad_input_to_launch(fails, tmp_path, args, parts):
  fails("launch", *args, f"--workdir={tmp_path / 'run'}", parts=parts)
  assert not (tmp_path / "run").exists()


def test_damaged_models(fails, fixture_model, tmp_path):
  args = launch_args(f"--workdir={tmp_path / 'run'}", **{"model.path": fixture_model})
  file = fixture_model / "unet" / "config.json"
  config = json.loads(file.read_text())
  file.write_text(json.dumps({**config, "block_out_channels": [64]}))
  fails("launch", *args, parts=[str(fixture_model / UNET), "do not fit config.json", "wrong shape"])
  file.write_text(json.dumps(config))
  content = (fixture_model / UNET).read_bytes()
  (fixture_model / UNET).write_bytes(content[:len(content) // 2])
  fails("launch", *args, parts=[str(fixture_model / UNET), "truncated"])
  assert not (tmp_path / "run").exists()


def test_workdirs_that_are_refused(fails, tmp_path):
  (tmp_path / "file").write_text("mine")
  for path in (tmp_path / "file", tmp_path / "file" / "below"):
    fails("launch", *launch_args(f"--workdir={path}"), parts=[f"--workdir={path}"])
  (tmp_path / "thesis").mkdir()
  (tmp_path / "thesis" / "thesis.tex").write_text("mine")
  fails("launch", *launch_args(f"--workdir={tmp_path / 'thesis'}"), parts=["thesis: not empty"])
  assert {p: c for p, c in snapshot(tmp_path).items()} == {
      tmp_path / "file": b"mine", tmp_path / "thesis" / "thesis.tex": b"mine"}
  damaged = tmp_path / "damaged"
  damaged.mkdir()
  for content in ("{", "[]", "{}", '{"config": 3}'):
    (damaged / "config.json").write_text(content)
    fails("launch", *launch_args(f"--workdir={damaged}"), parts=[f"--workdir={damaged}"])
    assert (damaged / "config.json").read_text() == content


def test_workdir_of_another_run_names_the_first_key(fails):
  path, before = runs.finished(), snapshot(runs.finished())
  here = f"--workdir={path}"
  fails("launch", *launch_args(here, **{"optim.lr": 0.5, "sample.steps": 3}),
        parts=["another run: optim.lr was 0.0003 and is 0.5 now"])
  fails("launch", *launch_args(here, "--config.seed=7"), parts=["seed was 0 and is 7 now"])
  fails("launch", "--config=configs/nabla_gfn.py:smoke,release", *launch_args(here)[1:],
        parts=["belongs to another run", "was", "now"])
  assert snapshot(path) == before


def test_workdir_whose_prompts_have_changed_since(fails, tmp_path):
  path = shutil.copytree(runs.finished(), tmp_path / "run")
  record = json.loads((path / "config.json").read_text())
  assert set(record["contents"]) == {"data.prompts", "data.eval_prompts"}
  record["contents"]["data.eval_prompts"] = "0" * 64
  (path / "config.json").write_text(json.dumps(record))
  before = snapshot(path)
  fails("launch", *launch_args(f"--workdir={path}", "--config.train.steps=4"),
        parts=[f"--workdir={path}", "another run", "data.eval_prompts have changed"])
  assert snapshot(path) == before


def test_damaged_checkpoint_on_resume(fails, tmp_path):
  path = shutil.copytree(runs.finished(), tmp_path / "run")
  for file in (path / "checkpoints").glob("*/state/**/d/*"):      # of all that there are
    file.write_bytes(file.read_bytes()[:100])
  before = {p: c for p, c in snapshot(path).items() if p.name != "config.json"}
  fails("launch", *launch_args(f"--workdir={path}", "--config.train.steps=4"),
        parts=[str(path / "checkpoints" / "3"), "cannot read checkpoint",
               "no checkpoint before it is sound; choose another --workdir"])
  assert {p: c for p, c in snapshot(path).items() if p.name != "config.json"} == before
  (path / "summary.json").unlink()
  fails("sample", f"--checkpoint={path}", "--prompts=a cat", f"--output={tmp_path / 'out'}",
        parts=["cannot read checkpoint"])
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code, parts", [
    ("def f(images, prepared):\n  raise RuntimeError('no such luck')",
     ["raised at line 2", "no such luck"]),
    ("def f(images, prepared):\n  return images.mean((1, 2, 3)) / 0", ["not finite", "prompt 'a "]),
    ("def f(images, prepared):\n  return images.mean((1, 2))", ["returned shape (8, 3), not (8,)"]),
    ("def f(pictures):\n  return 0", ["takes (pictures)", "def f(images, prompts)"]),
    ("def g(images, prepared):\n  return 0", ["has no function 'f'"]),
    ("import nothing_of_this_name", ["failed to run at line 1", "nothing_of_this_name"]),
])
def test_user_rewards(fails, tmp_path, code, parts):
  file = tmp_path / "mine.py"
  file.write_text(code + "\n")
  args = launch_args(f"--workdir={tmp_path / 'run'}", **{"reward.names": f"('{file}:f',)"})
  fails("launch", *args, parts=["reward.names", str(file), *parts])
  assert not (tmp_path / "run" / "checkpoints").exists()


# sample.


@pytest.fixture(scope="module")
def tuned():
  return load_tuned(runs.finished())


PROMPTS = ["a cat on a red background", "a dog on a blue background"]


def test_sample_command(command, tmp_path, tuned):
  """Takes sampler and weights from the run; the numbers are those of `generate`."""
  prompts = tmp_path / "prompts.txt"
  prompts.write_text("\n".join(PROMPTS) + "\n\n")
  status, out, _ = command("sample", f"--checkpoint={runs.finished()}", f"--prompts={prompts}",
                           f"--output={tmp_path / 'out'}", "--n=3", "--seed=5")
  assert status == 0 and "6 images" in out
  text = (tmp_path / "out" / "samples.jsonl").read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  assert [line["prompt"] for line in lines] == [p for p in PROMPTS for _ in range(3)]
  assert {line["seed"] for line in lines} == {5}
  read = lambda file: np.asarray(Image.open(tmp_path / "out" / file))
  images = np.stack([read(line["file"]) for line in lines]).reshape(2, 3, 32, 32, 3)
  assert (tmp_path / "out" / "grid.png").is_file()
  expected = generate(tuned, PROMPTS, 3, seed=5, sample=runs.smoke().sample)
  np.testing.assert_array_equal(images, expected)


def test_sample_lets_go_of_images_and_leaves_whole_files(tmp_path):
  """Images are written as they come; a run that ends half-way has listed nothing."""
  sample._FLAGS(["sample"])
  prompts, alive = [f"cat {i}" for i in range(70)], []

  def drawn(upto):
    for i in range(0, upto, 2):
      part = np.full((2, 8, 8, 3), i, np.uint8)
      alive.append(weakref.ref(part))
      yield part
      assert (tmp_path / f"{i + 1:04d}_00.png").exists()
      del part
      assert sum(ref() is not None for ref in alive) <= 1
  (tmp_path / "samples.jsonl").write_text("of another run")

  def interrupted():
    yield from drawn(40)
    raise KeyboardInterrupt
  with pytest.raises(KeyboardInterrupt):
    sample._write(tmp_path, interrupted(), prompts, 1)
  names = sorted(file.name for file in tmp_path.iterdir())
  assert names == [f"{i:04d}_00.png" for i in range(40)] + ["grid.png"]
  sample._write(tmp_path, drawn(70), prompts, 1)
  assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 70
  assert len(list(tmp_path.iterdir())) == 72


def test_generate(tuned):
  draw = lambda prompts=PROMPTS, n=2, **kw: generate(
      tuned, prompts, n, sample=runs.smoke().sample, **kw)
  images = draw()
  assert images.shape == (2, 2, 32, 32, 3) and images.dtype == np.uint8
  np.testing.assert_array_equal(draw(), images)                         # deterministic
  # Batches of three, the last one filled up: one level at most, by the order of sums.
  assert np.abs(draw(batch=3).astype(int) - images.astype(int)).max() <= 1
  assert (draw(seed=1) != images).any()
  assert (draw(negative_prompt="a dog") != images).any()
  more = draw(PROMPTS[:1], 3)[0]
  assert np.abs(more[:2].astype(int) - images[0].astype(int)).max() <= 1     # first images stay
  assert len({image.tobytes() for image in more}) == 3
  other = draw(["a sun", PROMPTS[1]])                                   # prompts matter, one by one
  assert (other[0] != images[0]).any() and (other[1] == images[1]).all()


@pytest.mark.parametrize("args, parts", [
    (("--prompts=a cat",), ["--checkpoint is required"]),
    (("--checkpoint=no/where", "--prompts=a cat"), ["--checkpoint=no/where"]),
    (("--checkpoint={run}", "--prompts=nowhere.txt"), ["--prompts=nowhere.txt"]),
    (("--checkpoint={run}", "--prompts=my prompts.txt"), ["--prompts=my prompts.txt"]),
    (("--checkpoint={run}", "--prompts=prompts/cats"), ["--prompts=prompts/cats"]),
    (("--checkpoint={run}", "--prompts=cats.jsonl"), ["--prompts=cats.jsonl"]),
    (("--checkpoint={run}", "--prompts=a cat", "--dtype=float64"), ["dtype", "float64"]),
    (("--checkpoint={run}", "--prompts=a cat", "--n=0"), ["n"]),
    (("--checkpoint={run}", "--prompts=a cat", "--n=2147483647", "--batch=2147483647"),
     ["--batch=2147483647", "all memory here"]),
    (("--checkpoint={run}", "--prompts=a cat", "--n=99999999999"), ["n=99999999999"]),
    (("--checkpoint={run}", "--prompts=a cat", "--seed=-1"), ["seed=-1"]),
    (("--checkpoint={run}", "--prompts=a cat", "--seed=4294967296"), ["seed=4294967296"]),
    (("--checkpoint={run}", "--prompts=a cat", "--height=1000000"), ["sample.height=1000000"]),
    (("--checkpoint={run}", "--prompts=a cat", "--steps=0"), ["sample.steps=0"]),
    (("--checkpoint={run}", "--prompts=a cat", "--eta=2"), ["sample.eta=2"]),
    (("--checkpoint={run}/samples", "--prompts=a cat"), ["samples", "model_index.json"]),
])
def test_bad_input_to_sample(fails, tmp_path, args, parts):
  args = [a.format(run=runs.finished()) for a in args]
  fails("sample", *args, f"--output={tmp_path / 'out'}", parts=parts)
  assert not (tmp_path / "out").exists()


def test_sample_takes_a_long_prompt_and_refuses_a_file_as_folder(fails, tmp_path):
  (tmp_path / "file").write_text("mine")
  fails("sample", f"--checkpoint={runs.finished()}", f"--prompts={'a cat and ' * 100}",
        f"--output={tmp_path / 'file' / 'out'}", parts=[f"--output={tmp_path / 'file' / 'out'}"])


def test_a_sentence_may_have_slashes(tmp_path):
  assert _prompts("a cat/dog on a red background") == ["a cat/dog on a red background"]
  assert _prompts("cat") == ["cat"] and _prompts("A sun at 6.30") == ["A sun at 6.30"]
  (tmp_path / "two words").write_text("a cat\na dog\n")
  assert _prompts(str(tmp_path / "two words")) == ["a cat", "a dog"]


def test_images_that_cannot_be_written(fails, tmp_path):
  (tmp_path / "out" / "0000_01.png").mkdir(parents=True)
  fails("sample", f"--checkpoint={runs.finished()}", "--prompts=a cat", "--n=2",
        f"--output={tmp_path / 'out'}", parts=[f"--output={tmp_path / 'out'}", "0000_01.png"])
  assert (tmp_path / "out" / "0000_00.png").is_file()
  assert not (tmp_path / "out" / "samples.jsonl").exists()            # says that all are there


def test_unfinished_run_gives_its_latest_checkpoint(tmp_path, tuned):
  path = shutil.copytree(runs.finished(), tmp_path / "run")
  (path / "summary.json").unlink()
  shutil.rmtree(path / "export")
  leaves = zip(*(jax.tree.leaves(p.params["unet"]) for p in (load_tuned(path), tuned)))
  assert all((a == b).all() for a, b in leaves)
  shutil.rmtree(path / "checkpoints")
  with pytest.raises(UserError, match="no checkpoint yet"):
    load_tuned(path)


def test_a_run_that_goes_on_gives_its_latest_checkpoint(tmp_path, tuned):
  """Its summary and its export are those of the steps before."""
  path = shutil.copytree(runs.finished(), tmp_path / "run")
  summary = json.loads((path / "summary.json").read_text())
  (path / "summary.json").write_text(json.dumps({**summary, "steps": 2, "exported_step": 2}))
  shutil.rmtree(path / "export")
  leaves = zip(*(jax.tree.leaves(p.params["unet"]) for p in (load_tuned(path), tuned)))
  assert all((a == b).all() for a, b in leaves)
  half = load_tuned(path, "bfloat16")
  assert half.denoiser.dtype == half.vae.dtype == jnp.bfloat16
  leaves = zip(*(jax.tree.leaves(p.params["unet"]) for p in (half, tuned)))
  assert all((a == b).all() for a, b in leaves)                         # weights stay f32
  (path / "summary.json").write_text("{}")
  with pytest.raises(UserError, match="summary.json: not the summary of a run"):
    load_tuned(path)


def test_an_export_computes_in_the_dtype_of_its_run(tmp_path, tuned):
  assert tuned.denoiser.dtype == jnp.float32
  path = shutil.copytree(runs.finished(), tmp_path / "run")
  record = json.loads((path / "config.json").read_text())
  record["config"]["model"]["dtype"] = "bfloat16"
  (path / "config.json").write_text(json.dumps(record))
  dtypes = [load_tuned(*args).denoiser.dtype for args in (
      (path,), (path, "float32"), (path / "export",), (path / "export", "bfloat16"))]
  assert dtypes == [jnp.bfloat16, jnp.float32, jnp.float32, jnp.bfloat16]


# evaluate.


def test_evaluate_a_run_against_its_base(command, tmp_path):
  file = tmp_path / "result.json"
  status, out, _ = command("evaluate", f"--checkpoint={runs.finished()}", "--samples=2",
                           f"--prompts={runs.HELD_OUT}", f"--output={file}")
  assert status == 0
  result = json.loads(file.read_text())
  assert f"all numbers in {file}" in out and len(out.splitlines()) < 20
  row, = [line.split() for line in out.splitlines() if line.startswith("reward")]
  assert row[1] == f"{result['base']['reward']['mean']:.4f}"
  # The run's own evaluation: same prompts, noise, sampler; merged weights instead of the adapter.
  summary = json.loads((runs.finished() / "summary.json").read_text())
  for model in ("base", "tuned"):
    for name in ("reward", "judge", "diversity"):
      assert result[model][name]["mean"] == pytest.approx(summary[model][name]["mean"], abs=1e-4)
  kl = result["tuned"]["kl_to_base"]["mean"]
  assert kl == pytest.approx(summary["tuned"]["kl_to_base"]["mean"], rel=0.02)


def test_evaluate_a_model_against_itself(command, tmp_path):
  file, run = tmp_path / "result.json", runs.finished()
  args = f"--prompts={runs.HELD_OUT}", f"--output={file}", "--samples=2"
  assert command("evaluate", f"--checkpoint={run}", f"--base={run / 'export'}", *args)[0] == 0
  result = json.loads(file.read_text())
  for name in ("reward", "judge", "diversity"):
    assert result["tuned"][name]["change"]["mean"] == 0
    assert result["tuned"][name]["mean"] == result["base"][name]["mean"]
  assert result["tuned"]["kl_to_base"]["mean"] == 0
  assert result["tuned"]["fd_to_base"]["distance"] == result["tuned"]["fd_to_base"]["floor"]


def test_flags_of_evaluate_replace_what_the_run_has(monkeypatch):
  seen = ["--checkpoint=a", "--prompts=b", "--output=c"]
  module = runpy.run_module("jaxalign.evaluate")
  parse = lambda *args: (module["_FLAGS"].unparse_flags(), module["_FLAGS"](["x", *seen, *args]))
  cfg = runs.smoke(model__unet="", seed=3, data__eval_prompts="b")
  parse()
  assert module["_with_flags"](cfg) == dataclasses.replace(cfg, seed=0)
  parse("--steps=7", "--guidance=2", "--eta=0.5", "--batch=4", "--judge=clip_score:x",
        "--dtype=bfloat16", "--seed=5", "--reward=hpsv2:a,b", "--reward=aesthetic:c,d")
  new = module["_with_flags"](cfg)
  assert (new.sample.steps, new.sample.guidance, new.sample.eta) == (7, 2.0, 0.5)
  assert (new.eval.batch, new.eval.judge, new.model.dtype) == (4, "clip_score:x", "bfloat16")
  assert new.reward.names == ("hpsv2:a,b", "aesthetic:c,d") and new.seed == 5
  assert new.eval.samples == cfg.eval.samples and new.method == cfg.method


@pytest.mark.slow
def test_evaluate_a_model_alone(command, tmp_path):
  file = tmp_path / "result.json"
  assert command("evaluate", f"--checkpoint={runs.finished() / 'export'}", "--samples=2",
                 f"--prompts={runs.HELD_OUT}", f"--output={file}", "--reward=brightness",
                 "--steps=2", "--batch=8", "--dtype=bfloat16")[0] == 0
  result = json.loads(file.read_text())
  assert result.keys() == {"tuned"} and "kl_to_base" not in result["tuned"]
  assert "change" not in result["tuned"]["reward"] and result["tuned"]["reward"]["n"] == 8


def test_bad_input_to_evaluate(fails, tmp_path):
  run, prompts = f"--checkpoint={runs.finished()}", f"--prompts={runs.HELD_OUT}"
  out = f"--output={tmp_path / 'x.json'}"
  fails("evaluate", run, prompts, "--output=no/where/x.json", parts=["--output=no/where/x.json"])
  fails("evaluate", run, "--prompts=nowhere.txt", out, parts=["--prompts=nowhere.txt"])
  fails("evaluate", run, prompts, out, "--base=no/where/at/all", parts=["no/where/at/all"])
  fails("evaluate", run, prompts, out, "--base=jaxalign:emoji", parts=["--base=jaxalign:emoji",
                                                                      "architecture"])
  fails("evaluate", run, prompts, out, "--samples=1", parts=["samples"])
  fails("evaluate", run, prompts, out, "--seed=-1", parts=["seed"])
  fails("evaluate", run, prompts, f"--output={tmp_path}", parts=[f"--output={tmp_path}", "folder"])
  fails("evaluate", run, prompts, out, "--judge=brightness", parts=["eval.judge='brightness'"])
  fails("evaluate", run, prompts, out, "--steps=2000", parts=["sample.steps=2000"])
  fails("evaluate", run, prompts, out, "--guidance=-1", parts=["sample.guidance=-1"])
  fails("evaluate", run, prompts, out, "--reward=hpsv2", parts=["reward.names", "hpsv2:WHERE"])
  assert not list(tmp_path.iterdir())


def test_models_that_differ_in_more_than_the_unet_are_not_compared(fails, tmp_path):
  """Both would be drawn and decoded with the networks of one."""
  args = (f"--checkpoint={runs.finished()}", f"--prompts={runs.HELD_OUT}",
          f"--output={tmp_path / 'x.json'}")
  for seed, name in ((1, "text_encoder"), (2, "vae")):
    base = make_pipeline_dir(tmp_path / name, seed, image_size=32)
    if name == "vae":                                        # only that
      shutil.rmtree(base / "text_encoder")
      shutil.copytree(runs.finished() / "export" / "text_encoder", base / "text_encoder")
    fails("evaluate", *args, f"--base={base}", parts=[f"--base={base}", f"its {name} differs"])
  assert not (tmp_path / "x.json").exists()


# export, and what others make of it.


def float_images(pipeline, latents, prompts, steps=10, guidance=3.0):
  """Our deterministic sampler from given noise, images `[B, H, W, 3]` f32."""
  schedule = Schedule.from_config(pipeline.scheduler_config)
  sampler = make_sampler(schedule, steps, eta=0.0, final="")
  output = guided_output(pipeline.denoise, guidance)
  encode = lambda texts: pipeline.encode_prompts(pipeline.text_params, pipeline.tokenize(texts))
  conditioning = Conditioning(encode(prompts), encode([""] * len(prompts)))

  @jax.jit
  def draw(params, latents, conditioning):
    path = rollout(output, {"params": params["unet"]}, sampler, conditioning, jax.random.key(0),
                   jnp.arange(len(prompts)), pipeline.latent_shape, x_init=latents)
    return decode_images(pipeline.vae, params["vae"], path.final)
  return np.asarray(draw(pipeline.params, latents, conditioning))


@pytest.fixture(scope="module")
def ours(tuned):
  latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
  return latents, float_images(tuned, latents, PROMPTS)


def test_export_in_pytorch(command, tmp_path, ours, tuned):
  torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
  status, out, _ = command("export", f"--checkpoint={runs.finished()}",
                           f"--output={tmp_path / 'out'}")
  assert status == 0 and str(tmp_path / "out") in out
  pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
  assert type(pipe.scheduler).__name__ == "DDIMScheduler"
  pipe.set_progress_bar_config(disable=True)
  latents, images = ours
  theirs = pipe(PROMPTS, latents=torch.tensor(latents.transpose(0, 3, 1, 2)),
                num_inference_steps=10, guidance_scale=3.0, eta=0.0, output_type="np").images
  assert images.std() > 0.01 and np.abs(images[0] - images[1]).max() > 0.01
  np.testing.assert_allclose(theirs, images, atol=2e-5)
  base = load_pipeline(make_pipeline_dir(tmp_path / "base", image_size=32))
  assert np.abs(float_images(base, latents, PROMPTS) - images).max() > 1e-4   # the adapter counts


def test_export_in_flax(command, tmp_path, ours):
  diffusers = pytest.importorskip("diffusers")
  if not hasattr(diffusers, "FlaxStableDiffusionPipeline"):
    pytest.skip("this version of diffusers has no Flax classes")
  status, _, _ = command("export", f"--checkpoint={runs.finished()}", "--format=flax",
                         f"--output={tmp_path / 'out'}")
  assert status == 0
  pipe, params = diffusers.FlaxStableDiffusionPipeline.from_pretrained(tmp_path / "out")
  latents, images = ours
  with jax.numpy_rank_promotion("allow"):
    theirs = pipe(pipe.prepare_inputs(PROMPTS), params, jax.random.key(0), num_inference_steps=10,
                  guidance_scale=jnp.array(3.0), latents=jnp.asarray(latents.transpose(0, 3, 1, 2)),
                  neg_prompt_ids=pipe.prepare_inputs(["", ""]), jit=False).images
  # Its GELU is the tanh form: 2e-4 on a prediction of the network, carried through ten steps.
  np.testing.assert_allclose(np.asarray(theirs), images, atol=5e-4)


def test_bad_input_to_export(fails, tmp_path):
  run = f"--checkpoint={runs.finished()}"
  (tmp_path / "file").write_text("mine")
  fails("export", run, f"--output={tmp_path / 'file' / 'out'}", parts=["--output"])
  fails("export", run, f"--output={tmp_path}", parts=[str(tmp_path), "not overwritten"])
  fails("export", run, f"--output={tmp_path / 'new'}", "--format=onnx", parts=["onnx"])
  fails("export", run, parts=["--output is required"])
  fails("export", "--checkpoint=no/where", f"--output={tmp_path / 'new'}", parts=["no/where"])
  assert [p.name for p in tmp_path.iterdir()] == ["file"]


# What README and docs do with a run.


def of_a_run():
  return [words[2:] for _, words in EVERY if words[1:2] == ["-m"] and words[2:3] and any(
      words[2] == f"jaxalign.{name}" for name in ("sample", "export", "report")) and any(
          "runs/nabla_gfn-emoji" in word for word in words)]


def test_there_are_some():
  assert {words[0] for words in of_a_run()} == {"jaxalign.sample", "jaxalign.export",
                                                "jaxalign.report"}


@pytest.mark.parametrize("words", of_a_run(), ids=" ".join)
def test_commands_of_the_docs_on_a_run(command, tmp_path, monkeypatch, words):
  """As they stand there, but for the run."""
  monkeypatch.chdir(tmp_path)
  name, *args = [re.sub(r"runs/\w+-emoji", str(runs.finished()), word) for word in words]
  status, _, err = command(name.removeprefix("jaxalign."), *args)
  assert status == 0, err
  output, = (arg.removeprefix("--output=") for arg in args if arg.startswith("--output="))
  assert (tmp_path / output).exists()
