"""What a run tells: progress bar, log lines, `log.jsonl`, `trainer_state.json` and the tracker."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rqa.runtime import distributed
from rqa.runtime.cli import progress
from rqa.runtime.errors import UserError, one_line
from rqa.runtime.files import is_complete, write_json, write_jsonl
from rqa.training.arguments import LoopArguments

log = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
EVENTS = {"index_refreshed"}  # happen between two steps; everything else is measured in each step


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


Track = Callable[[Mapping[str, float], int], object]


def start_tracker(kind: str, directory: str, project: str, group: str | None, settings: Mapping[str, Any]) -> Track:
    """A function of (metrics, step).

    Args:
        kind: none, tensorboard, wandb or trackio.
        directory: The run's output directory; its name names the run.
        settings: The run's arguments.

    Raises:
        UserError: the tracker's package is not installed.
    """
    if kind == "none":
        return lambda metrics, step: None
    try:
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(directory)
            return lambda metrics, step: [writer.add_scalar(name, value, step) for name, value in metrics.items()]
        if kind == "wandb":
            import wandb as tracker
        else:
            import trackio as tracker
    except ImportError:
        raise UserError(f'--report_to {kind}: the package is not installed; pip install "rqa[tracking]"') from None
    tracker.init(project=project, group=group, name=Path(directory).name, config=dict(settings))
    return lambda metrics, step: tracker.log(dict(metrics), step=step)


LOG_FILE = "log.jsonl"


class Journal:
    """Sums since the last log line live in `state.window`, so that a resumed run's lines are the same.

    The clock and the tokens that it counts live here: no run resumes the time of another.
    """

    def __init__(self, state: RunState, steps: int, arguments: LoopArguments) -> None:
        self.state = state
        self.arguments = arguments
        self.steps = steps
        self.path = Path(arguments.output_dir) / STATE_FILE
        main = distributed.is_main()
        self.track = start_tracker(
            arguments.report_to if main else "none",
            arguments.output_dir,
            arguments.run_project,
            arguments.run_group,
            asdict(arguments),
        )
        self.bar = progress(total=steps, initial=state.step, desc="train", unit="step", disable=not main, leave=True)
        if main:  # a killed run told of steps that are done again
            write_jsonl(self.path.parent / LOG_FILE, state.log_history)
        self._start_clock()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def statistics(self, values: Mapping[str, float]) -> dict[str, float]:
        """Keep the `EVENTS` among these values as an entry of their own; return the others."""
        if events := {name: value for name, value in values.items() if name in EVENTS}:
            self._keep(events)
        return {name: value for name, value in values.items() if name not in events}

    def step_done(
        self, loss: float, tokens: float, statistics: Iterable[Mapping[str, float]], norm: float, rate: float
    ) -> None:
        """Count one optimizer step; after the first and every `logging_steps`, tell.

        Args:
            loss: This process's loss sum over the weight of the whole step.
            tokens: Real tokens of this process.
            statistics: Of each micro-batch; their mean is told.
        """
        state, window = self.state, self.state.window
        counts = {"loss": loss, "steps": float(distributed.is_main())}
        for values in statistics:
            for name, value in {"micro_batches": 1.0, **values}.items():
                counts[name] = counts.get(name, 0.0) + value
        for name, value in counts.items():
            window[name] = window.get(name, 0.0) + value
        self.tokens += tokens
        self.bar.update()
        if state.step == 1 or state.step % self.arguments.logging_steps == 0 or state.step == self.steps:
            tokens, *totals = distributed.total([self.tokens, *window.values()])
            sums = dict(zip(window, totals, strict=True))
            loss, steps, micro_batches = (sums.pop(k) for k in ("loss", "steps", "micro_batches"))
            entry = {
                "loss": loss / steps,
                "grad_norm": norm,
                "learning_rate": rate,
                "tokens_per_second": tokens / (time.perf_counter() - self.started),
                **{name: value / micro_batches for name, value in sums.items()},
            }
            window.clear()
            self.bar.set_postfix(loss=f"{entry['loss']:.4f}", tok_s=f"{entry['tokens_per_second']:.0f}")
            self.record(entry)

    def record(self, metrics: Mapping[str, float]) -> None:
        """One entry of the history, and one line of `log.jsonl`.

        The clock starts anew behind it: an evaluation is no part of the steps around it.
        """
        self._keep(metrics)
        text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        with tqdm.external_write_mode():
            log.info("step %d/%d  %s", self.state.step, self.steps, text)
        self._start_clock()

    def _start_clock(self) -> None:
        self.started, self.tokens = time.perf_counter(), 0

    def save(self) -> None:
        """Write `trainer_state.json`."""
        if distributed.is_main():
            write_json(self.path, asdict(self.state))

    def _keep(self, metrics: Mapping[str, float]) -> None:
        self.state.log_history.append({"step": self.state.step, **metrics})
        if distributed.is_main():
            with (self.path.parent / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.state.log_history[-1]) + "\n")
            self.track(metrics, self.state.step)
            self.save()
