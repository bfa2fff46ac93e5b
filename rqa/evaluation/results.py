"""The files that an evaluation leaves: scores, their intervals, and what was answered to every question."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rqa.evaluation.metrics import bleu, bleu_statistics
from rqa.evaluation.report import ARGUMENTS, DETAILS, PREDICTIONS, SCORES, figure, other_figures, write_report
from rqa.evaluation.runtime import machine, peak_memory
from rqa.runtime import distributed
from rqa.runtime.files import write_json, write_jsonl
from rqa.runtime.flags import Arguments

RESAMPLES = 10_000
LEVEL = 0.95
CHUNK = 2**22  # resampled counts held at once


def mean_intervals(values: np.ndarray) -> np.ndarray:
    """95 % intervals of the means over n questions, from resampled questions (Efron 1979, percentiles).

    Rates that are 0 for all questions, or 1 for all, would get an interval without width, which claims a certainty that
    nobody has: theirs is the exact binomial one (Clopper & Pearson 1934).

    Args:
        values: Scores between 0 and 1 of each question; each column is a metric. [n, M]

    Returns:
        Lower and upper ends. [M, 2]
    """
    ends = difference_intervals(values)
    margin = 1 - ((1 - LEVEL) / 2) ** (1 / len(values))
    ends[(values == 0).all(axis=0)] = (0, margin)
    ends[(values == 1).all(axis=0)] = (1 - margin, 1)
    return ends


def difference_intervals(differences: np.ndarray) -> np.ndarray:
    """95 % intervals of the mean difference of two systems on the same n questions (paired bootstrap). [n, M] -> [M, 2]

    Source: Koehn (2004), Statistical significance tests for machine translation evaluation.
    """
    n = len(differences)
    return interval(np.concatenate([counts @ differences for counts in _resampled(n, RESAMPLES)]) / n)


def statistic_samples(statistics: np.ndarray, score: Callable[[np.ndarray], float]) -> np.ndarray:
    """A score of statistics summed over n questions, such as BLEU, with 1,000 resamples. [n, S] -> [1000]

    The same questions are drawn for the same n, so that the samples of two systems may be subtracted.
    """
    sums = (sample for counts in _resampled(len(statistics), 1000) for sample in counts @ statistics)
    return np.array([score(sample) for sample in sums])


def interval(samples: np.ndarray) -> np.ndarray:
    """The ends between which 95 % of the samples lie. [R] -> [2], [R, M] -> [M, 2]"""
    return np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).T


def _resampled(n: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each question was drawn, the same at every call. -> chunks of [r, n]"""
    chance = np.random.default_rng(0)
    size = max(1, min(resamples, CHUNK // n))
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn = chance.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def write_results(
    directory: str | Path, scores: dict[str, float], rows: Sequence[dict[str, Any]], flags: Arguments | None = None
) -> str:
    """`score.json`, `score_details.json`, `test-predictions.jsonl` and `report.html`, by the main process.

    Args:
        scores: Numbers by name, `test_gen/f1` and so on.
        rows: One a question, with its `scores` by name, `gen/f1` and so on.
        flags: For `all_args.json`; a trainer wrote its own.

    Returns:
        The scores with their intervals as a Markdown table.
    """
    intervals = with_intervals(rows)
    if distributed.is_main():
        directory = Path(directory)
        if flags:
            write_json(directory / ARGUMENTS, flags.to_json())
        write_json(directory / SCORES, scores)
        details = {"scores": intervals, "peak_memory_gib": peak_memory(), "machine": machine()}
        write_json(directory / DETAILS, details)
        write_jsonl(directory / PREDICTIONS, rows)
        write_report(directory)
    return markdown_table(scores, intervals)


def with_intervals(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each rate's value, number of questions and 95 % bootstrap interval, by the names of the test file's scores.

    Args:
        rows: One a question, with its `scores`; those without one of the scores do not count for it.
    """
    holders: dict[str, list[int]] = {}  # the questions that have a rate
    for number, row in enumerate(rows):
        for name in row["scores"]:
            holders.setdefault(name, []).append(number)
    details: dict[str, dict[str, Any]] = {}
    for numbers in dict.fromkeys(map(tuple, holders.values())):  # rates of the same questions are resampled together
        names = [name for name, holder in holders.items() if tuple(holder) == numbers]
        values = np.array([[rows[i]["scores"][name] for name in names] for i in numbers], dtype=np.float64)  # [n, M]
        for name, mean, (low, high) in zip(names, values.mean(0), mean_intervals(values), strict=True):
            details[f"test_{name}"] = {"value": float(mean), "n": len(numbers), "low": float(low), "high": float(high)}
    if statistics := answer_statistics(rows):
        low, high = interval(statistic_samples(np.array(statistics), bleu)).tolist()
        value = bleu(np.sum(statistics, axis=0))
        details["test_gen/bleu"] = {"value": value, "n": len(statistics), "low": low, "high": high}
    return details


def answer_statistics(rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    """What BLEU needs of each generated answer. [n, 10]"""
    return [
        bleu_statistics(row["generated_answer"], row["gold_answer"])
        for row in rows
        if "generated_answer" in row and "gold_answer" in row
    ]


def markdown_table(scores: dict[str, float], details: dict[str, dict[str, Any]]) -> str:
    """Every score in a table to paste: rates with their interval and number of questions, then the other figures."""
    lines = ["| metric | value | 95 % interval | questions |", "|---|---:|---:|---:|"]
    for name, row in details.items():
        lines.append(f"| {name} | {row['value']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {row['n']} |")
    lines += [f"| {name} | {figure(value)} | | |" for name, value in other_figures(scores, details).items()]
    return "\n".join(lines)
