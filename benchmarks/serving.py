#!/usr/bin/env python
"""How many questions a second does a server answer, and how long do its clients wait?

    python benchmarks/serving.py --qa_model_name_or_path M --embedding_model E                        # pydocs
    python benchmarks/serving.py ... --precision bf16 --only rqa --rows rows.jsonl    # one part, added to others
    python benchmarks/serving.py ... --only --rows rows.jsonl                         # table of the parts so far

1, 8 or 32 clients ask at the same time, each one question after another, and read the answers as they stream: at most
48 tokens by greedy search, over 3 passages. Each server is a process of its own and answers some questions before it is
timed.

- `rqa` is bin/serve, which searches, and answers questions that arrive together in one batch. `one at a time` answers
  each question alone.
- `transformers serve` gets rqa's prompts, passages included, so it has nothing to search. It runs with and without
  continuous batching, and with rqa's allocator setting, which makes it faster. The cache of continuous batching may
  take 15 % of the memory (the default is more than half).

`first` is the time to the first piece of an answer. Needs `pip install -e ".[serve]" "transformers[serving]"`.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import httpx
import numpy as np
from harness import Row, compare, memory, new_parser, print_result, print_table, read_corpus, times

from rqa.documents import write_documents
from rqa.models.encoder import EncoderArguments, load_encoder
from rqa.models.loading import load_tokenizer
from rqa.prompts import PromptArguments, Prompter, retrieval_query
from rqa.retrieval.retriever import Retriever
from rqa.runtime.cli import as_words

BIN = Path(__file__).parents[1] / "bin"
PASSAGES, WARM_UP, STARTING = 3, 2, 300  # passages; untimed questions; seconds to start
PROMPT = {"chat_format": "template", "max_seq_length": 768, "max_new_tokens": 48}  # bin/quickstart's
SYSTEMS = {  # name -> the server's flags
    "rqa": [],
    "rqa, one at a time": ["--generation_batch_tokens", "1"],
    "transformers serve": [],
    "transformers serve, continuous batching": ["--continuous-batching", "--cb-max-memory-percent", "0.15"],
}
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62)}  # rqa's `tune_allocator`


def main() -> None:
    parser = new_parser(__doc__, "--eval_data_path", systems=SYSTEMS)
    parser.add_argument("--qa_model_name_or_path", required=True)
    parser.add_argument("--embedding_model", required=True)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--questions", type=int, default=64, help="asked by all clients together")
    parser.add_argument("--tiny", action="store_true", help="1 and 2 clients, 4 questions, answers of 4 tokens")
    parser.add_argument("--rows", help="file (JSONL) to which rows are added, and whose earlier rows are shown, too")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.clients, arguments.questions, PROMPT["max_new_tokens"] = [1, 2], 4, 4
    kept = Path(arguments.rows or os.devnull)
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    with TemporaryDirectory() as arguments.directory:
        asked = prepare(arguments) if arguments.only != [] else {}
        for system in SYSTEMS if arguments.only is None else arguments.only:
            for clients in arguments.clients:
                rows.append(measure(system, clients, asked[system.split(",")[0]], arguments))
                with kept.open("a") as file:
                    print(json.dumps(rows[-1]), file=file)
    report(arguments, rows)


def prepare(arguments: argparse.Namespace) -> dict[str, list[list[dict[str, str]]]]:
    """Write documents and index. -> conversations for rqa, and conversations for `transformers serve`"""
    documents, _, examples = read_corpus(arguments.document_path, None, arguments.eval_data_path)
    examples = examples[: arguments.questions + WARM_UP]
    write_documents(f"{arguments.directory}/documents.jsonl", documents)
    encoder = load_encoder(arguments.embedding_model, EncoderArguments(bf16=arguments.precision == "bf16"))
    retriever = Retriever(encoder, documents).open(f"{arguments.directory}/index")
    found = retriever.documents_of(retriever.retrieve([retrieval_query(each) for each in examples], PASSAGES))
    prompter = Prompter(load_tokenizer(arguments.qa_model_name_or_path), PromptArguments(**PROMPT))
    return {
        "rqa": [[{"role": "user", "content": example.question}] for example in examples],
        "transformers serve": [prompter.messages(*pair) for pair in zip(examples, found, strict=True)],
    }


def measure(system: str, clients: int, asked: Sequence[list[dict[str, str]]], arguments: argparse.Namespace) -> Row:
    """Measure one server: its rate, and how long clients wait."""
    with listening(system, arguments) as (process, url):
        asyncio.run(ask_all(url, asked[-WARM_UP:], 1, arguments))
        began = time.perf_counter()
        answers = asyncio.run(ask_all(url, asked[:-WARM_UP], clients, arguments))
        took = time.perf_counter() - began
        peak = sum(most for most, _ in memory(process.pid).values())
    texts, firsts, whole = zip(*answers, strict=True)
    tokenizer = load_tokenizer(arguments.qa_model_name_or_path)
    waited = {f"{name}_p{p}": float(np.percentile(values, p)) for name, values in (("first", firsts), ("whole", whole))
              for p in (50, 95)}  # fmt: skip
    return {
        "system": system,
        "precision": arguments.precision,
        "clients": clients,
        "rate": len(answers) / took,
        "tokens": sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts) / took,
        **waited,
        "peak_gib": peak,
        "answers": texts,
    }


@contextmanager
def listening(system: str, arguments: argparse.Namespace) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start a server, wait until it answers, and stop it at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model, bf16 = arguments.qa_model_name_or_path, arguments.precision == "bf16"
    if system.startswith("rqa"):
        flags = {
            "document_path": f"{arguments.directory}/documents.jsonl",
            "index_path": f"{arguments.directory}/index",
            "feedback_path": f"{arguments.directory}/feedback.jsonl",
            "embedding_model": arguments.embedding_model,
            "embedding_max_num_to_retrieve": PASSAGES,
            "qa_model_name_or_path": model,
            "served_model_name": model,
            "bf16": bf16,
            "port": port,
            **PROMPT,
        }
        line, environment = [sys.executable, BIN / "serve", *as_words(flags)], {}
    else:
        line, environment = [Path(sys.executable).with_name("transformers"), "serve", model, "--port", port], ALLOCATOR
        line += ["--device", "auto", "--dtype", "bfloat16" if bf16 else "float32"]
    line, url = [*map(str, line), *SYSTEMS[system]], f"http://127.0.0.1:{port}"
    print(*line, "...", file=sys.stderr, flush=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    with TemporaryFile("w+") as log, subprocess.Popen(line, stdout=log, stderr=log, env=environment) as process:
        try:
            deadline = time.monotonic() + STARTING
            while not answers_at(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    sys.exit(f"error: {system}: does not answer; it said: {log.read()[-2000:]}")
                time.sleep(0.2)
            yield process, url
        finally:
            process.terminate()


def answers_at(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.TransportError:
        return False


async def ask_all(
    url: str, asked: Sequence[list[dict[str, str]]], clients: int, arguments: argparse.Namespace
) -> list[tuple[str, float, float]]:
    """Ask all questions. -> each answer, the seconds to its first piece, and to its end, in the questions' order"""
    answers: dict[int, tuple[str, float, float]] = {}
    waiting = iter(enumerate(asked))

    async def ask(client: httpx.AsyncClient) -> None:
        for number, messages in waiting:
            body = {"model": arguments.qa_model_name_or_path, "messages": messages, "stream": True, "temperature": 0}
            body |= {"max_tokens": PROMPT["max_new_tokens"]}
            began, first, text = time.perf_counter(), None, ""
            async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
                async for piece in pieces(reply):
                    first = first or time.perf_counter()
                    text += piece
            ended = time.perf_counter()
            answers[number] = text.strip(), (first or ended) - began, ended - began

    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(ask(client) for _ in range(clients)))
    return [answers[number] for number in range(len(asked))]


async def pieces(reply: httpx.Response) -> AsyncIterator[str]:
    if reply.is_error:
        sys.exit(f"error: {(await reply.aread()).decode()}")
    async for line in reply.aiter_lines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                sys.exit(f"error: {event['error']}")
            for choice in event["choices"]:
                if said := choice["delta"].get("content"):
                    yield said


def report(arguments: argparse.Namespace, rows: list[Row]) -> None:
    ours = {(row["precision"], row["clients"]): row for row in rows if row["system"] == "rqa"}
    compare(rows, lambda row: ours.get((row["precision"], row["clients"])))
    for row in rows:
        if (alone := ours.get((row["precision"], 1))) and len(alone["answers"]) == len(row["answers"]):
            row["same"] = statistics.mean(a == b for a, b in zip(alone["answers"], row["answers"], strict=True))
    print_table(
        ["system", "in", "clients", "questions/s", "tokens/s", "p50 s", "p95 s", "first p50 s", "p95 s",
         "answers as rqa's to 1", "peak GiB", "rqa is"],
        [
            [row["system"], row["precision"], row["clients"], f"{row['rate']:.2f}", f"{row['tokens']:.1f}",
             *(f"{row[name]:.2f}" for name in ("whole_p50", "whole_p95", "first_p50", "first_p95")),
             f"{row['same']:.0%}" if "same" in row else "", f"{row['peak_gib']:.1f}", times(row)]
            for row in rows
        ],
    )  # fmt: skip
    print_result(__file__, arguments, [{n: v for n, v in row.items() if n != "answers"} for row in rows])


if __name__ == "__main__":
    main()
