#!/usr/bin/env python
"""Is there a moment at which `kill -9` loses or changes a training run or an index?

    python benchmarks/kill_resume.py 50 --model_name_or_path L --embedding_model E --data_dir DATA    # tiny models
    python benchmarks/kill_resume.py 20 --embedding_model E --data_dir DATA --only index "index, updated"

`DATA` holds documents.jsonl, train_w_qa.jsonl and eval_w_qa.jsonl. SwR and RPG are trained once without interruption.
Then they are trained many times with kills: each process is killed at a random moment of a chosen phase, and the run is
resumed until it ends. The final weights must equal those of the uninterrupted run bit for bit, and a kill must not cost
more steps than there are between two checkpoints.

bin/build_index is killed in the same way, with FAISS and milvus-lite, in a build from nothing and in an update
(`--update true`) after documents were changed, added and removed. The final index must find the same passages with the
same scores as that of an uninterrupted build. A kill must not cost more passages than are encoded at once, and after a
killed update there must still be an index to search.
"""

import argparse
import hashlib
import importlib
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

import numpy as np
from harness import print_table

from rqa.data import Document
from rqa.documents import read_documents, write_documents
from rqa.models.encoder import Encoder, EncoderArguments, load_encoder
from rqa.retrieval import retriever as indexing
from rqa.retrieval.faiss_index import FaissIndex
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.retriever import Retriever
from rqa.runtime.cli import as_words
from rqa.training.checkpoint import checkpoints

ROOT = Path(__file__).parents[1]
PHASES = {
    "train_swr": ["training", "saving", "evaluating", "any"],
    "train_rpg": ["training", "saving", "evaluating", "refreshing", "filling the teacher cache", "any"],
    "index": ["encoding", "adding", "swapping", "any"],
    "index, updated": ["encoding", "adding", "swapping", "any"],
    "milvus-lite": ["encoding", "adding", "swapping", "any"],
    "milvus-lite, updated": ["encoding", "adding", "swapping", "any"],
}
TEXTS_AT_ONCE = 20  # passages that build_index encodes at once here, instead of 10,000
SAVE_STEPS = 3
FLAGS = {"max_steps": 12, "save_steps": SAVE_STEPS, "eval_steps": 4, "save_total_limit": 2, "logging_steps": 5,
         "per_device_train_batch_size": 2, "learning_rate": 1e-3}  # fmt: skip
OWN = {"train_swr": {"max_new_tokens": 8, "max_seq_length": 512}, "train_rpg": {"num_docs": 6, "refresh_step": 5}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=3)
    parser.add_argument("--model_name_or_path", help="Reader of SwR, and teacher of RPG.")
    parser.add_argument("--embedding_model", required=True, help="Encoder of SwR's retriever, RPG and the index.")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--only", nargs="*", choices=list(PHASES), default=list(PHASES))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as directory:
        kinds = {name: Trial if name in OWN else IndexTrial for name in arguments.only}
        runs = [kind(name, Path(directory), arguments) for name, kind in kinds.items()]
        for run in runs:
            run.measure()
        while (left := arguments.kills - sum(sum(run.kills.values()) for run in runs)) > 0:
            run = min(runs, key=lambda run: sum(run.kills.values()))
            run.attempt(chance, min(left, chance.randint(1, 5)))
        report(runs)


class Trial:
    """One trainer: its uninterrupted run, and the results of the interrupted ones."""

    may_lose = SAVE_STEPS
    delay = 0.05  # seconds after a phase began, at most

    def __init__(self, name: str, directory: Path, arguments: argparse.Namespace) -> None:
        self.name = self.executable = name
        self.directory = directory / name
        self.arguments = arguments
        self.kills: Counter[str] = Counter()
        self.runs = self.identical = self.most_lost = self.unreadable = 0

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
        return as_words(values)

    def run(self, output: Path, plan: dict[str, Any]) -> dict[str, Any]:
        """Run one process to its end, or exit if it fails without a kill. -> what it recorded"""
        notes = output.with_suffix(".json")
        notes.unlink(missing_ok=True)
        environment = {**os.environ, "RQA_CACHE": str(output.with_suffix(".cache")), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--child", json.dumps({**plan, "notes": str(notes)}), self.executable]
        done = subprocess.run([*command, *self.flags(output)], env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode not in (0, -signal.SIGKILL):
            sys.exit(f"{self.name} failed with status {done.returncode}:\n{done.stderr[-3000:]}")
        noted = json.loads(notes.read_text())
        assert noted["killed"] == (done.returncode == -signal.SIGKILL)
        return noted

    def measure(self) -> None:
        """Make the uninterrupted run: its result is the goal, and it counts how often each phase comes."""
        self.whole = self.run(self.directory / "whole", {"phase": None})
        self.expected = self.result(self.directory / "whole")

    def attempt(self, chance: random.Random, kills: int) -> None:
        """Make a run that is killed up to so many times and must still reach the same result."""
        self.runs += 1
        output, steps = self.directory / f"run-{self.runs}", []
        self.prepare(output)
        for left in range(kills, -1, -1):
            phase = chance.choice(PHASES[self.name])
            seen = phase if phase != "any" else chance.choice(sorted(self.whole["occurrences"]))
            times = chance.randint(1, max(1, self.whole["occurrences"].get(seen, 1) // 2))
            plan = {"phase": seen, "times": times, "delay": chance.random() * (self.delay if phase != "any" else 1.0)}
            noted = self.run(output, plan if left else {"phase": None})
            steps.append(noted["step"])
            if not noted["killed"]:
                break  # the run may have ended before the planned moment
            self.kills[noted["phase"]] += 1
            self.after_kill(steps, output)
        self.identical += self.same(output, steps)
        print(f"{self.name}: {dict(self.kills)}, {self.identical} of {self.runs} identical", file=sys.stderr)
        for path in (output, output.with_suffix(".cache")):
            shutil.rmtree(path, ignore_errors=True)

    def prepare(self, output: Path) -> None:
        """Write what the run finds in its output directory."""

    def after_kill(self, steps: list[int], output: Path) -> None:
        newest = max((int(path.name.split("-")[1]) for path in checkpoints(output)), default=0)
        self.most_lost = max(self.most_lost, steps[-1] - newest)

    def result(self, output: Path) -> Any:
        return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()

    def same(self, output: Path, steps: list[int]) -> bool:
        return self.result(output) == self.expected


class IndexTrial(Trial):
    """bin/build_index over documents; `updated` starts with an index of their former state."""

    may_lose = TEXTS_AT_ONCE
    delay = 0.01

    def __init__(self, name: str, directory: Path, arguments: argparse.Namespace) -> None:
        super().__init__(name, directory, arguments)
        self.executable, self.updated = "build_index", name.endswith("updated")
        former = list(read_documents(Path(arguments.data_dir, "documents.jsonl")))
        changed = [Document(f"It has changed: {document.page_content}", document.metadata) for document in former[::4]]
        self.directory.mkdir()
        write_documents(self.directory / "former.jsonl", former)
        write_documents(self.directory / "present.jsonl", former[1::2] + changed)

    def flags(self, output: Path) -> list[str]:
        output.mkdir(exist_ok=True)
        values = {
            "embedding_model": self.arguments.embedding_model,
            "document_path": self.directory / f"{'former' if output.name == 'former' else 'present'}.jsonl",
            "index_path": f"milvus::{output}/passages.db/passages" if "milvus" in self.name else output / "index",
            "dtype": "float32",  # other batches change a float32 score by less than 1e-5
            "update": self.updated and "run-" in output.name,
        }
        return as_words(values)

    def measure(self) -> None:
        super().measure()
        if self.updated:
            self.run(self.directory / "former", {"phase": None})
            self.prepare(self.directory / "run-0")
            self.whole = self.run(self.directory / "run-0", {"phase": None})

    def prepare(self, output: Path) -> None:
        if self.updated:
            shutil.copytree(self.directory / "former", output)

    def after_kill(self, steps: list[int], output: Path) -> None:
        self.unreadable += self.updated and not self.result(output)["found"]

    def result(self, output: Path) -> dict[str, Any]:
        """Ask the index from another process. -> what it finds"""
        command = [sys.executable, __file__, "--ask", *self.flags(output)]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])

    def same(self, output: Path, steps: list[int]) -> bool:
        again = sum(steps) - self.whole["step"]
        self.most_lost = max(self.most_lost, again / max(1, len(steps) - 1))
        ours, theirs = self.result(output), self.expected
        equal = [np.allclose(ours[name], theirs[name], atol=1e-5) for name in ("ids", "scores")]
        return ours["fresh"] and theirs["fresh"] and all(equal)


def report(runs: list[Trial]) -> None:
    phases = sorted({phase for run in runs for phase in run.kills})
    header = ["killed", "kills", *phases, "runs", "identical", "unreadable", "most lost"]
    print_table(header, [[run.name, sum(run.kills.values()), *(run.kills[phase] for phase in phases), run.runs,
                          run.identical, run.unreadable, f"{run.most_lost:g}"] for run in runs])  # fmt: skip
    result = {
        "benchmark": "kill_resume",
        "kills": sum(sum(run.kills.values()) for run in runs),
        "by_phase": dict(sum((run.kills for run in runs), Counter())),
        "runs": sum(run.runs for run in runs),
        "runs_lost": sum(run.runs - run.identical for run in runs),
        "unreadable": sum(run.unreadable for run in runs),
        "most_lost": {run.name: run.most_lost for run in runs},
        "may_lose": {run.name: run.may_lose for run in runs},
    }
    print(json.dumps(result))
    if result["runs_lost"] or result["unreadable"] or any(run.most_lost > run.may_lose for run in runs):
        sys.exit(1)


class Child:
    """Runs inside the process to be killed: follows its phases, and kills it at the planned moment."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.stack = ["starting"]
        self.occurrences: Counter[str] = Counter()
        self.step = 0

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Count each call of a function as one occurrence of a phase."""
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
    """Run an executable of bin/ and follow its phases."""
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
    watcher.watch(retriever, "evaluate_retrieval", "evaluating")
    if executable == "build_index":
        watch_indexing(watcher, "milvus::" in " ".join(line))
    position = Batches.position

    def count(self: Batches, step: int) -> int:
        watcher.step = max(watcher.step, step - 1)
        watcher.stack[0] = "training"  # everything that is not another phase
        return position(self, step)

    Batches.position = count
    sys.argv = [executable, *line]
    try:
        runpy.run_path(str(ROOT / "bin" / executable), run_name="__main__")
    finally:
        watcher.note(killed=False)


def watch_indexing(watcher: Child, in_milvus: bool) -> None:
    """Follow the phases of indexing; a step is one encoded passage."""
    indexing.TEXTS_AT_ONCE = TEXTS_AT_ONCE
    kind = importlib.import_module("rqa.retrieval.milvus").MilvusIndex if in_milvus else FaissIndex
    embed = Encoder.embed

    def count(self: Encoder, sequences: Any, *more: Any) -> Any:
        found = embed(self, sequences, *more)
        watcher.step += len(sequences)
        watcher.stack[0] = "between"
        return found

    Encoder.embed = count
    for owner, name, phase in ((Encoder, "embed", "encoding"), (kind, "add", "adding"), (kind, "swap", "swapping")):
        watcher.watch(owner, name, phase)


def ask(line: list[str]) -> None:
    """Search the index that these flags of build_index name, unchanged, with the first 50 documents."""
    named = dict(zip(line[::2], line[1::2], strict=True))
    documents = read_documents(named["--document_path"])
    encoder = load_encoder(named["--embedding_model"], EncoderArguments(dtype="float32"))
    retriever = Retriever(encoder, documents, IndexArguments(index_path=named["--index_path"]))
    retriever.index = indexing.index_at(named["--index_path"], documents, retriever.flags)
    result: dict[str, Any] = {"found": retriever.index.load()}
    if result["found"]:
        hits = retriever.retrieve([document.page_content for document in documents[:50]], 10)
        result |= {"ids": hits.ids.tolist(), "scores": hits.scores.tolist()}
    print(json.dumps(result | {"fresh": retriever.index.stamp == retriever.stamp()}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]), sys.argv[3], sys.argv[4:])
    elif sys.argv[1:2] == ["--ask"]:
        ask(sys.argv[2:])
    else:
        main()
