#!/usr/bin/env python
"""What does training a retriever bring, and what a reranker behind it? Recall and MRR, several seeds, beside peers.

    python benchmarks/retriever_learning.py --model_name_or_path M --output_dir out/learning        # pydocs
    python benchmarks/retriever_learning.py ... --document_path documents.jsonl --train_file train_w_qa.jsonl \\
        --eval_file test_w_qa.jsonl --lm_model_path L --rpg "--num_docs 8 --max_steps 60"
    python benchmarks/retriever_learning.py ... --max_train 64 --max_eval 20 --epochs 1 --seeds 0   # tiny

All systems train on the same questions and search the whole database. Each dense retriever is measured alone and fused
with BM25 by a weighted sum, whose weight is the best for the untrained encoder on the training questions; each of
these again with a reranker behind it, one of each seed, trained on the same questions from the same model (`x 0.5`:
half of a sum with the retriever's scores). The reranker also teaches a retriever (`distilled`). The peer is
sentence-transformers with MultipleNegativesRankingLoss on the same pairs for as many epochs. `--dims` cuts embeddings,
of CTL without and with `--matryoshka_dims`.

Scores are means over seeds. 95 % intervals come from resampled questions and seeds, those of differences by pairs. A
run that was killed goes on: what `--output_dir` holds is neither trained nor measured again. `--ctl`, `--rpg` and so
on come last on their trainer's command line. Needs `pip install -e ".[bench]"`.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import numpy as np
from harness import new_parser, print_result, print_table, read_corpus

from rqa.data import Document, Example, write_examples
from rqa.documents import Places, keys_of, write_documents
from rqa.evaluation.results import difference_intervals, interval, mean_intervals
from rqa.evaluation.retrieval import retrieval_rows
from rqa.models.encoder import EncoderArguments, load_encoder
from rqa.models.reranker import load_reranker
from rqa.prompts import retrieval_query
from rqa.retrieval.fusion import choose_weight
from rqa.retrieval.hybrid import HybridRetriever, LexicalRetriever
from rqa.retrieval.reranking import RerankingArguments, RerankingRetriever
from rqa.retrieval.retriever import Hits, PassageRetriever, Retriever
from rqa.runtime.files import atomic_file, fingerprint, read_json, write_json

METRICS = ("retr/recall@1", "retr/recall@4", "retr/recall@10", "retr/mrr@10")
SYSTEMS = ("untrained", "CTL", "RPG", "distilled", "sentence-transformers", "nested CTL")
NARROW = ("untrained", "CTL", "nested CTL")  # measured with fewer dimensions, too
BIN = Path(__file__).resolve().parents[1] / "bin"
RESAMPLES = 10_000


def main() -> None:
    arguments = parse()
    output = Path(arguments.output_dir)
    documents, train, held_out = read_inputs(arguments)
    write_documents(output / "documents.jsonl", documents)
    write_examples(output / "train.jsonl", train)
    lexical = LexicalRetriever(documents)
    weight = best_weight(open_dense(arguments.model_name_or_path, documents, output), lexical, train)
    seeds = [dict(measure_seed(arguments, seed, lexical, weight, train, held_out)) for seed in arguments.seeds]
    report(arguments, weight, {name: np.stack([seed[name] for seed in seeds]) for name in seeds[0]})


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__, "--train_file", "--eval_file")
    parser.add_argument("--model_name_or_path", required=True, help="the encoder to start from, and the reranker")
    parser.add_argument("--output_dir", required=True, help="where models, embeddings, scores and the data go")
    parser.add_argument("--lm_model_path", help="the language model of RPG; without it, RPG is left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", choices=SYSTEMS, default=list(SYSTEMS), help="beside BM25")
    parser.add_argument("--rerank_depth", type=int, default=30, help="passages that the reranker reads; 0: no reranker")
    parser.add_argument("--rerank_weights", type=float, nargs="*", default=[1.0, 0.5], help="its shares of a sum")
    parser.add_argument("--dims", type=int, nargs="*", default=[384, 192, 96, 48], help="widths of embeddings")
    parser.add_argument("--epochs", type=float, default=3, help="of CTL, of the reranker and of the peer")
    parser.add_argument("--learning_rate", default="2e-5", help="of CTL and of the peer")
    parser.add_argument("--batch_size", default="64", help="of CTL and of the peer")
    parser.add_argument("--ctl", default="", help="further flags of bin/train_ctl, in one string")
    parser.add_argument("--rpg", default="", help="further flags of bin/train_rpg with the language model")
    parser.add_argument("--rerank", default="", help="further flags of bin/train_rerank")
    parser.add_argument("--distil", default="", help="further flags of bin/train_rpg with the reranker as teacher")
    parser.add_argument("--max_train", type=int, help="use so many training questions")
    parser.add_argument("--max_eval", type=int, help="use so many questions to measure on")
    return parser.parse_args()


def read_inputs(arguments: argparse.Namespace) -> tuple[Sequence[Document], list[Example], list[Example]]:
    """Documents, training questions and the questions to measure on."""
    documents, train, held_out = read_corpus(arguments.document_path, arguments.train_file, arguments.eval_file)
    return documents, list(train[: arguments.max_train]), list(held_out[: arguments.max_eval])


# ---------------------------------------------------------------- training


def trainers(arguments: argparse.Namespace, seed: int, reranker: str, train: Sequence[Example]) -> dict[str, Callable]:
    """The systems of one seed: name -> what trains it, if need be, and tells the model's directory."""
    schedule = ["--num_train_epochs", arguments.epochs, "--learning_rate", arguments.learning_rate]
    schedule += ["--per_device_train_batch_size", arguments.batch_size, "--warmup_ratio", "0.1"]
    ctl = [*schedule, *shlex.split(arguments.ctl)]
    nested = [*ctl, "--matryoshka_dims", *arguments.dims]
    language_model = ["--lm_model_path", arguments.lm_model_path, *shlex.split(arguments.rpg)]
    distil = ["--lm_model_path", f"reranker::{reranker}", "--num_docs", "16", "--retrieve_temperature", "0.05"]
    distil += ["--refresh_step", "40", "--learning_rate", arguments.learning_rate, "--warmup_ratio", "0.1"]
    distil += shlex.split(arguments.distil)
    systems = {
        "untrained": lambda: arguments.model_name_or_path,
        "CTL": lambda: train_rqa(arguments, seed, "CTL", "train_ctl", ctl),
        "RPG": lambda: train_rqa(arguments, seed, "RPG", "train_rpg", language_model),
        "distilled": lambda: train_rqa(arguments, seed, "distilled", "train_rpg", distil),
        "sentence-transformers": lambda: train_sentence_transformers(arguments, seed, train),
        "nested CTL": lambda: train_rqa(arguments, seed, "nested-CTL", "train_ctl", nested),
    }
    needs = {"RPG": arguments.lm_model_path, "distilled": reranker, "nested CTL": arguments.dims}
    return {name: make for name, make in systems.items() if name in arguments.only and needs.get(name, True)}


def train_rqa(arguments: argparse.Namespace, seed: int, name: str, executable: str, flags: Sequence[Any]) -> str:
    """Run one of the product's executables; the directory of its model."""
    output = Path(arguments.output_dir)
    directory = output / f"seed-{seed}" / name
    line = [executable, "--model_name_or_path", arguments.model_name_or_path, "--output_dir", directory]
    line += ["--train_file", output / "train.jsonl", "--document_path", output / "documents.jsonl", "--seed", seed]
    line += ["--eval_strategy", "no", "--save_strategy", "no", "--overwrite_output_dir", "true"]
    line += ["--bf16", str(arguments.precision == "bf16").lower(), *flags]
    if not is_trained(directory, line := list(map(str, line)), output):
        subprocess.run([sys.executable, str(BIN / executable), *line[1:]], check=True, stdout=sys.stderr)
        finished(directory, line, output)
    return str(directory)


def train_sentence_transformers(arguments: argparse.Namespace, seed: int, train: Sequence[Example]) -> str:
    """The peer as its documentation starts it, on pairs of question and gold passage."""
    output = Path(arguments.output_dir)
    directory = output / f"seed-{seed}" / "sentence-transformers"
    asked = [arguments.model_name_or_path, arguments.precision, arguments.learning_rate, arguments.batch_size]
    if is_trained(directory, asked := [*asked, str(arguments.epochs)], output):
        return str(directory)
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = SentenceTransformer(arguments.model_name_or_path, device=None if torch.cuda.is_available() else "cpu")
    pairs = {
        "anchor": [retrieval_query(example) for example in train],
        "positive": [example.gold_docs[0].fmt_content for example in train],
    }
    settings = SentenceTransformerTrainingArguments(
        str(output / "trainer"),
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=int(arguments.batch_size),
        learning_rate=float(arguments.learning_rate),
        warmup_ratio=0.1,
        seed=seed,
        bf16=arguments.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
    )
    loss = MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model, settings, train_dataset=Dataset.from_dict(pairs), loss=loss)
    with redirect_stdout(sys.stderr):  # it prints what it logs, and a table is to come
        trainer.train()
    model.save(str(directory))
    finished(directory, asked, output)
    return str(directory)


def is_trained(directory: Path, asked: list[str], output: Path) -> bool:
    """Whether a model of these settings and questions is there; one of others is refused, for hours went into it."""
    mark = directory / "trained.json"
    if mark.exists() and read_json(mark) != {"asked": asked, "data": data_of(output)}:
        raise SystemExit(f"error: {directory}: trained with other flags or questions; delete it, or its output_dir")
    return mark.exists()


def finished(directory: Path, asked: list[str], output: Path) -> None:
    write_json(directory / "trained.json", {"asked": asked, "data": data_of(output)})


def data_of(output: Path) -> str:
    return fingerprint(*((output / name).read_text(encoding="utf-8") for name in ("documents.jsonl", "train.jsonl")))


# ---------------------------------------------------------------- measuring


def measure_seed(
    arguments: argparse.Namespace, seed: int, lexical: LexicalRetriever, weight: float,
    train: Sequence[Example], held_out: Sequence[Example],
) -> Iterator[tuple[str, np.ndarray]]:  # fmt: skip
    """Every system of one seed, each trained when it is its turn, and its scores. -> (name, [n, M])"""
    output, documents, depth, path = Path(arguments.output_dir), lexical.documents, arguments.rerank_depth, ""
    kept = output / f"seed-{seed}" / "scores.json"
    if depth:
        index = ["--embedding_model", arguments.model_name_or_path, "--index_path", output / "index"]
        flags = ["--negatives_from", "both", *index, "--num_train_epochs", arguments.epochs, "--warmup_ratio", "0.1"]
        path = train_rqa(arguments, seed, "reranker", "train_rerank", [*flags, *shlex.split(arguments.rerank)])
        reranker = load_reranker(path, RerankingArguments())
        reranker.score = remembered(reranker.score)  # systems find the same passages

    def measured(name: str, retriever: PassageRetriever) -> Iterator[tuple[str, np.ndarray]]:
        yield name, measure(kept, name, retriever, held_out)
        for share in arguments.rerank_weights if depth and name in ranked_anew else []:
            title = f"{name} + reranker" + f" x {share:g}" * (share < 1)
            yield title, measure(kept, title, RerankingRetriever(retriever, reranker, depth, share), held_out)

    ranked_anew = {f"{name}{fused}" for name in ("BM25", *SYSTEMS[:-1]) for fused in ("", " + BM25")}
    yield from measured("BM25", lexical)
    for name, make in trainers(arguments, seed, path, train).items():
        dense = open_dense(make(), documents, output)
        yield from measured(name, dense)
        yield from measured(f"{name} + BM25", HybridRetriever(dense, lexical, "weighted", weight))
        for width in arguments.dims if name in NARROW else []:
            yield from measured(f"{name} at {width}", Narrow(dense, vectors_of(dense, output), width))


def open_dense(path: str, documents: Sequence[Document], output: Path) -> Retriever:
    dense = Retriever(load_encoder(path, EncoderArguments()), documents)
    dense.replace(vectors_of(dense, output))
    return dense


def vectors_of(dense: Retriever, output: Path) -> np.ndarray:
    """Embeddings of all documents, kept on disk. [N, D]"""
    path = output / "embeddings" / f"{dense.stamp()}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, dense.encode(dense.encoder))
    return np.load(path)


def best_weight(dense: Retriever, lexical: LexicalRetriever, train: Sequence[Example]) -> float:
    """The dense share that suits the untrained encoder: a trained one knows the training questions too well."""
    places = Places(keys_of(lexical.documents))
    gold = [{*places(keys_of(example.gold_docs)).tolist()} - {-1} for example in train]
    candidates = HybridRetriever(dense, lexical).candidates([retrieval_query(example) for example in train])
    return choose_weight(*candidates, gold)


class Narrow(PassageRetriever):
    """Exact search by the first components of embeddings, which get length 1 again."""

    def __init__(self, dense: Retriever, vectors: np.ndarray, width: int) -> None:
        self.dense, self.documents, self.width = dense, dense.documents, width
        self.vectors = self.cut(vectors)

    def cut(self, vectors: np.ndarray) -> np.ndarray:
        vectors = vectors[:, : self.width]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def retrieve(self, questions: Sequence[str], k: int) -> Hits:
        encoder = self.dense.encoder
        scores = self.cut(encoder.embed(encoder.tokenize_queries(questions))) @ self.vectors.T  # [Q, N]
        ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return Hits(ids, np.take_along_axis(scores, ids, axis=1))

    def identity(self) -> str:
        return fingerprint(self.dense.identity(), str(self.width))


def remembered(score: Callable[[Sequence[Any]], np.ndarray]) -> Callable[[Sequence[Any]], np.ndarray]:
    """The function, never asked twice for one pair."""
    known: dict[Any, float] = {}

    def ask(pairs: Sequence[Any]) -> np.ndarray:
        new = [pair for pair in dict.fromkeys(pairs) if pair not in known]
        known.update(zip(new, score(new).tolist(), strict=True))
        return np.array([known[pair] for pair in pairs], dtype=np.float32)

    return ask


def measure(kept: Path, name: str, retriever: PassageRetriever, examples: Sequence[Example]) -> np.ndarray:
    """The scores of each question with gold passages; kept in a file of the seed. [n, M]"""
    questions = [retrieval_query(example) for example in examples]
    identity, known = fingerprint(retriever.identity(), *questions), read_json(kept) if kept.exists() else {}
    if known.get(name, {}).get("identity") != identity:
        rows = retrieval_rows(retriever.documents_of(retriever.retrieve(questions, 10)), examples, (1, 4, 10))
        scores = [[row["scores"][metric] for metric in METRICS] for row in rows if row["scores"]]
        write_json(kept, known | {name: {"identity": identity, "scores": scores}})
        means = dict(zip(METRICS, np.mean(scores, axis=0).round(4).tolist(), strict=True))
        print(f"{kept.parent.name}, {name}: {means}", file=sys.stderr, flush=True)
        return np.array(scores)
    return np.array(known[name]["scores"])


# ---------------------------------------------------------------- the tables


def intervals(values: np.ndarray) -> np.ndarray:
    """95 % intervals of means over seeds and questions, both resampled. [S, n, M] -> [M, 2]"""
    if len(values) == 1:
        return difference_intervals(values[0])
    chance, (S, n, _) = np.random.default_rng(0), values.shape
    samples = []
    for _ in range(RESAMPLES // 100):
        seeds, questions = (chance.multinomial(size, [1 / size] * size, 100) / size for size in (S, n))  # [R, size]
        samples.append(np.einsum("rs,srm->rm", seeds, questions @ values))
    return interval(np.concatenate(samples))


def report(arguments: argparse.Namespace, weight: float, values: dict[str, np.ndarray]) -> None:
    """Means, differences from BM25, from the best without a reranker and from CTL, narrow embeddings, a JSON line."""
    means = {name: each.mean(axis=(0, 1)) for name, each in values.items()}
    whole = [name for name in values if " at " not in name]
    plain = [name for name in whole if "reranker" not in name and not name.startswith("distilled")]
    references = dict.fromkeys(["BM25", max(plain, key=lambda name: means[name][-1]), *({"CTL"} & values.keys())])
    rows = []
    for name in values:
        same = (values[name] == values[name][:1]).all()  # of all seeds
        ends = mean_intervals(values[name][0]) if same else intervals(values[name])
        row = {"system": name, "n": values[name].shape[1], "scores": by_metric(means[name])}
        row |= {"intervals": by_metric(ends), "by_seed": [by_metric(each) for each in values[name].mean(axis=1)]}
        gaps = {other: values[name] - values[other] for other in references if other != name and name in whole}
        row["beside"] = {
            other: {"difference": by_metric(gap.mean(axis=(0, 1))), "intervals": by_metric(intervals(gap))}
            for other, gap in gaps.items()
        }
        rows.append(row)
    header = [metric.removeprefix("retr/") for metric in METRICS]
    shown = [row for row in rows if row["system"] in whole]
    cells = "{:.3f} ({:.2f}-{:.2f})"
    print_table(
        [f"{len(arguments.seeds)} seed(s), {rows[0]['n']} questions", *header],
        [(row["system"], *(cells.format(row["scores"][m], *row["intervals"][m]) for m in METRICS)) for row in shown],
    )
    for other in references:
        print()
        beside = [(row["system"], row["beside"][other]) for row in shown if other in row["beside"]]
        cells = "{:+.3f} ({:+.3f} to {:+.3f})"
        print_table(
            [f"more than {other}", *header],
            [
                (name, *(cells.format(gap["difference"][m], *gap["intervals"][m]) for m in METRICS))
                for name, gap in beside
            ],
        )
    if narrow := [name for name in NARROW if f"{name} at {min(arguments.dims, default=0)}" in values]:
        print()
        print_table(
            ["recall@4 of embeddings cut to", *arguments.dims],
            [(name, *(f"{means[f'{name} at {width}'][1]:.3f}" for width in arguments.dims)) for name in narrow],
        )
    print_result(__file__, arguments, rows, dense_share=weight)


def by_metric(values: np.ndarray) -> dict[str, Any]:
    return dict(zip(METRICS, values.round(4).tolist(), strict=True))


if __name__ == "__main__":
    main()
