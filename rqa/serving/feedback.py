"""What people say of answers, checked and kept as rqa's examples; bin/convert_dataset makes training files of them."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rqa.data import Document
from rqa.endpoint.requests import BadRequest
from rqa.preparation.feedback import parse_rating
from rqa.preparation.reading import Row
from rqa.runtime.errors import UserError
from rqa.runtime.files import append_line
from rqa.serving.sources import cite, passage_of

MARKS = ("clicked", "helpful", "rejected")  # what a person did with a passage, or thinks of it


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
        sent, time = Row(body, "feedback"), datetime.now(UTC).isoformat(timespec="milliseconds")
        row = {name: body.get(name) for name in ("question", "chat_history", "rating", "corrected_answer")}
        try:
            rating = parse_rating(row | {"generated_answer": body.get("answer"), "time": time}, "feedback")
            ids, model = {name: sent.texts(name) for name in ("passages", *MARKS)}, sent.text("model", "")
        except UserError as error:
            said = str(error).replace("generated_", "")
            raise BadRequest(said, said.split("'")[1]) from None
        shown = {name: known for name in ids["passages"] if (known := passage_of(self.documents, name))}
        if unknown := [name for listed in ids.values() for name in listed if name not in shown]:
            raise BadRequest(f"'passages' lacks {unknown[0][:80]!r}, or the database does; ask again", "passages")
        correction = rating.correction if rating.correction != rating.answer else ""
        cited = {each.number for each in cite(correction or rating.answer, list(shown.values()))}
        contexts = [
            document.to_json() | {"id": name, "cited": number in cited} | {mark: name in ids[mark] for mark in MARKS}
            for number, (name, document) in enumerate(shown.items(), start=1)
        ]
        row = {"question": rating.asked.question, "chat_history": rating.asked.to_json()["chat_history"]}
        row |= {"ctxs": contexts, "generated_answer": rating.answer, "rating": 1 if rating.up else -1}
        append_line(self.path, row | {"corrected_answer": correction or None, "model": model, "time": time})
