"""CTL: contrastive learning of the encoder (Karpukhin et al. 2020, DPR; Wang et al. 2022, E5; Gao et al. 2021)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rqa.objectives.encoding import EncoderObjective
from rqa.objectives.losses import contrastive
from rqa.runtime.distributed import gather_rows
from rqa.runtime.precision import autocast


@dataclass(frozen=True)
class ContrastiveBatch:
    """B questions, and the P distinct documents that they are told apart from.

    Attributes:
        queries: Token ids of the questions. [B]
        passages: Token ids of the documents. [P]
        documents: The documents' numbers: equal for the same document, in every process. [P]
        targets: The number of each question's own positive, one of `documents`. [B]
        gold: Numbers of all gold documents of each question, padded with -1. [B, G]
        indices: The examples' numbers in their file.
    """

    queries: Sequence[Sequence[int]]
    passages: Sequence[Sequence[int]]
    documents: Tensor
    targets: Tensor
    gold: Tensor
    indices: Sequence[int]

    @property
    def weight(self) -> int:
        """Questions."""
        return len(self.queries)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.queries)) + sum(map(len, self.passages))

    def to(self, device: torch.device) -> "ContrastiveBatch":
        tensors = (tensor.to(device) for tensor in (self.documents, self.targets, self.gold))
        return ContrastiveBatch(self.queries, self.passages, *tensors, indices=self.indices)


class Contrastive(EncoderObjective):
    """Softmax over the batch's documents, those of all processes included."""

    def forward(self, batch: ContrastiveBatch) -> tuple[Tensor, dict[str, float]]:
        """The loss summed over questions, and how often the positive ranks first. -> []"""
        queries = self.embed_queries(batch.queries)  # [B, D]
        passages = gather_rows(self.embed_passages(batch.passages))  # [P, D]
        documents = gather_rows(batch.documents)  # [P]
        with autocast(queries.device, torch.float32):  # the index compares in float32, too
            similarity = queries @ passages.T / self.temperature  # [B, P]
        losses, first = contrastive(similarity, documents, batch.targets, batch.gold)
        return losses.sum(), {"accuracy": float(first.float().mean())}
