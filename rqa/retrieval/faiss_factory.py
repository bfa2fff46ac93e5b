"""Building a FAISS index: the choice of its kind, training, adding embeddings and tuning."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import faiss
import numpy as np
from torch import Tensor

from rqa.retrieval.ranking import nearest
from rqa.runtime import distributed
from rqa.runtime.errors import UserError

FLAT_TO = 200_000  # passages up to which `auto` searches exactly
SAMPLED = 80, 2**16  # training embeddings per cell, and the minimum
RESCORED = 4  # candidates that a refined index re-scores for each result
RECALL, QUERIES = 0.98, 200  # `auto` tunes an approximate index to this recall@10, measured with so many queries


class Chunk(NamedTuple):
    """Documents that were encoded together."""

    numbers: np.ndarray  # positions. [n]
    vectors: Callable[[], np.ndarray]  # embeddings, in memory or read from disk. float32 [n, D]


class Made(NamedTuple):
    index: faiss.Index
    numbers: np.ndarray  # the document position of each row. [n]
    kind: str  # its factory string
    about: str  # kind, size and, for a tuned one, recall


def make(factory: str, chunks: Sequence[Chunk], count: int, together: bool) -> Made:
    """An index over the embeddings; `count` is the number of documents in all processes.

    With `together`, all processes share the training, and each indexes its own chunks if the index can be divided.
    """
    width = chunks[0].vectors().shape[1]
    kind = _kind(factory, count, width)
    try:
        index = faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT)
        cells = faiss.try_extract_index_ivf(index)
        if not index.is_trained:
            sample = _some(chunks, count / max(SAMPLED[0] * cells.nlist if cells else 0, SAMPLED[1]))
            sample = distributed.gather_array(sample) if together else sample
            if not together or distributed.is_main():
                index.train(sample)
            del sample
            if together:
                index = faiss.deserialize_index(distributed.from_main(faiss.serialize_index(index)))
        if together and not divides(index):
            whole = distributed.gather_array(chunks[0].vectors())
            chunks = [Chunk(distributed.gather_array(chunks[0].numbers), lambda: whole)]
        numbers = np.concatenate([chunk.numbers for chunk in chunks])
        if isinstance(index, faiss.IndexRefine):
            index.k_factor = RESCORED
        for flat in stages(index):
            if isinstance(flat, faiss.IndexFlat):  # reserve: growing would take up to three times the memory
                flat.codes.resize(len(numbers) * flat.code_size)
                flat.codes.resize(0)
        for chunk in chunks:
            index.add(chunk.vectors())
    except RuntimeError as error:
        refused = f"FAISS refuses it for {count} documents ({reason(error)})"
        raise UserError(f"--index_factory {kind}: {refused}; try Flat") from None
    about = described(kind, index, count)
    if factory == "auto" and cells:
        about += _tune(index, chunks, together)
    return Made(index, numbers, kind, about)


def described(kind: str, index: faiss.Index, count: int) -> str:
    """The kind and size of an index, for messages."""
    about, (first, *better) = f"{kind} over {count:,} documents", stages(index)
    cells = faiss.try_extract_index_ivf(first)
    if divides(first):
        about += f", {count * (cells.code_size + 8 if cells else first.sa_code_size()) / 2**20:,.0f} MiB"
    return about + "".join(f", re-scored from {count * each.sa_code_size() / 2**20:,.0f} MiB" for each in better)


def _kind(factory: str, count: int, width: int) -> str:
    """The factory string that `auto` means: exact search while fast, then cells that fit half of the memory."""
    if factory != "auto":
        return factory
    if distributed.device().type == "cuda":
        memory = torch.cuda.get_device_properties(distributed.device()).total_memory * distributed.world_size()
        if 4 * width * count < memory / 4:
            return "Flat"
    if count <= FLAT_TO:
        return "Flat"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    parts = next(number for number in range(max(width // 8, 1), 0, -1) if width % number == 0)
    sizes = {"Flat": 4 * width, "SQ8": width, f"PQ{parts}": parts}
    kind = next((kind for kind, size in sizes.items() if count * (size + 8) < memory / 2), f"PQ{parts}")
    return f"IVF{round(4 * count**0.5)},{kind}"


def _tune(index: faiss.Index, chunks: Sequence[Chunk], together: bool) -> str:
    """Set the smallest nprobe that reaches `RECALL`, or stops improving. -> a text with nprobe and recall"""
    probes, recall, before = 1, 0.0, -1.0
    cells: Any = faiss.try_extract_index_ivf(index)
    if index.ntotal:
        queries = _some(chunks, index.ntotal / QUERIES)
        blocks = (block for chunk in chunks for block in torch.from_numpy(chunk.vectors()).split(2**16))
        exact = nearest(queries, blocks, 10)
        while True:
            cells.nprobe = probes
            found = index.search(queries, 10)[1]
            recall = float(np.mean([np.isin(row, best).mean() for row, best in zip(found, exact, strict=True)]))
            if recall >= RECALL or recall < before + 0.005 or probes >= cells.nlist:
                break
            before, probes = recall, 2 * probes
    cells.nprobe, recall = distributed.from_main((probes, recall)) if together else (probes, recall)
    return f", nprobe={cells.nprobe}, recall@10 {recall:.3f} on {QUERIES} of them"


def _some(chunks: Sequence[Chunk], every: float) -> np.ndarray:
    """The embedding of every `every`-th document. [n, D]"""
    parts = (chunk.vectors()[:: max(1, math.ceil(every))] for chunk in chunks)
    return np.concatenate([part.copy() for part in parts])  # a view would keep the whole chunk in memory


def stages(index: faiss.Index) -> list[faiss.Index]:
    """The index that finds candidates and, if there is one ("SQ8,RFlat"), the one that re-scores them."""
    parts = [index.base_index, index.refine_index] if isinstance(index, faiss.IndexRefine) else [index]
    return list(map(faiss.downcast_index, parts))


def divides(index: faiss.Index) -> bool:
    """Whether the index can be split into parts, and passages removed; a graph cannot."""
    while isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return isinstance(index, faiss.IndexFlatCodes | faiss.IndexIVF)


def embeddings(index: faiss.IndexFlat) -> Tensor:
    """The embeddings in a flat index, without a copy. -> float32 [n, D]"""
    return torch.from_numpy(faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(-1, index.d))


def reason(error: RuntimeError) -> str:
    """The reason in a FAISS error, without the source location before it."""
    return str(error).rpartition(": ")[2].strip() or type(error).__name__
