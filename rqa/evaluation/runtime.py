"""Time, memory and machine of an evaluation."""

import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import faiss
import numpy as np
import transformers

from rqa.runtime import distributed

PACKAGES = (torch, transformers, faiss, np)


def seconds(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes, until the GPU has finished, too."""
    finish = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    finish()
    started = time.perf_counter()
    work()
    finish()
    return time.perf_counter() - started


def latencies(durations: Sequence[float]) -> dict[str, float]:
    """Percentiles in milliseconds of durations in seconds: `latency_p50_ms` and so on."""
    return {f"latency_p{p}_ms": float(np.percentile(np.asarray(durations) * 1000, p)) for p in (50, 95, 99)}


def peak_memory() -> dict[str, float]:
    """Peak memory of this process so far in GiB, of the host and, if there is one, of the GPU."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated() / 2**30
    return peak


def machine() -> dict[str, Any]:
    try:  # on Linux `platform.processor` is empty or only the architecture
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package.__name__: package.__version__ for package in PACKAGES},
    }


def machine_line(machine: dict[str, Any]) -> str:
    processor = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", *(package.__name__ for package in PACKAGES)))
    return f"{processor}; {machine['processes']} process(es) of {machine['threads']} thread(s); {versions}"
