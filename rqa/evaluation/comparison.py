"""Two systems on the same questions: what differs, and whether it can be told from chance."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rqa.evaluation.metrics import bleu
from rqa.evaluation.report import PREDICTIONS
from rqa.evaluation.results import answer_statistics, difference_intervals, interval, is_telling, statistic_samples
from rqa.runtime.errors import UserError
from rqa.runtime.files import read_jsonl

Row = dict[str, Any]
SIDES = 0.5  # a score from here on is on the right side
HEADLINES = ("gen/f1", "retr/recall@4")


@dataclass(frozen=True)
class Difference:
    """One metric of A and B.

    Attributes:
        low, high: The 95 % interval of B - A, by a paired bootstrap.
        questions: Those that have the metric.
        changed: Of those, the ones whose score is not the same.
    """

    name: str
    first: float
    second: float
    low: float
    high: float
    questions: int
    changed: int

    @property
    def telling(self) -> bool:
        """Whether it can be told from chance."""
        return is_telling(self.low, self.high, self.changed)

    def sentence(self) -> str:
        """What a reader wants to know."""
        gap = round(self.second - self.first, 3)
        direction = "higher" if gap > 0 else "lower"
        subject = f"{abs(gap):.3f} {direction} than" if gap else "the same as"
        verdict = "this is more than chance" if self.telling else "this cannot be told from chance"
        return (
            f"B's {self.name} is {subject} A's (95 % interval {self.low:+.3f} to {self.high:+.3f}, "
            f"{self.questions} questions, {self.changed} of them changed): {verdict}."
        )


def read_predictions(run: str | Path) -> list[Row]:
    """The rows that an evaluation left in its output directory, or in the file itself.

    Raises:
        UserError: there are none, or they have no scores.
    """
    path = Path(run) / PREDICTIONS if Path(run).is_dir() else Path(run)
    rows = []
    for line, row in read_jsonl(path):
        if not isinstance(row.get("scores"), dict) or not isinstance(row.get("question"), str):
            raise UserError(f"{path}:{line}: has no 'question' with 'scores'; evaluate the run again")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no predictions")
    return rows


def pair(first: Sequence[Row], second: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows of the same question, whatever their order: same history, same question, same gold.

    Raises:
        UserError: one has questions that the other has not.
    """
    sides = [_by_question(rows) for rows in (first, second)]
    for name, ours, theirs in (("A", *sides), ("B", *sides[::-1])):
        extra = [rows[0]["question"] for key, rows in ours.items() if len(rows) > len(theirs.get(key, ()))]
        if extra:
            raise UserError(
                f"the runs answer different questions: {len(extra)} only in {name}, such as {extra[0][:80]!r}; "
                "evaluate both on the same file"
            )
    return [both for key, rows in sides[0].items() for both in zip(rows, sides[1][key], strict=True)]


def compare(pairs: Sequence[tuple[Row, Row]]) -> list[Difference]:
    """Every metric that both have, by name in A's order, then BLEU."""
    names = dict.fromkeys(name for row, _ in pairs for name in row["scores"])
    found = [_difference(name, [both for both in pairs if all(name in row["scores"] for row in both)])
             for name in names]  # fmt: skip
    return [difference for difference in found if difference] + _bleu_difference(pairs)


def changed_sides(pairs: Sequence[tuple[Row, Row]], name: str) -> tuple[list[Row], list[Row]]:
    """The rows of B that it gained, and those it lost: 0.5 or more in one run, less in the other."""
    scored = [(row, *(r["scores"][name] >= SIDES for r in (other, row))) for other, row in pairs
              if name in other["scores"] and name in row["scores"]]  # fmt: skip
    gained = [row for row, before, after in scored if after and not before]
    return gained, [row for row, before, after in scored if before and not after]


def headline(differences: Sequence[Difference], name: str | None) -> Difference:
    """The metric that decides: the one named, or token F1, or Recall@4, or the first.

    Raises:
        UserError: the runs do not both have it.
    """
    known = {difference.name: difference for difference in differences}
    if name is not None and name not in known:
        raise UserError(f"--metric {name}: not in both runs; choose one of {', '.join(known) or 'none'}")
    if not known:
        raise UserError("the runs have no score in common; evaluate both in the same way")
    return known[name or next((n for n in HEADLINES if n in known), differences[0].name)]


def _by_question(rows: Sequence[Row]) -> dict[Any, list[Row]]:
    questions = defaultdict(list)
    for row in rows:
        turns = tuple((turn["speaker"], turn["message"]) for turn in row.get("chat_history") or ())
        gold = frozenset(
            (str(document.get("metadata", {}).get("source", "")), document["page_content"])
            for document in row.get("gold_docs") or ()
        )
        questions[row["question"], turns, gold, row.get("gold_answer")].append(row)
    return questions


def _difference(name: str, pairs: Sequence[tuple[Row, Row]]) -> Difference | None:
    if not pairs:
        return None
    scores = np.array([[row["scores"][name] for row in both] for both in pairs], dtype=np.float64)  # [n, 2]
    differences = scores[:, 1] - scores[:, 0]
    low, high = difference_intervals(differences[:, None])[0].tolist()
    return Difference(name, *scores.mean(axis=0).tolist(), low, high, len(pairs), int(np.count_nonzero(differences)))


def _bleu_difference(pairs: Sequence[tuple[Row, Row]]) -> list[Difference]:
    first, second = (np.array(answer_statistics(rows)) for rows in zip(*pairs, strict=True))
    if len(first) != len(pairs) or len(second) != len(pairs):
        return []
    low, high = interval(statistic_samples(second, bleu) - statistic_samples(first, bleu))
    changed = int((first != second).any(axis=1).sum())
    return [Difference("gen/bleu", bleu(first.sum(0)), bleu(second.sum(0)), low, high, len(pairs), changed)]
