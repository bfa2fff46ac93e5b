"""Line charts as SVG text: drawn by Matplotlib, coloured by the page that holds them."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

SIZE = (4.2, 2.3)  # inches; the page scales them
MARKERS = 40  # a line of more points is drawn without them
NAMES = ("line-0", "line-1", "line-2", "line-3", "muted", "rule", "good")  # the page's colours
COLOURS = {name: f"#fade{number:02x}" for number, name in enumerate(NAMES)}  # that stand for them until the end
MARKS = {  # kind -> bottom and top as shares of the height, and style; many of a kind are short strokes
    "best": (0.0, 1.0, {"color": COLOURS["good"], "linestyle": "--", "linewidth": 1}),
    "saved": (0.0, 0.05, {"color": COLOURS["muted"]}),
    "refreshed": (0.95, 1.0, {"color": COLOURS["line-3"]}),
}
UNWANTED = ("Creator", "Date", "Format", "Type")  # metadata that Matplotlib would write

Line = Sequence[tuple[float, float]]


def line_chart(lines: Mapping[str, Line], marks: Mapping[str, Sequence[float]] | None = None) -> str:
    """Lines over training steps as one SVG element, or nothing without a finite value.

    The n-th line has the colour that the page's style sheet calls `--line-n`; the others are those of `NAMES`.

    Args:
        lines: (step, value) pairs by name; what is not finite is left out.
        marks: Steps to mark, by kind (see `MARKS`).
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    drawn = {name: [point for point in line if all(map(math.isfinite, point))] for name, line in lines.items()}
    if not any(drawn.values()):
        return ""
    settings = {"svg.fonttype": "none", "svg.hashsalt": " ".join(lines), "font.family": "sans-serif", "font.size": 10.5}
    with rc_context(settings):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.subplots()
        for number, (name, line) in enumerate(drawn.items()):
            marker = "o" if len(line) < MARKERS else ""
            axes.plot(*np.array(line).reshape(-1, 2).T, color=COLOURS[f"line-{number}"], marker=marker, ms=3, gid=name)
        for kind, places in (marks or {}).items():
            low, high, style = MARKS[kind]
            for place in places:
                axes.axvline(place, low, high, gid=f"{kind}-{place:g}", **style)
        axes.grid(axis="y", color=COLOURS["rule"])
        axes.spines[:].set_visible(False)
        axes.tick_params(color=COLOURS["rule"], labelcolor=COLOURS["muted"], length=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(UNWANTED))
    svg = f'<svg role="img" aria-label="{escape(", ".join(lines))} by step" {text.getvalue().partition("<svg ")[2]}'
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    chart = re.sub(r"\W", "_", next(iter(lines)))
    return re.sub(r'(?<= id=")|(?<="#)|(?<=url\(#)', f"{chart}-", svg)  # a page holds several charts, and an id once
