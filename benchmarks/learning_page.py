"""The table of `learning.py` as one page that needs no network: points with intervals, a panel for each metric."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

LEFT, WIDTH, LINE = 178, 440, 22  # of a panel: where the scale begins, and the height of a row
PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>What training brings</title>
<style>
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1b2430; --muted: #5d6b7c; --rule: #dfe4ea;
  --better: #2360c4; --worse: #b3402a; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1b2129; --text: #e7ebf0; --muted: #9aa7b5;
  --rule: #303945; --better: #78aaf8; --worse: #f08a72; } }
body { margin: 0 auto; padding: 20px 16px; max-width: 1320px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 18px; margin: 24px 0 8px; } p { margin: 4px 0; color: var(--muted); }
.panels { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }
svg, pre { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 8px; }
pre { overflow-x: auto; font-size: 12px; }
svg { font: 12px system-ui, sans-serif; fill: var(--text); stroke: var(--muted); }
text { stroke: none; } .muted { fill: var(--muted); } .rule { stroke: var(--rule); } .first { stroke-dasharray: 3 3; }
g circle { stroke-width: 2; } .none circle { fill: var(--card); } g .seed { stroke: none; opacity: .5; }
.none .seed { fill: var(--muted); }
.better, .better circle { stroke: var(--better); fill: var(--better); }
.worse, .worse circle { stroke: var(--worse); fill: var(--worse); }
</style>
<h1>What training brings</h1>
<p>Means over seeds with their 95 % intervals, questions and seeds resampled together; small points are single seeds.
Full points differ from the first row (dashed) by more than chance, in pairs: blue ones are better, red ones worse.</p>
"""


def write_page(path: Path, rows: Sequence[dict[str, Any]], text: str) -> None:
    """The panels, and below them the printed tables."""
    parts = [PAGE]
    for data, kind in dict.fromkeys((row["data"], row["kind"]) for row in rows):
        shown = [row for row in rows if (row["data"], row["kind"]) == (data, kind)]
        panels = "".join(panel(shown, name) for name in shown[0]["scores"])
        parts.append(f'<h2>{escape(data)}: {shown[0]["n"]} questions</h2>\n<div class="panels">{panels}</div>')
    path.write_text("\n".join([*parts, f"<h2>Figures</h2>\n<pre>{escape(text)}</pre>\n</html>\n"]), encoding="utf-8")


def panel(rows: Sequence[dict[str, Any]], name: str) -> str:
    """One metric of one data set as SVG."""
    ends = [end for row in rows for end in row["intervals"][name]]
    step = next((size for size in (0.02, 0.05, 0.1) if max(ends) - min(ends) <= 6 * size), 0.2)
    low, steps = math.floor(min(ends) / step) * step, 1
    while low + steps * step < max(ends):
        steps += 1
    bottom = 30 + LINE * len(rows)

    def x(value: float) -> str:
        return f"{LEFT + (value - low) / (steps * step) * (WIDTH - LEFT - 14):.1f}"

    def rule(kind: str, value: float) -> str:
        return f'<line class="{kind}" x1="{x(value)}" x2="{x(value)}" y1="22" y2="{bottom}"/>'

    parts = [f'<text x="{LEFT}" y="14" font-weight="600">{escape(name)}</text>']
    for tick in (low + number * step for number in range(steps + 1)):
        parts.append(f'{rule("rule", tick)}<text class="muted" x="{x(tick)}" y="{bottom + 14}" text-anchor="middle">'
                     f"{tick:.2g}</text>")  # fmt: skip
    parts.append(rule("first", rows[0]["scores"][name]))
    for y, row in enumerate(rows):
        y, mean, (start, end), system = (
            38 + LINE * y,
            row["scores"][name],
            row["intervals"][name],
            escape(row["system"]),
        )
        least, most = row.get("difference_intervals", {}).get(name, (0, 0))
        verdict = "better" if least > 0 else "worse" if most < 0 else "none"
        seeds = "".join(f'<circle class="seed" cx="{x(each[name])}" cy="{y + 6}" r="2"/>' for each in row["by_seed"])
        parts.append(
            f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{system}</text><g class="{verdict}">'
            f'<title>{system}: {mean:.3f}, {start:.3f} to {end:.3f}</title><line stroke-width="2" x1="{x(start)}" '
            f'x2="{x(end)}" y1="{y}" y2="{y}"/>{seeds}<circle cx="{x(mean)}" cy="{y}" r="4.5"/></g>'
        )
    label = f'role="img" aria-label="{escape(name)}: means and intervals"'
    return f'<svg {label} viewBox="0 0 {WIDTH} {bottom + 20}">{"".join(parts)}</svg>'
