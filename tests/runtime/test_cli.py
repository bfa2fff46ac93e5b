"""What is around every executable: its allocator and its progress."""

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rqa.runtime import cli

PROGRAM = """
import resource, sys
from rqa.runtime.cli import tune_allocator

if sys.argv[1] == "tuned":
    tune_allocator()
import torch

faults = []
for _ in range(20):
    torch.ones(12 << 20).mul(2)  # two blocks of 48 MiB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[7])  # by then the heap has found its size
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
def test_page_faults_of_large_temporaries_drop_more_than_tenfold() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(cli.THEIR_SETTINGS)}
    program = [sys.executable, "-c", PROGRAM]
    tuned, default = (
        int(subprocess.check_output([*program, kind], env=environment | {"OMP_NUM_THREADS": "1"}))
        for kind in ("tuned", "default")
    )
    assert tuned * 10 < default


@pytest.mark.parametrize("name", ["MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD", "PYTORCH_CUDA_ALLOC_CONF", "X"])
def test_a_users_choice_and_another_c_library_are_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda _: pytest.fail("the allocator was touched"))
    if not name.startswith(cli.THEIR_SETTINGS):
        monkeypatch.setattr(cli.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv(name, "theirs")
    cli.tune_allocator()
    segments = None if name.startswith("PYTORCH") else "expandable_segments:True"  # they grow unless the user says how
    assert os.environ.get("PYTORCH_ALLOC_CONF") == segments


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
    told = ["2,400 of 13,000, 80/s, 02:12 left", "4,800 of 13,000, 80/s, 01:42 left"]
    assert caplog.messages[:2] == [f"encode documents: {each}" for each in told]
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


SAYS = r"""
import logging, sys
from rqa.runtime.cli import progress, run
from rqa.runtime.errors import UserError

def main():
    logging.getLogger("rqa").warning("%s", "log \x1b[31m \u202e")
    print("said \x1b[31m", "a\nb\t\ud800")
    for number in progress(range(int(sys.argv[1])), desc="all"):
        print(number)
    raise UserError("refused \x1b[31m")

run(main)
"""


@pytest.mark.parametrize(
    ("redirected", "status", "said"),
    [("", 2, "error: refused \\x1b[31m"), (">/dev/full", 2, "error: standard output: No space left on device"),
     ("| true", 141, ""), ("2>/dev/full", 2, ""), (">&-", 2, "error: refused \\x1b[31m")],
)  # fmt: skip
def test_a_closed_or_full_output_ends_with_at_most_one_line_and_terminals_are_shown_text_alone(
    redirected: str, status: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "says.py").write_text(SAYS)
    line = f"{sys.executable} {tmp_path / 'says.py'} {10**5 if redirected else 0} {redirected}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == status
    if "2>" not in redirected:
        first, *others = done.stderr.splitlines()
        assert first.endswith(r"log \x1b[31m \u202e")
        assert others == [said] * bool(said)
    if not redirected:
        assert done.stdout == "said \\x1b[31m a\nb\t\\ud800\n"


def test_what_an_output_cannot_encode_is_escaped() -> None:
    script = "from rqa.runtime.cli import run; run(lambda: print('caf\\xe9'))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment)
    assert (done.stdout.split(), done.returncode) == ([rb"caf\xe9"], 0)
