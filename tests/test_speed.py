"""The comparison with PyTorch: both sides compute the same, and the page is what was measured."""
import json

import pytest

import runs
from jaxalign.convert import save_pipeline

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from benchmarks import speed_page, updates  # noqa: E402

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """`model -> (pipeline, folder)`."""
  made = {}

  def make(model):
    if model not in made:
      made[model] = updates.make_pipeline(model), tmp_path_factory.mktemp(model)
      save_pipeline(*made[model])
    return made[model]
  return make


def agree(world, name, model):
  pipeline, folder = world(model)
  ours = updates.Ours(name, pipeline, model)
  return updates.agreement(ours, updates.Theirs(ours, folder))


@pytest.mark.parametrize("name, model", [
    ("policy_gradient", "smoke_sd3"),
    *(pytest.param(name, "smoke", marks=pytest.mark.slow) for name in updates.PARTS[1:])])
def test_what_steps_are_made_of_is_the_same_in_pytorch(world, name, model):
  found = agree(world, name, model)
  assert found.keys() == {"loss", "gradient"} - ({"gradient"} if name == "forward" else set())
  assert max(found.values()) < updates.TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smoke", "smoke_sd3"])
@pytest.mark.parametrize("name", updates.METHODS)
def test_a_step_of_each_method_is_the_same_in_pytorch(world, name, model):
  found = agree(world, name, model)
  assert found.keys() == {"loss", "gradient"} and max(found.values()) < updates.TOLERANCE, found


def entry(pytorch, jaxalign):
  turn = {"pytorch": pytorch, "jaxalign": jaxalign, "pytorch_cpu": 2 * pytorch,
          "jaxalign_cpu": jaxalign, "load": 2.0, "product": {"jaxalign": 90.0, "pytorch": 100.0}}
  return {"machine": updates.machine(2), "padded": False, "agreement": {"loss": 1e-6},
          "settings": {"sample": {"batch": 4, "steps": 3, "guidance": 2.0}},
          "flops": {"jaxalign": 1e11, "pytorch": 2e11}, "rounds": [turn] * 3}


def test_the_page_has_ratios_and_shares():
  page = speed_page.page({"emoji/ddpo": entry(3.0, 2.0), "emoji/dno": {"rounds": []}})
  row = next(line for line in page.splitlines() if line.startswith("| `ddpo`"))
  cells = [cell.strip() for cell in row.strip("|").split(" | ")]
  assert dict(zip(speed_page.COLUMNS, cells[1:], strict=True)) == {
      "times as fast": "1.50 (1.50 to 1.50)", "by CPU time": "3.00",
      "s, ours": "2 (2 to 2)", "s, PyTorch's": "3 (3 to 3)",
      "TFLOP, ours": "0.1", "TFLOP, PyTorch's": "0.2",
      "GFLOP/s, ours": "50", "GFLOP/s, PyTorch's": "66.7",
      "of a product, ours": "50 %", "of a product, PyTorch's": "67 %",
      "rounds": "3, too few", "batch, steps, guidance": "4, 3, 2", "compiled": "not tried",
      "agree": "1e-06", "load": "2.0"}
  assert "dno" not in page


def test_the_command_goes_on_where_it_stopped_and_writes_its_page(tmp_path):
  output, page = tmp_path / "speed.json", tmp_path / "speed.md"
  name, threads, rounds = "reward_gradient", torch.get_num_threads(), []
  for count in (1, 2):
    updates.main(["--model=smoke", f"--methods={name}", f"--rounds={count}", "--no-compile",
                  f"--output={output}", f"--page={page}"])
    entry = json.loads(output.read_text())[f"smoke/{name}"]
    assert len(entry["rounds"]) == count and entry["rounds"][:count - 1] == rounds
    rounds = entry["rounds"]
  torch.set_num_threads(threads)
  assert max(entry["agreement"].values()) < updates.TOLERANCE and min(entry["flops"].values()) > 1e6
  assert f"| `{name}` |" in page.read_text() and "2, too few" in page.read_text()


def test_the_page_is_that_of_its_numbers():
  results = runs.ROOT / "docs" / "updates.json"
  if not results.exists():
    pytest.skip("nothing measured yet")
  page = (runs.ROOT / "docs" / "updates.md").read_text()
  assert page == speed_page.page(json.loads(results.read_text()))
