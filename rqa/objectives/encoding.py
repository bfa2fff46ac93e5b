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

    chunk_size: int = flag(
        0, "Texts encoded at once: memory is bounded, the gradient stays the same. 0: the whole batch.",
        also="grad_cache_chunk_size",
    )  # fmt: skip

    def check(self) -> None:
        self.check_bounds("chunk_size", at_least=0)


@dataclass(frozen=True)
class EncoderBatch(Batch):
    """B questions, and the P distinct documents that they are compared with.

    Attributes:
        queries: Token ids of the questions. [B]
        passages: Token ids of the documents. [P]
        indices: The examples' numbers in their file.
    """

    queries: Sequence[Sequence[int]]
    passages: Sequence[Sequence[int]]
    indices: Sequence[int]

    @property
    def weight(self) -> int:
        """Questions, whatever their documents are."""
        return len(self.queries)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.queries)) + sum(map(len, self.passages))


class EncoderObjective(nn.Module):
    """An encoder that is trained by similarities; each algorithm brings its `forward`.

    Args:
        temperature: Similarities are divided by it.
        chunk_size: As in `embed_in_chunks`.
    """

    def __init__(self, encoder: Encoder, temperature: float, chunk_size: int = 0) -> None:
        super().__init__()
        self.encoder = encoder
        self.temperature = temperature
        self.chunk_size = chunk_size

    def embed_queries(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Embeddings of questions, with gradient. [N] -> [N, D]"""
        return embed_in_chunks(self.encoder, sequences, self.chunk_size)

    def embed_passages(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Embeddings of passages, with gradient unless they are frozen. [N] -> [N, D]"""
        return embed_in_chunks(self.encoder.passage_side, sequences, self.chunk_size)

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
        # Dropout repeats its choice if `checkpoint` keeps the device's random state: it looks for the device among the
        # arguments that are tensors, and does not see those inside a batch; hence `starts`.
        parts = [checkpoint(lambda _, b=batch: encoder(b), batch.starts, use_reentrant=False) for batch in batches]
        embeddings = torch.cat(parts)
    return embeddings[torch.tensor(order, device=device).argsort()]
