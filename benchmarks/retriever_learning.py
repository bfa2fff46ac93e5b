#!/usr/bin/env python
"""What does training a retriever bring? Recall and MRR after CTL and RPG, beside BM25 and sentence-transformers.

    python benchmarks/retriever_learning.py --model_name_or_path M --output_dir out/learning        # pydocs
    python benchmarks/retriever_learning.py ... --document_path documents.pkl --train_file train_w_qa.jsonl \\
        --eval_file eval_w_qa.jsonl --lm_model_path L --rpg "--num_docs 8 --max_steps 60"
    python benchmarks/retriever_learning.py ... --max_train 64 --max_eval 20 --epochs 1             # tiny

All train on the same questions and search the whole database; each dense retriever is measured alone and fused with
BM25 by a weighted sum, whose weight is the best for the untrained encoder on the training questions. The peer is
sentence-transformers with MultipleNegativesRankingLoss on the same pairs for as many epochs. A model that
`--output_dir` holds already is measured, not trained again. Figures stand with 95 % bootstrap intervals. Needs
`pip install -e ".[bench]"`.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import numpy as np
from harness import new_parser, print_result, print_table, read_corpus

from rqa.data import Document, Example, write_examples
from rqa.documents import write_documents
from rqa.evaluation.results import mean_intervals
from rqa.evaluation.retrieval import retrieval_rows
from rqa.prompts import retrieval_query
from rqa.retrieval.hybrid import LexicalRetriever, RetrieverArguments, open_retriever
from rqa.retrieval.retriever import PassageRetriever

METRICS = ("retr/recall@1", "retr/recall@4", "retr/recall@10", "retr/mrr@10")
BIN = Path(__file__).resolve().parents[1] / "bin"


def main() -> None:
    arguments = parse()
    output = Path(arguments.output_dir)
    documents, train, held_out = read_inputs(arguments)
    write_documents(output / "documents.jsonl", documents)
    write_examples(output / "train.jsonl", train)
    rows, weight = [measure("BM25", LexicalRetriever(documents), held_out)], None
    for name, path in train_systems(arguments, output, train):
        index = str(output / "indexes" / name)
        flags = RetrieverArguments(index_path=index, retriever="hybrid", fusion="weighted", fusion_weight=weight)
        fused = open_retriever(flags, path, documents, train)
        weight = fused.weight  # of the untrained encoder: a trained one knows the training questions too well
        rows += [measure(name, fused.dense, held_out), measure(f"{name} + BM25", fused, held_out)]
        print(f"{name}: {rows[-2]['scores']}, with BM25 {rows[-1]['scores']}", file=sys.stderr, flush=True)
    report(arguments, weight, rows)


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__, "--train_file", "--eval_file", precision=False)
    parser.add_argument("--model_name_or_path", required=True, help="the encoder to start from")
    parser.add_argument("--output_dir", required=True, help="where models, indexes and the data go")
    parser.add_argument("--lm_model_path", help="the language model of RPG; without it, RPG is left out")
    parser.add_argument("--epochs", type=float, default=3, help="of CTL and of the peer")
    parser.add_argument("--learning_rate", default="2e-5", help="of CTL and of the peer")
    parser.add_argument("--batch_size", default="64", help="of CTL and of the peer")
    parser.add_argument("--ctl", default="", help="further flags of bin/train_ctl, in one string")
    parser.add_argument("--rpg", default="", help="further flags of bin/train_rpg, in one string")
    parser.add_argument("--max_train", type=int, help="use so many training questions")
    parser.add_argument("--max_eval", type=int, help="use so many questions to measure on")
    return parser.parse_args()


def read_inputs(arguments: argparse.Namespace) -> tuple[Sequence[Document], list[Example], list[Example]]:
    """Documents, training questions and the questions to measure on."""
    documents, train, held_out = read_corpus(arguments.document_path, arguments.train_file, arguments.eval_file)
    return documents, list(train[: arguments.max_train]), list(held_out[: arguments.max_eval])


def train_systems(arguments: argparse.Namespace, output: Path, train: Sequence[Example]) -> list[tuple[str, str]]:
    """Names and directories of all dense models, trained if they are not there yet."""
    systems = [("untrained", arguments.model_name_or_path)]
    schedule = ["--num_train_epochs", str(arguments.epochs), "--learning_rate", arguments.learning_rate]
    schedule += ["--per_device_train_batch_size", arguments.batch_size, "--warmup_ratio", "0.1"]
    systems.append(("rqa CTL", train_rqa(arguments, output, "train_ctl", [*schedule, *shlex.split(arguments.ctl)])))
    if arguments.lm_model_path:
        flags = ["--lm_model_path", arguments.lm_model_path, *shlex.split(arguments.rpg)]
        systems.append(("rqa RPG", train_rqa(arguments, output, "train_rpg", flags)))
    systems.append(("sentence-transformers", train_sentence_transformers(arguments, output, train)))
    return systems


def train_rqa(arguments: argparse.Namespace, output: Path, executable: str, flags: list[str]) -> str:
    """Run one of the product's executables; the directory of its model."""
    directory = output / executable
    if not (directory / "modules.json").exists():
        line = [sys.executable, str(BIN / executable), "--model_name_or_path", arguments.model_name_or_path]
        line += ["--train_file", str(output / "train.jsonl"), "--output_dir", str(directory)]
        line += ["--document_path", str(output / "documents.jsonl"), "--eval_strategy", "no"]
        subprocess.run([*line, "--save_strategy", "no", "--overwrite_output_dir", "true", *flags], check=True)
    return str(directory)


def train_sentence_transformers(arguments: argparse.Namespace, output: Path, train: Sequence[Example]) -> str:
    """The peer as its documentation starts it, on pairs of question and gold passage."""
    directory = output / "sentence-transformers"
    if (directory / "modules.json").exists():
        return str(directory)
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = SentenceTransformer(arguments.model_name_or_path, device=None if torch.cuda.is_available() else "cpu")
    pairs = {
        "anchor": [retrieval_query(example) for example in train],
        "positive": [example.gold_docs[0].fmt_content for example in train],
    }
    settings = SentenceTransformerTrainingArguments(
        str(output / "trainer"),
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=int(arguments.batch_size),
        learning_rate=float(arguments.learning_rate),
        warmup_ratio=0.1,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
    )
    loss = MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model, settings, train_dataset=Dataset.from_dict(pairs), loss=loss)
    with redirect_stdout(sys.stderr):  # it prints what it logs, and a table is to come
        trainer.train()
    model.save(str(directory))
    return str(directory)


def measure(name: str, retriever: PassageRetriever, examples: Sequence[Example]) -> dict[str, Any]:
    """Scores over all questions, with intervals."""
    found = retriever.documents_of(retriever.retrieve([retrieval_query(example) for example in examples], 10))
    rows = retrieval_rows(found, examples, (1, 4, 10))
    values = np.array([[row["scores"][metric] for metric in METRICS] for row in rows if row["scores"]])  # [n, M]
    return {
        "system": name,
        "n": len(values),
        "scores": dict(zip(METRICS, values.mean(axis=0).round(4).tolist(), strict=True)),
        "intervals": dict(zip(METRICS, mean_intervals(values).round(4).tolist(), strict=True)),
    }


def report(arguments: argparse.Namespace, weight: float | None, rows: list[dict[str, Any]]) -> None:
    """A table with intervals, and one JSON line."""
    print_table(
        ["", *(metric.removeprefix("retr/") for metric in METRICS)],
        [
            (row["system"], *("{:.3f} ({:.2f}-{:.2f})".format(row["scores"][m], *row["intervals"][m]) for m in METRICS))
            for row in rows
        ],
    )
    print_result(__file__, arguments, rows, dense_share=weight)


if __name__ == "__main__":
    main()
