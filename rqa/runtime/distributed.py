"""One process or many: rank, device and precision, sums over processes, work divided and gathered."""

import atexit
import logging
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import numpy as np
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather

from rqa.runtime.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

ROWS_AT_ONCE = 2**16  # of a gathered array; NCCL moves them through GPU memory
LONGEST_WAIT = timedelta(hours=6)  # for a process that loads, saves or judges alone; torchrun notices dead processes


def start(deterministic: bool = False) -> None:
    """Join the process group if torchrun started this process; choose its device and, if set, deterministic kernels."""
    if deterministic:  # not `warn_only`: flash attention's backward pass would stay non-deterministic
        os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
        torch.use_deterministic_algorithms(True)
    if device().type == "cuda":
        torch.cuda.set_device(device())
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device().type == "cuda" else "gloo", timeout=LONGEST_WAIT)
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())


def device() -> torch.device:
    """This process's device: its own GPU, or the CPU."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


@cache
def compute_dtype(bf16: bool, fp16: bool) -> torch.dtype:
    """The dtype of matrix products; float32, with a warning, where bf16 would be emulated and 8 times slower."""
    if bf16 and fp16:
        raise UserError("--bf16 true: conflicts with --fp16 true; choose one")
    if fp16 and device().type == "cpu":
        raise UserError("--fp16 true: needs a CUDA device; use --bf16 true or leave it out")
    if bf16 and not has_bf16():
        kind = device().type.upper()
        log.warning("--bf16 true: this %s has no bf16 instructions; computing in float32, which is faster here", kind)
        return torch.float32
    return torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32


def has_bf16() -> bool:
    """Whether this process's device multiplies bf16 matrices in hardware."""
    return torch.cuda.get_device_capability() >= (8, 0) if device().type == "cuda" else cpu_has_bf16()


def cpu_has_bf16() -> bool:
    names = ("bf16",) if platform.machine() in ("arm64", "aarch64") else ("avx512_bf16", "amx_bf16")
    return any(map(torch.cpu.get_capabilities().get, names))


def autocast(dtype: torch.dtype) -> AbstractContextManager:
    """Autocast to float16. It does nothing for other dtypes: models that compute in bfloat16 have bfloat16 weights."""
    return torch.autocast(device().type, torch.float16, enabled=dtype is torch.float16)


@contextmanager
def tf32() -> Iterator[None]:
    """Let CUDA multiply float32 matrices with a 10-bit mantissa inside the block, many times faster."""
    torch.set_float32_matmul_precision("high" if device().type == "cuda" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def in_turn() -> Iterator[None]:
    """Run the block in one process of a node after another, for work such as holding a whole model in memory."""
    local_rank, size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    for _ in range(local_rank):
        barrier()
    try:
        yield
    finally:
        for _ in range(size - local_rank):
            barrier()


def total(values: Sequence[float]) -> list[float]:
    """Sum each value over all processes."""
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor)
    return tensor.tolist()


def total_by_rank(value: float) -> list[float]:
    """The value of each process, in order of rank."""
    return total([value if number == rank() else 0.0 for number in range(world_size())])


def share(items: Sequence[T]) -> list[T]:
    """This process's share of the items: every world_size-th one, starting at its rank."""
    return list(items[rank() :: world_size()])


def gather(part: Sequence[T]) -> list[T]:
    """Gather on every process the items that `share` divided, in their original order."""
    if world_size() == 1:
        return list(part)
    parts: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, list(part))
    return [parts[i % world_size()][i // world_size()] for i in range(sum(map(len, parts)))]


def gather_array(part: np.ndarray) -> np.ndarray:
    """`gather` for the rows of an array, without a Python object per row. [n, ...] -> [N, ...]"""
    if world_size() == 1:
        return part
    sizes = [int(size) for size in total_by_rank(len(part))]
    whole = np.empty((sum(sizes), *part.shape[1:]), part.dtype)
    for start in range(0, max(sizes), ROWS_AT_ONCE):
        parts = [part] * world_size()
        dist.all_gather_object(parts, part[start : start + ROWS_AT_ONCE])
        for number, rows in enumerate(parts):
            whole[number :: world_size()][start : start + len(rows)] = rows
    return whole


def from_main(value: T) -> T:
    """The main process's value, on every process."""
    return from_process(0, value)


def from_process(number: int, value: T) -> T:
    """One process's value, on every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=number)
    return box[0]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Gather the rows of all processes in order of rank; gradients flow back to them. [N, ...] -> [sum N, ...]"""
    if world_size() == 1:
        return rows
    sizes = [int(size) for size in total_by_rank(len(rows))]
    padded = torch.nn.functional.pad(rows, (0, 0) * (rows.ndim - 1) + (0, max(sizes) - len(rows)))
    return torch.cat([part[:size] for part, size in zip(all_gather(padded), sizes, strict=True)])
