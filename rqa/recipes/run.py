"""How every training run begins: processes, precision, the checkpoint to continue, and all that it reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from rqa.recipes.files import DataArguments, Inputs, open_output, read_inputs
from rqa.runtime import distributed
from rqa.runtime.precision import compute_dtype
from rqa.training.arguments import LoopArguments
from rqa.training.checkpoint import checkpoint_to_resume


@dataclass(frozen=True)
class Run:
    """A run that has begun.

    Attributes:
        device: This process's device.
        dtype: What matrix products run in.
        checkpoint: Where to continue; None for a new run.
        source: Where the model to train is loaded from: the checkpoint, or what the user named.
        options: How every model of the run is loaded, as keyword arguments of `load_model`.
        inputs: Documents and examples.
    """

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
    return Run(device, dtype, checkpoint, str(checkpoint or data.model_name_or_path), loop.loading, inputs)
