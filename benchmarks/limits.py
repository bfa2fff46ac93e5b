#!/usr/bin/env python
"""How far is each hot path from the machine's limit, and where does the rest of its time go?

    python benchmarks/limits.py --model_name_or_path M --embedding_model E                          # pydocs
    python benchmarks/limits.py ... --train_file train_w_qa.jsonl --document_path documents.pkl
    python benchmarks/limits.py ... --only "SFT step" "document encoding" --steps 1                 # two of the paths

The limit of a path is a sum over its matrix products, attention included. Each product counts the larger of two times:
its floating-point operations at the rate of a large matrix product, and the bytes that it reads and writes at the rate
of a large copy. Both rates are measured before and after each run, because the speed of a shared machine varies. All
other work counts as loss, because it could be fused into a product or overlapped with it. The limit of tokenisation is
the `tokenizers` library alone. torch.profiler says where the time goes: shares of the operators' own time, and `Python`
for all time between operators, which the profiler itself lengthens.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from harness import matmul_rate, new_parser, print_table, read_corpus, run_benchmark, with_passages
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from rqa.data import Document, Example
from rqa.evaluation.runtime import seconds
from rqa.models.encoder import Encoder, EncoderArguments, load_encoder
from rqa.models.encoder_decoder import load_encoder_decoder
from rqa.models.loading import load_causal_lm, load_tokenizer
from rqa.models.reader import CausalLMReader
from rqa.objectives.ctl import Contrastive, ContrastiveBatch
from rqa.objectives.dca import CrossAttentionScorer
from rqa.objectives.encoding import in_chunks
from rqa.objectives.fid import FiDLikelihood
from rqa.objectives.rpg import LikelihoodArguments, ListObjective, RetrievedCandidates, ScoredCandidates
from rqa.objectives.sft import AnswerLikelihood
from rqa.objectives.teacher import Pair, Teacher, local_scorer
from rqa.prompts import PromptArguments, Prompter
from rqa.recipe.system import ReaderArguments
from rqa.retrieval.faiss_index import FaissIndex
from rqa.retrieval.index import IndexArguments
from rqa.retrieval.retriever import Retriever
from rqa.runtime.distributed import device
from rqa.training.arguments import LoopArguments
from rqa.training.optim import Optimization

ATTENTION = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": sdpa_flop_count,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": sdpa_backward_flop_count,
}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", *ATTENTION)
MOVES = ("copy_", "cat", "index", "embedding", "gather", "scatter", "fill_", "zero_", "stack", "resize_")


@dataclass
class Rates:
    """Present speed of the machine: floating-point operations a second by type, and bytes a second."""

    products: dict[torch.dtype, float]
    memory: float

    @classmethod
    def measure(cls, dtype: torch.dtype) -> "Rates":
        return cls({kind: matmul_rate(kind) * 1e9 for kind in {dtype, torch.float32}}, memory_rate())

    def needed(self, flops: float, size: int, dtype: torch.dtype) -> float:
        """Least seconds for one product that reads and writes so many bytes."""
        return max(flops / self.products.get(dtype, self.products[torch.float32]), size / self.memory)


@dataclass
class Work:
    """One hot path, ready to run."""

    run: Callable[[], Any]  # does the work once
    units: tuple[int, str]  # amount of work, and its unit
    floor: Callable[[Rates], float] = lambda rates: 0.0  # least seconds of work other than the recorded products


class Products(TorchDispatchMode):
    """Records floating-point operations, bytes and type of every product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, int, torch.dtype]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = function._overloadpacket
        if packet not in flop_registry:
            with self:
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = function(*args, **kwargs)
        name = function._schema.name
        if name in ATTENTION:
            tensors = [argument for argument in args if isinstance(argument, torch.Tensor)]
            shapes = [tensor.shape for tensor in tensors[: 4 if name.endswith("backward") else 3]]
            causal = any(argument is True for argument in args)  # a causal mask hides half
            flops = ATTENTION[name](*shapes) / (1 + causal)
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=result)
        else:
            return result
        touched = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        size = sum(tensor.numel() * tensor.element_size() for tensor in touched)
        self.seen.append((flops, size, touched[0].dtype))
        return result


def main() -> None:
    parser = new_parser(__doc__, "--train_file", systems=PATHS)
    parser.add_argument("--model_name_or_path", required=True, help="a causal LM: reader and RPG's teacher")
    parser.add_argument("--embedding_model", required=True, help="a BERT-like encoder; FiD is built from it, too")
    parser.add_argument("--documents", type=int, default=512, help="how many are encoded and indexed")
    parser.add_argument("--steps", type=int, default=3, help="measured runs, after a warm-up")
    run_benchmark(__file__, parser.parse_args(), dict.fromkeys(PATHS, ("tuned",)), measure, report)


def report(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    print_table(
        ["", "of", "GFLOP", "GB", "limit s", "takes s", "spread", "of limit", "products", "element-wise", "moves",
         "optimizer", "Python"],
        [
            [row["system"], row["units"], f"{row['gflop']:.1f}", f"{row['gb']:.1f}", f"{row['limit']:.3f}",
             f"{row['median']:.3f}", "{:.3f}-{:.3f}".format(*row["spread"]), f"{row['of_limit']:.0%}",
             *(f"{row['shares'][name]:.0%}" for name in ("products", "element-wise", "moves", "optimizer", "Python"))]
            for row in rows
        ],
    )  # fmt: skip


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(arguments)
    path = PATHS[arguments.system](bench)
    path.run()  # warm-up
    with Products() as products:
        path.run()
    rates, took, limits = [Rates.measure(bench.dtype)], [], []
    for _ in range(arguments.steps):
        took.append(seconds(path.run))
        rates.append(Rates.measure(bench.dtype))
        allowed = [sum(rate.needed(*product) for product in products.seen) + path.floor(rate) for rate in rates[-2:]]
        limits.append(statistics.mean(allowed))
    return {
        "units": "{} {}".format(*path.units),
        "gflop": sum(flops for flops, _, _ in products.seen) / 1e9,
        "gb": sum(size for _, size, _ in products.seen) / 1e9,
        "limit": statistics.median(limits),
        "of_limit": statistics.median(limit / taken for limit, taken in zip(limits, took, strict=True)),
        "median": statistics.median(took),
        "spread": [min(took), max(took)],
        "shares": shares(path.run),
        "product_gflops": statistics.median(rate.products[bench.dtype] for rate in rates) / 1e9,
        "copy_gb_per_second": statistics.median(rate.memory for rate in rates) / 1e9,
    }


def memory_rate(size: int = 2**27) -> float:
    """Measure the bytes a second that a large copy reads and writes, as the median of several copies."""
    source = torch.ones(size // 4, device=device())
    target = torch.empty_like(source)
    return statistics.median(2 * size / seconds(lambda: target.copy_(source)) for _ in range(7))


def shares(run: Callable[[], Any]) -> dict[str, float]:
    """Profile one run. -> shares of its time"""
    spent = dict.fromkeys(("products", "element-wise", "moves", "optimizer"), 0.0)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        whole = seconds(run)
    for event in profiler.key_averages():
        name = event.key
        if not name.startswith("aten::"):
            continue
        if name in PRODUCTS:
            kind = "products"
        elif "adam" in name or "foreach" in name:
            kind = "optimizer"
        else:
            kind = "moves" if name.removeprefix("aten::").startswith(MOVES) else "element-wise"
        spent[kind] += event.self_cpu_time_total / 1e6
    whole = max(whole, sum(spent.values()))
    return {**{kind: value / whole for kind, value in spent.items()}, "Python": 1 - sum(spent.values()) / whole}


class Bench:
    """Shared parts of the paths: texts, models and precision."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.flags = EncoderArguments(bf16=arguments.precision == "bf16")
        self.dtype = self.flags.precision
        self.documents, self.examples, _ = read_corpus(arguments.document_path, arguments.train_file, answers=True)

    def encoder(self, trained: bool = False) -> Encoder:
        return load_encoder(self.arguments.embedding_model, self.flags, torch.float32 if trained else None)

    def retriever(self, trained: bool = False) -> Retriever:
        return Retriever(self.encoder(trained), list(self.documents[: self.arguments.documents]))

    def contexts(self, questions: int, passages: int) -> list[tuple[Example, list[Document]]]:
        return with_passages(self.examples[:questions], self.documents, passages)

    def training(self, objective: torch.nn.Module, batch: Callable[[], Any]) -> Callable[[], None]:
        """Make a training step as the loop does it."""
        loop = LoopArguments(output_dir=self.arguments.directory, bf16=self.flags.bf16, learning_rate=1e-6)
        optimization, steps = Optimization(objective.train(), loop, 1000), count()

        def run() -> None:
            made = batch()
            loss, _ = objective(made.to(device()))
            optimization.scaler.scale(loss / made.weight).backward()
            optimization.step(next(steps), float(optimization.clip()))

        return run


def sft_step(bench: Bench) -> Work:
    model = load_causal_lm(bench.arguments.model_name_or_path)
    prompter = Prompter(load_tokenizer(bench.arguments.model_name_or_path), PromptArguments())
    objective = AnswerLikelihood(model, prompter, bench.dtype)
    prompts = [objective.prompter.encode(e, passages, e.gold_answer) for e, passages in bench.contexts(2, 3)]
    batch = objective.batch(prompts)
    return Work(bench.training(objective, lambda: batch), (batch.num_tokens, "tokens"))


def ctl_step(bench: Bench, chunk_size: int = 0) -> Work:
    encoder, pairs = bench.encoder(trained=True), bench.contexts(32, 2)
    queries = encoder.tokenize_queries([example.question for example, _ in pairs])
    passages = encoder.tokenize_passages([pair[which].fmt_content for which in (0, 1) for _, pair in pairs])
    gold = torch.arange(len(pairs))
    chunks = (in_chunks(encoder, texts, chunk_size) for texts in (queries, passages))
    batch = ContrastiveBatch(*chunks, [], torch.arange(len(passages)), gold, gold=gold[:, None])
    objective = Contrastive(encoder, 0.05)
    return Work(bench.training(objective, lambda: batch), (batch.num_tokens, "tokens"))


def rpg_step(bench: Bench, warm: bool) -> Work:
    retriever, examples = bench.retriever(trained=True), bench.examples[:4]
    retriever.open()
    lm = LikelihoodArguments(lm_model_path=bench.arguments.model_name_or_path, bf16=bench.flags.bf16, num_docs=4)
    (scorer, _), fresh = local_scorer(lm), count()
    choose = RetrievedCandidates(examples, retriever, lm)

    def teacher() -> Teacher:
        return Teacher(scorer, "", Path(bench.arguments.directory) / f"{bench.arguments.system} {next(fresh)}.sqlite")

    collate = ScoredCandidates(examples, retriever.documents, retriever.encoder, choose, teacher(), 0.1)

    def batch() -> Any:
        if not warm:
            collate.teacher = teacher()
        return collate(range(len(examples)))

    objective = ListObjective(retriever.encoder, 0.1)
    return Work(bench.training(objective, batch), (16, "pairs"))


def fid_step(bench: Bench) -> Work:
    model, prompter = load_encoder_decoder(f"bert::{bench.arguments.embedding_model}", ReaderArguments())
    objective = FiDLikelihood(model, prompter)
    batch = objective.batch([prompter.encode(e, passages, e.gold_answer) for e, passages in bench.contexts(4, 5)])
    return Work(bench.training(objective, lambda: batch), (20, "passages"))


def dca_scoring(bench: Bench) -> Work:
    flags = ReaderArguments(bf16=bench.flags.bf16)
    model, prompter = load_encoder_decoder(f"bert::{bench.arguments.embedding_model}", flags)
    scorer = CrossAttentionScorer(model, prompter, 4)
    pairs = [Pair(e, document, tuple(passages)) for e, passages in bench.contexts(4, 5) for document in passages]
    return Work(lambda: list(scorer(pairs)), (len(pairs), "passages"))


def document_encoding(bench: Bench) -> Work:
    retriever = bench.retriever()
    passages = retriever.encoder.tokenize_passages([document.fmt_content for document in retriever.documents])
    return Work(lambda: retriever.encoder.embed(passages), (sum(map(len, passages)), "tokens"))


def refresh(bench: Bench) -> Work:
    retriever = bench.retriever()
    return Work(retriever.refresh, (len(retriever.documents), "documents"))


def search(bench: Bench, size: int = 200_000, questions: int = 64) -> Work:
    width, index = bench.encoder().dimension, FaissIndex([], IndexArguments())
    vectors = torch.nn.functional.normalize(torch.randn(size, width), dim=-1).numpy()
    index.replace(vectors)

    def floor(rates: Rates) -> float:
        return rates.needed(2 * size * width * questions, vectors.nbytes, torch.float32)

    return Work(lambda: index.search(vectors[:questions], 10), (questions, "questions"), floor)


def tokenisation(bench: Bench) -> Work:
    encoder = bench.encoder()
    texts = [document.fmt_content for document in bench.documents]

    def bare() -> None:
        encoder.tokenizer.backend_tokenizer.encode_batch(texts)

    return Work(lambda: encoder.tokenize_passages(texts), (len(texts), "documents"), lambda *_: seconds(bare))


def generation(bench: Bench) -> Work:
    model = load_causal_lm(bench.arguments.model_name_or_path, bench.flags)
    prompter = Prompter(load_tokenizer(bench.arguments.model_name_or_path), PromptArguments())
    reader = CausalLMReader(model, prompter)
    prompts = [prompter.encode(*context).ids for context in bench.contexts(8, 1)]
    return Work(lambda: reader.generate(prompts, 32), (len(prompts), "answers"))


PATHS: dict[str, Callable[[Bench], Work]] = {
    "SFT step": sft_step,
    "CTL step": ctl_step,
    "CTL step in chunks": lambda bench: ctl_step(bench, 16),
    "RPG step, cold": lambda bench: rpg_step(bench, warm=False),
    "RPG step, warm": lambda bench: rpg_step(bench, warm=True),
    "FiD step": fid_step,
    "DCA scoring": dca_scoring,
    "document encoding": document_encoding,
    "refresh": refresh,
    "search": search,
    "tokenisation": tokenisation,
    "generation": generation,
}


if __name__ == "__main__":
    main()
