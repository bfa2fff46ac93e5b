#!/usr/bin/env python
"""How fast is contrastive training of an encoder? Questions a second and peak memory, beside sentence-transformers.

    python benchmarks/retriever_training.py --model_name_or_path M                                  # pydocs
    python benchmarks/retriever_training.py ... --train_file train_w_q.jsonl --document_path documents.pkl
    python benchmarks/retriever_training.py ... --precision bf16 --batch_size 16

A batch is 64 questions, each with its passage and one hard negative of at most 256 tokens. Every system trains on the
same texts in its own process. The peers are sentence-transformers with MultipleNegativesRankingLoss, and with the
cached form of this loss and rqa's chunk size. Their settings are `default`, as a user starts them; `tuned`, with rqa's
allocator setting; and `calm`, also without dropout of attention probabilities, which rqa never has. Without any
dropout, the loss of the first batch must be the same for all. Needs `pip install -e ".[bench]"`.
"""

import argparse
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
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

TEMPERATURE = 0.05  # the inverse of the peers' default scale, 20
CHUNK = 32
SYSTEMS = {  # name -> its settings
    "rqa": ["tuned"],
    "rqa in chunks": ["tuned"],
    "sentence-transformers": ["default", "tuned", "calm"],
    "sentence-transformers cached": ["default", "tuned", "calm"],
}

Triple = tuple[str, str, str]  # question, passage, hard negative


def main() -> None:
    parser = new_parser(__doc__, "--train_file", systems=SYSTEMS, steps=3)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--batch_size", type=int, default=64, help="questions of a step")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a passage")
    run_benchmark(__file__, parser.parse_args(), SYSTEMS, measure, report, prepare)


def prepare(arguments: argparse.Namespace) -> list[Triple]:
    """A batch of triples in which no passage comes twice, so that all systems have the same negatives."""
    documents, examples, _ = read_corpus(arguments.document_path, arguments.train_file)
    numbers = {document.key: number for number, document in enumerate(documents)}
    first = {numbers[example.gold_docs[0].key]: example for example in reversed(examples) if example.gold_docs}
    chosen = sorted(first)[: arguments.batch_size]
    if len(chosen) < arguments.batch_size:
        raise SystemExit(f"error: --batch_size {arguments.batch_size}: only {len(chosen)} passages have questions")
    others = random.Random(0).sample(sorted(set(range(len(documents))) - set(chosen)), len(chosen))

    def text(number: int) -> str:  # short passages continue with their neighbours, to have full length
        return "\n".join(document.fmt_content for document in documents[number : number + 8])[:4000]

    return [(first[gold].question, text(gold), text(other)) for gold, other in zip(chosen, others, strict=True)]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure questions a second of each step, and the loss of the first batch."""
    train = train_product if arguments.system.startswith("rqa") else train_sentence_transformers
    loss, clock = train(arguments, prepared(arguments))
    return {"first_loss": loss, **summary(clock.steps(skip=arguments.warmup))}


def train_product(arguments: argparse.Namespace, triples: list[Triple]) -> tuple[float, Clock]:
    """Train with rqa's own loop and objective."""
    from rqa.models.encoder import EncoderArguments, load_encoder
    from rqa.models.loading import evaluating
    from rqa.objectives.ctl import Contrastive, ContrastiveBatch
    from rqa.objectives.encoding import in_chunks
    from rqa.runtime.distributed import device

    size, bf16 = len(triples), arguments.precision == "bf16"
    flags = EncoderArguments(max_passage_length=arguments.max_length, bf16=bf16)
    encoder = load_encoder(arguments.model_name_or_path, flags, torch.float32)
    queries = encoder.tokenize_queries([question for question, _, _ in triples])
    passages = encoder.tokenize_passages([triple[1] for triple in triples] + [triple[2] for triple in triples])
    clock = Clock()

    def batch(indices: Sequence[int], chunk_size: int = 0) -> ContrastiveBatch:
        clock.units.append(size)
        documents, targets = torch.arange(2 * size), torch.arange(size)
        chunks = (in_chunks(encoder, texts, chunk_size) for texts in (queries, passages))
        return ContrastiveBatch(*chunks, indices, documents, targets, gold=targets[:, None])

    objective = Contrastive(encoder, TEMPERATURE)
    with torch.no_grad(), evaluating(objective):
        chunked = batch([], CHUNK).to(device())  # in chunks, so that the peak is that of training
        loss = float(objective(chunked)[0]) / size
    clock.units.clear()
    asked = partial(batch, chunk_size=CHUNK if arguments.system == "rqa in chunks" else 0)
    train_rqa(objective, size, asked, size, arguments.warmup + arguments.steps, bf16, clock)
    return loss, clock


def train_sentence_transformers(arguments: argparse.Namespace, triples: list[Triple]) -> tuple[float, Clock]:
    """Train with sentence-transformers as its documentation does."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss

    model = SentenceTransformer(
        arguments.model_name_or_path,
        device=None if torch.cuda.is_available() else "cpu",
        config_kwargs={"attention_probs_dropout_prob": 0.0} if arguments.setting == "calm" else None,
    )
    model.max_seq_length = arguments.max_length
    if arguments.system == "sentence-transformers cached":
        objective = CachedMultipleNegativesRankingLoss(model, mini_batch_size=CHUNK)
    else:
        objective = MultipleNegativesRankingLoss(model)
    loss, size = first_loss(model, triples), len(triples)
    columns = dict(zip(("anchor", "positive", "negative"), zip(*triples, strict=True), strict=True))
    data = Dataset.from_dict({name: list(texts) for name, texts in columns.items()})
    how = SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    return loss, train_peer(*how, arguments, size, size, model, train_dataset=data, loss=objective)


def first_loss(model: Any, triples: list[Triple]) -> float:
    """Compute the peer's loss over its embeddings, without dropout."""
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    embeddings = [model.encode(list(texts), convert_to_tensor=True) for texts in zip(*triples, strict=True)]
    return float(MultipleNegativesRankingLoss(model).compute_loss_from_embeddings(embeddings, None))


def report(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    ours = {row["system"]: row for row in rows if row["system"].startswith("rqa")}
    compare(rows, lambda row: ours.get("rqa in chunks" if row["system"].endswith("cached") else "rqa"))
    print_rates(["", "settings", "questions/s"], rows, first_loss=".4f")


if __name__ == "__main__":
    main()
