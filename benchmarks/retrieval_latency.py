#!/usr/bin/env python
"""How fast is retrieval? Encoding and search of 1, 8, 64 and 512 questions, compared with other libraries.

    python benchmarks/retrieval_latency.py --embedding_model E                                      # pydocs
    python benchmarks/retrieval_latency.py --embedding_model E --document_path documents.pkl --eval_data_path q.jsonl
    python benchmarks/retrieval_latency.py --only search --sizes 100000 1000000 --factories Flat IVF4096,Flat

The first part measures the whole way from a question's text to ten passages on a real corpus, each system in its own
process: rqa, sentence-transformers with `util.semantic_search`, and sentence-transformers with raw faiss. The second
part measures the search alone, on synthetic vectors of 384 dimensions: `FaissIndex`, and raw faiss with its own
settings (without the threshold for matrix products that rqa sets) on the same index. Its recall@10 is the share of the
exact neighbours that are found. Needs
`pip install -e ".[bench]"`.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import faiss
import numpy as np
from harness import compare, new_parser, prepared, print_table, read_corpus, run_benchmark, times

from rqa.evaluation.runtime import latencies, seconds
from rqa.retrieval.faiss_index import FAISS_BLAS_THRESHOLD

K = 10
DIMENSION = 384
BATCHES = (1, 8, 64, 512)  # questions at once
SYSTEMS = {  # name -> its allocator settings
    "rqa": ["tuned"],
    "sentence-transformers": ["default", "tuned"],
    "sentence-transformers + faiss": ["default", "tuned"],
    "search": ["default"],  # alone
}
FACTORIES = ["Flat", "HNSW32", "IVF1024,Flat", "IVF1024,PQ48"]
PARAMETERS = {"HNSW": "efSearch=128", "IVF": "nprobe=32"}


def main() -> None:
    parser = new_parser(__doc__, "--eval_data_path", systems=SYSTEMS)
    parser.add_argument("--embedding_model", help="for all but the search alone")
    parser.add_argument("--sizes", type=int, nargs="*", default=[100_000, 1_000_000], help="of synthetic corpora")
    parser.add_argument("--factories", nargs="*", default=FACTORIES, help="of their indexes")
    parser.add_argument("--seconds", type=float, default=3.0, help="at least so long is each figure measured")
    arguments = parser.parse_args()
    if arguments.only != ["search"] and not arguments.embedding_model:
        parser.error("--embedding_model: name an encoder, or give --only search")
    run_benchmark(__file__, arguments, SYSTEMS, measure, report, prepare)


def prepare(arguments: argparse.Namespace) -> tuple[list[str], list[str]] | None:
    """Passages and questions, the same for every system; the search alone needs none."""
    if arguments.only == ["search"]:
        return None
    documents, _, examples = read_corpus(arguments.document_path, eval_file=arguments.eval_data_path)
    return [document.fmt_content for document in documents], [example.question for example in examples]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"indexes": search(arguments)} if arguments.system == "search" else whole(arguments)


def report(_: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    systems = [row for row in rows if row["system"] != "search"]
    indexes = [index for row in rows if row["system"] == "search" for index in row["indexes"]]
    if systems:
        report_whole(systems)
    if indexes:
        report_search(indexes)
    return {"rows": [*systems, *indexes]}


# ---------------------------------------------------------------- from text to passages


def whole(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure latency and throughput of one system at every batch size, divided into encoding and search."""
    build = open_rqa if arguments.system == "rqa" else open_sentence_transformers
    documents, questions = prepared(arguments)
    encode, find, document_seconds = build(arguments, documents)
    found = find(encode(questions[:64]))
    return {
        "documents_per_second": len(documents) / document_seconds,
        "first_found": [int(row[0]) for row in found],
        "batches": {
            size: time_batches(arguments.system, encode, find, questions, size, arguments.seconds) for size in BATCHES
        },
    }


def report_whole(rows: list[dict[str, Any]]) -> None:
    for size in rows[0]["batches"]:
        figures = [row["batches"][size] for row in rows]
        ours = figures[0] if rows[0]["system"] == "rqa" else None
        compare(figures, lambda _, ours=ours: ours, "questions_per_second")
    print_table(
        ["system", "allocator", "questions", "p50 ms", "p95 ms", "encode", "search", "questions/s", "rqa is"],
        [
            [row["system"], row["setting"], size, *(f"{figures[name]:.1f}" for name in
             ("latency_p50_ms", "latency_p95_ms", "encode_ms", "search_ms")), f"{figures['questions_per_second']:.0f}",
             times(figures)]
            for row in rows for size, figures in row["batches"].items()
        ],
    )  # fmt: skip
    for row in rows:
        same = statistics.mean(a == b for a, b in zip(row["first_found"], rows[0]["first_found"], strict=True))
        rate = row["documents_per_second"]
        print(f"{row['system']}, {row['setting']}: {rate:.0f} documents a second; first passage as rqa's: {same:.0%}")


Encode = Callable[[Sequence[str]], Any]
Find = Callable[[Any], Sequence[Sequence[int]]]


def time_batches(
    system: str, encode: Encode, find: Find, questions: list[str], size: int, budget: float
) -> dict[str, Any]:
    """Measure batches of one size; questions repeat as often as needed."""
    endless = itertools.cycle(questions)
    encoding, searching = [], []
    find(encode(list(itertools.islice(endless, size))))  # warm-up
    while sum(encoding) + sum(searching) < budget or len(encoding) < 3:
        batch = list(itertools.islice(endless, size))
        box: list[Any] = []
        encoding.append(seconds(lambda batch=batch, box=box: box.append(encode(batch))))
        searching.append(seconds(lambda box=box: find(box[0])))
    together = [sum(pair) for pair in zip(encoding, searching, strict=True)]
    return {
        "system": f"{system}, {size} at once",
        **latencies(together),
        "encode_ms": 1000 * statistics.median(encoding),
        "search_ms": 1000 * statistics.median(searching),
        "questions_per_second": size * len(together) / sum(together),
    }


def open_rqa(arguments: argparse.Namespace, documents: list[str]) -> tuple[Encode, Find, float]:
    from rqa.data import Document
    from rqa.models.encoder import EncoderArguments, load_encoder
    from rqa.retrieval.retriever import Retriever

    flags = EncoderArguments(bf16=arguments.precision == "bf16")
    encoder = load_encoder(arguments.embedding_model, flags)
    retriever = Retriever(encoder, [Document(text, formatted=text) for text in documents])
    duration = seconds(retriever.refresh)

    def encode(questions: Sequence[str]) -> np.ndarray:
        return encoder.embed(encoder.tokenize_queries(questions))

    return encode, lambda embeddings: retriever.index.search(embeddings, K)[1].tolist(), duration


def open_sentence_transformers(arguments: argparse.Namespace, documents: list[str]) -> tuple[Encode, Find, float]:
    from sentence_transformers import SentenceTransformer, util

    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    model = SentenceTransformer(arguments.embedding_model, model_kwargs={"dtype": dtype})

    def encode(texts: Sequence[str]) -> torch.Tensor:
        return model.encode(list(texts), convert_to_tensor=True, normalize_embeddings=True, batch_size=64)

    started = time.perf_counter()
    embeddings = encode(documents)
    duration = time.perf_counter() - started

    def semantic_search(asked: torch.Tensor) -> list[list[int]]:
        return [[hit["corpus_id"] for hit in row] for row in util.semantic_search(asked, embeddings, top_k=K)]

    if arguments.system == "sentence-transformers":
        return encode, semantic_search, duration
    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(embeddings.float().cpu().numpy())

    def raw_faiss(asked: torch.Tensor) -> list[list[int]]:
        with faiss_as_shipped():
            return index.search(asked.float().cpu().numpy(), K)[1].tolist()

    return encode, raw_faiss, duration


@contextmanager
def faiss_as_shipped() -> Iterator[None]:
    """Restore faiss's own threshold, which rqa changes for its process."""
    ours = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = FAISS_BLAS_THRESHOLD
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = ours


# ---------------------------------------------------------------- the search alone


def search(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for size in arguments.sizes:
        vectors, questions = synthetic(size), synthetic(max(BATCHES), seed=1)
        exact = faiss.knn(questions, vectors, K, metric=faiss.METRIC_INNER_PRODUCT)[1]
        rows += [time_index(vectors, questions, exact, factory, arguments.seconds) for factory in arguments.factories]
    return rows


def report_search(rows: list[dict[str, Any]]) -> None:
    print_table(
        ["index", "documents", "built s", "recall@10", "questions", "p50 ms", "p95 ms", "questions/s", "over faiss"],
        [
            [row["factory"], row["documents"], f"{row['build_seconds']:.1f}", f"{row['recall']:.3f}", size,
             f"{figures['latency_p50_ms']:.2f}", f"{figures['latency_p95_ms']:.2f}",
             f"{figures['questions_per_second']:.0f}", f"{figures['over_faiss']:.2f}x"]
            for row in rows for size, figures in row["batches"].items()
        ],
    )  # fmt: skip


def synthetic(size: int, seed: int = 0) -> np.ndarray:
    """Make unit vectors in clusters, as embeddings of texts are; all seeds share the clusters. [size, 384]"""
    centres = np.random.default_rng(7).standard_normal((1000, DIMENSION), dtype=np.float32)
    chance = np.random.default_rng(seed)
    vectors = centres[chance.integers(0, len(centres), size)]
    vectors += chance.standard_normal((size, DIMENSION), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def time_index(
    vectors: np.ndarray, questions: np.ndarray, exact: np.ndarray, factory: str, budget: float
) -> dict[str, Any]:
    """Search one index with rqa and with faiss itself, in turns."""
    from rqa.data import Document
    from rqa.retrieval.faiss_index import FaissIndex
    from rqa.retrieval.index import IndexArguments

    parameters = next((value for name, value in PARAMETERS.items() if factory.startswith(name)), "")
    documents = [Document(str(number)) for number in range(len(vectors))]
    ours = FaissIndex(documents, IndexArguments(index_factory=factory, index_search_parameters=parameters))
    build_seconds = seconds(lambda: ours.replace(vectors))
    with TemporaryDirectory() as directory:
        ours.save(Path(directory) / "index")
        ours.load(Path(directory) / "index")  # reload it, as theirs was: it then lies elsewhere in memory
        theirs = faiss.read_index(str(Path(directory) / "index" / "index.faiss"))
    if parameters:
        faiss.ParameterSpace().set_index_parameters(theirs, parameters)
    found = ours.search(questions, K)[1]
    recall = float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), exact.tolist(), strict=True)]))
    batches = {}
    for size in BATCHES:
        asked = itertools.cycle([questions[i : i + size] for i in range(0, len(questions), size)])
        ours_took, theirs_took = [], []
        for turn, batch in enumerate(asked):
            if sum(ours_took) >= budget and turn >= 4:
                break
            for mine in (turn % 2, 1 - turn % 2):  # the second one finds the vectors in the processor's cache
                if mine:
                    ours_took.append(seconds(lambda batch=batch: ours.search(batch, K)))
                else:
                    with faiss_as_shipped():
                        theirs_took.append(seconds(lambda batch=batch: theirs.search(batch, K)))
        batches[size] = {
            **latencies(ours_took),
            "questions_per_second": size * len(ours_took) / sum(ours_took),
            "over_faiss": statistics.median(ours_took) / statistics.median(theirs_took),
        }
    return {
        "factory": factory,
        "documents": len(vectors),
        "build_seconds": build_seconds,
        "recall": recall,
        "batches": batches,
    }


if __name__ == "__main__":
    main()
