"""A reader in training, measured on one file: the loss of the gold answers, and answers over what is retrieved."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rqa.data.documents import Document
from rqa.data.examples import Example
from rqa.evaluation.rqa import EvaluationArguments, Reader, evaluate_answers, find_passages
from rqa.models.loading import evaluating
from rqa.prompts import DoesNotFit
from rqa.retrieval.hits import PassageRetriever
from rqa.runtime import distributed
from rqa.runtime.errors import UserError
from rqa.runtime.parallelize import in_step

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
