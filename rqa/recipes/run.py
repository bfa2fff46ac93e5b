"""How every training run begins and ends: processes, precision, files; the loop; the test file, and what is left."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, set_seed

from rqa.evaluation.report import write_report
from rqa.recipes.files import DataArguments, Inputs, merge_adapters, open_output, read_inputs
from rqa.runtime import distributed
from rqa.runtime.files import write_jsonl
from rqa.runtime.precision import compute_dtype
from rqa.training.arguments import LoopArguments
from rqa.training.batches import Batches
from rqa.training.checkpoint import checkpoint_to_resume
from rqa.training.loop import train

log = logging.getLogger(__name__)

Scores = dict[str, float]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """A run that has begun.

    Attributes:
        loop: The arguments of its loop.
        device: This process's device.
        dtype: What matrix products run in.
        checkpoint: Where to continue; None for a new run.
        source: Where the model to train is loaded from: the checkpoint, or what the user named.
        options: How every model of the run is loaded, as keyword arguments of `load_model`.
        inputs: Documents and examples.
    """

    loop: LoopArguments
    device: torch.device
    dtype: torch.dtype
    checkpoint: Path | None
    source: str
    options: dict[str, Any]
    inputs: Inputs


def begin(
    data: DataArguments,
    loop: LoopArguments,
    all_arguments: Sequence[Any],
    metric: str,
    train_answers: bool = True,
    eval_answers: bool = True,
) -> Run:
    """Join the process group, seed, read every file and open the output directory.

    Args:
        all_arguments: Every dataclass, for `all_args.json`.
        metric: What chooses the best model, unless the user said.
        train_answers: Whether training examples must have answers.
        eval_answers: Whether those of the other files must.

    Raises:
        UserError: what a user can mend.
    """
    device = distributed.start()
    dtype = compute_dtype(loop.bf16, loop.fp16, device)
    checkpoint = distributed.from_main(checkpoint_to_resume(loop) if distributed.is_main() else None)
    set_seed(loop.seed)
    inputs = read_inputs(data, loop, train_answers, eval_answers)
    open_output(loop, all_arguments, checkpoint)
    loop.metric_for_best_model = loop.metric_for_best_model or metric
    return Run(loop, device, dtype, checkpoint, str(checkpoint or data.model_name_or_path), loop.loading, inputs)


def train_and_test(
    run: Run,
    objective: nn.Module,
    model: PreTrainedModel,
    batches: Batches,
    evaluate: Callable[[int], tuple[Scores, Rows]],
    test: Callable[[], tuple[Scores, Rows]],
    publish: Callable[[Scores, Rows], Scores],
    before_step: Callable[[int], Mapping[str, float] | None] | None = None,
) -> Scores:
    """Train, choose the best model by the eval file, score it on the test file.

    Args:
        objective: As `train` takes it, with `before_step`.
        model: What may carry adapters.
        evaluate: Steps done -> scores by name on the eval file, and a row for each question.
        test: The same of the best model on the test file; called once, after training.
        publish: Writes the test file's scores and rows; returns the scores, with what it adds.

    Returns:
        The test file's scores; empty without one, or if a signal ended the run.
    """
    loop, inputs = run.loop, run.inputs

    def evaluate_and_keep(step: int) -> Scores:
        scores, rows = evaluate(step)
        if loop.write_predictions and distributed.is_main():
            write_jsonl(Path(loop.output_dir) / f"step-{step}-eval-predictions.jsonl", rows)
        return {f"eval_{name}": value for name, value in scores.items()}

    judge = evaluate_and_keep if inputs.eval and loop.eval_strategy != "no" else None
    state = train(objective, batches, loop, run.device, before_step, judge, run.checkpoint)
    if state.interrupted or not inputs.test:
        write_report(loop.output_dir)
    if state.interrupted:
        return {}
    scores, rows = test() if inputs.test else ({}, [])
    merge_adapters(loop, type(model))
    if inputs.test:
        scores = publish({f"test_{name}": value for name, value in scores.items()}, rows)
        log.info("test  %s", "  ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    return scores
