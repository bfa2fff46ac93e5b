"""The table of `learning.py` as one page that needs no network: points with intervals, a panel for each metric."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

LEFT, WIDTH, LINE = 178, 440, 22  # of a panel: where the scale begins, and the height of a row
PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>What training brings</title>
<style>
:root {{ color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1b2430; --muted: #5d6b7c; --rule: #dfe4ea;
  --better: #2360c4; --worse: #b3402a; }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: #12161c; --card: #1b2129; --text: #e7ebf0; --muted: #9aa7b5;
  --rule: #303945; --better: #78aaf8; --worse: #f08a72; }} }}
body {{ margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }}
main {{ max-width: 1320px; margin: 0 auto; padding: 20px 16px 48px; }}
h1 {{ font-size: 24px; margin: 0; }} h2 {{ font-size: 18px; margin: 28px 0 8px; }} p {{ margin: 4px 0; color: var(--muted); }}
.panels {{ display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }}
.card {{ background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 8px; overflow-x: auto; }}
svg {{ display: block; width: 100%; font: 12px system-ui, sans-serif; fill: var(--text); stroke: var(--muted); }}
text {{ stroke: none; }} .muted {{ fill: var(--muted); }} .rule {{ stroke: var(--rule); }}
.first {{ stroke-dasharray: 3 3; }} .none circle {{ fill: var(--card); }} .seed {{ stroke: none; opacity: .45; }}
.better, .better circle {{ stroke: var(--better); fill: var(--better); }}
.worse, .worse circle {{ stroke: var(--worse); fill: var(--worse); }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13px; }}
th, td {{ padding: 3px 10px; text-align: right; white-space: nowrap; font-weight: normal; }}
th:first-child, td:first-child {{ text-align: left; }} th {{ color: var(--muted); }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; }}
</style>
<main><h1>What training brings</h1>
<p>Means over seeds with their 95 % intervals, of questions and seeds resampled together; small points are single seeds.
Full points differ from the first row by more than chance (paired), blue ones for the better, red ones for the worse.</p>
{sections}
<h2>Machine and commands</h2><p>{machines}</p><details><summary>Commands of each row</summary><pre>{commands}</pre></details>
</main></html>
"""


def write_page(
    path: Path, rows: Sequence[dict[str, Any]], metrics: Mapping[str, Mapping[str, str]], machines: Sequence[str],
    commands: Mapping[str, Any],
) -> None:  # fmt: skip
    sections = []
    for data, kind in dict.fromkeys((row["data"], row["kind"]) for row in rows):
        shown = [row for row in rows if (row["data"], row["kind"]) == (data, kind)]
        panels = "".join(f'<div class="card">{panel(shown, name)}</div>' for name in metrics[kind])
        title = f"{escape(data)}: {kind}, {shown[0]['n']} questions"
        sections.append(f'<h2>{title}</h2><div class="panels">{panels}</div><p></p><div class="card">'
                        f"{html_table(shown, list(metrics[kind]))}</div>")  # fmt: skip
    told = {"machines": escape("; ".join(machines)), "commands": escape(json.dumps(commands, indent=1))}
    path.write_text(PAGE.format(sections="\n".join(sections), **told), encoding="utf-8")


def verdict(row: dict[str, Any], name: str) -> str:
    """Whether the row's difference from the first is more than chance."""
    low, high = row.get("difference_intervals", {}).get(name, (0, 0))
    return "better" if low > 0 else "worse" if high < 0 else "none"


def panel(rows: Sequence[dict[str, Any]], name: str) -> str:
    """One metric of one data set as SVG."""
    ends = [end for row in rows for end in row["intervals"][name]]
    step = next(size for size in (0.02, 0.05, 0.1, 0.2, 0.5) if max(ends) - min(ends) <= 6 * size or size == 0.5)
    low, high = math.floor(min(ends) / step) * step, max(math.ceil(max(ends) / step), 1) * step
    bottom = 30 + LINE * len(rows)

    def x(value: float) -> str:
        return f"{LEFT + (value - low) / (high - low) * (WIDTH - LEFT - 14):.1f}"

    parts = [f'<text x="{LEFT}" y="14" font-weight="600">{escape(name)}</text>']
    for number in range(round((high - low) / step) + 1):
        at = x(low + number * step)
        parts.append(f'<line class="rule" x1="{at}" x2="{at}" y1="22" y2="{bottom}"/><text class="muted" x="{at}" '
                     f'y="{bottom + 14}" text-anchor="middle">{low + number * step:.2g}</text>')  # fmt: skip
    first = x(rows[0]["scores"][name])
    parts.append(f'<line class="first" x1="{first}" x2="{first}" y1="22" y2="{bottom}"/>')
    for number, row in enumerate(rows):
        y, mean, (start, end) = 38 + LINE * number, row["scores"][name], row["intervals"][name]
        seeds = "".join(f'<circle class="seed" cx="{x(each[name])}" cy="{y + 6}" r="2"/>' for each in row["by_seed"])
        parts.append(
            f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(row["system"])}</text>'
            f'<g class="{verdict(row, name)}"><title>{escape(row["system"])}: {mean:.3f}, {start:.3f} to {end:.3f}</title>'
            f'<line x1="{x(start)}" x2="{x(end)}" y1="{y}" y2="{y}" stroke-width="2"/>{seeds}'
            f'<circle cx="{x(mean)}" cy="{y}" r="4.5" stroke-width="2"/></g>'
        )
    label = f"{name}, means and intervals"
    return f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {bottom + 20}">{"".join(parts)}</svg>'


def html_table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Means, differences from the first row with their intervals, and what the row costs."""
    lines = []
    for row in rows:
        cells = [row["system"], str(row["seeds"] or "")]
        for name in names:
            cells.append(f"{row['scores'][name]:.3f}")
            gap = "{:+.3f} ({:+.3f} to {:+.3f})"
            told = "difference" in row and gap.format(row["difference"][name], *row["difference_intervals"][name])
            cells.append(told or "")
        cells += [f"{'>' * row['resumed']}{row['minutes']:.1f}", f"{row['peak_gib']:.1f}"]
        lines.append("".join(f"<td>{escape(cell)}</td>" for cell in cells))
    header = ["", "seeds", *(part for name in names for part in (name, "beside the first row")), "minutes", "peak GiB"]
    return "<table><tr>" + "<tr>".join(["".join(f"<th>{cell}</th>" for cell in header), *lines]) + "</table>"
