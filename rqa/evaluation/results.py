"""The files that an evaluation leaves: scores, their intervals, and what was answered to every question."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rqa.evaluation.metrics import bleu, bleu_statistics, is_localrqa_name
from rqa.evaluation.report import ARGUMENTS, DETAILS, PREDICTIONS, SCORES, figure, write_report
from rqa.evaluation.runtime import machine, peak_memory
from rqa.runtime import distributed
from rqa.runtime.files import write_json, write_jsonl
from rqa.runtime.flags import given

RESAMPLES = 10_000
LEVEL = 0.95
CHUNK = 2**22  # resampled counts held at once
TELLING = 6  # a sign test calls five questions that all changed one way chance: 2 * 0.5**5 > 0.05


def mean_intervals(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """95 % intervals of the means over n questions, from resampled questions (Efron 1979, percentiles).

    Rates that are 0 for all questions, or 1 for all, would get an interval without width, which claims a certainty that
    nobody has: theirs is the exact binomial one (Clopper & Pearson 1934).

    Args:
        values: Scores between 0 and 1 of each question; each column is a metric. [n, M]

    Returns:
        Lower and upper ends. [M, 2]
    """
    n = len(values)
    means = np.concatenate([counts @ values for counts in _resampled(n, seed)]) / n  # [R, M]
    ends = _ends(means)
    margin = 1 - ((1 - LEVEL) / 2) ** (1 / n)
    ends[(values == 0).all(axis=0)] = (0, margin)
    ends[(values == 1).all(axis=0)] = (1 - margin, 1)
    return ends


def difference_intervals(differences: np.ndarray, seed: int = 0) -> np.ndarray:
    """95 % intervals of the mean difference of two systems on the same n questions (paired bootstrap). [n, M] -> [M, 2]

    Source: Koehn (2004), Statistical significance tests for machine translation evaluation.
    """
    n = len(differences)
    return _ends(np.concatenate([counts @ differences for counts in _resampled(n, seed)]) / n)


def statistic_samples(
    statistics: np.ndarray, score: Callable[[np.ndarray], float], seed: int = 0, resamples: int = 1000
) -> np.ndarray:
    """A score of statistics summed over n questions, such as BLEU, on resampled questions. [n, S] -> [R]

    The same seed and n resample the same questions, so that the samples of two systems may be subtracted.
    """
    sums = (sample for counts in _resampled(len(statistics), seed, resamples) for sample in counts @ statistics)
    return np.array([score(sample) for sample in sums])


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The ends between which 95 % of the samples lie. [R]"""
    low, high = _ends(samples[:, None])[0]
    return float(low), float(high)


def is_telling(low: float, high: float, changed: int) -> bool:
    """Whether a difference can be told from chance: its interval excludes 0, and enough questions changed.

    Fewer than six changed questions tell nothing, whatever the bootstrap says: it cannot draw what it never saw.
    """
    return changed >= TELLING and (low > 0 or high < 0)


def _resampled(n: int, seed: int, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """How often each question was drawn. -> chunks of [r, n]"""
    chance = np.random.default_rng(seed)
    size = max(1, min(resamples, CHUNK // n))
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn = chance.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _ends(samples: np.ndarray) -> np.ndarray:
    """[R, M] -> [M, 2]"""
    return np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).T


def write_results(
    directory: str | Path, scores: dict[str, float], rows: Sequence[dict[str, Any]], arguments: Sequence[Any] = ()
) -> str:
    """`score.json`, `score_details.json`, `test-predictions.jsonl` and `report.html`, by the main process.

    Args:
        scores: Numbers by name, `test_gen/f1` and so on.
        rows: One a question, with its `scores` by name, `gen/f1` and so on.
        arguments: Every dataclass, for `all_args.json`; a trainer wrote its own. API keys are left out.

    Returns:
        The scores with their intervals as a Markdown table.
    """
    intervals = with_intervals(rows)
    if distributed.is_main():
        Path(directory).mkdir(parents=True, exist_ok=True)
        if arguments:
            write_json(Path(directory) / ARGUMENTS, given(arguments))
        write_json(Path(directory) / SCORES, scores)
        details = {"scores": intervals, "peak_memory_gib": peak_memory(), "machine": machine()}
        write_json(Path(directory) / DETAILS, details)
        write_jsonl(Path(directory) / PREDICTIONS, rows)
        write_report(directory)
    return markdown_table(scores, intervals)


def with_intervals(rows: Sequence[dict[str, Any]], prefix: str = "test_") -> dict[str, dict[str, Any]]:
    """Each rate's value, number of questions and 95 % bootstrap interval.

    Args:
        rows: One a question, with its `scores`; those without one of the scores do not count for it.
    """
    details: dict[str, dict[str, Any]] = {}
    for names, chosen in _by_scores(rows):
        values = np.array([[row["scores"][name] for name in names] for row in chosen], dtype=np.float64)  # [n, M]
        for name, mean, ends in zip(names, values.mean(axis=0), mean_intervals(values), strict=True):
            details[prefix + name] = _detail(float(mean), len(chosen), ends.tolist())
    if statistics := answer_statistics(rows):
        samples = statistic_samples(np.array(statistics), bleu)
        details[f"{prefix}gen/bleu"] = _detail(bleu(np.sum(statistics, axis=0)), len(statistics), interval(samples))
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
    others = [name for name in scores if name not in details and not is_localrqa_name(name)]
    lines += [f"| {name} | {figure(scores[name])} | | |" for name in others]
    return "\n".join(lines)


def _by_scores(rows: Sequence[dict[str, Any]]) -> list[tuple[list[str], list[dict[str, Any]]]]:
    """Rates that the same questions have, with those questions: each group is resampled together."""
    holders: dict[str, tuple[int, ...]] = {}
    for number, row in enumerate(rows):
        for name in row.get("scores", {}):
            holders[name] = (*holders.get(name, ()), number)
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, numbers in holders.items():
        groups.setdefault(numbers, []).append(name)
    return [(names, [rows[number] for number in numbers]) for numbers, names in groups.items()]


def _detail(value: float, questions: int, ends: Sequence[float]) -> dict[str, Any]:
    return {"value": value, "n": questions, "low": ends[0], "high": ends[1]}
