"""The FAISS index (flat, IVF, quantised or a graph), in memory or in a directory.

An index in memory is divided: each process holds and searches the embeddings of its own documents, and the results are
merged. An index on disk is memory-mapped, so that all processes of a machine share it. On CUDA a flat index is on the
device, and each process holds a part of it.

A flat index gives the same results however documents are divided and questions batched: FAISS finds a few candidates
more than needed, and their inner products are computed again in float64.
"""

import logging
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import faiss
import numpy as np
from torch import Tensor

from rqa.data import Document
from rqa.documents import PRINT, Places, Prints, passages_of
from rqa.retrieval.faiss_factory import Chunk, described, divides, embeddings, make, reason, stages
from rqa.retrieval.index import Index, IndexArguments
from rqa.retrieval.ranking import inner_products, nearest, ranked
from rqa.runtime import distributed, files
from rqa.runtime.errors import UserError

log = logging.getLogger(__name__)

# FAISS 1.15 searches a flat index query by query if the queries hold fewer than 128,000 numbers; a matrix product is
# faster from about 1,200 on, up to eight times. In older versions the threshold is 20 queries, which `min` keeps.
FAISS_BLAS_THRESHOLD = faiss.cvar.distance_compute_blas_threshold
faiss.cvar.distance_compute_blas_threshold = min(FAISS_BLAS_THRESHOLD, 1200)

OURS = re.compile(r"\d+\.npz|state\.json|\.rqa-.*")  # files of an unfinished build
INDEX_FILES = {"index.faiss", "index.json", "passages.npy", files.COMPLETION_MARK}
STATE = ("encoder", "stamp", "version", "dtype", "factory", "about")  # fields of index.json
MARGIN = 8  # extra candidates, since float32 may misorder near ties
PRODUCTS_AT_ONCE = 2**28  # bounds the memory of a search on a GPU


class FaissIndex(Index):
    """A FAISS index in memory, divided among processes, or in a directory."""

    def __init__(self, documents: Sequence[Document], flags: IndexArguments, path: str = "") -> None:
        super().__init__(documents, flags, path)
        self.factory = flags.index_factory
        self._count = 0  # documents in all processes
        self._divided = False  # whether each process holds different documents
        self._faiss: Any = None
        self._flat: Tensor | None = None  # a flat index's embeddings, on the search device. [n, D]
        self._numbers = np.empty(0, np.int64)  # document position by FAISS id, -1 if there is none
        self._collected: tuple[faiss.Index, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._count

    def replace(self, vectors: np.ndarray, dtype: str = "float32") -> None:
        """Index in memory the embeddings of this process's share of the documents. float32 [n, D]"""
        rank, size = distributed.rank(), distributed.world_size()
        count = int(distributed.total([len(vectors)])[0])
        made = make(self.flags.index_factory, [Chunk(np.arange(rank, count, size), lambda: vectors)], count, size > 1)
        self._use(made.index, made.numbers, count, size > 1 and divides(made.index))
        self.factory, self.about = made.kind, made.about
        self.encoder = self.stamp = self.version = ""
        self.dtype = dtype

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Index`; if documents are divided, every process calls it, each with its own queries."""
        assert self._count, "the index is empty"
        k = min(k, self._count)
        if not self._divided:
            return self._nearest(queries, k)
        all_queries = _gathered(queries)
        shape = distributed.world_size(), len(all_queries), k
        results = [_gathered(part).reshape(shape) for part in self._nearest(all_queries, k)]
        first = int(sum(distributed.total_by_rank(len(queries))[: distributed.rank()]))
        scores, numbers = (np.concatenate(part[:, first : first + len(queries)], axis=1) for part in results)
        return ranked(scores, numbers, k)

    @torch.autocast("cuda", enabled=False)  # --fp16 evaluates under autocast
    def _nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best of this process's documents. [Q, D] -> [Q, k] x 2"""
        if not len(self._numbers):
            return np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
        flat = self._flat
        if flat is not None and flat.is_cuda:
            at_once = max(1, PRODUCTS_AT_ONCE // max(len(queries), 1))
            rows = nearest(queries, flat.split(at_once), k + MARGIN)
        else:
            scores, rows = self._faiss.search(queries, k + MARGIN)
        if flat is not None:
            scores = inner_products(queries, flat, rows)
        top, numbers = ranked(scores, np.where(rows >= 0, self._numbers[rows], -1), k)
        if flat is None or len(flat) <= k + MARGIN:
            return top, numbers
        least = top[:, -1] - 1e-5 * np.abs(top[:, -1]).clip(1)  # a lower float32 score is certainly worse
        for row in np.flatnonzero(scores.min(axis=1) >= least):  # documents beyond the margin may be as good
            close = (flat @ torch.from_numpy(queries[row]).to(flat.device) >= float(least[row])).nonzero()[:, 0]
            close = close.cpu().numpy()[None]
            exact = inner_products(queries[row : row + 1], flat, close)
            top[row], numbers[row] = ranked(exact, self._numbers[close], k)
        return top, numbers

    def load(self, directory: Path | None = None) -> bool:
        """See `Index`; one that is damaged, or of another kind than the flags ask for, cannot be used."""
        if not directory:
            directory = Path(os.path.realpath(self.path))
            files.remove_leftovers(directory.parent)
        if files.damage(directory):
            return False
        try:
            state = files.read_json(directory / "index.json")
            passages = np.load(directory / "passages.npy", mmap_mode="r")
            index = faiss.read_index(str(directory / "index.faiss"), faiss.IO_FLAG_MMAP_IFC)
            stated = {name: state.get(name, "") for name in STATE}
            fits = self.flags.index_factory in ("auto", stated["factory"]) and set(map(type, stated.values())) == {str}
            fits &= passages.dtype == PRINT and np.count_nonzero(passages) == stages(index)[0].ntotal > 0
        except (UserError, RuntimeError, MemoryError, OSError, ValueError):
            return False
        if fits:
            own = passages_of(self.documents)
            same = np.array_equal(own, passages)
            self._use(index, np.arange(len(own)) if same else Places(own)(passages), index.ntotal, False)
            vars(self).update(stated)
            self._held = passages
        return fits

    def collect(self) -> None:
        """Gather on the main process the data that `save` writes; every process calls it."""
        index, numbers, flat = self._faiss, self._numbers, self._flat
        if flat is not None and flat.is_cuda:
            index = faiss.IndexFlatIP(flat.shape[1])
            index.add(flat.cpu().numpy())
        self._collected = index, numbers
        if not self._divided:
            return
        whole, places = None, []
        for rank in range(distributed.world_size()):
            data, part_numbers = distributed.from_process(rank, (faiss.serialize_index(index), numbers))
            if distributed.is_main():
                part = faiss.deserialize_index(data)
                if whole:  # only inverted lists store ids, which are shifted here
                    whole.merge_from(part, whole.ntotal if faiss.try_extract_index_ivf(whole) else 0)
                whole = whole or part
                places.append(part_numbers)
        if whole:
            self._collected = whole, np.concatenate(places)

    def save(self, directory: str | Path) -> None:
        """Write the collected index as one directory, atomically."""
        if not self._collected:
            self.collect()
        assert self._collected, "only the main process saves"
        (index, numbers), self._collected = self._collected, None
        self._write(Path(directory), index, np.where(numbers >= 0, passages_of(self.documents)[numbers], b""))

    def _write(self, directory: Path, index: faiss.Index, passages: Prints) -> None:
        refuse_foreign_directory(directory)
        state = {name: getattr(self, name) for name in STATE}
        with files.atomic_directory(directory) as temporary:
            with open(temporary / "index.faiss", "wb") as file:  # FAISS's own writer ignores errors on close
                faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
            with open(temporary / "passages.npy", "wb") as file:
                np.save(file, passages)
            files.write_json(temporary / "index.json", state)

    @property
    def _building(self) -> Path:
        """The directory that keeps embeddings until the index is built, so that a killed run loses none."""
        path = Path(os.path.realpath(self.path))
        return path.with_name(f"{path.name}.building")

    def build(self, encoder: str, dimension: int, update: bool) -> Prints:
        refuse_foreign_directory(Path(self.path))
        own, held = passages_of(self.documents), self._held[self._held != b""] if update else np.empty(0, PRINT)
        state_file = self._building / "state.json"
        state = {"of": files.fingerprint(encoder, self.stamp if update else "", own.tobytes())}
        if distributed.is_main():
            if not update and any(Path(self.path).glob("*")):
                message = "index %s: was made from other documents, weights or settings, or is damaged; rebuilding it"
                log.warning(message, self.path)
            self._building.mkdir(parents=True, exist_ok=True)
            if foreign := [each.name for each in self._building.iterdir() if not OURS.fullmatch(each.name)]:
                raise UserError(f"index path {self.path}: {self._building} holds {foreign[0]}; move it elsewhere")
            same = False
            with suppress(UserError):
                same = files.read_json(state_file) == state
            for path in self._building.glob("*.npz"):
                if not same or _is_damaged(path):
                    path.unlink()
            files.write_json(state_file, state)
        distributed.barrier()
        self.encoder, self._update = encoder, update
        return np.concatenate([held, *(own[chunk.numbers] for chunk in self._chunks())])

    def add(self, numbers: np.ndarray, vectors: np.ndarray) -> None:
        if len(numbers):
            with files.atomic_file(self._building / f"{numbers[0]}.npz") as temporary, temporary.open("wb") as file:
                np.savez(file, numbers=numbers, vectors=vectors)

    def _chunks(self) -> list[Chunk]:
        """The chunks added so far; each access reads their vectors from disk."""
        paths = sorted(self._building.glob("*.npz"), key=lambda path: int(path.stem))
        return [Chunk(np.load(path)["numbers"], lambda path=path: np.load(path)["vectors"]) for path in paths]

    def remove(self, passages: Prints) -> None:
        if len(passages) and self._flat is None and not all(map(divides, stages(self._faiss))):
            raise UserError(f"--update true: {self.factory} cannot remove passages; rebuild the index without it")
        self._gone = passages

    def swap(self, stamp: str, dtype: str) -> None:
        if distributed.is_main():
            own, threads = passages_of(self.documents), faiss.omp_get_max_threads()
            faiss.omp_set_num_threads(max(threads, distributed.world_size()))  # other processes are idle
            if self._update:
                index, passages = self._updated(own)
            else:
                chunks = self._chunks()
                count = sum(len(chunk.numbers) for chunk in chunks)
                index, numbers, self.factory, self.about = make(self.flags.index_factory, chunks, count, False)
                passages = own[numbers]
            faiss.omp_set_num_threads(threads)
            if missing := len(np.setdiff1d(own, passages)):  # a network file system may show files late
                raise UserError(f"index path {self.path}: {missing} embeddings are missing; start again")
            self.version = files.fingerprint(self.version, stamp) if self._update else stamp
            self.stamp, self.dtype = stamp, dtype
            self._write(Path(self.path), index, passages)
            shutil.rmtree(self._building)
        distributed.barrier()
        if not self.load():
            raise UserError(f"index path {self.path}: the index just written cannot be read; check the disk")

    def _updated(self, own: Prints) -> tuple[faiss.Index, Prints]:
        """The index at the path with passages removed and added, and the passage of each of its ids."""
        index = faiss.read_index(str(Path(self.path, "index.faiss")))
        first, *better = stages(index)
        gone, cells = np.isin(self._held, self._gone), divides(first) and faiss.try_extract_index_ivf(first)
        if gone.any():
            for each in [first] if cells else [first, *better]:  # ids in cells stay: they are row numbers in `better`
                each.remove_ids(np.flatnonzero(gone))
        held = np.where(gone, b"", self._held) if cells else self._held[~gone]
        for chunk in self._chunks():
            ids = np.arange(len(held), len(held) + len(chunk.numbers))  # for cells; otherwise FAISS counts
            first.add_with_ids(chunk.vectors(), ids) if cells else first.add(chunk.vectors())
            for each in better:
                each.add(chunk.vectors())
            held = np.concatenate([held, own[chunk.numbers]])
        index.ntotal = len(held) if better else first.ntotal
        self.about = described(self.factory, index, first.ntotal)
        return index, held

    def _use(self, index: faiss.Index, numbers: np.ndarray, count: int, divided: bool) -> None:
        if parameters := self.flags.index_search_parameters:
            try:
                faiss.ParameterSpace().set_index_parameters(index, parameters)
                index.search(np.zeros((1, index.d), np.float32), 1)  # some values are only refused here
            except (RuntimeError, MemoryError) as error:
                message = f"--index_search_parameters {parameters}: FAISS refuses it ({reason(error)})"
                raise UserError(f"{message}; write name=value pairs of this kind of index") from None
        self._faiss, self._flat = index, embeddings(index) if isinstance(index, faiss.IndexFlat) else None
        if self._flat is not None and distributed.device().type == "cuda":
            if not divided:  # each process moves its part to its device
                rank, size = distributed.rank(), distributed.world_size()
                self._flat, numbers, divided = self._flat[rank::size], numbers[rank::size], size > 1
            self._flat, self._faiss = self._flat.to(distributed.device()), None
        self._numbers, self._count, self._divided = numbers, count, divided


def _gathered(rows: np.ndarray) -> np.ndarray:
    """The rows of all processes, in order of rank."""
    return distributed.gather_rows(torch.from_numpy(rows).to(distributed.device())).cpu().numpy()


def _is_damaged(chunk: Path) -> bool:
    try:
        with np.load(chunk) as arrays:
            return len(arrays["numbers"]) != len(arrays["vectors"])
    except Exception:  # zip files raise nearly anything
        return True


def refuse_foreign_directory(directory: Path) -> None:
    """Raise unless the directory, which saving replaces, is an index, empty or absent."""
    names = {entry.name for entry in directory.iterdir()} if directory.is_dir() else set()
    if directory.is_file() or (names and ("index.json" not in names or names - INDEX_FILES)):
        raise UserError(f"index path {directory}: holds something that is not an rqa index; choose another path")
