"""End to end: retrieve for all questions, answer over what was retrieved, score."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rqa.data.documents import Document
from rqa.data.examples import Example
from rqa.evaluation.metrics import corpus_bleu, faithfulness, score_answer
from rqa.evaluation.retrieval import mean_scores, retrieval_rows
from rqa.evaluation.runtime import latencies, seconds
from rqa.models.generation import Answer
from rqa.prompts import retrieval_query
from rqa.retrieval.hits import PassageRetriever
from rqa.runtime import distributed
from rqa.runtime.errors import check_bounds

RANKING_DEPTH = 10


class Reader(Protocol):
    """Whatever answers questions over passages."""

    def answer(self, examples: Sequence[Example], passages: Sequence[Sequence[Document]]) -> list[Answer]: ...

    def warm_up(self, example: Example, passages: Sequence[Document]) -> None: ...


@dataclass
class EvaluationArguments:
    """How a system is evaluated."""

    embedding_max_num_to_retrieve: int = field(default=3, metadata={"help": "Passages retrieved for a question."})
    recall_at: list[int] = field(default_factory=lambda: [1, 4, 10], metadata={"help": "The k of Recall@k."})

    def __post_init__(self) -> None:
        check_bounds(self, "embedding_max_num_to_retrieve", at_least=0)
        check_bounds(self, "recall_at", at_least=1)

    @property
    def depth(self) -> int:
        """Documents of a ranking: as deep as any metric looks, and as the reader reads."""
        return max(RANKING_DEPTH, self.embedding_max_num_to_retrieve, *self.recall_at)


def find_passages(
    retriever: PassageRetriever, examples: Sequence[Example], arguments: EvaluationArguments
) -> list[list[Document]]:
    """What the retriever finds for each question, best first, as deep as any metric looks. [Q] lists"""
    hits = retriever.retrieve_shared([retrieval_query(example) for example in examples], arguments.depth)
    return retriever.documents_of(hits)


def evaluate_answers(
    reader: Reader,
    examples: Sequence[Example],
    found: Sequence[Sequence[Document]],
    arguments: EvaluationArguments,
    warm_up: bool = False,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Answer over the retrieved passages only, never the gold ones, and score; each process takes its share.

    Args:
        warm_up: Whether a short answer comes before, which is not timed.

    Returns:
        Metrics by name, and one row a question: what was asked, found, answered and scored.
    """
    read = [list(documents[: arguments.embedding_max_num_to_retrieve]) for documents in found]
    mine = distributed.share(range(len(examples)))
    part: list[Answer] = []
    if warm_up:
        reader.warm_up(examples[0], read[0])
    duration = seconds(lambda: part.extend(reader.answer([examples[i] for i in mine], [read[i] for i in mine])))
    generated, duration = distributed.gather(part), max(distributed.total_by_rank(duration))
    rows = retrieval_rows(found, examples, arguments.recall_at)
    for row, answer, passages in zip(rows, generated, read, strict=True):
        row |= {"retrieved_docs": row["retrieved_docs"][: len(passages)], "generated_answer": answer.text}
        row["scores"] |= answer_scores(answer.text, row["gold_answer"], passages)
    metrics = mean_scores([row["scores"] for row in rows])
    answers = [answer.text for answer in generated]
    metrics["gen/bleu"] = corpus_bleu(answers, [row["gold_answer"] for row in rows])
    metrics["gen/answer_words"] = sum(len(answer.split()) for answer in answers) / len(answers)
    return metrics | {f"gen/{name}": value for name, value in _speed(generated, duration).items()}, rows


def _speed(answers: Sequence[Answer], duration: float) -> dict[str, float]:
    """Of what was generated now: a question that did not fit, or an answer kept from an earlier run, took no time."""
    timed = [answer for answer in answers if answer.seconds is not None]
    if not timed:
        return {}
    return {
        "questions_per_second": len(timed) / duration,
        "tokens_per_second": sum(answer.num_tokens for answer in timed) / duration,
        **latencies([answer.seconds for answer in timed]),
    }


def answer_scores(answer: str, reference: str, passages: Sequence[Document]) -> dict[str, float]:
    """The scores of one answer, beside the reference and beside the passages that it was given."""
    texts = [passage.fmt_content for passage in passages]
    scores = score_answer(answer, reference)
    scores |= {"faithfulness": faithfulness(answer, texts), "faithfulness_bigrams": faithfulness(answer, texts, 2)}
    return {f"gen/{name}": value for name, value in scores.items()}
