"""What an index finds that processes divide among themselves: a job of `run_several.py`, and run by one process."""

import sys
from pathlib import Path

import numpy as np

from rqa.data import Document
from rqa.retrieval.faiss_index import FaissIndex
from rqa.retrieval.index import IndexArguments
from rqa.runtime import distributed

FACTORIES = {"Flat": "", "IVF16,Flat": "nprobe=4", "SQ8": "", "IVF8,SQ8": "nprobe=3", "HNSW16": "efSearch=64",
             "SQ8,RFlat": "k_factor_rf=2", "IVF8,PQ4,Refine(SQ8)": "nprobe=3"}  # fmt: skip


def search_all(output: Path) -> None:
    """Ids and scores of 37 questions among 2,000 passages, some of them equal, by each kind of index."""
    chance, own = np.random.default_rng(0), slice(distributed.rank(), None, distributed.world_size())
    vectors = chance.standard_normal((2000, 24)).astype(np.float32)
    vectors[[7, 800, 1601]] = vectors[2]
    queries = np.concatenate([vectors[:3], chance.standard_normal((34, 24)).astype(np.float32)])
    documents, found = [Document(str(number)) for number in range(len(vectors))], {}
    for factory, parameters in FACTORIES.items():
        index = FaissIndex(documents, IndexArguments(index_factory=factory, index_search_parameters=parameters))
        index.replace(np.ascontiguousarray(vectors[own]))
        for name, part in zip(("scores", "ids"), index.search(queries[own], 10), strict=True):
            found[f"{factory} {name}"] = distributed.gather_array(part)
        index.collect()
        if distributed.is_main():
            index.save(output / factory)
    for size in (0, 1):  # of which a process may have none
        found[f"{size} rows"] = distributed.gather_array(queries[:size][own])
    if distributed.is_main():
        np.savez(output / "found.npz", **found)
    distributed.barrier()


if __name__ == "__main__":
    distributed.start()
    distributed.ROWS_AT_ONCE = 6  # of 18 and 19
    search_all(Path(sys.argv[2]))
