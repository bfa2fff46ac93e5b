"""How well a retriever finds the gold documents, and how fast."""

from collections.abc import Sequence
from typing import Any

from rqa.data.documents import Document
from rqa.data.examples import Example
from rqa.evaluation.metrics import score_ranking, with_localrqa_names
from rqa.evaluation.runtime import latencies, seconds
from rqa.prompts import retrieval_query
from rqa.retrieval.hits import PassageRetriever

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
