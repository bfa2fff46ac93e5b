#!/usr/bin/env python
"""Does rqa run on this machine's GPU, and how fast? Each result is a JSON line; the exit status is 1 if a check fails.

    python benchmarks/gpu.py                             # one GPU, no network: six minutes
    python benchmarks/gpu.py --only sft,compiled         # some sections
    python benchmarks/gpu.py --only tests --seconds 500  # the test suite on the GPU; only this call runs it
    python benchmarks/gpu.py --tiny                      # toy sizes, also on a CPU: does the command itself run?

Weights are random and texts are made up. Whatever is timed runs alone, after a warm-up; a figure is the median of some
steps. `share` is the share of 990 TFLOP/s, the dense bf16 peak of an H100. Later sections are skipped if time is short.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from gpu_correctness import kernels, tests, trainers
from gpu_sections import (
    PRELOADED,
    ROOT,
    Line,
    Section,
    Skip,
    Watch,
    described,
    launch,
    llama,
    measured,
    save_encoder,
    text,
)
from harness import loop_flags, matmul_rate, training_flops
from torch.nn.functional import cross_entropy

from rqa.data import Document, Example
from rqa.evaluation.runtime import machine as machine_figures
from rqa.models.attention import PACKED_ATTENTION
from rqa.models.encoder import EncoderArguments, load_encoder
from rqa.models.loading import LoadingArguments
from rqa.models.reader import CausalLMReader
from rqa.objectives.ctl import Contrastive, Contrasts, CTLArguments
from rqa.objectives.sft import AnswerLikelihood
from rqa.packing import pad
from rqa.prompts import PromptArguments, TokenSequence
from rqa.retrieval.faiss_index import FaissIndex
from rqa.retrieval.index import IndexArguments
from rqa.runtime.cli import tune_allocator
from rqa.training.loop import Batches, train

LIMITS = {"kernels": 60, "trainers": 120, "sft": 60, "ctl": 60, "encode": 45, "generate": 60, "search": 60,
          "compiled": 150, "tests": 480}  # seconds of each section, in the order of running  # fmt: skip
TOGETHER = {"kernels", "trainers"}  # share the device, because nothing is timed in them


def train_ours(objective: Any, collate: Callable, examples: int, size: int, watch: Watch, **flags: Any) -> float:
    """Train with rqa's own loop and save nothing. -> the mean loss"""
    objective.save_pretrained = lambda directory: None
    with TemporaryDirectory() as directory:
        loop = loop_flags(directory, size, watch.steps, bf16=True, logging_steps=1000, **flags)
        batches = Batches(examples, collate, loop)
        batches.ahead = True
        train(objective, batches, loop, before_step=watch)
        state = json.loads(Path(directory, "trainer_state.json").read_text(encoding="utf-8"))
    return round(state["log_history"][0]["loss"], 4)


def train_theirs(model: Any, loss_of: Callable, examples: int, size: int, watch: Watch) -> float:
    """Train as many steps on the same batches with a plain loop: fused AdamW and clipped gradients."""
    batches = Batches(examples, list, loop_flags(".", size, watch.steps))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True), []
    for step in range(watch.steps):
        watch(step)
        loss = loss_of(*batches[step])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().float())
    return round(float(torch.stack(losses).mean()), 4)


def sft(section: Section) -> None:
    """SFT on sequences of 1,024 to 2,048 tokens, of which the last 96 are the answer."""
    micro = 2 if section.tiny else 4
    for shape, size, checkpointing in (("1B", micro, False), ("1B", micro, True), ("3B", 2 * micro, True)):
        about = {"system": "rqa", "shape": shape, "batch": size, "checkpointing": checkpointing}
        section.check(about, sft_ours, section, shape, size, gradient_checkpointing=checkpointing)
    about = {"system": "transformers, padded, sdpa, bf16 weights", "peer": True, "shape": "1B", "batch": micro}
    section.check({**about, "checkpointing": False}, sft_theirs, section, "1B", micro)


def sequences(section: Section) -> tuple[list[list[int]], int]:
    """Make token ids. -> them, and how many are the answer"""
    chance, (shortest, longest, answer) = random.Random(0), (32, 64, 8) if section.tiny else (1024, 2048, 96)
    lengths = [chance.randint(shortest, longest) for _ in range(64)]
    return [[chance.randrange(3, 900) for _ in range(length)] for length in lengths], answer


def sft_figures(watch: Watch, config: Any, seen: list[list[int]], answer: int, loss: float) -> Line:
    work = [training_flops(config, lengths, answer * len(lengths)) for lengths in seen]
    return {**watch.result({"tokens": [sum(lengths) for lengths in seen]}, work), "loss": loss}


def sft_ours(section: Section, shape: str, size: int, warm_up: int = 3, **flags: Any) -> Line:
    if "optim" in flags and not (section.cuda and importlib.util.find_spec("torchao")):
        raise Skip("needs CUDA and torchao")
    rows, answer = sequences(section)
    model = llama(section, shape, PACKED_ATTENTION, torch.bfloat16 if "optim" in flags else torch.float32)
    prompter = SimpleNamespace(stop_ids=[2], tokenizer=None, arguments=PromptArguments())
    objective = AnswerLikelihood(model, prompter, LoadingArguments(bf16=True).precision)
    watch, seen = Watch(section, warm_up), []

    def collate(indices: Sequence[int]) -> Any:
        seen.append([len(rows[i]) for i in indices])
        return objective.batch([TokenSequence(rows[i], len(rows[i]) - answer) for i in indices], indices)

    loss = train_ours(objective, collate, len(rows), size, watch, **flags)
    return sft_figures(watch, model.config, seen, answer, loss)


def sft_theirs(section: Section, shape: str, size: int) -> Line:
    rows, answer = sequences(section)
    model = llama(section, shape, "sdpa", torch.bfloat16).train()
    watch, seen = Watch(section), []

    def loss_of(indices: Sequence[int]) -> Any:
        seen.append([len(rows[i]) for i in indices])
        inputs = pad([rows[i] for i in indices]).inputs
        labels = torch.full_like(inputs["input_ids"], -100)
        for row, index in enumerate(indices):
            labels[row, len(rows[index]) - answer : len(rows[index])] = torch.tensor(rows[index][-answer:])
        batch = {name: value.to(section.device) for name, value in {**inputs, "labels": labels}.items()}
        return model(**batch, use_cache=False).loss

    loss = train_theirs(model, loss_of, len(rows), size, watch)
    return sft_figures(watch, model.config, seen, answer, loss)


def ctl(section: Section) -> None:
    """CTL on pairs of two texts of 64 to 128 tokens; both systems have tokenised them before the clock starts."""
    size = 8 if section.tiny else 256
    with TemporaryDirectory() as path:
        save_encoder(section, path)
        for system, chunk in (("rqa", 0), ("rqa, in chunks", size // 4)):
            section.check({"system": system, "batch": size}, ctl_ours, section, path, size, chunk)
        for system, kind in (("sentence-transformers, bf16 autocast", None), ("the same, bf16 weights", "bfloat16")):
            section.check({"system": system, "peer": True, "batch": size}, ctl_theirs, section, path, size, kind)


def pairs(size: int) -> list[tuple[str, str]]:
    """Make four batches of questions and passages."""
    return [(text(2 * number, 32, 60), text(2 * number + 1, 32, 60)) for number in range(4 * size)]


def ctl_ours(section: Section, path: str, size: int, chunk: int = 0, **options: Any) -> Line:
    encoder = load_encoder(path, EncoderArguments(bf16=True), torch.float32)
    documents = [Document(passage) for _, passage in pairs(size)]
    examples = [Example(question, (own,)) for (question, _), own in zip(pairs(size), documents, strict=True)]
    flags, objective = CTLArguments(chunk_size=chunk), Contrastive(encoder, 0.05)
    collate = Contrasts(examples, documents, encoder, None, flags, seed=0)
    both = zip(encoder.tokenize_queries([e.question for e in examples]),
               encoder.tokenize_passages([d.fmt_content for d in documents]), strict=True)  # fmt: skip
    lengths, watch, seen = [[len(ids) for ids in pair] for pair in both], Watch(section), []

    def counting(indices: Sequence[int]) -> Any:
        seen.append([length for i in indices for length in lengths[i]])
        return collate(indices)

    loss = train_ours(objective, counting, len(examples), size, watch, **options)
    work = [training_flops(encoder.backbone.config, one, None) for one in seen]
    units = {"pairs": [size] * len(seen), "tokens": [sum(one) for one in seen]}
    return {**watch.result(units, work), "loss": loss}


def ctl_theirs(section: Section, path: str, size: int, dtype: str | None) -> Line:
    """sentence-transformers' model and loss in the loop above, because its Trainer needs `datasets`."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(path, device=str(section.device)).train()
    if dtype:
        model.to(getattr(torch, dtype))
    features = model.tokenizer([side for pair in pairs(size) for side in pair], truncation=True, max_length=128)
    watch = Watch(section)

    def loss_of(indices: Sequence[int]) -> Any:
        embedded = []
        for side in (0, 1):
            rows = [{name: ids[2 * i + side] for name, ids in features.items()} for i in indices]
            batch = model.tokenizer.pad(rows, return_tensors="pt").to(section.device)
            embedded.append(model(dict(batch))["sentence_embedding"])
        targets = torch.arange(len(indices), device=section.device)
        similarities = embedded[0].float() @ embedded[1].float().T / 0.05
        return cross_entropy(similarities, targets)  # MultipleNegativesRankingLoss

    with torch.autocast(section.device.type, torch.bfloat16, enabled=not dtype):
        loss = train_theirs(model, loss_of, 4 * size, size, watch)
    figures = watch.result({"pairs": [size] * watch.steps}, [0.0] * watch.steps)
    return {name: value for name, value in figures.items() if name != "share"} | {"loss": loss}


def encode(section: Section) -> None:
    """Encode passages of 64 to 128 tokens in bf16, from token ids and from text."""
    from sentence_transformers import SentenceTransformer

    number = 64 if section.tiny else 8192
    texts = [text(i, 32, 60) for i in range(number)]
    with TemporaryDirectory() as path:
        save_encoder(section, path)

        def ours(tokens: int) -> Line:
            encoder = load_encoder(path, EncoderArguments(dtype="bfloat16"))
            encoder.max_batch_tokens = tokens
            ids = encoder.tokenize_passages(texts)
            from_ids = measured(lambda: encoder.embed(ids))
            from_text = measured(lambda: encoder.embed(encoder.tokenize_passages(texts)), 1)
            return {"from_ids_per_s": round(number / from_ids), "from_text_per_s": round(number / from_text),
                    "tokens_per_s": round(sum(map(len, ids)) / from_ids)}  # fmt: skip

        def theirs(size: int) -> Line:
            model = SentenceTransformer(path, device=str(section.device)).to(torch.bfloat16)
            model.encode(texts[:size], batch_size=size, show_progress_bar=False)
            took = measured(lambda: model.encode(texts, batch_size=size, show_progress_bar=False), 1)
            return {"from_text_per_s": round(number / took)}

        for tokens in (16384,) if section.tiny else (16384, 131072):
            section.check({"system": "rqa", "batch_tokens": tokens}, ours, tokens)
        for size in (64,) if section.tiny else (128, 1024):
            section.check({"system": "sentence-transformers", "peer": True, "batch": size}, theirs, size)


def generate(section: Section) -> None:
    """Generate answers of 64 tokens to 64 prompts of 256 to 512 tokens, with a reader of 1B in bf16."""
    batch, longest, new = (4, 24, 6) if section.tiny else (64, 512, 64)
    chance = random.Random(0)
    lengths = [chance.randint(longest // 2, longest) for _ in range(batch)]
    prompts = [[chance.randrange(3, 900) for _ in range(length)] for length in lengths]

    def figures(work: Callable[[int], Any], times: int) -> Line:
        whole, begun = measured(lambda: work(new), times), measured(lambda: work(2), times)
        return {"ms_per_token": round(1e3 * (whole - begun) / (new - 2), 2), "tokens_per_s": round(batch * new / whole),
                "first_two_ms": round(1e3 * begun, 1)}  # fmt: skip

    def ours() -> Line:
        model = llama(section, "1B", PACKED_ATTENTION, torch.bfloat16).eval()
        reader = CausalLMReader(model, SimpleNamespace(stop_ids=[2], arguments=PromptArguments(max_new_tokens=new)))
        made = sum(map(len, reader.generate(prompts, new)))
        return {**figures(lambda most: reader.generate(prompts, most), 3), "made": made}

    def theirs() -> Line:
        model = llama(section, "1B", "sdpa", torch.bfloat16).eval()
        rows = pad([prompt[::-1] for prompt in prompts]).to(section.device).inputs
        inputs = {name: value.flip(1) for name, value in rows.items()}  # padded on the left
        options = {"do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
        return figures(lambda most: model.generate(**inputs, max_new_tokens=most, **options), 1)

    section.check({"system": "rqa", "batch": batch}, ours)
    section.check({"system": "transformers, default cache", "peer": True, "batch": batch}, theirs)


def search(section: Section) -> None:
    """Find the 20 nearest of a million embeddings of 768 dimensions: by rqa's index, and by one matrix product."""
    number, width = (2000, 64) if section.tiny else (1_000_000, 768)
    torch.manual_seed(0)
    rows, asked = (torch.nn.functional.normalize(torch.randn(size, width, device=section.device), dim=-1)
                   for size in (number, 512))  # fmt: skip
    index = FaissIndex([], IndexArguments())
    index.replace(rows.cpu().numpy())

    def compare(questions: int) -> Line:
        few = asked[:questions]
        array = few.cpu().numpy()

        def product() -> Any:
            return torch.cat([few @ part.T for part in rows.split(2**18)], dim=1).topk(20).indices

        took = {"index_ms": measured(lambda: index.search(array, 20), 1), "device_ms": measured(product)}
        same = (torch.as_tensor(index.search(array, 20)[1]) == product().cpu()).float().mean()
        return {name: round(1e3 * spent, 2) for name, spent in took.items()} | {"same_ids": round(float(same), 4)}

    for questions in (1, 8, 64, 512):
        section.check({"documents": number, "questions": questions}, compare, questions)


def compiled(section: Section) -> None:
    """Train with `--torch_compile true`, and with 8-bit Adam, which compiles itself; on a CPU, only trace graphs."""
    if not section.cuda:
        compile_anything = torch.compile
        torch.compile = lambda *given, **options: compile_anything(*given, **options | {"backend": "eager"})
    micro, pairs_at_once = (2, 8) if section.tiny else (4, 256)
    with TemporaryDirectory() as path:
        save_encoder(section, path)
        about = {"system": "rqa, compiled", "batch": pairs_at_once}
        section.check(about, ctl_ours, section, path, pairs_at_once, torch_compile=True)
    for shape, size, checkpointing in (("1B", micro, False), ("3B", 2 * micro, True))[: 1 if section.tiny else 2]:
        torch._dynamo.reset()
        about = {"system": "rqa, compiled", "shape": shape, "batch": size, "checkpointing": checkpointing}
        options = {"gradient_checkpointing": checkpointing, "torch_compile": True}
        section.check(about, sft_ours, section, shape, size, warm_up=4, **options)
    about = {"system": "rqa, adamw_8bit", "shape": "7B", "batch": micro, "checkpointing": True}
    section.check(about, sft_ours, section, "7B", micro, optim="adamw_8bit", gradient_checkpointing=True)


def machine(section: Section) -> None:
    def figures() -> Line:
        memory = round(torch.cuda.get_device_properties(0).total_memory / 2**30) if section.cuda else None
        rate = float(f"{matmul_rate(torch.bfloat16) / 1e3:.3g}")
        return {**machine_figures(), "cuda": torch.version.cuda, "gib": memory, "matmul_bf16_tflops": rate}

    section.check({"check": "machine"}, figures)


SECTIONS = {work.__name__: work for work in (machine, kernels, trainers, sft, ctl, encode, generate, search, compiled,
                                             tests)}  # fmt: skip


def run_section(pipe: Any, name: str, *options: Any) -> None:
    tune_allocator()
    try:
        SECTIONS[name](Section(pipe, name, *options))
    except Exception as error:
        pipe.send({"section": name, "ok": False, "error": described(error)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--only", help=f"sections, with commas between them, of: {', '.join(LIMITS)}")
    parser.add_argument("--seconds", type=float, help="time for everything; default: 340, with --tiny 1500")
    given = parser.parse_args()
    chosen = given.only.split(",") if given.only else [name for name in LIMITS if name != "tests"]
    if unknown := set(chosen) - set(LIMITS):
        parser.error(f"--only {sorted(unknown)[0]}: no such section")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "TRANSFORMERS_VERBOSITY": "error",
                   "PYTHONPATH": paths, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # fmt: skip
    if given.tiny:
        os.environ["OMP_NUM_THREADS"] = "1"
    # One process that never touches the GPU imports the libraries once; all others are forked from it.
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    method, deadline = "forkserver", time.monotonic() + (given.seconds or (1500 if given.tiny else 340))
    lines: list[Line] = []

    def emit(line: Line) -> None:
        lines.append(line)
        sys.stdout.write(json.dumps(line, default=lambda value: str(value).removeprefix("torch.")) + "\n")
        sys.stdout.flush()

    def run(name: str) -> None:
        began, own = time.monotonic(), (5 if given.tiny else 1) * LIMITS.get(name, 60)
        limit = min(deadline - began, own)
        line: Line = {"section": name, "check": "whole section"}
        if limit < 10:
            return emit({**line, "skipped": "no time left"})
        options = (name, given.tiny, limit, method)
        ended = launch(multiprocessing.get_context(method), run_section, limit, options, emit)
        if ended.startswith("stopped") and limit < own:
            line["skipped"] = "no time left"
        elif ended:
            line |= {"ok": False, "error": ended}
        emit({**line, "took_s": round(time.monotonic() - began, 1)})

    run("machine")
    if not lines[0].get("gpu") and Path("/dev/nvidia0").exists():  # forking fails here: each process imports for itself
        method = "spawn"
        lines.clear()
        run("machine")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, [name for name in chosen if name in TOGETHER]))
    for name in (name for name in LIMITS if name in chosen and name not in TOGETHER):
        run(name)
    sys.exit(any(line.get("ok") is False and not line.get("peer") for line in lines))


if __name__ == "__main__":
    main()
