"""Line charts and scatter plots as inline SVG, coloured by the page's style sheet.

Series k has the classes `series sK`; text takes the page's ink. Nothing is drawn that has no data.
"""
import dataclasses
import math
from html import escape

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 40
COLOURS = 8              # of the style sheet, in turn


@dataclasses.dataclass(frozen=True)
class Line:
  """`y` over `x`, with an optional half width of the band around it; `faint` without points."""
  name: str
  x: list[float]
  y: list[float]
  band: list[float] | None = None
  series: int = 0
  faint: bool = False


@dataclasses.dataclass(frozen=True)
class Point:
  """A point with half lengths of its error bars; `end` is a run's result, others are its looks."""
  name: str
  x: float
  y: float
  x_error: float = 0.0
  y_error: float = 0.0
  series: int = 0
  end: bool = True


def lines(title: str, x_label: str, y_label: str, content: list[Line], zero: bool = True) -> str:
  """A chart of lines with bands; "" without any point. `zero`: the axis of y has 0 on it."""
  content = [line for line in content if line.x]
  if not content:
    return ""
  xs = [x for line in content for x in line.x]
  half = lambda line: line.band or [0.0] * len(line.y)
  ys = [v for line in content for y, h in zip(line.y, half(line)) for v in (y - h, y + h)]
  frame = _Frame(xs, ys + [0.0] * zero, x_from_data=True)
  body = []
  for line in content:
    marks = list(zip(line.x, line.y, half(line)))
    kind = f"series s{line.series % COLOURS}"
    if line.band:
      upper = [frame.at(x, y + h) for x, y, h in marks]
      lower = [frame.at(x, y - h) for x, y, h in reversed(marks)]
      body.append(f'<polygon class="{kind} band" points="{_points(upper + lower)}"/>')
    faint = " faint" if line.faint else ""
    body.append(f'<polyline class="{kind} line{faint}" '
                f'points="{_points([frame.at(x, y) for x, y, _ in marks])}"/>')
    for x, y, h in marks if not line.faint else ():
      (px, py), error = frame.at(x, y), f" ± {_number(h)}" if line.band else ""
      body.append(f'<circle class="{kind} dot" cx="{px:.1f}" cy="{py:.1f}" r="3"><title>'
                  f"{escape(line.name)}: {_number(x)}, {_number(y)}{error}</title></circle>")
  return frame.svg(title, x_label, y_label, body)


def scatter(title: str, x_label: str, y_label: str, points: list[Point],
            front: list[Point] = ()) -> str:
  """Points with error bars, those of a series joined in order; `front` as a dashed line."""
  points = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
  if not points:
    return ""
  xs = [v for p in points for v in (p.x - p.x_error, p.x + p.x_error)]
  ys = [v for p in points for v in (p.y - p.y_error, p.y + p.y_error)]
  frame, body = _Frame(xs, ys), []
  if len(front) > 1:
    body.append(f'<polyline class="front" points="'
                f'{_points([frame.at(p.x, p.y) for p in front])}"/>')
  for series in sorted({p.series for p in points}):
    path = [frame.at(p.x, p.y) for p in points if p.series == series and not p.end]
    if len(path) > 1:
      body.append(f'<polyline class="series s{series % COLOURS} line faint" '
                  f'points="{_points(path)}"/>')
  for p in points:
    kind, (x, y) = f"series s{p.series % COLOURS}", frame.at(p.x, p.y)
    for dx, dy in ((p.x_error, 0.0), (0.0, p.y_error)):
      if dx or dy:
        (x1, y1), (x2, y2) = frame.at(p.x - dx, p.y - dy), frame.at(p.x + dx, p.y + dy)
        body.append(f'<line class="{kind} line" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" '
                    f'y2="{y2:.1f}"/>')
    body.append(f'<circle class="{kind} dot" cx="{x:.1f}" cy="{y:.1f}" r="{5 if p.end else 3}">'
                f"<title>{escape(p.name)}: {_number(p.x)}, {_number(p.y)}</title></circle>")
  return frame.svg(title, x_label, y_label, body)


def front(points: list[Point], x_up: bool = True) -> list[Point]:
  """Those that no other surpasses in both x and y (upward in y), in order of x.

  Args:
    x_up: whether more of x is better.
  """
  sign = 1 if x_up else -1
  best, out = -math.inf, []
  for p in sorted(points, key=lambda p: (-sign * p.x, -p.y)):
    if p.y > best:
      best = p.y
      out.append(p)
  return sorted(out, key=lambda p: p.x)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
  """Round numbers from `low` to `high`, about `wanted` of them."""
  raw = (high - low) / wanted
  size = 10.0 ** math.floor(math.log10(raw))
  step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw * (1 - 1e-9))
  first = math.ceil(low / step - 1e-9)
  return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


class _Frame:
  """Axes around data: where a point lies, and the SVG element."""

  def __init__(self, xs, ys, x_from_data: bool = False):
    self._x, self._y = _limits(xs, 0.0 if x_from_data else 0.06), _limits(ys, 0.06)

  def at(self, x: float, y: float) -> tuple[float, float]:
    (x0, x1), (y0, y1) = self._x, self._y
    return (LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM))

  def svg(self, title, x_label, y_label, body) -> str:
    grid = []
    for x in ticks(*self._x):
      px = self.at(x, self._y[0])[0]
      grid.append(f'<line class="grid" x1="{px:.1f}" y1="{TOP}" x2="{px:.1f}" '
                  f'y2="{HEIGHT - BOTTOM}"/><text x="{px:.1f}" y="{HEIGHT - BOTTOM + 15}" '
                  f'text-anchor="middle">{_number(x)}</text>')
    for y in ticks(*self._y):
      py = self.at(self._x[0], y)[1]
      kind = "axis" if y == 0 else "grid"
      grid.append(f'<line class="{kind}" x1="{LEFT}" y1="{py:.1f}" x2="{WIDTH - RIGHT}" '
                  f'y2="{py:.1f}"/><text x="{LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">'
                  f"{_number(y)}</text>")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    grid.append(f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" '
                f'text-anchor="middle">{escape(x_label)}</text><text class="label" x="12" '
                f'y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">'
                f"{escape(y_label)}</text>")
    return (f'<figure class="chart"><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 '
            f'{WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}: {escape(y_label)} over '
            f'{escape(x_label)}">{"".join(grid)}{"".join(body)}</svg></figure>')


def _limits(values, margin: float) -> tuple[float, float]:
  low, high = min(values), max(values)
  if high - low < 1e-12 * max(1.0, abs(high)):
    low, high = low - (abs(low) or 1.0) * 0.1, high + (abs(high) or 1.0) * 0.1
  room = margin * (high - low)
  return low - room, high + room


def _points(points) -> str:
  return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _number(value: float) -> str:
  if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
    return f"{value:.2g}"
  text = f"{value:.4g}"
  return "0" if text == "-0" else text
