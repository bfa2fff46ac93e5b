"""What every retriever returns, and what all of them can do with it."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rqa.data.documents import Document
from rqa.runtime import distributed
from rqa.runtime.files import atomic_directory, cache_root, damage, fingerprint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hits:
    """The documents found for Q questions, best first.

    Attributes:
        ids: Positions in the database, -1 where fewer than k were found. [Q, k]
        scores: What they are ranked by, the greater the better. [Q, k]
    """

    ids: np.ndarray
    scores: np.ndarray


class PassageRetriever(ABC):
    """Finds passages of a document database, by whatever means."""

    documents: Sequence[Document]

    @abstractmethod
    def retrieve(self, queries: Sequence[str], k: int) -> Hits:
        """The k best documents for each query, fewer if the database holds fewer."""

    @abstractmethod
    def identity(self) -> str:
        """A fingerprint of all that decides what is found."""

    def retrieve_shared(self, queries: Sequence[str], k: int) -> Hits:
        """`retrieve`, each process its share of the queries; all ask for the same, and all get everything."""
        hits = self.retrieve(distributed.share(queries), k)
        rows = distributed.gather(list(zip(hits.ids, hits.scores, strict=True)))
        return stack(rows, hits.ids.shape[1])

    def retrieve_once(self, queries: Sequence[str], k: int) -> Hits:
        """`retrieve`, kept on disk between runs: for a frozen retriever the answer depends on nothing else."""
        directory = cache_root() / "passages" / fingerprint(self.identity(), str(k), *queries)
        if distributed.from_main(damage(directory) is None):
            log.info("passages for %d questions: read from %s", len(queries), directory)
            return Hits(np.load(directory / "ids.npy"), np.load(directory / "scores.npy"))
        hits = self.retrieve_shared(queries, k)
        if distributed.is_main():
            with atomic_directory(directory) as temporary:
                np.save(temporary / "ids.npy", hits.ids)
                np.save(temporary / "scores.npy", hits.scores)
        return hits

    def documents_of(self, hits: Hits) -> list[list[Document]]:
        """The documents behind the hits. [Q, k] -> [Q] lists"""
        return [[self.documents[i] for i in row if i >= 0] for row in hits.ids.tolist()]


def best(scores: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids of one query's k greatest scores, and those; of equal ones the lower id first. [N], [N] -> [k], [k]

    Where N is less than k, the rest has id -1 and score -inf.
    """
    if len(scores) > k:  # sort only what can be among the k best
        kept = np.flatnonzero(scores >= np.partition(scores, len(scores) - k)[len(scores) - k])
        scores, ids = scores[kept], ids[kept]
    order = np.lexsort((ids, -scores))[:k]
    missing = k - len(order)
    return (
        np.pad(ids[order].astype(np.int64), (0, missing), constant_values=-1),
        np.pad(scores[order].astype(np.float32), (0, missing), constant_values=-np.inf),
    )


def stack(rows: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> Hits:
    """The hits of Q queries from those of each, as `best` gives them."""
    ids, scores = zip(*rows, strict=True) if rows else ([], [])
    return Hits(np.array(ids, dtype=np.int64).reshape(-1, k), np.array(scores, dtype=np.float32).reshape(-1, k))
