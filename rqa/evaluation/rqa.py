"""End to end: retrieve for all questions, answer over what was retrieved, score."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rqa.data.documents import Document
from rqa.data.examples import Example
from rqa.evaluation.metrics import corpus_bleu, score_answer
from rqa.evaluation.retrieval import score_retrieval
from rqa.models.causal_lm import Answer
from rqa.prompts import retrieval_query
from rqa.retrieval.retriever import Retriever
from rqa.runtime import distributed
from rqa.runtime.files import write_json, write_jsonl

RANKING_DEPTH = 10


class Reader(Protocol):
    """Whatever answers questions over passages."""

    def answer(self, examples: Sequence[Example], passages: Sequence[Sequence[Document]]) -> list[Answer]: ...


@dataclass
class EvaluationArguments:
    """How a system is evaluated."""

    embedding_max_num_to_retrieve: int = field(default=3, metadata={"help": "Passages retrieved for a question."})
    recall_at: list[int] = field(default_factory=lambda: [1, 4, 10], metadata={"help": "The k of Recall@k."})


def find_passages(
    retriever: Retriever, examples: Sequence[Example], arguments: EvaluationArguments
) -> list[list[Document]]:
    """What the retriever finds for each question, best first, as deep as any metric looks. [Q] lists"""
    depth = max(RANKING_DEPTH, arguments.embedding_max_num_to_retrieve, *arguments.recall_at)
    return retriever.documents_of(retriever.retrieve_shared([retrieval_query(example) for example in examples], depth))


def evaluate_answers(
    reader: Reader, examples: Sequence[Example], found: Sequence[Sequence[Document]], arguments: EvaluationArguments
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Answer over the retrieved passages only, never the gold ones, and score; each process takes its share.

    Returns:
        Metrics by name, and one row a question: what was asked, found, answered and scored.
    """
    k = arguments.embedding_max_num_to_retrieve
    read = [list(documents[:k]) for documents in found]
    mine = distributed.share(range(len(examples)))
    started = time.perf_counter()
    generated = distributed.gather(reader.answer([examples[i] for i in mine], [read[i] for i in mine]))
    seconds = time.perf_counter() - started
    answers = [answer.text for answer in generated]
    references = [example.gold_answer or "" for example in examples]
    scores = [score_answer(*pair) for pair in zip(answers, references, strict=True)]
    metrics = score_retrieval(found, examples, arguments.recall_at)
    metrics |= {f"gen/{name}": sum(score[name] for score in scores) / len(scores) for name in scores[0]}
    metrics["gen/bleu"] = corpus_bleu(answers, references)
    metrics["gen/questions_per_second"] = len(answers) / seconds
    metrics["gen/tokens_per_second"] = sum(answer.num_tokens for answer in generated) / seconds
    rows = [
        example.to_json()
        | {
            "retrieved_docs": [document.to_json() for document in documents],
            "generated_answer": answer,
            "scores": score,
        }
        for example, documents, answer, score in zip(examples, read, answers, scores, strict=True)
    ]
    return metrics, rows


def write_results(directory: str | Path, metrics: dict[str, float], rows: Sequence[dict[str, Any]]) -> None:
    """`score.json` and `test-predictions.jsonl`, by the main process."""
    if distributed.is_main():
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_json(Path(directory) / "score.json", metrics)
        write_jsonl(Path(directory) / "test-predictions.jsonl", rows)
