"""Passages, questions and answers, and LocalRQA's files of passages and questions."""

import logging
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from rqa.runtime.errors import UserError
from rqa.runtime.files import read_jsonl, write_jsonl
from rqa.runtime.flags import Arguments, flag
from rqa.runtime.text import plain

log = logging.getLogger(__name__)

T = TypeVar("T")
PASSAGES = ("gold_docs", "hard_neg_docs", "ctxs")  # fields of an example that hold documents


@dataclass(kw_only=True)
class DocumentArguments(Arguments):
    """The document database."""

    document_path: str = flag(help="Document database: .jsonl(.gz), or LocalRQA's .pkl.")


@dataclass(frozen=True, slots=True)
class Document:
    """A passage of the database."""

    page_content: str
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)  # at least `source`, usually `title`
    formatted: str = ""  # a separate text for models; "" for the usual source, title and content

    def __post_init__(self) -> None:
        if self.formatted == format_content(self.page_content, self.metadata):
            object.__setattr__(self, "formatted", "")  # a copy would double the memory of examples

    @property
    def fmt_content(self) -> str:
        """The text for models and indexes: by default source, title and content."""
        return self.formatted or format_content(self.page_content, self.metadata)

    @property
    def key(self) -> tuple[str, str]:
        """Source and content, which identify a document."""
        return str(self.metadata.get("source", "")), self.page_content

    @property
    def gain(self) -> float:
        """The relevance of a gold passage for nDCG: a positive `metadata.gold_gain`, or else 1."""
        gain = self.metadata.get("gold_gain")
        return gain if isinstance(gain, int | float) and gain > 0 else 1.0

    def graded(self, gain: float) -> "Document":
        """The same document with this gain."""
        return self if gain == self.gain else replace(self, metadata=self.metadata | {"gold_gain": gain})

    def to_json(self) -> dict[str, Any]:
        row = {"page_content": self.page_content, "metadata": self.metadata}
        return row | {"fmt_content": self.formatted} if self.formatted else row


def format_content(page_content: str, metadata: dict[str, Any]) -> str:
    """Source, title and content as one text; missing fields are left out."""
    header = [f"{name.capitalize()}: {metadata[name]}\n" for name in ("source", "title") if metadata.get(name)]
    return "".join(header) + ("Content:\n" if header else "") + page_content


def parse_document(value: Any, where: str) -> Document:
    """Validate a decoded document; `where` is file, line and field, for errors."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a document object, found {type(value).__name__}")
    content, metadata, formatted = value.get("page_content"), value.get("metadata", {}), value.get("fmt_content") or ""
    if not isinstance(content, str) or not content.strip():
        raise UserError(f"{where}: field 'page_content' must be a non-empty string")
    if not isinstance(metadata, dict):
        raise UserError(f"{where}: field 'metadata' must be an object")
    if not isinstance(formatted, str):
        raise UserError(f"{where}: field 'fmt_content' must be a string")
    return Document(content, metadata, formatted)


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of the conversation before the question."""

    speaker: str
    message: str


@dataclass(frozen=True, slots=True)
class Example:
    """One question."""

    question: str
    gold_docs: tuple[Document, ...] = ()  # the passages that answer it
    gold_answer: str | None = None  # the reference answer; None in files for retrievers
    chat_history: tuple[Turn, ...] = ()  # earlier turns, oldest first
    hard_neg_docs: tuple[Document, ...] = ()  # hard negatives
    ctxs: tuple[Document, ...] = ()  # passages of an earlier retrieval, best first (DCA)
    ctx_scores: tuple[float, ...] | None = None  # their scores by a reader, if given
    other_answers: tuple[str, ...] = ()  # other correct answers, such as another spelling
    where: str = field(default="", compare=False)  # file and line, for messages

    def to_json(self) -> dict[str, Any]:
        contexts = [document.to_json() for document in self.ctxs]
        for context, score in zip(contexts, self.ctx_scores or (), strict=False):
            context["score"] = score
        row = {
            "question": self.question,
            "chat_history": [asdict(turn) for turn in self.chat_history],
            "gold_docs": [document.to_json() for document in self.gold_docs],
            "gold_answer": self.gold_answer,
            "other_answers": list(self.other_answers) or None,
            "hard_neg_docs": [document.to_json() for document in self.hard_neg_docs] or None,
            "ctxs": contexts or None,
        }
        return {name: value for name, value in row.items() if value is not None}


@dataclass(frozen=True)
class Answer:
    """A generated answer, with its number of tokens and latency."""

    text: str
    num_tokens: int
    seconds: float | None = None  # of its batch; None: not generated, since it did not fit or was cached
    batch_size: int = 1  # questions in that batch; `seconds` is a user's latency only if this is 1
    cut: bool = False  # whether the answer reached the limit of new tokens


def read_examples(path: str | Path, answers: bool = False) -> list[Example]:
    """Read examples from a `.jsonl`, one for each of a row's `questions`. With `answers`, each row must have one."""
    examples, known = [], {}  # equal passages share memory
    for example in iterate_examples(path, answers):
        lists = {name: getattr(example, name) for name in PASSAGES}
        shared = {name: tuple(known.setdefault(each, each) for each in docs) for name, docs in lists.items()}
        examples.append(replace(example, **shared))
    if not examples:
        raise UserError(f"{path}: holds no examples")
    return examples


def iterate_examples(path: str | Path, answers: bool = False) -> Iterator[Example]:
    """The same as `read_examples`, with one line in memory at a time."""
    for line, row in read_jsonl(path):
        for example in parse_example(row, f"{path}:{line}", answers):
            texts = {"question": example.question, "gold_answer": example.gold_answer}  # may be blank in generated data
            if blank := next((name for name, text in texts.items() if text is not None and not text.strip()), None):
                log.warning("%s: field '%s' is blank; the example is left out", example.where, blank)
            else:
                yield example


def subset(items: list[T], size: int, seed: int = 0) -> list[T]:
    """A fixed random subset in the original order; size 0: all."""
    if not 0 < size < len(items):
        return items
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), size))]


def write_examples(path: str | Path, examples: Iterable[Example]) -> None:
    """Write one example a line, atomically."""
    write_jsonl(path, (example.to_json() for example in examples))


def parse_example(row: dict[str, Any], where: str, answers: bool = False) -> list[Example]:
    """Validate a decoded row; `where` is file and line, for errors. -> an example for each of its questions"""
    several = "questions" in row
    questions = row["questions"] if several else [row.get("question")]
    if not isinstance(questions, list) or not questions or not all(isinstance(text, str) for text in questions):
        expected = "'questions' must be a list of strings" if several else "'question' must be a string"
        raise UserError(f"{where}: field {expected}")
    answer = row.get("gold_answer")
    if not isinstance(answer, str) and (answers or answer is not None):
        raise UserError(f"{where}: field 'gold_answer' must be a string")
    if answers and len(questions) > 1:
        raise UserError(f"{where}: one 'gold_answer' cannot answer several 'questions'; write a line for each")
    others, turns = _list(row, "other_answers", where), _list(row, "chat_history", where)
    if not all(isinstance(other, str) for other in others):
        raise UserError(f"{where}: field 'other_answers' must hold strings")
    for turn in turns:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(name), str) for name in ("speaker", "message")):
            raise UserError(f"{where}: field 'chat_history' must hold objects with 'speaker' and 'message'")
    fields: dict[str, Any] = {
        name: tuple(parse_document(value, f"{where}: field '{name}'") for value in _list(row, name, where))
        for name in PASSAGES
    }
    scores = [context.get("score") for context in row.get("ctxs") or ()]
    if scores and all(isinstance(score, int | float) for score in scores):
        fields["ctx_scores"] = tuple(map(float, scores))
    fields["chat_history"] = tuple(Turn(turn["speaker"], turn["message"]) for turn in turns)
    fields |= {"gold_answer": answer, "other_answers": tuple(others), "where": where}
    return [Example(question, **fields) for question in questions]


def _list(row: dict[str, Any], name: str, where: str) -> list[Any]:
    value = row.get(name) or []
    if not isinstance(value, list):
        raise UserError(f"{where}: field '{name}' must be a list")
    return value


def normalize(text: str) -> str:
    """Text for comparing duplicates: normalised characters and case, and single spaces."""
    return " ".join(plain(text).casefold().split())
