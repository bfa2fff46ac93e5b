#!/usr/bin/env python
"""What does refreshing the index cost, and what does it bring? Compares ways to refresh it, by time and by Recall@4.

    python benchmarks/index_refresh.py --model_name_or_path E                                       # CTL on pydocs
    python benchmarks/index_refresh.py ... --algorithm rpg --lm_model_path L --steps 60
    python benchmarks/index_refresh.py ... --document_path documents.pkl --train_file train_w_qa.jsonl \\
        --eval_file eval_w_qa.jsonl --flags "--learning_rate 2e-5"
    python benchmarks/index_refresh.py ... --steps 4 --every 2 --max_train 64 --max_eval 20         # tiny

Each way runs bin/train_ctl (with mined negatives) or bin/train_rpg for equally many steps on the same questions, in its
own process with its own cache. Seconds a refresh, and their share of the time, count how long training waits; the time
of a background thread has its own column. Recall@4 is measured with the trained encoder and a new index, with a 95 %
bootstrap interval.
"""

import argparse
import json
import os
import runpy
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from harness import new_parser, print_result, print_table, read_corpus, run_alone

from rqa.data import Document, Example, write_examples
from rqa.documents import write_documents
from rqa.evaluation.results import with_intervals
from rqa.evaluation.retrieval import EvaluationArguments, evaluate_retrieval
from rqa.evaluation.runtime import peak_memory
from rqa.models.encoder import load_encoder
from rqa.retrieval.refresh import BackgroundEncoding, Refresher
from rqa.retrieval.retriever import Retriever

BIN = Path(__file__).resolve().parents[1] / "bin"


def ways(arguments: argparse.Namespace) -> dict[str, list[str]]:
    every, steps = arguments.every, arguments.steps
    often, seldom = ["--refresh_step", str(every)], f"0-{steps // 3}:{every},{steps // 3}-{steps}:{4 * every}"
    return {
        "never": ["--refresh_step", str(steps + 1)],
        f"every {every} steps": often,
        f"every {every}, later {4 * every}": ["--refresh_step", seldom],
        f"in the background every {every}": [*often, "--refresh_async", "true"],
        "questions only": [*often, "--train_query_encoder_only", "true"],
    }


def main() -> None:
    arguments = parse()
    if arguments.way:
        print(json.dumps(measure(arguments)))
        return
    only = vars(arguments).pop("only")
    documents, train, held_out = read_corpus(arguments.document_path, arguments.train_file, arguments.eval_file)
    train, held_out = train[: arguments.max_train], held_out[: arguments.max_eval]
    with TemporaryDirectory() as directory:
        arguments.directory = directory
        write_documents(Path(directory) / "documents.jsonl", documents)
        write_examples(Path(directory) / "train.jsonl", train)
        rows = [{"way": "untrained", **recall(arguments.model_name_or_path, documents, held_out)}]
        for number, way in enumerate(ways(arguments)):
            if not only or number in only:
                row = run_alone(__file__, arguments, way=way)
                rows.append({**row, **recall(f"{directory}/{way}", documents, held_out)})
    report(arguments, rows)


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__, "--train_file", "--eval_file", precision=False)
    parser.add_argument("--model_name_or_path", required=True, help="the encoder to train")
    parser.add_argument("--algorithm", choices=["ctl", "rpg"], default="ctl")
    parser.add_argument("--lm_model_path", help="the language model of RPG")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps")
    parser.add_argument("--every", type=int, default=10, help="steps between two refreshes")
    parser.add_argument("--batch_size", default="16", help="questions of a step")
    parser.add_argument("--flags", default="", help="further flags of the executable, in one string")
    parser.add_argument("--max_train", type=int, help="use so many training questions")
    parser.add_argument("--max_eval", type=int, help="use so many questions to measure on")
    parser.add_argument("--only", type=int, nargs="*", help="the numbers of ways to run, from 0")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.algorithm == "rpg" and not arguments.lm_model_path:
        parser.error("--algorithm rpg: needs --lm_model_path")
    return arguments


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the executable in this process, and time whatever precedes a step."""
    calls: list[tuple[float, float, float]] = []  # (begin, end, staleness) of the work before each step
    due: list[bool] = []
    background: list[float] = []
    call, finished = Refresher.__call__, BackgroundEncoding.finished

    def timed(self: Refresher, step: int) -> dict[str, float]:
        started = time.perf_counter()
        statistics = call(self, step)
        calls.append((started, time.perf_counter(), statistics.get("index_staleness", 0.0)))
        due.append(self.due(step))
        return statistics

    def noted(self: BackgroundEncoding) -> bool:
        if done := finished(self):
            background.append(self.seconds)
        return done

    Refresher.__call__, BackgroundEncoding.finished = timed, noted
    run_executable(arguments)
    seconds = calls[-1][0] - calls[0][1]  # all steps but the last; without building the first index
    waited = [end - started for started, end, _ in calls[1:-1]]
    return {
        "way": arguments.way,
        "first_index_seconds": calls[0][1] - calls[0][0],
        "seconds_per_step": seconds / max(len(calls) - 1, 1),
        "seconds_per_refresh": sum(waited) / max(sum(due[1:-1]), 1),
        "share": sum(waited) / seconds,
        "background_seconds": sum(background),
        "staleness": float(np.mean([staleness for _, _, staleness in calls])),
        "peak_gib": peak_memory()["host"],
    }


def run_executable(arguments: argparse.Namespace) -> None:
    """Run it as a user does, but without evaluations and checkpoints."""
    directory, name = Path(arguments.directory), f"train_{arguments.algorithm}"
    os.environ["RQA_CACHE"] = str(directory / f"{arguments.way} cache")  # a teacher without cached scores
    flags = ["--model_name_or_path", arguments.model_name_or_path, "--output_dir", str(directory / arguments.way)]
    flags += ["--train_file", str(directory / "train.jsonl"), "--max_steps", str(arguments.steps)]
    flags += ["--document_path", str(directory / "documents.jsonl"), "--eval_strategy", "no"]
    flags += ["--per_device_train_batch_size", arguments.batch_size, "--save_strategy", "no"]
    if arguments.algorithm == "rpg":
        flags += ["--lm_model_path", arguments.lm_model_path]
    else:
        flags += ["--mine_negatives", "true", "--num_hard_negatives", "1"]
    sys.argv = [str(BIN / name), *flags, *ways(arguments)[arguments.way], *shlex.split(arguments.flags)]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def recall(path: str, documents: Sequence[Document], examples: Sequence[Example]) -> dict[str, Any]:
    """Measure the Recall@4 of an encoder over a new index, with its interval."""
    retriever = Retriever(load_encoder(path), documents).open()
    _, rows = evaluate_retrieval(retriever, examples, EvaluationArguments(recall_at=[4]))
    rate = with_intervals(rows)["test_retr/recall@4"]
    return {"recall@4": rate["value"], "interval": [rate["low"], rate["high"]], "n": rate["n"]}


def report(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    header = ("", "s/step", "s/refresh", "share", "in background", "staleness", "peak GiB", "recall@4")
    columns = (("seconds_per_step", ".3f"), ("seconds_per_refresh", ".2f"), ("share", ".1%"),
               ("background_seconds", ".1f"), ("staleness", ".1f"), ("peak_gib", ".1f"))  # fmt: skip
    print_table(
        header,
        [
            (
                row["way"],
                *(format(row[name], form) if name in row else "" for name, form in columns),
                "{:.3f} ({:.2f}-{:.2f})".format(row["recall@4"], *row["interval"]),
            )
            for row in rows
        ],
    )
    print_result(__file__, arguments, rows)


if __name__ == "__main__":
    main()
