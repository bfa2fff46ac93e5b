"""Real signals to real processes."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from trainers import BIN, TORCHRUN

from rqa.runtime.files import damage
from rqa.training.checkpoint import checkpoints

Flags = dict[str, object]
PATIENCE = 90  # seconds, on a busy machine


@pytest.fixture
def endless(trainer_flags: Callable[..., Flags]) -> Flags:
    """A run that would go on for days."""
    return trainer_flags("train_sft", eval_file=None, test_file=None, max_steps=10_000_000, save_steps=20)


def wait_for_checkpoint(output: Path, seen: Sequence[Path] = ()) -> None:
    end = time.monotonic() + PATIENCE
    while checkpoints(output) == [*seen]:
        assert time.monotonic() < end, "no checkpoint"
        time.sleep(0.1)


@contextmanager
def torchrun(flags: Flags) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Two processes, past their first checkpoint; torchrun itself, and their ids."""
    line = [str(part) for flag, value in flags.items() for part in (f"--{flag}", value)]
    with subprocess.Popen([*TORCHRUN, str(BIN / "train_sft"), *line], stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for_checkpoint(Path(str(flags["output_dir"])))
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            ours = [int(child) for child in children if b"train_sft" in Path(f"/proc/{child}/cmdline").read_bytes()]
            yield process, ours
        finally:
            process.kill()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("killed", [True, False], ids=["one process is killed", "torchrun is asked to stop"])
def test_all_processes_end_within_a_minute_with_a_message_and_a_good_checkpoint(killed: bool, endless: Flags) -> None:
    with torchrun(endless) as (process, workers):
        os.kill(workers[0] if killed else process.pid, signal.SIGKILL if killed else signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    newest = checkpoints(Path(str(endless["output_dir"])))[-1]
    assert damage(newest) is None
    if killed:
        assert "error: another process of this run has ended" in errors
        assert "Signal 9 (SIGKILL)" in errors
    else:
        assert f"interrupted after step {newest.name.removeprefix('checkpoint-')};" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_status_0_within_one_step(
    number: int, endless: Flags, run_executable: Callable[[str, Flags], int], capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(str(endless["output_dir"]))

    def interrupt() -> None:
        wait_for_checkpoint(output)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    assert run_executable("train_sft", endless) == 0
    assert "interrupted after step" in capsys.readouterr().err
    assert not (output / "model.safetensors").exists()
    assert damage(checkpoints(output)[-1]) is None
