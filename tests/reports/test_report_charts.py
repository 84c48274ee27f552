"""Charts as SVG: ticks, fronts, what is drawn and what is not."""
import itertools
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from jaxalign.reports import charts
from jaxalign.reports.charts import Line, Point


@pytest.mark.parametrize("low, high", [(0, 1), (-0.3, 0.7), (1e-5, 2e-5), (0, 12345), (-9, -3),
                                       (0.985, 1.002), (0, 3)])
def test_ticks_are_round_within_and_enough(low, high):
  found = charts.ticks(low, high)
  assert 2 <= len(found) <= 8 and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
  gaps = np.diff(found)
  np.testing.assert_allclose(gaps, gaps[0], rtol=1e-6)
  lead = gaps[0] / 10 ** np.floor(np.log10(gaps[0]) + 1e-9)
  assert min(abs(lead - m) for m in (1, 2, 5)) < 1e-6


@pytest.mark.parametrize("up", [True, False])
def test_the_front_is_what_no_other_surpasses(up):
  rng = np.random.default_rng(0)
  points = [Point(str(k), *xy) for k, xy in enumerate(rng.normal(size=(40, 2)))]
  sign = 1 if up else -1

  def surpassed(p):
    return any(sign * q.x >= sign * p.x and q.y >= p.y and q != p for q in points)
  assert {p.name for p in charts.front(points, up)} == {p.name for p in points if not surpassed(p)}
  xs = [p.x for p in charts.front(points, up)]
  assert xs == sorted(xs) and len(xs) > 1


def parsed(figure):
  return ET.fromstring(figure)


def test_lines_with_bands():
  figure = parsed(charts.lines("T & t", "step", "<y>", [
      Line("a", [0, 1, 2], [0.0, 0.5, 1.0], [0.0, 0.1, 0.2], 0), Line("b", [0, 2], [0.0, -1.0],
                                                                      series=9)]))
  kinds = [e.get("class") for e in figure.iter()]
  assert kinds.count("series s0 band") == 1 and kinds.count("series s1 line") == 1
  assert figure.find("figcaption").text == "T & t"
  assert len([e for e in figure.iter("circle")]) == 5
  assert "a: 1, 0.5 ± 0.1" in [e.text for e in figure.iter("title")]
  for line in figure.iter("polyline"):
    for x, y in (point.split(",") for point in line.get("points").split()):
      assert charts.LEFT - 0.1 <= float(x) <= charts.WIDTH - charts.RIGHT + 0.1
      assert charts.TOP - 0.1 <= float(y) <= charts.HEIGHT - charts.BOTTOM + 0.1


def test_larger_is_higher_and_to_the_right():
  figure = parsed(charts.scatter("T", "x", "y", [Point("p", 0, 0), Point("q", 1, 2, 0.1, 0.2)]))
  p, q = figure.iter("circle")
  assert float(q.get("cx")) > float(p.get("cx")) and float(q.get("cy")) < float(p.get("cy"))
  bars = [e for e in figure.iter("line") if e.get("class").startswith("series")]
  assert len(bars) == 2


def test_nothing_is_drawn_without_data():
  assert charts.lines("T", "x", "y", []) == charts.lines("T", "x", "y", [Line("a", [], [])]) == ""
  assert charts.scatter("T", "x", "y", []) == ""
  assert charts.scatter("T", "x", "y", [Point("p", float("nan"), 1.0)]) == ""


@pytest.mark.parametrize("xs, ys", list(itertools.product(
    [[3], [2, 2], [0, 1e6]], [[0.0], [5e-9, 5e-9], [-1e7, 1e7]])))
def test_no_range_is_too_small_or_large(xs, ys):
  n = min(len(xs), len(ys))
  parsed(charts.lines("T", "x", "y", [Line("a", xs[:n], ys[:n])]))
