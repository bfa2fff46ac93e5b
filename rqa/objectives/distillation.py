"""RPG and DCA: the retriever's distribution over K documents learns a frozen teacher's (Shi et al. 2023, REPLUG LSR;
Izacard & Grave 2020). The two differ only in who is asked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rqa.models.encoder import Encoder
from rqa.objectives.ctl import embed_in_chunks
from rqa.objectives.losses import distillation


@dataclass(frozen=True)
class DistillationBatch:
    """B questions with K documents each, and what the teacher thinks of them.

    Attributes:
        queries: Token ids of the questions. [B]
        passages: Token ids of the distinct documents. [P]
        columns: Which of `passages` each document is. [B, K]
        teacher: The teacher's logits, -inf where a question has fewer than K documents. [B, K]
        indices: The examples' numbers in their file.
    """

    queries: Sequence[Sequence[int]]
    passages: Sequence[Sequence[int]]
    columns: Tensor
    teacher: Tensor
    indices: Sequence[int]

    @property
    def weight(self) -> int:
        """Questions: the divergence is averaged over them, not over documents."""
        return len(self.queries)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.queries)) + sum(map(len, self.passages))

    def to(self, device: torch.device) -> "DistillationBatch":
        columns, teacher = self.columns.to(device), self.teacher.to(device)
        return DistillationBatch(self.queries, self.passages, columns, teacher, self.indices)


class Distillation(nn.Module):
    """KL divergence between the teacher's softmax over the K documents and the retriever's.

    Args:
        temperature: Similarities are divided by it.
        direction: As in `losses.distillation`.
        chunk_size: As in `ctl.Contrastive`.
    """

    def __init__(self, encoder: Encoder, temperature: float, direction: str, chunk_size: int = 0) -> None:
        super().__init__()
        self.encoder = encoder
        self.temperature = temperature
        self.direction = direction
        self.chunk_size = chunk_size

    def forward(self, batch: DistillationBatch) -> tuple[Tensor, dict[str, float]]:
        """The divergence summed over questions, and how often both rank the same document first. -> []"""
        queries = embed_in_chunks(self.encoder, batch.queries, self.chunk_size)  # [B, D]
        passages = embed_in_chunks(self.encoder, batch.passages, self.chunk_size)  # [P, D]
        similarity = torch.einsum("bd,bkd->bk", queries.float(), passages.float()[batch.columns]) / self.temperature
        similarity = similarity.masked_fill(batch.teacher.isneginf(), float("-inf"))
        agreement = (similarity.argmax(-1) == batch.teacher.argmax(-1)).float().mean()
        return distillation(batch.teacher, similarity, self.direction).sum(), {"agreement": float(agreement)}

    def save_pretrained(self, directory: str | Path) -> None:
        """Save the encoder in the layout of `sentence-transformers`."""
        self.encoder.save_pretrained(directory)
