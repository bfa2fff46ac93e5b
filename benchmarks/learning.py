#!/usr/bin/env python
"""What does training on your own documents bring? Data sets x systems x seeds, compared with other tools.

    python benchmarks/learning.py --output_dir out/learning                                         # pydocs
    python benchmarks/learning.py --data perl=faqs/perl pydocs --seeds 0 1 2 --html learning.html ...
    python benchmarks/learning.py --only BM25 CTL SwR --settings "train_*: --num_train_epochs 4" ...
    python benchmarks/learning.py --draw ...             # only draws the table of finished cells; needs no data

A data set is a folder with documents.jsonl (or .pkl) and train, eval and test_w_qa.jsonl. If there is no test file, the
eval file is used for the test, and an eighth of the training questions as the eval file. A cell is one system with one
seed on one data set. Commands of bin/ make it in OUTPUT/DATA/seed-N/SYSTEM/, where its run stays for bin/compare_runs;
its cell.json holds the scores of all questions and is enough for a table. `--jobs 15` makes 15 cells at a time. After a
kill, finished cells are kept and a trainer continues from its checkpoint. `--settings "PATTERN,...: FLAGS"` adds flags
to commands or systems; all other flags have their defaults. No weight is chosen on the test file: the weight of hybrid
search is chosen on training questions for an untrained encoder and on eval questions for a trained one, and
train_rerank chooses the reranker's weight on eval questions.

Scores are means over seeds, followed by the difference from the first row of `--only` and its 95 % interval, from a
paired bootstrap over questions and seeds together. Minutes and memory include all that a row needs, also evaluation.
Needs `pip install -e ".[bench,quickstart]"`.
"""

import argparse
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from harness import new_parser, print_result, print_table
from learning_page import write_page
from pydocs.corpus import QUICKSTART, build_corpus, write_corpus
from pydocs.wheels import MINILM, SMOLLM2, fetch_model

from rqa.data import read_examples, write_examples
from rqa.evaluation.comparison import read_predictions
from rqa.evaluation.results import difference_intervals, interval
from rqa.evaluation.runtime import machine, machine_line
from rqa.runtime.errors import UserError
from rqa.runtime.files import fingerprint, read_json, write_json

HERE = Path(__file__).resolve().parent

RETRIEVER = "--embedding_model {E} --index_path {index}"
TRAINED = "--embedding_model {trained} --index_path {trained}/index"
HYBRID = f"evaluate_retriever --retriever hybrid {RETRIEVER} --fusion_eval_path {{train}}"
FUSED_ANEW = f"evaluate_retriever --retriever hybrid {TRAINED} --fusion_eval_path {{eval}}"
RERANKED = "--reranker {reranker}"
RERANKER = f"train_rerank --model_name_or_path {{E}} --negatives_from both {RETRIEVER}"
ENCODER = "--model_name_or_path {E} --test_file {test}"
DECODER = "--model_name_or_path {L} --chat_format template"
ANSWERS = f"evaluate_rqa --chat_format template {RETRIEVER} --qa_model_name_or_path"
PEER = "sentence_transformers --model_name_or_path {E} --per_device_train_batch_size 64 --learning_rate 1e-4"
OWN = "evaluate_retriever --embedding_model {own}/model"
BATCH = 16  # questions a step in REFRESHED; {epoch} stands for the steps of an epoch
RETRIEVERS = {  # name -> commands; {E}, {L}: the models; {own}: the cell's directory; {CTL}: another cell's
    "BM25": ["evaluate_retriever --embedding_model bm25"],
    "untrained": [f"evaluate_retriever {RETRIEVER}"],
    "untrained + BM25": [HYBRID],
    "sentence-transformers": [f"{PEER} --num_hard_negatives 0", OWN],
    "sentence-transformers, mined": [f"{PEER} --num_hard_negatives 3", OWN],
    "CTL": [f"train_ctl {ENCODER}"],
    "RPG": [f"train_rpg --lm_model_path {{L}} {ENCODER}"],
    "EMDR2": [f"train_emdr --lm_model_path {{L}} {ENCODER}"],
    "DCA": [f"train_dca --reader_model_path {{FiD}} {ENCODER}"],
    "distilled": [f"train_rpg --lm_model_path reranker::{{reranker}} {ENCODER}"],
    "untrained + BM25 + reranker": [f"{HYBRID} {RERANKED}"],
    "trained + BM25": [FUSED_ANEW],
    "trained + reranker": [f"evaluate_retriever {TRAINED} {RERANKED}"],
    "trained + BM25 + reranker": [f"{FUSED_ANEW} {RERANKED}"],
}  # fmt: skip
READERS = {
    "SmolLM2": [f"{ANSWERS} {{L}}"],
    "trl SFT": [f"trl {DECODER} --learning_rate 1e-4", f"{ANSWERS} {{own}}/model"],
    "SFT": [f"train_sft {DECODER} {RETRIEVER} --test_file {{test}}"],
    "SwR": [f"train_swr {DECODER} {RETRIEVER} --test_file {{test}}"],
    "SwR over trained": [f"train_swr {DECODER} {TRAINED} --test_file {{test}}"],
    "FiD": [f"train_fid --model_name_or_path bert::{{E}} {RETRIEVER} --test_file {{test}}"],
}
REFRESHING = {
    "never refreshed": "--refresh_step 1000000",
    "each epoch": "--refresh_step {epoch}",
    "each 10 steps": "--refresh_step 10",
    "in the background": "--refresh_step 10 --refresh_async true",
}
REFRESHED = {  # only run if --only names them
    f"{name}, {when}": [f"{RETRIEVERS[name][0]} --per_device_train_batch_size {BATCH} --num_train_epochs 6 {flags}"]
    for name, (when, flags) in product(("CTL", "RPG"), REFRESHING.items())
}  # fmt: skip
SYSTEMS = RETRIEVERS | READERS | REFRESHED | {"reranker": [RERANKER]}  # the reranker is in no table
METRICS = (
    (RETRIEVERS | REFRESHED, {"Recall@1": "retr/recall@1", "Recall@4": "retr/recall@4", "MRR@10": "retr/mrr@10"}),
    (READERS, {"ROUGE-L": "gen/rougeL", "F1": "gen/f1", "exact match": "gen/exact_match"}),
)
TINY = ["train_*,sentence_transformers,trl: --max_steps 2", "train_rpg,train_emdr: --num_docs 4",
        "train_dca: --n_context 4 --max_encoder_seq_length 64", "train_s*,trl,evaluate_rqa: --max_new_tokens 8",
        "train_fid: --max_encoder_seq_length 64 --max_decoder_seq_length 8"]  # fmt: skip

# For `--jobs`:
LOCKS: dict[Path, threading.Lock] = {}  # by a cell's directory
RUNNING: list[subprocess.Popen] = []
ENDED = threading.Event()


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--data", nargs="+", default=["pydocs"], help="NAME=FOLDER, FOLDER or pydocs")
    add("--embedding_model", help="encoder to train; default: all-MiniLM-L6-v2 from PyPI")
    add("--qa_model_name_or_path", help="decoder to train, and RPG's judge; default: SmolLM2 from PyPI")
    add("--output_dir", required=True, help="directory of all cells and indexes")
    add(
        "--only",
        nargs="+",
        choices=list(SYSTEMS),
        metavar="SYSTEM",
        default=[*RETRIEVERS, *READERS],
        help="in this order",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--trained", choices=["CTL", "RPG", "EMDR2", "DCA", "distilled"], default="CTL", help="what others build on")
    add("--settings", nargs="*", default=[], metavar="SETTING", help='such as "train_ctl: --learning_rate 3e-5"')
    add("--tiny", action="store_true", help="a few steps of each trainer")
    add("--draw", action="store_true", help="run nothing")
    add("--html", metavar="FILE", help="page with the intervals")
    add("--jobs", type=int, default=1, help="cells made at a time, on a large GPU; their minutes then say little")
    given = parser.parse_args()
    given.settings = TINY * given.tiny + given.settings
    for setting in given.settings:
        if not any(meant(setting, system, command) for system in SYSTEMS for command in SYSTEMS[system]):
            parser.error(f'--settings "{setting}": names no command or system; write "train_ctl: --learning_rate 3e-5"')
    given.models = (given.embedding_model, given.qa_model_name_or_path, given.precision)  # None: default models
    folders = dict(path.split("=", 1) if "=" in path else (Path(path).name, path) for path in given.data)
    files: dict[str, dict[str, str]] = {data: {} for data in folders}
    if not given.draw:
        given.embedding_model = given.embedding_model or str(fetch_model(MINILM))
        given.qa_model_name_or_path = given.qa_model_name_or_path or str(fetch_model(SMOLLM2))
        files = {data: read_data(folder, Path(given.output_dir) / data) for data, folder in folders.items()}
    given.data = list(folders)
    cells = [Cell(given, files[data], data, *which) for data in files for which in product(given.seeds, given.only)]
    todo = [] if given.draw else cells
    if given.jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // given.jobs, 1)))
        with ThreadPoolExecutor(given.jobs) as pool:
            problems = [*pool.map(Cell.problem, todo)]
    else:
        problems = [cell.problem() for cell in todo]
    report(given, cells)
    if any(problems):
        sys.exit("\n".join(["error: not made:", *filter(None, problems)]))


def end(*_: object) -> None:
    """End the running commands and this one: trainers save a checkpoint, and the same command continues."""
    ENDED.set()
    for process in [*RUNNING]:
        process.terminate()
    sys.exit(130)


def read_data(folder: str, output: Path) -> dict[str, str]:
    """Find a data set's files, and write those that it lacks to the output directory."""
    source = Path(folder) if folder != "pydocs" else output / "data"
    if folder == "pydocs" and not (source / "test_w_qa.jsonl").exists():  # this file is written last
        write_corpus(build_corpus(QUICKSTART), source)
    paths = {name: source / f"{name}_w_qa.jsonl" for name in ("train", "eval", "test")}
    if not paths["test"].exists():
        parts = defaultdict(list)
        for example in read_examples(paths["train"]):  # questions about the same passage stay together
            parts["train" if int(fingerprint(*example.gold_docs[0].key), 16) % 8 else "eval"].append(example)
        if len(parts) < 2:
            raise SystemExit(f"error: {paths['train']}: has too few passages to keep some for the choice of a model")
        paths = {name: output / "data" / f"{name}_w_qa.jsonl" for name in parts} | {"test": paths["eval"]}
        for name, part in parts.items():
            write_examples(paths[name], part)
    (paths["documents"],) = (path for path in source.glob("documents.*") if path.suffix in (".jsonl", ".pkl"))
    content = fingerprint(*(path.read_bytes().hex() for path in paths.values()))
    epoch = len(read_examples(paths["train"])) // BATCH
    own = {"content": content, "index": str(output / "index"), "epoch": str(epoch or 1)}
    return {name: str(path) for name, path in paths.items()} | own


def meant(setting: str, system: str, command: str) -> bool:
    """Whether a setting, `PATTERN,...: FLAGS`, applies to a command of a system."""
    patterns = map(str.strip, setting.partition(":")[0].split(","))
    return any(fnmatch(name, pattern) for pattern in patterns for name in (system, command.split()[0]))


@dataclass(eq=False)
class Cell:
    """A system with one seed on one data set: its directory, and the commands that fill it."""

    given: argparse.Namespace
    files: dict[str, str]
    data: str
    seed: int
    system: str

    def __post_init__(self) -> None:
        given, found = self.given, [self.system, *SYSTEMS[self.system]]
        self.name, *found = (re.sub(r"\btrained", given.trained, text) for text in found)
        added = [[s.partition(":")[2].strip() for s in given.settings if meant(s, self.system, line)] for line in found]
        self.commands = [" ".join([line, *flags]) for line, flags in zip(found, added, strict=True)]
        named = dict.fromkeys(re.findall(r"\{([^{}]+)\}", " ".join(self.commands)))
        self.needs = [Cell(given, self.files, self.data, self.seed, name) for name in named if name in SYSTEMS]
        self.all = [*{each.system: each for need in self.needs for each in need.all}.values(), self]
        trains = any(not command.startswith("evaluate_") for each in self.all for command in each.commands)
        self.folder = f"seed-{self.seed}" if trains else "any-seed"
        self.place = Path(given.output_dir) / self.data / self.folder / re.sub(r"\W+", "-", self.name)
        recipe = (self.commands, [need.made_of["recipe"] for need in self.needs], given.models, self.folder)
        self.made_of = {"recipe": fingerprint(str(recipe)), "content": self.files.get("content")}
        if any(self.mark.get(name, value) != value for name, value in self.made_of.items() if value):
            made = "made of other data, models or settings; delete it, or name another --output_dir"
            raise SystemExit(f"error: {self.place}: {made}")

    @property
    def mark(self) -> dict[str, Any]:
        """The commands that were run so far, and their durations; empty at first."""
        return read_json(self.place / "cell.json") if (self.place / "cell.json").exists() else {}

    def problem(self) -> str | None:
        """Make this cell. -> what failed, so that the other cells can be made"""
        try:
            self.make()
        except (subprocess.CalledProcessError, UserError) as error:
            return f"{self.place}: {error}"

    def make(self, is_needed: bool = False) -> None:
        """Run the missing commands of this cell and of the cells that it needs; those must also have their models."""
        with LOCKS.setdefault(self.place, threading.Lock()):
            self._make(is_needed)

    def _make(self, is_needed: bool) -> None:
        if (mark := self.mark).get("finished"):
            if not is_needed or (self.place / "log.txt").exists():
                return
            mark = {}
        for need in self.needs:
            need.make(is_needed=True)
        print(f"{self.place} ...", file=sys.stderr, flush=True)
        mark = {"steps": [], **mark, **self.made_of, "resumed": bool(mark)}
        write_json(self.place / "cell.json", mark)
        for command in self.commands[len(mark["steps"]) :]:
            seconds, peak = run_command(self.line(command), self.place / "log.txt")
            state = self.place / "trainer_state.json"
            if state.exists() and read_json(state).get("interrupted"):
                raise UserError("a trainer was interrupted; the same command continues")
            mark["steps"].append({"command": command, "seconds": seconds, "peak_gib": peak})
            write_json(self.place / "cell.json", mark)
        rows = [] if self.system == "reranker" else [row["scores"] for row in read_predictions(self.place)]
        names = next((names.values() for systems, names in METRICS if self.system in systems), ())
        scores = {name: " ".join(f"{row[name]:.4g}" for row in rows if row) for name in names}
        for pattern in ("checkpoint-*", "index-*", "model/checkpoint-*"):  # many times as large as the rest
            for leftover in self.place.glob(pattern):
                shutil.rmtree(leftover)
        mark |= {"finished": True, "machine": machine_line(machine()), "scores": scores}
        write_json(self.place / "cell.json", mark)

    def line(self, command: str) -> list[str]:
        name, *flags = shlex.split(command)
        values = {"E": self.given.embedding_model, "L": self.given.qa_model_name_or_path, **self.files}
        values |= {"own": str(self.place), **{need.system: str(need.place) for need in self.needs}}
        peer = name in ("sentence_transformers", "trl")
        script = [str(HERE / "learning_peers.py"), name] if peer else [str(HERE.parent / "bin" / name)]
        script += ["--document_path", values["documents"], "--bf16", str(self.given.precision == "bf16").lower()]
        script += ["--output_dir", str(self.place / "model" if peer else self.place)]
        if name.startswith("evaluate_"):
            script += ["--eval_data_path", values["test"]]
        else:
            script += ["--train_file", values["train"], "--eval_file", values["eval"], "--seed", str(self.seed)]
            script += ["--save_steps", "50", "--resume_from_checkpoint", "true"]
        return [*script, *(re.sub(r"\{([^{}]+)\}", lambda match: values[match[1]], flag) for flag in flags)]


def run_command(line: Sequence[str], log: Path) -> tuple[float, float]:
    """Run a Python script with its output in a file. -> seconds, and the peak GiB of it, or of this process"""
    if ENDED.is_set():  # while another thread's command ended well
        sys.exit(130)
    began = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        print("\n$", shlex.join(line), file=file, flush=True)
        with subprocess.Popen([sys.executable, *line], stdout=file, stderr=subprocess.STDOUT) as running:
            RUNNING.append(running)
            _, status, usage = os.wait4(running.pid, 0)
            running.returncode = os.waitstatus_to_exitcode(status)
            RUNNING.remove(running)
    if running.returncode:
        raise subprocess.CalledProcessError(running.returncode, f"the last of {log}")
    return time.monotonic() - began, usage.ru_maxrss / 2**20


def rows_of(cells: Sequence[Cell], metrics: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Make a row for each system with finished cells; all others are compared with the first one."""
    first: dict[int, np.ndarray] = {}  # scores by seed
    for system in dict.fromkeys(cell.name for cell in cells):
        done = [cell for cell in cells if cell.name == system and cell.mark.get("finished")]
        values = {
            cell.seed: np.array([text.split() for text in cell.mark["scores"].values()], float).T for cell in done
        }
        first = first or values
        if not (shared := values.keys() & first.keys()):
            continue
        scores, gaps = np.stack(list(values.values())), np.stack([values[seed] - first[seed] for seed in shared])
        told = {"scores": scores.mean((0, 1)), "intervals": intervals(scores)}  # of [S, n, M]
        told |= {"difference": gaps.mean((0, 1)), "difference_intervals": intervals(gaps)}
        seeds = {str(cell.seed): values[cell.seed].mean(0) for cell in done if cell.folder != "any-seed"}
        marks = [each.mark for cell in done for each in cell.all]
        steps = [step for mark in marks for step in mark["steps"]]
        by_name = [
            {n: dict(zip(metrics, v.round(4).tolist(), strict=True)) for n, v in d.items()} for d in (told, seeds)
        ]
        yield {"data": done[0].data, "system": system, "n": scores.shape[1], **by_name[0], "by_seed": by_name[1]} | {
            "minutes": round(sum(step["seconds"] for step in steps) / 60 / len(done), 2),
            "resumed": any(mark["resumed"] for mark in marks),  # the minutes before a resumption are not known
            "peak_gib": round(max(step["peak_gib"] for step in steps), 2),
            "machines": sorted({mark["machine"] for mark in marks}),
            "commands": done[0].commands,
        }


def intervals(values: np.ndarray) -> np.ndarray:
    """95 % intervals of means over seeds and questions, by resampling both. [S, n, M] -> [M, 2]"""
    if (values == values[:1]).all():  # all seeds are equal
        return difference_intervals(values[0])
    chance, (S, n, _) = np.random.default_rng(0), values.shape
    samples = []
    for _ in range(100):
        seeds, questions = (chance.multinomial(size, [1 / size] * size, 100) / size for size in (S, n))  # [R, size]
        samples.append(np.einsum("rs,srm->rm", seeds, questions @ values))
    return interval(np.concatenate(samples))


def report(given: argparse.Namespace, cells: Sequence[Cell]) -> None:
    """Print a table for each data set's retrievers and readers, and a JSON line, and write the page."""
    text, tables = io.StringIO(), {}
    for data, (systems, metrics) in product(given.data, METRICS):
        rows = list(rows_of([cell for cell in cells if cell.data == data and cell.system in systems], metrics))
        with redirect_stdout(text):
            if rows:
                title = f"{data}, {rows[0]['n']} questions"
                print_table([title, "seeds", *metrics, "minutes", "GiB"], list(map(text_of, rows)))
                print()
                tables[f"{title}: {', '.join(metrics)}"] = rows
    every = [row for rows in tables.values() for row in rows]
    machines = "\n".join(sorted({machine for row in every for machine in row["machines"]}))
    if given.html:
        write_page(given.html, tables, text.getvalue() + machines)
    print(text.getvalue() + machines + "\n")
    order = [cell.name for cell in cells]
    ordered = sorted(every, key=lambda row: order.index(row["system"]))
    for name in ("MRR@10", "ROUGE-L"):
        print_markdown(name, [row for row in ordered if name in row["scores"]])
    print_result(__file__, given, every)


def print_markdown(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print systems by data sets for a README; a difference from the first row is bold if its interval excludes 0."""
    sets, known = {row["data"]: row["n"] for row in rows}, {(row["system"], row["data"]): row for row in rows}
    lines = [[name, *(f"{data} ({n})" for data, n in sets.items())], ["---", *["---:"] * len(sets)]] if rows else []
    for system in dict.fromkeys(row["system"] for row in rows):
        lines.append([system])
        for row in (known.get((system, data)) for data in sets):
            ends = least, most = row["difference_intervals"][name] if row else (0, 0)
            bold = "**" * (least > 0 or most < 0)
            gap = f" {bold}{row['difference'][name]:+.3f}{bold} ({least:+.3f} to {most:+.3f})" if any(ends) else ""
            lines[-1].append(f"{row['scores'][name]:.3f}{gap}" if row else "")
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


def text_of(row: dict[str, Any]) -> list[str]:
    """Format a row's cells, with the difference from the first row after each score."""
    told = {name: f"{score:.3f}" for name, score in row["scores"].items()}
    for name, ends in row["difference_intervals"].items():
        told[name] += " {:+.3f} ({:+.3f} to {:+.3f})".format(row["difference"][name], *ends) if any(ends) else ""
    took = f"{'>' * row['resumed']}{row['minutes']:.1f}"
    return [row["system"], str(len(row["by_seed"]) or ""), *told.values(), took, f"{row['peak_gib']:.1f}"]


if __name__ == "__main__":
    main()
