"""CTL: contrastive learning of the encoder (Karpukhin et al. 2020, DPR; Wang et al. 2022, E5; Gao et al. 2021)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rqa.models.encoder import Encoder
from rqa.objectives.losses import contrastive
from rqa.packing import TokenBatch
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


class Contrastive(nn.Module):
    """Softmax over the batch's documents, those of all processes included.

    Args:
        temperature: Similarities are divided by it.
        chunk_size: Sequences encoded at once; their activations are computed again in the backward pass, so that
            memory is bounded by the chunk and the gradient is that of the whole batch (Gao et al. 2021). 0: no chunks.
    """

    def __init__(self, encoder: Encoder, temperature: float, chunk_size: int = 0) -> None:
        super().__init__()
        self.encoder = encoder
        self.temperature = temperature
        self.chunk_size = chunk_size

    def forward(self, batch: ContrastiveBatch) -> tuple[Tensor, dict[str, float]]:
        """The loss summed over questions, and how often the positive ranks first. -> []"""
        queries = embed_in_chunks(self.encoder, batch.queries, self.chunk_size)  # [B, D]
        passages = gather_rows(embed_in_chunks(self.encoder.passage_side, batch.passages, self.chunk_size))  # [P, D]
        documents = gather_rows(batch.documents)  # [P]
        with autocast(queries.device, torch.float32):  # the index compares in float32, too
            similarity = queries @ passages.T / self.temperature  # [B, P]
        losses, first = contrastive(similarity, documents, batch.targets, batch.gold)
        return losses.sum(), {"accuracy": float(first.float().mean())}

    def save_pretrained(self, directory: str | Path) -> None:
        """Save the encoder in the layout of `sentence-transformers`."""
        self.encoder.save_pretrained(directory)


def embed_in_chunks(encoder: Encoder, sequences: Sequence[Sequence[int]], size: int) -> Tensor:
    """Embeddings with gradient; the activations of one chunk at a time are held. [N] -> [N, D]

    A chunk's activations are computed again in the backward pass: the gradient is that of one large batch, exactly
    (Gao et al. 2021, whose two passes are what activation checkpointing does).

    Args:
        size: Sequences of a chunk, of similar length; 0: all at once, nothing computed twice.
    """
    device = encoder.backbone.device
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    size = size or len(order)
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    batches = [encoder.collate([sequences[i] for i in chunk]).to(device) for chunk in chunks]
    if len(batches) == 1:
        embeddings = encoder(batches[0])
    else:
        embeddings = torch.cat([_embed_again_in_backward(encoder, batch) for batch in batches])
    return embeddings[torch.tensor(order, device=device).argsort()]


def _embed_again_in_backward(encoder: Encoder, batch: TokenBatch) -> Tensor:
    # Dropout repeats its choice if `checkpoint` keeps the device's random state: it looks for the device among the
    # arguments that are tensors, and does not see those inside a batch.
    return checkpoint(lambda _: encoder(batch), batch.starts, use_reentrant=False)
