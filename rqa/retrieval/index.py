"""What every index over passage embeddings does, whatever engine keeps it, and the flags of all of them."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from rqa.data import Document
from rqa.documents import Prints
from rqa.runtime.errors import UserError
from rqa.runtime.flags import Arguments, flag

log = logging.getLogger(__name__)

ENGINE = "milvus::"


@dataclass(kw_only=True)
class IndexArguments(Arguments):
    """Where the index is, and how it is built and searched."""

    index_path: str | None = flag(
        None, "Index: loaded from there, or built there if absent or stale. A directory, or milvus::URL/collection, or "
        "milvus::file.db/collection. Default: in memory.", also="full_dataset_index_path",
    )  # fmt: skip
    index_factory: str = flag(
        "auto", "FAISS factory string, such as Flat, HNSW32 or IVF4096,Flat. auto: Flat to 200,000 passages, then IVF."
    )
    index_search_parameters: str = flag("", "FAISS search parameters, such as nprobe=32 or efSearch=128.", rare=True)
    update: bool = flag(
        False, "Whether a stale index gets what is new, loses what is gone, and keeps the rest.", rare=True
    )
    rebuild: bool = flag(False, "Whether a stale collection of an engine, which others may use, is rebuilt.", rare=True)
    filter: str | None = flag(None, "Condition that passages meet, such as 'source == \"a\"'; engines only.", rare=True)

    def check(self) -> None:
        stray = [name for name in ("rebuild", "filter") if getattr(self, name)]
        if stray and not (self.index_path or "").startswith(ENGINE):
            raise UserError(f"--{stray[0]}: is for an engine; give --index_path {ENGINE}..., or leave the flag out")


class Index(ABC):
    """Passages by the inner product of their embeddings with a question's, named by positions in the database."""

    encoder = ""  # the fingerprint of the encoder whose embeddings are held; empty while there are none
    stamp = ""  # the fingerprint of encoder and set of passages
    version = ""  # another one after each change of what is found
    dtype = "float32"  # what embeddings were computed in; the index serves encoders of any precision
    about = ""  # its kind and size, for a message

    def __init__(self, documents: Sequence[Document], flags: IndexArguments, path: str | None = None) -> None:
        self.documents, self.flags, self.path = documents, flags, path

    @abstractmethod
    def load(self) -> bool:
        """Open what lies at the path; False, and nothing changed, if there is nothing that can be used."""

    @abstractmethod
    def held(self) -> Prints:
        """Fingerprints of the passages that are held. [M]"""

    @abstractmethod
    def build(self, encoder: str, dimension: int, update: bool) -> Prints:
        """Begin what `swap` puts in place of what is searched, with `update` from what is held now.

        -> the passages that need not be added: those of an interrupted build, too. [M]
        """

    @abstractmethod
    def add(self, numbers: np.ndarray, vectors: np.ndarray) -> None:
        """Add documents by position, each process its own. [n], float32 [n, D]"""

    @abstractmethod
    def remove(self, passages: Prints) -> None:
        """Leave out passages that the database no longer holds; called before any is added. [n]"""

    @abstractmethod
    def swap(self, stamp: str, dtype: str) -> None:
        """Search what was built from now on; every process calls it when all have added theirs."""

    @abstractmethod
    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents, best first. [Q, D] -> scores [Q, k], positions [Q, k]; position -1: none was found."""

    @abstractmethod
    def replace_stale(self) -> None:
        """Say that what lies at the path is stale; where others may use it, refuse, unless the flags allow it."""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other run builds the same index."""
        yield


def ranked(scores: np.ndarray, numbers: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k greatest scores of each row, of equal ones the lower number first; -1 is last. [Q, n] x 2 -> [Q, k] x 2"""
    scores = np.where(numbers >= 0, scores, -np.inf).astype(np.float32)
    order = np.lexsort((numbers, -scores), axis=-1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(numbers, order, 1)
