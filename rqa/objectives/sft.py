"""SFT and SwR: the likelihood of the answer after its prompt. The two differ only in whose passages stand in it."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from rqa.data import Document, Example
from rqa.models.causal_lm import answer_logits
from rqa.models.loading import choose_collate
from rqa.objectives.losses import answer_nll
from rqa.packing import AnswerBatch, answer_batch
from rqa.prompts import DoesNotFit, Prompter, TokenSequence
from rqa.runtime.errors import UserError

log = logging.getLogger(__name__)


class AnswerLikelihood(nn.Module):
    """Cross-entropy on answer and end of turn; prompt and passages carry no loss."""

    def __init__(self, model: PreTrainedModel, prompter: Prompter) -> None:
        super().__init__()
        self.model = model
        self.prompter = prompter
        self._collate = choose_collate(model, prompter.stop_ids[0])

    def batch(self, sequences: Sequence[TokenSequence], indices: Sequence[int] = ()) -> AnswerBatch:
        """Prompts with answers as this model takes them; `indices` are the examples' numbers."""
        return answer_batch(sequences, self._collate, indices)

    def forward(self, batch: AnswerBatch) -> tuple[Tensor, dict[str, float]]:
        """The sum of the answer tokens' negative log-likelihoods; the batch's `weight` is their number. -> []"""
        return answer_nll(answer_logits(self.model, batch), batch.targets).sum(), {}

    def save_pretrained(self, directory: str | Path) -> None:
        """Save model and tokenizer in the layout of `transformers`."""
        self.model.save_pretrained(directory)
        self.prompter.tokenizer.save_pretrained(directory)


def encode_examples(
    prompter: Any, examples: Sequence[Example], passages: Sequence[Sequence[Document]]
) -> dict[int, Any]:
    """Prompts with their gold answers, by the example's number; one that does not fit is reported and left out."""
    sequences = {}
    for number, (example, documents) in enumerate(zip(examples, passages, strict=True)):
        try:
            sequences[number] = prompter.encode(example, documents, example.gold_answer)
        except DoesNotFit as error:
            log.warning("%s; the example is left out", error)
    if not sequences:
        raise UserError(f"{prompter.length_flag}: no example fits; raise it")
    return sequences
