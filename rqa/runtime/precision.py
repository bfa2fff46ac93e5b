"""Which number format a computation runs in, and the context that sets it."""

import logging
import platform
from contextlib import AbstractContextManager
from functools import cache

import torch

from rqa.runtime.errors import UserError

log = logging.getLogger(__name__)


@cache
def compute_dtype(bf16: bool, fp16: bool, device: torch.device) -> torch.dtype:
    """The dtype that matrix products run in.

    A CPU without bf16 instructions emulates them, about eight times slower than float32: there bf16 is answered by
    float32, with one line that says so.

    Raises:
        UserError: both are asked for, or fp16 on a CPU.
    """
    if bf16 and fp16:
        raise UserError("--bf16 true and --fp16 true exclude each other; choose one")
    if fp16:
        if device.type != "cuda":
            raise UserError("--fp16 true needs a CUDA device; use --bf16 true or neither")
        return torch.float16
    if not bf16:
        return torch.float32
    if device.type == "cpu" and not cpu_has_bf16():
        log.warning("--bf16 true: this CPU has no bf16 instructions; computing in float32, which is faster here")
        return torch.float32
    return torch.bfloat16


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware."""
    if platform.machine() in ("arm64", "aarch64"):
        return bool(torch.cpu.get_capabilities().get("bf16"))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Autocast to bfloat16 or float16; nothing for wider formats."""
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype=dtype if half else None, enabled=half)
