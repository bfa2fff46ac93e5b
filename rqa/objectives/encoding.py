"""Shared parts of the objectives that train an encoder: tokenization on demand, and embeddings in chunks."""

import logging
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import numpy as np
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import ConcatDataset

from rqa.data import Document
from rqa.documents import Places, keys_of
from rqa.models.encoder import Encoder
from rqa.packing import Batch, TokenBatch
from rqa.runtime import distributed
from rqa.runtime.errors import UserError
from rqa.runtime.flags import Arguments, flag

log = logging.getLogger(__name__)

TEXTS_KEPT = 2**17  # texts with cached token ids, about 600 bytes each


@dataclass(kw_only=True)
class ChunkArguments(Arguments):
    """Size of an encoder's forward passes in training, and of its embeddings."""

    chunk_size: int = flag(0, "Texts encoded at once; gradients stay the same. 0: all.", also="grad_cache_chunk_size")
    matryoshka_dims: list[int] = flag(
        [], "Dimensions such as 384 192 96: the loss is averaged over embeddings truncated to each of them."
    )

    def check(self) -> None:
        self.check_bounds("chunk_size", at_least=0)
        self.check_bounds("matryoshka_dims", at_least=1)
        if repeated := [d for d in self.matryoshka_dims if self.matryoshka_dims.count(d) > 1]:
            raise UserError(f"--matryoshka_dims {repeated[0]}: is given twice; remove one")


class Tokens:
    """Token ids of numbered texts, tokenized on demand; the cache is emptied when it holds too many."""

    def __init__(self, tokenize: Callable[[list[str]], list[list[int]]], text: Callable[[int], str]) -> None:
        self.tokenize, self.text = tokenize, text
        self._known: dict[int, array[int]] = {}

    def __call__(self, numbers: Sequence[int]) -> list[Sequence[int]]:
        if len(self._known) > TEXTS_KEPT:
            self._known.clear()
        missing = [number for number in dict.fromkeys(numbers) if number not in self._known]
        for number, ids in zip(missing, self.tokenize(list(map(self.text, missing))), strict=True):
            self._known[number] = array("i", ids)
        return [self._known[number] for number in numbers]


def numbered(documents: Sequence[Document], rows: Sequence[Sequence[Document]]) -> tuple[Any, list[list[int]]]:
    """The documents, with those that only `rows` has appended; and the positions there of each row's documents."""
    given = list(chain.from_iterable(rows))
    keys = keys_of(given)
    positions = Places(keys_of(documents))(keys)
    missing = np.flatnonzero(positions < 0)
    _, first, same = np.unique(keys[missing], return_index=True, return_inverse=True)
    positions[missing] = len(documents) + same
    numbers = iter(positions.tolist())
    both: Any = [documents, [given[position] for position in missing[first]]]
    return ConcatDataset(both), [list(islice(numbers, len(row))) for row in rows]


@dataclass(frozen=True)
class Chunks(Batch):
    """N tokenized texts in parts of similar length."""

    parts: tuple[TokenBatch, ...]
    places: Tensor  # the position of each text in the concatenated parts. [N]


def in_chunks(encoder: Encoder, sequences: Sequence[Sequence[int]], size: int = 0) -> Chunks:
    """Token ids as `embed_chunks` takes them, `size` texts in each part; 0: all in one."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    ordered, size = [sequences[i] for i in order], size or len(order)
    parts = tuple(encoder.collate(ordered[start : start + size]) for start in range(0, len(order), size))
    return Chunks(parts, torch.tensor(order).argsort())


@dataclass(frozen=True)
class EncoderBatch(Batch):
    """B questions and the P distinct documents that they are compared with."""

    queries: Chunks  # [B]
    passages: Chunks  # [P]
    indices: Sequence[int]  # the examples' numbers in their file

    @property
    def weight(self) -> int:
        """Number of questions."""
        return len(self.queries.places)


class EncoderObjective(nn.Module):
    """Base of the objectives that train an encoder; each algorithm adds its `forward`.

    With `dims` a loss is the mean over embeddings truncated to each dimension (Kusupati et al. 2022, Matryoshka).
    """

    def __init__(self, encoder: Encoder, temperature: float, dims: Sequence[int] = ()) -> None:
        super().__init__()
        self.encoder, self.temperature, self.dims = encoder, temperature, sorted(dims, reverse=True)
        largest, whole = max(dims, default=encoder.dimension), encoder.dimension
        if largest > whole:
            raise UserError(f"--matryoshka_dims {largest}: the embeddings have {whole} dimensions; remove it")
        if largest < whole:
            log.warning("--matryoshka_dims: without %d, whole embeddings are not trained; add it", whole)

    def embed(self, batch: EncoderBatch) -> tuple[Tensor, Tensor]:
        """Embeddings of questions and passages, with gradient; frozen passages have none. -> [B, D], [P, D]"""
        queries = embed_chunks(self.encoder, batch.queries)
        return queries, embed_chunks(self.encoder.passage_side, batch.passages)

    def similarities(self, queries: Tensor, passages: Tensor) -> list[Tensor]:
        """Inner products over the temperature, for each of `dims`, largest first. [B, D], [P, D] -> [B, P] each"""
        sides = [(queries, passages)]
        if self.dims:
            sides = [(queries[:, :d], passages[:, :d]) for d in self.dims]
            if self.encoder.settings.normalize:
                sides = [(functional.normalize(q, dim=-1), functional.normalize(p, dim=-1)) for q, p in sides]
        with distributed.autocast(torch.float32):  # as the index does
            return [q @ p.T / self.temperature for q, p in sides]

    def save_pretrained(self, directory: str | Path) -> None:
        self.encoder.save_pretrained(directory)


def embed_chunks(encoder: Encoder, chunks: Chunks) -> Tensor:
    """Embeddings with gradient. [N] -> [N, D]

    Only one part's activations are in memory at a time; the backward pass recomputes them. The gradient is exactly
    that of one large batch (Gao et al. 2021, GradCache, whose two passes equal activation checkpointing).
    """
    if len(chunks.parts) == 1:
        return encoder(chunks.parts[0])[chunks.places]
    # `checkpoint` restores the random state, on which dropout depends, only of devices that it finds among its tensor
    # arguments. It does not look inside a batch, so `starts` is passed to show it the device.
    parts = [checkpoint(lambda _, b=part: encoder(b), part.starts, use_reentrant=False) for part in chunks.parts]
    return torch.cat(parts)[chunks.places]
