#!/usr/bin/env python
"""How long does an evaluation take: retrieve 4 passages, answer in at most 64 tokens, score?

    python benchmarks/evaluation_runtime.py --qa_model_name_or_path M --embedding_model E              # pydocs
    python benchmarks/evaluation_runtime.py ... --document_path documents.pkl --eval_data_path test_w_qa.jsonl

Three systems give the same answers by greedy decoding, each in its own process: rqa; a plain `transformers` loop
(padded batches of 8 in file order, then scores one by one); and one question at a time, as in most evaluation scripts.
All have rqa's allocator setting, which makes them all faster. The time excludes loading models and encoding documents,
which are the same for all.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from harness import compare, new_parser, print_table, read_corpus, run_benchmark, times

from rqa.data import Document, Example
from rqa.evaluation.answers import evaluate_answers
from rqa.evaluation.metrics import corpus_bleu, score_answer
from rqa.evaluation.retrieval import EvaluationArguments, find_passages
from rqa.evaluation.runtime import seconds
from rqa.prompts import PromptArguments, Prompter, retrieval_query
from rqa.retrieval.retriever import Retriever

SYSTEMS = {"rqa": 0, "transformers, batches in file order": 8, "transformers, one question at a time": 1}  # at once
PASSAGES = 4


def main() -> None:
    parser = new_parser(__doc__, "--eval_data_path", systems=SYSTEMS)
    parser.add_argument("--qa_model_name_or_path", required=True)
    parser.add_argument("--embedding_model", required=True)
    parser.add_argument("--max_examples", type=int, default=0, help="the first so many questions; 0: all")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--max_seq_length", type=int, default=2048)
    run_benchmark(__file__, parser.parse_args(), dict.fromkeys(SYSTEMS, ("tuned",)), measure, report)


def report(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    ours, answers = next((row for row in rows if row["system"] == "rqa"), None), rows[0]["answers"]
    compare(rows, lambda _: ours, "questions_per_second")
    for row in rows:
        row["same_answers"] = statistics.mean(a == b for a, b in zip(row.pop("answers"), answers, strict=True))
    print_table(
        ["system", "retrieve s", "generate s", "score s", "total s", "same answers", "peak GiB", "rqa is"],
        [
            [row["system"], *(f"{row[name]:.2f}" for name in ("retrieve", "generate", "score", "total")),
             f"{row['same_answers']:.0%}", f"{row['peak_gib']:.1f}", times(row)]
            for row in rows
        ],
    )  # fmt: skip


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the seconds of each part, and return the answers, too."""
    from transformers import AutoModelForCausalLM

    from rqa.models.encoder import EncoderArguments, load_encoder
    from rqa.models.loading import load_causal_lm, load_tokenizer
    from rqa.models.reader import CausalLMReader
    from rqa.runtime.distributed import device

    documents, _, examples = read_corpus(arguments.document_path, eval_file=arguments.eval_data_path, answers=True)
    examples = examples[: arguments.max_examples or None]
    lengths = {"max_seq_length": arguments.max_seq_length, "max_new_tokens": arguments.max_new_tokens}
    prompt = PromptArguments(chat_format="template", **lengths)
    prompter = Prompter(load_tokenizer(arguments.qa_model_name_or_path), prompt)
    loading = EncoderArguments(bf16=arguments.precision == "bf16")
    retriever = Retriever(load_encoder(arguments.embedding_model, loading), documents)
    retriever.open(f"{arguments.directory}/index")
    if size := SYSTEMS[arguments.system]:
        path, dtype = arguments.qa_model_name_or_path, loading.precision
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device())
        took, answers = run_transformers(model, prompter, retriever, examples, size)
    else:
        reader = CausalLMReader(load_causal_lm(arguments.qa_model_name_or_path, loading), prompter)
        took, answers = run_rqa(reader, retriever, examples)
    total = sum(took.values())
    return {**took, "total": total, "questions_per_second": len(examples) / total, "answers": answers}


def run_rqa(reader: Any, retriever: Retriever, examples: Sequence[Example]) -> tuple[dict[str, float], list[str]]:
    """Run rqa's own evaluation. -> the seconds of its parts, and the answers"""
    evaluation = EvaluationArguments(embedding_max_num_to_retrieve=PASSAGES)
    found: list[list[Document]] = []
    results: list[Any] = []
    took = {"retrieve": seconds(lambda: found.extend(find_passages(retriever, examples, evaluation)))}
    whole = seconds(lambda: results.extend(evaluate_answers(reader, examples, found, evaluation)))
    metrics, rows = results
    took["generate"] = len(examples) / metrics["gen/questions_per_second"]
    took["score"] = whole - took["generate"]
    return took, [row["generated_answer"] for row in rows]


def run_transformers(
    model: Any, prompter: Prompter, retriever: Retriever, examples: Sequence[Example], size: int
) -> tuple[dict[str, float], list[str]]:
    """Run `model.generate` on padded batches in file order, with the same prompts, then score one by one."""
    tokenizer = prompter.tokenizer
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    found: list[list[Document]] = []
    answers: list[str] = []

    def retrieve() -> None:
        for start in range(0, len(examples), size):
            queries = [retrieval_query(example) for example in examples[start : start + size]]
            found.extend(retriever.documents_of(retriever.retrieve(queries, PASSAGES)))

    @torch.no_grad()
    def generate() -> None:
        model.eval()
        for start in range(0, len(examples), size):
            pairs = zip(examples[start : start + size], found[start : start + size], strict=True)
            prompts = [{"input_ids": prompter.encode(*pair).ids} for pair in pairs]
            inputs = tokenizer.pad(prompts, return_tensors="pt").to(model.device)
            output = model.generate(
                **inputs,
                max_new_tokens=prompter.arguments.max_new_tokens,
                do_sample=False,
                eos_token_id=prompter.stop_ids,
                pad_token_id=tokenizer.pad_token_id,
            )
            new = output[:, inputs["input_ids"].shape[1] :]
            answers.extend(text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True))

    def score() -> None:
        gold = [example.gold_answer for example in examples]
        for pair in zip(answers, gold, strict=True):
            score_answer(*pair)
        corpus_bleu(answers, gold)

    return {work.__name__: seconds(work) for work in (retrieve, generate, score)}, answers


if __name__ == "__main__":
    main()
