"""RPG and DCA: the retriever's distribution over K documents learns a frozen teacher's (Shi et al. 2023, REPLUG LSR;
Izacard & Grave 2020). The two differ only in who is asked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rqa.models.encoder import Encoder
from rqa.objectives.ctl import embed_in_chunks
from rqa.objectives.losses import distillation
from rqa.runtime.precision import autocast


@dataclass(frozen=True)
class DistillationBatch:
    """B questions with K documents each, and what the teacher thinks of them.

    Attributes:
        queries: Token ids of the questions. [B]
        passages: Token ids of the distinct documents. [P]
        columns: Which of `passages` each document is. [B, K]
        teacher: The teacher's logits, -inf where a question has fewer than K documents. [B, K]
        indices: The examples' numbers in their file.
        hit_rate: Share of the teacher's scores, so far in this run, that did not have to be computed.
    """

    queries: Sequence[Sequence[int]]
    passages: Sequence[Sequence[int]]
    columns: Tensor
    teacher: Tensor
    indices: Sequence[int]
    hit_rate: float = 1.0

    @property
    def weight(self) -> int:
        """Questions, not documents; one without any document counts, and its loss is zero."""
        return len(self.queries)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.queries)) + sum(map(len, self.passages))

    def to(self, device: torch.device) -> "DistillationBatch":
        return replace(self, columns=self.columns.to(device), teacher=self.teacher.to(device))


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
        logits = retriever_logits(self.encoder, batch, self.temperature, self.chunk_size)
        return distillation(batch.teacher, logits, self.direction).sum(), agreement(batch, logits)

    def save_pretrained(self, directory: str | Path) -> None:
        """Save the encoder in the layout of `sentence-transformers`."""
        self.encoder.save_pretrained(directory)


def retriever_logits(encoder: Encoder, batch: DistillationBatch, temperature: float, chunk_size: int = 0) -> Tensor:
    """Similarities over temperature, with gradient; -inf where a question has fewer than K documents. -> [B, K]"""
    queries = embed_in_chunks(encoder, batch.queries, chunk_size)  # [B, D]
    passages = embed_in_chunks(encoder.passage_side, batch.passages, chunk_size)  # [P, D]
    with autocast(queries.device, torch.float32):  # the index compares in float32, too
        similarity = torch.einsum("bd,bkd->bk", queries, passages[batch.columns]) / temperature
    return similarity.masked_fill(batch.teacher.isneginf(), float("-inf"))


def agreement(batch: DistillationBatch, logits: Tensor) -> dict[str, float]:
    """How often teacher and retriever rank the same document first, and how often the teacher had to be asked."""
    same = (logits.argmax(-1) == batch.teacher.argmax(-1)).float().mean()
    return {"agreement": float(same), "teacher_hit_rate": batch.hit_rate}
