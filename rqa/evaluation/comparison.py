"""Comparison of two systems on the same questions: differences, and whether they are significant."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rqa.data import parse_document, parse_example
from rqa.evaluation.metrics import answer_statistics, bleu, bleu_samples
from rqa.evaluation.report import DECISIVE, PREDICTIONS, RIGHT
from rqa.evaluation.results import difference_intervals, interval
from rqa.runtime.errors import UserError
from rqa.runtime.files import read_jsonl

Row = dict[str, Any]
MIN_CHANGED = 6  # by a sign test, five questions that all change the same way are not significant: 2 * 0.5**5 > 0.05


@dataclass(frozen=True)
class Difference:
    """One metric of A and B."""

    name: str
    first: float
    second: float
    low: float  # 95 % interval of B - A, by a paired bootstrap
    high: float
    questions: int  # number of questions that have the metric
    changed: int  # number of those with different scores
    verb: str = "changed"  # describes those in `sentence`

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0 and enough questions changed (with few, a bootstrap is overconfident)."""
        return self.changed >= MIN_CHANGED and (self.low > 0 or self.high < 0)

    def sentence(self) -> str:
        gap = round(self.second - self.first, 3)
        subject = f"{abs(gap):.3f} {'higher' if gap > 0 else 'lower'} than" if gap else "the same as"
        how = f"{self.low:+.3f} to {self.high:+.3f}, {self.questions} questions, {self.changed} of them {self.verb}"
        verdict = "this is significant" if self.significant else "this is not significant"
        return f"B's {self.name} is {subject} A's (95 % interval {how}): {verdict}."


def read_predictions(run: str | Path) -> list[Row]:
    """Read the rows of an evaluation from its output directory or its file of predictions."""
    path = Path(run) / PREDICTIONS if Path(run).is_dir() else Path(run)
    rows = []
    for line, row in read_jsonl(path):
        scores, answer = row.get("scores"), row.get("generated_answer", "")
        numbers = scores.values() if isinstance(scores, dict) else [None]
        if not isinstance(answer, str) or not all(isinstance(number, int | float) for number in numbers):
            raise UserError(f"{path}:{line}: not a question with 'scores'; evaluate the run again")
        parse_example(row, f"{path}:{line}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no predictions")
    return rows


def pair(first: Sequence[Row], second: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Pair the rows of equal questions, in any order: their history, question and gold must be the same."""
    sides: tuple[dict[Any, list[Row]], ...] = (defaultdict(list), defaultdict(list))
    for side, rows in zip(sides, (first, second), strict=True):
        for row in rows:
            example = parse_example(row, "a prediction")[0]
            gold = frozenset(document.key for document in example.gold_docs)
            side[example.question, example.chat_history, gold, example.gold_answer].append(row)
    for name, ours, theirs in (("A", *sides), ("B", *sides[::-1])):
        if extra := [rows[0]["question"] for key, rows in ours.items() if len(rows) > len(theirs.get(key, ()))]:
            only = f"{len(extra)} only in {name}, such as {extra[0][:80]!r}"
            raise UserError(f"the runs answer different questions, {only}; evaluate both on the same file")
    return [both for key, rows in sides[0].items() for both in zip(rows, sides[1][key], strict=True)]


def shown(row: Row, run: str) -> dict[str, Any]:
    """The part of a prediction that raters see: {"answer", "passages": [{"title", "text"}, ...]}."""
    if "generated_answer" not in row:
        raise UserError(f"{run}: {row['question'][:80]!r} has no 'generated_answer'; name runs of bin/evaluate_rqa")
    passages = []
    for value in row.get("retrieved_docs", ()):
        document = parse_document(value, f"{run}: field 'retrieved_docs'")
        title = str(document.metadata.get("title") or document.metadata.get("source", ""))
        passages.append({"title": title, "text": document.page_content})
    return {"answer": row["generated_answer"], "passages": passages}


def compare(pairs: Sequence[tuple[Row, Row]]) -> list[Difference]:
    """Compare the systems by every metric that both have, in A's order, then by BLEU."""
    differences = []
    rows = [(a["scores"], b["scores"]) for a, b in pairs]
    for name in dict.fromkeys(name for a, _ in rows for name in a):
        scores = np.array([(a[name], b[name]) for a, b in rows if name in a and name in b], dtype=float)  # [n, 2]
        if len(scores):
            gaps = scores[:, 1] - scores[:, 0]
            ends, changed = difference_intervals(gaps[:, None])[0].tolist(), int(np.count_nonzero(gaps))
            differences.append(Difference(name, *scores.mean(axis=0).tolist(), *ends, len(scores), changed))
    first, second = (np.array(answer_statistics(rows)) for rows in zip(*pairs, strict=True))
    if len(first) == len(second) == len(pairs):
        ends = interval(bleu_samples(second) - bleu_samples(first)).tolist()
        changed = int((first != second).any(axis=1).sum())
        differences.append(Difference("gen/bleu", bleu(first.sum(0)), bleu(second.sum(0)), *ends, len(pairs), changed))
    return differences


def changed_sides(pairs: Sequence[tuple[Row, Row]], name: str) -> tuple[list[Row], list[Row]]:
    """B's rows of the questions that it gained, and that it lost: one run scored 0.5 or more, the other less."""
    scored = [(a["scores"], b["scores"], b) for a, b in pairs]
    sides = [(row, a[name] >= RIGHT, b[name] >= RIGHT) for a, b, row in scored if name in a and name in b]
    gained = [row for row, before, after in sides if after and not before]
    return gained, [row for row, before, after in sides if before and not after]


def headline(differences: Sequence[Difference], name: str | None) -> Difference:
    """The difference in the decisive metric: the named one, or token F1, or Recall@4, or the first."""
    known = {difference.name: difference for difference in differences}
    if name is not None and name not in known:
        raise UserError(f"--metric {name}: not in both runs; choose one of {', '.join(known) or 'none'}")
    if not known:
        raise UserError("the runs have no metric in common; evaluate both in the same way")
    return known[name or next((n for n in DECISIVE if n in known), differences[0].name)]
