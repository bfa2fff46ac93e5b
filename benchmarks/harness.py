"""What every benchmark shares: each system alone in a process, a clock, the allocator, peak memory, one table."""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rqa.evaluation.runtime import machine, seconds


def add_system_flags(parser: argparse.ArgumentParser, systems: Iterable[str]) -> None:
    """Which systems to measure, and what `run_all` tells the process that measures one of them."""
    parser.add_argument("--only", nargs="*", choices=list(systems))
    parser.add_argument("--system", help=argparse.SUPPRESS)
    parser.add_argument("--allocator", help=argparse.SUPPRESS)


def run_alone(script: str, arguments: argparse.Namespace, **hidden: str) -> dict[str, Any]:
    """Run a benchmark's script for one system in a process of its own; the last line it prints is its result.

    Args:
        arguments: The flags to pass on.
        hidden: Further flags, that only this call sets.
    """
    flags = {**vars(arguments), **hidden}
    line = [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    print(", ".join(hidden.values()), "...", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, script, *line], stdout=subprocess.PIPE, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_all(script: str, arguments: argparse.Namespace, systems: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """`run_alone` for every system with each of its allocator settings; only for those that `--only` names, if any."""
    only = vars(arguments).pop("only")
    return [
        run_alone(script, arguments, system=system, allocator=allocator)
        for system, allocators in systems.items()
        if not only or system in only
        for allocator in allocators
    ]


def read_corpus(
    document_path: str | None, train_file: str | None = None, eval_file: str | None = None, answers: bool = False
) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Documents, training questions and questions to measure on: of these files, or without any those of pydocs.

    Args:
        answers: Whether the questions must have answers.
    """
    from rqa.data.documents import read_documents
    from rqa.data.examples import read_examples
    from rqa.data.pydocs import QUICKSTART, build_corpus

    if bool(document_path) != bool(train_file or eval_file):
        raise SystemExit("error: --document_path and the file of its questions are given together")
    if document_path:
        train, held_out = (read_examples(path, answers) if path else [] for path in (train_file, eval_file))
        return read_documents(document_path), train, held_out
    corpus = build_corpus(QUICKSTART)
    return corpus.documents, corpus.train, corpus.test


def use_allocator(name: str) -> None:
    """`tuned`: the setting that rqa's executables make for themselves; `default`: as a user starts a peer."""
    if name == "tuned":
        from rqa.runtime.allocator import tune_allocator

        tune_allocator()


def peak_gib() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Clock:
    """Units of work and seconds of each step; the loop and the peers' callbacks feed it."""

    def __init__(self) -> None:
        self.units: list[int] = []
        self.moments: list[float] = []

    def tick(self, *_: Any) -> None:
        """One step ends, the next begins."""
        self.moments.append(time.perf_counter())

    def steps(self, skip: int = 0) -> list[tuple[int, float]]:
        """(units, seconds) of each step but the first ones."""
        seconds = [after - before for before, after in zip(self.moments, self.moments[1:], strict=False)]
        return list(zip(self.units, seconds, strict=False))[skip:]

    def callback(self) -> Any:
        """For `transformers.Trainer` and what is built on it."""
        from transformers import TrainerCallback

        clock = self

        class Recorder(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                if not clock.moments:
                    clock.tick()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.tick()

        return Recorder()


def train_rqa(
    objective: torch.nn.Module,
    examples: int,
    batch: Callable[[Sequence[int]], Any],
    batch_size: int,
    steps: int,
    bf16: bool,
    clock: Clock,
) -> None:
    """Train with the product's own loop, every step timed; nothing is saved or evaluated.

    Args:
        examples: How many there are.
        batch: Their numbers -> a micro-batch.
        steps: Optimizer steps.
    """
    from rqa.runtime import distributed
    from rqa.training.arguments import LoopArguments
    from rqa.training.batches import Batches
    from rqa.training.loop import train

    def last_moment(_: int) -> dict[str, float]:  # the loop evaluates after its last step
        clock.tick()
        return {"eval_loss": 0.0}

    with TemporaryDirectory() as directory:
        loop = LoopArguments(
            output_dir=directory,
            per_device_train_batch_size=batch_size,
            max_steps=steps,
            bf16=bf16,
            save_strategy="no",
            eval_strategy="no",
            metric_for_best_model="loss",
        )
        batches = Batches(examples, batch, loop)
        train(objective, batches, loop, distributed.start(), before_step=clock.tick, evaluate=last_moment)


def summary(steps: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """The rate over all steps, and the median and spread of single ones."""
    rates = [units / seconds for units, seconds in steps]
    return {
        "rate": sum(units for units, _ in steps) / sum(seconds for _, seconds in steps),
        "median": statistics.median(rates),
        "spread": [min(rates), max(rates)],
    }


Row = dict[str, Any]


def compare(rows: Sequence[Row], ours: Callable[[Row], Row | None], rate: str = "rate") -> None:
    """Tell every peer's row how many times as fast rqa is.

    Args:
        ours: rqa's row for a peer's; a row of rqa itself is told nothing.
    """
    for row in rows:
        product = ours(row)
        if product is not None and not row["system"].startswith("rqa"):
            row["rqa_is"] = product[rate] / row[rate]


def times(row: Row) -> str:
    """The last cell of a peer's row."""
    return f"{row['rqa_is']:.2f}x" if "rqa_is" in row else ""


def print_result(benchmark: str, rows: Sequence[Any], **settings: Any) -> None:
    """One line of JSON, the last that a benchmark prints, with the machine it ran on."""
    print(json.dumps({"benchmark": benchmark, **settings, **machine(), "rows": rows}))


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns as wide as they must be; the first one to the left, figures to the right."""
    cells = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        figures = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *figures]))


def matmul_rate(dtype: torch.dtype, size: int = 1536) -> float:
    """GFLOP/s of this machine's matrix product, the median of several."""
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return statistics.median(2 * size**3 / seconds(lambda: left @ right) / 1e9 for _ in range(5))
