"""What people prefer of two systems: asking them, blind; wins and their intervals, and how far the raters agree."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from rqa.data import parse_example
from rqa.endpoint.requests import need
from rqa.evaluation.comparison import Difference, pair, read_predictions, shown
from rqa.evaluation.results import mean_intervals
from rqa.runtime.errors import UserError
from rqa.runtime.files import append_line, fingerprint, read_jsonl

CHOICES = {"A": "A wins", "B": "B wins", "tie": "tie", "both_bad": "both bad"}
ASKED = ("question", "chat_history", "gold_answer")  # what a rater sees beside the answers

Row = dict[str, Any]
Ratings = dict[int, tuple[Row, dict[str, str]]]  # number -> the first line that rates it, and each rater's choice


def rated(row: Row) -> int:
    """A number for what a line is about: whatever it says beside rater, choice and time, such as both answers."""
    about = {name: value for name, value in row.items() if name not in ("rater", "choice", "time")}
    return int(fingerprint(json.dumps(about, sort_keys=True))[:12], 16)  # a float64, as browsers have, holds it


def read_ratings(path: str | Path) -> Ratings:
    """The ratings of two systems by people; the last choice of a rater for a question counts."""
    ratings: Ratings = {}
    systems = None
    for line, row in read_jsonl(path):
        where, names = f"{path}:{line}", ("rater", "question", "A", "B")
        if wrong := [name for name in names if not isinstance(row.get(name), str) or not row[name].strip()]:
            raise UserError(f"{where}: field '{wrong[0]}' must be a non-empty string, as bin/serve --compare writes")
        parse_example(row, where)
        if str(row.get("choice")) not in CHOICES:
            raise UserError(f"{where}: field 'choice' must be one of {', '.join(CHOICES)}")
        found = f"A: {row['A']}, B: {row['B']}"
        if found != (systems := systems or found):
            raise UserError(f"{where}: rates {found}; lines before rate {systems}; put them into separate files")
        ratings.setdefault(rated(row), (row, {}))[1][row["rater"].strip()] = row["choice"]
    return ratings


class Comparison:
    """The questions of two evaluated runs, in a random order for all, and who has rated which, as the file says."""

    def __init__(self, first: str, second: str, path: str) -> None:
        self.path, items = path, {}
        for a, b in pair(read_predictions(first), read_predictions(second)):
            asked, sides = parse_example(a, first)[0].to_json(), {"A": shown(a, first), "B": shown(b, second)}
            row = {name: asked.get(name) for name in ASKED} | {"A": first, "B": second}
            row |= {f"answer_{name}": side["answer"] for name, side in sides.items()}
            items[rated(row)] = row, sides
        self.items = dict(sorted(items.items()))
        with open(path, "ab"):  # where nothing can be written, this fails, and not the first rating
            self.ratings = {number: raters for number, (_, raters) in read_ratings(path).items()}
        if not self.ratings.keys() <= items.keys():
            raise UserError(f"--ratings_path {path}: holds ratings of other systems or answers; name another file")

    def next(self, rater: Any) -> dict[str, Any]:
        """How far a rater is, and the first question that is left, whose sides do not say which system they are."""
        need(isinstance(rater, str) and min(rater.strip(), default="") >= " ", "rater", "a name")
        left = [number for number in self.items if rater.strip() not in self.ratings.get(number, ())]
        progress = {"done": len(self.items) - len(left), "total": len(self.items), "item": None}
        if left:
            (row, sides), (first, second) = self.items[left[0]], _order(rater.strip(), left[0])
            about = {"number": left[0], "left": sides[first], "right": sides[second]}
            progress["item"] = about | {name: row[name] for name in ASKED}
        return progress

    def rate(self, body: dict[str, Any]) -> dict[str, Any]:
        """Keep a rater's choice, which replaces an earlier one. -> what is next"""
        self.next(rater := body.get("rater", ""))  # refuses what is no name
        number: Any = body.get("number")
        need(type(number) is int and number in self.items, "number", "that of a question")
        rater, row = rater.strip(), self.items[number][0]
        first, second = _order(rater, number)
        choice = {"left": first, "right": second, "tie": "tie", "both_bad": "both_bad"}.get(str(body.get("choice")))
        need(choice is not None, "choice", "left, right, tie or both_bad")
        time = datetime.now(UTC).isoformat(timespec="seconds")
        append_line(self.path, {"rater": rater} | row | {"choice": choice, "time": time})
        self.ratings.setdefault(number, {})[rater] = choice
        return self.next(rater)


def _order(rater: str, number: int) -> str:
    """The systems on the left and on the right: random for each question and rater, the same at every call."""
    return "AB" if fingerprint(rater, str(number)) < "8" else "BA"


def count_choices(ratings: Ratings) -> np.ndarray:
    """How many raters made each of the CHOICES. -> [N, 4]"""
    chosen = [list(raters.values()) for _, raters in ratings.values()]
    return np.array([[choices.count(choice) for choice in CHOICES] for choices in chosen])


def preference(counts: np.ndarray) -> Difference:
    """The share of wins of A and of B; a question counts once, however many rated it. Counts [N, 4]"""
    wins = counts[:, :2] / counts.sum(axis=1, keepdims=True)  # [N, 2]
    gaps = wins[:, 1] - wins[:, 0]
    low, high = mean_intervals((gaps[:, None] + 1) / 2)[0] * 2 - 1  # as shares, which are never certain
    if not (decided := int(np.count_nonzero(gaps))):  # ties alone are no certainty, either
        high = mean_intervals(gaps[:, None])[0][1]
        low = -high
    return Difference("share of wins", *wins.mean(axis=0).tolist(), low, high, len(gaps), decided, "have a winner")


def agreement(counts: np.ndarray) -> tuple[float, float]:
    """How often two raters of a question choose alike, and Krippendorff's alpha for nominal data.

    Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: observers may miss units. Both are NaN
    without a question of two raters, alpha also where all choices are the same. Counts [N, C]
    """
    raters = counts.sum(axis=1)  # [N]
    counts, raters = counts[raters > 1], raters[raters > 1]
    each, total = counts.sum(axis=0), raters.sum()
    with np.errstate(invalid="ignore"):
        alike = ((counts * (counts - 1)).sum(axis=1) / (raters - 1)).sum() / total
        by_chance = (each * (each - 1)).sum() / (total * (total - 1))
        return float(alike), float(1 - (1 - alike) / (1 - by_chance))


def ratings_table(counts: np.ndarray) -> str:
    """Every choice, the wins and the raters' agreement in a table to paste. Counts [N, 4]"""
    shares = counts / counts.sum(axis=1, keepdims=True)  # [N, 4]
    wins, won = preference(counts), counts[counts[:, :2].any(axis=1), :2]  # [W, 2]
    rates = [*zip(CHOICES.values(), shares.T, counts.sum(axis=0), strict=True)]
    rates += [("B wins, of all wins", won[:, 1] / won.sum(axis=1), won.sum())] if len(won) else []
    lines = ["| | value | 95 % interval | ratings | questions |", "|---|---:|---:|---:|---:|"]
    for name, values, number in rates:
        low, high = mean_intervals(values[:, None])[0]
        lines.append(f"| {name} | {values.mean():.3f} | {low:.3f} to {high:.3f} | {number} | {len(values)} |")
    gap = f"{wins.second - wins.first:+.3f} | {wins.low:+.3f} to {wins.high:+.3f}"
    lines.append(f"| B wins - A wins | {gap} | {counts.sum()} | {len(counts)} |")
    several = counts[counts.sum(axis=1) > 1]
    for name, value in zip(("two raters agree", "Krippendorff's alpha"), agreement(counts), strict=True):
        lines.append(f"| {name} | {'-' if np.isnan(value) else f'{value:.3f}'} | | {several.sum()} | {len(several)} |")
    return "\n".join(lines)
