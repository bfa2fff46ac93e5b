#!/usr/bin/env python
"""What does training on one's own documents bring? Data sets x systems x seeds, beside what others would use.

    python benchmarks/learning.py --output_dir out/learning                                         # pydocs
    python benchmarks/learning.py --data perl=faqs/perl pydocs --seeds 0 1 2 --html learning.html ...
    python benchmarks/learning.py --only BM25 CTL SwR --settings "train_*: --num_train_epochs 4" "CTL: --seed 7" ...
    python benchmarks/learning.py --data D --tiny ...                   # a few steps of each trainer
    python benchmarks/learning.py --draw ...                            # runs nothing; the table of what is there

A data set is a folder with documents.jsonl (or .pkl) and train, eval and test_w_qa.jsonl; without a test file, the eval
file is the test and an eighth of the training questions chooses. `pydocs` is the quickstart's corpus.

Each cell is made by commands of bin/ in OUTPUT/DATA/seed-N/SYSTEM/, where its run stays for bin/compare_runs. After a
kill, a finished cell is not made again and a trainer continues from its checkpoint. Trainers have their defaults unless
`--settings "PATTERN,...: FLAGS"` adds flags to commands or systems. No weight is chosen on the test file: a fused one
is on training questions before training and on eval questions after it, a reranker's on eval questions.

Scores are means over seeds; behind them the difference from the first row, and its 95 % interval by a paired bootstrap
over questions and seeds together. Minutes and memory are those of all that a row needs, evaluation included.
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
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from harness import new_parser, print_result, print_table
from learning_page import write_page
from pydocs.wheels import MINILM, SMOLLM2, fetch_model

from rqa.data import read_examples, write_examples
from rqa.evaluation.comparison import read_predictions
from rqa.evaluation.report import SCORES
from rqa.evaluation.results import difference_intervals, interval
from rqa.evaluation.runtime import machine, machine_line
from rqa.runtime.errors import UserError
from rqa.runtime.files import fingerprint, read_json, write_json

HERE = Path(__file__).resolve().parent
WEIGHTS = (0.3, 0.5, 1.0)  # a reranker's share of the sum: the eval file chooses one as {weight}
METRICS = ({"Recall@1": "retr/recall@1", "Recall@4": "retr/recall@4", "MRR@10": "retr/mrr@10"},
           {"ROUGE-L": "gen/rougeL", "F1": "gen/f1", "exact match": "gen/exact_match"})  # fmt: skip

ENCODER = "--embedding_model {E} --index_path {index}"
TRAINED = "--embedding_model {trained} --index_path {trained}/index"
DENSE = "--model_name_or_path {E} --index_path {index} --test_file {test}"
DECODER = "--model_name_or_path {L} --chat_format template"
HYBRID = f"evaluate_retriever --retriever hybrid {ENCODER} --fusion_eval_path {{train}}"
FUSED_AGAIN = f"evaluate_retriever --retriever hybrid {TRAINED} --fusion_eval_path {{eval}}"
RERANKED = "--reranker {reranker} --rerank_weight {weight}"
PEER = "sentence_transformers --model_name_or_path {E} --per_device_train_batch_size 64 --learning_rate 2e-5 "
PEER += "--warmup_ratio 0.1"
ANSWER = f"--chat_format template {ENCODER}"
FOUND = "evaluate_retriever --embedding_model {own}/model"
RETRIEVERS = {  # name -> its commands; {E} and {L} are the models, {own} is the cell's directory, {CTL} another one's
    "BM25": ["evaluate_retriever --embedding_model bm25"],
    "untrained": [f"evaluate_retriever {ENCODER}"],
    "untrained + BM25": [HYBRID],
    "sentence-transformers": [PEER, FOUND],
    "sentence-transformers, mined": [f"{PEER} --num_hard_negatives 3", FOUND],
    "CTL": [f"train_ctl {DENSE}"],
    "RPG": [f"train_rpg --lm_model_path {{L}} {DENSE}"],
    "EMDR2": [f"train_emdr --lm_model_path {{L}} {DENSE}"],
    "DCA": [f"train_dca --reader_model_path {{FiD}} {DENSE}"],
    "distilled": [f"train_rpg --lm_model_path reranker::{{reranker}} {DENSE}"],
    "untrained + BM25 + reranker": [f"{HYBRID} {RERANKED}"],
    "trained + BM25": [FUSED_AGAIN],
    "trained + reranker": [f"evaluate_retriever {TRAINED} {RERANKED}"],
    "trained + BM25 + reranker": [f"{FUSED_AGAIN} {RERANKED}"],
}
READERS = {
    "SmolLM2": [f"evaluate_rqa --qa_model_name_or_path {{L}} --chat_format template {ENCODER}"],
    "trl SFT": [
        f"trl {DECODER}",
        f"evaluate_rqa --qa_model_name_or_path {{own}}/model --chat_format template {ENCODER}",
    ],
    "SFT": [f"train_sft {DECODER} {ENCODER} --test_file {{test}}"],
    "SwR": [f"train_swr {DECODER} {ENCODER} --test_file {{test}}"],
    "SwR over trained": [f"train_swr {DECODER} {TRAINED} --test_file {{test}}"],
    "FiD": [f"train_fid --model_name_or_path bert::{{E}} {ENCODER} --test_file {{test}}"],
}
SYSTEMS = RETRIEVERS | READERS | {"reranker": ["train_rerank --model_name_or_path {E}"]}  # the last: in no table
TINY = ["train_*,sentence_transformers,trl: --max_steps 2", "train_rpg,train_emdr: --num_docs 4",
        "train_dca: --n_context 4", "train_fid,train_dca: --max_encoder_seq_length 64", "train_fid: --max_decoder_seq_length 8",
        "train_s*,trl,evaluate_rqa: --max_seq_length 256 --max_new_tokens 8"]  # fmt: skip


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends the command that runs, too
    parser = new_parser(__doc__)
    parser.add_argument("--data", nargs="+", default=["pydocs"], help="NAME=FOLDER, FOLDER or pydocs")
    parser.add_argument("--embedding_model", help="encoder to train; default: all-MiniLM-L6-v2 from PyPI")
    parser.add_argument("--qa_model_name_or_path", help="decoder to train and to judge; default: SmolLM2 from PyPI")
    parser.add_argument("--output_dir", required=True, help="directory of all cells and indexes")
    parser.add_argument("--only", nargs="+", choices=list(SYSTEMS), metavar="SYSTEM", default=list(SYSTEMS)[:-1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trained", choices=list(RETRIEVERS), metavar="SYSTEM", default="CTL",
                        help="trained retriever to fuse, to rank anew and to read from")  # fmt: skip
    parser.add_argument("--settings", nargs="*", default=[], help='such as "train_ctl: --learning_rate 3e-5"')
    parser.add_argument("--tiny", action="store_true", help="a few steps of each trainer")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    parser.add_argument("--html", metavar="FILE", help="page with the intervals")
    given = parser.parse_args()
    given.settings = TINY * given.tiny + given.settings
    given.embedding_model = given.embedding_model or str(fetch_model(MINILM))
    given.qa_model_name_or_path = given.qa_model_name_or_path or str(fetch_model(SMOLLM2))
    folders = dict(path.split("=", 1) if "=" in path else (Path(path).name, path) for path in given.data)
    files = {data: read_data(folder, Path(given.output_dir) / data) for data, folder in folders.items()}
    given.data, failed = list(folders), []
    cells = {(data, system): [Cell(given, files[data], data, seed, system) for seed in given.seeds]
             for data in files for system in SYSTEMS if system in given.only}  # fmt: skip
    for cell in sorted((cell for row in cells.values() for cell in row), key=lambda cell: (cell.data, cell.seed)):
        try:
            cell.make(given.draw)
        except (subprocess.CalledProcessError, UserError) as error:  # the other cells are worth their time
            failed.append(f"{cell.place}: {error}")
    report(given, list(rows_of(cells)))
    if failed:
        sys.exit("\n".join(["error: not made:", *failed]))


def read_data(folder: str, output: Path) -> dict[str, str]:
    """Where a data set's files are, with what the data set lacks written to the output directory."""
    source = Path(folder)
    if folder == "pydocs":
        from pydocs.corpus import QUICKSTART, build_corpus, write_corpus

        source = output / "data"
        if not (source / "test_w_qa.jsonl").exists():  # the last that is written
            write_corpus(build_corpus(QUICKSTART), source)
    documents = [path for path in sorted(source.glob("documents.*")) if path.suffix in (".jsonl", ".pkl")]
    if not documents:
        raise SystemExit(f"error: --data {folder}: has no documents.jsonl or documents.pkl")
    paths = {name: source / f"{name}_w_qa.jsonl" for name in ("train", "eval", "test")}
    if not paths["test"].exists():
        parts = {name: output / "data" / f"{name}_w_qa.jsonl" for name in ("train", "eval")}
        examples = read_examples(paths["train"])
        held = [int(fingerprint(*example.gold_docs[0].key), 16) % 8 == 0 for example in examples]  # by passage
        for name, wanted in (("train", False), ("eval", True)):
            write_examples(parts[name], [e for e, is_held in zip(examples, held, strict=True) if is_held == wanted])
        paths = {**parts, "test": paths["eval"]}
    paths["documents"] = documents[0]
    content = fingerprint(*(path.read_bytes().hex() for path in paths.values()))
    return {name: str(path) for name, path in paths.items()} | {"content": content, "index": str(output / "index")}


@dataclass(eq=False)
class Cell:
    """A system, trained with a seed on a data set: its directory, and the commands that fill it."""

    given: argparse.Namespace
    files: dict[str, str]
    data: str
    seed: int
    system: str

    def __post_init__(self) -> None:
        self.commands = [command.replace("{trained}", f"{{{self.given.trained}}}") for command in SYSTEMS[self.system]]
        for number, command in enumerate(self.commands):
            for names, _, flags in (setting.partition(":") for setting in self.given.settings):
                asked = (command.split()[0], self.system)
                if any(fnmatch(name, pattern.strip()) for pattern in names.split(",") for name in asked):
                    self.commands[number] += f" {flags.strip()}"
        named = dict.fromkeys(re.findall(r"\{([^{}]+)\}", " ".join(self.commands)))
        self.needs = [Cell(self.given, self.files, self.data, self.seed, name) for name in named if name in SYSTEMS]
        self.all = [*{each.system: each for need in self.needs for each in need.all}.values(), self]
        self.trains = any(not command.startswith("evaluate_") for each in self.all for command in each.commands)
        folder = f"seed-{self.seed}" if self.trains else "any-seed"
        self.place = Path(self.given.output_dir) / self.data / folder / re.sub(r"\W+", "-", self.system)
        models = (self.given.embedding_model, self.given.qa_model_name_or_path, self.given.precision)
        made_of = (self.commands, [need.recipe for need in self.needs], models, self.seed if self.trains else "")
        self.recipe = fingerprint(str(made_of), self.files["content"])

    @property
    def mark(self) -> dict[str, Any]:
        """What was run so far, and how long it took; empty at first."""
        path = self.place / "cell.json"
        mark = read_json(path) if path.exists() else {}
        if mark.get("recipe", self.recipe) != self.recipe:
            raise SystemExit(f"error: {self.place}: made of other data, models or settings; delete it or name another "
                             "--output_dir")  # fmt: skip
        return mark

    def make(self, draw: bool) -> None:
        """Run what is missing of this cell and of those that it needs."""
        if (mark := self.mark).get("finished") or draw:
            return
        for need in self.needs:
            need.make(draw)
        print(f"{self.place} ...", file=sys.stderr, flush=True)
        mark = {"steps": [], **mark, "recipe": self.recipe, "resumed": bool(mark)}
        write_json(self.place / "cell.json", mark)
        for command in self.commands[len(mark["steps"]) :]:
            took = [run_command(line, self.place / "log.txt") for line in self.lines(command)]
            seconds, peaks = zip(*took, strict=True)
            mark["steps"].append({"command": command, "seconds": sum(seconds), "peak_gib": max(peaks)})
            write_json(self.place / "cell.json", mark)
        for pattern in ("checkpoint-*", "index-*", "model/checkpoint-*"):  # many times as large as what stays
            for leftover in self.place.glob(pattern):
                shutil.rmtree(leftover)
        if self.system in RETRIEVERS | READERS:
            read_predictions(self.place)  # or an error
        write_json(self.place / "cell.json", mark | {"finished": True, "machine": machine_line(machine())})

    def lines(self, command: str) -> Iterator[list[str]]:
        """The command line of a command, behind those that choose its {weight}, if it has one."""
        name, *flags = shlex.split(command)
        values = {"E": self.given.embedding_model, "L": self.given.qa_model_name_or_path, **self.files}
        values |= {"own": str(self.place), **{need.system: str(need.place) for need in self.needs}}
        peer = name in ("sentence_transformers", "trl")
        script = [str(HERE / "learning_peers.py"), name] if peer else [str(HERE.parent / "bin" / name)]
        script += ["--document_path", values["documents"], "--bf16", str(self.given.precision == "bf16").lower()]

        def line(place: Path, questions: str, weight: str = "") -> list[str]:
            own = ["--eval_data_path", questions, "--output_dir", str(place)]
            if not name.startswith("evaluate_"):
                own = ["--train_file", values["train"], "--eval_file", values["eval"], "--seed", str(self.seed)]
                own += ["--save_steps", "50", "--resume_from_checkpoint", "true"]
                own += ["--output_dir", str(place / "model" if peer else place)]
            filled = (re.sub(r"\{([^{}]+)\}", lambda m: (values | {"weight": weight})[m[1]], flag) for flag in flags)
            return [*script, *own, *filled]

        found = {}
        for weight in WEIGHTS if "{weight}" in command else ():
            yield line(place := self.place / f"eval-{weight}", values["eval"], str(weight))
            found[weight] = read_json(place / SCORES)["test_retr/mrr@10"]
        yield line(self.place, values["test"], str(max(found, key=found.__getitem__, default="")))


def run_command(line: Sequence[str], log: Path) -> tuple[float, float]:
    """Run a Python script, its output going to a file. -> seconds, and GiB that it held at most"""
    began = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        print("\n$", shlex.join(line), file=file, flush=True)
        with subprocess.Popen([sys.executable, *line], stdout=file, stderr=subprocess.STDOUT) as running:
            try:
                _, status, usage = os.wait4(running.pid, 0)
            except BaseException:
                running.terminate()  # a trainer saves a checkpoint and ends
                raise
            running.returncode = os.waitstatus_to_exitcode(status)
    if running.returncode:
        raise subprocess.CalledProcessError(running.returncode, f"the last of {log}")
    return time.monotonic() - began, usage.ru_maxrss / 2**20


# ---------------------------------------------------------------- the table


def rows_of(cells: dict[tuple[str, str], list[Cell]]) -> Iterator[dict[str, Any]]:
    """A row for each system with finished cells, of those seeds."""
    first: dict[Any, dict[int, np.ndarray]] = {}  # of each data set: the scores of the first retriever and reader
    for (data, system), row in cells.items():
        if not (done := [cell for cell in row if cell.mark.get("finished")]) or system == "reranker":
            continue
        kind, trains = int(system in READERS), done[0].trains
        values = {cell.seed: scores_of(cell.place, list(METRICS[kind].values())) for cell in done}
        before = first.setdefault((data, kind), values)
        scores = np.stack(list(values.values()))  # [S, n, M]
        gaps = np.stack([values[seed] - before[seed] for seed in values.keys() & before.keys()])
        marks = [[each.mark for each in cell.all] for cell in done]
        steps = [step for cell in marks for mark in cell for step in mark["steps"]]
        named = {"scores": scores.mean((0, 1)), "intervals": intervals(scores)}
        if before is not values:
            named |= {"difference": gaps.mean((0, 1)), "difference_intervals": intervals(gaps)}
        yield {
            "data": data, "kind": kind, "system": system, "n": scores.shape[1], "seeds": len(done) if trains else 0,
            **{key: by_name(kind, value) for key, value in named.items()},
            "by_seed": [by_name(kind, each) for each in scores.mean(1)] if trains else [],
            "minutes": round(sum(step["seconds"] for step in steps) / 60 / len(done), 2),
            "resumed": any(mark["resumed"] for cell in marks for mark in cell),  # minutes before that are not known
            "peak_gib": round(max(step["peak_gib"] for step in steps), 2),
            "machines": sorted({mark["machine"] for cell in marks for mark in cell}),
        }  # fmt: skip


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
    for _ in range(100):
        seeds, questions = (chance.multinomial(size, [1 / size] * size, 100) / size for size in (S, n))  # [R, size]
        samples.append(np.einsum("rs,srm->rm", seeds, questions @ values))
    return interval(np.concatenate(samples))


def by_name(kind: int, values: np.ndarray) -> dict[str, Any]:
    return dict(zip(METRICS[kind], values.round(4).tolist(), strict=True))


def report(given: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """The tables, the page and a JSON line."""
    text = io.StringIO()
    with redirect_stdout(text):
        for data, kind in dict.fromkeys((row["data"], row["kind"]) for row in rows):
            shown, cells = [row for row in rows if (row["data"], row["kind"]) == (data, kind)], []
            for row in shown:
                scores = [f"{score:.3f}" for score in row["scores"].values()]
                if "difference" in row:
                    gaps = zip(row["difference"].values(), row["difference_intervals"].values(), strict=True)
                    told = (f" {gap:+.3f} ({low:+.3f} to {high:+.3f})" for gap, (low, high) in gaps)
                    scores = [score + more for score, more in zip(scores, told, strict=True)]
                took = f"{'>' * row['resumed']}{row['minutes']:.1f}"
                cells.append((row["system"], row["seeds"] or "", *scores, took, f"{row['peak_gib']:.1f}"))
            print_table([f"{data}, {shown[0]['n']} questions", "seeds", *METRICS[kind], "minutes", "GiB"], cells)
            print()
        print(*sorted({machine for row in rows for machine in row["machines"]}), sep="\n")
    print(text.getvalue(), end="")
    if given.html:
        write_page(Path(given.html), rows, text.getvalue())
    print_result(__file__, given, rows)


if __name__ == "__main__":
    main()
