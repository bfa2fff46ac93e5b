"""How well a retriever finds the gold documents, and how fast."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rqa.data import Document, Example
from rqa.evaluation.metrics import score_ranking, with_localrqa_names
from rqa.evaluation.runtime import latencies, seconds
from rqa.prompts import retrieval_query
from rqa.retrieval.retriever import Hits, PassageRetriever
from rqa.runtime.files import atomic_file, fingerprint
from rqa.runtime.flags import Arguments, flag

RANKING_DEPTH = 10
TIMED_QUESTIONS = 100  # asked one at a time
WARM_UP = 3


@dataclass(kw_only=True)
class EvaluationArguments(Arguments):
    """How a system is evaluated."""

    embedding_max_num_to_retrieve: int = flag(3, "Number of passages that are retrieved for a question and read.")
    recall_at: list[int] = flag([1, 4, 10], "Values of k for which Recall@k is reported.", rare=True)

    def check(self) -> None:
        self.check_bounds("embedding_max_num_to_retrieve", at_least=0)
        self.check_bounds("recall_at", at_least=1)

    @property
    def depth(self) -> int:
        """Documents of a ranking: as deep as any metric looks, and as the reader reads."""
        return max(RANKING_DEPTH, self.embedding_max_num_to_retrieve, *self.recall_at)


def find_passages(
    retriever: PassageRetriever, examples: Sequence[Example], flags: EvaluationArguments
) -> list[list[Document]]:
    """What the retriever finds for each question, best first, as deep as any metric looks. [Q] lists"""
    return retriever.documents_of(retriever.retrieve_shared(list(map(retrieval_query, examples)), flags.depth))


def retrieval_rows(
    found: Sequence[Sequence[Document]], examples: Sequence[Example], cutoffs: Sequence[int]
) -> list[dict[str, Any]]:
    """One row a question: what was asked and found, and its `scores`: `retr/recall@4` and so on, none without gold.

    Args:
        found: What was retrieved for each question, best first; at least max(cutoffs, 10) documents.
        cutoffs: The k of Recall@k.
    """
    rows = []
    for documents, example in zip(found, examples, strict=True):
        ranking, gold = [document.key for document in documents], {document.key for document in example.gold_docs}
        scores = score_ranking(ranking, gold, cutoffs) if gold else {}
        row = {"retrieved_docs": [document.to_json() for document in documents]}
        rows.append(example.to_json() | row | {"scores": {f"retr/{name}": value for name, value in scores.items()}})
    return rows


def mean_scores(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of each of the rows' `scores` over the questions that have it, by our name and by LocalRQA's."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row["scores"].items():
            columns.setdefault(name, []).append(value)
    return with_localrqa_names({name: sum(values) / len(values) for name, values in columns.items()})


def measure_speed(retriever: PassageRetriever, examples: Sequence[Example], k: int) -> dict[str, float]:
    """Milliseconds of single questions, and questions a second of all at once; encoding and search, nothing else."""
    queries = [retrieval_query(example) for example in examples]
    for query in queries[:WARM_UP]:
        retriever.retrieve([query], k)
    single = [seconds(lambda query=query: retriever.retrieve([query], k)) for query in queries[:TIMED_QUESTIONS]]
    together = seconds(lambda: retriever.retrieve(queries, k))
    speed = latencies(single) | {"questions_per_second": len(queries) / together}
    return {f"retr/{name}": value for name, value in speed.items()}


def document_name(document: Document) -> str:
    """A name without spaces; two documents have the same one when they are the same."""
    return fingerprint(*document.key)[:16]


def write_run(path: str | Path, hits: Hits, documents: Sequence[Document], tag: str = "rqa") -> None:
    """Write `question Q0 document rank score tag` lines; questions are numbered from 1, in the order of the hits.

    trec_eval sorts by score, in single precision, and ties by name. So that it ranks as we do, a score that is not
    below the one before it is written as the next smaller number.
    """
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for question, (ids, scores) in enumerate(zip(hits.ids, hits.scores.astype(np.float32), strict=True), start=1):
            before = np.float32(np.inf)
            for rank, (i, score) in enumerate(zip(ids[ids >= 0], scores[ids >= 0], strict=True), start=1):
                before = min(score, np.nextafter(before, np.float32(-np.inf)))
                file.write(f"{question} Q0 {document_name(documents[i])} {rank} {float(before)!r} {tag}\n")


def write_qrels(path: str | Path, examples: Sequence[Example]) -> None:
    """Write `question 0 document 1` lines for the gold documents; questions are numbered from 1."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for question, example in enumerate(examples, start=1):
            for name in dict.fromkeys(document_name(document) for document in example.gold_docs):
                file.write(f"{question} 0 {name} 1\n")
