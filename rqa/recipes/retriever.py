"""Training an encoder, from files to scores; an algorithm brings its objective and its batches."""

from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from rqa.data.examples import Example
from rqa.evaluation.results import write_results
from rqa.evaluation.retrieval import mean_scores, retrieval_rows
from rqa.evaluation.rqa import EvaluationArguments, find_passages
from rqa.models.encoder import Encoder, EncoderArguments, load_encoder
from rqa.models.loading import freeze_pooler
from rqa.models.lora import train_adapters
from rqa.recipes.files import DataArguments
from rqa.recipes.run import Rows, Scores, begin, train_and_test
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.refresh import Refresher
from rqa.retrieval.retriever import Retriever
from rqa.runtime import distributed
from rqa.runtime.errors import UserError
from rqa.runtime.parallelize import load_whole_weights
from rqa.runtime.precision import autocast
from rqa.training.arguments import LoopArguments
from rqa.training.batches import Batches

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
    backbone = retriever.encoder.backbone
    train_adapters(backbone, loop)
    freeze_pooler(backbone)
    _ = retriever.encoder.collate  # found out here: a probe under the loop's autocast would leave it frozen weights
    with autocast(device, dtype):
        training = prepare(inputs.train, retriever)
        refresher = training.refresher
        if refresher and data.full_dataset_index_path and not run.checkpoint:
            retriever.open(data.full_dataset_index_path)  # of the weights before training; written at no other time
    require_whole_encoder(loop, refresher, retriever.encoder)

    judged = Retriever(retriever.encoder, inputs.documents, index)  # so that to evaluate changes nothing in training

    def measure(examples: Sequence[Example], index_path: str | None = None) -> tuple[Scores, Rows]:
        with autocast(device, dtype):
            if not (judged.encoder.passage_encoder and len(judged.index)):  # frozen passages are encoded once
                judged.open(index_path)
            found = find_passages(judged, examples, evaluation)
        rows = retrieval_rows(found, examples, evaluation.recall_at)
        return mean_scores([row["scores"] for row in rows]), rows

    def evaluate(step: int) -> tuple[Scores, Rows]:
        return measure(inputs.eval, None if step else data.full_dataset_index_path)

    def test() -> tuple[Scores, Rows]:
        if refresher:
            refresher.close()  # nothing is encoded beside the test
        best = load_encoder(loop.output_dir, empty=not distributed.is_main(), **run.options)
        load_whole_weights(retriever.encoder, best.state_dict())
        return measure(inputs.test)

    def publish(scores: Scores, rows: Rows) -> Scores:
        write_results(loop.output_dir, scores, rows)
        return scores

    batches = Batches(len(inputs.train), training.collate, loop)
    with closing(refresher) if refresher else nullcontext():
        return train_and_test(run, training.objective, backbone, batches, evaluate, test, publish, refresher)


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
