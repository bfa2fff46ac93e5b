"""A run's progress, log lines, `log.jsonl`, `trainer_state.json` and tracker, and the choice of its best model."""

import importlib
import json
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import NoneType

from torch import Tensor
from tqdm import tqdm

from rqa.runtime import distributed
from rqa.runtime.cli import progress
from rqa.runtime.errors import UserError, one_line
from rqa.runtime.files import is_complete, read_json, write_json, write_jsonl
from rqa.training.arguments import LoopArguments

log = logging.getLogger(__name__)

STATE_FILE, LOG_FILE = "trainer_state.json", "log.jsonl"
EVENTS = {"index_refreshed"}  # statistics of events between two steps; all others are measured in every step

Statistics = Mapping[str, float | Tensor]


@dataclass
class RunState:
    """The progress of a run, as saved in `trainer_state.json`."""

    step: int = 0  # optimizer steps done
    examples: int = 0  # examples that these steps took from the stream; with the seed it fixes the next batch
    log_history: list[dict[str, float | None]] = field(default_factory=list)  # log lines and evaluations, oldest first
    best_metric: float | None = None  # the best value of --metric_for_best_model
    best_model_checkpoint: str | None = None  # the name of the checkpoint with that value
    live_state: str | None = None  # the name of the index directory beside the checkpoint
    interrupted: bool = False


def continues(checkpoint: Path, flags: LoopArguments) -> bool:
    """Whether a checkpoint belongs to the run in the output directory, so that the run itself continues."""
    return checkpoint.resolve().parent == Path(flags.output_dir).resolve()


def read_state(checkpoint: Path) -> RunState:
    """The state in a checkpoint, validated."""
    try:
        state = replace(RunState(**read_json(checkpoint / STATE_FILE)), interrupted=False)
        counts = [state.step, state.examples, *(entry["step"] for entry in state.log_history)]
        good = [isinstance(state.log_history, list), re.fullmatch(r"index-\d+", state.live_state or "index-0")]
        good += [type(value) in (int, float, NoneType) for entry in state.log_history for value in entry.values()]
        if not all(good) or not all(type(count) is int and 0 <= count < 2**53 for count in counts):
            raise ValueError(f"{STATE_FILE} is damaged")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"checkpoint {checkpoint}: cannot be resumed ({one_line(error)})") from None
    return state


def resume_state(checkpoint: Path, flags: LoopArguments) -> RunState:
    """The state to continue from; the present metric chooses the best model again, among checkpoints that exist."""
    # A checkpoint may come from another directory, and its best value may be of another metric.
    saved = read_state(checkpoint)
    state = replace(saved, best_metric=None, best_model_checkpoint=None)
    here, output = continues(checkpoint, flags), Path(flags.output_dir)
    for entry in saved.log_history:
        state.step = entry["step"]
        exists = flags.save_strategy == "no" or (here and is_complete(output / f"checkpoint-{state.step}"))
        if exists and entry.get(metric_name(flags)) is not None:
            remember_if_best(entry, state, flags)
    state.step = saved.step
    known = [(each.best_model_checkpoint, each.best_metric) for each in (state, saved)]
    if known[0] != known[1]:
        now, then = ("none" if metric is None else f"{name} ({metric})" for name, metric in known)
        log.warning("best model so far: %s, not %s as %s says; %s chooses it among the checkpoints in %s",
                    now, then, checkpoint, metric_name(flags), output)  # fmt: skip
    return state


def metric_name(flags: LoopArguments) -> str:
    """The name of --metric_for_best_model among an evaluation's metrics."""
    return "eval_" + (flags.metric_for_best_model or "").removeprefix("eval_")


def remember_if_best(metrics: Mapping[str, float], state: RunState, flags: LoopArguments) -> bool:
    """Note these metrics if they are the best so far, or equal to the best. -> whether they are"""
    if (value := metrics.get(metric_name(flags))) is None:
        known = "choose one of " + ", ".join(sorted(metrics)) if metrics else "no question has gold passages"
        raise UserError(f"--metric_for_best_model {flags.metric_for_best_model}: is not measured; {known}")
    is_loss = metric_name(flags).endswith("loss")
    maximize = not is_loss if flags.greater_is_better is None else flags.greater_is_better
    best = value if state.best_metric is None else state.best_metric
    if not math.isfinite(value) or (value < best if maximize else value > best):
        return False
    state.best_metric = value
    state.best_model_checkpoint = f"checkpoint-{state.step}" if flags.save_strategy != "no" else None
    return True


class Journal:
    """Writes a run's progress and metrics. Every process has one; only the main process writes."""

    def __init__(self, state: RunState, steps: int, flags: LoopArguments) -> None:
        self.state, self.flags, self.steps = state, flags, steps
        self.output = Path(flags.output_dir)
        self.track = start_tracker(flags)
        # Sums since the last log line. They are not saved: a resumed run's first log line covers its own steps.
        self.loss, self.done = 0.0, 0  # loss, and number of steps
        self.statistics: list[Statistics] = []  # of each micro-batch; on the device until the next log line
        main = distributed.is_main()
        self.bar = progress(total=steps, initial=state.step, desc="train", unit="step", disable=not main, leave=True)
        if main:  # drops the entries of steps that a killed run did after its checkpoint
            write_jsonl(self.output / LOG_FILE, state.log_history)
        self.started, self.tokens = time.perf_counter(), 0

    def without_events(self, statistics: Mapping[str, float]) -> dict[str, float]:
        """The statistics without `EVENTS`, which are logged as their own entry."""
        if events := {name: statistics[name] for name in EVENTS & statistics.keys()}:
            self._keep(events)
        return {name: value for name, value in statistics.items() if name not in EVENTS}

    def step_done(self, loss: float, tokens: float, statistics: Sequence[Statistics], norm: float, rate: float) -> None:
        """Count an optimizer step of this process; log after the first, the last and every `logging_steps` steps.

        `loss` is its loss sum over the weight of the whole step. The log shows the mean of the micro-batches'
        `statistics`.
        """
        self.loss, self.done = self.loss + loss, self.done + 1
        self.statistics += statistics
        self.tokens += tokens
        self.bar.update()
        step = self.state.step
        if step == 1 or step % self.flags.logging_steps == 0 or step == self.steps:
            sums: Counter[str] = Counter()
            for values in self.statistics:
                sums.update({name: float(value) for name, value in values.items()})
            counts = [self.tokens, self.loss, len(self.statistics)]
            tokens, loss, number, *others = distributed.total([*counts, *sums.values()])
            loss, speed = loss / self.done, tokens / (time.perf_counter() - self.started)
            entry = {"loss": loss, "grad_norm": norm, "learning_rate": rate, "tokens_per_second": speed}
            entry |= {name: value / number for name, value in zip(sums, others, strict=True)}
            self.bar.set_postfix(loss=f"{loss:.4f}", tok_s=f"{speed:.0f}")
            self.loss, self.done, self.statistics = 0.0, 0, []
            self.record(entry)

    def record(self, metrics: Mapping[str, float]) -> None:
        """Add an entry to the history, and log it. Restarts the clock of `tokens_per_second`."""
        self._keep(metrics)
        text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        with tqdm.external_write_mode():
            log.info("step %d/%d  %s", self.state.step, self.steps, text)
        self.started, self.tokens = time.perf_counter(), 0

    def _keep(self, metrics: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        self.state.log_history.append({"step": self.state.step, **finite})
        if distributed.is_main():
            with (self.output / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.state.log_history[-1]) + "\n")
            self.track(metrics, self.state.step)
            self.save()

    def save(self) -> None:
        if distributed.is_main():
            write_json(self.output / STATE_FILE, asdict(self.state))


def start_tracker(flags: LoopArguments) -> Callable[[Mapping[str, float], int], object]:
    """A function of (metrics, step) that logs to the tracker; it does nothing without one, or on other processes."""
    kind, name = flags.report_to, Path(flags.output_dir).name
    if kind == "none" or not distributed.is_main():
        return lambda metrics, step: None
    try:
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(flags.output_dir)
            return lambda metrics, step: [writer.add_scalar(name, value, step) for name, value in metrics.items()]
        tracker = importlib.import_module(kind)  # wandb, trackio
    except ImportError:
        raise UserError(f'--report_to {kind}: the package is not installed; pip install "rqa[tracking]"') from None
    tracker.init(project=flags.run_project, group=flags.run_group, name=name, config=flags.to_json())
    return lambda metrics, step: tracker.log(dict(metrics), step=step)
