#!/usr/bin/env python
"""Train a peer on the data of rqa's trainers, as its documentation advises; `learning.py` runs this.

    python benchmarks/learning_peers.py sentence_transformers --num_hard_negatives 3 ...    # flags of train_ctl
    python benchmarks/learning_peers.py trl --chat_format template ...                      # flags of train_sft

sentence-transformers trains with CachedMultipleNegativesRankingLoss on pairs of question and gold passage, in batches
without duplicates. Negatives come from `mine_hard_negatives` with its documentation's `relative_margin=0.05`. It keeps
the epoch with the best MRR@10 on the eval file. trl runs SFTTrainer on train_sft's own prompts, with the loss on the
completion only, and keeps the epoch with the lowest loss on the eval file. Both continue from their last checkpoint.
"""

import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import get_last_checkpoint

from rqa.data import read_examples
from rqa.documents import read_documents, with_known_gold
from rqa.models.loading import load_tokenizer
from rqa.objectives.sft import encode_examples
from rqa.prompts import Prompter, retrieval_query
from rqa.recipe.run import TrainingArguments
from rqa.runtime.cli import run
from rqa.runtime.flags import parse

SAME_NAMES = ("output_dir", "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size",
              "gradient_accumulation_steps", "lr_scheduler_type", "weight_decay", "max_grad_norm", "seed")  # fmt: skip


def main() -> None:
    with redirect_stdout(sys.stderr):
        {"sentence_transformers": train_encoder, "trl": train_decoder}[sys.argv.pop(1)]()


def flags_of(trainer: str) -> Any:
    """Parse the command line as this executable of bin/ does."""
    path = Path(__file__).resolve().parents[1] / "bin" / trainer
    return parse(runpy.run_path(str(path), run_name="flags")["Flags"], __doc__)


def settings_of(flags: TrainingArguments) -> dict[str, Any]:
    """Settings of both peers for `transformers.Trainer`."""
    own = {name: getattr(flags, name) for name in SAME_NAMES} | {"bf16": bool(flags.bf16)}
    own |= {"warmup_steps": flags.warmup_steps or flags.warmup_ratio, "use_cpu": not torch.cuda.is_available()}
    own |= {"eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1, "load_best_model_at_end": True}
    return own | {"optim": "adamw_torch_fused", "report_to": "none"}


def finish(trainer: Any) -> None:
    """Train to the end, starting at the last checkpoint if there is one, and save the best model."""
    output = trainer.args.output_dir
    trainer.train(resume_from_checkpoint=(Path(output).is_dir() and get_last_checkpoint(output)) or None)
    trainer.save_model(output)


def train_encoder() -> None:
    import sentence_transformers as peer
    from datasets import Dataset
    from sentence_transformers.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

    flags = flags_of("train_ctl")
    documents = read_documents(flags.document_path)
    train, held_out = (with_known_gold(read_examples(path), documents) for path in (flags.train_file, flags.eval_file))
    corpus = {document.key: document.fmt_content for document in documents}
    names = {key: str(number) for number, key in enumerate(corpus)}
    model = peer.SentenceTransformer(flags.model_name_or_path, device=None if torch.cuda.is_available() else "cpu")
    pairs = [(retrieval_query(example), gold.fmt_content) for example in train for gold in example.gold_docs]
    data = Dataset.from_dict(dict(zip(("anchor", "positive"), zip(*pairs, strict=True), strict=True)))
    if count := flags.num_hard_negatives:
        mining = {"relative_margin": 0.05, "range_max": min(100, len(corpus) - 1), "output_format": "n-tuple"}
        data = peer.util.mine_hard_negatives(data, model, corpus=[*corpus.values()], num_negatives=count, **mining)
    evaluator = InformationRetrievalEvaluator(
        {str(number): retrieval_query(example) for number, example in enumerate(held_out)},
        {names[key]: text for key, text in corpus.items()},
        {str(n): {names[gold.key] for gold in e.gold_docs if gold.key in names} for n, e in enumerate(held_out)},
        write_csv=False,
    )
    settings = settings_of(flags) | {"batch_sampler": "no_duplicates", "metric_for_best_model": "eval_cosine_mrr@10"}
    arguments = peer.SentenceTransformerTrainingArguments(**settings)
    loss = CachedMultipleNegativesRankingLoss(model, scale=1 / flags.temperature, mini_batch_size=32)
    finish(peer.SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss, evaluator=evaluator))


def train_decoder() -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    flags = flags_of("train_sft")
    documents, prompter = read_documents(flags.document_path), Prompter(load_tokenizer(flags.model_name_or_path), flags)
    data = {}
    for name, path in (("train_dataset", flags.train_file), ("eval_dataset", flags.eval_file)):
        examples = with_known_gold(read_examples(path, answers=True), documents)
        encoded = encode_examples(prompter, examples, [list(example.gold_docs) for example in examples]).values()
        masks = [[int(place >= each.answer_start) for place in range(len(each.ids))] for each in encoded]
        data[name] = Dataset.from_dict({"input_ids": [each.ids for each in encoded], "completion_mask": masks})
    settings = settings_of(flags) | {"per_device_eval_batch_size": flags.per_device_eval_batch_size}
    settings |= {"max_length": flags.max_seq_length, "completion_only_loss": True, "gradient_checkpointing": False}
    model = AutoModelForCausalLM.from_pretrained(flags.model_name_or_path, dtype=torch.float32)
    finish(SFTTrainer(model, SFTConfig(**settings), processing_class=prompter.tokenizer, **data))


if __name__ == "__main__":
    run(main)
