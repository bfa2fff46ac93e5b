"""The table of `learning.py` as an offline HTML page: points with intervals, one panel for each metric."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

LEFT, WIDTH, LINE = 200, 440, 22  # pixels of a panel: start and width of the scale, and the height of a row
PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>What training brings</title><style>
:root { color-scheme: light dark; --good: light-dark(#2360c4, #78aaf8); --bad: light-dark(#b3402a, #f08a72);
  --muted: light-dark(#5d6b7c, #9aa7b5); --rule: light-dark(#dfe4ea, #303945); --card: light-dark(#fff, #1b2129); }
body { margin: 20px auto; padding: 0 16px; max-width: 1320px; font: 15px/1.5 system-ui, sans-serif;
  background: light-dark(#f6f7f9, #12161c); color: light-dark(#1b2430, #e7ebf0); }
h1, h2 { font-size: 19px; margin: 22px 0 8px; }
div { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }
svg, pre { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 8px; overflow: auto; }
svg { font: 12px system-ui, sans-serif; fill: currentColor; stroke: var(--muted); stroke-width: 2; }
text { stroke: none; } .rule { stroke: var(--rule); stroke-width: 1; } .first { stroke-dasharray: 3 3; }
circle { fill: var(--card); } .seed { fill: var(--muted); stroke-width: 0; opacity: .5; }
.better, .better circle { stroke: var(--good); fill: var(--good); }
.worse, .worse circle { stroke: var(--bad); fill: var(--bad); }
</style><h1>What training brings</h1>
<p>Large points are means over seeds with 95 % intervals over questions and seeds; small points are single seeds. Filled
points differ from the first row (dashed) by more than chance, in a paired test: blue is better, red is worse.</p>
"""


def write_page(path: str, tables: Mapping[str, Sequence[dict[str, Any]]], text: str) -> None:
    """Write the panels of each table, and below them the printed output."""
    parts = [PAGE]
    for title, rows in tables.items():
        panels = "".join(panel(rows, name) for name in rows[0]["scores"])
        parts.append(f"<h2>{escape(title)}</h2>\n<div>{panels}</div>")
    Path(path).write_text("\n".join([*parts, f"<h2>Figures</h2>\n<pre>{escape(text)}</pre>\n"]), encoding="utf-8")


def panel(rows: Sequence[dict[str, Any]], name: str) -> str:
    """Draw one metric of one table as SVG."""
    ends = [end for row in rows for end in row["intervals"][name]]
    step = next((size for size in (0.02, 0.05, 0.1) if max(ends) - min(ends) <= 6 * size), 0.2)
    low, steps = math.floor(min(ends) / step), 1
    while (low + steps) * step < max(ends):
        steps += 1
    bottom = 30 + LINE * len(rows)

    def x(value: float) -> str:
        return f"{LEFT + (value / step - low) / steps * (WIDTH - LEFT - 14):.1f}"

    def rule(kind: str, value: float) -> str:
        return f'<line class="{kind}" x1="{x(value)}" x2="{x(value)}" y1="22" y2="{bottom}"/>'

    parts = [f'<text x="{LEFT}" y="14" font-weight="600">{escape(name)}</text>']
    for tick in (number * step for number in range(low, low + steps + 1)):
        label = f'<text x="{x(tick)}" y="{bottom + 14}" text-anchor="middle">{tick:.2g}</text>'
        parts.append(rule("rule", tick) + label)
    parts.append(rule("first", rows[0]["scores"][name]))
    for y, row in zip(range(38, bottom, LINE), rows, strict=False):
        (start, end), mean, system = row["intervals"][name], row["scores"][name], escape(row["system"])
        least, most = row["difference_intervals"][name]
        verdict = "better" if least > 0 else "worse" if most < 0 else ""
        points = (x(scores[name]) for scores in row["by_seed"].values())
        seeds = "".join(f'<circle class="seed" cx="{point}" cy="{y + 6}" r="2"/>' for point in points)
        parts.append(
            f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{system}</text><g class="{verdict}">'
            f"<title>{system}: {mean:.3f}, {start:.3f} to {end:.3f}</title>"
            f'<line x1="{x(start)}" x2="{x(end)}" y1="{y}" y2="{y}"/>{seeds}'
            f'<circle cx="{x(mean)}" cy="{y}" r="4.5"/></g>'
        )
    label = f'role="img" aria-label="{escape(name)}: means and intervals"'
    return f'<svg {label} viewBox="0 0 {WIDTH} {bottom + 20}">{"".join(parts)}</svg>'
