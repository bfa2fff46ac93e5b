#!/usr/bin/env python
"""What do a corpus and its index cost as they grow? Measures memory, and time to build, open, update and search.

    python benchmarks/indexing.py --embedding_model E                                # everything: an hour on two cores
    python benchmarks/indexing.py --embedding_model E --only build --sizes 10000 --rows rows.jsonl     # one part
    python benchmarks/indexing.py --embedding_model E --only --rows rows.jsonl       # tables of the parts so far

- `build` runs bin/build_index over passages of 90 words. Its one-layer encoder costs almost nothing, so that rqa's own
  cost shows. It builds an index, runs again with nothing to do, and updates the index after 1 % of passages changed.
- `speed` is tokens a second of the tokenizer alone, the encoder alone, one after the other, and both as rqa runs them.
- `peers` compares bin/build_index and the encoder E with sentence-transformers and faiss, at their best settings here.
- `decoder` is the same with a random Qwen3 of 0.1B parameters and last-token pooling, over a twentieth of the passages.
- `search` asks each kind of index 64 questions at once, over made-up vectors of 384 dimensions in clusters. `memory` is
  a flat index that two processes hold in parts, and that is never saved.
- `int8` stores the encoder E's vectors of real passages with fewer bits, re-scored or not. Recall is the share of the
  ten passages of a flat float32 index that are found.

Words have the frequencies of docstrings. `peak` is the peak memory of a command, summed over its processes. `own`
leaves out the pages of mapped files, which the system can reclaim.
"""

import argparse
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import torch
import faiss
import numpy as np
from harness import Row, measure_command, new_parser, print_result, print_table, read_corpus
from transformers import AutoTokenizer, BertConfig, BertModel, Qwen3Config, Qwen3Model

from rqa.data import Document
from rqa.documents import read_documents, write_documents
from rqa.evaluation.runtime import seconds
from rqa.models.encoder import Encoder, EncoderArguments, EncoderSettings, load_encoder
from rqa.retrieval.faiss_index import FaissIndex
from rqa.retrieval.hybrid import LexicalRetriever
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.retriever import Retriever
from rqa.runtime import distributed
from rqa.runtime.cli import tune_allocator

BUILD_INDEX = Path(__file__).parents[1] / "bin" / "build_index"
WORDS, BLOCK, DIMENSION, QUESTIONS, K = 90, 10_000, 384, 64, 10
CHANGED = 100  # an update replaces one in so many passages
ASKED = range(10**9, 10**9 + QUESTIONS)  # the questions' numbers: in the passages' clusters, but of no passage
FACTORIES = ["Flat", "memory", "auto", "SQ8,RFlat", "IVF4000,PQ48", "bm25", "milvus"]
FEWER_BITS = ["Flat", "SQ8", "SQ8,RFlat", "SQ4,RFlat", "PQ48", "PQ48,Refine(SQ8)", "PQ48,RFlat"]
TABLES = {  # part -> title, name and format of each column
    "build": "one layer: passages|size|,  built s|seconds|.1f  a second|rate|,.0f  peak GiB|peak|.2f  own|own|.2f  "
    "KiB more a passage|more|.2f  index GB|gb|.3f  again s|again|.1f  1 % new s|update_seconds|.1f  "
    "peak GiB|update_peak|.2f",
    "speed": "tokens a second|encoder|  in|dtype|  tokenizer|tokenizer_rate|,.0f  encoder|encoder_rate|,.0f  "
    "both|both|,.0f  rqa|whole_rate|,.0f  of both|of_both|.0%",
    "peers": (
        PEERS := "from file to index|system|  in|dtype|  batch|batch|  s|seconds|.1f  passages/s|rate|.1f  "
        "tokens/s|tokens_rate|,.0f  peak GiB|peak|.2f  rqa is|rqa_is|.2f"
    ),
    "decoder": PEERS.replace("index", "index, 0.1B decoder"),
    "search": "64 questions|factory|  passages|size|,  processes|processes|  read s|scanned|.1f  built s|built|.1f  "
    "peak GiB|built_peak|.2f  open s|opened|.3f  peak GiB|peak|.2f  own|own|.2f  first ms|first_ms|.0f  "
    "then ms|then_ms|.0f  recall@10|recall|.3f  all as exact|equal|",
    "int8": "real vectors|factory|  passages|size|,  questions|questions|  bytes a passage|bytes|,.0f  ms|ms|.1f  "
    "recall@10|recall|.4f  first as exact|first|.4f",
}


def main() -> None:
    parser = new_parser(__doc__, precision=False, systems=PARTS)
    parser.add_argument("--embedding_model", required=True, help="a BERT-like encoder; its tokenizer serves all parts")
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 100_000, 1_000_000], help="passages to build")
    parser.add_argument("--encoded", type=int, default=10_000, help="passages that the encoder encodes")
    parser.add_argument("--searched", type=int, default=1_000_000, help="passages to search")
    parser.add_argument("--in_milvus", type=int, default=100_000, help="passages to search in milvus-lite")
    parser.add_argument("--factories", nargs="*", default=FACTORIES, help="where to search")
    parser.add_argument("--document_path", help="passages of `int8`, with --eval_file (default: pydocs)")
    parser.add_argument("--eval_file", help="their questions")
    parser.add_argument("--rows", help="file (JSONL) to which rows are added, and whose earlier rows are shown, too")
    arguments = parser.parse_args()
    if arguments.system:
        print(json.dumps(CHILDREN[arguments.system](arguments, SimpleNamespace(**json.loads(arguments.setting)))))
        return
    kept = Path(arguments.rows or os.devnull)
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    with TemporaryDirectory() as arguments.directory:
        os.environ |= {"HF_HUB_OFFLINE": "1", "RQA_CACHE": f"{arguments.directory}/cache"}
        for part in PARTS if arguments.only is None else arguments.only:
            for row in PARTS[part](arguments):
                rows.append({"part": part, **row})
                with kept.open("a") as file:
                    print(json.dumps(rows[-1]), file=file)
    for part, columns in TABLES.items():
        titles, names, kinds = zip(*(column.split("|") for column in columns.split("  ")), strict=True)
        if mine := [row for row in rows if row["part"] == part]:
            cells = [[format(row.get(name, ""), kind if name in row else "") for name, kind in
                      zip(names, kinds, strict=True)] for row in mine]  # fmt: skip
            print_table(titles, cells)
            print()
    print_result(__file__, arguments, rows)


def child(arguments: argparse.Namespace, name: str, processes: int = 1, **setting: Any) -> Row:
    """Run one of CHILDREN in its own process."""
    given = ["--embedding_model", arguments.embedding_model, "--directory", arguments.directory, "--system", name]
    return measure_command([__file__, *given, "--setting", json.dumps(setting)], processes)


def corpus(arguments: argparse.Namespace, size: int, changed: bool = False) -> Path:
    """Write a file of passages; a larger file begins with the passages of a smaller one."""
    path = Path(arguments.directory, f"{size}.jsonl")

    def passages() -> Iterator[Document]:
        known = np.array(" ".join(document.page_content for document in read_corpus(None)[0]).split(), object)
        for start in range(0, size, BLOCK):
            places = np.random.default_rng(start).integers(len(known), size=(min(BLOCK, size - start), WORDS))
            for number, words in enumerate(known[places].tolist(), start):
                new = ["changed"] * (changed and number % CHANGED == 0)
                yield Document(" ".join(new + words), {"source": f"passage {number}"})

    if changed or not path.exists():
        write_documents(path, passages())
    return path


def one_layer(arguments: argparse.Namespace) -> Path:
    """Write a checkpoint of an encoder that costs almost nothing, with the tokenizer of the real one."""
    path = Path(arguments.directory, "one layer")
    if not path.exists():
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(arguments.embedding_model)
        small = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=1,
                           intermediate_size=64)  # fmt: skip
        encoder = Encoder(BertModel(small), tokenizer, EncoderSettings(max_passage_length=256))
        encoder.project(DIMENSION)
        encoder.save_pretrained(path)
    return path


def build_index(arguments: argparse.Namespace, encoder: Any, size: int, *more: Any) -> tuple[Row, Path]:
    """Measure bin/build_index. -> its figures and the index"""
    index = Path(arguments.directory, f"{Path(encoder).name} {size}")
    flags = ["--embedding_model", encoder, "--document_path", corpus(arguments, size), "--index_path", index]
    return measure_command([BUILD_INDEX, *flags, "--index_factory", "Flat", *more]), index


def build(arguments: argparse.Namespace) -> Iterator[Row]:
    before: Row = {}
    for size in arguments.sizes:
        encoder = one_layer(arguments)
        row, index = build_index(arguments, encoder, size)
        row |= {"size": size, "rate": size / row["seconds"]}
        row["gb"] = sum(file.stat().st_size for file in index.rglob("*")) / 1e9
        row["again"] = build_index(arguments, encoder, size)[0]["seconds"]
        corpus(arguments, size, changed=True)
        update, _ = build_index(arguments, encoder, size, "--update", "true")
        row |= {f"update_{name}": value for name, value in update.items()}
        if before:
            row["more"] = (row["peak"] - before["peak"]) * 2**20 / (size - before["size"])
        before = row
        yield row


def speed(arguments: argparse.Namespace) -> Iterator[Row]:
    for path, size in ((one_layer(arguments), arguments.encoded), (arguments.embedding_model, arguments.encoded // 5)):
        row = child(arguments, "encode", encoder=str(path), documents=str(corpus(arguments, size)))
        row["both"] = 1 / (1 / row["tokenizer_rate"] + 1 / row["encoder_rate"])
        yield row | {"encoder": Path(path).name, "of_both": row["whole_rate"] / row["both"]}


def encode(arguments: argparse.Namespace, setting: SimpleNamespace) -> Row:
    """Measure tokens a second of the tokenizer, of the encoder, and of both with everything between them."""
    tune_allocator()
    encoder, documents = load_encoder(setting.encoder, EncoderArguments()), read_documents(setting.documents)
    texts = [document.fmt_content for document in documents]
    tokens, core = encoder.tokenize_passages(texts), cast(Any, encoder.tokenizer.backend_tokenizer)
    encoder.embed(tokens[:256])  # warm-up
    work = {
        "tokenizer": lambda: core.encode_batch(texts),
        "encoder": lambda: encoder.embed(tokens),
        "whole": Retriever(encoder, documents, IndexArguments(index_factory="Flat")).open,
    }
    rates = {f"{name}_rate": sum(map(len, tokens)) / seconds(each) for name, each in work.items()}
    return {"dtype": str(encoder.backbone.dtype).removeprefix("torch."), **rates}


def peers(arguments: argparse.Namespace) -> Iterator[Row]:
    size, encoder = arguments.encoded, arguments.embedding_model
    texts = [document.fmt_content for document in read_documents(corpus(arguments, size))]
    tokens = sum(map(len, AutoTokenizer.from_pretrained(encoder)(texts)["input_ids"])) / size
    ours, index = build_index(arguments, encoder, size)
    dtype = json.loads((index / "index.json").read_text())["dtype"]
    ours |= {"system": "rqa", "dtype": dtype, "rate": size / ours["seconds"]}
    yield ours | {"tokens_rate": tokens * ours["rate"]}
    given = {"documents": str(corpus(arguments, size)), "dtype": dtype}
    tried = {
        child(arguments, "sentence-transformers", **given, size=1000, batch=batch)["encoding"]: batch
        for batch in (32, 64, 128)
    }
    theirs = child(arguments, "sentence-transformers", **given, size=size, batch=tried[min(tried)])
    theirs |= {"system": "sentence-transformers", "dtype": dtype, "batch": tried[min(tried)]}
    rate = size / theirs["seconds"]
    yield theirs | {"rate": rate, "tokens_rate": tokens * rate, "rqa_is": ours["rate"] / rate}


def decoder(arguments: argparse.Namespace) -> Iterator[Row]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    path = f"{arguments.directory}/decoder"
    tokenizer = AutoTokenizer.from_pretrained(arguments.embedding_model)
    torch.manual_seed(0)
    Qwen3Model(
        Qwen3Config(vocab_size=len(tokenizer), hidden_size=768, intermediate_size=2304, num_hidden_layers=12,
                    num_attention_heads=12, num_key_value_heads=4, head_dim=64, max_position_embeddings=512)
    ).save_pretrained(path)  # fmt: skip
    tokenizer.save_pretrained(path)
    modules = [Transformer(path, max_seq_length=256), Pooling(768, "lasttoken"), Normalize()]
    SentenceTransformer(modules=modules).save(path)
    yield from peers(
        argparse.Namespace(**vars(arguments) | {"embedding_model": path, "encoded": arguments.encoded // 20})
    )


def sentence_transformers(arguments: argparse.Namespace, setting: SimpleNamespace) -> Row:
    """Build the same index with sentence-transformers and faiss, as a user would. -> the seconds of encoding"""
    from sentence_transformers import SentenceTransformer

    tune_allocator()
    with open(setting.documents, encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, setting.size)]
    texts = [Document(row["page_content"], row["metadata"]).fmt_content for row in rows]
    model = SentenceTransformer(arguments.embedding_model, model_kwargs={"dtype": getattr(torch, setting.dtype)})
    started = time.perf_counter()
    embeddings = model.encode(texts, batch_size=setting.batch, normalize_embeddings=True)
    encoding = time.perf_counter() - started
    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(np.asarray(embeddings, np.float32))
    faiss.write_index(index, f"{setting.documents}.faiss")
    return {"encoding": encoding}


class Synthetic:
    """A fake encoder: the first number in a text determines its vector; vectors lie in 1,000 clusters."""

    dimension, passage_encoder, backbone = DIMENSION, None, SimpleNamespace(dtype=torch.float32)

    def __init__(self) -> None:
        self.passage_side, chance = self, np.random.default_rng(0)
        self.centres, self.noise = (chance.standard_normal((rows, DIMENSION), np.float32) for rows in (1000, 20_011))

    def tokenize_passages(self, texts: Sequence[str]) -> list[list[int]]:
        return [[int(found[0])] for text in texts if (found := re.search(r"\d+", text))]

    tokenize_queries = tokenize_passages

    def embed(self, sequences: Any, desc: str | None = None) -> np.ndarray:
        numbers = np.array(sequences, np.int64).reshape(-1)
        vectors = self.centres[numbers % len(self.centres)] + self.noise[numbers * 7919 % len(self.noise)]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def fingerprint(self) -> str:
        return "synthetic"


def search(arguments: argparse.Namespace) -> Iterator[Row]:
    answers: dict[int, np.ndarray] = {}  # size -> the nearest passages by exact search. [Q, K]
    for factory in arguments.factories:
        size = arguments.in_milvus if factory == "milvus" else arguments.searched
        path = f"{arguments.directory}/{factory}"
        index = {"memory": None, "milvus": f"milvus::{path}.db/passages"}.get(factory, path)
        setting = {"factory": factory, "documents": str(corpus(arguments, size)), "index": index}
        processes = 2 if factory == "memory" else 1
        built, row = (child(arguments, "ask", processes, **setting) for _ in range(2))
        ids = np.array(row.pop("ids"))  # [Q, K]
        if factory != "bm25":
            if size not in answers:
                answers[size] = nearest(size)
            row["recall"] = float((ids[:, :, None] == answers[size][:, None]).sum() / ids.size)
            row["equal"] = "yes" if np.array_equal(ids, answers[size]) else "no"
        row |= {"factory": factory, "size": size, "processes": processes}
        yield row | {"scanned": built["read"], "built": built["opened"], "built_peak": built["peak"]}


def ask(arguments: argparse.Namespace, setting: SimpleNamespace) -> Row:
    """Open an index (and build it the first time), and ask it all questions at once, several times."""
    tune_allocator()
    distributed.start()
    started = time.perf_counter()
    documents = read_documents(setting.documents)
    read = time.perf_counter() - started
    texts = [" ".join(documents[number].page_content.split()[:10]) for number in range(QUESTIONS)]
    questions = [f"{number}: {text}" for number, text in zip(ASKED, texts, strict=True)]
    factory: str = {"milvus": "auto", "memory": "Flat"}.get(setting.factory) or setting.factory
    flags = IndexArguments(index_factory=factory, index_search_parameters="nprobe=64" if "IVF" in factory else "")
    started = time.perf_counter()
    if setting.factory == "bm25":
        retriever: Any = LexicalRetriever(documents)
    else:
        retriever = Retriever(Synthetic(), documents, flags).open(setting.index)  # type: ignore[arg-type]
    opened, found = time.perf_counter() - started, []
    took = [1000 * seconds(lambda: found.append(retriever.retrieve_shared(questions, K))) for _ in range(6)]
    if not distributed.is_main():
        sys.exit()
    told = {"read": read, "opened": opened, "first_ms": took[0], "then_ms": sorted(took)[2]}
    return told | {"ids": found[0].ids.tolist()}


def int8(arguments: argparse.Namespace) -> Iterator[Row]:
    documents, _, examples = read_corpus(arguments.document_path, None, arguments.eval_file)
    encoder, exact = load_encoder(arguments.embedding_model, EncoderArguments()), None
    vectors = encoder.embed(encoder.tokenize_passages([document.fmt_content for document in documents]))
    queries = encoder.embed(encoder.tokenize_queries([example.question for example in examples]))
    for factory in FEWER_BITS:
        built, index = (FaissIndex(documents, IndexArguments(index_factory=factory)) for _ in range(2))
        built.replace(vectors)
        built.save(path := Path(arguments.directory, "int8"))
        index.load(path)
        ids = index.search(queries, K)[1]  # [Q, K]
        exact = ids if exact is None else exact
        row = {"factory": factory, "size": len(documents), "questions": len(examples)}
        row["bytes"] = (path / "index.faiss").stat().st_size / len(documents)
        row["ms"] = 1000 * min(seconds(lambda index=index: index.search(queries, K)) for _ in range(5))
        row["recall"] = float((ids[:, :, None] == exact[:, None]).sum() / ids.size)
        yield row | {"first": float((ids[:, 0] == exact[:, 0]).mean())}


def nearest(size: int) -> np.ndarray:
    """Find the passages nearest to each question exactly. -> [Q, K]"""
    encoder = Synthetic()
    vectors = np.concatenate([encoder.embed(range(start, min(start + BLOCK, size))) for start in range(0, size, BLOCK)])
    return faiss.knn(encoder.embed(ASKED), vectors, K, metric=faiss.METRIC_INNER_PRODUCT)[1]


PARTS = {"build": build, "speed": speed, "peers": peers, "decoder": decoder, "search": search, "int8": int8}
CHILDREN = {"encode": encode, "sentence-transformers": sentence_transformers, "ask": ask}


if __name__ == "__main__":
    main()
