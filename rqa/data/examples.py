"""Examples: questions with their gold passages and, for readers, their gold answer. LocalRQA's JSONL."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rqa.data.documents import Document, parse_document
from rqa.runtime.errors import UserError
from rqa.runtime.files import read_jsonl, write_jsonl

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """One message of the conversation before the question."""

    speaker: str
    message: str


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        question: The question to answer.
        gold_docs: The passages that answer it.
        gold_answer: The reference answer; None in files for retrievers.
        other_answers: What would be as right, such as another spelling.
        chat_history: What was said before, oldest first.
        hard_neg_docs: Passages that look right and are not.
        ctxs: Passages of an earlier retrieval, best first (DCA); `ctx_scores` are their reader scores, if given.
        where: File and line, for messages.
    """

    question: str
    gold_docs: tuple[Document, ...] = ()
    gold_answer: str | None = None
    chat_history: tuple[Turn, ...] = ()
    hard_neg_docs: tuple[Document, ...] = ()
    ctxs: tuple[Document, ...] = ()
    ctx_scores: tuple[float, ...] | None = None
    other_answers: tuple[str, ...] = ()
    where: str = field(default="", compare=False)

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "question": self.question,
            "chat_history": [{"speaker": turn.speaker, "message": turn.message} for turn in self.chat_history],
            "gold_docs": [document.to_json() for document in self.gold_docs],
        }
        if self.gold_answer is not None:
            row["gold_answer"] = self.gold_answer
        if self.other_answers:
            row["other_answers"] = list(self.other_answers)
        if self.hard_neg_docs:
            row["hard_neg_docs"] = [document.to_json() for document in self.hard_neg_docs]
        if self.ctxs:
            row["ctxs"] = [document.to_json() for document in self.ctxs]
            for context, score in zip(row["ctxs"], self.ctx_scores or (), strict=False):
                context["score"] = score
        return row


def read_examples(path: str | Path, answers: bool = False) -> list[Example]:
    """Read examples; a row with several `questions` becomes one example each.

    Generated data holds blank questions and answers: those are reported by line and left out.

    Args:
        path: A `.jsonl` file.
        answers: Whether every row must have a `gold_answer`.

    Raises:
        UserError: the file is missing or empty, or a field is missing or of the wrong type.
    """
    examples = list(iterate_examples(path, answers))
    if not examples:
        raise UserError(f"{path}: holds no examples")
    return examples


def iterate_examples(path: str | Path, answers: bool = False) -> Iterator[Example]:
    """What `read_examples` reads, one line in memory at a time.

    Raises:
        UserError: the file is missing, or a field is missing or of the wrong type.
    """
    for line, row in read_jsonl(path):
        for example in _parse_row(row, f"{path}:{line}", answers):
            blank = [name for name, text in (("question", example.question), ("gold_answer", example.gold_answer))
                     if text is not None and not text.strip()]  # fmt: skip
            if blank:
                log.warning("%s: field '%s' is blank; the example is left out", example.where, blank[0])
            else:
                yield example


def write_examples(path: str | Path, examples: Iterable[Example]) -> None:
    """Write one example a line, atomically."""
    write_jsonl(path, (example.to_json() for example in examples))


def _parse_row(row: dict[str, Any], where: str, answers: bool) -> list[Example]:
    questions = row["questions"] if "questions" in row else [row.get("question")]
    if not isinstance(questions, list) or not questions:
        raise UserError(f"{where}: field 'questions' must be a list of questions")
    if not all(isinstance(question, str) for question in questions):
        name = "questions" if "questions" in row else "question"
        raise UserError(f"{where}: field '{name}' must be a string")
    answer = row.get("gold_answer")
    if not isinstance(answer, str) and (answers or answer is not None):
        raise UserError(f"{where}: field 'gold_answer' must be a string")
    if answers and len(questions) > 1:
        raise UserError(f"{where}: one 'gold_answer' cannot answer several 'questions'; write a line for each")
    others = _list(row, "other_answers", where)
    if not all(isinstance(other, str) for other in others):
        raise UserError(f"{where}: field 'other_answers' must hold strings")
    contexts = _list(row, "ctxs", where)
    scores = [context.get("score") for context in contexts if isinstance(context, dict)]
    scored = bool(scores) and all(isinstance(score, int | float) for score in scores)
    common: dict[str, Any] = {
        "gold_docs": _documents(row, "gold_docs", where),
        "gold_answer": answer,
        "chat_history": tuple(_turn(turn, where) for turn in _list(row, "chat_history", where)),
        "hard_neg_docs": _documents(row, "hard_neg_docs", where),
        "ctxs": _documents(row, "ctxs", where),
        "ctx_scores": tuple(map(float, scores)) if scored else None,
        "other_answers": tuple(others),
        "where": where,
    }
    return [Example(question, **common) for question in questions]


def _list(row: dict[str, Any], name: str, where: str) -> list[Any]:
    value = row.get(name) or []
    if not isinstance(value, list):
        raise UserError(f"{where}: field '{name}' must be a list")
    return value


def _documents(row: dict[str, Any], name: str, where: str) -> tuple[Document, ...]:
    return tuple(parse_document(value, f"{where}: field '{name}'") for value in _list(row, name, where))


def _turn(value: Any, where: str) -> Turn:
    if not isinstance(value, dict) or not all(isinstance(value.get(k), str) for k in ("speaker", "message")):
        raise UserError(f"{where}: field 'chat_history' must hold objects with 'speaker' and 'message'")
    return Turn(value["speaker"], value["message"])
