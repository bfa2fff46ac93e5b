"""A reader in training, measured on one file: the loss of the gold answers, and answers over what is retrieved."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from rqa.data import Document, Example
from rqa.evaluation.metrics import corpus_bleu, faithfulness, score_answer
from rqa.evaluation.retrieval import mean_scores, retrieval_rows
from rqa.evaluation.runtime import latencies, seconds
from rqa.models.loading import evaluating
from rqa.models.reader import Answer
from rqa.prompts import DoesNotFit, retrieval_query
from rqa.retrieval.retriever import PassageRetriever
from rqa.runtime import distributed
from rqa.runtime.errors import UserError, check_bounds
from rqa.runtime.parallelize import in_step

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


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainableReader:
    """A reader, and the objective that trains the very same model.

    Attributes:
        objective: Beside what the loop needs: `prompter.encode(example, passages, answer)`, and
            `batch(encoded examples, their numbers)`.
        reader: Answers with the weights as they are.
    """

    objective: nn.Module
    reader: Reader


class ReaderEvaluation:
    """Measures readers on one file.

    Passages are found once, when this is made: the retriever is frozen. Without one, only the loss is measured, over
    the gold passages.
    """

    def __init__(
        self,
        retriever: PassageRetriever | None,
        examples: Sequence[Example],
        arguments: EvaluationArguments,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.examples = examples
        self.arguments = arguments
        self.batch_size = batch_size
        self.device = device
        self.found = find_passages(retriever, examples, arguments) if retriever and examples else None

    def __call__(
        self, trained: TrainableReader, warm_up: bool = False
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics by name, and one row a question; `warm_up` as in `evaluate_answers`."""
        if self.found is None:
            return {"loss": self.loss(trained.objective, [list(example.gold_docs) for example in self.examples])}, []
        k = self.arguments.embedding_max_num_to_retrieve
        metrics, rows = evaluate_answers(trained.reader, self.examples, self.found, self.arguments, warm_up)
        return {"loss": self.loss(trained.objective, [documents[:k] for documents in self.found]), **metrics}, rows

    @torch.no_grad()
    def loss(self, objective: nn.Module, passages: Sequence[Sequence[Document]]) -> float:
        """Mean negative log-likelihood of the gold answers' tokens."""
        encoded = encode_examples(objective.prompter, self.examples, passages)
        sequences = distributed.share(list(encoded.values()))
        parts = [sequences[i : i + self.batch_size] for i in range(0, len(sequences), self.batch_size)]
        filler = list(encoded.values())[:1]
        sums = [0.0, 0.0]
        with evaluating(objective):
            for part in in_step(objective, parts, filler):
                batch = objective.batch(part).to(self.device)
                loss = float(objective(batch)[0])
                if part is not filler:
                    sums = [sums[0] + loss, sums[1] + batch.weight]
        loss, weight = distributed.total(sums)
        return loss / weight


def encode_examples(
    prompter: Any, examples: Sequence[Example], passages: Sequence[Sequence[Document]]
) -> dict[int, Any]:
    """Prompts with their gold answers, by the example's number; one that does not fit is reported and left out.

    Args:
        prompter: A `Prompter` or `FusionPrompter`.

    Raises:
        UserError: none fits.
    """
    sequences = {}
    for number, (example, documents) in enumerate(zip(examples, passages, strict=True)):
        try:
            sequences[number] = prompter.encode(example, documents, example.gold_answer)
        except DoesNotFit as error:
            log.warning("%s; the example is left out", error)
    if not sequences:
        raise UserError(f"{prompter.length_flag}: no example fits; raise it")
    return sequences
