#!/usr/bin/env python
"""How fast does a cross-encoder score and train? Pairs a second and peak memory, compared with sentence-transformers.

    python benchmarks/reranking.py --model_name_or_path M                                           # pydocs
    python benchmarks/reranking.py ... --eval_data_path test_w_qa.jsonl --document_path documents.jsonl
    python benchmarks/reranking.py ... --precision bf16 --only rqa CrossEncoder.predict

`rqa` scores the 50 passages that BM25 finds for each of 64 questions. `rqa training` trains on lists of a gold passage
and 8 others, 8 lists a step. M is an encoder, which gets a new head, or a reranker. The peers have the same pairs and
the same weights, each in its own process: `CrossEncoder.predict`, which sorts pairs by length, and
`CrossEncoderTrainer` with ListNetLoss, whose labels make its loss equal to rqa's. A peer's settings are `default`, as a
user starts it; `tuned`, with rqa's allocator setting; `64` and `128` pairs in a forward pass; `whole`, all pairs of a
step in one; and `calm`, the fastest way to train without dropout of attention probabilities, which rqa never has.
Scores must be equal, and so must the loss of the first batch without any dropout. Needs `pip install -e ".[bench]"`.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import numpy as np
from harness import (
    Clock,
    compare,
    new_parser,
    prepared,
    print_rates,
    read_corpus,
    run_benchmark,
    summary,
    train_peer,
    train_rqa,
)

from rqa.data import Document, Example
from rqa.evaluation.runtime import seconds
from rqa.models.reranker import RerankerArguments, load_reranker
from rqa.prompts import retrieval_query
from rqa.retrieval.hybrid import LexicalRetriever

PREDICT, TRAINER = "CrossEncoder.predict", "CrossEncoderTrainer"
SYSTEMS = {  # name -> its settings
    "rqa": ["tuned"],
    PREDICT: ["default", "tuned", "64", "128"],
    "rqa training": ["tuned"],
    TRAINER: ["default", "tuned", "whole", "calm"],
}
CERTAIN = 100.0  # a label whose softmax is 1 if all others are 0

Lists = list[tuple[str, list[str]]]  # a question, and its passages


def main() -> None:
    parser = new_parser(__doc__, "--eval_data_path", systems=SYSTEMS, steps=3)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--questions", type=int, default=64, help="questions whose passages are scored")
    parser.add_argument("--passages", type=int, default=50, help="passages of each of them")
    parser.add_argument("--batch_size", type=int, default=8, help="questions of a training step")
    parser.add_argument(
        "--negatives", type=int, default=8, help="passages that a gold passage stands among in training"
    )
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a pair")
    run_benchmark(__file__, parser.parse_args(), SYSTEMS, measure, report, prepare)


def prepare(arguments: argparse.Namespace) -> dict[str, Lists]:
    """Write one checkpoint for all systems. -> the lists to score and to train on"""
    torch.manual_seed(0)  # seeds a new head
    reranker = load_reranker(arguments.model_name_or_path, RerankerArguments(dtype="float32"), new_head=True)
    reranker.save_pretrained(Path(arguments.directory, "reranker"))
    documents, _, examples = read_corpus(arguments.document_path, eval_file=arguments.eval_data_path)
    asked = [example for example in examples if example.gold_docs][: arguments.questions]
    if len(asked) < max(arguments.questions, arguments.batch_size):
        raise SystemExit(f"error: --questions {arguments.questions}: only {len(asked)} have gold passages")
    lexical, depth = LexicalRetriever(documents), max(arguments.passages, arguments.negatives + 1)
    questions = [retrieval_query(example) for example in asked]
    found = lexical.documents_of(lexical.retrieve(questions, depth))
    lists = {"score": [], "train": []}
    for example, question, passages in zip(asked, questions, found, strict=True):
        passages = list(dict.fromkeys([*passages, *documents[:depth]]))  # if BM25 finds too few
        others = [passage for passage in passages if passage not in example.gold_docs][: arguments.negatives]
        lists["score"].append((question, [passage.fmt_content for passage in passages[: arguments.passages]]))
        lists["train"].append((question, [passage.fmt_content for passage in (example.gold_docs[0], *others)]))
    return lists | {"train": lists["train"][: arguments.batch_size]}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    lists = prepared(arguments)
    if arguments.system in ("rqa", PREDICT):
        return score(arguments, lists["score"])
    train = train_product if arguments.system == "rqa training" else train_sentence_transformers
    loss, clock = train(arguments, lists["train"])
    return {"first_loss": loss, **summary(clock.steps(skip=arguments.warmup))}


def report(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    ours = {row["system"]: row for row in rows}
    compare(rows, lambda row: ours.get("rqa" if row["system"] == PREDICT else "rqa training"))
    for name, form in (("gap", ".1e"), ("first_loss", ".4f")):
        if found := [row for row in rows if name in row]:
            print_rates(["", "settings", "pairs/s"], found, 1, **{name: form})


def dtype_of(arguments: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if arguments.precision == "bf16" else torch.float32


# ---------------------------------------------------------------- scoring


def score(arguments: argparse.Namespace, lists: Lists) -> dict[str, Any]:
    """Measure pairs a second, and the largest difference between rqa's and the peer's score of a pair."""
    pairs = [(question, passage) for question, passages in lists for passage in passages]
    ask = open_rqa(arguments) if arguments.system == "rqa" else open_sentence_transformers(arguments)
    ask(pairs[: 2 * arguments.passages])  # warm-up
    scores: list[np.ndarray] = []
    took = [seconds(lambda: scores.append(ask(pairs))) for _ in range(arguments.steps)]
    kept = Path(arguments.directory, "scores.npy")
    if arguments.system == "rqa":
        np.save(kept, scores[0])
    gap = float(np.abs(np.load(kept) - scores[0]).max()) if kept.exists() else float("nan")
    return {"gap": gap, **summary([(len(pairs), each) for each in took])}


Ask = Callable[[Sequence[tuple[str, str]]], np.ndarray]


def open_rqa(arguments: argparse.Namespace) -> Ask:
    flags = RerankerArguments(max_pair_length=arguments.max_length, bf16=arguments.precision == "bf16")
    return load_reranker(f"{arguments.directory}/reranker", flags).score


def open_sentence_transformers(arguments: argparse.Namespace) -> Ask:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(
        f"{arguments.directory}/reranker", max_length=arguments.max_length, model_kwargs={"dtype": dtype_of(arguments)}
    )
    size = int(arguments.setting) if arguments.setting.isdigit() else 32  # 32 is its default
    logits = {"activation_fn": torch.nn.Identity(), "show_progress_bar": False}
    return lambda pairs: model.predict(list(pairs), batch_size=size, **logits)


# ---------------------------------------------------------------- training


def train_product(arguments: argparse.Namespace, lists: Lists) -> tuple[float, Clock]:
    """Train with rqa's own loop and objective."""
    from rqa.models.loading import evaluating
    from rqa.objectives.rerank import Lists as Collate
    from rqa.objectives.rerank import ListwiseReranking, RerankArguments, RerankBatch
    from rqa.runtime.distributed import device

    passages = [[Document(text, formatted=text) for text in texts] for _, texts in lists]
    examples = [
        Example(question, (gold,), hard_neg_docs=tuple(others))
        for (question, _), (gold, *others) in zip(lists, passages, strict=True)
    ]
    bf16, path = arguments.precision == "bf16", f"{arguments.directory}/reranker"
    reranker = load_reranker(path, RerankerArguments(max_pair_length=arguments.max_length, bf16=bf16), torch.float32)
    # without other questions' gold passages, as in the peer's lists
    flags = RerankArguments(negatives_from="file", num_hard_negatives=arguments.negatives, num_other_gold=0)
    collate, clock = Collate(examples, [], reranker, None, flags, seed=0), Clock()

    def batch(indices: Sequence[int]) -> RerankBatch:
        clock.units.append(sum(len(texts) for _, texts in lists))
        return collate(indices)

    objective = ListwiseReranking(reranker)
    with torch.no_grad(), evaluating(objective):
        loss = float(objective(collate(range(len(lists))).to(device()))[0]) / len(lists)
    train_rqa(objective, len(lists), batch, len(lists), arguments.warmup + arguments.steps, bf16, clock)
    return loss, clock


def train_sentence_transformers(arguments: argparse.Namespace, lists: Lists) -> tuple[float, Clock]:
    """Train with sentence-transformers as its documentation does."""
    from datasets import Dataset
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import ListNetLoss

    model = CrossEncoder(
        f"{arguments.directory}/reranker",
        max_length=arguments.max_length,
        device=None if torch.cuda.is_available() else "cpu",
        config_kwargs={"attention_probs_dropout_prob": 0.0} if arguments.setting == "calm" else None,
    )
    queries, docs = (list(column) for column in zip(*lists, strict=True))
    labels = [[CERTAIN] + [0.0] * (len(texts) - 1) for texts in docs]
    objective = ListNetLoss(model, mini_batch_size=-1 if arguments.setting in ("whole", "calm") else None)
    with torch.no_grad():
        loss = float(objective.eval()([queries, docs], [torch.tensor(row) for row in labels]))
    objective.train()
    data, pairs = Dataset.from_dict({"query": queries, "docs": docs, "labels": labels}), sum(map(len, docs))
    how = CrossEncoderTrainer, CrossEncoderTrainingArguments
    return loss, train_peer(*how, arguments, len(lists), pairs, model, train_dataset=data, loss=objective)


if __name__ == "__main__":
    main()
