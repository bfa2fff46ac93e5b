"""Blind ratings of two systems by people: asking for them, wins with intervals, and the raters' agreement."""

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
SHOWN = ("question", "chat_history", "gold_answer")  # what a rater sees beside the answers

Row = dict[str, Any]
Ratings = dict[int, tuple[Row, dict[str, str]]]  # number -> the first line that rates it, and each rater's choice


def item_number(row: Row) -> int:
    """The number of the item that a line rates: a hash of all its fields but rater, choice and time."""
    item = {name: value for name, value in row.items() if name not in ("rater", "choice", "time")}
    return int(fingerprint(json.dumps(item, sort_keys=True))[:12], 16)  # 48 bits, exact in a browser's float64


def read_ratings(path: str | Path) -> Ratings:
    """Read people's ratings of two systems; a rater's last choice for a question counts."""
    ratings: Ratings = {}
    systems = None
    for line, row in read_jsonl(path):
        where, names = f"{path}:{line}", ("rater", "question", "A", "B")
        if wrong := [name for name in names if not isinstance(row.get(name), str) or not row[name].strip()]:
            raise UserError(f"{where}: field '{wrong[0]}' must be a non-empty string, as bin/serve --compare writes")
        parse_example(row, where)
        if str(row.get("choice")) not in CHOICES:
            raise UserError(f"{where}: field 'choice' must be one of {', '.join(CHOICES)}")
        named = f"A: {row['A']}, B: {row['B']}"
        if named != (systems := systems or named):
            raise UserError(f"{where}: rates {named}, but earlier lines rate {systems}; use a file for each pair")
        ratings.setdefault(item_number(row), (row, {}))[1][row["rater"].strip()] = row["choice"]
    return ratings


class Comparison:
    """The questions of two evaluated runs, in one random order for all raters, and the ratings given so far."""

    def __init__(self, first: str, second: str, path: str) -> None:
        self.path, items = path, {}
        for a, b in pair(read_predictions(first), read_predictions(second)):
            example, sides = parse_example(a, first)[0].to_json(), {"A": shown(a, first), "B": shown(b, second)}
            row = {name: example.get(name) for name in SHOWN} | {"A": first, "B": second}
            row |= {f"answer_{name}": side["answer"] for name, side in sides.items()}
            items[item_number(row)] = row, sides
        self.items = dict(sorted(items.items()))
        with open(path, "ab"):  # fails now, not at the first rating, if the file cannot be written
            self.ratings = {number: raters for number, (_, raters) in read_ratings(path).items()}
        if not self.ratings.keys() <= items.keys():
            raise UserError(f"--ratings_path {path}: has ratings of other systems or answers; name another file")

    def next(self, rater: Any) -> dict[str, Any]:
        """A rater's progress and next question; its two sides do not reveal which system they are."""
        need(isinstance(rater, str) and min(rater.strip(), default="") >= " ", "rater", "a name")
        left = [number for number in self.items if rater.strip() not in self.ratings.get(number, ())]
        progress = {"done": len(self.items) - len(left), "total": len(self.items), "item": None}
        if left:
            (row, sides), (first, second) = self.items[left[0]], _order(rater.strip(), left[0])
            item = {"number": left[0], "left": sides[first], "right": sides[second]}
            progress["item"] = item | {name: row[name] for name in SHOWN}
        return progress

    def rate(self, body: dict[str, Any]) -> dict[str, Any]:
        """Save a rater's choice, which replaces an earlier one. -> progress and next question"""
        self.next(rater := body.get("rater", ""))  # refuses an invalid name
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
    """The systems on the left and on the right, random for each question and rater, but the same at every call."""
    return "AB" if fingerprint(rater, str(number)) < "8" else "BA"


def count_choices(ratings: Ratings) -> np.ndarray:
    """The number of raters of each question who made each of the CHOICES. -> [N, 4]"""
    chosen = [list(raters.values()) for _, raters in ratings.values()]
    return np.array([[choices.count(choice) for choice in CHOICES] for choices in chosen])


def preference(counts: np.ndarray) -> Difference:
    """Shares of wins of A and of B; a question counts once, however many raters it has. Counts [N, 4]"""
    wins = counts[:, :2] / counts.sum(axis=1, keepdims=True)  # [N, 2]
    gaps = wins[:, 1] - wins[:, 0]
    low, high = mean_intervals((gaps[:, None] + 1) / 2)[0] * 2 - 1  # as rates, whose interval always has a width
    if not (decided := int(np.count_nonzero(gaps))):  # with ties only, too, the interval needs a width
        high = mean_intervals(gaps[:, None])[0][1]
        low = -high
    return Difference("share of wins", *wins.mean(axis=0).tolist(), low, high, len(gaps), decided, "have a winner")


def agreement(counts: np.ndarray) -> tuple[float, float]:
    """Share of pairs of raters of a question that agree, and Krippendorff's alpha for nominal data.

    Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C (observers may miss units). Both
    are NaN if no question has two raters, alpha also if all choices are the same. Counts [N, C]
    """
    raters = counts.sum(axis=1)  # [N]
    counts, raters = counts[raters > 1], raters[raters > 1]
    each, total = counts.sum(axis=0), raters.sum()
    with np.errstate(invalid="ignore"):
        alike = ((counts * (counts - 1)).sum(axis=1) / (raters - 1)).sum() / total
        by_chance = (each * (each - 1)).sum() / (total * (total - 1))
        return float(alike), float(1 - (1 - alike) / (1 - by_chance))


def ratings_table(counts: np.ndarray) -> str:
    """Markdown table of the choices, the wins and the raters' agreement. Counts [N, 4]"""
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
