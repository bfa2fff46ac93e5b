"""What is around every executable: its allocator, its progress, the bounds of its numbers."""

import logging
import math
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from rqa.runtime import cli
from rqa.runtime.errors import UserError
from rqa.runtime.flags import Arguments

PROGRAM = """
import resource, sys
from rqa.runtime.cli import tune_allocator

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
    environment = {name: value for name, value in os.environ.items() if not name.startswith(cli.THEIR_SETTINGS)}
    program = [sys.executable, "-c", PROGRAM, argument]
    return int(subprocess.check_output(program, env=environment | {"OMP_NUM_THREADS": "1"}, text=True))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
def test_page_faults_of_large_temporaries_drop_more_than_tenfold() -> None:
    assert faults("tuned") * 10 < faults("default")


@pytest.mark.parametrize("name", ["MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD", None])
def test_a_users_own_choice_and_another_c_library_are_left_alone(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda _: pytest.fail("the allocator was touched"))
    if name:
        monkeypatch.setenv(name, "libjemalloc.so.2")
    else:
        monkeypatch.setattr(cli.platform, "libc_ver", lambda: ("", ""))
    cli.tune_allocator()


def test_progress_is_a_bar_on_a_terminal_and_elsewhere_a_line_every_half_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(cli, "time", SimpleNamespace(monotonic=lambda: now[0]))
    caplog.set_level(logging.INFO, "rqa")

    def work(count: int, seconds: float, **options: Any) -> None:
        with cli.progress(desc="encode documents", unit="text", **options) as bar:
            for _ in range(count):
                now[0] += seconds
                bar.update(100)
                bar.refresh()

    work(130, 1.25, total=13_000)
    assert caplog.messages[:2] == ["encode documents: 2,400 of 13,000, 80/s", "encode documents: 4,800 of 13,000, 80/s"]
    assert len(caplog.messages) == 5
    caplog.clear()
    work(3, 40)
    work(3, 40, disable=True)
    assert caplog.messages[0] == "encode documents: 100, 2.5/s"
    assert len(caplog.messages) == 3
    assert list(cli.progress([1, 2], desc="all")) == [1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    work(3, 40)
    assert "\rencode documents: 300text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (0, {"at_least": 1}, "--n 0: must be at least 1"),
        (0.0, {"above": 0, "at_most": 1}, "--n 0.0: must be above 0 and at most 1"),
        (1.0, {"at_least": 0, "below": 1}, "--n 1.0: must be at least 0 and less than 1"),
        (math.nan, {"at_least": 0}, "--n nan: must be at least 0"),
        ([4, 0], {"at_least": 1}, "--n 0: must be at least 1"),
        *((value, {"at_least": 1, "at_most": 2}, None) for value in (1, 2.0, None, [1, 2], [])),
    ],
)
def test_what_is_outside_of_its_bounds_is_refused_by_name(
    value: Any, bounds: dict[str, float], message: str | None
) -> None:
    @dataclass(kw_only=True)
    class Numbers(Arguments):
        n: Any

    if message is None:
        Numbers(n=value).check_bounds("n", **bounds)
    else:
        with pytest.raises(UserError, match=f"^{message}$"):
            Numbers(n=value).check_bounds("n", **bounds)
