"""What a run tells: progress bar, log lines, `log.jsonl`, `trainer_state.json` and the tracker."""

import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from rqa.runtime import distributed
from rqa.runtime.files import write_json, write_jsonl
from rqa.runtime.tracking import start_tracker
from rqa.training.arguments import LoopArguments
from rqa.training.state import STATE_FILE, RunState

log = logging.getLogger(__name__)

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
        self.bar = tqdm(total=steps, initial=state.step, desc="train", unit="step", disable=not main)
        if main:  # a killed run told of steps that are done again
            write_jsonl(self.path.parent / LOG_FILE, state.log_history)
        self._start_clock()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def told(self, news: Mapping[str, float] | None) -> dict[str, float]:
        """Keep what happened, which is True, as an entry of its own; return what was measured."""
        events = {name: 1.0 for name, value in (news or {}).items() if value is True}
        if events:
            self._keep(events)
        return {name: value for name, value in (news or {}).items() if name not in events}

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
