"""How well a retriever finds the gold documents, and how fast."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rqa.data import Document, Example
from rqa.evaluation.metrics import score_ranking, with_localrqa_names
from rqa.evaluation.runtime import latencies, seconds
from rqa.prompts import retrieval_query
from rqa.retrieval.retriever import Hits, PassageRetriever
from rqa.runtime.errors import UserError
from rqa.runtime.files import atomic_file, fingerprint


def document_name(document: Document) -> str:
    """A name without spaces; two documents have the same one when they are the same."""
    return fingerprint(*document.key)[:16]


def write_run(path: str | Path, hits: Hits, documents: Sequence[Document], tag: str = "rqa") -> None:
    """Write `question Q0 document rank score tag` lines; questions are numbered from 1, in the order of the hits.

    trec_eval sorts by score, in single precision, and ties by name. So that it ranks as we do, a score that is not
    below the one before it is written as the next smaller number.
    """
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for question, (ids, scores) in enumerate(zip(hits.ids.tolist(), hits.scores, strict=True), start=1):
            found = [(i, score) for i, score in zip(ids, scores.astype(np.float32), strict=True) if i >= 0]
            before = np.float32(np.inf)
            for rank, (i, score) in enumerate(found, start=1):
                before = min(score, np.nextafter(before, np.float32(-np.inf)))
                file.write(f"{question} Q0 {document_name(documents[i])} {rank} {float(before)!r} {tag}\n")


def write_qrels(path: str | Path, examples: Sequence[Example]) -> None:
    """Write `question 0 document 1` lines for the gold documents; questions are numbered from 1."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for question, example in enumerate(examples, start=1):
            for name in dict.fromkeys(document_name(document) for document in example.gold_docs):
                file.write(f"{question} 0 {name} 1\n")


def read_run(path: str | Path) -> dict[str, list[str]]:
    """The ranking of each question as trec_eval sees it: by score, ties by the name that sorts last.

    Raises:
        UserError: the file is missing, or a line is not one of a run.
    """
    scored: dict[str, dict[str, float]] = {}
    for where, (question, _, document, _, score, _) in _lines(path, 6):
        try:
            scored.setdefault(question, {})[document] = float(np.float32(score))
        except ValueError:
            raise UserError(f"{where}: the score {score} is not a number") from None
    return {
        question: sorted(row, key=lambda document, row=row: (row[document], document), reverse=True)
        for question, row in scored.items()
    }


def read_qrels(path: str | Path) -> dict[str, set[str]]:
    """The relevant documents of each question; those judged 0 or less are left out.

    Raises:
        UserError: the file is missing, or a line is not one of a qrels file.
    """
    gold: dict[str, set[str]] = {}
    for where, (question, _, document, relevance) in _lines(path, 4):
        try:
            relevant = int(relevance) > 0
        except ValueError:
            raise UserError(f"{where}: the relevance {relevance} is not a whole number") from None
        gold.setdefault(question, set()).update({document} if relevant else ())
    return gold


def _lines(path: str | Path, fields: int) -> Iterator[tuple[str, list[str]]]:
    """File and line, and the fields of each line that is not blank."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        parts = line.split()
        if parts and len(parts) != fields:
            raise UserError(f"{path}:{number}: expected {fields} fields, found {len(parts)}")
        if parts:
            yield f"{path}:{number}", parts


TIMED_QUESTIONS = 100  # asked one at a time
WARMUP = 3


def score_questions(
    found: Sequence[Sequence[Document]], examples: Sequence[Example], cutoffs: Sequence[int]
) -> list[dict[str, float]]:
    """The scores of each question, `retr/recall@4` and so on; none where it has no gold documents. [Q]

    Args:
        found: What was retrieved for each question, best first; at least max(cutoffs, 10) documents.
        cutoffs: The k of Recall@k.
    """
    scores = []
    for documents, example in zip(found, examples, strict=True):
        ranking, gold = [document.key for document in documents], {document.key for document in example.gold_docs}
        row = score_ranking(ranking, gold, cutoffs) if gold else {}
        scores.append({f"retr/{name}": value for name, value in row.items()})
    return scores


def mean_scores(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each score over the questions that have it, by our name and by LocalRQA's."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return with_localrqa_names({name: sum(values) / len(values) for name, values in columns.items()})


def retrieval_rows(
    found: Sequence[Sequence[Document]], examples: Sequence[Example], cutoffs: Sequence[int]
) -> list[dict[str, Any]]:
    """One row a question: what was asked, found and scored."""
    scores = score_questions(found, examples, cutoffs)
    return [
        example.to_json() | {"retrieved_docs": [document.to_json() for document in documents], "scores": row}
        for example, documents, row in zip(examples, found, scores, strict=True)
    ]


def measure_speed(retriever: PassageRetriever, examples: Sequence[Example], k: int) -> dict[str, float]:
    """Milliseconds of single questions, and questions a second of all at once; encoding and search, nothing else."""
    queries = [retrieval_query(example) for example in examples]
    for query in queries[:WARMUP]:
        retriever.retrieve([query], k)
    single = [seconds(lambda query=query: retriever.retrieve([query], k)) for query in queries[:TIMED_QUESTIONS]]
    together = seconds(lambda: retriever.retrieve(queries, k))
    speed = {**latencies(single), "questions_per_second": len(queries) / together}
    return {f"retr/{name}": value for name, value in speed.items()}
