"""What every index over passage embeddings does, whatever engine keeps it, and the flags of all of them."""

import logging
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

log = logging.getLogger(__name__)

ENGINE = "milvus::"
ENGINE_PATH = re.compile(r"milvus::(https?://[^/]+(/\w+)?|.*\.db)/[A-Za-z_]\w*", re.ASCII)


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
        False, "Whether to update a stale index: encode new passages, remove deleted ones, keep the rest.", rare=True
    )
    rebuild: bool = flag(False, "Whether to rebuild a stale collection, which others may be using.", rare=True)
    filter: str | None = flag(None, "Milvus filter that passages meet, such as 'source == \"a\"'.", rare=True)
    filter_fields: list[str] = flag([], "Metadata fields that Milvus keeps for --filter, beside source.", rare=True)

    def check(self) -> None:
        path, stray = self.index_path or "", [n for n in ("rebuild", "filter", "filter_fields") if getattr(self, n)]
        if stray and not path.startswith(ENGINE):
            raise UserError(
                f"--{stray[0]}: needs an index in Milvus; give --index_path {ENGINE}URL/name, or leave the flag out"
            )
        if bad := [name for name in self.filter_fields if not re.fullmatch(r"(?!rqa_)[A-Za-z_]\w*", name)]:
            raise UserError(f"--filter_fields {bad[0]}: Milvus cannot keep this name; rename the field")
        if path.lower().startswith(ENGINE) and not ENGINE_PATH.fullmatch(path):
            forms = "http://host:19530/name or milvus::folder/file.db/name; a name has letters, digits and _"
            raise UserError(f"--index_path {path}: not an index in Milvus; write {ENGINE}{forms}")


class Index(ABC):
    """Passages by the inner product of their embeddings with a question's, named by positions in the database."""

    encoder = ""  # the fingerprint of the encoder whose embeddings are held; empty while there are none
    stamp = ""  # the fingerprint of encoder and set of passages
    version = ""  # another one after each change of what is found
    dtype = "float32"  # what embeddings were computed in; the index serves encoders of any precision
    about = ""  # its kind and size, for a message

    def __init__(self, documents: Sequence[Document], flags: IndexArguments, path: str | None = None) -> None:
        self.documents, self.flags, self.path = documents, flags, path

    def __len__(self) -> int:
        return len(self.documents) if self.encoder else 0

    @abstractmethod
    def load(self, directory: Path | None = None) -> bool:
        """Open what lies at the path, or in a checkpoint; False, and nothing changed, if nothing there can be used."""

    @abstractmethod
    def build(self, encoder: str, dimension: int, update: bool) -> Prints:
        """Begin what `swap` puts in place of what is searched; with `update`, from what is held now.

        Without it, what lies at the path is stale: this says so, or is refused where others may use it.
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
