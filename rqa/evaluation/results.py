"""Files that an evaluation writes: scores with their intervals, and the answer to every question."""

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
Rows = Sequence[dict[str, Any]]  # one row per question
Rates = dict[str, dict[str, Any]]  # name -> value, n, low and high

LEVEL = 0.95
CHUNK = 2**22  # resampled counts in memory at once


def mean_intervals(values: np.ndarray) -> np.ndarray:
    """95 % intervals of means over n questions, by the percentile bootstrap (Efron 1979).

    If a score is 0 for all questions, or 1 for all, the bootstrap interval would have no width; it gets the exact
    binomial interval instead (Clopper & Pearson 1934). Scores [n, M] -> lower and upper ends [M, 2]
    """
    ends = difference_intervals(values)
    margin = 1 - ((1 - LEVEL) / 2) ** (1 / len(values))
    ends[(values == 0).all(axis=0)] = (0, margin)
    ends[(values == 1).all(axis=0)] = (1 - margin, 1)
    return ends


def difference_intervals(differences: np.ndarray) -> np.ndarray:
    """95 % intervals of mean differences over n questions, by the paired bootstrap (Koehn 2004). [n, M] -> [M, 2]"""
    n = len(differences)
    return interval(np.concatenate([counts @ differences for counts in resampled(n, 10_000)]) / n)


def interval(samples: np.ndarray) -> np.ndarray:
    """The interval that holds the central 95 % of the samples. [R] -> [2], [R, M] -> [M, 2]"""
    return np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).T


def resampled(n: int, resamples: int) -> Iterator[np.ndarray]:
    """Yield how often each question is drawn in each resample, the same at every call. -> chunks of [r, n]"""
    random = np.random.default_rng(0)
    size = max(1, min(resamples, CHUNK // n))
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn = random.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def write_results(
    directory: str | Path, scores: Scores, rows: Rows, flags: Arguments | None = None, others: Rates | None = None
) -> str:
    """Write `score.json`, `score_details.json`, `test-predictions.jsonl` and `report.html`. -> a Markdown table

    `scores` has names such as `test_gen/f1`, a row's `scores` such as `gen/f1`. `flags` go to `all_args.json`, or to
    `eval_args.json` if a trainer's are there. `others` are scores that are not means over questions, such as BLEU.
    """
    intervals = with_intervals(rows) | (others or {})
    if distributed.is_main():
        directory = Path(directory)
        details = {"scores": intervals, "peak_memory_gib": peak_memory(), "machine": machine()}
        values: dict[str, Any] = {SCORES: scores, DETAILS: details}
        if flags:
            trained = all((directory / name).exists() for name in ("trainer_state.json", ARGUMENTS))
            values["eval_args.json" if trained else ARGUMENTS] = flags.to_json()
        with atomic_files(directory, [*values, PREDICTIONS, REPORT]) as places:
            for name, value in values.items():
                write_json(places[name], value)
            write_jsonl(places[PREDICTIONS], rows)
            write_report(directory, places)
    return markdown_table(scores, intervals)


def with_intervals(rows: Rows) -> Rates:
    """The mean of each score over the rows that have it, with its 95 % bootstrap interval."""
    every = dict.fromkeys(name for row in rows for name in row["scores"])
    questions = {name: tuple(i for i, row in enumerate(rows) if name in row["scores"]) for name in every}
    details: Rates = {}
    for numbers in dict.fromkeys(questions.values()):  # scores of the same questions are resampled together
        names = [name for name, those in questions.items() if those == numbers]
        values = np.array([[rows[i]["scores"][name] for name in names] for i in numbers], dtype=np.float64)  # [n, M]
        for name, mean, (low, high) in zip(names, values.mean(0), mean_intervals(values), strict=True):
            details[f"test_{name}"] = {"value": float(mean), "n": len(numbers), "low": float(low), "high": float(high)}
    return details


def markdown_table(scores: Scores, details: Rates) -> str:
    """Markdown table of all scores: rates with their intervals and numbers of questions, then the other figures."""
    lines = ["| metric | value | 95 % interval | questions |", "|---|---:|---:|---:|"]
    for name, row in details.items():
        lines.append(f"| {name} | {row['value']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {row['n']} |")
    lines += [f"| {name} | {figure(value)} | | |" for name, value in other_figures(scores, details).items()]
    return "\n".join(lines)
