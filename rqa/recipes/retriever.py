"""Training an encoder, from files to scores; an algorithm brings its objective and its batches."""

import logging
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rqa.data.examples import Example
from rqa.evaluation.report import write_report
from rqa.evaluation.results import write_results
from rqa.evaluation.retrieval import mean_scores, retrieval_rows
from rqa.evaluation.rqa import EvaluationArguments, find_passages
from rqa.models.encoder import Encoder, EncoderArguments, load_encoder
from rqa.models.loading import freeze_pooler
from rqa.models.lora import train_adapters
from rqa.recipes.files import DataArguments, merge_adapters
from rqa.recipes.run import begin
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.refresh import Refresher
from rqa.retrieval.retriever import Retriever
from rqa.runtime import distributed
from rqa.runtime.errors import UserError
from rqa.runtime.files import write_jsonl
from rqa.runtime.parallelize import load_whole_weights
from rqa.runtime.precision import autocast
from rqa.training.arguments import LoopArguments
from rqa.training.batches import Batches
from rqa.training.loop import train

log = logging.getLogger(__name__)

SHARED_ARGUMENTS = (DataArguments, LoopArguments, EvaluationArguments, EncoderArguments, IndexArguments)


@dataclass
class Training:
    """What an algorithm brings.

    Attributes:
        objective: The module to train; it holds the retriever's encoder.
        collate: Numbers of training examples -> one micro-batch.
        refresher: Keeps the live retriever's index fresh; None where nothing is retrieved in training.
    """

    objective: nn.Module
    collate: Callable[[Sequence[int]], Any]
    refresher: Refresher | None = None


def train_retriever(
    data: DataArguments,
    loop: LoopArguments,
    evaluation: EvaluationArguments,
    encoder: EncoderArguments,
    index: IndexArguments,
    prepare: Callable[[Sequence[Example], Retriever], Training],
    all_arguments: Sequence[Any],
    answers: bool = False,
) -> dict[str, float]:
    """Train, choose the best encoder by the eval file, score it on the test file.

    Args:
        prepare: The algorithm, made from the training examples and the live retriever.
        answers: Whether the training file must have answers.

    Returns:
        The test file's scores; empty without one, or if a signal ended the run.

    Raises:
        UserError: what a user can mend.
    """
    loop.eval_on_start = loop.eval_on_start is not False
    run = begin(data, loop, all_arguments, "retr/mrr@10", train_answers=answers, eval_answers=False)
    device, dtype, inputs = run.device, run.dtype, run.inputs
    with distributed.in_turn():
        retriever = Retriever(load_encoder(run.source, encoder, **run.options).to(device), inputs.documents, index)
    train_adapters(retriever.encoder.backbone, loop)
    freeze_pooler(retriever.encoder.backbone)
    _ = retriever.encoder.collate  # found out here: a probe under the loop's autocast would leave it frozen weights
    with autocast(device, dtype):
        training = prepare(inputs.train, retriever)
        if training.refresher and data.full_dataset_index_path and not run.checkpoint:
            retriever.open(data.full_dataset_index_path)  # of the weights before training; written at no other time
    require_whole_encoder(loop, training.refresher, retriever.encoder)

    judged = Retriever(retriever.encoder, inputs.documents, index)  # so that to evaluate changes nothing in training

    def measure(
        examples: Sequence[Example], prefix: str, index_path: str | None = None
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        with autocast(device, dtype):
            if not (judged.encoder.passage_encoder and len(judged.index)):  # frozen passages are encoded once
                judged.open(index_path)
            found = find_passages(judged, examples, evaluation)
        rows = retrieval_rows(found, examples, evaluation.recall_at)
        scores = mean_scores([row["scores"] for row in rows])
        return {f"{prefix}_{name}": value for name, value in scores.items()}, rows

    def evaluate_and_keep(step: int) -> dict[str, float]:
        scores, rows = measure(inputs.eval, "eval", None if step else data.full_dataset_index_path)
        if loop.write_predictions and distributed.is_main():
            write_jsonl(Path(loop.output_dir) / f"step-{step}-eval-predictions.jsonl", rows)
        return scores

    with closing(training.refresher) if training.refresher else nullcontext():
        state = train(
            training.objective,
            Batches(len(inputs.train), training.collate, loop),
            loop,
            device,
            before_step=training.refresher,
            evaluate=evaluate_and_keep if inputs.eval and loop.eval_strategy != "no" else None,
            checkpoint=run.checkpoint,
        )
    if state.interrupted or not inputs.test:
        write_report(loop.output_dir)
    if state.interrupted:
        return {}
    scores: dict[str, float] = {}
    if inputs.test:
        best = load_encoder(loop.output_dir, empty=not distributed.is_main(), **run.options)
        load_whole_weights(retriever.encoder, best.state_dict())
        scores, rows = measure(inputs.test, "test")
        write_results(loop.output_dir, scores, rows)
        log.info("test  %s", "  ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    merge_adapters(loop, type(retriever.encoder.backbone))
    return scores


def require_whole_encoder(loop: LoopArguments, refresher: Refresher | None, encoder: Encoder) -> None:
    """Some ways to keep the index cheap need the whole encoder, and on every process.

    Raises:
        UserError: `--fsdp` divides it, or `--use_lora` trains a part.
    """
    in_background = refresher is not None and refresher.arguments.refresh_async
    if encoder.passage_encoder and loop.use_lora:
        raise UserError("--train_query_encoder_only true: trains the whole encoder of questions; leave out --use_lora")
    flag = "refresh_async" if in_background else "train_query_encoder_only" if encoder.passage_encoder else ""
    if flag and loop.fsdp != "no":
        raise UserError(f"--{flag} true: needs the whole encoder on every process; leave out --fsdp")
