"""FiD: the likelihood of the answer by a decoder that attends to all passages (Izacard & Grave 2020)."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from rqa.models.encoder_decoder import MAX_ENCODER_TOKENS, Fusion
from rqa.models.loading import choose_collate
from rqa.objectives.losses import answer_nll
from rqa.packing import FusionBatch, fusion_batch
from rqa.prompts import FusionPrompter, FusionSequence


class FusionLikelihood(nn.Module):
    """Cross-entropy on the answer and its end token."""

    def __init__(self, model: PreTrainedModel, prompter: FusionPrompter) -> None:
        super().__init__()
        self.fusion = Fusion(model)
        self.prompter = prompter
        self.collate = choose_collate(model.get_encoder(), prompter.tokenizer.pad_token_id)

    def batch(self, sequences: Sequence[FusionSequence], indices: Sequence[int] = ()) -> FusionBatch:
        """Questions, passages and answers as this model takes them; `indices` are the examples' numbers."""
        return fusion_batch(sequences, self.collate, MAX_ENCODER_TOKENS, indices)

    def forward(self, batch: FusionBatch) -> tuple[Tensor, dict[str, float]]:
        """The sum of the answer tokens' negative log-likelihoods; the batch's `weight` is their number. -> []"""
        return answer_nll(*self.fusion(batch)).sum(), {}

    def save_pretrained(self, directory: str | Path) -> None:
        """Save model and tokenizer in the layout of `transformers`."""
        self.fusion.model.save_pretrained(directory)
        self.prompter.tokenizer.save_pretrained(directory)
