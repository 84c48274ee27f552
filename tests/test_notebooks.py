"""The notebooks run from top to bottom: one by default, all of them among the slow tests."""
import json
import pathlib

import jax
import pytest

from jaxalign.devices import sharding

NOTEBOOKS = pathlib.Path(__file__).resolve().parent.parent / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
QUICK = ("01_first_alignment",)


def cells(name: str, kind: str) -> list[str]:
  content = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
  return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_notebook_runs_on_the_fixture_model(name, tmp_path, monkeypatch):
  """Executed in this process, which has the programs of other tests at hand; on one device."""
  make_mesh = sharding.make_mesh
  monkeypatch.setattr(sharding, "make_mesh",
                      lambda *sizes: make_mesh(*sizes[:3], jax.devices()[:1]))
  monkeypatch.setenv("JAXALIGN_SIZE", "smoke")
  monkeypatch.setenv("JAXALIGN_RUNS", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  shown = []
  monkeypatch.setattr("IPython.display.display", lambda *things: shown.extend(things))
  monkeypatch.setenv("MPLBACKEND", "Agg")
  scope = {"__name__": "__main__"}
  for source in cells(name, "code"):
    exec(compile(source, name, "exec"), scope)
  assert shown                                       # tables or pictures
  assert list(tmp_path.rglob("summary.json"))


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_hold_no_method_code(name):
  source = "\n".join(cells(name, "code"))
  for word in ("jax.grad", "value_and_grad", "jax.jit", "optax"):
    assert word not in source
  assert cells(name, "markdown")[0].startswith("# ")
