"""`report.html`: a run's curves, scores and answers on one page that needs no network."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from rqa.data import parse_document
from rqa.evaluation.runtime import machine_line
from rqa.runtime import distributed
from rqa.runtime.files import atomic_file, read_json, read_jsonl

SCORES, DETAILS, ARGUMENTS = "score.json", "score_details.json", "all_args.json"
PREDICTIONS, REPORT = "test-predictions.jsonl", "report.html"
EXAMPLES = 200  # maximum number of questions on a page
RIGHT = 0.5  # a question counts as right from this score on
DECISIVE = ("gen/f1", "retr/recall@4", "retr/recall@1")
TILES = {"gen/f1": "Token F1", "gen/rougeL": "ROUGE-L", "gen/exact_match": "Exact match",
         "retr/recall@1": "Recall@1", "retr/recall@4": "Recall@4", "retr/mrr@10": "MRR@10"}  # fmt: skip
MODELS = ("model_name_or_path", "qa_model_name_or_path", "embedding_model", "reranker")  # shown below the title
CHARTS = {  # title -> names of its lines; a run has some of them
    "Loss": ("loss", "eval_loss"),
    "Recall on the eval file": ("eval_retr/recall@1", "eval_retr/recall@4", "eval_retr/recall@10"),
    "Ranking on the eval file": ("eval_retr/mrr@10", "eval_retr/ndcg@10", "eval_retr/map@10"),
    "Answers on the eval file": ("eval_gen/f1", "eval_gen/rougeL", "eval_gen/bleu", "eval_gen/exact_match"),
    "Learning rate": ("learning_rate",),
    "Tokens a second": ("tokens_per_second",),
    "Gradient norm": ("grad_norm",),
}
LEGEND = {"loss": "training", "eval_loss": "eval file"}

NAMES = ("line-0", "line-1", "line-2", "line-3", "muted", "rule", "good")  # the page's colours
COLOURS = {name: f"#fade{number:02x}" for number, name in enumerate(NAMES)}  # placeholders, replaced by CSS variables
MARKS = {  # kind -> bottom and top as shares of the height, and style; frequent kinds are short strokes
    "best": (0.0, 1.0, {"color": COLOURS["good"], "linestyle": "--", "linewidth": 1}),
    "saved": (0.0, 0.05, {"color": COLOURS["muted"]}),
    "refreshed": (0.95, 1.0, {"color": COLOURS["line-3"]}),
}

Line = Sequence[tuple[float, float]]


def write_report(directory: str | Path, written: Mapping[str, Path] | None = None) -> None:
    """Write `report.html` from the result files that the directory has, in the main process.

    `written` maps the names of files that are not yet in the directory, and of the page, to their temporary paths.
    """
    directory = Path(directory)
    if not distributed.is_main():
        return
    names = (SCORES, DETAILS, ARGUMENTS, "trainer_state.json", PREDICTIONS, REPORT)
    *paths, answers, report = (dict(written or {}).get(name, directory / name) for name in names)
    scores, details, arguments, state = (read_json(path) if path.exists() else {} for path in paths)
    rows = [row for _, row in read_jsonl(answers)] if answers.exists() else []
    history, rates = state.get("log_history", []), details.get("scores", {})
    own = {name.removeprefix("test_"): rate for name, rate in rates.items()}
    steps = [path.name.rpartition("-")[2] for path in directory.glob("checkpoint-*")]
    best = (state.get("best_model_checkpoint") or "").rpartition("-")[2]
    marks = {
        "saved": [float(step) for step in steps if step.isdigit()],
        "best": [float(best)] if best else [],
        "refreshed": [step for step, _ in _line(history, "index_refreshed")],
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("rqa.evaluation").joinpath("report.html").read_text(encoding="utf-8"))
    page = template.render(
        title=directory.resolve().name,
        machine=machine_line(details["machine"]) if "machine" in details else "",
        peak=details.get("peak_memory_gib", {}),
        tiles=[(title, own[name]) for name, title in TILES.items() if name in own],
        rates=own,
        widest=max(own.values(), key=lambda rate: rate["high"] - rate["low"], default=None),
        others={name.removeprefix("test_"): value for name, value in other_figures(scores, rates).items()},
        charts=_charts(history, marks),
        refreshed=bool(marks["refreshed"]),
        examples=list(map(_example, rows[:EXAMPLES])),
        questions=len(rows),
        arguments=arguments,
        models=[arguments[name] for name in MODELS if arguments.get(name)],
        figure=figure,
    )
    with atomic_file(report) as temporary:
        temporary.write_text(page, encoding="utf-8")


def other_figures(scores: Mapping[str, float], rates: Mapping[str, Any]) -> dict[str, float]:
    """The scores without intervals, under our names only; LocalRQA's names have two slashes."""
    return {name: value for name, value in scores.items() if name not in rates and name.count("/") < 2}


def figure(value: float) -> str:
    """A number with four digits, or all digits before the point: 0.02075, 761.7, 698,512."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _charts(history: Sequence[Mapping[str, Any]], marks: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """The title, SVG, and names and last values of the lines of each chart that has data."""
    known = {name for names in CHARTS.values() for name in names} | {"step", "index_refreshed"}
    own = dict.fromkeys(n for entry in history for n in entry if n not in known and not n.startswith("eval_"))
    charts = []
    for title, names in {**CHARTS, **{name.replace("_", " ").capitalize(): (name,) for name in own}}.items():
        lines = {name: line for name in names if (line := _line(history, name))}
        if svg := line_chart(lines, marks):
            legend = {LEGEND.get(n, n.rpartition("/")[2].replace("_", " ")): line[-1][1] for n, line in lines.items()}
            charts.append({"title": title, "svg": Markup(svg), "legend": legend})
    return charts


def _line(history: Sequence[Mapping[str, Any]], name: str) -> Line:
    return [(entry["step"], entry[name]) for entry in history if isinstance(entry.get(name), int | float)]


def line_chart(lines: Mapping[str, Line], marks: Mapping[str, Sequence[float]] | None = None) -> str:
    """Draw lines of (step, value) pairs as an SVG element, "" without finite values; `marks` are steps by kind.

    The n-th line has the colour `--line-n` of the page's style sheet; the other colours are those of `NAMES`.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    drawn = {name: [point for point in line if all(map(math.isfinite, point))] for name, line in lines.items()}
    if not any(drawn.values()):
        return ""
    settings = {"svg.fonttype": "none", "svg.hashsalt": " ".join(lines), "font.family": "sans-serif", "font.size": 10.5}
    with rc_context(settings):
        canvas = Figure((4.2, 2.3), layout="constrained")  # inches; the page scales them
        axes = canvas.subplots()
        for number, (name, line) in enumerate(drawn.items()):
            marker = "o" if len(line) < 40 else ""  # more markers would hide the line
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
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.savefig(text, format="svg", transparent=True, metadata=no_metadata)
    svg = f'<svg role="img" aria-label="{escape(", ".join(lines))} by step" {text.getvalue().partition("<svg ")[2]}'
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    chart = re.sub(r"\W", "_", next(iter(lines)))
    return re.sub(r'(?<= id=")|(?<="#)|(?<=url\(#)', f"{chart}-", svg)  # makes ids unique on a page of several charts


def _example(row: dict[str, Any]) -> dict[str, Any]:
    """A row of predictions, with the fields that the page shows added."""
    found, gold = (
        {document.key: document for document in (parse_document(value, PREDICTIONS) for value in row.get(name, []))}
        for name in ("retrieved_docs", "gold_docs")
    )
    decisive = next((name for name in DECISIVE if name in row["scores"]), None)
    return row | {
        "passages": [(document, key in gold) for key, document in found.items()],
        "missed": [document for key, document in gold.items() if key not in found],
        "decisive": decisive,
        "right": decisive is not None and row["scores"][decisive] >= RIGHT,
    }
