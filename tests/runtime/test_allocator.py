"""Large temporaries are page-faulted on once, not every time; counted in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from rqa.runtime.allocator import tune_allocator

if sys.argv[1] == "tuned":
    tune_allocator()
import torch

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for repeat in range(24):
    if repeat == 8:  # the heap has found its size
        before = faults()
    torch.ones(12 << 20).mul(2)  # two blocks of 48 MiB
print(faults() - before)
"""


def faults(argument: str, **environment: str) -> int:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRE"))}
    run = [sys.executable, "-c", PROGRAM, argument]
    return int(subprocess.run(run, env=clean | environment, check=True, capture_output=True, text=True).stdout)


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")


@glibc
def test_page_faults_of_large_temporaries_drop_more_than_tenfold() -> None:
    assert faults("tuned") * 10 < faults("default")


@glibc
@pytest.mark.parametrize("setting", [{"MALLOC_TOP_PAD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}])
def test_a_users_own_setting_is_left_alone(setting: dict[str, str]) -> None:
    assert faults("tuned", **setting) * 2 > faults("default", **setting)
