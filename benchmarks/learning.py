#!/usr/bin/env python
"""What does training on one's own documents bring? Data sets x systems x seeds, beside what others would use.

    python benchmarks/learning.py --output_dir out/learning                                         # pydocs
    python benchmarks/learning.py --data perl=faqs/perl pydocs --seeds 0 1 2 --html learning.html ...
    python benchmarks/learning.py --settings "train_*: --num_train_epochs 4" "CTL: --learning_rate 3e-5" ...
    python benchmarks/learning.py --data D --only BM25 untrained CTL --tiny ...         # a few steps of each
    python benchmarks/learning.py --draw ...                       # runs nothing: the table of what is there

A data set is a folder with documents.jsonl (or .pkl) and train, eval and test_w_qa.jsonl; without a test file the eval
file is the test, and an eighth of the training questions the eval file. `pydocs` is the quickstart's corpus.

Each cell of the table is made by commands of bin/, as a user types them, in OUTPUT/DATA/seed-N/SYSTEM/, where the run
stays for bin/compare_runs, and its output in log.txt. A run that was killed goes on: a cell that is finished is not
made again, an unfinished trainer continues from its checkpoint. Trainers have their defaults, unless `--settings`
says others for a command or a system, by name or pattern; those are chosen on eval files. Weights are never chosen on the
test file: a fused one on training questions before training and on eval questions after, a reranker's on eval questions.

Scores are means over seeds. The interval of a difference to the first row is 95 % of a paired bootstrap that resamples
questions and seeds together. Minutes and memory are those of all commands that a row needs.
Needs `pip install -e ".[bench,quickstart]"`.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from harness import new_parser, print_result, print_table
from learning_page import write_page

from rqa.data import Example, read_examples, write_examples
from rqa.documents import read_documents, write_documents
from rqa.evaluation.comparison import read_predictions
from rqa.evaluation.report import PREDICTIONS, SCORES
from rqa.evaluation.results import difference_intervals, interval, mean_intervals
from rqa.evaluation.runtime import machine, machine_line
from rqa.runtime.files import fingerprint, read_json, write_json

HERE = Path(__file__).resolve().parent
MARK = "cell.json"  # what was run in a cell, and for how long
WEIGHTS = (0.3, 0.5, 1.0)  # a reranker's share of the sum, of which the eval file chooses one: {weight}
RESAMPLES = 10_000

DENSE = "--model_name_or_path {E} --index_path {index} --test_file {test}"
DECODER = "--model_name_or_path {L} --chat_format template --test_file {test}"
ASKED = "--chat_format template --embedding_model {E} --index_path {index}"
BEHIND = "--reranker {reranker} --rerank_weight {weight}"
HYBRID = "evaluate_retriever --retriever hybrid --embedding_model {E} --index_path {index} --fusion_eval_path {train}"
TRAINED = "--embedding_model {trained} --index_path {trained}/index"
PEER = "sentence_transformers --model_name_or_path {E} --per_device_train_batch_size 64 --learning_rate 2e-5 "
PEER += "--warmup_ratio 0.1"
MEASURE = "evaluate_retriever --embedding_model {own}/model"
RETRIEVERS = {  # name -> its commands; {E}: the encoder, {own}: the cell's directory, {CTL}: another cell's
    "BM25": ["evaluate_retriever --embedding_model bm25"],
    "untrained": ["evaluate_retriever --embedding_model {E} --index_path {index}"],
    "untrained + BM25": [HYBRID],
    "sentence-transformers": [PEER, MEASURE],
    "sentence-transformers, mined": [f"{PEER} --num_hard_negatives 3", MEASURE],
    "CTL": [f"train_ctl {DENSE}"],
    "RPG": [f"train_rpg --lm_model_path {{L}} {DENSE}"],
    "EMDR2": [f"train_emdr --lm_model_path {{L}} {DENSE}"],
    "DCA": [f"train_dca --reader_model_path {{FiD}} {DENSE}"],
    "distilled": [f"train_rpg --lm_model_path reranker::{{reranker}} {DENSE}"],
    "untrained + BM25 + reranker": [f"{HYBRID} {BEHIND}"],
    "trained + BM25": [f"evaluate_retriever --retriever hybrid {TRAINED} --fusion_eval_path {{eval}}"],
    "trained + reranker": [f"evaluate_retriever {TRAINED} {BEHIND}"],
    "trained + BM25 + reranker": [
        f"evaluate_retriever --retriever hybrid {TRAINED} --fusion_eval_path {{eval}} {BEHIND}"
    ],
}
READERS = {
    "SmolLM2": [f"evaluate_rqa --qa_model_name_or_path {{L}} {ASKED}"],
    "trl SFT": [
        "trl --model_name_or_path {L} --chat_format template",
        f"evaluate_rqa --qa_model_name_or_path {{own}}/model {ASKED}",
    ],
    "SFT": [f"train_sft {DECODER} --embedding_model {{E}} --index_path {{index}}"],
    "SwR": [f"train_swr {DECODER} --embedding_model {{E}} --index_path {{index}}"],
    "SwR over trained": [f"train_swr {DECODER} {TRAINED}"],
    "FiD": ["train_fid --model_name_or_path bert::{E} --embedding_model {E} --index_path {index} --test_file {test}"],
}
OTHERS = {"reranker": ["train_rerank --model_name_or_path {E}"]}  # in no table
SYSTEMS = RETRIEVERS | READERS | OTHERS
PEERS = ("sentence_transformers", "trl")
METRICS = {
    "retrievers": {"Recall@1": "retr/recall@1", "Recall@4": "retr/recall@4", "MRR@10": "retr/mrr@10"},
    "readers": {"ROUGE-L": "gen/rougeL", "F1": "gen/f1", "exact match": "gen/exact_match"},
}
TINY = (
    "train_*,sentence_transformers,trl: --max_steps 2", "train_rpg,train_emdr: --num_docs 4 --text_maxlength 128",
    "train_dca: --n_context 4", "train_dca,train_fid: --max_encoder_seq_length 64",
    "train_fid: --max_decoder_seq_length 8", "train_s*,trl,evaluate_rqa: --max_seq_length 256 --max_new_tokens 8",
)  # fmt: skip


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it stops the command that runs, too
    arguments = parse()
    table, failed = Table(arguments), []
    for data in arguments.data:
        for seed in arguments.seeds:
            for system in [] if arguments.draw else arguments.only:
                try:
                    table.make(data, seed, system)
                except (subprocess.CalledProcessError, FileNotFoundError) as error:
                    failed.append(f"{data}, seed {seed}, {system}: {error}")
    rows = [row for data in arguments.data for row in rows_of(table, data)]
    report(table, rows)
    if failed:
        sys.exit("\n".join(["error: not made:", *failed]))


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--data", nargs="+", default=["pydocs"], help="NAME=FOLDER, a folder, or pydocs")
    parser.add_argument("--embedding_model", help="encoder to start from; default: all-MiniLM-L6-v2 from PyPI")
    parser.add_argument("--qa_model_name_or_path", help="decoder, also RPG's judge; default: SmolLM2 from PyPI")
    parser.add_argument("--output_dir", required=True, help="directory of all cells and indexes")
    parser.add_argument("--only", nargs="+", choices=list(SYSTEMS), metavar="SYSTEM", default=[*RETRIEVERS, *READERS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trained", choices=list(RETRIEVERS), metavar="SYSTEM", default="CTL",
                        help="trained retriever that is fused, ranked anew and read from")  # fmt: skip
    parser.add_argument("--settings", nargs="*", default=[], help='such as "train_ctl: --learning_rate 3e-5"')
    parser.add_argument("--tiny", action="store_true", help="a few steps of each trainer")
    parser.add_argument("--draw", action="store_true", help="run nothing, and show the cells that are there")
    parser.add_argument("--html", metavar="FILE", help="write the table with its intervals as a page, too")
    arguments = parser.parse_args()
    arguments.folders = dict(map(named_folder, arguments.data))
    arguments.data = list(arguments.folders)
    if arguments.tiny:
        arguments.settings = [*TINY, *arguments.settings]
    for setting in arguments.settings:
        if ":" not in setting:
            parser.error(f'--settings "{setting}": has no colon; write "COMMAND OR SYSTEM: FLAGS"')
    return arguments


def named_folder(given: str) -> tuple[str, Path | None]:
    name, equals, path = given.partition("=")
    if given == "pydocs":
        return given, None
    return (name, Path(path)) if equals else (Path(given).name, Path(given))


class Table:
    """All cells: each made when it or one that needs it is asked for, once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from pydocs.wheels import MINILM, SMOLLM2, fetch_model

        self.arguments, self.output = arguments, Path(arguments.output_dir)
        self.models = {
            "E": arguments.embedding_model or str(fetch_model(MINILM)),
            "L": arguments.qa_model_name_or_path or str(fetch_model(SMOLLM2)),
        }
        self.files = cache(self.read)  # of a data set
        self.tried: dict[Path, Exception | None] = {}

    def read(self, data: str) -> tuple[dict[str, str], str]:
        """The paths of documents and questions, copied to the output directory, and a fingerprint of them all."""
        directory, folder = self.output / data / "data", self.arguments.folders[data]
        if not (directory / "test_w_qa.jsonl").exists():  # the last that is written
            copy_data(folder, directory)
        paths = {"documents": directory / "documents.jsonl"}
        paths |= {name: directory / f"{name}_w_qa.jsonl" for name in ("train", "eval", "test")}
        content = fingerprint(*(path.read_text(encoding="utf-8") for path in paths.values()))
        return {name: str(path) for name, path in paths.items()} | {"index": str(self.output / data / "index")}, content

    def commands(self, system: str) -> list[str]:
        """The system's commands with the flags that `--settings` adds; places of files are still in braces."""
        found = []
        for command in SYSTEMS[system]:
            for setting in self.arguments.settings:
                names, _, flags = setting.partition(":")
                executable = command.split()[0]
                if any(fnmatch(name, key.strip()) for key in names.split(",") for name in (executable, system)):
                    command += f" {flags.strip()}"
            found.append(command.replace("{trained}", f"{{{self.arguments.trained}}}"))
        return found

    def needs(self, system: str) -> list[str]:
        """The systems whose cells the commands name, and those that these need."""
        named = re.findall(r"\{([^{}]+)\}", " ".join(self.commands(system)))
        direct = [name for name in dict.fromkeys(named) if name in SYSTEMS]
        return list(dict.fromkeys([*(far for near in direct for far in self.needs(near)), *direct]))

    def trains(self, system: str) -> bool:
        """Whether seeds make a difference."""
        commands = [command for name in (*self.needs(system), system) for command in self.commands(name)]
        return any(not command.startswith("evaluate_") for command in commands)

    def place(self, data: str, seed: int, system: str) -> Path:
        folder = f"seed-{seed}" if self.trains(system) else "any-seed"
        return self.output / data / folder / re.sub(r"\W+", "-", system)

    def make(self, data: str, seed: int, system: str) -> None:
        """Run what is missing of a cell and of those it needs; one that failed is not tried again."""
        cell = self.place(data, seed, system)
        if cell not in self.tried:
            try:
                for name in self.needs(system):
                    self.make(data, seed, name)
                self._run(cell, data, seed, system)
                self.tried[cell] = None
            except (subprocess.CalledProcessError, FileNotFoundError) as error:
                self.tried[cell] = error
        if failure := self.tried[cell]:
            raise failure

    def recipe(self, data: str, seed: int, system: str) -> str:
        commands = [self.commands(name) for name in (*self.needs(system), system)]
        of_seed = seed if self.trains(system) else None
        return fingerprint(str((commands, self.models, self.arguments.precision, of_seed)), self.files(data)[1])

    def mark(self, data: str, seed: int, system: str) -> dict[str, Any]:
        """What is known of a cell; empty before its first command."""
        path = self.place(data, seed, system) / MARK
        mark = read_json(path) if path.exists() else {}
        if mark and mark["recipe"] != self.recipe(data, seed, system):
            raise SystemExit(f"error: {path.parent}: made of other data, models or settings; delete it, or name another "
                             "--output_dir")  # fmt: skip
        return mark

    def _run(self, cell: Path, data: str, seed: int, system: str) -> None:
        mark = self.mark(data, seed, system)
        if mark.get("finished"):
            return
        print(f"{data}, seed {seed}, {system} ...", file=sys.stderr, flush=True)
        mark = {"steps": []} | mark | {"recipe": self.recipe(data, seed, system), "resumed": bool(mark)}
        write_json(cell / MARK, mark)
        for command in self.commands(system)[len(mark["steps"]) :]:
            step = {"command": command, "seconds": 0.0, "peak_gib": 0.0}
            for line in self.lines(cell, data, seed, command):
                seconds, peak = run_command(line, cell / "log.txt")
                step["seconds"], step["peak_gib"] = step["seconds"] + seconds, max(step["peak_gib"], peak)
            mark["steps"].append(step)
            write_json(cell / MARK, mark)
        if system not in OTHERS and not (cell / PREDICTIONS).exists():
            raise FileNotFoundError(f"{cell / PREDICTIONS}: not written; see log.txt beside it")
        for pattern in ("checkpoint-*", "index-*", "model/checkpoint-*"):  # many times as large as what stays
            for leftover in cell.glob(pattern):
                shutil.rmtree(leftover)
        write_json(cell / MARK, mark | {"finished": True, "machine": machine_line(machine())})

    def lines(self, cell: Path, data: str, seed: int, command: str) -> Iterator[list[str]]:
        """The command line of a command; before it those that choose its {weight}, whose best the last one takes."""
        values = self.models | self.files(data)[0] | {"own": str(cell)}
        values |= {name: str(self.place(data, seed, name)) for name in SYSTEMS}
        name, *flags = shlex.split(command)
        data_flags = ["--document_path", values["documents"], "--bf16", str(self.arguments.precision == "bf16").lower()]

        def line(own: Path, questions: str, **more: str) -> list[str]:
            filled = [re.sub(r"\{([^{}]+)\}", lambda match: (values | more)[match[1]], flag) for flag in flags]
            if name.startswith("evaluate_"):
                common = [*data_flags, "--eval_data_path", questions, "--output_dir", str(own)]
            else:
                own = own / "model" if name in PEERS else own
                common = [*data_flags, "--train_file", values["train"], "--eval_file", values["eval"], "--seed", str(seed)]
                common += ["--output_dir", str(own), "--save_steps", "50", "--resume_from_checkpoint", "true"]
            script = [str(HERE / "learning_peers.py"), name] if name in PEERS else [str(HERE.parent / "bin" / name)]
            return [*script, *common, *filled]

        more = {}
        if "{weight}" in command:
            tried = {weight: cell / f"eval-{weight:g}" for weight in WEIGHTS}
            for weight, directory in tried.items():
                yield line(directory, values["eval"], weight=f"{weight:g}")
            found = {weight: read_json(path / SCORES)["test_retr/mrr@10"] for weight, path in tried.items()}
            more = {"weight": f"{max(found, key=found.__getitem__):g}"}
        yield line(cell, values["test"], **more)


def copy_data(folder: Path | None, directory: Path) -> None:
    """The data set in rqa's own layout; `None` is pydocs."""
    if folder is None:
        from pydocs.corpus import QUICKSTART, build_corpus, write_corpus

        return write_corpus(build_corpus(QUICKSTART), directory)
    documents = next((path for path in sorted(folder.glob("documents.*")) if path.suffix in (".jsonl", ".pkl")), None)
    if not documents:
        raise SystemExit(f"error: --data {folder}: has no documents.jsonl or documents.pkl")
    splits = {name: folder / f"{name}_w_qa.jsonl" for name in ("train", "eval", "test")}
    examples = {name: read_examples(path, answers=True) for name, path in splits.items() if path.exists()}
    if "test" not in examples:
        examples["test"], train = examples["eval"], examples["train"]
        examples["eval"] = [example for example in train if is_held_out(example)]
        examples["train"] = [example for example in train if not is_held_out(example)]
    write_documents(directory / "documents.jsonl", read_documents(str(documents)))
    for name in splits:
        write_examples(directory / f"{name}_w_qa.jsonl", examples[name])


def is_held_out(example: Example) -> bool:
    """Whether a training question is of the eighth that stands in for an eval file; all of a passage's are, or none."""
    return int(fingerprint(*example.gold_docs[0].key), 16) % 8 == 0


def run_command(line: Sequence[str], log: Path) -> tuple[float, float]:
    """Run a Python script to its end, its output going to a file. -> seconds, and GiB that it held at most"""
    with log.open("a", encoding="utf-8") as file:
        print("\n$", shlex.join(line), file=file, flush=True)
        began = time.monotonic()
        with subprocess.Popen([sys.executable, *line], stdout=file, stderr=subprocess.STDOUT) as running:
            try:
                _, status, usage = os.wait4(running.pid, 0)
            except BaseException:
                running.terminate()  # a trainer saves a checkpoint and ends
                raise
            running.returncode = os.waitstatus_to_exitcode(status)
    if running.returncode:
        raise subprocess.CalledProcessError(running.returncode, f"{Path(line[0]).name}, whose log is {log}")
    return time.monotonic() - began, usage.ru_maxrss / 2**20


# ---------------------------------------------------------------- the table


def rows_of(table: Table, data: str) -> Iterator[dict[str, Any]]:
    """A row for each system of a data set with finished cells, first all retrievers."""
    arguments = table.arguments
    for kind, systems in (("retrievers", RETRIEVERS), ("readers", READERS)):
        metrics, first = METRICS[kind], None
        for system in [name for name in systems if name in arguments.only]:
            done = [seed for seed in arguments.seeds if table.mark(data, seed, system).get("finished")]
            if not done:
                continue
            values = np.stack([scores_of(table.place(data, seed, system), metrics.values()) for seed in done])
            marks = [[table.mark(data, s, name) for name in (*table.needs(system), system)] for s in done]
            steps = [[step for mark in cell for step in mark["steps"]] for cell in marks]
            trains = table.trains(system)
            row = {"data": data, "kind": kind, "system": system, "n": values.shape[1], "seeds": len(done) if trains else 0}
            row |= {"scores": by_name(metrics, values.mean((0, 1)))}
            row |= {"intervals": by_name(metrics, intervals(values) if trains else mean_intervals(values[0]))}
            row |= {"by_seed": [by_name(metrics, each.mean(0)) for each in values] if trains else []}
            row |= {"minutes": round(np.mean([sum(step["seconds"] for step in each) for each in steps]) / 60, 2)}
            row |= {"resumed": any(mark["resumed"] for cell in marks for mark in cell)}  # time before it is not known
            row |= {"peak_gib": round(max(step["peak_gib"] for each in steps for step in each), 2)}
            row |= {"machine": sorted({mark["machine"] for cell in marks for mark in cell})}
            if first is None:
                first = dict(zip(done, values, strict=True))
            elif shared := [seed for seed in done if seed in first]:
                gaps = np.stack([values[done.index(seed)] - first[seed] for seed in shared])
                row["difference"] = by_name(metrics, gaps.mean((0, 1)))
                row["difference_intervals"] = by_name(metrics, intervals(gaps))
            yield row


def scores_of(cell: Path, names: Sequence[str]) -> np.ndarray:
    """The scores of each question that has them. [n, M]"""
    rows = [row["scores"] for row in read_predictions(cell)]
    return np.array([[scores[name] for name in names] for scores in rows if all(name in scores for name in names)])


def intervals(values: np.ndarray) -> np.ndarray:
    """95 % intervals of means over seeds and questions, both resampled. [S, n, M] -> [M, 2]"""
    if (values == values[:1]).all():  # of all seeds
        return difference_intervals(values[0])
    chance, (S, n, _) = np.random.default_rng(0), values.shape
    samples = []
    for _ in range(RESAMPLES // 100):
        seeds, questions = (chance.multinomial(size, [1 / size] * size, 100) / size for size in (S, n))  # [R, size]
        samples.append(np.einsum("rs,srm->rm", seeds, questions @ values))
    return interval(np.concatenate(samples))


def by_name(names: Sequence[str], values: np.ndarray) -> dict[str, Any]:
    return dict(zip(names, values.round(4).tolist(), strict=True))


def report(table: Table, rows: Sequence[dict[str, Any]]) -> None:
    """Tables for each data set, a JSON line, and the page."""
    for data, kind in dict.fromkeys((row["data"], row["kind"]) for row in rows):
        shown = [row for row in rows if (row["data"], row["kind"]) == (data, kind)]
        metrics, cells = METRICS[kind], []
        for row in shown:
            scores = [f"{row['scores'][name]:.3f}{difference(row, name)}" for name in metrics]
            minutes = f"{'>' if row['resumed'] else ''}{row['minutes']:.1f}"
            cells.append((row["system"], row["seeds"] or "", *scores, minutes, f"{row['peak_gib']:.1f}"))
        title = f"{data}, {shown[0]['n']} questions"
        print_table([title, "seeds", *metrics, "minutes", "peak GiB"], cells)
        print()
    machines = sorted({line for row in rows for line in row["machine"]})
    print(*machines, sep="\n")
    recipes = {name: table.commands(name) for name in (*table.arguments.only, *OTHERS)}
    if table.arguments.html:
        write_page(Path(table.arguments.html), rows, METRICS, machines, recipes)
    del table.arguments.folders  # paths of this machine
    print_result(__file__, table.arguments, rows, recipes=recipes)


def difference(row: dict[str, Any], name: str) -> str:
    if "difference" not in row:
        return ""
    low, high = row["difference_intervals"][name]
    return f" ({row['difference'][name]:+.3f}, {low:+.3f} to {high:+.3f})"


if __name__ == "__main__":
    main()
