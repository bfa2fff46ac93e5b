"""The files that an evaluation leaves: scores, their intervals, and what was answered to every question."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rqa.evaluation.report import ARGUMENTS, DETAILS, PREDICTIONS, REPORT, SCORES, figure, other_figures, write_report
from rqa.evaluation.runtime import machine, peak_memory
from rqa.runtime import distributed
from rqa.runtime.files import atomic_files, write_json, write_jsonl
from rqa.runtime.flags import Arguments

Scores = dict[str, float]
Rows = Sequence[dict[str, Any]]  # one a question
Rates = dict[str, dict[str, Any]]  # value, n, low and high by the names of the test file's scores

LEVEL = 0.95
CHUNK = 2**22  # resampled counts held at once


def mean_intervals(values: np.ndarray) -> np.ndarray:
    """95 % intervals of the means over n questions, from resampled questions (Efron 1979, percentiles).

    Rates that are 0 for all questions, or 1 for all, would get an interval without width, which claims a certainty that
    nobody has: theirs is the exact binomial one (Clopper & Pearson 1934). Scores [n, M] -> lower and upper ends [M, 2]
    """
    ends = difference_intervals(values)
    margin = 1 - ((1 - LEVEL) / 2) ** (1 / len(values))
    ends[(values == 0).all(axis=0)] = (0, margin)
    ends[(values == 1).all(axis=0)] = (1 - margin, 1)
    return ends


def difference_intervals(differences: np.ndarray) -> np.ndarray:
    """95 % intervals of two systems' mean difference on n questions (Koehn 2004, paired bootstrap). [n, M] -> [M, 2]"""
    n = len(differences)
    return interval(np.concatenate([counts @ differences for counts in resampled(n, 10_000)]) / n)


def interval(samples: np.ndarray) -> np.ndarray:
    """The ends between which 95 % of the samples lie. [R] -> [2], [R, M] -> [M, 2]"""
    return np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).T


def resampled(n: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each question was drawn, the same at every call. -> chunks of [r, n]"""
    chance = np.random.default_rng(0)
    size = max(1, min(resamples, CHUNK // n))
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn = chance.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def write_results(
    directory: str | Path, scores: Scores, rows: Rows, flags: Arguments | None = None, others: Rates | None = None
) -> str:
    """`score.json`, `score_details.json`, `test-predictions.jsonl` and `report.html`, by the main process. -> a table

    `scores` has `test_gen/f1` and so on, a row's own `scores` `gen/f1`. `flags` go to `all_args.json`, or beside a
    trainer's to `eval_args.json`. `others` are scores that are no means over questions, such as BLEU.
    """
    intervals = with_intervals(rows) | (others or {})
    if distributed.is_main():
        directory = Path(directory)
        details = {"scores": intervals, "peak_memory_gib": peak_memory(), "machine": machine()}
        values: dict[str, Any] = {SCORES: scores, DETAILS: details}
        if flags:  # a trainer's arguments stay
            trained = all((directory / name).exists() for name in ("trainer_state.json", ARGUMENTS))
            values["eval_args.json" if trained else ARGUMENTS] = flags.to_json()
        with atomic_files(directory, [*values, PREDICTIONS, REPORT]) as places:
            for name, value in values.items():
                write_json(places[name], value)
            write_jsonl(places[PREDICTIONS], rows)
            write_report(directory, places)
    return markdown_table(scores, intervals)


def with_intervals(rows: Rows) -> Rates:
    """Each rate with its 95 % bootstrap interval; a row without one of the scores does not count for it."""
    every = dict.fromkeys(name for row in rows for name in row["scores"])
    holders = {name: tuple(i for i, row in enumerate(rows) if name in row["scores"]) for name in every}
    details: Rates = {}
    for numbers in dict.fromkeys(holders.values()):  # rates of the same questions are resampled together
        names = [name for name, holder in holders.items() if holder == numbers]
        values = np.array([[rows[i]["scores"][name] for name in names] for i in numbers], dtype=np.float64)  # [n, M]
        for name, mean, (low, high) in zip(names, values.mean(0), mean_intervals(values), strict=True):
            details[f"test_{name}"] = {"value": float(mean), "n": len(numbers), "low": float(low), "high": float(high)}
    return details


def markdown_table(scores: Scores, details: Rates) -> str:
    """Every score in a table to paste: rates with their interval and number of questions, then the other figures."""
    lines = ["| metric | value | 95 % interval | questions |", "|---|---:|---:|---:|"]
    for name, row in details.items():
        lines.append(f"| {name} | {row['value']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {row['n']} |")
    lines += [f"| {name} | {figure(value)} | | |" for name, value in other_figures(scores, details).items()]
    return "\n".join(lines)
