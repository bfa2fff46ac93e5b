"""Line charts as SVG text: small enough to read, coloured by the page that holds them."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 28  # margins of the plot
POINTS = 400  # of one line, at most: more cannot be seen

Line = Sequence[tuple[float, float]]


def line_chart(lines: Mapping[str, Line], marks: Mapping[str, Sequence[float]] | None = None) -> str:
    """Lines over training steps as one SVG element; the n-th line has class `line-n`, for its colour.

    Args:
        lines: (step, value) pairs by name; what is not finite is left out.
        marks: Steps to mark, by class name (`best`, `saved`, `refreshed`).
    """
    drawn = {name: _thinned([p for p in line if all(map(math.isfinite, p))]) for name, line in lines.items()}
    points = [point for line in drawn.values() for point in line]
    if not points:
        return ""
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))

    def x(value: float) -> float:
        share = (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(", ".join(lines))} by step">']
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y(tick) + 4}">{_short(tick)}</text>')
    parts += [f'<text class="x" x="{x(tick)}" y="{HEIGHT - 8}">{_short(tick)}</text>' for tick in x_ticks]
    for kind, steps in (marks or {}).items():
        inside = [step for step in steps if x_ticks[0] <= step <= x_ticks[-1]]
        parts += [_mark(kind, x(step)) for step in inside]
    for number, (name, line) in enumerate(drawn.items()):
        path = " ".join(f"{x(step)},{y(value)}" for step, value in line)
        parts.append(f'<polyline class="line line-{number}" points="{path}"/>')
        parts += [
            f'<circle class="line-{number}" cx="{x(step)}" cy="{y(value)}" r="{2.5 if len(line) < 40 else 1}">'
            f"<title>{escape(name)}, step {step:g}: {value:.4g}</title></circle>"
            for step, value in line
        ]
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`, in about `count` steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _mark(kind: str, place: float) -> str:
    top, bottom = TOP, HEIGHT - BOTTOM
    if kind != "best":  # many of them: short strokes, refreshes above and saves below
        top, bottom = (top, top + 6) if kind == "refreshed" else (bottom - 6, bottom)
    return f'<line class="mark {escape(kind)}" x1="{place}" x2="{place}" y1="{top}" y2="{bottom}"/>'


def _thinned(line: Line) -> Line:
    """Every n-th point, and always the last."""
    every = math.ceil(len(line) / POINTS)
    return [*line[:-1][::every], line[-1]] if line else []


def _short(value: float) -> str:
    """12000 as 12k, 0.00002 as 2e-5."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    text = f"{value:.6g}"
    return f"{value:.2g}".replace("e-0", "e-") if "e" in text or 0 < abs(value) < 1e-3 else text
