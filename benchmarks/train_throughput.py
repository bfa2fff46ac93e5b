#!/usr/bin/env python
"""How fast does a reader train? Real tokens a second and peak memory, compared with what a user would choose instead.

    python benchmarks/train_throughput.py --model_name_or_path M --embedding_model E                # pydocs
    python benchmarks/train_throughput.py ... --train_file train_w_qa.jsonl --document_path documents.pkl
    python benchmarks/train_throughput.py ... --precision bf16

Every system trains on the same SwR prompts (gold + 3 retrieved passages), each in its own process. A peer runs twice:
as a user starts it, and with rqa's allocator setting. Real tokens exclude padding and tokens that are cut off. The
peers are `transformers.Trainer` as LocalRQA uses it (labels = inputs, padded to 2,048 tokens), and trl's SFTTrainer,
padding-free or packed, with the loss on the completion only. Needs `pip install -e ".[bench]"`.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from harness import (
    Clock,
    compare,
    matmul_rate,
    new_parser,
    peer_settings,
    prepared,
    print_rates,
    read_corpus,
    run_benchmark,
    summary,
    train_rqa,
    training_flops,
)

PASSAGES = 3
PADDED_LENGTH = 2048
SYSTEMS = {  # name -> its allocator settings
    "rqa": ["tuned"],
    "Trainer": ["default", "tuned"],
    "trl padding-free": ["default", "tuned"],
    "trl packed": ["default", "tuned"],
}

Sequences = list[tuple[list[int], int]]  # token ids of prompt and answer, and where the answer starts


def main() -> None:
    parser = new_parser(__doc__, "--train_file", systems=SYSTEMS, steps=6)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--embedding_model", required=True)
    run_benchmark(__file__, parser.parse_args(), SYSTEMS, measure, report, prepare)


def prepare(arguments: argparse.Namespace) -> Sequences:
    """Two sequences for each step, the same for every system."""
    from rqa.models.encoder import load_encoder
    from rqa.models.loading import load_tokenizer
    from rqa.objectives.swr import SwRArguments, gold_and_retrieved
    from rqa.prompts import PromptArguments, Prompter
    from rqa.retrieval.retriever import Retriever

    documents, examples, _ = read_corpus(arguments.document_path, arguments.train_file, answers=True)
    examples = examples[: 2 * (arguments.steps + arguments.warmup)]
    retriever = Retriever(load_encoder(arguments.embedding_model), documents).open()
    prompter = Prompter(load_tokenizer(arguments.model_name_or_path), PromptArguments(max_seq_length=PADDED_LENGTH))
    flags = SwRArguments(embedding_model=arguments.embedding_model)
    sequences = []
    for example, passages in zip(examples, gold_and_retrieved(examples, retriever, PASSAGES, flags, 0), strict=True):
        sequence = prompter.encode(example, passages, example.gold_answer)
        sequences.append((sequence.ids, sequence.answer_start))
    return sequences


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    train = {"rqa": train_product, "Trainer": train_trainer}.get(arguments.system, train_trl)
    return summary(train(arguments, prepared(arguments)).steps(skip=arguments.warmup))


def train_product(arguments: argparse.Namespace, sequences: Sequences) -> Clock:
    """Train with rqa's own loop and objective."""
    from rqa.models.loading import load_causal_lm, load_tokenizer
    from rqa.objectives.sft import AnswerLikelihood
    from rqa.prompts import PromptArguments, Prompter, TokenSequence

    model = load_causal_lm(arguments.model_name_or_path)
    prompter = Prompter(load_tokenizer(arguments.model_name_or_path), PromptArguments())
    objective, clock = AnswerLikelihood(model, prompter), Clock()

    def batch(indices: Sequence[int]) -> Any:
        chosen = objective.batch([TokenSequence(*sequences[i]) for i in indices], indices)
        clock.units.append(chosen.num_tokens)
        return chosen

    train_rqa(objective, len(sequences), batch, 2, len(sequences) // 2, arguments.precision == "bf16", clock)
    return clock


def train_trainer(arguments: argparse.Namespace, sequences: Sequences) -> Clock:
    """Train with `transformers.Trainer` as LocalRQA does: padded to one length, with the loss on every token."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    clock = Clock()

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        clock.units.append(sum(lengths))
        ids = torch.tensor([row["input_ids"] + [0] * (PADDED_LENGTH - len(row["input_ids"])) for row in rows])
        mask = torch.tensor([[1] * length + [0] * (PADDED_LENGTH - length) for length in lengths])
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}

    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, dtype=torch.float32),
        TrainingArguments(**peer_settings(arguments, 2, len(sequences) // 2)),
        data_collator=collate,
        train_dataset=[{"input_ids": ids} for ids, _ in sequences],
        callbacks=[clock.callback()],
    )
    trainer.train()
    return clock


def train_trl(arguments: argparse.Namespace, sequences: Sequences) -> Clock:
    """Train with trl at its best: without padding, with the loss on the completion only."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    packed, clock = arguments.system == "trl packed", Clock()
    rows = [
        {"input_ids": ids, "completion_mask": [int(i >= start) for i in range(len(ids))]} for ids, start in sequences
    ]
    settings = peer_settings(arguments, 2, len(sequences) // 2)
    if packed:  # one row of packed sequences is the batch
        settings |= {"per_device_train_batch_size": 1, "max_steps": -1, "num_train_epochs": 1}
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, dtype=torch.float32),
        SFTConfig(
            **settings,
            packing=packed,
            padding_free=True,
            max_length=2 * max(len(ids) for ids, _ in sequences) if packed else None,
            completion_only_loss=True,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        callbacks=[clock.callback()],
    )
    collate = trainer.data_collator

    def counting(rows: list[dict[str, Any]]) -> Any:
        clock.units.append(sum(len(row["input_ids"]) for row in rows))
        return collate(rows)

    trainer.data_collator = counting
    trainer.train()
    return clock


def report(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    from transformers import AutoConfig

    from rqa.runtime.distributed import has_bf16

    dtype = torch.bfloat16 if arguments.precision == "bf16" and has_bf16() else torch.float32
    rate, lengths = matmul_rate(dtype), [len(ids) for ids, _ in prepared(arguments)]
    ours = next((row for row in rows if row["system"] == "rqa"), None)
    compare(rows, lambda _: ours)
    print_rates(["", "allocator", "tokens/s"], rows, digits=0)
    more = {"mean_length": statistics.mean(lengths), "matmul_gflops": rate}
    if ours:
        config = AutoConfig.from_pretrained(arguments.model_name_or_path)
        per_token = training_flops(config, lengths, 0) / sum(lengths)  # without the output layer
        more["share_of_matmul_rate"] = share = ours["rate"] * per_token / 1e9 / rate
        print(f"matrix products in {str(dtype)[6:]}: {rate:.0f} GFLOP/s; rqa reaches {share:.0%} of that")
    return more


if __name__ == "__main__":
    main()
