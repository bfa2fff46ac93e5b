"""The sections of gpu.py that check whether rqa is correct on this device: kernels, trainers and the test suite."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
import transformers as hf
from gpu_sections import ROOT, Line, Section, described, launch, run_executable, text, write_small_models
from safetensors.torch import load_file

from rqa.data import Document, Example, write_examples
from rqa.documents import write_documents
from rqa.models.attention import PACKED_ATTENTION, packed_attention
from rqa.models.loading import batching_is_exact, hidden_states
from rqa.packing import pack
from rqa.runtime.cli import as_words

CPU = "float32 on the CPU"


def kernels(section: Section) -> None:
    """Compare packed attention with float64, and models on packed rows with the same models on single sequences."""
    for dtype in [torch.float32, torch.bfloat16, *([torch.float16] if section.cuda else [])]:
        section.check({"check": "attention against float64", "dtype": dtype}, attention, section, dtype)
        section.check({"check": "packing of models", "dtype": dtype}, packing, section, dtype)


def attention(section: Section, dtype: Any) -> Line:
    """Measure the largest relative error of outputs and gradients in each setting."""
    lengths, tolerance = [5, 300, 1, 128, 128, 77], {torch.float32: 1e-5, torch.float16: 4e-3}.get(dtype, 2e-2)
    borders = torch.tensor([0, *lengths]).cumsum(0).int().to(section.device)

    def error(causal: bool, key_heads: int, window: int | None, width: int) -> float:
        torch.manual_seed(0)
        shapes = [(1, sum(lengths), heads, width) for heads in (4, key_heads, key_heads, 4)]
        *inputs, weights = (torch.randn(shape, device=section.device).to(dtype).transpose(1, 2) for shape in shapes)
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
    """Measure each model's largest difference of hidden states, in units of their spread; all must pass rqa's probe."""
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
        if not batching_is_exact(model):
            raise ValueError("the probe says that this model cannot be packed")
        texts = [[3 + number] * length for number, length in enumerate((9, 1, 30))]
        with torch.no_grad():
            together = hidden_states(model, pack(texts).to(section.device)).float()
            alone = torch.cat([hidden_states(model, pack([ids]).to(section.device)).float() for ids in texts])
        return float((together - alone).abs().max() / alone.std())

    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    return judged({name: lambda config=config: difference(config) for name, config in configs.items()}, tolerance)


def judged(work: dict[str, Callable[[], float]], tolerance: float) -> Line:
    """Collect each figure, or its error; all figures must be within the tolerance."""
    found: dict[str, Any] = {}
    for name, figure in work.items():
        try:
            found[name] = float(f"{figure():.2g}")
        except Exception as error:
            found[name] = described(error)
    return {"ok": all(isinstance(x, float) and x <= tolerance for x in found.values()), "tolerance": tolerance, **found}


def trainers(section: Section) -> None:
    """Run seven trainers' executables on small random models, several at once; compare with float32 on the CPU."""
    with TemporaryDirectory(prefix="rqa-cuda-") as directory:
        root = Path(directory)
        write_small_models(root, 32 if section.tiny else 256)
        documents = [Document(text(number, 15, 25), {"source": f"guide/{number}"}) for number in range(64)]
        examples = [Example(f"{' '.join(d.page_content.split()[:4])}?", (d,), " ".join(d.page_content.split()[4:9]))
                    for d in documents]  # fmt: skip
        write_documents(root / "documents.jsonl", documents)
        write_examples(root / "train.jsonl", examples[:48])
        write_examples(root / "test.jsonl", examples[48:])
        common = {"train_file": root / "train.jsonl", "eval_file": root / "test.jsonl",
                  "test_file": root / "test.jsonl", "document_path": root / "documents.jsonl", "max_steps": 4,
                  "logging_steps": 1, "save_steps": 2, "eval_steps": 4, "per_device_train_batch_size": 4,
                  "learning_rate": 1e-4, "load_best_model_at_end": "false"}  # fmt: skip
        encoder, retrieving = {"model_name_or_path": root / "encoder"}, {"embedding_model": root / "encoder"}
        sharp = {**encoder, "retrieve_temperature": 0.02}  # otherwise the losses of lists are almost zero
        decoder = {"model_name_or_path": root / "lm", "max_new_tokens": 8, "max_seq_length": 512, **retrieving}
        short = {"max_encoder_seq_length": 128}
        fid = {**short, "max_decoder_seq_length": 16, **retrieving}
        judge = {**sharp, "lm_model_path": root / "lm", "num_docs": 4, "text_maxlength": 256, "refresh_step": 2}
        lines = {
            "sft": ("train_sft", decoder), "swr": ("train_swr", decoder), "ctl": ("train_ctl", encoder),
            "rpg": ("train_rpg", judge), "emdr": ("train_emdr", judge),
            "dca": ("train_dca", {**sharp, **short, "reader_model_path": root / "t5", "n_context": 4}),
            "fid": ("train_fid", {"model_name_or_path": f"bert::{root / 'encoder'}", **fid}),
            "fid bart": ("train_fid", {"model_name_or_path": root / "bart", **fid}),
            "fid t5": ("train_fid", {"model_name_or_path": root / "t5", **fid}),
        }  # fmt: skip
        wanted = dict(jobs(section, lines))
        truths: dict[str, Future[list[float]]] = {name: Future() for name, kind in wanted if kind == CPU}

        def work(job: tuple[str, str]) -> None:
            name, kind = job
            section.check({"trainer": name, "kind": kind}, compare, name, kind)
            if kind == CPU and not truths[name].done():
                truths[name].set_exception(RuntimeError("its run on the CPU failed"))

        def compare(name: str, kind: str) -> Line:
            own, output = wanted[name, kind], root / f"{name} {kind}"
            losses = run(name, output, own, on_cpu=kind == CPU)
            found: Line = {"losses": [round(loss, 5) for loss in losses]}
            if kind == CPU:
                truths[name].set_result(losses)
                return found
            off = [abs(a - b) / max(abs(b), 0.1) for a, b in zip(losses, truths[name].result(), strict=True)]
            found |= {"first_off": round(off[0], 5), "later_off": round(max(off[1:]), 5)}
            found["ok"] = off[0] < (0.01 if kind in ("float32", "fp16") else 0.05)
            if kind == "resumed":
                again = root / f"{name} again"
                run(name, again, {**own, "resume_from_checkpoint": output / "checkpoint-2"})
                found["weights_off"] = worst = weights_off(*(path / "model.safetensors" for path in (output, again)))
                found["ok"] &= worst <= (0 if "deterministic" in own else 0.01)
            return found

        def run(name: str, output: Path, own: Line, on_cpu: bool = False) -> list[float]:
            executable, line = lines[name]
            flags = {**common, **line, **own, "output_dir": output}
            environment = {"RQA_CACHE": f"{output}.cache"} | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})
            told: list[str] = []
            given = (executable, as_words(flags), environment, f"{output}.log")
            ended = launch(section.context, run_executable, section.left() - 3, given, told.append)
            if problem := ended or told[0]:
                raise RuntimeError(problem)
            history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
            return [entry["loss"] for entry in history if "loss" in entry]

        with ThreadPoolExecutor(2 if section.tiny else 14) as pool:
            list(pool.map(work, wanted))


def jobs(section: Section, lines: Line) -> Iterator[tuple[tuple[str, str], Line]]:
    """List each trainer's runs by name and kind, with further flags; the runs on the CPU are the reference."""
    bf16, few = {"bf16": "true"}, ("sft", "ctl", "rpg", "fid")
    for name in lines:
        if not section.tiny or " " not in name:
            yield (name, CPU), {}
    for name in ("sft", "ctl") if section.cuda and not section.tiny else ():  # first, as they take long
        yield (name, "compiled"), {**bf16, "torch_compile": "true"}
    for name in ("ctl",) if section.tiny else lines:
        yield (name, "bf16"), bf16
    for name in ("sft",) if section.tiny else few:
        yield (name, "resumed"), {**bf16, "deterministic": "true"}
    yield ("sft", "lora"), {**bf16, "use_lora": "true", "gradient_checkpointing": "true"}
    yield ("rpg", "async refresh"), {**bf16, "refresh_async": "true"}
    if section.tiny:
        return
    for name in few:
        yield (name, "float32"), {}
    for name in few if section.cuda else ():
        yield (name, "fp16"), {"fp16": "true"}
    yield ("fid", "checkpointing"), {**bf16, "gradient_checkpointing": "true"}
    yield ("ctl", "chunks"), {**bf16, "chunk_size": 2}
    yield ("rpg", "frozen passages"), {**bf16, "train_query_encoder_only": "true"}


def weights_off(ours: Path, theirs: Path) -> float:
    """Return the largest difference between two files' weights, in units of a tensor's largest weight."""
    first, second = load_file(ours), load_file(theirs)
    return max(float((first[name] - second[name]).abs().max() / first[name].abs().max()) for name in first)


def tests(section: Section) -> None:
    """Run the test suite with the GPU visible, then the tests that failed once more without it."""
    processes = [] if section.tiny else ["-n", str(min(os.cpu_count() or 2, 12))]

    def run(seconds: float, visible: bool, chosen: Sequence[str]) -> tuple[str, list[str]]:
        line = [sys.executable, "-m", "pytest", "-vv", "--tb=line", "-p", "no:cacheprovider", *processes, *chosen]
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
