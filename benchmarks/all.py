#!/usr/bin/env python
"""Run every benchmark beside its peers, keep this machine's results, and redraw README.md.

    python benchmarks/all.py --model_name_or_path M --embedding_model E                             # pydocs
    python benchmarks/all.py ... --data_dir D           # has documents.pkl, {train,eval}_w_qa.jsonl
    python benchmarks/all.py ... --short            # smaller sizes, all but `learning`: 2.5 hours on two cores
    python benchmarks/all.py ... --only limits rpg_step                             # keeps the other results
    python benchmarks/all.py --draw                                                 # only README.md and the plots

M is a causal language model and E a BERT-like encoder; the default is the quickstart's two models, from PyPI. Each
result is written to results/<machine>.json as soon as its benchmark ends; every machine has a file of its own. Run
nothing else meanwhile; on two cores this takes days, most of them for `learning`. Needs
`pip install -e ".[bench,quickstart,milvus]" milvus-lite "transformers[serving]"`.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from pydocs.wheels import MINILM, SMOLLM2, fetch_model

from rqa.evaluation.runtime import machine, machine_line
from rqa.runtime.files import cache_root, write_json

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE / "README.md"
BENCHMARKS = {  # name -> flags; {M}, {E}: models; a data file's flag gets its path in --data_dir
    "limits": "--model_name_or_path {M} --embedding_model {E} --train_file --document_path --precision {P}",
    "train_throughput": "--model_name_or_path {M} --embedding_model {E} --train_file --document_path --precision {P}",
    "retriever_training": "--model_name_or_path {E} --train_file --document_path --precision {P}",
    "reranking": "--model_name_or_path {E} --eval_data_path --document_path --precision {P}",
    "rpg_step": "--model_name_or_path {E} --lm_model_path {M} --train_file --document_path --precision {P}",
    "fusion_in_decoder": "--tokenizer {E} --train_file --document_path --precision {P}",
    "evaluation_runtime": (
        "--qa_model_name_or_path {M} --embedding_model {E} --eval_data_path --document_path --precision {P}"
    ),
    "serving": "--qa_model_name_or_path {M} --embedding_model {E} --eval_data_path --document_path --precision {P}",
    "retrieval_latency": "--embedding_model {E} --eval_data_path --document_path --precision {P}",
    "data_preparation": "--model_name_or_path {E} --passages 100000",
    "indexing": "--embedding_model {E}",
    "index_refresh": "--model_name_or_path {E} --train_file --eval_file --document_path",
    "learning": "--embedding_model {E} --qa_model_name_or_path {M} --data --output_dir {O} --precision {P}",
}
SHORT = {  # name -> flags that make it short
    "limits": "",
    "train_throughput": "--steps 3",
    "retriever_training": "--steps 3 --batch_size 32",
    "reranking": "--questions 8",
    "rpg_step": "--steps 3 --num_docs 8",
    "fusion_in_decoder": "--steps 3 --batch_size 1",
    "evaluation_runtime": "--max_examples 32",
    "serving": "--questions 16",
    "retrieval_latency": "--sizes 100000 --seconds 1",
    "data_preparation": "",
    "indexing": "--only build speed peers search --sizes 10000 100000 --encoded 3000",
    "index_refresh": "--steps 20 --every 10 --only 1 3",
}
FILES = {
    "--train_file": "train_w_qa.jsonl",
    "--eval_file": "eval_w_qa.jsonl",
    "--eval_data_path": "eval_w_qa.jsonl",
    "--document_path": "documents.pkl",
    "--data": "",  # --data_dir itself
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="a causal language model")
    parser.add_argument("--embedding_model", help="a BERT-like encoder")
    parser.add_argument("--data_dir", help="a corpus with its questions; by default that of pydocs.corpus")
    parser.add_argument("--precision", choices=["bf16", "float32"], default="float32")
    parser.add_argument("--only", nargs="*", choices=list(BENCHMARKS))
    parser.add_argument("--short", action="store_true", help="smaller sizes; without --only, all but `learning`")
    parser.add_argument("--flags", default="", help="further flags for each of them, in one string")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    names = arguments.only or list(SHORT if arguments.short else BENCHMARKS)
    for name in [] if arguments.draw else names:
        keep(name, run(name, arguments))
    draw()


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a benchmark. -> its table, result and command"""
    models = {
        "M": arguments.model_name_or_path or fetch_model(SMOLLM2),
        "E": arguments.embedding_model or fetch_model(MINILM),
        "O": cache_root() / "benchmarks" / "learning",
        "P": arguments.precision,
    }
    line = []
    for flag in BENCHMARKS[name].split():
        if flag not in FILES:
            line.append(flag.format(**models))
        elif arguments.data_dir:
            line += [flag, str(Path(arguments.data_dir) / FILES[flag])]
    line += shlex.split(f"{SHORT.get(name, '') if arguments.short else ''} {arguments.flags}")
    print(f"{name} ...", file=sys.stderr, flush=True)
    command = [sys.executable, str(HERE / f"{name}.py"), *line]
    *table, result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    shown = [Path(part).name if "/" in part else part for part in line]
    return {"command": f"python benchmarks/{name}.py {shlex.join(shown)}", "table": table, **json.loads(result)}


def keep(name: str, result: dict[str, Any]) -> None:
    """Add a result to this machine's file."""
    where = machine()
    path = RESULTS / (re.sub(r"\W+", "-", where["gpu"] or f"{where['cpu']} x{where['cores']}").lower() + ".json")
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, {**kept, name: result})


def draw() -> None:
    """Redraw the part of README.md below its mark, and one plot for each machine, from all kept results."""
    introduction, mark, _ = README.read_text(encoding="utf-8").partition("<!-- below: drawn by all.py -->\n")
    parts = [introduction, mark]
    for path in sorted(RESULTS.glob("*.json")):
        kept = json.loads(path.read_text(encoding="utf-8"))
        first = next(iter(kept.values()))
        versions = {name: version for result in kept.values() for name, version in result["peers"].items()}
        peers = ", ".join(f"{name} {version}" for name, version in versions.items())
        parts.append(f"\n## {first['gpu'] or first['cpu']}\n\n{machine_line(first)}; peers: {peers}\n")
        if bars := [bar for name, result in kept.items() for bar in ratios(name, result["rows"])]:
            plot(path.with_suffix(".svg"), bars)
            parts.append(f"\n![rqa beside its peers]({path.with_suffix('.svg').relative_to(HERE)})\n")
        for name in BENCHMARKS:
            if name in kept:
                table = "\n".join(kept[name]["table"])
                parts.append(f"\n### {name}\n\n```\n$ {kept[name]['command']}\n\n{table}\n```\n")
    README.write_text("".join(parts), encoding="utf-8")


def ratios(name: str, rows: Any) -> Iterator[tuple[str, float]]:
    """Every comparison in a result: its label, and how many times as fast rqa is."""
    for row in rows.values() if isinstance(rows, dict) else rows:
        if isinstance(row, dict):
            if "rqa_is" in row:
                details = [str(row[key]) for key in ("system", "num_docs", "setting") if key in row]
                yield f"{name}: {', '.join(details)}", row["rqa_is"]
            yield from ratios(name, row)


def plot(path: Path, bars: list[tuple[str, float]]) -> None:
    """Draw one bar for each peer on a logarithmic scale; bars start at one, where a peer is as fast as rqa."""
    figure = Figure((9, 0.6 + 0.22 * len(bars)), layout="constrained")
    axes = figure.subplots()
    labels, times = zip(*bars[::-1], strict=True)
    colours = ["#2a6f97" if ratio >= 1 else "#bc6c25" for ratio in times]
    drawn = axes.barh(range(len(bars)), [ratio - 1 for ratio in times], left=1, color=colours)
    axes.bar_label(drawn, [f" {ratio:.2f}x " for ratio in times])
    axes.set_yticks(range(len(bars)), labels)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.axvline(1, color="black")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.margins(x=0.1, y=0.01)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):  # small and reproducible
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
