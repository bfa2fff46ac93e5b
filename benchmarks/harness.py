"""Shared parts of all benchmarks: one process for each system, a clock, the allocator, peak memory, a table."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import Distribution, requires, version
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import psutil
from packaging.requirements import Requirement

from rqa.evaluation.runtime import machine, peak_memory, seconds
from rqa.runtime.cli import tune_allocator
from rqa.runtime.distributed import device

Row = dict[str, Any]


def new_parser(
    doc: str | None, *questions: str, systems: Iterable[str] = (), precision: bool = True, steps: int = 0
) -> argparse.ArgumentParser:
    """Make a parser with the flags that benchmarks share.

    `questions` are the flags for files of questions, if the benchmark reads a corpus. `systems` are what `--only`
    accepts; the hidden flags of `run_benchmark` are added with it. `steps` is the default of `--steps`; 0: none.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if questions:
        parser.add_argument("--document_path", help="documents; default: pydocs")
    for flag in questions:
        parser.add_argument(flag, help="questions about these documents, with answers where the benchmark needs them")
    if precision:
        parser.add_argument("--precision", choices=["bf16", "float32"], default="float32")
    if steps:
        parser.add_argument("--steps", type=int, default=steps, help="measured steps")
        parser.add_argument("--warmup", type=int, default=1, help="steps before the measured ones")
    if systems:
        parser.add_argument("--only", nargs="*", choices=list(systems))
        for hidden in ("--system", "--setting", "--directory"):
            parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser


def run_benchmark(
    script: str,
    arguments: argparse.Namespace,
    systems: Mapping[str, Iterable[Any]],
    measure: Callable[[argparse.Namespace], Row],
    report: Callable[[argparse.Namespace, list[Row]], Row | None],
    prepare: Callable[[argparse.Namespace], Any] = lambda arguments: None,
) -> None:
    """Main function of a benchmark: run each system with each of its settings in its own process, then report.

    The setting `default` leaves the allocator unchanged; every other one changes it as rqa's executables do. `prepare`
    runs first; it can leave files in `arguments.directory`, and return JSON for `prepared`. `report` prints a table; it
    may return further fields of the benchmark's last line, which is JSON, or other `rows`.
    """
    if arguments.system:
        if arguments.setting != "default":
            tune_allocator()
        row = {"system": arguments.system, "setting": arguments.setting, **measure(arguments)}
        print(json.dumps({**row, "peak_gib": peak_memory()["host"]}))
        return
    with TemporaryDirectory() as arguments.directory:
        Path(arguments.directory, "prepared.json").write_text(json.dumps(prepare(arguments)), encoding="utf-8")
        rows = [
            run_alone(script, arguments, system=system, setting=str(setting))
            for system, settings in systems.items()
            if not arguments.only or system in arguments.only
            for setting in settings
        ]
        print_result(script, arguments, **{"rows": rows, **(report(arguments, rows) or {})})


def prepared(arguments: argparse.Namespace) -> Any:
    """What `prepare` returned, read in another process."""
    return json.loads(Path(arguments.directory, "prepared.json").read_text(encoding="utf-8"))


def run_alone(script: str, arguments: argparse.Namespace, **hidden: str) -> Row:
    """Run a benchmark's script for one system in its own process. -> its result, which is the last line it prints

    `hidden` are further flags, besides those of `arguments`.
    """
    line = [sys.executable, script]
    for name, value in {**vars(arguments), **hidden}.items():
        if value is not None:
            line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    print(", ".join(hidden.values()), "...", file=sys.stderr, flush=True)
    done = subprocess.run(line, stdout=subprocess.PIPE, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def read_corpus(
    document_path: str | None, train_file: str | None = None, eval_file: str | None = None, answers: bool = False
) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Documents, training questions and questions to measure on: of these files, or without any those of pydocs."""
    from pydocs.corpus import QUICKSTART, build_corpus

    from rqa.data import read_examples
    from rqa.documents import read_documents, with_known_gold

    if bool(document_path) != bool(train_file or eval_file):
        raise SystemExit("error: --document_path and the file of its questions are given together")
    if document_path:
        documents = read_documents(document_path)
        train, held_out = (
            with_known_gold(read_examples(path, answers), documents) if path else [] for path in (train_file, eval_file)
        )
        return documents, train, held_out
    corpus = build_corpus(QUICKSTART)
    return corpus.documents, corpus.train, corpus.test


def with_passages(examples: Sequence[Any], documents: Iterable[Any], number: int) -> list[tuple[Any, list[Any]]]:
    """Each example with so many passages: its gold ones, then any others, on which speed does not depend."""
    others, golds = cycle(documents), [example.gold_docs[:number] for example in examples]
    filled = [[*gold, *islice(others, number - len(gold))] for gold in golds]
    return list(zip(examples, filled, strict=True))


def measure_command(line: Sequence[Any], processes: int = 1) -> Row:
    """Run a Python command to its end, with torchrun if there are several processes.

    -> `seconds`; `peak`, the peak GiB of its processes, summed; `own`, the same without the pages of mapped files; and
    the fields of its last line, if that is JSON.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), *map(str, line)]
    print(*command[1:], "...", file=sys.stderr, flush=True)
    started, peaks, own = time.perf_counter(), {}, 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        while running.poll() is None:
            now = memory(running.pid)
            peaks |= {process: peak for process, (peak, _) in now.items()}
            own = max(own, sum(held for _, held in now.values()))
            time.sleep(0.05)
        took, told = time.perf_counter() - started, running.stdout.read() if running.stdout else ""
    if running.returncode:
        sys.exit(f"error: status {running.returncode}")
    answer = json.loads(told.splitlines()[-1]) if "{" in told else {}
    return {"seconds": took, "peak": sum(peaks.values()), "own": own, **answer}


def memory(parent: int) -> dict[int, tuple[float, float]]:
    """Memory of a process and its children: (peak GiB so far, GiB now without the pages of mapped files)."""
    found = {}
    with suppress(psutil.Error, OSError, KeyError):  # one of the processes has ended
        for process in [psutil.Process(parent), *psutil.Process(parent).children(recursive=True)]:
            lines = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            gib = {name: int(lines[name].split()[0]) / 2**20 for name in ("VmHWM", "RssAnon", "RssShmem")}
            found[process.pid] = gib["VmHWM"], gib["RssAnon"] + gib["RssShmem"]
    return found


class Clock:
    """Records units of work and seconds of each step; rqa's loop and the peers' callbacks call it."""

    def __init__(self) -> None:
        self.units: list[int] = []
        self.moments: list[float] = []

    def tick(self, *_: Any) -> dict[str, float]:
        """End one step and begin the next. Returns no statistics, since it serves as the loop's `before_step`."""
        self.moments.append(time.perf_counter())
        return {}

    def steps(self, skip: int = 0) -> list[tuple[int, float]]:
        """(units, seconds) of each step after the warm-up."""
        seconds = [after - before for before, after in zip(self.moments, self.moments[1:], strict=False)]
        return list(zip(self.units, seconds, strict=False))[skip:]

    def callback(self) -> Any:
        """Callback for `transformers.Trainer` and for trainers built on it."""
        from transformers import TrainerCallback

        clock = self

        class Recorder(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                if not clock.moments:
                    clock.tick()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.tick()

        return Recorder()


def loop_flags(directory: str, batch_size: int, steps: int, **flags: Any) -> Any:
    """Flags of rqa's loop, with which it saves and evaluates nothing."""
    from rqa.training.arguments import LoopArguments

    sizes = {"per_device_train_batch_size": batch_size, "max_steps": steps, "metric_for_best_model": "loss"}
    return LoopArguments(output_dir=directory, save_strategy="no", eval_strategy="no", **sizes, **flags)


def train_rqa(
    objective: torch.nn.Module,
    examples: int,
    batch: Callable[[Sequence[int]], Any],
    batch_size: int,
    steps: int,
    bf16: bool,
    clock: Clock,
    learning_rate: float = 5e-5,
) -> None:
    """Train with rqa's own loop and time every step; nothing is saved. `batch` makes a batch of examples."""
    from rqa.training.loop import Batches, train

    def last_moment(_: int) -> dict[str, float]:  # the loop calls this after its last step
        clock.tick()
        return {"eval_loss": 0.0}

    with TemporaryDirectory() as directory:
        flags = loop_flags(directory, batch_size, steps, learning_rate=learning_rate, bf16=bf16)
        batches = Batches(examples, batch, flags)
        train(objective, batches, flags, before_step=clock.tick, evaluate=last_moment)


def peer_settings(arguments: argparse.Namespace, batch_size: int, steps: int) -> dict[str, Any]:
    """Settings of `transformers.Trainer`, and of trainers built on it: nothing is saved, evaluated or shown."""
    return {
        "output_dir": f"{arguments.directory}/{arguments.system} {arguments.setting}",
        "per_device_train_batch_size": batch_size,
        "max_steps": steps,
        "bf16": arguments.precision == "bf16",
        "use_cpu": not torch.cuda.is_available(),  # otherwise the Trainer refuses bf16
        "optim": "adamw_torch_fused",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 10**6,
    }


def train_peer(
    trainer: Any, settings: Any, arguments: argparse.Namespace, batch_size: int, units: int, model: Any, **more: Any
) -> Clock:
    """Train with a trainer of sentence-transformers and the class of its settings, with so many units a step."""
    clock, steps = Clock(), arguments.warmup + arguments.steps
    clock.units = [units] * steps
    chosen = settings(**peer_settings(arguments, batch_size, steps))
    trainer(model, chosen, **more, callbacks=[clock.callback()]).train()
    return clock


def summary(steps: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Rate over all steps, and median and spread of single steps."""
    rates = [units / seconds for units, seconds in steps]
    return {
        "rate": sum(units for units, _ in steps) / sum(seconds for _, seconds in steps),
        "median": statistics.median(rates),
        "spread": [min(rates), max(rates)],
    }


def compare(rows: Sequence[Row], ours: Callable[[Row], Row | None], rate: str = "rate") -> None:
    """Add to every peer's row how many times as fast rqa is; `ours` finds rqa's row for it."""
    for row in rows:
        product = ours(row)
        if product is not None and not row["system"].startswith("rqa"):
            row["rqa_is"] = product[rate] / row[rate]


def times(row: Row) -> str:
    """Last cell of a peer's row: how many times as fast rqa is."""
    return f"{row['rqa_is']:.2f}x" if "rqa_is" in row else ""


def print_result(script: str, arguments: argparse.Namespace, rows: Sequence[Any], **more: Any) -> None:
    """Print the last line of a benchmark, as JSON: its flags, the machine, and its rows."""
    given = {name: value for name, value in vars(arguments).items() if value is not None and name != "directory"}
    flags = {
        name: Path(value).name if isinstance(value, str) and "/" in value else value for name, value in given.items()
    }
    told = {"benchmark": Path(script).stem, **flags, **more, **machine(), "peers": peer_versions(), "rows": rows}
    print(json.dumps(told))


def peer_versions() -> dict[str, str]:
    """Installed versions of the packages in setup.py's extra `bench`."""
    asked = [Requirement(line) for line in requires("rqa") or ()]
    peers = [each.name for each in asked if each.marker and each.marker.evaluate({"extra": "bench"})]
    return {name: version(name) for name in peers if any(Distribution.discover(name=name))}


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table: columns fit their cells, the first is aligned left and the others right."""
    cells = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        figures = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *figures]))


def print_rates(first: Sequence[str], rows: Sequence[Row], digits: int = 2, **more: str) -> None:
    """Print rows made by `summary`; `first` are the first three titles, `more` formats of further fields by name."""
    cells = []
    for row in rows:
        rate, median, *ends = (f"{figure:.{digits}f}" for figure in (row["rate"], row["median"], *row["spread"]))
        others = [format(row[name], form) for name, form in more.items()]
        peak = f"{row['peak_gib']:.1f}"
        cells.append([row["system"], row["setting"], rate, median, "-".join(ends), peak, *others, times(row)])
    titles = [name.replace("_", " ") for name in more]
    print_table([*first, "median", "spread", "peak GiB", *titles, "rqa is"], cells)


def training_flops(config: Any, lengths: Sequence[int], outputs: int | None) -> float:
    """Operations of forward and backward: layers, attention (half in a decoder), output layer at predicted tokens.

    `outputs` is the number of these tokens; None: an encoder.
    """
    width, layers, decoder = config.hidden_size, config.num_hidden_layers, outputs is not None
    keys = width * getattr(config, "num_key_value_heads", config.num_attention_heads) // config.num_attention_heads
    weights = 2 * width * width + 2 * width * keys + (3 if decoder else 2) * width * config.intermediate_size
    attention = (6 if decoder else 12) * layers * width * sum(length**2 for length in lengths)
    return 6 * layers * weights * sum(lengths) + attention + 6 * (outputs or 0) * width * config.vocab_size


def matmul_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a large matrix product on the device in use, as the median of several measurements."""
    size, times = (8192, 20) if device().type == "cuda" else (1536, 1)
    left, right = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))

    def products() -> None:
        for _ in range(times):
            left @ right

    return statistics.median(2 * size**3 * times / seconds(products) / 1e9 for _ in range(5))
