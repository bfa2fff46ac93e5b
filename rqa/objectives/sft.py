"""SFT and SwR: the likelihood of the answer after its prompt. The two differ only in whose passages stand in it."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from rqa.models.causal_lm import answer_logits
from rqa.models.loading import choose_collate
from rqa.objectives.losses import answer_nll
from rqa.packing import AnswerBatch, answer_batch
from rqa.prompts import Prompter, TokenSequence


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
