#!/usr/bin/env python
"""Train a peer on what rqa's trainers train on, as its documentation advises; `learning.py` runs this.

    python benchmarks/learning_peers.py sentence_transformers --model_name_or_path E --num_hard_negatives 3 \\
        --train_file T --eval_file T --document_path D --output_dir out/peer
    python benchmarks/learning_peers.py trl --model_name_or_path L --chat_format template ...

sentence-transformers: CachedMultipleNegativesRankingLoss on pairs of question and gold passage, batches without
duplicates, negatives by `mine_hard_negatives` at its documentation's `relative_margin` of 0.05, and the model with the
best MRR@10 on the eval file. It reads the flags of train_ctl. trl: SFTTrainer, the loss on the completion only, on the
very prompts of train_sft, whose flags and defaults it has. Both keep the best of their epochs, and go on
from their last checkpoint. Needs `pip install -e ".[bench]"`.
"""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import get_last_checkpoint

from rqa.data import Document, Example, read_examples
from rqa.documents import read_documents, with_known_gold
from rqa.objectives.ctl import CTLArguments
from rqa.objectives.sft import SFTArguments, encode_examples
from rqa.prompts import Prompter, retrieval_query
from rqa.recipe.reader import ReaderTraining
from rqa.recipe.retriever import RetrieverTraining
from rqa.recipe.run import TrainingArguments
from rqa.runtime.cli import run
from rqa.runtime.flags import parse

CHUNK = 32  # texts that the cached loss encodes at once
SAME_NAMES = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "lr_scheduler_type",
              "gradient_accumulation_steps", "weight_decay", "max_grad_norm", "seed", "bf16")  # fmt: skip


@dataclass(kw_only=True)
class PairFlags(CTLArguments, RetrieverTraining):
    """Flags of train_ctl."""


@dataclass(kw_only=True)
class PromptFlags(SFTArguments, ReaderTraining):
    """Flags of train_sft."""


def main() -> None:
    train = {"sentence_transformers": train_encoder, "trl": train_decoder}[sys.argv.pop(1)]
    with redirect_stdout(sys.stderr):
        train()


def settings_of(flags: TrainingArguments) -> dict[str, Any]:
    """The settings of `transformers.Trainer` that both peers share."""
    return {name: getattr(flags, name) for name in SAME_NAMES} | {
        "output_dir": flags.output_dir,
        "bf16": bool(flags.bf16),
        "warmup_steps": flags.warmup_steps or flags.warmup_ratio,  # a share below 1
        "use_cpu": not torch.cuda.is_available(),
        "optim": "adamw_torch_fused",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "report_to": "none",
    }


def finish(trainer: Any, flags: TrainingArguments) -> None:
    """Train, from the last checkpoint if there is one, and save the best model."""
    begun = Path(flags.output_dir).is_dir() and get_last_checkpoint(flags.output_dir)
    trainer.train(resume_from_checkpoint=begun or None)
    trainer.save_model(flags.output_dir)


def train_encoder() -> None:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.util import mine_hard_negatives

    flags = parse(PairFlags, __doc__)
    documents = read_documents(flags.document_path)
    train, held_out = (with_known_gold(read_examples(path), documents) for path in (flags.train_file, flags.eval_file))
    model = SentenceTransformer(flags.model_name_or_path, device=None if torch.cuda.is_available() else "cpu")
    if flags.max_passage_length:
        model.max_seq_length = flags.max_passage_length
    pairs = [(retrieval_query(example), gold.fmt_content) for example in train for gold in example.gold_docs]
    questions, passages = zip(*pairs, strict=True)
    data = Dataset.from_dict({"anchor": questions, "positive": passages})
    if flags.num_hard_negatives:
        data = mine_hard_negatives(
            data,
            model,
            corpus=[document.fmt_content for document in documents],
            num_negatives=flags.num_hard_negatives,
            relative_margin=0.05,
            range_max=min(100, len(documents) - 1),
            output_format="n-tuple",
        )
    trainer = SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(
            **settings_of(flags), batch_sampler="no_duplicates", metric_for_best_model="eval_cosine_mrr@10"
        ),
        train_dataset=data,
        loss=CachedMultipleNegativesRankingLoss(model, scale=1 / flags.temperature, mini_batch_size=CHUNK),
        evaluator=searching(held_out, documents),
    )
    finish(trainer, flags)


def searching(examples: Sequence[Example], documents: Sequence[Document]) -> Any:
    """Their evaluator over the whole database."""
    from sentence_transformers.evaluation import InformationRetrievalEvaluator

    names = {document.key: str(number) for number, document in enumerate(documents)}
    return InformationRetrievalEvaluator(
        {str(number): retrieval_query(example) for number, example in enumerate(examples)},
        {names[document.key]: document.fmt_content for document in documents},
        {str(n): {names[gold.key] for gold in example.gold_docs if gold.key in names} for n, example in enumerate(examples)},
        write_csv=False,
    )


def train_decoder() -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    flags = parse(PromptFlags, __doc__)
    tokenizer = AutoTokenizer.from_pretrained(flags.model_name_or_path)
    prompter = Prompter(tokenizer, flags)
    documents = read_documents(flags.document_path)

    def prompts(path: str) -> Dataset:
        examples = with_known_gold(read_examples(path, answers=True), documents)
        encoded = encode_examples(prompter, examples, [list(example.gold_docs) for example in examples]).values()
        rows = [(each.ids, [int(place >= each.answer_start) for place in range(len(each.ids))]) for each in encoded]
        return Dataset.from_list([{"input_ids": ids, "completion_mask": mask} for ids, mask in rows])

    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(flags.model_name_or_path, dtype=torch.float32),
        SFTConfig(
            **settings_of(flags),
            per_device_eval_batch_size=flags.per_device_eval_batch_size,
            max_length=flags.max_seq_length,
            completion_only_loss=True,
            gradient_checkpointing=flags.gradient_checkpointing,
        ),
        train_dataset=prompts(flags.train_file),
        eval_dataset=prompts(flags.eval_file),
        processing_class=tokenizer,
    )
    finish(trainer, flags)


if __name__ == "__main__":
    run(main)
