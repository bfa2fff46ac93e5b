"""What people say of answers, checked and kept as rqa's examples; bin/convert_dataset makes training files of them."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rqa.data import Document
from rqa.preparation.feedback import parse_rating
from rqa.preparation.reading import Row
from rqa.runtime.errors import UserError
from rqa.runtime.files import append_line
from rqa.serving.sources import cite, passage_of

MARKS = ("clicked", "helpful", "rejected")  # what a person did with a passage, or thinks of it


class BadRequest(UserError):
    """What is wrong with a request, and in which of its fields."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class Feedback:
    """A file of ratings, one a line, and the database that holds the rated passages."""

    def __init__(self, path: str | Path, documents: Sequence[Document]) -> None:
        self.path, self.documents = Path(path), documents
        try:
            self.path.open("ab").close()
        except OSError as error:
            raise UserError(f"--feedback_path {path}: {error.strerror}; name a file to write ratings to") from None

    def save(self, body: dict[str, Any]) -> None:
        """Add a rating; it says which passages its correction cites, or else its answer."""
        row = {name: body.get(name) for name in ("question", "chat_history", "rating", "corrected_answer")}
        row |= {"generated_answer": body.get("answer"), "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        try:
            row["model"], rating = Row(body, "feedback").text("model", ""), parse_rating(row, "feedback")
        except UserError as error:
            said = str(error).replace("generated_", "")
            raise BadRequest(said, said.split("'")[1]) from None
        correction = rating.correction if rating.correction != rating.answer else ""
        ids = {name: body.get(name) or [] for name in ("passages", *MARKS)}
        for name, listed in ids.items():
            strings = isinstance(listed, list) and all(isinstance(each, str) for each in listed)
            if not strings or not {*listed} <= {*ids["passages"]}:
                raise BadRequest(f"'{name}' must be a list of IDs that are in 'passages'", name)
        shown = {name: known for name in ids["passages"] if (known := passage_of(self.documents, name))}
        if unknown := [name for name in ids["passages"] if name not in shown]:
            raise BadRequest(f"'passages': {unknown[0][:80]!r} is not in the database; ask again", "passages")
        cited = {each.number for each in cite(correction or rating.answer, list(shown.values()))}
        contexts = [
            document.to_json() | {"id": name, "cited": number in cited} | {mark: name in ids[mark] for mark in MARKS}
            for number, (name, document) in enumerate(shown.items(), start=1)
        ]
        row |= {"chat_history": rating.asked.to_json()["chat_history"], "ctxs": contexts}
        append_line(self.path, row | {"rating": 1 if rating.up else -1, "corrected_answer": correction or None})
