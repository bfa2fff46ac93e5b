"""The files that an evaluation leaves: scores, their intervals, and what was answered to every question."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rqa.evaluation.metrics import bleu, bleu_statistics, is_localrqa_name
from rqa.evaluation.report import ARGUMENTS, DETAILS, PREDICTIONS, SCORES, figure, write_report
from rqa.evaluation.runtime import machine, peak_memory
from rqa.evaluation.statistics import interval, mean_intervals, statistic_samples
from rqa.runtime import distributed
from rqa.runtime.files import write_json, write_jsonl
from rqa.runtime.flags import given


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
