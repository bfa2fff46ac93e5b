"""Real signals to real processes."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from trainers import BIN, TORCHRUN, Flags

from rqa.runtime.cli import as_words
from rqa.runtime.files import damage
from rqa.training.checkpoint import checkpoints

PATIENCE = 90  # seconds, on a busy machine


def wait_for_checkpoint(output: Path, seen: Sequence[Path] = ()) -> None:
    end = time.monotonic() + PATIENCE
    while checkpoints(output) == [*seen]:
        assert time.monotonic() < end, "no checkpoint"
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("killed", [True, False], ids=["one process is killed", "torchrun is asked to stop"])
def test_all_processes_end_within_a_minute_with_a_message_and_a_good_checkpoint(
    killed: bool, trainer_flags: Flags, tmp_path: Path
) -> None:
    """A run that would go on for days; one process alone: test_loop.py and test_rounds.py."""
    flags = trainer_flags("train_sft", eval_file=None, test_file=None, max_steps=10_000_000, save_steps=20)
    line = [*TORCHRUN, str(BIN / "train_sft"), *as_words(flags)]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for_checkpoint(tmp_path / "out")
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            workers = [int(child) for child in children if b"train_sft" in Path(f"/proc/{child}/cmdline").read_bytes()]
            os.kill(workers[0] if killed else process.pid, signal.SIGKILL if killed else signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    newest = checkpoints(tmp_path / "out")[-1]
    assert damage(newest) is None
    if killed:
        assert "error: another process of this run has ended" in errors
        assert "Signal 9 (SIGKILL)" in errors
    else:
        assert f"interrupted after step {newest.name.removeprefix('checkpoint-')};" in errors
