"""People's ratings of a server's answers, kept as examples, from which training files are made."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rqa.data import Document, Example, normalize, parse_example
from rqa.endpoint.requests import BadRequest
from rqa.preparation.reading import Row
from rqa.prompts import retrieval_query
from rqa.retrieval.citations import cite, passage_of
from rqa.runtime.errors import UserError
from rqa.runtime.files import append_line, read_jsonl

MARKS = ("clicked", "helpful", "rejected")  # marks that a person gives a passage


class Rating(NamedTuple):
    """A person's rating of one answer."""

    example: Example
    answer: str
    up: bool
    correction: str  # "" for none
    time: str
    passages: list[tuple[bool, Document]]  # true: gold, false: a hard negative


def parse_rating(values: dict[str, Any], where: str) -> Rating:
    """Check a row of a feedback file; `where` names file and line in errors."""
    row, example = Row(values, where), parse_example(values, where)[0]
    for name in ("question", "generated_answer"):
        if not row.text(name).strip():
            raise row.wrong(name, "a text that is not blank")
    if row.text("rating") not in ("1", "-1"):
        raise row.wrong("rating", "1 or -1")
    up, correction, passages = row.text("rating") == "1", row.text("corrected_answer", "").strip(), []
    for document, context in zip(example.ctxs, row.rows("ctxs"), strict=True):
        marks = [context.values.get(name) or False for name in ("rejected", "helpful", "clicked", "cited")]
        if not all(isinstance(mark, bool) for mark in marks):  # a string such as "no" would count as true
            raise row.wrong("ctxs", "passages whose rejected, helpful, clicked and cited are true or false")
        rejected, helpful, clicked, cited = marks
        if rejected or helpful or (clicked and up) or (cited and (up or correction)):
            passages.append((not rejected, document))
    return Rating(example, row.text("generated_answer").strip(), up, correction, row.text("time", ""), passages)


class Feedback:
    """A file of ratings, one per line, and the database of the rated passages."""

    def __init__(self, path: str | Path, documents: Sequence[Document]) -> None:
        self.path, self.documents = Path(path), documents
        try:
            self.path.open("ab").close()
        except OSError as error:
            raise UserError(f"--feedback_path {path}: {error.strerror}; name a file to write ratings to") from None

    def save(self, body: dict[str, Any]) -> None:
        """Append a rating, with the passages that its correction cites, or else its answer."""
        sent, time = Row(body, "feedback"), datetime.now(UTC).isoformat(timespec="milliseconds")
        row = {name: body.get(name) for name in ("question", "chat_history", "rating", "corrected_answer")}
        try:
            rating = parse_rating(row | {"generated_answer": body.get("answer"), "time": time}, "feedback")
            ids, model = {name: sent.texts(name) for name in ("passages", *MARKS)}, sent.text("model", "")
        except UserError as error:
            message = str(error).replace("generated_", "")
            raise BadRequest(message, message.split("'")[1]) from None
        shown = {name: known for name in ids["passages"] if (known := passage_of(self.documents, name))}
        if unknown := [name for listed in ids.values() for name in listed if name not in shown]:
            raise BadRequest(f"'passages' lacks {unknown[0][:80]!r}, or the database does; ask again", "passages")
        correction = rating.correction if rating.correction != rating.answer else ""
        cited = {each.number for each in cite(correction or rating.answer, list(shown.values()))}
        contexts = [
            document.to_json() | {"id": name, "cited": number in cited} | {mark: name in ids[mark] for mark in MARKS}
            for number, (name, document) in enumerate(shown.items(), start=1)
        ]
        row = {"question": rating.example.question, "chat_history": rating.example.to_json()["chat_history"]}
        row |= {"ctxs": contexts, "generated_answer": rating.answer, "rating": 1 if rating.up else -1}
        append_line(self.path, row | {"corrected_answer": correction or None, "model": model, "time": time})


def read_feedback(path: Path, stem: str) -> Iterator[tuple[str, Example | str]]:
    """Yield examples with their file, `STEM_w_qa` (for readers) or `STEM_w_q` (for retrievers), and counts with "".

    The latest rating of an answer counts, as does the latest judgement of a passage for a question.
    """
    groups: defaultdict[str, list[Rating]] = defaultdict(list)
    for line, row in read_jsonl(path):
        rating = parse_rating(row, f"{path}:{line}")
        groups[normalize(retrieval_query(rating.example))].append(rating)
    for ratings in groups.values():
        ratings.sort(key=lambda rating: rating.time)
        latest = {rating.answer: rating for rating in ratings}
        kept = [rating for rating in ratings if latest[rating.answer] is rating]
        worth: dict[str, int] = {}  # answer -> 2: a correction, 1: rated up, 0: rated down; the latest comes last
        judged: defaultdict[tuple[str, str], list[tuple[bool, Document]]] = defaultdict(list)
        for rating in kept:
            for text, value in ((rating.answer, int(rating.up)), (rating.correction, 2)):
                worth.pop(text, None)
                worth[text] = value
            for is_gold, document in rating.passages:
                judged[document.key].append((is_gold, document))
        answers = sorted((text for text in reversed(worth) if text and worth[text]), key=lambda text: -worth[text])
        gold, negative = (tuple(d for *_, (last, d) in judged.values() if last == is_gold) for is_gold in (True, False))
        example = Example(kept[-1].example.question, gold, chat_history=kept[-1].example.chat_history)
        verdicts = {(rating.answer, rating.up, rating.correction) for rating in ratings}
        counts = {
            "ratings": len(ratings),
            "repeated ratings": len(ratings) - len(verdicts),
            "answers rated both up and down": len({verdict[:2] for verdict in verdicts}) - len(latest),
            "questions with different corrections": len({verdict[2] for verdict in verdicts} - {""}) > 1,
            "passages both gold and rejected": sum(len({kind for kind, _ in each}) > 1 for each in judged.values()),
            "answers rated down without a correction": sum(not (rating.up or rating.correction) for rating in kept),
            f"questions without a right answer left out of {stem}_w_qa": not answers,
            f"questions without a gold passage left out of {stem}_w_q": not gold,
        }
        yield from (("", what) for what, count in counts.items() for _ in range(count))
        if answers:
            yield f"{stem}_w_qa", replace(example, gold_answer=answers[0], other_answers=tuple(answers[1:]))
        if gold:
            yield f"{stem}_w_q", replace(example, hard_neg_docs=negative)
