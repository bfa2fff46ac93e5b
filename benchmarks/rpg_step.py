#!/usr/bin/env python
"""How long does a step of RPG take, compared with one document a forward pass, padded to 512 tokens, full logits?

    python benchmarks/rpg_step.py --model_name_or_path E --lm_model_path L                          # pydocs
    python benchmarks/rpg_step.py ... --train_file train_w_qa.jsonl --document_path documents.pkl
    python benchmarks/rpg_step.py ... --precision bf16 --num_docs 4 --steps 1

A step retrieves K documents for each of 4 questions, scores every pair with the language model, and trains the encoder.
`cold` means that no pair has been scored before; `warm` means that all have been, as in a second epoch. Both systems
have the same questions, the same index and rqa's allocator setting, each in its own process.
"""

import argparse
import os
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from harness import Clock, new_parser, print_table, read_corpus, run_benchmark, times, train_rqa

from rqa.data import Document, Example
from rqa.models.encoder import load_encoder
from rqa.models.loading import LoadingArguments, load_causal_lm, load_tokenizer
from rqa.objectives.rpg import LikelihoodArguments, ListObjective, RetrievedCandidates, ScoredCandidates
from rqa.prompts import Prompter
from rqa.recipe.retriever import open_teacher
from rqa.retrieval.retriever import Retriever
from rqa.runtime.distributed import device

QUESTIONS, MAX_LENGTH, TEMPERATURE = 4, 512, 0.1


def main() -> None:
    parser = new_parser(__doc__, "--train_file", systems=("rqa", "the usual way"), steps=2)
    parser.add_argument("--model_name_or_path", required=True, help="the encoder")
    parser.add_argument("--lm_model_path", required=True, help="the language model")
    parser.add_argument("--num_docs", type=int, nargs="+", default=[4, 20])
    arguments = parser.parse_args()
    systems = {"rqa": arguments.num_docs, "the usual way": arguments.num_docs}
    run_benchmark(__file__, arguments, systems, measure, report, prepare)


def prepare(arguments: argparse.Namespace) -> None:
    open_retriever(arguments, read_inputs(arguments)[0])  # builds the index for all systems


def read_inputs(arguments: argparse.Namespace) -> tuple[Sequence[Document], Sequence[Example]]:
    """Read the documents, and the questions of all steps."""
    documents, examples, _ = read_corpus(arguments.document_path, arguments.train_file, answers=True)
    return documents, examples[: QUESTIONS * (arguments.steps + arguments.warmup)]


def open_retriever(arguments: argparse.Namespace, documents: Sequence[Document]) -> Retriever:
    return Retriever(load_encoder(arguments.model_name_or_path), documents).open(f"{arguments.directory}/index")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    documents, examples = read_inputs(arguments)
    steps = rqa_steps if arguments.system == "rqa" else usual_steps
    return {"seconds": steps(arguments, open_retriever(arguments, documents), examples, int(arguments.setting))}


def rqa_steps(
    arguments: argparse.Namespace, retriever: Retriever, examples: Sequence[Example], depth: int
) -> dict[str, list[float]]:
    """Run rqa's own loop: one epoch with an empty teacher cache, and one with all scores cached."""
    encoder, bf16, path = retriever.encoder, arguments.precision == "bf16", arguments.lm_model_path
    os.environ["RQA_CACHE"] = f"{arguments.directory}/cache of {depth}"  # no scores from an earlier run
    lm = LikelihoodArguments(lm_model_path=path, text_maxlength=MAX_LENGTH, bf16=bf16, num_docs=depth)
    teacher = open_teacher(lm)
    choose = RetrievedCandidates(examples, retriever, lm)
    collate = ScoredCandidates(examples, retriever.documents, encoder, choose, teacher, TEMPERATURE)
    objective, clock = ListObjective(encoder, TEMPERATURE), Clock()
    epoch = arguments.warmup + arguments.steps
    clock.units = [QUESTIONS] * 2 * epoch
    # learning rate 0: the second epoch finds the documents of the first
    train_rqa(objective, len(examples), collate, QUESTIONS, 2 * epoch, bf16, clock, learning_rate=0.0)
    seconds = [seconds for _, seconds in clock.steps()]
    return {"rqa, cold": seconds[arguments.warmup : epoch], "rqa, warm": seconds[epoch + arguments.warmup :]}


def usual_steps(
    arguments: argparse.Namespace, retriever: Retriever, examples: Sequence[Example], depth: int
) -> dict[str, list[float]]:
    """Run RPG as released trainers implement it."""
    encoder, flags = retriever.encoder, LoadingArguments(bf16=arguments.precision == "bf16")
    backbone = encoder.backbone.train()
    tokenizer = load_tokenizer(arguments.lm_model_path)
    lm = LikelihoodArguments(lm_model_path=arguments.lm_model_path, text_maxlength=MAX_LENGTH)
    prompter = Prompter(tokenizer, lm.lm_prompt(tokenizer))
    model = load_causal_lm(arguments.lm_model_path, dtype=flags.precision).eval()
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=0.0)
    clock = Clock()

    def embed(texts: Sequence[str]) -> torch.Tensor:
        batch = encoder.tokenizer(list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt")
        hidden = backbone(**batch.to(device())).last_hidden_state  # [B, L, D]
        mask = batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    @torch.no_grad()
    def likelihood(example: Example, document: Document) -> torch.Tensor:
        sequence = prompter.encode(example, [document], example.gold_answer)
        padding = MAX_LENGTH - len(sequence.ids)
        ids = torch.tensor([sequence.ids + [0] * padding], device=device())
        mask = torch.tensor([[1] * len(sequence.ids) + [0] * padding], device=device())
        logits = model(input_ids=ids, attention_mask=mask).logits[0].float()  # [L, V]
        answer = torch.arange(sequence.answer_start, len(sequence.ids), device=device())
        return logits.log_softmax(-1)[answer - 1, ids[0, answer]].mean()

    for start in range(0, len(examples), QUESTIONS):
        clock.tick()
        clock.units.append(QUESTIONS)
        losses = []
        with torch.autocast(device().type, torch.bfloat16, enabled=flags.precision == torch.bfloat16):
            for example in examples[start : start + QUESTIONS]:
                (documents,) = retriever.documents_of(retriever.retrieve([example.question], depth))
                scores = torch.stack([likelihood(example, document) for document in documents])
                similarity = embed([example.question]) @ embed([d.fmt_content for d in documents]).T / TEMPERATURE
                target = (scores / TEMPERATURE).softmax(-1)
                losses.append(torch.nn.functional.kl_div(similarity[0].log_softmax(-1), target, reduction="sum"))
            (sum(losses) / len(losses)).backward()
        optimizer.step()
        optimizer.zero_grad()
    clock.tick()
    return {"the usual way": [seconds for _, seconds in clock.steps(skip=arguments.warmup)]}


def report(_: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [
        {"system": name, "num_docs": int(row["setting"]), "seconds": seconds, "peak_gib": row["peak_gib"]}
        for row in sorted(rows, key=lambda row: int(row["setting"]))
        for name, seconds in row["seconds"].items()
    ]
    usual = {row["num_docs"]: statistics.median(row["seconds"]) for row in rows if row["system"] == "the usual way"}
    for row in rows:
        if row["system"] != "the usual way" and usual:
            row["rqa_is"] = usual[row["num_docs"]] / statistics.median(row["seconds"])

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        median = statistics.median(row["seconds"])
        spread = f"{min(row['seconds']):.2f}-{max(row['seconds']):.2f}"
        return row["system"], str(row["num_docs"]), f"{median:.2f}", spread, f"{row['peak_gib']:.1f}", times(row)

    print_table(["", "documents", "s a step", "spread", "peak GiB", "as fast"], [cells(row) for row in rows])
    return {"rows": rows}


if __name__ == "__main__":
    main()
