"""SFT: the likelihood of the answer given its prompt. SwR differs only in the passages of the prompt."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rqa.data import Document, Example
from rqa.models.loading import LoadingArguments, choose_collate, load_causal_lm, load_tokenizer, within_positions
from rqa.models.reader import CausalLMReader, GenerationArguments
from rqa.objectives.losses import answer_nll
from rqa.packing import AnswerBatch, answer_batch, answer_logits
from rqa.prompts import PromptArguments, Prompter, TokenSequence, fitting
from rqa.runtime.errors import UserError
from rqa.runtime.flags import flag

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class DecoderArguments(PromptArguments, GenerationArguments, LoadingArguments):
    """Flags of a decoder that is trained and evaluated."""


@dataclass(kw_only=True)
class SFTArguments(DecoderArguments):
    """SFT's own flags."""

    embedding_model: str | None = flag(
        None, "Retriever for evaluation: a directory or a hub name. Default: evaluate the loss on gold passages.",
    )  # fmt: skip


class AnswerLikelihood(nn.Module):
    """Cross-entropy on the answer and the end of turn; prompt and passages carry no loss."""

    faster = 4  # factor of the default learning rate, relative to an encoder's

    def __init__(self, model: PreTrainedModel, prompter: Prompter, precision: torch.dtype | None = None) -> None:
        super().__init__()
        prompter.arguments = within_positions(model, prompter.arguments, "max_seq_length")
        self.model, self.prompter = model, prompter
        self._collate = choose_collate(model, precision)

    @classmethod
    def load(cls, path: str, flags: DecoderArguments) -> Self:
        """The objective over the decoder at `path`; only the main process reads its weights."""
        prompter = Prompter(load_tokenizer(path, flags.trust_remote_code), flags)
        return cls(load_causal_lm(path, flags, flags.trained_dtype, main_only=True), prompter, flags.precision)

    def reader(self, flags: GenerationArguments) -> CausalLMReader:
        return CausalLMReader(self.model, self.prompter, flags)

    def batch(self, sequences: Sequence[TokenSequence], indices: Sequence[int] = ()) -> AnswerBatch:
        return answer_batch(sequences, self._collate, indices)

    def forward(self, batch: AnswerBatch) -> tuple[Tensor, dict[str, float]]:
        """The loss summed over answer tokens, whose number is the batch's `weight`. -> []"""
        return answer_nll(answer_logits(self.model, batch), batch.targets).sum(), {}

    def save_pretrained(self, directory: str | Path) -> None:
        self.model.save_pretrained(directory)
        self.prompter.tokenizer.save_pretrained(directory)


def encode_examples(prompter: Any, examples: Sequence[Example], shown: Sequence[Sequence[Document]]) -> dict[int, Any]:
    """Prompts of a `Prompter` or `FiDPrompter` with gold answers, by example number; those too long are left out."""
    rows = [(example, row, example.gold_answer) for example, row in zip(examples, shown, strict=True)]
    sequences = fitting(prompter.encode, rows, "the example is left out")
    if not sequences:
        raise UserError(f"{prompter.length_flag}: no example fits; raise it")
    if more := sum(sequence.cut_more for sequence in sequences.values()):
        log.warning("%d prompts are cut more than in generation: their answers are longer than --max_new_tokens", more)
    return sequences
