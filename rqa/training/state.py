"""How far a run is, and which of its models is the best."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from rqa.runtime import distributed
from rqa.runtime.errors import UserError, one_line
from rqa.runtime.files import is_complete
from rqa.training.arguments import LoopArguments

log = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"


@dataclass
class RunState:
    """How far a run is. Small and readable: `trainer_state.json`.

    Attributes:
        step: Optimizer steps done.
        examples: Examples that these steps took from the stream; with the seed it fixes the next batch.
        log_history: Every log line and evaluation, oldest first.
        best_metric: The best value of the metric that chooses the best model.
        best_model_checkpoint: The name of the checkpoint that reached it, inside the output directory.
        window: This process's sums since the last log line; in a checkpoint, those of all processes.
    """

    step: int = 0
    examples: int = 0
    log_history: list[dict[str, float]] = field(default_factory=list)
    best_metric: float | None = None
    best_model_checkpoint: str | None = None
    window: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False


def saved_state(state: RunState) -> RunState:
    """The state as a checkpoint keeps it, the same on every process. Every process calls this."""
    return replace(state, window=dict(zip(state.window, distributed.total(list(state.window.values())), strict=True)))


def load_state(checkpoint: Path) -> RunState:
    """How far the run was.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        state = RunState(**json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")))
        _check_types(state)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"checkpoint {checkpoint}: cannot be resumed ({one_line(error)})") from None
    window = {name: value if distributed.is_main() else 0.0 for name, value in state.window.items()}
    return replace(state, window=window, interrupted=False)


def _check_types(state: RunState) -> None:
    kinds = {"step": int, "examples": int, "log_history": list, "window": dict}
    for name, kind in kinds.items():
        value = getattr(state, name)
        if type(value) is not kind or (kind is int and not 0 <= value < 2**53):
            raise ValueError(f"{STATE_FILE}: '{name}' is no {kind.__name__} that a run writes")
    for entry in (*state.log_history, {"step": state.step, **state.window}):
        if (
            not isinstance(entry, dict)
            or type(entry.get("step")) is not int
            or not all(map(_is_number, entry.values()))
        ):
            raise ValueError(f"{STATE_FILE}: 'log_history' or 'window' holds what is no number by name")


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**53)


def continues(checkpoint: Path, arguments: LoopArguments) -> bool:
    """Whether a checkpoint is of the run in the output directory, and not of another one that a new run starts from."""
    return checkpoint.resolve().parent == Path(arguments.output_dir).resolve()


def resume_state(checkpoint: Path, arguments: LoopArguments) -> RunState:
    """How far the run was; the best model is chosen again, from those in the output directory, by the present metric.

    The best model of another directory is not there, and a value of another metric says nothing about the next one.

    Raises:
        UserError: the file cannot be read.
    """
    saved = load_state(checkpoint)
    state = replace(saved, best_metric=None, best_model_checkpoint=None)
    here, output = continues(checkpoint, arguments), Path(arguments.output_dir)
    for entry in saved.log_history:
        value = entry.get(_metric(arguments))
        stands = here and is_complete(output / f"checkpoint-{entry['step']}")
        if value is not None and (stands or arguments.save_strategy == "no"):
            _remember_if_best(value, entry["step"], state, arguments)
    if (state.best_metric, state.best_model_checkpoint) != (saved.best_metric, saved.best_model_checkpoint):
        log.warning(
            "best model so far: %s, not %s as %s has it: in %s, --metric_for_best_model %s counts",
            _named(state), _named(saved), checkpoint, output, arguments.metric_for_best_model,
        )  # fmt: skip
    return state


def is_best(metrics: Mapping[str, float], state: RunState, arguments: LoopArguments) -> bool:
    """Whether these metrics are the best so far; if so, the state remembers.

    Raises:
        UserError: `metric_for_best_model` is not among them.
    """
    value = metrics.get(_metric(arguments))
    if value is None:
        raise UserError(
            f"--metric_for_best_model {arguments.metric_for_best_model}: not measured; "
            f"choose one of {', '.join(sorted(metrics))}"
        )
    return _remember_if_best(value, state.step, state, arguments)


def _metric(arguments: LoopArguments) -> str:
    return "eval_" + (arguments.metric_for_best_model or "").removeprefix("eval_")


def _remember_if_best(value: float, step: int, state: RunState, arguments: LoopArguments) -> bool:
    best = state.best_metric
    if not math.isfinite(value):
        return False
    if best is not None and not (value > best if arguments.maximize else value < best):
        return False
    state.best_metric = value
    state.best_model_checkpoint = f"checkpoint-{step}" if arguments.save_strategy != "no" else None
    return True


def _named(state: RunState) -> str:
    return f"{state.best_model_checkpoint} ({state.best_metric})" if state.best_metric is not None else "none"
