#!/usr/bin/env python
"""Does rqa run on this machine's GPU, and how fast? One JSON line a result; exit status 1 if a check of rqa fails.

    python benchmarks/cuda.py                             # one GPU, without network: six minutes
    python benchmarks/cuda.py --only sft,compiled         # some sections
    python benchmarks/cuda.py --only tests --seconds 500  # the test suite on the GPU, which is in no other call
    python benchmarks/cuda.py --tiny                      # toy sizes, on a CPU, too: does this file still run?

Weights are random and texts made up. What is timed runs alone, after a warm-up; a figure is the median of some steps.
`share` is of a dense bf16 peak of 990 TFLOP/s. When time is short, later sections are skipped.
"""

import argparse
import gc
import importlib.util
import json
import multiprocessing
import os
import random
import re
import runpy
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

PEAK = 990e12  # dense bf16 FLOP/s of an H100 or H200
LIMITS = {"kernels": 60, "trainers": 130, "sft": 110, "ctl": 45, "encode": 45, "generate": 60, "search": 45,
          "compiled": 120, "tests": 480}  # fmt: skip
TOGETHER = {"kernels", "trainers"}  # they time nothing, so they share the device
PRELOADED = ["torch", "transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert",
             "transformers.models.t5.modeling_t5", "transformers.models.bart.modeling_bart", "rqa.recipe.reader",
             "rqa.recipe.retriever", "rqa.objectives.ctl", "rqa.objectives.dca", "rqa.objectives.emdr",
             "rqa.objectives.fid", "rqa.objectives.swr"]  # fmt: skip

Line = dict[str, Any]
SYLLABLES = [a + b for a in ("k", "l", "m", "n", "p", "st", "tr") for b in ("a", "e", "in", "o", "or", "u")]


class Skip(Exception):
    """Why a check does not run."""


# Processes ------------------------------------------------------------------------------------------------------------


def launch(context: Any, target: Callable[..., None], seconds: float, arguments: Sequence[Any], emit: Callable) -> str:
    """Run `target(send, *arguments)` in a process of its own, pass on what it sends; "", or how it ended instead."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(theirs, *arguments))
    process.start()
    theirs.close()
    deadline = time.monotonic() + seconds
    try:
        while ours.poll(max(deadline - time.monotonic(), 0)):
            emit(ours.recv())
    except EOFError:
        process.join()
        return f"ended with status {process.exitcode}" if process.exitcode else ""
    process.kill()
    process.join()
    return f"stopped after {seconds:.0f} s"


class Section:
    """What a section's process knows: its device, its sizes, its time, and where its lines go."""

    def __init__(self, pipe: Any, name: str, tiny: bool, seconds: float, start_method: str) -> None:
        import torch

        from rqa.runtime.distributed import device

        self.emit, self.name, self.tiny, self.deadline = pipe.send, name, tiny, time.monotonic() + seconds
        self.context, self.device = multiprocessing.get_context(start_method), device()
        self.cuda = self.device.type == "cuda"
        if tiny:
            torch.set_num_threads(1)
        warnings.simplefilter("ignore")

    def left(self) -> float:
        """Seconds before this process is stopped."""
        return self.deadline - time.monotonic()

    def check(self, about: Line, work: Callable[..., Line], *arguments: Any, **options: Any) -> None:
        """Emit what `work` finds as one line, or why it failed; the next check runs all the same."""
        import torch

        line, began = {"section": self.name, **about}, time.monotonic()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            if self.left() < 5:
                raise Skip("no time left")
            line |= {"ok": True, **work(*arguments, **options)}
            if self.cuda:
                line["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        except Skip as reason:
            line["skipped"] = str(reason)
        except BaseException as error:  # SystemExit, too
            line |= {"ok": False, "error": described(error)}
        self.emit({**line, "took_s": round(time.monotonic() - began, 1)})


def described(error: BaseException) -> str:
    """Type, message and place of an error: the innermost line of this repository, and the innermost of all."""
    stack = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in stack if frame.filename.startswith(str(ROOT))]
    places = dict.fromkeys(f"{f.filename.removeprefix(f'{ROOT}/')}:{f.lineno}" for f in (*ours[-1:], *stack[-1:]))
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({', '.join(places)})"


def run_section(pipe: Any, name: str, *options: Any) -> None:
    SECTIONS[name](Section(pipe, name, *options))


def run_executable(pipe: Any, name: str, line: list[str], environment: dict[str, str], log: str) -> None:
    """Run an executable of bin/ with its output in a file; send "", or why it failed."""
    import torch

    os.environ.update(environment)
    with open(log, "w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    sys.argv = [name, *line]
    try:
        runpy.run_path(str(ROOT / "bin" / name), run_name="__main__")
        failure = ""
    except SystemExit as end:
        sys.stderr.flush()
        failure = Path(log).read_text(encoding="utf-8").strip().rpartition("\n")[2] if end.code else ""
    except BaseException as error:
        failure = described(error)
    pipe.send(failure)


# Texts, tokenizers and models -----------------------------------------------------------------------------------------


def text(number: int, fewest: int, most: int) -> str:
    """Words of one to three syllables, as many as that; a token is a syllable."""
    chance = random.Random(number)
    words = ("".join(chance.choices(SYLLABLES, k=chance.randint(1, 3))) for _ in range(chance.randint(fewest, most)))
    return " ".join(words)


def tokenizer(template: str | None) -> Any:
    """WordPiece over those syllables, with the special tokens of a template around a text."""
    from string import ascii_lowercase, digits, punctuation

    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {name: f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    pieces = [*ascii_lowercase, *digits, *punctuation, *(piece for piece in SYLLABLES if len(piece) > 1)]
    vocabulary = [*special.values(), *pieces, *(f"##{piece}" for piece in pieces)]
    numbered = {piece: number for number, piece in enumerate(vocabulary)}
    core = Tokenizer(models.WordPiece(numbered, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    if template:
        core.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {f"{name}_token": token for name, token in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=512, eos_token="[SEP]", **names)


def write_small_models(root: Path, width: int) -> None:
    """A decoder, an encoder, a T5 and a BART with random weights and without dropout, and their tokenizers."""
    import torch
    import transformers as hf

    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"vocab_size": 300, "pad_token_id": 0, "eos_token_id": 3}
    bert = hf.BertConfig(vocab_size=300, **shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    llama = hf.LlamaConfig(**shape, **ends, num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None)
    t5 = hf.T5Config(**ends, d_model=width, d_kv=width // 4, d_ff=2 * width, num_layers=2, num_heads=4, dropout_rate=0.0,
                     feed_forward_proj="gated-gelu", decoder_start_token_id=0)  # fmt: skip
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder")
             for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 2 * width))}  # fmt: skip
    bart = hf.BartConfig(**ends, **sides, d_model=width, dropout=0.0, bos_token_id=2, decoder_start_token_id=3,
                         max_position_embeddings=512, forced_eos_token_id=None)  # fmt: skip
    for name, kind, config, template in (
        ("lm", hf.LlamaForCausalLM, llama, None), ("encoder", hf.BertModel, bert, "[CLS] $A [SEP]"),
        ("t5", hf.T5ForConditionalGeneration, t5, "$A [SEP]"),
        ("bart", hf.BartForConditionalGeneration, bart, "[CLS] $A [SEP]"),
    ):  # fmt: skip
        torch.manual_seed(1)
        kind(config).save_pretrained(root / name)
        tokenizer(template).save_pretrained(root / name)


def llama(section: Section, shape: str, attention: str, dtype: Any) -> Any:
    """A Llama of that size, its random weights made on the device."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, inner, layers, heads, key_heads, vocabulary = {
        "tiny": (64, 128, 2, 4, 2, 1000), "1B": (2048, 8192, 16, 32, 8, 128256), "3B": (3072, 8192, 28, 24, 8, 128256),
        "7B": (4096, 11008, 32, 32, 32, 32000),
    }["tiny" if section.tiny else shape]  # fmt: skip
    config = LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, vocab_size=vocabulary,
                         num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=4096,
                         tie_word_embeddings=shape != "7B", bos_token_id=None, eos_token_id=2, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    with section.device:
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)


def training_flops(config: Any, lengths: Sequence[int], outputs: int) -> float:
    """Forward and backward: layers, attention (half of it if causal) and the output layer where a token is predicted."""
    width, layers, decoder = config.hidden_size, config.num_hidden_layers, outputs > 0
    keys = width * getattr(config, "num_key_value_heads", config.num_attention_heads) // config.num_attention_heads
    weights = 2 * width * width + 2 * width * keys + (3 if decoder else 2) * width * config.intermediate_size
    attention = (6 if decoder else 12) * layers * width * sum(length**2 for length in lengths)
    return 6 * layers * weights * sum(lengths) + attention + 6 * outputs * width * config.vocab_size


# Correctness ----------------------------------------------------------------------------------------------------------


def dtypes(section: Section) -> list[Any]:
    import torch

    return [torch.float32, torch.bfloat16, *([torch.float16] if section.cuda else [])]


def kernels(section: Section) -> None:
    """Packed attention beside float64, and models whose rows are packed beside one sequence at a time."""
    for dtype in dtypes(section):
        section.check({"check": "attention against float64", "dtype": dtype}, attention, section, dtype)
        section.check({"check": "packing of models", "dtype": dtype}, packing, section, dtype)


def attention(section: Section, dtype: Any) -> Line:
    """The largest relative error of outputs and gradients, by setting."""
    import torch

    from rqa.models.attention import packed_attention

    lengths, tolerance = [5, 300, 1, 128, 128, 77], {torch.float32: 1e-5, torch.float16: 4e-3}.get(dtype, 2e-2)
    borders = torch.tensor([0, *lengths]).cumsum(0).int().to(section.device)

    def error(causal: bool, key_heads: int, window: int | None, width: int) -> float:
        torch.manual_seed(0)
        shapes = [(1, heads, sum(lengths), width) for heads in (4, key_heads, key_heads, 4)]
        *inputs, weights = (torch.randn(shape, device=section.device).to(dtype) for shape in shapes)
        ours = [x.clone().requires_grad_() for x in inputs]
        theirs = [x.double().requires_grad_() for x in inputs]
        found = packed_attention(SimpleNamespace(is_causal=causal), *ours, attention_mask=None, sliding_window=window,
                                 cu_seq_lens_q=borders, max_length_q=max(lengths))[0].transpose(1, 2)  # fmt: skip
        parts = []
        for q, k, v in zip(*(x.split(lengths, dim=2) for x in theirs), strict=True):
            k, v = (x.repeat_interleave(4 // key_heads, dim=1) for x in (k, v))
            position = torch.arange(q.shape[2], device=section.device)
            behind = position[:, None] - position
            hidden = (behind.abs() >= (window or len(position))) | ((behind < 0) & causal)
            parts.append((q @ k.mT * width**-0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v)
        expected = torch.cat(parts, dim=2)
        found.backward(weights)
        expected.backward(weights.double())
        pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
        return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)

    settings = {"causal": (True, 4, None, 64), "grouped": (True, 2, None, 64), "full": (False, 4, None, 64),
                "causal window": (True, 2, 100, 64), "full window": (False, 4, 33, 64), "wide": (True, 2, None, 128),
                "width 20": (True, 2, None, 20)}  # fmt: skip
    return judged({name: lambda setting=setting: error(*setting) for name, setting in settings.items()}, tolerance)


def packing(section: Section, dtype: Any) -> Line:
    """The largest difference of hidden states in units of their spread, by model; each must pass rqa's probe."""
    import torch
    import transformers as hf

    from rqa.models.attention import PACKED_ATTENTION
    from rqa.models.loading import hidden_states, packing_is_exact
    from rqa.packing import pack

    shape = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0}  # fmt: skip
    decoder = {**shape, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    modern = {"local_attention": 6, "global_attn_every_n_layers": 2, "bos_token_id": 1, "cls_token_id": 1}
    configs = {"Llama": hf.LlamaConfig(**decoder), "Llama, width 20": hf.LlamaConfig(**decoder | {"hidden_size": 80}),
               "Mistral": hf.MistralConfig(**decoder, sliding_window=4), "Bert": hf.BertConfig(**shape),
               "ModernBert": hf.ModernBertConfig(**shape, **modern, eos_token_id=2, sep_token_id=2)}  # fmt: skip

    def difference(config: Any) -> float:
        kind = hf.AutoModel if "Bert" in type(config).__name__ else hf.AutoModelForCausalLM
        model = kind.from_config(config, attn_implementation=PACKED_ATTENTION, dtype=dtype).to(section.device).eval()
        if not packing_is_exact(model):
            raise ValueError("the probe says that this model cannot be packed")
        texts = [[3 + number] * length for number, length in enumerate((9, 1, 30))]
        with torch.no_grad():
            together = hidden_states(model, pack(texts).to(section.device)).float()
            alone = torch.cat([hidden_states(model, pack([ids]).to(section.device)).float() for ids in texts])
        return float((together - alone).abs().max() / alone.std())

    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    return judged({name: lambda config=config: difference(config) for name, config in configs.items()}, tolerance)


def judged(work: dict[str, Callable[[], float]], tolerance: float) -> Line:
    """Each figure, or its error; all must be within the tolerance."""
    found: dict[str, Any] = {}
    for name, figure in work.items():
        try:
            found[name] = float(f"{figure():.2g}")
        except Exception as error:
            found[name] = described(error)
    return {"ok": all(isinstance(x, float) and x <= tolerance for x in found.values()), "tolerance": tolerance, **found}


def trainers(section: Section) -> None:
    """The seven trainers on small random models, by their executables, several at once; CPU and float32 are the truth."""
    from rqa.data import Document, Example, write_documents, write_examples
    from rqa.training.arguments import LoopArguments

    with TemporaryDirectory(prefix="rqa-cuda-") as directory:
        root = Path(directory)
        write_small_models(root, 32 if section.tiny else 256)
        documents = [Document(text(number, 15, 25), {"source": f"guide/{number}"}) for number in range(64)]
        examples = [Example(f"{' '.join(d.page_content.split()[:4])}?", (d,), " ".join(d.page_content.split()[4:9]))
                    for d in documents]  # fmt: skip
        write_documents(root / "documents.jsonl", documents)
        write_examples(root / "train.jsonl", examples[:48])
        write_examples(root / "test.jsonl", examples[48:])
        common = {"train_file": root / "train.jsonl", "eval_file": root / "test.jsonl", "test_file": root / "test.jsonl",
                  "document_path": root / "documents.jsonl", "max_steps": 4, "logging_steps": 1, "save_steps": 2,
                  "eval_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-4,
                  "load_best_model_at_end": "false"}  # fmt: skip
        if any(field.name == "deterministic" for field in fields(LoopArguments)):
            common["deterministic"] = "true"
        encoder, retrieving = {"model_name_or_path": root / "encoder"}, {"embedding_model": root / "encoder"}
        decoder = {"model_name_or_path": root / "lm", "max_new_tokens": 8, "max_seq_length": 512, **retrieving}
        fid = {"max_encoder_seq_length": 128, "max_decoder_seq_length": 16, **retrieving}
        judge = {**encoder, "lm_model_path": root / "lm", "num_docs": 4, "text_maxlength": 256, "refresh_step": 2}
        lines = {
            "sft": ("train_sft", decoder), "swr": ("train_swr", decoder), "ctl": ("train_ctl", encoder),
            "rpg": ("train_rpg", judge), "emdr": ("train_emdr", judge),
            "dca": ("train_dca", {**encoder, "reader_model_path": root / "t5", "n_context": 4} | fid | {"embedding_model": None}),
            "fid": ("train_fid", {"model_name_or_path": f"bert::{root / 'encoder'}", **fid}),
            "fid bart": ("train_fid", {"model_name_or_path": root / "bart", **fid}),
            "fid t5": ("train_fid", {"model_name_or_path": root / "t5", **fid}),
        }  # fmt: skip
        wanted = dict(jobs(section, lines))

        def work(job: tuple[str, str]) -> None:
            name, kind = job
            section.check({"trainer": name, "kind": kind}, compare, name, kind)

        def compare(name: str, kind: str) -> Line:
            own, output = wanted[name, kind], root / f"{name} {kind}"
            found = run(name, output, own, on_cpu=kind == "cpu")
            if kind == "cpu":
                return found
            truth, worst = truths[name].result()["losses"], 0.01 if kind in ("float32", "fp16") else 0.05
            off = [abs(a - b) / max(abs(b), 0.1) for a, b in zip(found["losses"], truth, strict=True)]
            found |= {"first_off": round(off[0], 5), "later_off": round(max(off[1:]), 5), "ok": off[0] < worst}
            if kind == "resumed":
                again = root / f"{name} again"
                run(name, again, {**own, "resume_from_checkpoint": output / "checkpoint-2"})
                found |= weights_differ(output / "model.safetensors", again / "model.safetensors")
                same = found["weights_off"] == 0 if "deterministic" in common else found["weights_off"] < 0.01
                found["ok"] = found["ok"] and same
            return found

        def run(name: str, output: Path, own: Line, on_cpu: bool = False) -> Line:
            executable, line = lines[name]
            flags = {**common, **line, **own, "output_dir": output}
            arguments = [
                str(part) for flag, value in flags.items() if value is not None for part in (f"--{flag}", value)
            ]
            environment = {"RQA_CACHE": f"{output}.cache"} | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})
            told: list[str] = []
            given = (executable, arguments, environment, f"{output}.log")
            ended = launch(section.context, run_executable, section.left() - 3, given, told.append)
            if problem := ended or told[0]:
                raise RuntimeError(problem)
            history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
            losses = [entry["loss"] for entry in history if "loss" in entry]
            if len(losses) != 4 and "resume_from_checkpoint" not in own:
                raise RuntimeError(f"4 steps logged the losses {losses}")
            return {"losses": [round(loss, 5) for loss in losses]}

        with ThreadPoolExecutor(2 if section.tiny else 10) as pool:
            truths = {name: pool.submit(run, name, root / f"{name} truth", {}, True) for name in {n for n, _ in wanted}}
            list(pool.map(work, wanted))


def jobs(section: Section, lines: Line) -> Iterator[tuple[tuple[str, str], Line]]:
    """Each trainer's runs beside the one on the CPU: name and kind, and further flags."""
    bf16 = {"bf16": "true"}
    few = ("sft", "ctl", "rpg", "fid")
    for name in lines:
        if not section.tiny or name in few:
            yield (name, "bf16"), bf16
        elif " " not in name:
            yield (name, "float32"), {}
    for name in ("sft", "ctl") if section.tiny else few:
        yield (name, "resumed"), bf16
    yield ("sft", "lora"), {**bf16, "use_lora": "true", "gradient_checkpointing": "true"}
    yield ("rpg", "async refresh"), {**bf16, "refresh_async": "true"}
    if section.tiny:
        return
    for name in (*few, "dca", "fid t5"):
        yield (name, "float32"), {}
    for name in few if section.cuda else ():
        yield (name, "fp16"), {"fp16": "true"}
    for name in ("sft", "fid"):
        yield (name, "checkpointing"), {**bf16, "gradient_checkpointing": "true"}
    yield ("ctl", "chunks"), {**bf16, "chunk_size": 2}
    yield ("ctl", "workers"), {**bf16, "dataloader_num_workers": 2}
    yield ("rpg", "frozen passages"), {**bf16, "train_query_encoder_only": "true"}
    for name in ("sft", "ctl", "fid", "fid t5") if section.cuda else ():
        yield (name, "compiled"), {**bf16, "torch_compile": "true"}


def weights_differ(ours: Path, theirs: Path) -> Line:
    """The largest difference between two checkpoints' weights, in units of a tensor's largest weight."""
    from safetensors.torch import load_file

    first, second = load_file(ours), load_file(theirs)
    off = [float((first[name] - second[name]).abs().max() / first[name].abs().max().clamp(min=1e-6)) for name in first]
    return {"weights_off": max(off)}


# Speed ----------------------------------------------------------------------------------------------------------------


class Watch:
    """A training loop's `before_step`: times of steps, then one step for its syncs and one for the device's busy time.

    Steps are timed by events on the device, so that a loop that runs ahead of it is not held back.
    """

    def __init__(self, section: Section, warm_up: int = 3, timed: int = 6) -> None:
        self.cuda, self.first, self.syncing = section.cuda, warm_up, warm_up + timed
        self.steps = self.syncing + 3
        self.moments: list[Any] = []
        self.graphs: list[int] = []
        self.syncs: Counter[str] = Counter()
        self.busy: float | None = None

    def __call__(self, step: int) -> dict[str, float]:
        import torch
        from torch._dynamo.utils import counters

        if step <= self.syncing:
            moment: Any = time.perf_counter()
            if self.cuda:
                moment = torch.cuda.Event(enable_timing=True)
                moment.record()
            self.moments.append(moment)
            self.graphs.append(counters["stats"]["unique_graphs"])
        if not self.cuda or step < self.syncing:
            return {}
        torch.cuda.synchronize()
        if step == self.syncing:
            self.shown, warnings.showwarning = warnings.showwarning, self._count
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        elif step == self.syncing + 1:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = self.shown
            warnings.simplefilter("ignore")
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.__enter__()
            self.began = time.perf_counter()
        elif step == self.syncing + 2:
            wall = time.perf_counter() - self.began
            self.profiler.__exit__(None, None, None)
            on_device = [event for event in self.profiler.events() if "CUDA" in str(event.device_type)]
            self.busy = round(sum(event.self_device_time_total for event in on_device) / 1e6 / wall, 3)
        return {}

    def _count(self, message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if "synchroniz" in str(message):
            ours = [f for f in traceback.extract_stack() if f"{ROOT}/rqa/" in f.filename]
            place = f"{ours[-1].filename.removeprefix(f'{ROOT}/')}:{ours[-1].lineno} " if ours else ""
            self.syncs[f"{place}<- {'/'.join(filename.split('/')[-2:])}:{lineno}"] += 1

    def result(self, units: dict[str, Sequence[float]], flops: Sequence[float]) -> Line:
        """Medians over the timed steps, of units and floating-point operations given for each step."""
        import torch

        if self.cuda:
            torch.cuda.synchronize()
        pairs = list(zip(self.moments, self.moments[1:], strict=False))[self.first :]
        spent = [a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in pairs]

        def rate(amounts: Sequence[float]) -> float:
            return statistics.median(n / s for n, s in zip(amounts[self.first :], spent, strict=False))

        figures: Line = {f"{name}_per_s": round(rate(amounts), 1) for name, amounts in units.items()}
        figures |= {"share": round(rate(flops) / PEAK, 3), "step_ms": round(1e3 * statistics.median(spent), 2)}
        if self.cuda:
            figures |= {"busy": self.busy, "syncs": self.syncs.total(), "sync_places": dict(self.syncs.most_common(8))}
        if self.graphs[-1]:
            figures |= {"graphs": self.graphs[-1], "graphs_after_warm_up": self.graphs[-1] - self.graphs[self.first]}
        return figures


def loop_flags(directory: str, size: int, steps: int, **flags: Any) -> Any:
    from rqa.training.arguments import LoopArguments

    return LoopArguments(output_dir=directory, per_device_train_batch_size=size, max_steps=steps, save_strategy="no",
                         eval_strategy="no", metric_for_best_model="loss", logging_steps=1000,
                         **{"bf16": True, **flags})  # fmt: skip


def train_ours(objective: Any, collate: Callable, examples: int, size: int, watch: Watch, **flags: Any) -> float:
    """Train with rqa's own loop, and save nothing; the mean loss."""
    from rqa.training.loop import Batches, train

    objective.save_pretrained = lambda directory: None
    with TemporaryDirectory() as directory:
        loop = loop_flags(directory, size, watch.steps, **flags)
        train(objective, Batches(examples, collate, loop), loop, before_step=watch)
        state = json.loads(Path(directory, "trainer_state.json").read_text(encoding="utf-8"))
    return round(state["log_history"][0]["loss"], 4)


def train_theirs(model: Any, loss_of: Callable, examples: int, size: int, watch: Watch) -> float:
    """The same number of steps over the same batches, written out: AdamW, fused, and clipped gradients."""
    import torch

    from rqa.training.loop import Batches

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
    """SFT on prompts of 1,024 to 2,048 tokens, the last 96 of them the answer."""
    micro = 2 if section.tiny else 4
    for shape, size, checkpointing in (("1B", micro, False), ("1B", micro, True), ("3B", 2 * micro, True)):
        about = {"system": "rqa", "shape": shape, "batch": size, "checkpointing": checkpointing}
        section.check(about, sft_ours, section, shape, size, gradient_checkpointing=checkpointing)
    about = {"system": "transformers, padded, sdpa, bf16 weights", "peer": True, "shape": "1B", "batch": micro}
    section.check({**about, "checkpointing": False}, sft_theirs, section, "1B", micro)
    about = {"system": "rqa, adamw_8bit", "shape": "7B", "batch": micro, "checkpointing": True}
    eight_bit = {"optim": "adamw_8bit", "gradient_checkpointing": True}
    section.check(about, sft_ours, section, "7B", micro, **eight_bit)
    about = {"system": "trl, padding-free", "peer": True, "shape": "1B", "batch": micro}
    section.check({**about, "checkpointing": False}, sft_trl)


def sequences(section: Section) -> tuple[list[list[int]], int]:
    """Token ids, and how many of them are the answer."""
    chance, (shortest, longest, answer) = random.Random(0), (32, 64, 8) if section.tiny else (1024, 2048, 96)
    lengths = [chance.randint(shortest, longest) for _ in range(64)]
    return [[chance.randrange(3, 900) for _ in range(length)] for length in lengths], answer


def sft_figures(watch: Watch, config: Any, seen: list[list[int]], answer: int, loss: float) -> Line:
    work = [training_flops(config, lengths, answer * len(lengths)) for lengths in seen]
    return {**watch.result({"tokens": [sum(lengths) for lengths in seen]}, work), "loss": loss}


def sft_ours(section: Section, shape: str, size: int, warm_up: int = 3, **flags: Any) -> Line:
    import torch

    from rqa.models.attention import PACKED_ATTENTION
    from rqa.objectives.sft import AnswerLikelihood
    from rqa.prompts import TokenSequence
    from rqa.training.arguments import LoopArguments

    if "optim" in flags:
        if not any(field.name == "optim" for field in fields(LoopArguments)):
            raise Skip("this version has no --optim")
        if not (section.cuda and importlib.util.find_spec("torchao")):
            raise Skip("needs CUDA and torchao")
    rows, answer = sequences(section)
    model = llama(section, shape, PACKED_ATTENTION, torch.bfloat16 if "optim" in flags else torch.float32)
    objective = AnswerLikelihood(model, SimpleNamespace(stop_ids=[2], tokenizer=None))
    watch, seen = Watch(section, warm_up), []

    def collate(indices: Sequence[int]) -> Any:
        seen.append([len(rows[i]) for i in indices])
        return objective.batch([TokenSequence(rows[i], len(rows[i]) - answer) for i in indices], indices)

    loss = train_ours(objective, collate, len(rows), size, watch, **flags)
    return sft_figures(watch, model.config, seen, answer, loss)


def sft_theirs(section: Section, shape: str, size: int) -> Line:
    import torch

    from rqa.packing import pad

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


def sft_trl() -> Line:
    installed = importlib.util.find_spec("trl") and importlib.util.find_spec("datasets")
    raise Skip("benchmarks/train_throughput.py measures it" if installed else "trl or datasets is not installed")


def save_encoder(section: Section, path: str) -> None:
    """An encoder of BERT-base's shape, as `sentence-transformers` reads it; passages have up to 128 tokens."""
    from transformers import BertConfig, BertModel

    from rqa.models.encoder import Encoder, EncoderSettings

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertModel(BertConfig(**small if section.tiny else {}))
    settings = EncoderSettings(max_query_length=128, max_passage_length=128)
    Encoder(model, tokenizer("[CLS] $A [SEP]"), settings).save_pretrained(path)


def ctl(section: Section) -> None:
    """CTL, two texts of 64 to 128 tokens a pair; both sides have these texts as token ids before the clock starts."""
    size = 8 if section.tiny else 256
    with TemporaryDirectory() as path:
        save_encoder(section, path)
        for system, chunk in (("rqa", 0), ("rqa, in chunks", size // 4)):
            section.check({"system": system, "batch": size}, ctl_ours, section, path, size, chunk)
        for system, kind in (("sentence-transformers, bf16 autocast", None), ("the same, bf16 weights", "bfloat16")):
            section.check({"system": system, "peer": True, "batch": size}, ctl_theirs, section, path, size, kind)


def pairs(size: int) -> list[tuple[str, str]]:
    """Questions and passages, four batches of them."""
    return [(text(2 * number, 32, 60), text(2 * number + 1, 32, 60)) for number in range(4 * size)]


def ctl_ours(section: Section, path: str, size: int, chunk: int) -> Line:
    from rqa.data import Document, Example
    from rqa.models.encoder import load_encoder
    from rqa.objectives.ctl import Contrastive, Contrasts, CTLArguments

    encoder = load_encoder(path)
    documents = [Document(passage) for _, passage in pairs(size)]
    examples = [Example(question, (own,)) for (question, _), own in zip(pairs(size), documents, strict=True)]
    collate = Contrasts(examples, documents, encoder, [[]] * len(examples), CTLArguments(), seed=0)
    both = zip(encoder.tokenize_queries([e.question for e in examples]),
               encoder.tokenize_passages([d.fmt_content for d in documents]), strict=True)  # fmt: skip
    lengths, watch, seen = [[len(ids) for ids in pair] for pair in both], Watch(section), []

    def counting(indices: Sequence[int]) -> Any:
        seen.append([length for i in indices for length in lengths[i]])
        return collate(indices)

    loss = train_ours(Contrastive(encoder, 0.05, chunk), counting, len(examples), size, watch)
    work = [training_flops(encoder.backbone.config, one, 0) for one in seen]
    units = {"pairs": [size] * len(seen), "tokens": [sum(one) for one in seen]}
    return {**watch.result(units, work), "loss": loss}


def ctl_theirs(section: Section, path: str, size: int, dtype: str | None) -> Line:
    """Its model and its loss in the loop above: its own Trainer needs `datasets`."""
    import torch
    from sentence_transformers import SentenceTransformer
    from torch.nn.functional import cross_entropy

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
        return cross_entropy(
            embedded[0].float() @ embedded[1].float().T / 0.05, targets
        )  # MultipleNegativesRankingLoss

    with torch.autocast(section.device.type, torch.bfloat16, enabled=not dtype):
        loss = train_theirs(model, loss_of, 4 * size, size, watch)
    figures = watch.result({"pairs": [size] * watch.steps}, [0.0] * watch.steps)
    return {name: value for name, value in figures.items() if name != "share"} | {"loss": loss}


def measured(work: Callable[[], Any], times: int = 3) -> float:
    """The median of some runs' seconds, after one that warms up."""
    from rqa.evaluation.runtime import seconds

    work()
    return statistics.median(seconds(work) for _ in range(times))


def encode(section: Section) -> None:
    """Passages of 64 to 128 tokens to embeddings in bf16, from token ids and from text."""
    import torch
    from sentence_transformers import SentenceTransformer

    from rqa.models.encoder import load_encoder

    number = 64 if section.tiny else 16384
    texts = [text(i, 32, 60) for i in range(number)]
    with TemporaryDirectory() as path:
        save_encoder(section, path)

        def ours(tokens: int) -> Line:
            encoder = load_encoder(path)
            encoder.backbone.to(torch.bfloat16)
            ids = encoder.tokenize_passages(texts)
            from_ids = measured(lambda: encoder.embed(ids, tokens))
            from_text = measured(lambda: encoder.embed(encoder.tokenize_passages(texts), tokens), 1)
            return {"from_ids_per_s": round(number / from_ids), "from_text_per_s": round(number / from_text),
                    "tokens_per_s": round(sum(map(len, ids)) / from_ids)}  # fmt: skip

        def theirs(size: int) -> Line:
            model = SentenceTransformer(path, device=str(section.device)).to(torch.bfloat16)
            model.encode(texts[:size], batch_size=size, show_progress_bar=False)
            took = measured(lambda: model.encode(texts, batch_size=size, show_progress_bar=False), 1)
            return {"from_text_per_s": round(number / took)}

        for tokens in (16384, 131072, 262144)[: 1 if section.tiny else 3]:
            section.check({"system": "rqa", "batch_tokens": tokens}, ours, tokens)
        for size in (64,) if section.tiny else (128, 512, 2048):
            section.check({"system": "sentence-transformers", "peer": True, "batch": size}, theirs, size)


def generate(section: Section) -> None:
    """Answers of 64 tokens to 64 prompts of 256 to 512, with a reader of 1B in bf16."""
    import torch

    from rqa.models.attention import PACKED_ATTENTION
    from rqa.models.reader import CausalLMReader
    from rqa.packing import pad

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
        reader = CausalLMReader(model, SimpleNamespace(stop_ids=[2], arguments=SimpleNamespace(max_new_tokens=new)))
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
    """The 20 nearest of a million embeddings of 768 numbers: rqa's index, and one product on the device."""
    import torch

    from rqa.retrieval.index import Index, IndexArguments

    number, width = (2000, 64) if section.tiny else (1_000_000, 768)
    torch.manual_seed(0)
    rows, asked = (torch.nn.functional.normalize(torch.randn(size, width, device=section.device), dim=-1)
                   for size in (number, 512))  # fmt: skip
    index = Index(IndexArguments())
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
    """SFT with `--torch_compile true`. On a CPU graphs are traced and not compiled, which would take minutes."""
    import torch

    if not section.cuda:
        compile_anything = torch.compile
        torch.compile = lambda *given, **options: compile_anything(*given, **options | {"backend": "aot_eager"})
    micro = 2 if section.tiny else 4
    for shape, size, checkpointing in (("1B", micro, False), ("3B", 2 * micro, True)):
        torch._dynamo.reset()
        about = {"system": "rqa, compiled", "shape": shape, "batch": size, "checkpointing": checkpointing}
        options = {"gradient_checkpointing": checkpointing, "torch_compile": True}
        section.check(about, sft_ours, section, shape, size, warm_up=4, **options)


# The whole ------------------------------------------------------------------------------------------------------------


def tests(section: Section) -> None:
    """The test suite with the GPU in sight, and what fails there once more without it."""
    processes = [] if section.tiny else ["-n", str(min(os.cpu_count() or 2, 12))]

    def run(seconds: float, visible: bool, chosen: Sequence[str]) -> tuple[str, list[str]]:
        line = [sys.executable, "-m", "pytest", "-v", "--tb=line", "-p", "no:cacheprovider", *processes, *chosen]
        environment = os.environ | ({} if visible else {"CUDA_VISIBLE_DEVICES": ""})
        process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, start_new_session=True)  # fmt: skip
        try:
            out, _ = process.communicate(timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            out, _ = process.communicate()
        failed = re.findall(r"(?:FAILED|ERROR)\s+(tests/\S+)|(tests/\S+)\s+(?:FAILED|ERROR)", out)
        return out.strip().rpartition("\n")[2][-200:], list(dict.fromkeys(a or b for a, b in failed))

    def suite() -> Line:
        chosen = ["tests/test_packing.py"] if section.tiny else ["tests"]
        summary, failed = run(section.left() * (0.75 if section.cuda else 1) - 5, True, chosen)
        found = {"ok": not failed and " passed" in summary, "summary": summary, "failed": failed}
        if failed and section.cuda:
            again, still = run(section.left() - 5, False, failed[:200])
            found |= {"without_cuda": again, "failed_without_cuda": still}
        return found

    section.check({"check": "pytest"}, suite)


def machine(section: Section) -> None:
    """What everything is measured on."""

    def about() -> Line:
        import torch
        from harness import matmul_rate

        from rqa.evaluation.runtime import machine

        rate = round(matmul_rate(torch.bfloat16) / 1e3, 1 if section.cuda else 4)
        memory = round(torch.cuda.get_device_properties(0).total_memory / 2**30) if section.cuda else None
        return {**machine(), "cuda": torch.version.cuda, "gib": memory, "matmul_bf16_tflops": rate}

    section.check({"check": "machine"}, about)


SECTIONS = {work.__name__: work for work in (machine, kernels, trainers, sft, ctl, encode, generate, search, compiled,
                                             tests)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--only", help=f"sections, with commas between them, of: {', '.join(LIMITS)}")
    parser.add_argument("--seconds", type=float, default=340, help="time for everything; default: 340")
    given = parser.parse_args()
    chosen = given.only.split(",") if given.only else [name for name in LIMITS if name != "tests"]
    if unknown := set(chosen) - set(LIMITS):
        parser.error(f"--only {sorted(unknown)[0]}: no such section")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "TRANSFORMERS_VERBOSITY": "error",
                   "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
                   "PYTHONPATH": os.pathsep.join(sys.path[:2] + [os.environ.get("PYTHONPATH", "")])}  # fmt: skip
    if given.tiny:
        os.environ["OMP_NUM_THREADS"] = "1"
    # Libraries are imported once, in a process that never touches the GPU; all others are forked from it.
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    method, deadline, failed, gpu = "forkserver", time.monotonic() + given.seconds, [], []

    def emit(line: Line) -> None:
        print(json.dumps(line, default=lambda value: str(value).removeprefix("torch.")), flush=True)
        failed.extend([line] if line.get("ok") is False and not line.get("peer") else [])
        gpu.append(line.get("gpu"))

    def run(name: str) -> None:
        left, own = deadline - time.monotonic(), LIMITS.get(name, 60)
        if left < 10:
            return emit({"section": name, "skipped": "no time left"})
        began, seconds = time.monotonic(), min(left, own)
        ended = launch(
            multiprocessing.get_context(method), run_section, seconds, (name, given.tiny, seconds, method), emit
        )
        line: Line = {"section": name, "check": "whole section", "took_s": round(time.monotonic() - began, 1)}
        short = ended.startswith("stopped") and left < own
        return emit(line | ({"skipped": "no time left"} if short else {"ok": False, "error": ended} if ended else {}))

    run("machine")
    if not any(gpu) and Path("/dev/nvidia0").exists():  # forking is in its way: every process imports for itself
        method = "spawn"
        failed.clear()
        run("machine")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, [name for name in chosen if name in TOGETHER]))
    for name in (name for name in LIMITS if name in chosen and name not in TOGETHER):
        run(name)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
