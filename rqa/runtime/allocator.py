"""Keep glibc from handing the memory of every large temporary back to the kernel.

By default an allocation of 32 MiB or more, and after `free` the top of the heap, goes back at once, and the next step
page-faults on it again. A step of training on a CPU then spends a third of its time in the kernel.
"""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
NEVER = -1
THEIR_SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


def tune_allocator() -> None:
    """Have large blocks come from the heap, and the heap keep what is freed.

    Call it before the first large allocation. It does nothing without glibc, and nothing where the user has chosen an
    allocator (`LD_PRELOAD`) or its settings (`MALLOC_*`, `GLIBC_TUNABLES`).

    Source: mallopt(3).
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(THEIR_SETTINGS) for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, NEVER)
