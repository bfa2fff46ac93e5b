"""Top-k selection by inner product; equal scores are ordered by position in the database."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import numpy as np
from torch import Tensor

from rqa.runtime import distributed

QUERIES_AT_ONCE = 64


@dataclass(frozen=True)
class Hits:
    """The documents found for Q questions, best first."""

    ids: np.ndarray  # positions in the database, -1 where fewer than k were found. [Q, k]
    scores: np.ndarray  # greater is better. [Q, k]

    def gathered(self) -> "Hits":
        """The hits of all questions, if each process has those of its `distributed.share`."""
        return Hits(distributed.gather_array(self.ids), distributed.gather_array(self.scores))


def ranked(scores: np.ndarray, numbers: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k greatest scores of each row and their numbers; ties: lower number first. [Q, n] x 2 -> [Q, k] x 2

    Number -1 means none, and comes last.
    """
    if (missing := k - numbers.shape[1]) > 0:
        room = (0, 0), (0, missing)
        scores, numbers = np.pad(scores, room), np.pad(numbers, room, constant_values=-1)
    scores = np.where(numbers >= 0, scores, -np.inf)
    order = np.lexsort((numbers, -scores), axis=-1)[:, :k]
    return np.take_along_axis(scores, order, 1).astype(np.float32), np.take_along_axis(numbers, order, 1)


def best(found: Iterable[tuple[np.ndarray, np.ndarray]], k: int) -> Hits:
    """The k greatest of each question's scores, given with their ids; ties: lower id first. [n], [n] each -> [Q, k]"""
    rows = [(np.empty((0, k), np.float32), np.empty((0, k), np.int64))]  # for no questions at all
    for scores, ids in found:
        if len(scores) > k:  # sort only candidates for the top k
            kept = np.flatnonzero(scores >= np.partition(scores, len(scores) - k)[len(scores) - k])
            scores, ids = scores[kept], ids[kept]
        rows.append(ranked(scores[None], ids[None], k))
    scores, ids = map(np.concatenate, zip(*rows, strict=True))
    return Hits(ids, scores)


def nearest(queries: np.ndarray, blocks: Iterable[Tensor], k: int) -> np.ndarray:
    """The rows with the k greatest inner products over all blocks, on their device. [Q, D], [n, D] each -> [Q, k]"""
    products, rows, start = [], [], 0
    for block in blocks:
        top = (torch.from_numpy(queries).to(block.device) @ block.T).topk(min(k, len(block)))
        products.append(top.values)
        rows.append(top.indices + start)
        start += len(block)
    chosen = torch.cat(products, 1).topk(min(k, start)).indices
    return torch.cat(rows, 1).gather(1, chosen).cpu().numpy()


def inner_products(queries: np.ndarray, vectors: Tensor, rows: np.ndarray) -> np.ndarray:
    """Inner products of each query with its own rows, in float64. [Q, D], [N, D], [Q, k] -> float32 [Q, k]"""
    scores = np.empty(rows.shape, np.float32)
    for part in (slice(start, start + QUERIES_AT_ONCE) for start in range(0, len(rows), QUERIES_AT_ONCE)):
        chosen = vectors[torch.from_numpy(rows[part].clip(0)).to(vectors.device)].double()
        part_queries = torch.from_numpy(queries[part]).to(vectors.device).double()
        scores[part] = (chosen * part_queries[:, None]).sum(-1).float().cpu()
    return scores
