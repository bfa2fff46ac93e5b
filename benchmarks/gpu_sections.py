"""Shared parts of gpu.py's sections: processes with a time limit, lines of results, texts, models and a stopwatch."""

import gc
import multiprocessing
import os
import random
import runpy
import statistics
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from string import ascii_lowercase, digits, punctuation
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import rqa.evaluation.report
from rqa.evaluation.runtime import seconds
from rqa.models.encoder import Encoder, EncoderSettings
from rqa.runtime.distributed import device

ROOT = Path(__file__).resolve().parents[1]
PEAK = 990e12  # dense bf16 FLOP/s of an H100 or H200
PRELOADED = [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "bert", "t5", "bart")]
PRELOADED += ["gpu_correctness", "rqa.recipe.reader", "rqa.recipe.retriever", "rqa.objectives.dca",
              "rqa.objectives.emdr", "rqa.objectives.fid", "rqa.objectives.swr", "rouge_score.rouge_scorer",
              "sacrebleu"]  # fmt: skip
SYLLABLES = [a + b for a in ("k", "l", "m", "n", "p", "st", "tr") for b in ("a", "e", "in", "o", "or", "u")]

REAPING = threading.Lock()  # if two threads read one child's status at once, the second gets 255

Line = dict[str, Any]


class Skip(Exception):
    """The reason why a check does not run."""


def launch(context: Any, target: Callable[..., None], limit: float, arguments: Sequence[Any], emit: Callable) -> str:
    """Run `target(pipe, *arguments)` in its own process and pass on what it sends. -> "", or how the process failed"""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(theirs, *arguments))
    with REAPING:
        process.start()
    theirs.close()
    deadline = time.monotonic() + limit
    try:
        while ours.poll(max(deadline - time.monotonic(), 0)):
            emit(ours.recv())
    except EOFError:
        with REAPING:
            process.join()
        return f"ended with status {process.exitcode}" if process.exitcode else ""
    process.kill()
    with REAPING:
        process.join()
    return f"stopped after {limit:.0f} s"


class Section:
    """A section's process: its device, sizes and remaining time, and where its lines go."""

    def __init__(self, pipe: Any, name: str, tiny: bool, limit: float, start_method: str) -> None:
        self.name, self.tiny, self.deadline = name, tiny, time.monotonic() + limit
        self.context, self.device = multiprocessing.get_context(start_method), device()
        self.cuda = self.device.type == "cuda"
        if start_method == "forkserver":  # processes launched from here are forked from their own server
            self.context.set_forkserver_preload(PRELOADED)
        self._pipe, self._turn = pipe, threading.Lock()
        if tiny:
            torch.set_num_threads(1)
        warnings.simplefilter("ignore")

    def left(self) -> float:
        """Seconds until this process is stopped."""
        return self.deadline - time.monotonic()

    def check(self, about: Line, work: Callable[..., Line], *arguments: Any, **options: Any) -> None:
        """Emit the result of `work` as one line, or why it failed; later checks run in either case."""
        line, began = {"section": self.name, **about}, time.monotonic()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            if self.left() < 5:
                raise Skip("no time left")
            line |= {"ok": True, **work(*arguments, **options)}
            if self.cuda and (peak := torch.cuda.max_memory_allocated()):
                line["peak_gib"] = round(peak / 2**30, 1)
        except Skip as reason:
            line["skipped"] = str(reason)
        except BaseException as error:  # includes SystemExit
            line |= {"ok": False, "error": described(error)}
        with self._turn:
            self._pipe.send({**line, "took_s": round(time.monotonic() - began, 1)})


def described(error: BaseException) -> str:
    """Describe an error: type, message, the innermost line in this repository, and the innermost line of all."""
    stack = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in stack if frame.filename.startswith(str(ROOT))]
    places = dict.fromkeys(f"{f.filename.removeprefix(f'{ROOT}/')}:{f.lineno}" for f in (*ours[-1:], *stack[-1:]))
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({', '.join(places)})"


def run_executable(pipe: Any, name: str, line: list[str], environment: dict[str, str], log: str) -> None:
    """Run an executable of bin/ with its output in a file; send "", or the reason of its failure."""
    os.environ.update(environment)
    rqa.evaluation.report.line_chart = lambda *_: "<svg/>"  # takes half the time of such a small run
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


def text(number: int, fewest: int, most: int) -> str:
    """Make a text of made-up words of one to three syllables; each syllable is one token."""
    chance = random.Random(number)
    words = ("".join(chance.choices(SYLLABLES, k=chance.randint(1, 3))) for _ in range(chance.randint(fewest, most)))
    return " ".join(words)


def tokenizer(template: str | None) -> Any:
    """Make a WordPiece tokenizer over these syllables; a template adds special tokens around a text."""
    special = {name: f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    pieces = [*ascii_lowercase, *digits, *punctuation, *(piece for piece in SYLLABLES if len(piece) > 1)]
    vocabulary = [*special.values(), *pieces, *(f"##{piece}" for piece in pieces)]
    numbered = {piece: number for number, piece in enumerate(vocabulary)}
    core = Tokenizer(models.WordPiece(numbered, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    if template:
        ends = [("[CLS]", 2), ("[SEP]", 3)]
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    names = {f"{name}_token": token for name, token in special.items()}
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=512, eos_token="[SEP]", **names)


def write_small_models(root: Path, width: int) -> None:
    """Write a decoder, an encoder, a T5 and a BART, with random weights and no dropout, and their tokenizers."""
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"vocab_size": 300, "pad_token_id": 0, "eos_token_id": 3}
    bert = hf.BertConfig(vocab_size=300, **shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    llama = hf.LlamaConfig(**shape, **ends, num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None)
    t5 = hf.T5Config(**ends, d_model=width, d_kv=width // 4, d_ff=2 * width, num_layers=2, num_heads=4,
                     dropout_rate=0.0, feed_forward_proj="gated-gelu", decoder_start_token_id=0)  # fmt: skip
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
    """Make a Llama of the given size, with random weights made on the device."""
    hidden, inner, layers, heads, key_heads, vocabulary = {
        "tiny": (64, 128, 2, 4, 2, 1000), "1B": (2048, 8192, 16, 32, 8, 128256), "3B": (3072, 8192, 28, 24, 8, 128256),
        "7B": (4096, 11008, 32, 32, 32, 32000),
    }["tiny" if section.tiny else shape]  # fmt: skip
    ends = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = hf.LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, **ends,
                            num_attention_heads=heads, num_key_value_heads=key_heads, vocab_size=vocabulary,
                            max_position_embeddings=4096, tie_word_embeddings=shape != "7B")  # fmt: skip
    torch.manual_seed(0)
    with section.device:
        return hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)


def save_encoder(section: Section, path: str) -> None:
    """Save an encoder of BERT-base's shape in `sentence-transformers`' layout; passages have at most 128 tokens."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = hf.BertModel(hf.BertConfig(**small if section.tiny else {}))
    settings = EncoderSettings(max_query_length=128, max_passage_length=128)
    Encoder(model, tokenizer("[CLS] $A [SEP]"), settings).save_pretrained(path)


class Watch:
    """A training loop's `before_step` that times steps, then counts one step's syncs and measures another's busy time.

    Events on the device time the steps, so that a loop that runs ahead of the device is not held back.
    """

    def __init__(self, section: Section, warm_up: int = 3, timed: int = 6) -> None:
        self.cuda, self.first, self.syncing = section.cuda, warm_up, warm_up + timed
        self.steps = self.syncing + 3
        self.moments: list[Any] = []
        self.graphs: list[int] = []
        self.syncs: Counter[str] = Counter()
        self.busy: float | str | None = None

    def __call__(self, step: int) -> dict[str, float]:
        if step <= self.syncing:
            moment: Any = time.perf_counter()
            if self.cuda:
                moment = torch.cuda.Event(enable_timing=True)
                moment.record()
            self.moments.append(moment)
            dynamo = sys.modules.get("torch._dynamo.utils")  # imported only where something is compiled
            self.graphs.append(dynamo.counters["stats"]["unique_graphs"] if dynamo else 0)
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
            try:
                on_device = [event for event in self.profiler.events() if "CUDA" in str(event.device_type)]
                self.busy = round(sum(event.self_device_time_total for event in on_device) / 1e6 / wall, 3)
            except (AssertionError, AttributeError, RuntimeError) as error:
                self.busy = described(error)  # keep the times of the steps
        return {}

    def _count(self, message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if "called a synchronizing" in str(message):
            ours = [f for f in traceback.extract_stack() if f"{ROOT}/rqa/" in f.filename]
            place = f"{ours[-1].filename.removeprefix(f'{ROOT}/')}:{ours[-1].lineno} " if ours else ""
            self.syncs[f"{place}<- {'/'.join(filename.split('/')[-2:])}:{lineno}"] += 1

    def result(self, units: dict[str, Sequence[float]], flops: Sequence[float]) -> Line:
        """Medians over the timed steps, from the units and floating-point operations of each step."""
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


def measured(work: Callable[[], Any], times: int = 3) -> float:
    """Return the median seconds of some runs, after one warm-up run."""
    work()
    return statistics.median(seconds(work) for _ in range(times))
