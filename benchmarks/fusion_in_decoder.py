#!/usr/bin/env python
"""How fast does fusion-in-decoder train, and score passages for DCA, compared with the reference implementation?

    python benchmarks/fusion_in_decoder.py --tokenizer M                                            # pydocs
    python benchmarks/fusion_in_decoder.py ... --train_file train_w_qa.jsonl --document_path documents.pkl
    python benchmarks/fusion_in_decoder.py ... --size tiny --steps 1 --warmup 0                     # tiny

The model is a T5 of the size of T5-base with random weights. Training compares passages a second and peak memory of rqa
with those of one dense batch, in which all passages are padded to 512 tokens and the decoder attends over the (masked)
padding, as in the code of Izacard and Grave. Scoring compares rqa's cross-attention of one decoder step with their way:
generate 50 tokens over padded passages. All systems work on the same questions, each in its own process.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import (
    Clock,
    compare,
    new_parser,
    print_rates,
    read_corpus,
    run_benchmark,
    summary,
    train_rqa,
    with_passages,
)
from transformers import T5Config, T5ForConditionalGeneration

from rqa.data import Document, Example
from rqa.evaluation.runtime import seconds
from rqa.models.encoder_decoder import FiDPromptArguments, FiDPrompter, FiDSequence
from rqa.models.loading import load_tokenizer

PADDED_LENGTH = 512
GENERATED = 50  # tokens that the reference generates for scoring
SYSTEMS = {  # name -> its allocator settings
    "rqa: training": ["tuned"],
    "padded: training": ["default", "tuned"],
    "rqa: scoring": ["tuned"],
    "padded and generating: scoring": ["default", "tuned"],
}
SIZES = {
    "base": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "tiny": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
}
Question = tuple[Example, list[Document]]
Step = Callable[[list[Question]], None]  # works on a batch


def main() -> None:
    parser = new_parser(__doc__, "--train_file", systems=SYSTEMS, steps=3)
    parser.add_argument("--tokenizer", required=True, help="a directory or hub name of any BERT or T5")
    parser.add_argument("--n_context", type=int, default=5, help="passages of a question")
    parser.add_argument("--batch_size", type=int, default=2, help="questions of a step")
    parser.add_argument("--size", choices=list(SIZES), default="base")
    run_benchmark(__file__, parser.parse_args(), SYSTEMS, measure, report)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(arguments.tokenizer)
    config = T5Config(
        vocab_size=len(tokenizer),
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.sep_token_id or tokenizer.eos_token_id,
        **SIZES[arguments.size],
    )
    model = T5ForConditionalGeneration(config).to("cuda" if torch.cuda.is_available() else "cpu")
    prompter = FiDPrompter(
        tokenizer, FiDPromptArguments(max_encoder_seq_length=PADDED_LENGTH), config.decoder_start_token_id
    )
    rows = questions(arguments)
    if arguments.system == "rqa: training":
        return summary(train_product(arguments, model, prompter, rows).steps(skip=arguments.warmup))
    step = {
        "padded: training": padded_training,
        "rqa: scoring": rqa_scoring,
        "padded and generating: scoring": padded_scoring,
    }[arguments.system](arguments, model, prompter)
    batches = [rows[start : start + arguments.batch_size] for start in range(0, len(rows), arguments.batch_size)]
    steps = [(arguments.n_context * len(batch), seconds(lambda batch=batch: step(batch))) for batch in batches]
    return summary(steps[arguments.warmup :])


def questions(arguments: argparse.Namespace) -> list[Question]:
    documents, examples, _ = read_corpus(arguments.document_path, arguments.train_file, answers=True)
    asked = examples[: arguments.batch_size * (arguments.steps + arguments.warmup)]
    return with_passages(asked, documents, arguments.n_context)


def train_product(
    arguments: argparse.Namespace, model: T5ForConditionalGeneration, prompter: FiDPrompter, rows: list[Question]
) -> Clock:
    """Train with rqa's own loop and objective."""
    from rqa.objectives.fid import FiDLikelihood

    sequences = [prompter.encode(example, passages, example.gold_answer) for example, passages in rows]
    objective, clock = FiDLikelihood(model, prompter), Clock()

    def batch(indices: Sequence[int]) -> Any:
        clock.units.append(arguments.n_context * len(indices))
        return objective.batch([sequences[i] for i in indices], indices)

    steps = arguments.steps + arguments.warmup
    train_rqa(objective, len(rows), batch, arguments.batch_size, steps, arguments.precision == "bf16", clock)
    return clock


def padded_training(arguments: argparse.Namespace, model: T5ForConditionalGeneration, prompter: FiDPrompter) -> Step:
    """Train with every passage padded to one length; a question's states lie side by side, padding included."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(batch: list[Question]) -> None:
        sequences = [prompter.encode(example, passages, example.gold_answer) for example, passages in batch]
        labels = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(sequence.answer) for sequence in sequences], batch_first=True, padding_value=-100
        ).to(model.device)
        with autocast(arguments, model):
            model(**encode_padded(model, sequences), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def rqa_scoring(arguments: argparse.Namespace, model: T5ForConditionalGeneration, prompter: FiDPrompter) -> Step:
    from rqa.objectives.dca import CrossAttentionScorer
    from rqa.objectives.teacher import Pair

    scorer = CrossAttentionScorer(model, prompter, arguments.batch_size)

    def step(batch: list[Question]) -> None:
        pairs = [Pair(example, document, tuple(passages)) for example, passages in batch for document in passages]
        with autocast(arguments, model):
            list(scorer(pairs))

    return step


def padded_scoring(arguments: argparse.Namespace, model: T5ForConditionalGeneration, prompter: FiDPrompter) -> Step:
    """Generate an answer, as the reference does; reading scores from the first step would add next to nothing."""
    model.eval()
    length = {"min_new_tokens": GENERATED, "max_new_tokens": GENERATED}

    @torch.no_grad()
    def step(batch: list[Question]) -> None:
        inputs = [prompter.encode(example, passages) for example, passages in batch]
        with autocast(arguments, model):
            model.generate(**encode_padded(model, inputs), **length, do_sample=False)

    return step


def encode_padded(model: T5ForConditionalGeneration, sequences: list[FiDSequence]) -> dict[str, Any]:
    """Encode all passages as one dense batch. -> one row of states for each question, padding included"""
    from transformers.modeling_outputs import BaseModelOutput

    passages = [passage for sequence in sequences for passage in sequence.passages]
    ids = torch.full((len(passages), PADDED_LENGTH), model.config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, passage in enumerate(passages):
        ids[row, : len(passage)] = torch.tensor(passage)
        mask[row, : len(passage)] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    states = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state  # [B * K, 512, D]
    states = states.view(len(sequences), -1, states.shape[-1])
    return {
        "encoder_outputs": BaseModelOutput(last_hidden_state=states),
        "attention_mask": mask.view(len(sequences), -1),
    }


def autocast(arguments: argparse.Namespace, model: T5ForConditionalGeneration) -> torch.autocast:
    return torch.autocast(model.device.type, torch.bfloat16, enabled=arguments.precision == "bf16")


def report(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    ours = {row["system"].partition(": ")[2]: row for row in rows if row["system"].startswith("rqa")}
    compare(rows, lambda row: ours.get(row["system"].partition(": ")[2]))
    print_rates(["", "allocator", "passages/s"], rows)
    tokenizer = load_tokenizer(arguments.tokenizer)
    texts = [document.fmt_content for _, passages in questions(arguments) for document in passages]
    tokens = sum(map(len, tokenizer(texts)["input_ids"])) / len(texts)
    print(f"passages have {tokens:.0f} tokens on average")
    return {"mean_length": tokens}


if __name__ == "__main__":
    main()
