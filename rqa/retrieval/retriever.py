"""Questions in, documents and scores out, always a batch at a time: what every retriever does, and the dense one."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from rqa.data import Document
from rqa.models.encoder import Encoder
from rqa.retrieval.index import Index, IndexArguments, refuse_foreign_directory
from rqa.runtime import distributed
from rqa.runtime.files import atomic_directory, cache_root, damage, fingerprint, remove_leftovers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hits:
    """The documents found for Q questions, best first."""

    ids: np.ndarray  # positions in the database, -1 where fewer than k were found. [Q, k]
    scores: np.ndarray  # what they are ranked by, the greater the better. [Q, k]


class PassageRetriever(ABC):
    """Finds passages of a document database, by whatever means."""

    documents: Sequence[Document]

    @abstractmethod
    def retrieve(self, questions: Sequence[str], k: int) -> Hits:
        """The k best documents for each question, fewer if the database holds fewer."""

    @abstractmethod
    def identity(self) -> str:
        """A fingerprint of all that decides what is found."""

    def retrieve_shared(self, questions: Sequence[str], k: int) -> Hits:
        """`retrieve`, each process its share of the questions; all ask for the same, and all get everything."""
        hits = self.retrieve(distributed.share(questions), k)
        return Hits(distributed.gather_array(hits.ids), distributed.gather_array(hits.scores))

    def retrieve_once(self, questions: Sequence[str], k: int) -> Hits:
        """`retrieve`, kept on disk between runs: for a frozen retriever the answer depends on nothing else."""
        directory = cache_root() / "hits" / fingerprint(self.identity(), str(k), *questions)
        if distributed.from_main(damage(directory) is None):
            log.info("passages for %d questions: read from %s", len(questions), directory)
            return Hits(**np.load(directory / "hits.npz"))
        hits = self.retrieve_shared(questions, k)
        if distributed.is_main():
            with atomic_directory(directory) as temporary:
                np.savez(temporary / "hits.npz", **vars(hits))  # `np.save` would ignore that a disk is full
        return hits

    def documents_of(self, hits: Hits) -> list[list[Document]]:
        """The documents behind the hits. [Q, k] -> [Q] lists"""
        return [[self.documents[i] for i in row if i >= 0] for row in hits.ids.tolist()]


class Retriever(PassageRetriever):
    """A FAISS index of documents and their encoder, the very object that a trainer trains; `refresh` follows it."""

    def __init__(self, encoder: Encoder, documents: Sequence[Document], flags: IndexArguments | None = None) -> None:
        self.encoder, self.documents = encoder, documents
        self.index = Index(flags or IndexArguments())

    def open(self, path: str | Path | None = None) -> Self:
        """Load the index at `path`, or build it there if it is absent or stale; without a path, build it in memory."""
        if path is None:
            self.refresh()
            return self
        stamp = self.stamp()
        refuse_foreign_directory(Path(path))
        remove_leftovers(Path(path).parent)
        if self.index.load(path) and self.index.stamp == stamp:
            log.info("index %s: %d documents, encoded in %s", path, len(self.index), self.index.dtype)
            return self
        if Path(path).is_dir() and any(Path(path).iterdir()):
            log.warning("index %s was made from other documents, weights or settings: rebuilding it", path)
        distributed.barrier()
        self.refresh(stamp)
        if distributed.is_main():
            self.index.save(path)
            log.info("index %s: built over %d documents", path, len(self.index))
        return self

    def refresh(self, stamp: str = "") -> None:
        """Encode every document with the current weights, each process its share, and replace the index in memory."""
        share = self.encode(distributed.share(range(len(self.documents))), self.encoder.passage_side)
        self.index.replace(distributed.gather_array(share), stamp)
        self.index.dtype = str(self.encoder.passage_side.backbone.dtype).removeprefix("torch.")

    def encode(self, numbers: Sequence[int], encoder: Encoder, desc: str | None = "encode documents") -> np.ndarray:
        """Embeddings of some documents, in this process alone. [n] positions in the database -> float32 [n, D]"""
        texts = [self.documents[number].fmt_content for number in numbers]
        return encoder.embed(encoder.tokenize_passages(texts), desc=desc)

    def retrieve(self, questions: Sequence[str], k: int) -> Hits:
        scores, ids = self.index.search(self.encoder.embed(self.encoder.tokenize_queries(questions)), k)
        return Hits(ids, scores)

    def identity(self) -> str:
        return fingerprint(self.index.stamp or self.stamp(), self.index.flags.index_search_parameters)

    def stamp(self) -> str:
        """A fingerprint of all that decides the index, but for the precision: any will do."""
        texts = (document.fmt_content for document in self.documents)
        return fingerprint(self.encoder.fingerprint(), self.index.flags.index_factory, *texts)


def best(scores: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids of one question's k greatest scores, and those; of equal ones the lower id first. [N], [N] -> [k], [k]"""
    if len(scores) > k:  # sort only what can be among the k best
        kept = np.flatnonzero(scores >= np.partition(scores, len(scores) - k)[len(scores) - k])
        scores, ids = scores[kept], ids[kept]
    order = np.lexsort((ids, -scores))[:k]
    room = (0, k - len(order))  # for what was not found: id -1 and score -inf
    found = np.pad(ids[order].astype(np.int64), room, constant_values=-1)
    return found, np.pad(scores[order].astype(np.float32), room, constant_values=-np.inf)


def stack(rows: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> Hits:
    """The hits of Q questions from those of each, as `best` gives them."""
    ids, scores = zip(*rows, strict=True) if rows else ([], [])
    return Hits(np.array(ids, dtype=np.int64).reshape(-1, k), np.array(scores, dtype=np.float32).reshape(-1, k))
