"""What all objectives that train an encoder share: tokens when they are needed, embeddings with gradient, in chunks."""

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

TEXTS_KEPT = 2**17  # whose token ids are remembered, some 600 bytes each


@dataclass(kw_only=True)
class ChunkArguments(Arguments):
    """How many texts are encoded at once in training, and how much of their embeddings is compared."""

    chunk_size: int = flag(0, "Texts encoded at once; the gradient is the same. 0: all.", also="grad_cache_chunk_size")
    matryoshka_dims: list[int] = flag(
        [], "Train embeddings that can be cut, by the mean of the losses at these dimensions, such as 384 192 96."
    )

    def check(self) -> None:
        self.check_bounds("chunk_size", at_least=0)
        self.check_bounds("matryoshka_dims", at_least=1)
        if twice := [d for d in self.matryoshka_dims if self.matryoshka_dims.count(d) > 1]:
            raise UserError(f"--matryoshka_dims {twice[0]}: is given twice; leave one out")


class Tokens:
    """Token ids of numbered texts, made when they are asked for, and remembered until they are too many."""

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
    """The documents, behind them those of `rows` that they lack; and the place of each document of `rows` there."""
    brought = list(chain.from_iterable(rows))
    keys = keys_of(brought)
    places = Places(keys_of(documents))(keys)
    lacking = np.flatnonzero(places < 0)
    _, first, same = np.unique(keys[lacking], return_index=True, return_inverse=True)
    places[lacking] = len(documents) + same
    numbers = iter(places.tolist())
    both: Any = [documents, [brought[place] for place in lacking[first]]]
    return ConcatDataset(both), [list(islice(numbers, len(row))) for row in rows]


@dataclass(frozen=True)
class Chunks(Batch):
    """N texts, those of similar length together."""

    parts: tuple[TokenBatch, ...]
    places: Tensor  # where each text is among the parts' texts. [N]


def in_chunks(encoder: Encoder, sequences: Sequence[Sequence[int]], size: int = 0) -> Chunks:
    """Token ids for `embed_chunks`, `size` texts in each part; 0: all in one. [N] -> [N]"""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    ordered, size = [sequences[i] for i in order], size or len(order)
    parts = tuple(encoder.collate(ordered[start : start + size]) for start in range(0, len(order), size))
    return Chunks(parts, torch.tensor(order).argsort())


@dataclass(frozen=True)
class EncoderBatch(Batch):
    """B questions, and the P distinct documents that they are compared with."""

    queries: Chunks  # [B]
    passages: Chunks  # [P]
    indices: Sequence[int]  # the examples' numbers in their file

    @property
    def weight(self) -> int:
        """Questions, whatever their documents are."""
        return len(self.queries.places)

    @property
    def num_tokens(self) -> int:
        return sum(len(part.rows) for part in (*self.queries.parts, *self.passages.parts))


class EncoderObjective(nn.Module):
    """An encoder that is trained by similarities over `temperature`; each algorithm brings its `forward`.

    With `dims` the loss is its mean over similarities of the first d components (Kusupati et al. 2022, Matryoshka).
    """

    def __init__(self, encoder: Encoder, temperature: float, dims: Sequence[int] = ()) -> None:
        super().__init__()
        self.encoder, self.temperature, self.dims = encoder, temperature, sorted(dims, reverse=True)
        largest, whole = max(dims, default=encoder.dimension), encoder.dimension
        if largest > whole:
            raise UserError(f"--matryoshka_dims {largest}: the embeddings have {whole} dimensions; leave it out")
        if largest < whole:
            log.warning("--matryoshka_dims: without %d, whole embeddings are not trained; add it", whole)

    def embed(self, batch: EncoderBatch) -> tuple[Tensor, Tensor]:
        """Embeddings of questions and passages, with gradient unless these are frozen. -> [B, D], [P, D]"""
        queries = embed_chunks(self.encoder, batch.queries)
        return queries, embed_chunks(self.encoder.passage_side, batch.passages)

    def similarities(self, queries: Tensor, passages: Tensor) -> list[Tensor]:
        """Inner products over temperature, for each of `dims`, the largest first. [B, D], [P, D] -> [B, P] each"""
        sides = [(queries, passages)]
        if self.dims:
            sides = [(queries[:, :d], passages[:, :d]) for d in self.dims]
            if self.encoder.settings.normalize:
                sides = [(functional.normalize(q, dim=-1), functional.normalize(p, dim=-1)) for q, p in sides]
        with distributed.autocast(torch.float32):  # the index compares in float32, too
            return [q @ p.T / self.temperature for q, p in sides]

    def save_pretrained(self, directory: str | Path) -> None:
        self.encoder.save_pretrained(directory)


def embed_chunks(encoder: Encoder, chunks: Chunks) -> Tensor:
    """Embeddings with gradient. [N] -> [N, D]

    Only one part's activations are held, and computed again in the backward pass: the gradient is that of one large
    batch, exactly (Gao et al. 2021, whose two passes are what activation checkpointing does).
    """
    if len(chunks.parts) == 1:
        return encoder(chunks.parts[0])[chunks.places]
    # Dropout repeats its choice if `checkpoint` keeps the device's random state: it looks for the device among the
    # arguments that are tensors, and does not see those inside a batch; hence `starts`.
    found = [checkpoint(lambda _, b=part: encoder(b), part.starts, use_reentrant=False) for part in chunks.parts]
    return torch.cat(found)[chunks.places]
