"""Large temporaries are page-faulted on once, not every time; counted in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

from rqa.runtime import allocator

PROGRAM = """
import resource, sys
from rqa.runtime.cli import (tune_allocator)

if sys.argv[1] == "tuned":
    tune_allocator()
import torch

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for repeat in range(20):
    if repeat == 8:  # the heap has found its size
        before = faults()
    torch.ones(12 << 20).mul(2)  # two blocks of 48 MiB
print(faults() - before)
"""


def faults(argument: str) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(allocator.THEIR_SETTINGS)}
    run = [sys.executable, "-c", PROGRAM, argument]
    done = subprocess.run(run, env=environment | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
def test_page_faults_of_large_temporaries_drop_more_than_tenfold() -> None:
    assert faults("tuned") * 10 < faults("default")


@pytest.mark.parametrize("name", ["MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_a_users_own_choice_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: pytest.fail("the allocator was touched"))
    monkeypatch.setenv(name, "libjemalloc.so.2")
    allocator.tune_allocator()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: pytest.fail("the allocator was touched"))
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    allocator.tune_allocator()
