"""RPG and DCA: the retriever's distribution over K documents learns a frozen teacher's (Shi et al. 2023, REPLUG LSR;
Izacard & Grave 2020). The two differ only in who is asked."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rqa.models.encoder import Encoder
from rqa.objectives.encoding import EncoderBatch, EncoderObjective
from rqa.objectives.losses import distillation
from rqa.runtime.precision import autocast


@dataclass(frozen=True)
class DistillationBatch(EncoderBatch):
    """Questions with K documents each, and what the teacher thinks of them.

    A question without any document counts in the weight, and its loss is zero.

    Attributes:
        columns: Which of `passages` each document is. [B, K]
        teacher: The teacher's logits, -inf where a question has fewer than K documents. [B, K]
        hit_rate: Share of the teacher's scores, so far in this run, that did not have to be computed.
    """

    columns: Tensor
    teacher: Tensor
    hit_rate: float = 1.0


class ListObjective(EncoderObjective):
    """An objective over K documents of each question, which a teacher has scored."""

    def logits(self, batch: DistillationBatch) -> Tensor:
        """Similarities over temperature, with gradient; -inf where a question has fewer than K documents. -> [B, K]"""
        queries = self.embed_queries(batch.queries)  # [B, D]
        passages = self.embed_passages(batch.passages)  # [P, D]
        with autocast(queries.device, torch.float32):  # the index compares in float32, too
            similarity = torch.einsum("bd,bkd->bk", queries, passages[batch.columns]) / self.temperature
        return similarity.masked_fill(batch.teacher.isneginf(), float("-inf"))


class Distillation(ListObjective):
    """KL divergence between the teacher's softmax over the K documents and the retriever's.

    Args:
        direction: As in `losses.distillation`.
    """

    def __init__(self, encoder: Encoder, temperature: float, direction: str, chunk_size: int = 0) -> None:
        super().__init__(encoder, temperature, chunk_size)
        self.direction = direction

    def forward(self, batch: DistillationBatch) -> tuple[Tensor, dict[str, float]]:
        """The divergence summed over questions, and how often both rank the same document first. -> []"""
        logits = self.logits(batch)
        return distillation(batch.teacher, logits, self.direction).sum(), agreement(batch, logits)


def agreement(batch: DistillationBatch, logits: Tensor) -> dict[str, float]:
    """How often teacher and retriever rank the same document first, and how often the teacher had to be asked."""
    same = (logits.argmax(-1) == batch.teacher.argmax(-1)).float().mean()
    return {"agreement": float(same), "teacher_hit_rate": batch.hit_rate}
