#!/usr/bin/env python
"""Does any moment exist at which `kill -9` loses or changes a run?

    python benchmarks/kill_resume.py 50 --model_name_or_path L --embedding_model E --data_dir DATA    # tiny models

`DATA` holds documents.jsonl, train_w_qa.jsonl and eval_w_qa.jsonl. SwR and RPG are trained once without interruption,
then again and again: each process is killed at a random moment of a chosen phase, and resumed until the run is through.
Its final weights must be those of the uninterrupted run, bit for bit, and no kill may cost more steps than lie between
two checkpoints.
"""

import argparse
import hashlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from harness import print_table

ROOT = Path(__file__).parents[1]
PHASES = {
    "train_swr": ["training", "saving", "evaluating", "any"],
    "train_rpg": ["training", "saving", "evaluating", "refreshing", "filling the teacher cache", "any"],
}
SAVE_STEPS = 3
FLAGS = {"max_steps": 12, "save_steps": SAVE_STEPS, "eval_steps": 4, "save_total_limit": 2, "logging_steps": 5,
         "per_device_train_batch_size": 2, "learning_rate": 1e-3}  # fmt: skip
OWN = {"train_swr": {"max_new_tokens": 8, "max_seq_length": 512}, "train_rpg": {"num_docs": 6, "refresh_step": 5}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=3)
    parser.add_argument("--model_name_or_path", required=True, help="The reader of SwR, the teacher of RPG.")
    parser.add_argument("--embedding_model", required=True, help="The retriever of SwR, the encoder that RPG trains.")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as directory:
        runs = [Trial(name, Path(directory), arguments) for name in PHASES]
        for run in runs:
            run.measure()
        while (left := arguments.kills - sum(sum(run.kills.values()) for run in runs)) > 0:
            run = min(runs, key=lambda run: sum(run.kills.values()))
            run.attempt(chance, min(left, chance.randint(1, 5)))
        report(runs)


class Trial:
    """One trainer: its uninterrupted run, and what became of the interrupted ones."""

    def __init__(self, name: str, directory: Path, arguments: argparse.Namespace) -> None:
        self.name = name
        self.directory = directory / name
        self.arguments = arguments
        self.kills: Counter[str] = Counter()
        self.runs = self.identical = self.most_steps_lost = 0

    def flags(self, output: Path) -> list[str]:
        given, data = self.arguments, Path(self.arguments.data_dir)
        models = {"model_name_or_path": given.model_name_or_path, "embedding_model": given.embedding_model}
        if self.name == "train_rpg":
            models = {"model_name_or_path": given.embedding_model, "lm_model_path": given.model_name_or_path}
        values = {
            **models,
            "train_file": data / "train_w_qa.jsonl",
            "eval_file": data / "eval_w_qa.jsonl",
            "document_path": data / "documents.jsonl",
            "output_dir": output,
            "resume_from_checkpoint": "true",
            **FLAGS,
            **OWN[self.name],
        }
        return [str(part) for name, value in values.items() for part in (f"--{name}", value)]

    def run(self, output: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
        """One process to its end; what it noted, or None if it died before it noted anything.

        Raises:
            SystemExit: it failed by itself.
        """
        notes = output.with_suffix(".json")
        notes.unlink(missing_ok=True)
        environment = {**os.environ, "RQA_CACHE": str(output.with_suffix(".cache")), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--child", json.dumps({**plan, "notes": str(notes)}), self.name]
        done = subprocess.run([*command, *self.flags(output)], env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode not in (0, -signal.SIGKILL):
            sys.exit(f"{self.name} failed with status {done.returncode}:\n{done.stderr[-3000:]}")
        noted = json.loads(notes.read_text()) if notes.exists() else None
        assert noted is None or noted["killed"] == (done.returncode == -signal.SIGKILL)
        return noted

    def measure(self) -> None:
        """The uninterrupted run: the weights to reach, and how often each phase comes."""
        noted = self.run(self.directory / "whole", {"phase": None})
        self.expected = weights(self.directory / "whole")
        self.occurrences: dict[str, int] = noted["occurrences"]

    def attempt(self, chance: random.Random, kills: int) -> None:
        """A run of its own that is killed up to so many times and must still reach the same weights."""
        self.runs += 1
        output = self.directory / f"run-{self.runs}"
        for _ in range(kills):
            phase = chance.choice(PHASES[self.name])
            seen = phase if phase != "any" else chance.choice(sorted(self.occurrences))
            times = chance.randint(1, max(1, self.occurrences.get(seen, 1) // 2))
            plan = {"phase": seen, "times": times, "delay": chance.random() * (0.05 if phase != "any" else 1.0)}
            noted = self.run(output, plan)
            if not noted or not noted["killed"]:
                break  # it was through before the moment came
            self.kills[noted["phase"]] += 1
            self.most_steps_lost = max(self.most_steps_lost, noted["step"] - newest_step(output))
        self.run(output, {"phase": None})
        self.identical += weights(output) == self.expected
        print(f"{self.name}: {dict(self.kills)}, {self.identical} of {self.runs} identical", file=sys.stderr)
        for path in (output, output.with_suffix(".cache")):
            shutil.rmtree(path)


def weights(output: Path) -> str:
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()


def newest_step(output: Path) -> int:
    from rqa.training.checkpoint import checkpoints

    return max((int(path.name.split("-")[1]) for path in checkpoints(output)), default=0)


def report(runs: list[Trial]) -> None:
    phases = sorted({phase for run in runs for phase in run.kills})
    header = ["trainer", "kills", *phases, "runs", "identical", "most steps lost"]
    print_table(header, [[run.name, sum(run.kills.values()), *(run.kills[phase] for phase in phases), run.runs,
                          run.identical, run.most_steps_lost] for run in runs])  # fmt: skip
    result = {
        "benchmark": "kill_resume",
        "kills": sum(sum(run.kills.values()) for run in runs),
        "by_phase": dict(sum((run.kills for run in runs), Counter())),
        "runs": sum(run.runs for run in runs),
        "runs_lost": sum(run.runs - run.identical for run in runs),
        "most_steps_lost": max(run.most_steps_lost for run in runs),
        "steps_between_checkpoints": SAVE_STEPS,
    }
    print(json.dumps(result))
    if result["runs_lost"] or result["most_steps_lost"] > SAVE_STEPS:
        sys.exit(1)


class Child:
    """Inside the process to be killed: knows the phase it is in, and kills itself at the planned moment."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.stack = ["starting"]
        self.occurrences: Counter[str] = Counter()
        self.step = 0

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Count a function's calls as occurrences of a phase."""
        function = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            self.occurrences[phase] += 1
            self.stack.append(phase)
            if phase == self.plan["phase"] and self.occurrences[phase] == self.plan["times"]:
                threading.Timer(self.plan["delay"], self.die).start()
            try:
                return function(*arguments, **options)
            finally:
                self.stack.pop()

        setattr(owner, name, watched)

    def die(self) -> None:
        self.note(killed=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def note(self, killed: bool) -> None:
        noted = {"killed": killed, "phase": self.stack[-1], "step": self.step, "occurrences": self.occurrences}
        Path(self.plan["notes"]).write_text(json.dumps(noted))


def child(plan: dict[str, Any], executable: str, line: list[str]) -> None:
    """Run an executable of bin/ and watch its phases."""
    from rqa.evaluation.answers import ReaderEvaluation
    from rqa.objectives.teacher import Teacher
    from rqa.recipe import retriever
    from rqa.retrieval.refresh import Refresher
    from rqa.training import loop
    from rqa.training.loop import Batches
    from rqa.training.optim import Optimization

    watcher = Child(plan)
    watcher.watch(Optimization, "step", "training")
    watcher.watch(loop, "save_checkpoint", "saving")
    watcher.watch(Refresher, "_refresh", "refreshing")
    watcher.watch(Teacher, "__call__", "filling the teacher cache")
    watcher.watch(ReaderEvaluation, "__call__", "evaluating")
    watcher.watch(retriever, "find_passages", "evaluating")
    position = Batches.position

    def count(self: Batches, step: int) -> int:
        watcher.step = max(watcher.step, step - 1)
        watcher.stack[0] = "training"  # whatever is no phase of its own
        return position(self, step)

    Batches.position = count
    sys.argv = [executable, *line]
    try:
        runpy.run_path(str(ROOT / "bin" / executable), run_name="__main__")
    finally:
        watcher.note(killed=False)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main()
