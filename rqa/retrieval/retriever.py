"""The interface of all retrievers, which take questions in batches, and the dense retriever."""

import logging
import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Self

import numpy as np

from rqa.data import Document
from rqa.documents import passages_of
from rqa.models.encoder import Encoder
from rqa.retrieval.faiss_index import FaissIndex
from rqa.retrieval.index import ENGINE, Index, IndexArguments
from rqa.retrieval.ranking import Hits
from rqa.runtime import distributed
from rqa.runtime.cli import progress, trim_heap
from rqa.runtime.errors import UserError
from rqa.runtime.files import alone, atomic_directory, cache_root, damage, fingerprint
from rqa.runtime.parallelize import ahead

log = logging.getLogger(__name__)

TEXTS_AT_ONCE = 10_000


class PassageRetriever(ABC):
    """Finds passages of a document database."""

    documents: Sequence[Document]
    index: Index | None = None  # of embeddings
    encoder: Encoder | None = None  # of questions and passages

    @abstractmethod
    def retrieve(self, questions: Sequence[str], k: int) -> Hits:
        """The k best documents for each question, fewer if the database holds fewer."""

    @abstractmethod
    def identity(self) -> str:
        """A fingerprint of everything that determines the results."""

    def retrieve_shared(self, questions: Sequence[str], k: int) -> Hits:
        """`retrieve`, with the questions divided among processes; all pass the same ones and get all hits."""
        return self.retrieve(distributed.share(questions), k).gathered()

    def retrieve_once(self, questions: Sequence[str], k: int) -> Hits:
        """`retrieve_shared`, cached on disk between runs, for a frozen retriever."""
        directory = cache_root() / "hits" / fingerprint(self.identity(), str(k), *questions)
        if distributed.from_main(damage(directory) is None):
            log.info("passages for %d questions: read from %s", len(questions), directory)
            return Hits(**np.load(directory / "hits.npz"))
        hits = self.retrieve_shared(questions, k)
        if distributed.is_main():
            with atomic_directory(directory) as temporary:
                np.savez(temporary / "hits.npz", **vars(hits))  # `np.save` does not report a full disk
        return hits

    def documents_of(self, hits: Hits) -> list[list[Document]]:
        """The documents behind the hits. [Q, k] -> [Q] lists"""
        return [[self.documents[i] for i in row if i >= 0] for row in hits.ids.tolist()]


class Retriever(PassageRetriever):
    """A dense retriever. Its encoder is the object that a trainer trains; `refresh` indexes with the current weights.

    With several processes, each calls `retrieve` and `refresh` at the same time, with its own questions: an index in
    memory is divided among them.
    """

    def __init__(self, encoder: Encoder, documents: Sequence[Document], flags: IndexArguments | None = None) -> None:
        self.encoder: Encoder = encoder
        self.documents, self.flags = documents, flags or IndexArguments()
        self.index: Index = FaissIndex(documents, self.flags)

    def open(self, path: str | Path | None = None) -> Self:
        """Load the index at `path`, or build it there if it is absent or stale; without a path, build it in memory."""
        if path is None:
            self.refresh()
            return self
        self.index, stamp = index_at(str(path), self.documents, self.flags), self.stamp()
        if not self._fits(stamp):
            with alone(self.index.path) if distributed.is_main() else nullcontext():
                distributed.barrier()  # meanwhile another run may have built it
                if not self._fits(stamp):
                    self._build(stamp)
        log.info("index %s: %s, encoded in %s", self.index.path, self.index.about, self.index.dtype)
        return self

    def _fits(self, stamp: str) -> bool:
        """Whether every process can use the index at the path."""
        return int(distributed.total([self.index.load() and self.index.stamp == stamp])[0]) == distributed.world_size()

    def _build(self, stamp: str) -> None:
        """Encode what the index lacks, continuing an interrupted build or updating a stale index."""
        index, passages, encoder = self.index, passages_of(self.documents), self.encoder.fingerprint()
        update = self.flags.update and index.encoder == encoder
        held = index.build(encoder, self.encoder.dimension, update)
        held = distributed.from_main(held)  # a faster process may have added some already
        index.remove(np.setdiff1d(held, passages))
        first = np.sort(np.unique(passages, return_index=True)[1])  # equal passages are encoded once
        missing = first[~np.isin(passages[first], held)]
        if len(missing) < len(first):
            known = len(first) - len(missing)
            log.info("index %s: %d of %d documents are already encoded", index.path, known, len(first))
        for numbers, vectors in self._encoded(missing, self.encoder.passage_side, "encode documents"):
            index.add(numbers, vectors)
        distributed.barrier()
        index.swap(stamp, self._dtype)

    def refresh(self) -> None:
        """Encode all documents with the current weights, each process its share, and replace the index in memory."""
        self.replace(self.encode(self.encoder.passage_side))

    def replace(self, vectors: np.ndarray) -> None:
        """Make an index in memory from the embeddings of this process's share of the documents. [n, D]"""
        index = FaissIndex(self.documents, self.flags)  # another retriever may be using the present one
        index.replace(vectors, self._dtype)
        self.index = index

    def encode(self, encoder: Encoder, desc: str | None = "encode documents") -> np.ndarray:
        """Embeddings of this process's share of the documents. -> float32 [n, D]"""
        share = len(range(distributed.rank(), len(self.documents), distributed.world_size()))
        vectors, start = np.empty((share, encoder.dimension), np.float32), 0
        for numbers, part in self._encoded(np.arange(len(self.documents)), encoder, desc):
            vectors[start : start + len(numbers)] = part
            start += len(numbers)
        return vectors

    def _encoded(
        self, numbers: np.ndarray, encoder: Encoder, desc: str | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Positions and embeddings, a part at a time, of this process's share of the documents `numbers`."""
        rank, size = distributed.rank(), distributed.world_size()
        mine, longest = numbers[rank::size], math.ceil(len(numbers) / size)

        def tokens(start: int) -> tuple[np.ndarray, list[Sequence[int]]]:
            part = mine[start : start + TEXTS_AT_ONCE]
            texts = [self.documents[number].fmt_content for number in part.tolist()]
            return part, [array("i", ids) for ids in encoder.tokenize_passages(texts)]

        with progress(total=len(mine), desc=desc, unit="document", disable=desc is None) as bar:
            for part, sequences in ahead(tokens, range(0, longest, TEXTS_AT_ONCE)):  # equally often on every process
                yield part, encoder.embed(sequences, bar.update)
                trim_heap()

    def retrieve(self, questions: Sequence[str], k: int) -> Hits:
        scores, ids = self.index.search(self.encoder.embed(self.encoder.tokenize_queries(questions)), k)
        return Hits(ids, scores)

    def identity(self) -> str:
        version, flags = self.index.version or self.stamp(), self.flags
        settings = (flags.index_factory, self.index.about, flags.index_search_parameters, flags.filter or "")
        return fingerprint(version, *settings, passages_of(self.documents).tobytes())

    def stamp(self) -> str:
        """A fingerprint of encoder and set of passages; their order and the precision do not matter."""
        return fingerprint(self.encoder.fingerprint(), np.unique(passages_of(self.documents)).tobytes())

    @property
    def _dtype(self) -> str:
        return str(self.encoder.passage_side.backbone.dtype).removeprefix("torch.")


def index_at(path: str, documents: Sequence[Document], flags: IndexArguments) -> Index:
    """The index at a path: a FAISS directory, or a Milvus collection."""
    if path.startswith(ENGINE):
        try:
            from rqa.retrieval.milvus import MilvusIndex
        except ImportError as error:
            raise UserError(f'--index_path {path}: needs {error.name}; pip install "rqa[milvus]"') from None
        return MilvusIndex(documents, flags, path)
    return FaissIndex(documents, flags, path)
