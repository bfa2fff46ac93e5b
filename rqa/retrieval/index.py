"""The FAISS index over passage embeddings: built, searched, replaced in memory, saved and loaded."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch  # noqa: F401  before FAISS, or each has an OpenMP of its own, and their threads fight for the cores
import faiss
import numpy as np

from rqa.runtime.errors import UserError
from rqa.runtime.files import COMPLETION_MARK, atomic_directory, damage, read_json
from rqa.runtime.flags import Arguments, flag

# FAISS 1.15 compares queries with a flat index one by one where they hold less than 128,000 numbers; one matrix product
# is faster from some 1,200 on, up to eight times. To older versions the threshold is a number of queries, 20: it stays.
FAISS_BLAS_THRESHOLD = faiss.cvar.distance_compute_blas_threshold
faiss.cvar.distance_compute_blas_threshold = min(FAISS_BLAS_THRESHOLD, 1200)

INDEX_FILES = {"index.faiss", "index.json", COMPLETION_MARK}


@dataclass(kw_only=True)
class IndexArguments(Arguments):
    """Where the index is, and how it is built and searched."""

    index_path: str | None = flag(
        None, "Index: loaded from there, or built there if absent or stale. Default: in memory.",
        also="full_dataset_index_path",
    )  # fmt: skip
    index_factory: str = flag("Flat", "FAISS factory string, such as Flat, HNSW32 or IVF4096,Flat.")
    index_search_parameters: str = flag("", "FAISS search parameters, such as nprobe=32 or efSearch=128.", rare=True)


class Index:
    """Inner-product search over N embeddings."""

    def __init__(self, flags: IndexArguments) -> None:
        self.flags = flags
        self.stamp = ""  # the fingerprint of documents, encoder and settings that the embeddings were made from
        self.dtype = "float32"  # what they were computed in; the index serves encoders of any precision
        self._faiss: faiss.Index | None = None

    def __len__(self) -> int:
        return self._faiss.ntotal if self._faiss else 0

    def replace(self, embeddings: np.ndarray, stamp: str = "") -> None:
        """Index these embeddings instead of the present ones. [N, D]"""
        factory = self.flags.index_factory
        try:
            index = faiss.index_factory(embeddings.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
            index.train(embeddings)
            index.add(embeddings)
        except RuntimeError as error:
            refused = f"FAISS refuses it for {len(embeddings)} documents ({_reason(error)})"
            raise UserError(f"--index_factory {factory}: {refused}; try Flat") from None
        self._use(index, stamp)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents, best first. [Q, D] -> scores [Q, k], ids [Q, k]; id -1 where none was found."""
        assert self._faiss is not None, "the index is empty"
        return self._faiss.search(queries, min(k, len(self)))

    def save(self, directory: str | Path) -> None:
        """Write index and stamp as one directory, atomically."""
        assert self._faiss is not None, "the index is empty"
        refuse_foreign_directory(Path(directory))
        with atomic_directory(directory) as temporary:
            with open(temporary / "index.faiss", "wb") as file:  # of its own files FAISS ignores what closing them says
                faiss.write_index(self._faiss, faiss.PyCallbackIOWriter(file.write))
            known = {"stamp": self.stamp, "dtype": self.dtype}
            state = known | {"index_factory": self.flags.index_factory, "documents": len(self)}
            (temporary / "index.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    def load(self, directory: str | Path) -> bool:
        """Read what `save` wrote; False, and nothing changed, if it is absent, damaged or of another kind."""
        if damage(directory):
            return False
        try:
            state = read_json(Path(directory, "index.json"))
            index = faiss.read_index(str(Path(directory, "index.faiss")))
            fits = (state.get("index_factory"), state.get("documents")) == (self.flags.index_factory, index.ntotal)
        except (UserError, RuntimeError, MemoryError):
            return False
        if fits:
            self._use(index, state.get("stamp", ""))
            self.dtype = state.get("dtype", "float32")
        return fits

    def _use(self, index: faiss.Index, stamp: str) -> None:
        if parameters := self.flags.index_search_parameters:
            try:
                faiss.ParameterSpace().set_index_parameters(index, parameters)
            except RuntimeError as error:
                message = f"--index_search_parameters {parameters}: FAISS refuses it ({_reason(error)})"
                raise UserError(f"{message}; write name=value pairs of this kind of index") from None
        self._faiss, self.stamp = index, stamp


def refuse_foreign_directory(directory: Path) -> None:
    """Saving replaces a whole directory: it must be an index, empty or absent."""
    names = {entry.name for entry in directory.iterdir()} if directory.is_dir() else set()
    if directory.is_file() or (names and ("index.json" not in names or names - INDEX_FILES)):
        raise UserError(f"index path {directory}: holds something that is not an rqa index; choose another path")


def _reason(error: RuntimeError) -> str:
    """FAISS puts the source location in front of the reason."""
    return str(error).rpartition(": ")[2].strip() or type(error).__name__
