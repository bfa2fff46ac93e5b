#!/usr/bin/env python
"""How fast are chunking and the mining of hard negatives, compared with what a user would choose instead?

    python benchmarks/data_preparation.py --model_name_or_path M                      # pydocs' passages, joined
    python benchmarks/data_preparation.py --model_name_or_path M --raw_path raw_docs.jsonl --rounds 3
    python benchmarks/data_preparation.py --model_name_or_path M --passages 100000 --queries 1000

Chunking is measured in documents and megabytes a second, for rqa, langchain's RecursiveCharacterTextSplitter and
semchunk, with the same tokenizer. They run in turn, and figures are medians of several rounds. Mining is measured in
seconds to index --passages made-up passages with BM25 and to find the hard negatives of --queries questions. Needs
`pip install -e ".[bench]"`.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from harness import compare, new_parser, print_result, print_table, times
from pydocs.corpus import QUICKSTART, build_corpus
from transformers import AutoTokenizer

from rqa.data import Document, Example
from rqa.evaluation.runtime import peak_memory
from rqa.objectives.ctl import NegativeArguments, NegativeChooser
from rqa.preparation.chunking import ChunkArguments, Chunker
from rqa.preparation.mine import mine, rank
from rqa.preparation.sources import Source, read_sources
from rqa.retrieval.hybrid import LexicalRetriever

WORDS = 20_000  # in the made-up language
TEXTS_JOINED = 20  # passages of pydocs that make one document


def main() -> None:
    arguments = parse()
    rows = measure_chunking(arguments)
    compare(rows, lambda _: rows[0])
    print_table(
        ["", "documents/s", "MB/s", "spread", "passages", "rqa is"],
        [
            [row["system"], f"{row['documents_per_second']:.0f}", f"{row['rate']:.2f}",
             "{:.2f}-{:.2f}".format(*row["spread"]), row["passages"], times(row)]
            for row in rows
        ],
    )  # fmt: skip
    mining = measure_mining(arguments.passages, arguments.queries) if arguments.passages else {}
    if mining:
        print(f"mining {mining['queries']} questions over {mining['passages']} passages: {mining['seconds']:.1f} s, "
              f"{mining['peak_gib']:.2f} GiB at most")  # fmt: skip
    print_result(__file__, arguments, rows, mining=mining)


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__, precision=False)
    parser.add_argument("--model_name_or_path", required=True, help="the tokenizer")
    parser.add_argument("--raw_path", help="JSONL of {source, title, text}; by default the passages of pydocs")
    parser.add_argument("--chunk_size", type=int, default=400)
    parser.add_argument("--chunk_overlap", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passages", type=int, default=0, help="passages to mine among; 0: do not measure mining")
    parser.add_argument("--queries", type=int, default=1000)
    return parser.parse_args()


def measure_chunking(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run each system in turn, several times; figures are medians."""
    from langchain_text_splitters import RecursiveCharacterTextSplitter
    from semchunk import chunkerify

    sources = read_texts(arguments.raw_path)
    texts = [source.text for source in sources]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    tokenizer.model_max_length = 10**9  # no warning that a text is longer than the model reads
    size, overlap = arguments.chunk_size, arguments.chunk_overlap
    chunker = Chunker(tokenizer.backend_tokenizer, ChunkArguments(chunk_size=size, chunk_overlap=overlap))
    splitter = RecursiveCharacterTextSplitter.from_huggingface_tokenizer(
        tokenizer, chunk_size=size, chunk_overlap=overlap
    )

    def semantic() -> int:  # a new chunker each time, because it caches token counts
        chunk = chunkerify(lambda text: len(tokenizer.encode(text, add_special_tokens=False)), size)
        return sum(len(chunks) for chunks in chunk(texts, overlap=overlap))

    systems: dict[str, Callable[[], int]] = {
        "rqa": lambda: sum(len(passages) for _, passages in chunker.passages(sources)),
        "langchain": lambda: sum(len(splitter.split_text(text)) for text in texts),
        "semchunk": semantic,
    }
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    passages = {}
    for _ in range(arguments.rounds):
        for name, run in systems.items():
            started = time.perf_counter()
            passages[name] = run()
            seconds[name].append(time.perf_counter() - started)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return [
        {
            "system": name,
            "documents_per_second": len(texts) / statistics.median(took),
            "rate": megabytes / statistics.median(took),  # megabytes a second
            "spread": [megabytes / max(took), megabytes / min(took)],
            "passages": passages[name],
        }
        for name, took in seconds.items()
    ]


def read_texts(path: str | None) -> list[Source]:
    if path:
        return list(read_sources(Path(path), path))
    passages = [document.page_content for document in build_corpus(QUICKSTART).documents]
    joined = ["\n\n".join(passages[start : start + TEXTS_JOINED]) for start in range(0, len(passages), TEXTS_JOINED)]
    return [Source(str(number), "", text, "") for number, text in enumerate(joined)]


def measure_mining(passages: int, queries: int) -> dict[str, Any]:
    """Index, search with BM25 and choose negatives, over passages of 100 words that follow Zipf's law."""
    chance = random.Random(0)
    weights = list(accumulate(1 / rank for rank in range(1, WORDS + 1)))
    vocabulary = [f"w{number}" for number in range(WORDS)]
    texts = [" ".join(chance.choices(vocabulary, cum_weights=weights, k=100)) for _ in range(passages)]
    documents = [Document(text, {"source": str(number)}) for number, text in enumerate(texts)]
    gold = chance.sample(documents, min(queries, passages))
    examples = [Example(" ".join(chance.sample(document.page_content.split(), 10)), (document,)) for document in gold]
    started = time.perf_counter()
    chooser = NegativeChooser(examples, documents, NegativeArguments())
    asked = [example.question for example in examples]
    hits = rank(LexicalRetriever(documents), asked, chooser.depth)
    ranked = time.perf_counter()
    found = mine(chooser, [hits], 8)
    return {
        "passages": passages,
        "queries": len(examples),
        "seconds": time.perf_counter() - started,
        "seconds_ranking": ranked - started,
        "negatives": sum(map(len, found)),
        "peak_gib": peak_memory()["host"],
    }


if __name__ == "__main__":
    main()
