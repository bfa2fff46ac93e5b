"""The interface of every index over passage embeddings, and the flags of all of them."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rqa.data import Document
from rqa.documents import Prints
from rqa.runtime.errors import UserError
from rqa.runtime.flags import Arguments, flag

ENGINE = "milvus::"
ENGINE_PATH = re.compile(r"milvus::(https?://[^/]+(/\w+)?|.*\.db)/[A-Za-z_]\w*", re.ASCII)


@dataclass(kw_only=True)
class IndexArguments(Arguments):
    """The index."""

    index_path: str | None = flag(
        None, "Index to load, or to build if absent or stale: a directory, milvus::URL/collection or "
        "milvus::file.db/collection. Default: in memory."
    )  # fmt: skip
    index_factory: str = flag(
        "auto",
        "FAISS factory string, such as Flat, HNSW32 or IVF4096,Flat. auto: Flat up to 200,000 passages, then IVF.",
    )
    index_search_parameters: str = flag("", "FAISS search parameters, such as nprobe=32 or efSearch=128.", rare=True)
    update: bool = flag(
        False, "Whether to update a stale index: encode new passages, remove deleted ones, keep the rest.", rare=True
    )
    rebuild: bool = flag(False, "Whether to rebuild a stale Milvus collection, which others may be using.", rare=True)
    filter: str | None = flag(None, "Milvus filter expression for passages, such as 'source == \"a\"'.", rare=True)
    filter_fields: list[str] = flag([], "Metadata fields to store in Milvus for --filter, besides source.", rare=True)

    def check(self) -> None:
        path, stray = self.index_path or "", [n for n in ("rebuild", "filter", "filter_fields") if getattr(self, n)]
        if stray and not path.startswith(ENGINE):
            raise UserError(f"--{stray[0]}: needs an index in Milvus; give --index_path {ENGINE}URL/name, or remove it")
        if bad := [name for name in self.filter_fields if not re.fullmatch(r"(?!rqa_)[A-Za-z_]\w*", name)]:
            raise UserError(f"--filter_fields {bad[0]}: is not a field name that Milvus accepts; rename the field")
        if path.lower().startswith(ENGINE) and not ENGINE_PATH.fullmatch(path):
            forms = "http://host:19530/name or milvus::folder/file.db/name; a name has letters, digits and _"
            raise UserError(f"--index_path {path}: not an index in Milvus; write {ENGINE}{forms}")


class Index(ABC):
    """Finds passages by inner product with a question's embedding; results are positions in the database."""

    encoder = ""  # the fingerprint of the encoder that made the embeddings; empty while there are none
    stamp = ""  # the fingerprint of encoder and set of passages
    version = ""  # changes whenever search results may change
    dtype = "float32"  # the dtype that embeddings were computed in; the index serves encoders of any precision
    about = ""  # kind and size, for messages

    def __init__(self, documents: Sequence[Document], flags: IndexArguments, path: str = "") -> None:
        self.documents, self.flags, self.path = documents, flags, path

    def __len__(self) -> int:
        return len(self.documents) if self.encoder else 0

    @abstractmethod
    def load(self, directory: Path | None = None) -> bool:
        """Open the index at the path, or in a checkpoint; False, and nothing changes, if it cannot be used."""

    @abstractmethod
    def build(self, encoder: str, dimension: int, update: bool) -> Prints:
        """Begin the index that `swap` will make current; with `update`, it starts as a copy of the current one.

        Without `update`, a stale index at the path is replaced with a warning, or an error where others may use it.
        -> the passages that need not be added, including those from an interrupted build. [M]
        """

    @abstractmethod
    def add(self, numbers: np.ndarray, vectors: np.ndarray) -> None:
        """Add documents by position, each process its own. [n], float32 [n, D]"""

    @abstractmethod
    def remove(self, passages: Prints) -> None:
        """Remove passages that the database no longer holds; called before `add`. [n]"""

    @abstractmethod
    def swap(self, stamp: str, dtype: str) -> None:
        """Make the new index current. Every process calls it after all have added their documents."""

    @abstractmethod
    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents, best first. [Q, D] -> scores [Q, k], positions or -1 where there are fewer [Q, k]"""
