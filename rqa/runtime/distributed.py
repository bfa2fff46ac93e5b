"""One process or many: rank, device, sums over processes, work shared out and gathered."""

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather

T = TypeVar("T")

LONGEST_WAIT = timedelta(hours=6)  # for one process that loads, saves or judges alone; torchrun notices a dead one


def start() -> torch.device:
    """Join the process group when started by torchrun; choose this process's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
        atexit.register(stop)
    return device


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


@contextmanager
def in_turn() -> Iterator[None]:
    """Let the processes of a node do something one after another, such as holding a whole model in its memory."""
    rank, size = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    for _ in range(rank):
        barrier()
    try:
        yield
    finally:
        for _ in range(size - rank):
            barrier()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def total(values: Sequence[float]) -> list[float]:
    """Each value summed over all processes."""
    if world_size() == 1:
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def share(items: Sequence[T]) -> list[T]:
    """This process's part of the items: every world_size-th, from its rank on."""
    return list(items[rank() :: world_size()])


def gather(part: Sequence[T]) -> list[T]:
    """The items that `share` dealt out, each exactly once and in their first order, on every process."""
    if world_size() == 1:
        return list(part)
    parts: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, list(part))
    size = sum(map(len, parts))
    return [parts[i % world_size()][i // world_size()] for i in range(size)]


def from_main(value: T) -> T:
    """The main process's value, on every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in order of rank, each with gradient to its process. [N, ...] -> [sum N, ...]"""
    if world_size() == 1:
        return rows
    sizes = [int(size) for size in total_by_rank(len(rows))]
    padded = torch.nn.functional.pad(rows, (0, 0) * (rows.ndim - 1) + (0, max(sizes) - len(rows)))
    if rows.requires_grad:
        parts = list(all_gather(padded))
    else:
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def total_by_rank(value: float) -> list[float]:
    """The value of each process, in order of rank."""
    values: list[float] = [0.0] * world_size()
    values[rank()] = value
    return total(values)
