"""FiD: the likelihood of the answer by a decoder that attends to all passages (Izacard & Grave 2020)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rqa.models import encoder_decoder
from rqa.models.encoder_decoder import FiD, FiDPromptArguments, FiDPrompter, FiDSequence
from rqa.models.reader import GenerationArguments
from rqa.objectives.losses import answer_nll
from rqa.objectives.swr import SwRArguments


@dataclass(kw_only=True)
class FiDArguments(SwRArguments, FiDPromptArguments, GenerationArguments):
    """FiD's own flags."""


class FiDLikelihood(nn.Module):
    """Cross-entropy on the answer and its end token."""

    faster = 4  # as in AnswerLikelihood

    def __init__(self, model: PreTrainedModel, prompter: FiDPrompter, precision: torch.dtype | None = None) -> None:
        super().__init__()
        self.fid, self.prompter = FiD(model, precision), prompter

    @classmethod
    def load(cls, path: str, flags: FiDArguments) -> Self:
        """The objective over the encoder-decoder at `path`; only the main process reads its weights."""
        loaded = encoder_decoder.load_encoder_decoder(path, flags, flags.trained_dtype, main_only=True)
        return cls(*loaded, flags.precision)

    @property
    def model(self) -> PreTrainedModel:
        return self.fid.model

    def reader(self, flags: GenerationArguments) -> encoder_decoder.FiDReader:
        return encoder_decoder.FiDReader(self.fid, self.prompter, flags)

    def batch(self, sequences: Sequence[FiDSequence], indices: Sequence[int] = ()) -> encoder_decoder.FiDBatch:
        return encoder_decoder.fid_batch(sequences, self.fid.collate, indices)

    def forward(self, batch: encoder_decoder.FiDBatch) -> tuple[Tensor, dict[str, float]]:
        """The loss summed over answer tokens, whose number is the batch's `weight`. -> []"""
        return answer_nll(*self.fid(batch)).sum(), {}

    def save_pretrained(self, directory: str | Path) -> None:
        self.model.save_pretrained(directory)
        self.prompter.tokenizer.save_pretrained(directory)
