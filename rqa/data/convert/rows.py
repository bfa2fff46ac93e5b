"""Layouts that hold a question a row, with its passages and answers: what to read of a row, what to write."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rqa.data.convert.reading import Row
from rqa.data.documents import Document
from rqa.data.examples import Example


@dataclass(frozen=True)
class RowFormat:
    """One layout.

    Attributes:
        read: What a row holds. An unanswerable question has the answer "".
        write: Rows of examples, in order.
        document: The row of a passage, where the layout has a corpus of its own.
        answers: Whether its questions have answers.
        key: The field that holds the rows, where a file is one JSON object.
        around: What stands before and behind the rows of a JSON array; None: JSONL.
    """

    read: Callable[[Row], Iterator[Document | Example]]
    write: Callable[[Iterable[Example]], Iterator[dict[str, Any]]]
    document: Callable[[Document], dict[str, Any]] | None = None
    answers: bool = True
    key: str = ""
    around: tuple[str, str] | None = None


def one_row_each(write: Callable[[int, Example], dict[str, Any]]) -> Callable[..., Iterator[dict[str, Any]]]:
    """A writer of examples from a writer of one, which is told its number."""
    return lambda examples: (write(number, example) for number, example in enumerate(examples))


def with_answers(question: str, answers: list[str], where: str, **passages: Any) -> Example:
    """An example whose first answer is the gold one; without any it is unanswerable."""
    first, *others = answers or [""]
    return Example(question, gold_answer=first, other_answers=tuple(others), where=where, **passages)


def all_answers(example: Example) -> list[str]:
    """The answers of an example; none of an unanswerable one."""
    return [answer for answer in (example.gold_answer, *example.other_answers) if answer]


def titled(row: Row, *identifiers: str) -> Document:
    """A passage with `title` and `text`, and an identifier under one of these names; a blank text is its title."""
    title = row.text("title", default="")
    text = row.text("text")
    content = text if text.strip() else title
    if not content.strip():
        raise row.wrong("text", "a text that is not blank")
    return Document(content, {"source": row.text(*identifiers, default=title), "title": title})


def title_and_text(document: Document) -> dict[str, Any]:
    return {"title": str(document.metadata.get("title") or ""), "text": document.page_content}


def source(document: Document) -> str:
    return str(document.metadata.get("source", ""))
