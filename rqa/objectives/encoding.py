"""What all objectives that train an encoder share: embeddings with gradient, in chunks, and how it is saved."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rqa.models.encoder import Encoder
from rqa.packing import Batch
from rqa.runtime.flags import Arguments, flag


@dataclass(kw_only=True)
class ChunkArguments(Arguments):
    """How many texts are encoded at once in training."""

    chunk_size: int = flag(0, "Texts encoded at once; the gradient is the same. 0: all.", also="grad_cache_chunk_size")

    def check(self) -> None:
        self.check_bounds("chunk_size", at_least=0)


@dataclass(frozen=True)
class EncoderBatch(Batch):
    """B questions, and the P distinct documents that they are compared with."""

    queries: Sequence[Sequence[int]]  # token ids of the questions. [B]
    passages: Sequence[Sequence[int]]  # token ids of the documents. [P]
    indices: Sequence[int]  # the examples' numbers in their file

    @property
    def weight(self) -> int:
        """Questions, whatever their documents are."""
        return len(self.queries)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.queries)) + sum(map(len, self.passages))


class EncoderObjective(nn.Module):
    """An encoder that is trained by similarities over `temperature`; each algorithm brings its `forward`."""

    def __init__(self, encoder: Encoder, temperature: float, chunk_size: int = 0) -> None:
        super().__init__()
        self.encoder, self.temperature, self.chunk_size = encoder, temperature, chunk_size

    def embed(self, batch: EncoderBatch) -> tuple[Tensor, Tensor]:
        """Embeddings of questions and passages, with gradient unless these are frozen. -> [B, D], [P, D]"""
        queries = embed_in_chunks(self.encoder, batch.queries, self.chunk_size)
        return queries, embed_in_chunks(self.encoder.passage_side, batch.passages, self.chunk_size)

    def save_pretrained(self, directory: str | Path) -> None:
        self.encoder.save_pretrained(directory)


def embed_in_chunks(encoder: Encoder, sequences: Sequence[Sequence[int]], size: int) -> Tensor:
    """Embeddings with gradient, of `size` sequences of similar length at once; 0: of all. [N] -> [N, D]

    Only one chunk's activations are held, and computed again in the backward pass: the gradient is that of one large
    batch, exactly (Gao et al. 2021, whose two passes are what activation checkpointing does).
    """
    device = encoder.backbone.device
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    size = size or len(order)
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    batches = [encoder.collate([sequences[i] for i in chunk]).to(device) for chunk in chunks]
    if len(batches) == 1:
        parts = [encoder(batches[0])]
    else:
        # Dropout repeats its choice if `checkpoint` keeps the device's random state: it looks for the device among the
        # arguments that are tensors, and does not see those inside a batch; hence `starts`.
        parts = [checkpoint(lambda _, b=batch: encoder(b), batch.starts, use_reentrant=False) for batch in batches]
    return torch.cat(parts)[torch.tensor(order, device=device).argsort()]
