"""The atlas: its theory against golden numbers, docs/atlas.md against what its code computes."""
import re

import numpy as np
import pytest

import runs
from benchmarks.atlas import line, page, plane
from benchmarks.atlas.entries import ENTRIES
from benchmarks.atlas.laboratory import PATHS
from jaxalign.config import registry

pytestmark = pytest.mark.usefixtures("compile_quickly")
BY_NAME = {entry.name: entry for entry in ENTRIES}
PAGE = runs.ROOT / "docs" / "atlas.md"
# Recomputed by default, and among the slow tests: half of the methods at least.
QUICK, OTHERS = ("best_of_n",), ("fk_steering", "das", "svdd", "dno", "adjoint_matching", "dpok",
                                 "nft", "ram", "sft", "ddpo", "draft", "flow_grpo")
NUMBER = r"-?\d+\.\d+"


def table(title: str) -> dict[str, list[list[str]]]:
  """Cells of the rows of each method in the section of that title."""
  section = PAGE.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
  rows = {}
  for row in section.splitlines():
    cells = [cell.strip() for cell in row.strip("|").split(" | ")]
    if row.startswith("| ") and cells[0] in BY_NAME:
      rows.setdefault(cells[0], []).append(cells)
  return rows


numbers = lambda text: [float(n) for n in re.findall(NUMBER, text)]


@pytest.mark.parametrize("path, base, tilted", [
    ("vp", (.696833, .369599), (1.382033, .175265)), ("flow", (.6993, .387524),
                                                      (1.398540, .179196))])
def test_chains_and_tilts_are_the_golden_ones(path, base, tilted):
  models = line.AFFINE.models(path, "noisy")
  for law, golden in ((line.output_law(models), base), (line.tilt(models, 3.0), tilted)):
    np.testing.assert_allclose((law.mean, law.var), golden, atol=1e-4)


def test_theory_against_golden_numbers():
  """Exact kernels from the noise; the integral of the tangents is the tilt; small strengths agree.
  """
  models = line.AFFINE.models("vp", "noisy")
  exact = line.pulled_by_value(models, 3.0, narrow=True)
  np.testing.assert_allclose((exact.mean, exact.var), (1.380216, .175267), atol=1e-4)
  ode = line.AFFINE.models("flow", "ode")
  steps, whole = line.integrated(ode, 1.0), line.tilt(ode, 1.0)
  np.testing.assert_allclose((steps.mean, steps.var), (whole.mean, whole.var), atol=5e-3)
  first = line.first_order(ode, 0.5)                 # 0.93274, 0.40539 by exact regressions
  np.testing.assert_allclose((first.mean, first.var), (.93274, .40539), atol=0.02)
  for models in (line.AFFINE.models(path, "noisy") for path in PATHS):
    tilt, base = line.tilt(models, 0.01), line.output_law(models)
    for theory in (line.control, line.candidates, line.climbed):
      moved = theory(models, 0.01).mean - base.mean
      assert moved == pytest.approx(tilt.mean - base.mean, rel=0.3)
  assert line.best_of(models, 1).var == pytest.approx(line.output_law(models).var, rel=1e-4)


def test_every_method_is_in_the_atlas():
  """But the one that makes one-step generators, of which the page says so."""
  assert {entry.method for entry in ENTRIES} == {*registry.own_methods()} - {"diff_instruct_star"}
  assert "Diff-Instruct" in PAGE.read_text()


def test_claims_are_proved_by_the_rows():
  """Every cell of the first table follows from the tables below it, by the page's own rules."""
  text = PAGE.read_text()
  assert table(f"The plane on the {page.NAMES['vp']}")
  for entry in ENTRIES:
    row, = (r for r in text.split("## The plane")[0].splitlines()
            if r.startswith(f"| {entry.name} | "))
    cells = [cell.strip() for cell in row.strip("|").split(" | ")]
    assert cells[1] == entry.limit and cells[6] == entry.sentence
    for i, name in enumerate(page.NAMES.values()):
      told = table(f"The plane on the {name}").get(entry.name)
      rows = [page.read_row(row) for row in told or []]
      assert cells[2 + i] == page.verdict(page.holds_on_the_plane(entry, rows) if rows else None)
      told = table(f"The line on the {name}").get(entry.name)
      assert cells[4 + i] == (told[0][-1] if told else "-")


@pytest.mark.parametrize("path", PATHS)
def test_theory_of_the_page(path):
  for name, ((_, scale, base, tilt, own, *_),) in table(
      f"The line on the {page.NAMES[path]}").items():
    entry = BY_NAME[name]
    models = line.AFFINE.models(path, line.chain_of(entry, path))
    want = line.theory_of(entry, models)
    for text, law in ((base, line.output_law(models)), (tilt, line.tilt(models, float(scale))),
                      (own, want)):
      if law is None:
        assert text == ""
      else:
        np.testing.assert_allclose(numbers(text), (law.mean, law.std), atol=6e-4)


def recomputed(name: str, path: str):
  entry = BY_NAME[name]
  on_line, on_plane = (table(f"The {world} on the {page.NAMES[path]}").get(name, [])
                       for world in ("line", "plane"))
  for told in on_line:
    mean, mean_error, std, std_error = numbers(told[5])
    for now, then, error in zip(line.row(entry, path)["measured"], (mean, std),
                                (mean_error, std_error)):
      assert now == pytest.approx(then, abs=4 * error + 0.01)
  rows = plane.rows(entry, path) if on_plane else []
  for now, cells in zip(rows, on_plane, strict=True):
    kl, _ = numbers(cells[2])
    assert now["kl"] == pytest.approx(kl, rel=0.1, abs=0.02)
    assert now["reward"] == pytest.approx(numbers(cells[4])[0], abs=0.05)


@pytest.mark.parametrize("name", QUICK)
def test_rows_of_the_page(name):
  recomputed(name, "vp")


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", OTHERS)
def test_half_of_the_page(name, path):
  recomputed(name, path)
